"""The parts of the RNN adapter that are parallel over tokens, as Triton kernels: before and behind the scan.

A program is one warp. It takes a tile of tokens and goes over the columns of O, or a tile of columns and goes over a
part of the tokens. Tiles are (tokens, width, columns), divided by columns alone: products are summed per thread, and
across threads only once, at the end. O is read in its own dtype and everything is computed in float32.
"""

# mypy: allow-untyped-defs
import triton
import triton.language as tl

from .scan import square

__all__ = ["columns_backward", "down_forward", "narrow_backward", "up_backward", "up_forward"]


@triton.jit
def project(x, weight, token, tokens, d, k, K: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr):
    """The product (TOKENS, K) of rows of x (tokens, d) with a matrix (k, d)."""
    i, j = tl.arange(0, K)[None, :, None], tl.arange(0, COLUMNS)[None, None, :]
    here = (token < tokens)[:, None, None]
    total = tl.zeros([TOKENS, K, COLUMNS], tl.float32)
    for start in tl.range(0, d, COLUMNS):
        column = start + j
        rows = tl.load(x + token[:, None, None] * d + column, here & (column < d), 0.0).to(tl.float32)
        total += rows * tl.load(weight + i * d + column, (i < k) & (column < d), 0.0)
    return tl.sum(total, 2)


