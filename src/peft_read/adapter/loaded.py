"""Checking what a checkpoint holds before it is loaded: an adapter is applied whole, or not at all."""

from __future__ import annotations

import re
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .layer import READLayer

__all__ = ["check_loaded_weights"]

_OF_READ = re.compile(r"(^|\.)(readapter_\w+)\.")


def check_loaded_weights(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Refuses weights that do not belong to the READ layers of a model; a hook before `load_state_dict`.

    torch leaves unknown keys out without a word where the loading is not strict, which is how peft loads adapters:
    a checkpoint of a deeper base, of another choice of layers, with biases or with another recurrence would be applied
    in part. Missing weights are a warning, as in peft.

    Args:
        module: what is loaded into.
        state_dict: the weights.
        prefix: of the module's own keys in it.

    Raises:
        ValueError: a key of READ that the model does not have, or, where adapters alone are loaded, any such key; a
            weight that is no floating-point number, NaN or infinite.
    """
    given = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
    of_read = [key for key in given if _OF_READ.search(key)]
    if not of_read or not any(isinstance(layer, READLayer) for layer in module.modules()):
        return
    own = {f"{prefix}{key}" for key in module.state_dict(keep_vars=True)}
    adapter_alone = not any(".base_layer." in key for key in given)
    if unknown := sorted(key for key in (given if adapter_alone else of_read) if key not in own):
        raise ValueError(
            f"the checkpoint has {len(unknown)} weights that this model has no place for, such as {unknown[0]!r}: it "
            "belongs to another base, another choice of layers or another configuration (use_bias, cell, "
            "cell_pattern). Nothing was loaded"
        )
    for key in given if adapter_alone else of_read:
        _check_values(key, given[key])
    adapters = {_adapter_of(key) for key in of_read}
    missing = sorted(key for key in own if _OF_READ.search(key) and _adapter_of(key) in adapters and key not in given)
    if missing:
        warnings.warn(
            f"the checkpoint lacks {len(missing)} weights of the adapter, such as {missing[0]!r}; they keep the "
            "values that they had before",
            stacklevel=2,
        )


def _adapter_of(key: str) -> str:
    """The adapter's name, which follows the name of its part."""
    match = _OF_READ.search(key)
    assert match is not None
    return key[match.end() :].partition(".")[0]


def _check_values(key: str, value: Any) -> None:
    if not isinstance(value, Tensor) or value.is_meta:
        return
    if not value.is_floating_point():
        if _OF_READ.search(key):
            raise ValueError(f"the checkpoint's {key!r} is {value.dtype}, no floating-point weight")
        return
    if not bool(torch.isfinite(value.float()).all()):
        raise ValueError(f"the checkpoint's {key!r} has entries that are NaN or infinite")
