"""The recurrences as Triton kernels for CUDA: forward and backward scans of RNN, GRU and LSTM in one launch each.

A program runs one sequence, with the state and W_hh in its registers; the width k is filled up with zeros to a power
of two. The loads of later tokens do not depend on the state, so they are pipelined. The input's part of the gates is
computed beforehand by a matrix product, and the gradients of x, W_ih, W_hh and the biases follow from those of the
gates by matrix products afterwards. Sums and states are float32. Optional: needs triton, which comes with torch for
CUDA.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl

__all__ = ["scan_backward", "scan_forward", "tanh"]

STAGES = tl.constexpr(4)  # tokens whose loads are in flight
Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def scan_forward(
    kind: str,
    inner: torch.Tensor,
    weight_hh: torch.Tensor,
    bias_hh: torch.Tensor | None,
    state: torch.Tensor,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Run a cell over its inputs.

    Args:
        kind: "rnn", "gru" or "lstm".
        inner: W_ih x + b_ih, with b_hh in it but for the GRU, (B, T, gates · k).
        weight_hh: (gates · k, k).
        bias_hh: (gates · k,) of a GRU with biases; ignored for the others.
        state: the state before the first token, (B, S).
        mask: (B, T), True = a real token; None if all are.

    Returns:
        The outputs (B, T, k), the memories c_t (B, T, k) of an LSTM, and what the backward pass of a GRU or LSTM
        needs, (B, T, 4k).
    """
    inner, weight_hh, state = inner.contiguous(), weight_hh.contiguous(), state.contiguous()
    batch, length, k = *inner.shape[:2], weight_hh.shape[1]
    outputs = inner.new_empty(batch, length, k)
    gates = None if kind == "rnn" else inner.new_empty(batch, length, 4 * k)
    memories = torch.empty_like(outputs) if kind == "lstm" else None
    settings = _settings(kind, k, mask)
    real = _pointer_of_mask(mask, inner)
    with _on(inner):
        if kind == "rnn":
            _rnn_forward[(batch,)](inner, weight_hh, state, real, outputs, length, k, **settings)
        elif kind == "gru":
            bias = weight_hh.new_zeros(len(weight_hh)) if bias_hh is None else bias_hh.contiguous()
            _gru_forward[(batch,)](inner, weight_hh, bias, state, real, outputs, gates, length, k, **settings)
        else:
            _lstm_forward[(batch,)](inner, weight_hh, state, real, outputs, memories, gates, length, k, **settings)
    return outputs, memories, gates


def scan_backward(
    kind: str,
    grad_outputs: torch.Tensor,
    grad_memories: torch.Tensor | None,
    weight_hh: torch.Tensor,
    state: torch.Tensor,
    mask: torch.Tensor | None,
    outputs: torch.Tensor,
    memories: torch.Tensor | None,
    gates: torch.Tensor | None,
) -> Gradients:
    """The gradients of `inner`, of W_hh h + b_hh (the same but for the GRU), both zero at padding, and of the state.

    Args:
        kind: "rnn", "gru" or "lstm".
        grad_outputs: (B, T, k).
        grad_memories: (B, T, k) of an LSTM; None if nothing came of its memories.
        weight_hh: this and the rest as given to and returned by `scan_forward`.
        state: the first state.
        mask: the mask.
        outputs: the outputs.
        memories: the memories of an LSTM.
        gates: what the forward pass kept.
    """
    grad_outputs, weight_hh, state = grad_outputs.contiguous(), weight_hh.contiguous(), state.contiguous()
    batch, length, k = outputs.shape
    grad_inner, grad_state = outputs.new_empty(batch, length, len(weight_hh)), state.new_empty(state.shape)
    grad_outer = grad_inner
    settings = _settings(kind, k, mask)
    real = _pointer_of_mask(mask, outputs)
    with _on(outputs):
        if kind == "rnn":
            _rnn_backward[(batch,)](
                grad_outputs, weight_hh, real, outputs, grad_inner, grad_state, length, k, **settings
            )
        elif kind == "gru":
            grad_outer = torch.empty_like(grad_inner)
            _gru_backward[(batch,)](
                grad_outputs, weight_hh, state, real, outputs, gates, grad_inner, grad_outer, grad_state, length, k,
                **settings,
            )  # fmt: skip
        else:
            _lstm_backward[(batch,)](
                grad_outputs, grad_outputs if grad_memories is None else grad_memories.contiguous(), weight_hh, state,
                real, memories, gates, grad_inner, grad_state, length, k, REMEMBERED=grad_memories is not None,
                **settings,
            )  # fmt: skip
    return grad_inner, grad_outer, grad_state


