"""Initialises the modules that are added to a T5 encoder as PyTorch does, not as T5 does."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

__all__ = ["reset_new_module"]


def reset_new_module(encoder: nn.Module, module: nn.Module, names: Collection[str]) -> bool:
    """Initialises a layer as PyTorch does, if it belongs to the new modules of an encoder.

    Args:
        encoder: the encoder.
        module: any module below it.
        names: of the new modules, directly below the encoder.

    Returns:
        Whether the layer was initialised: False for other modules, and for norms, which `_init_weights` sets.
    """
    if not isinstance(module, nn.Linear | nn.Embedding | nn.MultiheadAttention):
        return False
    new = (part for name, child in encoder.named_children() if name in names for part in child.modules())
    if not any(module is part for part in new):
        return False
    reset = module._reset_parameters if isinstance(module, nn.MultiheadAttention) else module.reset_parameters
    reset()
    if isinstance(module, NonDynamicallyQuantizableLinear):  # the output projection of PyTorch's attention
        nn.init.zeros_(module.bias)
    return True
