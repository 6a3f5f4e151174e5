"""Prediction heads for coordinates and scores, computed in float32 in a model of any dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["check_mask", "in_float32", "values_can_be_checked"]


def in_float32(head: nn.Module, states: Tensor, *args: Tensor) -> Any:
    """Applies a head in at least float32, outside autocast and with its weights in float32.

    bfloat16 rounds numbers from 128 to 256 to integers: windows computed in it are off by seconds.

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
        states = states.to(torch.promote_types(states.dtype, torch.float32))  # float64 stays, for checks of gradients
        if not half:
            return head(states, *args)
        return torch.func.functional_call(head, half, (states, *args))


def values_can_be_checked(tensor: Tensor) -> bool:
    """Whether values can be checked cheaply: on a GPU that would synchronise, and it would break a compiled graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def check_mask(name: str, mask: Tensor) -> None:
    """Refuses additive attention masks, in which 0 is a token and -inf padding; 0 = padding is expected.

    Raises:
        ValueError: (on the CPU) it holds a negative number or NaN.
    """
    if mask.dtype != torch.bool and values_can_be_checked(mask) and not (mask >= 0).all():
        raise ValueError(
            f"{name} holds negative numbers or NaN: a mask is 1 at tokens and 0 at padding "
            "(of an additive one, pass mask >= 0)"
        )