def _settings(kind: str, k: int, mask: torch.Tensor | None) -> dict[str, Any]:
    """The compile-time settings; W_hh is spread over as many threads as hold it in their registers."""
    filled = max(2, triton.next_power_of_2(k))
    numbers = filled * filled * {"rnn": 1, "gru": 3, "lstm": 4}[kind]
    return {"MASKED": mask is not None, "K": filled, "num_warps": max(1, min(8, numbers // 1024))}


def _pointer_of_mask(mask: torch.Tensor | None, anything: torch.Tensor) -> torch.Tensor:
    return anything if mask is None else mask.contiguous().view(torch.uint8)


def _on(tensor: torch.Tensor) -> Any:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@triton.jit
def tanh(x):
    """The hyperbolic tangent to the rounding of float32, as x P(x²) / Q(x²).

    Written with comparisons that are false for a not-a-number, which therefore stays one.
    """
    x = tl.where(x > 9.0, 9.0, x)  # 1 - tanh(9) = 3e-8 is below the rounding of float32
    x = tl.where(x < -9.0, -9.0, x)
    s = x * x
    over = (((5.085660236345205e-08 * s + 3.161581273037254e-05) * s + 0.004009736066679887) * s
            + 0.1378632610983273) * s + 0.9999999990746035  # fmt: skip
    under = ((((7.393481490187737e-10 * s + 1.619563201722467e-06) * s + 0.00042096284728284576) * s
              + 0.027741946000058647) * s + 0.47119658535608844) * s + 1.0  # fmt: skip
    return x * over / under


@triton.jit
def _sigmoid(x):
    return 0.5 + 0.5 * tanh(0.5 * x)


@triton.jit
def _block(weight, gate, k, K: tl.constexpr):
    """The weights (k, k) of one gate, with zeros to (K, K)."""
    row, column = tl.arange(0, K)[:, None], tl.arange(0, K)[None, :]
    return tl.load(weight + (gate * k + row) * k + column, (row < k) & (column < k), 0.0)


@triton.jit
def _times(weight, vector):
    return tl.sum(weight * vector[None, :], 1)


@triton.jit
def _transposed_times(weight, vector):
    return tl.sum(weight * vector[:, None], 0)


@triton.jit
def _rnn_forward(inner, weight_hh, state, real, outputs, length, k, MASKED: tl.constexpr, K: tl.constexpr):
    """h_t = tanh(inner_t + W_hh h_{t-1})."""
    b = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, K)
    inside = i < k
    weight = _block(weight_hh, 0, k, K)
    hidden = tl.load(state + b * k + i, inside, 0.0)
    for t in tl.range(length, num_stages=STAGES):
        token = b * length + t
        new = tanh(tl.load(inner + token * k + i, inside, 0.0) + _times(weight, hidden))
        if MASKED:
            new = tl.where(tl.load(real + token) != 0, new, hidden)
        hidden = new
        tl.store(outputs + token * k + i, hidden, inside)


@triton.jit
def _rnn_backward(
    grad_outputs, weight_hh, real, outputs, grad_inner, grad_state, length, k, MASKED: tl.constexpr, K: tl.constexpr
):
    b = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, K)
    inside = i < k
    weight = _block(weight_hh, 0, k, K)
    carried = tl.zeros([K], tl.float32)
    for back in tl.range(length, num_stages=STAGES):
        token = b * length + length - 1 - back
        h = tl.load(outputs + token * k + i, inside, 0.0)
        carried += tl.load(grad_outputs + token * k + i, inside, 0.0)
        d = carried * (1 - h * h)
        before = _transposed_times(weight, d)
        if MASKED:
            is_real = tl.load(real + token) != 0
            d = tl.where(is_real, d, 0.0)
            before = tl.where(is_real, before, carried)
        carried = before
        tl.store(grad_inner + token * k + i, d, inside)
    tl.store(grad_state + b * k + i, carried, inside)


@triton.jit
def _gru_forward(
    inner, weight_hh, bias_hh, state, real, outputs, gates, length, k, MASKED: tl.constexpr, K: tl.constexpr
):
    """h_t = (1 - z) n + z h_{t-1}, with n = tanh(inner_n + r m) and m = W_hn h_{t-1} + b_hn; gates are r, z, n, m."""
    b = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, K)
    inside = i < k
    by_reset, by_update, by_new = (
        _block(weight_hh, 0, k, K), _block(weight_hh, 1, k, K), _block(weight_hh, 2, k, K),
    )  # fmt: skip
    bias_reset = tl.load(bias_hh + i, inside, 0.0)
    bias_update = tl.load(bias_hh + k + i, inside, 0.0)
    bias_new = tl.load(bias_hh + 2 * k + i, inside, 0.0)
    hidden = tl.load(state + b * k + i, inside, 0.0)
    for t in tl.range(length, num_stages=STAGES):
        token = b * length + t
        x = inner + token * 3 * k + i
        reset = _sigmoid(tl.load(x, inside, 0.0) + bias_reset + _times(by_reset, hidden))
        update = _sigmoid(tl.load(x + k, inside, 0.0) + bias_update + _times(by_update, hidden))
        below = _times(by_new, hidden) + bias_new
        new = tanh(tl.load(x + 2 * k, inside, 0.0) + reset * below)
        step = new + update * (hidden - new)
        if MASKED:
            step = tl.where(tl.load(real + token) != 0, step, hidden)
        hidden = step
        kept = gates + token * 4 * k + i
        tl.store(kept, reset, inside)
        tl.store(kept + k, update, inside)
        tl.store(kept + 2 * k, new, inside)
        tl.store(kept + 3 * k, below, inside)
        tl.store(outputs + token * k + i, hidden, inside)


