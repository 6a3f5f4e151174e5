"""The first weights of the modules that a T5 encoder gains: PyTorch's, not T5's."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

__all__ = ["reset_new_module"]


def reset_new_module(encoder: nn.Module, module: nn.Module, names: Collection[str]) -> bool:
    """Draws the weights of a layer as PyTorch does, where it belongs to the new modules of an encoder.

    Args:
        encoder: the encoder.
        module: any module below it.
        names: of the new modules, directly below the encoder.

    Returns:
        Whether the weights were drawn: False for other modules, and for norms, which `_init_weights` sets.
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
