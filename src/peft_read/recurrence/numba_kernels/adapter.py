"""The whole adapter in one pass over the tokens, for the CPU: O + GELU(RNN(O W_down)) W_up, and its gradients.

With k <= 8 the two projections are too narrow for matrix products to be fast: most of their time goes into moving
the (B, T, d) tensors, once each for W_down, W_up, its bias and the sum. Here four tokens at a time go through all of
it while they are in the nearest cache. The backward pass goes through them once more, from the last to the first.
All B T tokens are one list, cut in fours; what is missing of the last four is filled up with its last token, which is
then computed several times to the same bits. Widths are filled up with zeros to a multiple of four. Tensors are given
by the addresses of contiguous float32, absent ones by 0. Optional: needs numba (`pip install "peft-read[fast]"`).
"""

# mypy: allow-untyped-defs
import numpy as np

from .gated import tanh
from .simd import WIDE, at, bytes_at, compiled_loop, filled, floats_at, inlined, put_at, total_of

__all__ = ["adapter_backward", "adapter_forward"]

TOKENS = 4  # at a time, and as many of the k: sixteen running sums stay in registers


@inlined
def _normal_cdf(h):
    """Φ(h) of the standard normal distribution for |h| <= 1, where a short series is exact to 1e-11."""
    s = h * h
    return 0.5 + h * ((((((5.368484896983824e-07 * s - 9.273147829354393e-06) * s + 0.00011531932749554948) * s
                         - 0.0011872880034823063) * s + 0.009973550294729691) * s - 0.06649037964418329) * s
                      + 0.3989422803970657)  # fmt: skip


@inlined
def _normal_density(h):
    """φ(h) of the standard normal distribution for |h| <= 1, to 1e-9."""
    s = h * h
    return ((((((6.729412986414694e-06 * s - 0.00010130892518259083) * s + 0.0010371508460240478) * s
              - 0.008310671797426157) * s + 0.049867677936052526) * s - 0.19947113323376137) * s
            + 0.39894228032616286)  # fmt: skip


@inlined
def _four(array, places, j, width):
    """Sixteen numbers, or one, of four rows."""
    a, b, c, e = places
    return at(array, a + j, width), at(array, b + j, width), at(array, c + j, width), at(array, e + j, width)


@inlined
def _rows(first, last, d):
    """Where four rows start."""
    return first * d, min(first + 1, last) * d, min(first + 2, last) * d, min(first + 3, last) * d


@inlined
def _project_at(sums, rows, tokens, weight, places, j, width):
    a, b, c, e = _four(rows, tokens, j, width)
    p, q, u, v = _four(weight, places, j, width)
    ap, aq, au, av, bp, bq, bu, bv, cp, cq, cu, cv, ep, eq, eu, ev = sums
    return (
        ap + a * p, aq + a * q, au + a * u, av + a * v, bp + b * p, bq + b * q, bu + b * u, bv + b * v,
        cp + c * p, cq + c * q, cu + c * u, cv + c * v, ep + e * p, eq + e * q, eu + e * u, ev + e * v,
    )  # fmt: skip


@inlined
def _sixteen(x):
    return x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x