@triton.jit
def _gru_backward(
    grad_outputs, weight_hh, state, real, outputs, gates, grad_inner, grad_outer, grad_state, length, k,
    MASKED: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, K)
    inside = i < k
    by_reset, by_update, by_new = (
        _block(weight_hh, 0, k, K), _block(weight_hh, 1, k, K), _block(weight_hh, 2, k, K),
    )  # fmt: skip
    first = tl.load(state + b * k + i, inside, 0.0)
    carried = tl.zeros([K], tl.float32)
    for back in tl.range(length, num_stages=STAGES):
        t = length - 1 - back
        token = b * length + t
        kept = gates + token * 4 * k + i
        reset, update = tl.load(kept, inside, 0.0), tl.load(kept + k, inside, 0.0)
        new, below = tl.load(kept + 2 * k, inside, 0.0), tl.load(kept + 3 * k, inside, 0.0)
        later = t + 0 * i > 0
        hidden = tl.where(later, tl.load(outputs + (token - 1) * k + i, inside & later, 0.0), first)
        carried += tl.load(grad_outputs + token * k + i, inside, 0.0)
        d_new = carried * (1 - update) * (1 - new * new)
        d_update = carried * (hidden - new) * update * (1 - update)
        d_reset = d_new * below * reset * (1 - reset)
        d_below = d_new * reset
        before = carried * update + _transposed_times(by_reset, d_reset)
        before += _transposed_times(by_update, d_update) + _transposed_times(by_new, d_below)
        if MASKED:
            is_real = tl.load(real + token) != 0
            d_reset, d_update = tl.where(is_real, d_reset, 0.0), tl.where(is_real, d_update, 0.0)
            d_new, d_below = tl.where(is_real, d_new, 0.0), tl.where(is_real, d_below, 0.0)
            before = tl.where(is_real, before, carried)
        carried = before
        written = token * 3 * k + i
        tl.store(grad_inner + written, d_reset, inside)
        tl.store(grad_inner + written + k, d_update, inside)
        tl.store(grad_inner + written + 2 * k, d_new, inside)
        tl.store(grad_outer + written, d_reset, inside)
        tl.store(grad_outer + written + k, d_update, inside)
        tl.store(grad_outer + written + 2 * k, d_below, inside)
    tl.store(grad_state + b * k + i, carried, inside)


