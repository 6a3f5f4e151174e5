"""Names of modules in messages: those of the model itself, and those near a misspelt one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches

from torch import nn

__all__ = ["near_names", "own_names", "without_numbers"]

# Modules that a method adds beside the layers that it wraps.
ADDED = re.compile(r"(^|\.)((readapter|bottleneckadapter|compacter|hyperformer)_|shared_over_layers(\.|$))")


def own_names(model: nn.Module) -> list[str]:
    """The names of a model's modules without those that are parts of an adapter.

    Args:
        model: the model, adapted by peft or not.
    """
    names = [name for name, _ in model.named_modules() if name]
    inside_layers = tuple(name.removesuffix("base_layer") for name in names if name.endswith(".base_layer"))
    return [name for name in names if not name.startswith(inside_layers) and not ADDED.search(name)]


def without_numbers(names: Iterable[str]) -> list[str]:
    """Names that differ in nothing but numbers once, with 0 in their place; in their order.

    Example:
        >>> without_numbers(["layers.0.fc1", "layers.1.fc1"])
        ['layers.0.fc1']
    """
    return list(dict.fromkeys(re.sub(r"(^|\.)\d+(?=\.|$)", r"\g<1>0", name) for name in names))


def near_names(wanted: Iterable[str], known: Iterable[str], *, count: int = 3) -> list[str]:
    """The known names that are spelt most like the wanted ones, the nearest first.

    Args:
        wanted: misspelt names.
        known: the names that there are.
        count: how many to look for, for each wanted name.

    Example:
        >>> near_names(["fcc2"], ["fc1", "fc2", "q_proj"])
        ['fc2']
    """
    candidates = list(dict.fromkeys(known))
    return list(dict.fromkeys(near for name in wanted for near in get_close_matches(name, candidates, n=count)))
