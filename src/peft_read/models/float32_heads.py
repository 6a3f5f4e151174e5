"""Heads whose outputs are coordinates or scores: computed in float32, whatever the rest of the model computes in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["check_mask", "in_float32", "values_can_be_checked"]


def in_float32(head: nn.Module, states: Tensor, *args: Tensor) -> Any:
    """What a head gives for its input in float32, outside autocast and with its weights in float32.

    bfloat16 tells 128 clips from 128.5 and no closer: a window that it computes is seconds away.

    Args:
        head: any module.
        states: its first input, in any floating dtype.
        *args: further inputs, passed as they are.
    """
    with torch.autocast(states.device.type, enabled=False):
        half = {
            name: parameter.float()
            for name, parameter in head.named_parameters()
            if parameter.dtype in (torch.bfloat16, torch.float16)
        }
        if not half:
            return head(states.float(), *args)
        return torch.func.functional_call(head, half, (states.float(), *args))


def values_can_be_checked(tensor: Tensor) -> bool:
    """Whether looking at the values costs nothing: on a device it would wait, and break a compiled graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def check_mask(name: str, mask: Tensor) -> None:
    """A mask says 1 = real and 0 = padding; an additive one, 0 = real and -inf = padding, says the opposite.

    Raises:
        ValueError: (on the CPU) it holds a negative number or NaN.
    """
    if mask.dtype != torch.bool and values_can_be_checked(mask) and not (mask >= 0).all():
        raise ValueError(
            f"{name} holds negative numbers or NaN: a mask is 1 at real positions and 0 at padding "
            "(of an additive one, pass mask >= 0)"
        )
