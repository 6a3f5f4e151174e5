"""A model as its state dict names it: without the wrappers of checkpointing, FSDP and torch.compile inside of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from torch import nn

__all__ = ["AsUnwrapped", "without_wrappers"]

# The attribute in which each keeps what it wraps; checkpointing and FSDP leave it out of the keys of a state dict.
WRAPPERS = re.compile(r"(?<![^.])(?:_checkpoint_wrapped_module|_fsdp_wrapped_module|_orig_mod)(?:\.|$)")


def without_wrappers(name: str) -> str:
    """The name that a module or a weight has in the model without wrappers.

    Example:
        >>> without_wrappers("layers.0._checkpoint_wrapped_module.fc2.weight")
        'layers.0.fc2.weight'
    """
    return WRAPPERS.sub("", name).rstrip(".")


class AsUnwrapped:
    """What peft asks of a model when it chooses the weights of an adapter, with the names of the unwrapped model.

    peft compares the names of modules, which contain the wrappers, with the keys of a state dict, which may not: it
    would find no weight in a wrapped block.

    Args:
        model: the model, which may have wrappers at any depth.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """The modules; a wrapper has the name of what it wraps."""
        return ((without_wrappers(name), module) for name, module in self.model.named_modules())

    def state_dict(self) -> dict[str, Any]:
        """The weights."""
        return {without_wrappers(key): value for key, value in self._weights.items()}

    def own_keys(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Weights by the keys that the model itself has for them; keys that it does not have stay.

        Args:
            state_dict: weights by the names of the unwrapped model.
        """
        own = {without_wrappers(key): key for key in self._weights}
        return {own.get(key, key): value for key, value in state_dict.items()}

    @cached_property
    def _weights(self) -> dict[str, Any]:
        return self.model.state_dict()  # once: FSDP gathers them