@compiled_loop
def _project(rows, tokens, weight, places, d, products, block):
    """products[s, block + i] = rows[s] · weight[i] for four rows of each."""
    whole = d // WIDE * WIDE
    sums = _sixteen(filled(np.float32(0)))
    for j in range(0, whole, WIDE):
        sums = _project_at(sums, rows, tokens, weight, places, j, WIDE)
    ap, aq, au, av, bp, bq, bu, bv, cp, cq, cu, cv, ep, eq, eu, ev = sums
    rest = (
        total_of(ap), total_of(aq), total_of(au), total_of(av), total_of(bp), total_of(bq), total_of(bu), total_of(bv),
        total_of(cp), total_of(cq), total_of(cu), total_of(cv), total_of(ep), total_of(eq), total_of(eu), total_of(ev),
    )  # fmt: skip
    for j in range(whole, d):
        rest = _project_at(rest, rows, tokens, weight, places, j, None)
    for i in range(16):
        products[i // 4, block + i % 4] = rest[i]


@inlined
def _spread_at(out, rows, tokens, factors, block, weight, places, bias, j, width):
    p, q, u, v = _four(weight, places, j, width)
    a, b, c, e = _four(rows, tokens, j, width)
    shift, last = at(bias, j, width), factors.shape[1] - 1
    a = (a + shift * factors[0, last]) + ((p * factors[0, block] + q * factors[0, block + 1])
                       + (u * factors[0, block + 2] + v * factors[0, block + 3]))  # fmt: skip
    b = (b + shift * factors[1, last]) + ((p * factors[1, block] + q * factors[1, block + 1])
                       + (u * factors[1, block + 2] + v * factors[1, block + 3]))  # fmt: skip
    c = (c + shift * factors[2, last]) + ((p * factors[2, block] + q * factors[2, block + 1])
                       + (u * factors[2, block + 2] + v * factors[2, block + 3]))  # fmt: skip
    e = (e + shift * factors[3, last]) + ((p * factors[3, block] + q * factors[3, block + 1])
                       + (u * factors[3, block + 2] + v * factors[3, block + 3]))  # fmt: skip
    put_at(out, tokens[0] + j, a)
    put_at(out, tokens[1] + j, b)
    put_at(out, tokens[2] + j, c)
    put_at(out, tokens[3] + j, e)


@compiled_loop
def _spread(out, rows, tokens, factors, block, weight, places, bias, d):
    """Set out[s] = rows[s] + factors[s, block:block + 4] · weight + factors[s, -1] bias; rows may be out itself."""
    whole = d // WIDE * WIDE
    for j in range(0, whole, WIDE):
        _spread_at(out, rows, tokens, factors, block, weight, places, bias, j, WIDE)
    for j in range(whole, d):
        _spread_at(out, rows, tokens, factors, block, weight, places, bias, j, None)


@inlined
def _gather_at(totals, places, rows, tokens, factors, block, j, width):
    a, b, c, e = _four(rows, tokens, j, width)
    for i in range(4):
        first = a * factors[0, block + i] + b * factors[1, block + i]
        second = c * factors[2, block + i] + e * factors[3, block + i]
        total = at(totals, places[i] + j, width) + (first + second)
        put_at(totals, places[i] + j, total)


@compiled_loop
def _gather(totals, places, rows, tokens, factors, block, d):
    """Add Σ factors[s, block + i] rows[s] over four rows to four totals."""
    whole = d // WIDE * WIDE
    for j in range(0, whole, WIDE):
        _gather_at(totals, places, rows, tokens, factors, block, j, WIDE)
    for j in range(whole, d):
        _gather_at(totals, places, rows, tokens, factors, block, j, None)


@inlined
def _add_at(total, rows, row, j, width):
    put_at(total, j, at(total, j, width) + at(rows, row + j, width))


@compiled_loop
def _gather_sum(total, rows, first, count, marks, masked, d):
    """Add those of some rows that are real to the total."""
    whole = d // WIDE * WIDE
    for n in range(first, first + count):
        if masked and not marks[n]:
            continue
        row = n * d
        for j in range(0, whole, WIDE):
            _add_at(total, rows, row, j, WIDE)
        for j in range(whole, d):
            _add_at(total, rows, row, j, None)


@inlined
def _filled_up(address, rows, columns, height, width):
    """A matrix with zeros below and beside it, flat; zero if absent."""
    found, given = np.zeros(height * width, dtype=np.float32), floats_at(address, (rows, columns))
    if address:
        for i in range(rows):
            for j in range(columns):
                found[i * width + j] = given[i, j]
    return found


@inlined
def _turned(address, rows, columns, height):
    """A matrix the other way round, (columns filled up to the height, rows), flat."""
    found, given = np.zeros(height * rows, dtype=np.float32), floats_at(address, (rows, columns))
    for i in range(rows):
        for j in range(columns):
            found[j * rows + i] = given[i, j]
    return found


@compiled_loop
def adapter_forward(
    x, down, down_bias, weight_ih, weight_hh, bias_ih, bias_hh, up, up_bias, state, valid, out, narrow, hidden, batch,
    length, d, width,
):  # fmt: skip
    """O + GELU(RNN(O W_down)) W_up, and O at padding; sets out, narrow and hidden, named as in `arguments.py`."""
    k, count = (width + 3) // 4 * 4, batch * length
    masked, continued = valid != 0, state != 0
    rows, targets = floats_at(x, count * d), floats_at(out, count * d)
    down_rows, up_rows = _filled_up(down, width, d, k, d), _turned(up, d, width, k)
    shift, no_shift = _filled_up(up_bias, 1, d, 1, d), np.zeros(d, dtype=np.float32)
    by_input, by_state = _filled_up(weight_ih, width, width, k, k), _filled_up(weight_hh, width, width, k, k)
    first_shift = _filled_up(down_bias, 1, width, 1, k)
    bias, bias_more = _filled_up(bias_ih, 1, width, 1, k), _filled_up(bias_hh, 1, width, 1, k)
    for i in range(k):
        bias[i] += bias_more[i]
    states, marks = floats_at(state, (batch, width)), bytes_at(valid, count)
    narrow, hidden = floats_at(narrow, (count, width)), floats_at(hidden, (count, width))
    products, factors = np.empty((TOKENS, k), dtype=np.float32), np.empty((TOKENS, k + 1), dtype=np.float32)
    step, before = np.empty(k), np.zeros(k)
    for start in range(0, count, TOKENS):
        tokens = _rows(start, count - 1, d)
        for block in range(0, k, 4):
            places = block * d, (block + 1) * d, (block + 2) * d, (block + 3) * d
            _project(rows, tokens, down_rows, places, d, products, block)
        for s in range(TOKENS):
            n = start + s
            if n >= count:
                for i in range(k + 1):
                    factors[s, i] = factors[s - 1, i]
                continue
            is_real = not masked or marks[n]
            if n % length == 0:
                for i in range(width):
                    before[i] = states[n // length, i] if continued else 0
            for i in range(k):
                products[s, i] += first_shift[i]
            for i in range(width):
                narrow[n, i] = products[s, i]
            if is_real:
                for i in range(k):
                    total = np.float64(bias[i])
                    for j in range(k):
                        total += by_input[i * k + j] * np.float64(products[s, j]) + by_state[i * k + j] * before[j]
                    step[i] = total
                for i in range(k):
                    before[i] = np.float32(tanh(step[i]))
            for i in range(k):
                factors[s, i] = before[i] * _normal_cdf(before[i]) if is_real else 0.0
            factors[s, k] = 1.0 if is_real else 0.0
            for i in range(width):
                hidden[n, i] = before[i]
        for block in range(0, k, 4):
            places = block * d, (block + 1) * d, (block + 2) * d, (block + 3) * d
            if block == 0:
                _spread(targets, rows, tokens, factors, block, up_rows, places, shift, d)
            else:
                _spread(targets, targets, tokens, factors, block, up_rows, places, no_shift, d)


@compiled_loop
def adapter_backward(
    grad, grad_hidden, x, down, weight_ih, weight_hh, up, state, valid, narrow, hidden, grad_x, grad_state, grad_down,
    grad_down_bias, grad_weight_ih, grad_weight_hh, grad_bias, grad_up, grad_up_bias, batch, length, d, width,
):  # fmt: skip
    """Sets the gradients; those of x, W_down, W_up and its bias may be absent, which means not wanted."""
    k, count = (width + 3) // 4 * 4, batch * length
    masked, continued, seen = valid != 0, state != 0, grad_hidden != 0
    rows, grads, targets = floats_at(x, count * d), floats_at(grad, count * d), floats_at(grad_x, count * d)
    down_rows, up_rows = _filled_up(down, width, d, k, d), _turned(up, d, width, k)
    by_input, by_state = _filled_up(weight_ih, width, width, k, k), _filled_up(weight_hh, width, width, k, k)
    states, marks = floats_at(state, (batch, width)), bytes_at(valid, count)
    narrow, hidden = floats_at(narrow, (count, width)), floats_at(hidden, (count, width))
    slopes, state_slopes = floats_at(grad_hidden, (count, width)), floats_at(grad_state, (batch, width))
    no_shift, up_shift = np.zeros(d, dtype=np.float32), np.zeros(d, dtype=np.float32)
    down_totals, up_totals = np.zeros(k * d, dtype=np.float32), np.zeros(k * d, dtype=np.float32)
    input_sums, state_sums, sums, narrow_sums = np.zeros((k, k)), np.zeros((k, k)), np.zeros(k), np.zeros(k)
    products, factors = np.empty((TOKENS, k), dtype=np.float32), np.empty((TOKENS, k + 1), dtype=np.float32)
    narrowed = np.zeros((TOKENS, k + 1), dtype=np.float32)
    carried, inner, now, before, wide = np.zeros(k), np.empty(k), np.zeros(k), np.zeros(k), np.zeros(k)
    for start in range((count - 1) // TOKENS * TOKENS, -1, -TOKENS):
        tokens = _rows(start, count - 1, d)
        real_tokens = min(TOKENS, count - start)
        for s in range(TOKENS):
            for i in range(k):
                factors[s, i] = 0
            if s < real_tokens and (not masked or marks[start + s]):
                for i in range(width):
                    h = np.float64(hidden[start + s, i])
                    factors[s, i] = h * _normal_cdf(h)
        for block in range(0, k, 4):
            places = block * d, (block + 1) * d, (block + 2) * d, (block + 3) * d
            _project(grads, tokens, up_rows, places, d, products, block)
            if grad_up:
                _gather(up_totals, places, grads, tokens, factors, block, d)
        if grad_up_bias:
            _gather_sum(up_shift, grads, start, real_tokens, marks, masked, d)
        for s in range(real_tokens - 1, -1, -1):
            n = start + s
            if n % length == length - 1:
                for i in range(k):
                    carried[i] = 0
            for i in range(width):
                now[i] = hidden[n, i]
                if not masked or marks[n]:
                    carried[i] += products[s, i] * (_normal_cdf(now[i]) + now[i] * _normal_density(now[i]))
                if seen:
                    carried[i] += slopes[n, i]
                wide[i] = narrow[n, i]
                if n % length > 0:
                    before[i] = hidden[n - 1, i]
                else:
                    before[i] = states[n // length, i] if continued else 0
            if masked and not marks[n]:
                for i in range(k):
                    narrowed[s, i] = 0
            else:
                for i in range(k):
                    inner[i] = carried[i] * (1 - now[i] * now[i])
                    sums[i] += inner[i]
                    for j in range(k):
                        input_sums[i, j] += inner[i] * wide[j]
                        state_sums[i, j] += inner[i] * before[j]
                for j in range(k):
                    below, back = 0.0, 0.0
                    for i in range(k):
                        below += by_input[i * k + j] * inner[i]
                        back += by_state[i * k + j] * inner[i]
                    narrowed[s, j] = below
                    narrow_sums[j] += below
                    carried[j] = back
            if n % length == 0:
                for i in range(width):
                    state_slopes[n // length, i] = carried[i]
        for s in range(real_tokens, TOKENS):  # as the last one, which they write to; they count for nothing
            for i in range(k):
                narrowed[s, i] = narrowed[s - 1, i]
        for block in range(0, k, 4):
            places = block * d, (block + 1) * d, (block + 2) * d, (block + 3) * d
            if grad_x and block == 0:
                _spread(targets, grads, tokens, narrowed, block, down_rows, places, no_shift, d)
            elif grad_x:
                _spread(targets, targets, tokens, narrowed, block, down_rows, places, no_shift, d)
        for s in range(real_tokens, TOKENS):
            for i in range(k):
                narrowed[s, i] = 0
        for block in range(0, k, 4):
            places = block * d, (block + 1) * d, (block + 2) * d, (block + 3) * d
            if grad_down:
                _gather(down_totals, places, rows, tokens, narrowed, block, d)
    if grad_down:
        for j in range(width * d):
            floats_at(grad_down, width * d)[j] = down_totals[j]
    if grad_up:
        for i in range(d):
            for j in range(width):
                floats_at(grad_up, (d, width))[i, j] = up_totals[j * d + i]
    if grad_up_bias:
        for j in range(d):
            floats_at(grad_up_bias, d)[j] = up_shift[j]
    for i in range(width):
        floats_at(grad_bias, width)[i] = sums[i]
        floats_at(grad_down_bias, width)[i] = narrow_sums[i]
        for j in range(width):
            floats_at(grad_weight_ih, (width, width))[i, j] = input_sums[i, j]
            floats_at(grad_weight_hh, (width, width))[i, j] = state_sums[i, j]
