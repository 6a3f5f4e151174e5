"""Baselines that train a part of the backbone's own parameters: Full, Bias, Partial, Proj."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from torch import nn

__all__ = ["FREEZING_METHODS", "train_only"]

FREEZING_METHODS = ("full", "bias", "partial", "proj", "none")


def train_only(model: nn.Module, method: str, *, also: Sequence[str] = ()) -> nn.Module:
    """Sets `requires_grad` of every parameter, in place.

    Source: READ-PVLA section 4.1, "Baseline methods".

    Args:
        model: the backbone.
        method: "full" = all parameters; "bias" = the bias terms (BitFit); "partial" = the last block of every stack
            of blocks; "proj" = the output layer (`get_output_embeddings()`, or the heads of a grounding model);
            "none" = nothing.
        also: suffixes of module names that are trained in any case (modules that are new, not pretrained).

    Returns:
        The model.

    Raises:
        ValueError: an unknown method, or one that finds nothing to train in this model.
    """
    if method not in FREEZING_METHODS:
        raise ValueError(f"method={method!r} is not one of {FREEZING_METHODS}")
    chosen = {id(parameter) for parameter in _chosen(model, method)}
    for suffix in also:
        for name, module in model.named_modules():
            if name == suffix or name.endswith(f".{suffix}"):
                chosen |= {id(parameter) for parameter in module.parameters()}
    if not chosen and method != "none":
        raise ValueError(f"method={method!r} finds nothing to train in {type(model).__name__}")
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    return model


def _chosen(model: nn.Module, method: str) -> list[nn.Parameter]:
    if method == "full":
        return list(model.parameters())
    if method == "bias":
        return [p for name, p in model.named_parameters() if re.search(r"(^|\.)(\w+_)?bias$", name)]
    if method == "partial":
        # The visual transformer reads features, it is not one of the backbone's own stacks: the paper's counts leave
        # it out (docs/backbones.md).
        named = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
        stacks = [stack for name, stack in named if "img_transformer" not in name]
        return [p for stack in _outermost(stacks) for p in stack[-1].parameters()]
    if method == "proj":
        find_head: Callable[[], nn.Module | None] | None = getattr(model, "get_output_embeddings", None)
        head = find_head() if find_head is not None else None
        return list(head.parameters()) if head is not None else []
    return []


def _outermost(stacks: list[nn.ModuleList]) -> list[nn.ModuleList]:
    inner = {id(m) for stack in stacks for m in stack.modules() if m is not stack}
    return [stack for stack in stacks if id(stack) not in inner]
