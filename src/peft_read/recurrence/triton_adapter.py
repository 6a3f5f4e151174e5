"""The whole adapter as one Triton launch for CUDA: O + GELU(RNN(O W_down)) W_up reads O once and writes once.

A program takes one sequence, token by token: the row of O comes to its registers, is projected down, steps the state,
and goes out with what GELU and W_up add to it; W_down, W_up and the recurrence's weights stay in registers, the rows
of later tokens are on their way. The backward pass is the scan of `triton_scan.py` between matrix products of torch,
from O W_down and the states, which the forward pass keeps. Optional: needs triton, which comes with torch for CUDA.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch.nn import functional as F

from .triton_scan import _block, _on, _pointer_of_mask, _times, scan_backward, tanh

__all__ = ["adapter_forward", "adapter_gradients", "registers_suffice"]

LARGEST_WEIGHT = 16384  # numbers of W_down, and of W_up, that the registers of a program hold
STAGES = tl.constexpr(4)  # rows whose loads are in flight


def registers_suffice(d: int, k: int) -> bool:
    """Whether a program can hold W_down (k, d) and W_up."""
    return k <= 16 and triton.next_power_of_2(d) * _filled(k) <= LARGEST_WEIGHT


def _filled(k: int) -> int:
    return max(2, triton.next_power_of_2(k))


def adapter_forward(
    x: torch.Tensor, state: Any, mask: Any, down: Any, down_bias: Any, weight_ih: Any, weight_hh: Any, bias_ih: Any,
    bias_hh: Any, up: Any, up_bias: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The adapted O, O W_down + b_down, and the states after each token.

    Args:
        x: O, (B, T, d), contiguous, float32, bfloat16 or float16; the rest is float32.
        state: the state before the first token, (B, k); zero if None.
        mask: (B, T), True = a real token; None if all are.
        down: W_down, (k, d).
        down_bias: (k,) or None, as all biases.
        weight_ih: (k, k).
        weight_hh: (k, k).
        bias_ih: (k,).
        bias_hh: (k,).
        up: W_up, (d, k).
        up_bias: (d,).
    """
    batch, length, d = x.shape
    k = len(down)
    out = torch.empty_like(x)
    narrow, hidden = down.new_empty(2, batch, length, k)
    state = down.new_zeros(batch, k) if state is None else state.contiguous()
    down_bias = down.new_zeros(k) if down_bias is None else down_bias
    bias = down.new_zeros(k) if bias_ih is None else bias_ih + bias_hh
    up_bias = down.new_zeros(d) if up_bias is None else up_bias
    width, lanes = _filled(k), triton.next_power_of_2(d)
    weights = (down, down_bias, weight_ih, weight_hh, bias, up, up_bias)
    with _on(x):
        _adapter_forward[(batch,)](
            x, *(weight.contiguous() for weight in weights), state, _pointer_of_mask(mask, x), out, narrow, hidden,
            length, d, k, MASKED=mask is not None, K=width, D=lanes,
            num_warps=max(1, min(16, width * lanes // 1024)),
        )  # fmt: skip
    return out, narrow, hidden


def adapter_gradients(
    grad: torch.Tensor | None, grad_hidden: torch.Tensor | None, saved: Any, needs: Any
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of the arguments of `adapter_forward`, None where none is needed.

    Args:
        grad: of the adapted O; None if nothing came of it.
        grad_hidden: of the states; None if nothing came of them.
        saved: the arguments and results of `adapter_forward`, without the adapted O.
        needs: for each argument, whether its gradient is needed.
    """
    x, state, mask, down, _, weight_ih, weight_hh, _, _, up, _, narrow, hidden = saved
    with torch.autocast(x.device.type, enabled=False):
        grad = torch.zeros_like(x) if grad is None else grad
        wide = grad.flatten(0, 1).to(down.dtype)  # (B · T, d)
        cdf = 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        slope = cdf + hidden * torch.exp(-0.5 * hidden.square()) / math.sqrt(2 * math.pi)
        carried = (wide @ up).view_as(hidden) * slope
        if grad_hidden is not None:
            carried = carried + grad_hidden
        first = hidden.new_zeros(len(hidden), hidden.shape[-1]) if state is None else state
        inner, _, grad_state = scan_backward("rnn", carried, None, weight_hh, first, mask, hidden, None, None)
        grad_narrow = inner @ weight_ih
        before = torch.cat((first[:, None], hidden[:, :-1]), dim=1)
        flat = inner.flatten(0, 1)
        bias = flat.sum(0) if needs[7] or needs[8] else None
        return (
            (grad + (grad_narrow @ down).to(grad.dtype)) if needs[0] else None,
            grad_state if needs[1] else None,
            None,
            grad_narrow.flatten(0, 1).T @ x.flatten(0, 1).to(down.dtype) if needs[3] else None,
            grad_narrow.sum((0, 1)) if needs[4] else None,
            flat.T @ narrow.flatten(0, 1) if needs[5] else None,
            flat.T @ before.flatten(0, 1) if needs[6] else None,
            bias if needs[7] else None,
            bias if needs[8] else None,
            wide.T @ F.gelu(hidden).flatten(0, 1) if needs[9] else None,
            wide.sum(0) if needs[10] else None,
        )


@triton.jit
def _adapter_forward(
    x, down, down_bias, weight_ih, weight_hh, bias, up, up_bias, state, real, out, narrow, hidden, length, d, k,
    MASKED: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    i, j = tl.arange(0, K), tl.arange(0, D)
    inside, within = i < k, j < d
    both = inside[:, None] & within[None, :]
    by_down = tl.load(down + i[:, None] * d + j[None, :], both, 0.0)
    by_up = tl.load(up + j[None, :] * k + i[:, None], both, 0.0)
    shift = tl.load(down_bias + i, inside, 0.0)
    lift = tl.load(up_bias + j, within, 0.0)
    by_input, by_state = _block(weight_ih, 0, k, K), _block(weight_hh, 0, k, K)
    offset = tl.load(bias + i, inside, 0.0)
    h = tl.load(state + b * k + i, inside, 0.0)
    for t in tl.range(length, num_stages=STAGES):
        token = b * length + t
        row = tl.load(x + token * d + j, within, 0.0)
        low = tl.sum(by_down * row.to(tl.float32)[None, :], 1) + shift
        tl.store(narrow + token * k + i, low, inside)
        new = tanh(_times(by_input, low) + offset + _times(by_state, h))
        if MASKED:
            new = tl.where(tl.load(real + token) != 0, new, h)
        h = new
        tl.store(hidden + token * k + i, h, inside)
        active = h * 0.5 * (1 + tl.erf(h * 0.7071067811865476))
        delta = tl.sum(by_up * active[:, None], 0) + lift
        # Added in the dtype of O, as O + delta is everywhere else.
        total = row.to(tl.float32) + delta.to(row.dtype).to(tl.float32)
        tl.store(out + token * d + j, total.to(row.dtype), within)
