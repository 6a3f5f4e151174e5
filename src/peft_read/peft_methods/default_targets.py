"""The modules that a method adapts by default, as `target_modules`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

from peft import TaskType
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .endings import Ending, config_around, feed_forward_endings, in_and_out, is_inside_an_adapter
from .stacks import is_causal

__all__ = ["all_linear", "default_targets", "linear_layers", "names_of"]


def default_targets(
    model: nn.Module,
    part: str | None = None,
    *,
    as_list: bool = False,
    endings_of: Callable[[nn.Module], list[Ending]] = feed_forward_endings,
    blocks: str = "feed-forward blocks",
    method: str = "READ",
) -> set[str] | str:
    """The names of the modules that a method adapts by default.

    Args:
        model: the model.
        part: "language", "vision" or "audio": the blocks of that part; "all": every one. If absent, those of the
            language model of a model that generates text, every one but connectors of other models.
        as_list: whether a list of names is needed, which `layers_to_transform` goes with.
        endings_of: finds the modules that end the blocks.
        blocks: what these are called, for the message.
        method: what the method is called, for the message.

    Returns:
        `target_modules`: names, or a regular expression where no names select these modules alone.

    Raises:
        ValueError: if no such block is found, with the names of the linear layers that there are.
    """
    endings = endings_of(model)
    parts = {ending.part for ending in endings}
    if part in ("language", "vision", "audio"):
        chosen = [ending for ending in endings if ending.part == part]
    elif part == "all":
        chosen = endings
    else:
        chosen = [ending for ending in endings if ending.part != "connector"]
        language = [ending for ending in chosen if ending.part == "language"]
        if len(parts) > 1 and language and _writes_text(model, language):
            chosen = [ending for ending in chosen if ending in language or _is_no_model_of_its_own(model, ending.path)]
    if not chosen:
        raise ValueError(_nothing_found(model, part, parts, blocks, method))
    paths = [ending.path for ending in chosen]
    return names_of(paths, [name for name, _ in model.named_modules()], as_list=as_list)


def _is_no_model_of_its_own(model: nn.Module, path: str) -> bool:
    """Whether a part has the configuration of the whole, as the encoder of a speech recogniser has."""
    config = config_around(model, path)
    return config is not None and config is getattr(model, "config", None)


def _writes_text(model: nn.Module, language: list[Ending]) -> bool:
    can_generate = getattr(model, "can_generate", None)
    return bool(can_generate and can_generate()) or any(is_causal(model, ending.path) for ending in language)


def _nothing_found(model: nn.Module, part: str | None, parts: set[str], blocks: str, method: str) -> str:
    family = getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__
    if part in ("language", "vision", "audio") and parts:
        reason = f"has no {blocks} in a part {part!r}, only in {', '.join(map(repr, sorted(parts)))}"
    else:
        reason = f"has no {blocks} that {method} knows by their structure"
    block = "a feed-forward block" if blocks == "feed-forward blocks" else "a block"
    return (
        f"Please specify `target_modules` in `peft_config`: {family!r} {reason}. Its linear layers are "
        f"{linear_layers(model)}; name those that end {block}."
    )


def all_linear(model: nn.Module, task_type: str | None = None) -> set[str]:
    """The linear layers that peft's "all-linear" names in a model without adapters, also where some have adapters.

    peft itself knows an adapted layer by the word "Linear" in the name of its class, which not every method has.

    Args:
        model: the model.
        task_type: of the configuration; with "SEQ_CLS" the classifier is left out, as output embeddings always are.

    Returns:
        Names that select these layers and nothing else; none if there are no such layers.
    """
    chosen = []
    heads = _heads(model, task_type)
    for name, module in model.named_modules():
        layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        adapted = isinstance(module, BaseTunerLayer) and "Linear" in type(module).__name__  # a quantised one, by peft
        is_linear = isinstance(layer, nn.Linear | Conv1D) or adapted
        if is_linear and not any(module is head for head in heads) and not is_inside_an_adapter(model, name):
            chosen.append(name)
    return set(names_of(chosen, [name for name, _ in model.named_modules()], as_list=True))


def _heads(model: nn.Module, task_type: str | None) -> list[nn.Module]:
    """What "all-linear" leaves out: the layer that puts out tokens, or else that which puts out classes."""
    if not isinstance(model, PreTrainedModel):
        return []
    embeddings = model.get_output_embeddings()
    if embeddings is not None:
        return [embeddings]
    heads = [getattr(model, name, None) for name in SEQ_CLS_HEAD_NAMES] if task_type == TaskType.SEQ_CLS else []
    return [head for head in heads if head is not None][:1]


def linear_layers(model: nn.Module) -> str:
    """The names of a model's linear layers for a message, with a star for each number; the most frequent twelve."""
    linear = Counter(
        re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name)
        for name, module in model.named_modules()
        if in_and_out(module) and not is_inside_an_adapter(model, name)
    )
    return ", ".join(f"'{name}'" for name, _ in linear.most_common(12)) or "none"


def names_of(paths: list[str], everything: list[str], *, as_list: bool) -> set[str] | str:
    """Paths as `target_modules` takes them.

    Returns:
        The shortest endings of the paths that select these modules and nothing else, by peft's rule for lists; where
        there are none, a regular expression with the same property, or the paths themselves if a list is needed.
    """
    chosen = set(paths)
    by_ending: dict[str, set[str]] = {}
    for name in everything:
        for ending in _endings(name):
            by_ending.setdefault(ending, set()).add(name)
    shortest = {
        path: next((e for e in _endings(path) if by_ending[e] <= chosen and not _has_number(e)), None)
        for path in paths
    }
    if None not in shortest.values():
        return set(shortest.values())  # type: ignore[arg-type]
    if as_list:
        return chosen
    by_pattern: dict[str, set[str]] = {}
    for name in everything:
        for ending in _endings(name):
            by_pattern.setdefault(_any_number(ending), set()).add(name)
    patterns = {
        next((p for p in map(_any_number, _endings(path)) if by_pattern[p] <= chosen), re.escape(path))
        for path in paths
    }
    return rf"(.*\.)?({'|'.join(sorted(patterns))})"


def _endings(name: str) -> list[str]:
    """`a.b.c` -> `c`, `b.c`, `a.b.c`."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]


def _has_number(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


def _any_number(name: str) -> str:
    """A pattern of a path with any number in the place of each number."""
    return r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in name.split("."))
