"""Checking what a checkpoint holds before it is loaded: an adapter is loaded completely or not at all."""

from __future__ import annotations

import re
import warnings
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["WeightsCheck"]


class WeightsCheck:
    """Refuses weights that do not belong to the adapters of a model; a hook before `load_state_dict`.

    torch silently skips unknown keys where the loading is not strict, which is how peft loads adapters:
    a checkpoint of a deeper base, other layers or other settings would be loaded in part. Missing
    weights are a warning, as in peft.

    Args:
        prefix: of the parameters of the method.
        layer_cls: its layers.
    """

    settings = "use_bias, cell, cell_pattern"  # those that decide which weights there are, for the message

    def __init__(self, prefix: str, layer_cls: type) -> None:
        self.pattern = rf"(^|\.)({prefix}\w+)\."
        self.layer_cls = layer_cls

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """Look at the weights.

        Args:
            module: what is loaded into.
            state_dict: the weights.
            prefix: of the module's own keys in it.

        Raises:
            ValueError: a key of the method that the model does not have, or, where adapters alone are loaded, any such
                key; a weight that is not floating-point, NaN or infinite, or has another shape than the model's.
        """
        given = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        of_method = [key for key in given if self.is_of_method(key)]
        if not of_method or not any(isinstance(layer, self.layer_cls) for layer in module.modules()):
            return
        own = {f"{prefix}{key}": value for key, value in module.state_dict(keep_vars=True).items()}
        adapter_alone = not any(".base_layer." in key for key in given)
        unknown = sorted(key for key in (given if adapter_alone else of_method) if key not in own)
        adapters = {self.adapter_of(key) for key in of_method}
        missing = sorted(
            key for key in own if self.is_of_method(key) and self.adapter_of(key) in adapters and key not in given
        )
        self.refuse(unknown, missing)
        if unknown:
            raise ValueError(
                f"the checkpoint has {len(unknown)} weights that this model has no place for, such as {unknown[0]!r}: "
                "it belongs to another base, another choice of layers or another configuration "
                f"({self.settings}). Nothing was loaded"
            )
        for key in given if adapter_alone else of_method:
            self._check_values(key, given[key], own[key])
        if missing:
            warnings.warn(
                f"the checkpoint lacks {len(missing)} weights of the adapter, such as {missing[0]!r}; they keep the "
                "values that they had before",
                stacklevel=2,
            )

    def refuse(self, unknown: list[str], missing: list[str]) -> None:
        """Raise a more specific error for keys that do not fit; a hook for methods that have one."""

    def is_of_method(self, key: str) -> bool:
        """Whether a key is one of the method's."""
        return re.search(self.pattern, key) is not None

    def adapter_of(self, key: str) -> str:
        """The adapter's name, which follows the name of its part."""
        match = re.search(self.pattern, key)
        assert match is not None
        return key[match.end() :].partition(".")[0]

    def _check_values(self, key: str, value: Any, own: Any) -> None:
        shapes = getattr(value, "shape", None), getattr(own, "shape", None)
        if None not in shapes and shapes[0] != shapes[1]:  # torch would load the others first, and raise then
            raise ValueError(
                f"the checkpoint's {key!r} does not fit (size mismatch for {key}): it has the shape "
                f"{tuple(value.shape)}, and that of this model {tuple(own.shape)}. Load it with its own configuration "
                "and base model. Nothing was loaded"
            )
        if not isinstance(value, Tensor) or value.is_meta:
            return
        if not value.is_floating_point():
            if self.is_of_method(key):
                raise ValueError(f"the checkpoint's {key!r} is {value.dtype}, not a floating-point weight")
            return
        if not bool(torch.isfinite(value.float()).all()):
            raise ValueError(f"the checkpoint's {key!r} has entries that are NaN or infinite")
