"""The rows of the paper's tables as experiments, for every dataset's comparison."""

from __future__ import annotations

from collections.abc import Mapping

from comparison import Experiment

METHODS = ("full", "bias", "partial", "proj", "lora", "prompt", "adapter", "read")

POOLED = ("avg_cosine", "max_cosine", "avg_l2", "max_l2")  # Table 9


def nine_methods(
    adapter_rates: tuple[float, ...],
    others: Mapping[str, tuple[float, ...]],
    *,
    frozen: str,
    alone: str = "",
    aligned: str = "",
) -> dict[str, Experiment]:
    """Tables 1 to 5: the backbone as it is, and the nine methods.

    Args:
        adapter_rates: learning rates of all methods but those in `others`; READ-PVLA has those of "read".
        others: learning rates by method.
        frozen: name of the first row.
        alone: what switches the script's alignment off, where it is on by itself.
        aligned: what switches it on, where it is off.
    """
    rates = {**dict.fromkeys(METHODS, adapter_rates), **others}
    named = {name: Experiment(f"--method {name} {alone}".strip(), rates[name]) for name in METHODS}
    pvla = Experiment(f"--method read {aligned}".strip(), rates["read"])
    return {frozen: Experiment("--method none", (0.0,)), **named, "read_pvla": pvla}


def distances(aligned: Experiment) -> dict[str, Experiment]:
    """Table 9: the distance that is minimised.

    Args:
        aligned: the row whose distance is varied.
    """
    pooled = {n: Experiment(f"{aligned.arguments} --pvla_distance {n}", aligned.learning_rates) for n in POOLED}
    return {"POT": aligned, **pooled}