@triton.jit
def _lstm_forward(
    inner, weight_hh, state, real, outputs, memories, gates, length, k, MASKED: tl.constexpr, K: tl.constexpr
):
    """c_t = f c_{t-1} + i g and h_t = o tanh(c_t); gates are i, f, g, o."""
    b = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, K)
    inside = i < k
    by_add, by_keep = _block(weight_hh, 0, k, K), _block(weight_hh, 1, k, K)
    by_new, by_show = _block(weight_hh, 2, k, K), _block(weight_hh, 3, k, K)
    hidden = tl.load(state + b * 2 * k + i, inside, 0.0)
    memory = tl.load(state + b * 2 * k + k + i, inside, 0.0)
    for t in tl.range(length, num_stages=STAGES):
        token = b * length + t
        x = inner + token * 4 * k + i
        add = _sigmoid(tl.load(x, inside, 0.0) + _times(by_add, hidden))
        keep = _sigmoid(tl.load(x + k, inside, 0.0) + _times(by_keep, hidden))
        new = tanh(tl.load(x + 2 * k, inside, 0.0) + _times(by_new, hidden))
        show = _sigmoid(tl.load(x + 3 * k, inside, 0.0) + _times(by_show, hidden))
        next_memory = keep * memory + add * new
        next_hidden = show * tanh(next_memory)
        if MASKED:
            is_real = tl.load(real + token) != 0
            next_memory = tl.where(is_real, next_memory, memory)
            next_hidden = tl.where(is_real, next_hidden, hidden)
        memory, hidden = next_memory, next_hidden
        kept = gates + token * 4 * k + i
        tl.store(kept, add, inside)
        tl.store(kept + k, keep, inside)
        tl.store(kept + 2 * k, new, inside)
        tl.store(kept + 3 * k, show, inside)
        tl.store(outputs + token * k + i, hidden, inside)
        tl.store(memories + token * k + i, memory, inside)


@triton.jit
def _lstm_backward(
    grad_outputs, grad_memories, weight_hh, state, real, memories, gates, grad_inner, grad_state, length, k,
    REMEMBERED: tl.constexpr, MASKED: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, K)
    inside = i < k
    by_add, by_keep = _block(weight_hh, 0, k, K), _block(weight_hh, 1, k, K)
    by_new, by_show = _block(weight_hh, 2, k, K), _block(weight_hh, 3, k, K)
    first = tl.load(state + b * 2 * k + k + i, inside, 0.0)
    carried = tl.zeros([K], tl.float32)
    carried_memory = tl.zeros([K], tl.float32)
    for back in tl.range(length, num_stages=STAGES):
        t = length - 1 - back
        token = b * length + t
        kept = gates + token * 4 * k + i
        add, keep = tl.load(kept, inside, 0.0), tl.load(kept + k, inside, 0.0)
        new, show = tl.load(kept + 2 * k, inside, 0.0), tl.load(kept + 3 * k, inside, 0.0)
        later = t + 0 * i > 0
        memory = tl.where(later, tl.load(memories + (token - 1) * k + i, inside & later, 0.0), first)
        shown = tanh(tl.load(memories + token * k + i, inside, 0.0))
        carried += tl.load(grad_outputs + token * k + i, inside, 0.0)
        if REMEMBERED:
            carried_memory += tl.load(grad_memories + token * k + i, inside, 0.0)
        d_memory = carried_memory + carried * show * (1 - shown * shown)
        d_add = d_memory * new * add * (1 - add)
        d_keep = d_memory * memory * keep * (1 - keep)
        d_new = d_memory * add * (1 - new * new)
        d_show = carried * shown * show * (1 - show)
        before = _transposed_times(by_add, d_add) + _transposed_times(by_keep, d_keep)
        before += _transposed_times(by_new, d_new) + _transposed_times(by_show, d_show)
        memory_before = d_memory * keep
        if MASKED:
            is_real = tl.load(real + token) != 0
            d_add, d_keep = tl.where(is_real, d_add, 0.0), tl.where(is_real, d_keep, 0.0)
            d_new, d_show = tl.where(is_real, d_new, 0.0), tl.where(is_real, d_show, 0.0)
            before = tl.where(is_real, before, carried)
            memory_before = tl.where(is_real, memory_before, carried_memory)
        carried, carried_memory = before, memory_before
        written = grad_inner + token * 4 * k + i
        tl.store(written, d_add, inside)
        tl.store(written + k, d_keep, inside)
        tl.store(written + 2 * k, d_new, inside)
        tl.store(written + 3 * k, d_show, inside)
    tl.store(grad_state + b * 2 * k + i, carried, inside)
    tl.store(grad_state + b * 2 * k + k + i, carried_memory, inside)
