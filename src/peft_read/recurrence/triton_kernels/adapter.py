"""The parts of the RNN adapter that are parallel over tokens, as Triton kernels: before and behind the scan.

A program takes a tile of the B T tokens. O is read in its own dtype and everything is computed in float32.
"""

# mypy: allow-untyped-defs
import triton
import triton.language as tl

from .scan import square

__all__ = ["down_backward", "down_forward", "up_backward", "up_forward"]


@triton.jit
def down_forward(
    x, down, down_bias, weight_ih, bias_ih, bias_hh, narrow, inner, tokens, d, k,
    SHIFTED: tl.constexpr, BIASED: tl.constexpr, K: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sets narrow = O W_down + b_down and inner = W_ih narrow + b_ih + b_hh."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    i, j = tl.arange(0, K), tl.arange(0, COLUMNS)
    inside = (token < tokens)[:, None] & (i < k)[None, :]
    low = tl.zeros([TOKENS, K], tl.float32)
    for start in tl.range(0, d, COLUMNS):
        column = start + j
        within = (token < tokens)[:, None] & (column < d)[None, :]
        rows = tl.load(x + token[:, None] * d + column[None, :], within, 0.0).to(tl.float32)
        weight = tl.load(down + i[:, None] * d + column[None, :], (i < k)[:, None] & (column < d)[None, :], 0.0)
        low += tl.sum(rows[:, None, :] * weight[None, :, :], 2)
    if SHIFTED:
        low += tl.load(down_bias + i, i < k, 0.0)[None, :]
    tl.store(narrow + token[:, None] * k + i[None, :], low, inside)
    gates = tl.sum(low[:, None, :] * square(weight_ih, k, K)[None, :, :], 2)
    if BIASED:
        gates += (tl.load(bias_ih + i, i < k, 0.0) + tl.load(bias_hh + i, i < k, 0.0))[None, :]
    tl.store(inner + token[:, None] * k + i[None, :], gates, inside)


@triton.jit
def normal_cdf(h):
    return 0.5 + 0.5 * tl.erf(h * 0.7071067811865476)


@triton.jit
def up_forward(
    x, hidden, up, up_bias, valid, out, tokens, d, k,
    LIFTED: tl.constexpr, MASKED: tl.constexpr, K: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sets out = O + GELU(h) W_up + b_up, and O at padding."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column, i = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, K)
    within = (token < tokens)[:, None] & (column < d)[None, :]
    h = tl.load(hidden + token[:, None] * k + i[None, :], (token < tokens)[:, None] & (i < k)[None, :], 0.0)
    weight = tl.load(up + column[:, None] * k + i[None, :], (column < d)[:, None] & (i < k)[None, :], 0.0)
    delta = tl.sum((h * normal_cdf(h))[:, None, :] * weight[None, :, :], 2)
    if LIFTED:
        delta += tl.load(up_bias + column, column < d, 0.0)[None, :]
    if MASKED:
        delta = tl.where((tl.load(valid + token, token < tokens, 0) != 0)[:, None], delta, 0.0)
    rows = tl.load(x + token[:, None] * d + column[None, :], within, 0.0)
    # Added in the dtype of O, as O + delta is everywhere else.
    total = rows.to(tl.float32) + delta.to(rows.dtype).to(tl.float32)
    tl.store(out + token[:, None] * d + column[None, :], total.to(rows.dtype), within)


@triton.jit
def up_backward(
    grad, hidden, up, grad_hidden, valid, carried, active, tokens, d, k,
    SEEN: tl.constexpr, MASKED: tl.constexpr, K: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sets the gradient of h, and GELU(h) with a one behind it, both without what is padding."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    i, j = tl.arange(0, K), tl.arange(0, COLUMNS)
    inside = (token < tokens)[:, None] & (i < k)[None, :]
    total = tl.zeros([TOKENS, K], tl.float32)
    for start in tl.range(0, d, COLUMNS):
        column = start + j
        within = (token < tokens)[:, None] & (column < d)[None, :]
        rows = tl.load(grad + token[:, None] * d + column[None, :], within, 0.0).to(tl.float32)
        weight = tl.load(up + column[None, :] * k + i[:, None], (column < d)[None, :] & (i < k)[:, None], 0.0)
        total += tl.sum(rows[:, None, :] * weight[None, :, :], 2)
    h = tl.load(hidden + token[:, None] * k + i[None, :], inside, 0.0)
    cdf = normal_cdf(h)
    total = total * (cdf + h * 0.3989422804014327 * tl.exp(-0.5 * h * h))
    mark = (token < tokens).to(tl.float32)
    if MASKED:
        mark = tl.where(tl.load(valid + token, token < tokens, 0) != 0, mark, 0.0)
        total = tl.where(mark[:, None] > 0, total, 0.0)
    if SEEN:
        total += tl.load(grad_hidden + token[:, None] * k + i[None, :], inside, 0.0)
    tl.store(carried + token[:, None] * k + i[None, :], total, inside)
    tl.store(active + token[:, None] * (k + 1) + i[None, :], h * cdf * mark[:, None], inside)
    tl.store(active + token * (k + 1) + k, mark, token < tokens)


@triton.jit
def down_backward(grad, low, down, grad_x, tokens, d, k, K: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sets the gradient of O: its own, and that of O W_down times W_down."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column, i = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, K)
    within = (token < tokens)[:, None] & (column < d)[None, :]
    factor = tl.load(low + token[:, None] * k + i[None, :], (token < tokens)[:, None] & (i < k)[None, :], 0.0)
    weight = tl.load(down + i[None, :] * d + column[:, None], (i < k)[None, :] & (column < d)[:, None], 0.0)
    rows = tl.load(grad + token[:, None] * d + column[None, :], within, 0.0)
    added = tl.sum(factor[:, None, :] * weight[None, :, :], 2)
    total = rows.to(tl.float32) + added.to(rows.dtype).to(tl.float32)
    tl.store(grad_x + token[:, None] * d + column[None, :], total.to(rows.dtype), within)
