"""Baselines that train a part of the backbone's own parameters: Full, Bias, Partial, Proj."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from torch import nn

from ..names import near_names, own_names, without_numbers

__all__ = ["FREEZING_METHODS", "HEADS", "modules_asked_for", "train_only"]

FREEZING_METHODS = ("full", "bias", "partial", "proj", "none")
# Output layers of models without a language-modelling head, by model type: module names or their ends.
HEADS = {
    "moment_detr": ("span_embed", "class_embed", "saliency_proj"),
    "umt": ("saliency_pred", "center_pred", "window_pred", "offset_pred"),
}
# Stacks that are no list if they have one block, as the original names its weights.
SINGLE_BLOCKS = {"umt": ("video_enc.encoder", "audio_enc.encoder")}


def train_only(model: nn.Module, method: str, *, also: Sequence[str] = ()) -> nn.Module:
    """Sets `requires_grad` of every parameter, in place.

    Source: READ-PVLA section 4.1, "Baseline methods".

    Args:
        model: the backbone.
        method: "full" = all parameters; "bias" = the bias terms (BitFit); "partial" = the last block of every stack
            of transformer blocks; "proj" = the output layer (`get_output_embeddings()`, or the heads of a grounding
            model, see `HEADS`); "none" = nothing.
        also: suffixes of module names that are trained in any case (modules that are new, not pretrained).

    Returns:
        The model.

    Raises:
        ValueError: an unknown method, or one that finds nothing to train in this model; a suffix of `also` that is
            that of no module with parameters. The model is as before then.
    """
    if method not in FREEZING_METHODS:
        raise ValueError(f"method={method!r} is not one of {FREEZING_METHODS}")
    chosen = {id(parameter) for parameter in _chosen(model, method)}
    chosen |= {id(parameter) for module in modules_asked_for(model, also) for parameter in module.parameters()}
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
        # The visual transformer reads features, it does not belong to the backbone's stacks: the paper's counts leave
        # it out (docs/backbones.md).
        named = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
        inside_heads = {id(inner) for head in _known(model, HEADS) for inner in head.modules()}
        stacks = [
            stack
            for name, stack in named
            # neither a list of heads nor an MLP inside one is a stack
            if "img_transformer" not in name and not any(id(inner) in inside_heads for inner in stack.modules())
        ]
        single = [block for block in _known(model, SINGLE_BLOCKS) if not isinstance(block, nn.ModuleList)]
        return [p for block in (*(s[-1] for s in _outermost(stacks)), *single) for p in block.parameters()]
    if method == "proj":
        find_head: Callable[[], nn.Module | None] | None = getattr(model, "get_output_embeddings", None)
        head = find_head() if find_head is not None else None
        heads = _known(model, HEADS) if head is None else [head]
        return [p for head in heads for p in head.parameters()]
    return []


def _known(model: nn.Module, names: Mapping[str, Sequence[str]]) -> list[nn.Module]:
    """The modules of a model whose names are known by its type."""
    return _called(model, names.get(getattr(getattr(model, "config", None), "model_type", ""), ()))


def modules_asked_for(model: nn.Module, suffixes: Sequence[str]) -> list[nn.Module]:
    """The modules whose name is one of these, or ends with one.

    Raises:
        ValueError: a suffix is that of no module with parameters.
    """
    if isinstance(suffixes, str):
        raise ValueError(f"also={suffixes!r} is one string; write a list of names, [{suffixes!r}]")
    found = {suffix: [m for m in _called(model, [suffix]) if _has_parameters(m)] for suffix in suffixes}
    if missing := [suffix for suffix, modules in found.items() if not modules]:
        names = without_numbers(name for name in own_names(model) if _has_parameters(model.get_submodule(name)))
        ends = list(dict.fromkeys(end for name in names if not (end := name.rpartition(".")[2]).isdigit()))
        near = near_names(missing, [*ends, *names])
        raise ValueError(
            f"also={list(suffixes)!r}: {', '.join(map(repr, missing))} is neither the name of a module with "
            f"parameters in {type(model).__name__} nor the end of one; "
            + (f"near names: {', '.join(near)}" if near else f"its modules: {', '.join(ends[:40])}")
        )
    return [module for modules in found.values() for module in modules]


def _has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _called(model: nn.Module, suffixes: Sequence[str]) -> list[nn.Module]:
    return [
        module
        for name, module in model.named_modules()
        if name and any(name == suffix or name.endswith(f".{suffix}") for suffix in suffixes)
    ]


def _outermost(stacks: list[nn.ModuleList]) -> list[nn.ModuleList]:
    inner = {id(m) for stack in stacks for m in stack.modules() if m is not stack}
    return [stack for stack in stacks if id(stack) not in inner]
