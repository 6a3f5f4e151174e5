"""Dropout on the CPU from sixteen random bits per number, alone and inside attention.

It is torch's operation with a cheaper mask; `examples/benchmarks/dropout.py` measures both. What it does not take
(other devices and types, causal or grouped attention, in-place dropout) is torch's own. The probability is rounded to
a multiple of 1/65536, kept values are scaled by the rounded one's inverse, and the masks are others than torch's from
the same seed. They come from torch's generator, so that a resumed run repeats them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

LEVELS = 1 << 16


@dataclass
class DropoutArguments:
    """How dropout is computed."""

    fast_dropout: bool = field(
        default=False, metadata={"help": "train with a cheaper dropout on the CPU; other random masks than torch's"}
    )


class FastDropout(TorchFunctionMode):
    """Replaces torch's dropout of float32 tensors on the CPU, alone and inside attention, for a `with` block.

    Args:
        enabled: False changes nothing.
    """

    def __init__(self, enabled: bool = True) -> None:
        super().__init__()
        self.enabled = enabled

    def __torch_function__(
        self, function: Callable, types: Iterable, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by torch in the place of its functions."""
        given = kwargs or {}
        if self.enabled and not torch.compiler.is_compiling():
            if function is F.dropout:
                return _dropout(*args, **given)
            if function is F.scaled_dot_product_attention:
                return _attention(*args, **given)
        return function(*args, **given)


def thin_out(x: Tensor, p: float) -> Tensor:
    """Zeros in the place of a share p of the numbers, the others divided by 1 - p."""
    dropped = round(p * LEVELS)
    count = x.numel()
    bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(1 << 63), None).view(torch.int16)[:count]
    kept = torch.empty(x.shape)
    torch.ge(bits.view(x.shape), dropped - LEVELS // 2, out=kept)
    return x * kept.mul_(LEVELS / (LEVELS - dropped))


def _fits(x: Tensor, p: float) -> bool:
    return x.is_cpu and x.dtype is torch.float32 and 0 < round(p * LEVELS) < LEVELS


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or inplace or not _fits(x, p):
        return F.dropout(x, p, training, inplace)
    return thin_out(x, p)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if is_causal or enable_gqa or not _fits(query, dropout_p):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    scores = (query * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)) @ key.transpose(-1, -2)
    if attn_mask is not None:
        if attn_mask.dtype is torch.bool:  # as numbers: masked_fill would spread it over the scores first
            attn_mask = torch.zeros(attn_mask.shape).masked_fill(~attn_mask, -math.inf)
        scores = scores + attn_mask
    return thin_out(scores.softmax(dim=-1), dropout_p) @ value