@triton.jit
def down_forward(
    x, down, down_bias, weight_ih, bias_ih, bias_hh, narrow, inner, tokens, d, k,
    SHIFTED: tl.constexpr, BIASED: tl.constexpr, K: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sets narrow = O W_down + b_down and inner = W_ih narrow + b_ih + b_hh."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    i = tl.arange(0, K)
    inside, place = (token < tokens)[:, None] & (i < k)[None, :], token[:, None] * k + i[None, :]
    low = project(x, down, token, tokens, d, k, K, TOKENS, COLUMNS)
    if SHIFTED:
        low += tl.load(down_bias + i, i < k, 0.0)[None, :]
    tl.store(narrow + place, low, inside)
    gates = tl.sum(low[:, None, :] * square(weight_ih, k, K)[None, :, :], 2)
    if BIASED:
        gates += (tl.load(bias_ih + i, i < k, 0.0) + tl.load(bias_hh + i, i < k, 0.0))[None, :]
    tl.store(inner + place, gates, inside)


@triton.jit
def normal_cdf(h):
    return 0.5 + 0.5 * tl.erf(h * 0.7071067811865476)


@triton.jit
def up_forward(
    x, hidden, up, up_bias, valid, out, tokens, d, k,
    LIFTED: tl.constexpr, MASKED: tl.constexpr, K: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sets out = O + GELU(h) W_up + b_up, and O at padding; `up` is W_up with a row of d for each of the width."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    i, j = tl.arange(0, K), tl.arange(0, COLUMNS)[None, None, :]
    h = tl.load(hidden + token[:, None] * k + i[None, :], (token < tokens)[:, None] & (i < k)[None, :], 0.0)
    active = (h * normal_cdf(h))[:, :, None]
    here, rest = (token < tokens)[:, None, None], token[:, None, None] * d
    if MASKED:
        real = (tl.load(valid + token, token < tokens, 0) != 0)[:, None, None]
    for start in tl.range(0, d, COLUMNS):
        column = start + j
        known = (i < k)[None, :, None] & (column < d)
        delta = tl.sum(active * tl.load(up + i[None, :, None] * d + column, known, 0.0), 1)[:, None, :]
        if LIFTED:
            delta += tl.load(up_bias + column, column < d, 0.0)
        if MASKED:
            delta = tl.where(real, delta, 0.0)
        rows = tl.load(x + rest + column, here & (column < d), 0.0)
        # Added in the dtype of O, as O + delta is everywhere else.
        total = rows.to(tl.float32) + delta.to(rows.dtype).to(tl.float32)
        tl.store(out + rest + column, total.to(rows.dtype), here & (column < d))


@triton.jit
def up_backward(
    grad, hidden, up, grad_hidden, valid, carried, active, tokens, d, k,
    SEEN: tl.constexpr, MASKED: tl.constexpr, K: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sets the gradient of h, and GELU(h) with a one behind it, both without what is padding."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    i = tl.arange(0, K)
    inside, place = (token < tokens)[:, None] & (i < k)[None, :], token[:, None] * k + i[None, :]
    total = project(grad, up, token, tokens, d, k, K, TOKENS, COLUMNS)
    h = tl.load(hidden + place, inside, 0.0)
    cdf = normal_cdf(h)
    total = total * (cdf + h * 0.3989422804014327 * tl.exp(-0.5 * h * h))
    mark = (token < tokens).to(tl.float32)
    if MASKED:
        mark = tl.where(tl.load(valid + token, token < tokens, 0) != 0, mark, 0.0)
        total = tl.where(mark[:, None] > 0, total, 0.0)
    if SEEN:
        total += tl.load(grad_hidden + place, inside, 0.0)
    tl.store(carried + place, total, inside)
    tl.store(active + token[:, None] * (k + 1) + i[None, :], h * cdf * mark[:, None], inside)
    tl.store(active + token * (k + 1) + k, mark, token < tokens)


@triton.jit
def narrow_backward(
    inner, narrow, hidden, state, weight_ih, low, sums, tokens, length, part, k,
    CONTINUED: tl.constexpr, K: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Sets the gradient of O W_down + b_down, and the sums over a `part` of the tokens of what it and `inner` give.

    They lie one behind the other: the gradients of W_ih and W_hh (k, k), of b_ih, b_hh and b_down (k).
    """
    first = tl.program_id(0).to(tl.int64)
    i, row = tl.arange(0, K)[None, :], tl.arange(0, K)[:, None]
    weight = square(weight_ih, k, K)
    by_input = tl.zeros([TOKENS, K, K], tl.float32)
    by_state = tl.zeros([TOKENS, K, K], tl.float32)
    by_bias = tl.zeros([TOKENS, K], tl.float32)
    for start in tl.range(0, part, TOKENS):
        token = (first * part + start + tl.arange(0, TOKENS))[:, None]
        inside, place = (token < tokens) & (i < k), token * k + i
        d = tl.load(inner + place, inside, 0.0)
        before = tl.load(hidden + place - k, inside & (token % length > 0), 0.0)
        if CONTINUED:
            before += tl.load(state + token // length * k + i, inside & (token % length == 0), 0.0)
        by_input += d[:, :, None] * tl.load(narrow + place, inside, 0.0)[:, None, :]
        by_state += d[:, :, None] * before[:, None, :]
        by_bias += d
        tl.store(low + place, tl.sum(d[:, :, None] * weight[None, :, :], 1), inside)
    sums += first * (2 * k + 3) * k
    known, vector, biases, bias = (row < k) & (i < k), tl.arange(0, K), sums + 2 * k * k, tl.sum(by_bias, 0)
    tl.store(sums + row * k + i, tl.sum(by_input, 0), known)
    tl.store(sums + (k + row) * k + i, tl.sum(by_state, 0), known)
    tl.store(biases + vector, bias, vector < k)
    tl.store(biases + k + vector, bias, vector < k)
    tl.store(biases + 2 * k + vector, tl.sum(bias[:, None] * weight, 0), vector < k)


@triton.jit
def columns_backward(
    grad, x, low, active, down, grad_x, sums, tokens, part, d, k,
    PASSED_ON: tl.constexpr, UP: tl.constexpr, DOWN: tl.constexpr,
    K: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sets the gradient of O, its own and that of O W_down times W_down, and those of both matrices.

    Of the matrices a program sets the sums over its `part` of the tokens: (2 k + 1, d), W_up's, its bias's, W_down's.
    """
    column = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[None, None, :]
    first = tl.program_id(1).to(tl.int64)
    i = tl.arange(0, K)[None, :, None]
    wanted, place = (i < k) & (column < d), i * d + column
    weight = tl.load(down + place, wanted, 0.0)
    # One array per name: Triton takes names that start as the same value for one, which the loop does not carry.
    up_total = tl.zeros([1, K, COLUMNS], tl.float32)
    bias_total = tl.zeros([1, 1, COLUMNS], tl.float32)
    down_total = tl.zeros([1, K, COLUMNS], tl.float32)
    for start in tl.range(0, part, TOKENS):
        token = (first * part + start + tl.arange(0, TOKENS))[:, None, None]
        here = token < tokens
        within = here & (column < d)
        rows = tl.load(grad + token * d + column, within, 0.0)
        wide = rows.to(tl.float32)
        factor = tl.load(low + token * k + i, here & (i < k), 0.0)
        if UP:
            up_total += tl.sum(tl.load(active + token * (k + 1) + i, here & (i < k), 0.0) * wide, 0)[None, :, :]
            bias_total += tl.sum(tl.load(active + token * (k + 1) + k, here, 0.0) * wide, 0)[None, :, :]
        if DOWN:
            down_total += tl.sum(factor * tl.load(x + token * d + column, within, 0.0).to(tl.float32), 0)[None, :, :]
        if PASSED_ON:  # last: the loads of this step would wait for the store
            added = tl.sum(factor * weight, 1)[:, None, :]
            total = wide + added.to(rows.dtype).to(tl.float32)
            tl.store(grad_x + token * d + column, total.to(rows.dtype), within)
    sums += first * (2 * k + 1) * d
    if UP:
        tl.store(sums + place, up_total, wanted)
        tl.store(sums + k * d + column, bias_total, column < d)
    if DOWN:
        tl.store(sums + (k + 1) * d + place, down_total, wanted)
