"""The whole adapter in one pass over the tokens, for the CPU: O + GELU(RNN(O W_down)) W_up, and its gradients.

With k <= 8 the two projections are too narrow for matrix products to be fast: most of their time goes into moving
the (B, T, d) tensors, once each for W_down, W_up, its bias and the sum. Here four tokens at a time go through all of
it while they are in the nearest cache. The backward pass goes through them once more, from the last to the first.
Widths are filled up with zeros to a multiple of four. Optional: needs numba (`pip install "peft-read[fast]"`).
"""

# mypy: allow-untyped-defs
import numpy as np

from .compiled import compiled_loop, inlined, tanh

__all__ = ["adapter_backward", "adapter_forward"]

TOKENS = 4  # at a time, and as many ranks: sixteen running sums stay in registers


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


@compiled_loop
def _project(rows, start, weight, block, products):
    """products[s, block + i] = rows[start + s] · weight[block + i] for four rows and four ranks."""
    a, b, c, e = rows[start], rows[start + 1], rows[start + 2], rows[start + 3]
    p, q, u, v = weight[block], weight[block + 1], weight[block + 2], weight[block + 3]
    zero = np.float32(0)
    ap, aq, au, av = zero, zero, zero, zero
    bp, bq, bu, bv = zero, zero, zero, zero
    cp, cq, cu, cv = zero, zero, zero, zero
    ep, eq, eu, ev = zero, zero, zero, zero
    for j in range(rows.shape[1]):
        ap += a[j] * p[j]
        aq += a[j] * q[j]
        au += a[j] * u[j]
        av += a[j] * v[j]
        bp += b[j] * p[j]
        bq += b[j] * q[j]
        bu += b[j] * u[j]
        bv += b[j] * v[j]
        cp += c[j] * p[j]
        cq += c[j] * q[j]
        cu += c[j] * u[j]
        cv += c[j] * v[j]
        ep += e[j] * p[j]
        eq += e[j] * q[j]
        eu += e[j] * u[j]
        ev += e[j] * v[j]
    products[0, block], products[0, block + 1], products[0, block + 2], products[0, block + 3] = ap, aq, au, av
    products[1, block], products[1, block + 1], products[1, block + 2], products[1, block + 3] = bp, bq, bu, bv
    products[2, block], products[2, block + 1], products[2, block + 2], products[2, block + 3] = cp, cq, cu, cv
    products[3, block], products[3, block + 1], products[3, block + 2], products[3, block + 3] = ep, eq, eu, ev


@inlined
def _project_one(row, weight, products):
    """products[i] = row · weight[i], in the same lengths of sums as `_project`."""
    for i in range(weight.shape[0]):
        total = np.float32(0)
        line = weight[i]
        for j in range(row.shape[0]):
            total += row[j] * line[j]
        products[i] = total


@compiled_loop
def _spread(out, row, factors, weight, block):
    """Set out = row + factors[block:block + 4] · weight[block:block + 4]; row may be out itself."""
    p, q, u, v = weight[block], weight[block + 1], weight[block + 2], weight[block + 3]
    f, g, h, i = factors[block], factors[block + 1], factors[block + 2], factors[block + 3]
    for j in range(row.shape[0]):
        out[j] = row[j] + ((f * p[j] + g * q[j]) + (h * u[j] + i * v[j]))


@compiled_loop
def _gather(total, rows, start, factors, rank):
    """Add Σ factors[s, rank] rows[start + s] over four rows to the total."""
    a, b, c, e = rows[start], rows[start + 1], rows[start + 2], rows[start + 3]
    f, g, h, i = factors[0, rank], factors[1, rank], factors[2, rank], factors[3, rank]
    for j in range(total.shape[0]):
        total[j] += (f * a[j] + g * b[j]) + (h * c[j] + i * e[j])


@compiled_loop
def _gather_sum(total, rows, start, count):
    """Add the rows from `start` on to the total."""
    for s in range(start, start + count):
        row = rows[s]
        for j in range(total.shape[0]):
            total[j] += row[j]


@inlined
def _gather_one(total, row, factor):
    for j in range(total.shape[0]):
        total[j] += factor * row[j]


@compiled_loop
def adapter_forward(x, down, down_bias, weight_ih, weight_hh, bias, up, up_bias, state, real, out, narrow, hidden):
    """O + GELU(RNN(O W_down)) W_up.

    Args:
        x: O, (B, T, d).
        down: W_down, (K, d); K is k filled up to a multiple of four.
        down_bias: (K,).
        weight_ih: (K, K).
        weight_hh: (K, K).
        bias: both biases of the recurrence, (K,).
        up: W_up the same way round as `down`, (K, d).
        up_bias: (d,), or (0,) if there is none.
        state: the state before the first token, (B, K).
        real: (B, T), or (0, 0) if every token is real.
        out: (B, T, d), written.
        narrow: O W_down + b_down, (B, T, K), written.
        hidden: the outputs of the recurrence, (B, T, K), written.
    """
    batch, length, d = x.shape
    k = down.shape[0]
    products = np.empty((TOKENS, k), dtype=np.float32)
    factors = np.empty(k, dtype=np.float32)
    step = np.empty(k)
    before = np.empty(k)
    for b in range(batch):
        rows = x[b]
        for i in range(k):
            before[i] = state[b, i]
        for start in range(0, length, TOKENS):
            count = min(TOKENS, length - start)
            if count == TOKENS:
                for block in range(0, k, 4):
                    _project(rows, start, down, block, products)
            else:
                for s in range(count):
                    _project_one(rows[start + s], down, products[s])
            for s in range(count):
                t = start + s
                for i in range(k):
                    narrow[b, t, i] = products[s, i] + down_bias[i]
                if real.size == 0 or real[b, t]:
                    for i in range(k):
                        total = np.float64(bias[i])
                        for j in range(k):
                            total += weight_ih[i, j] * np.float64(narrow[b, t, j]) + weight_hh[i, j] * before[j]
                        step[i] = total
                    for i in range(k):
                        before[i] = np.float32(tanh(step[i]))
                for i in range(k):
                    hidden[b, t, i] = before[i]
                    factors[i] = before[i] * _normal_cdf(before[i])
                row, target = rows[t], out[b, t]
                if up_bias.size > 0:
                    for j in range(d):
                        target[j] = row[j] + up_bias[j]
                    _spread(target, target, factors, up, 0)
                else:
                    _spread(target, row, factors, up, 0)
                for block in range(4, k, 4):
                    _spread(target, target, factors, up, block)


@compiled_loop
def adapter_backward(
    grad, grad_hidden, x, down, weight_ih, weight_hh, up, real, narrow, hidden,
    grad_x, grad_down, grad_narrow, grad_inner, grad_up, grad_up_bias, grad_state,
):  # fmt: skip
    """The gradients, from that of the output.

    Args:
        grad: the gradient of `out`, (B, T, d).
        grad_hidden: that of `hidden`, (B, T, K), or (0, 0, 0) if there is none.
        x: this and the next seven as in `adapter_forward`.
        down: W_down.
        weight_ih: the recurrence's.
        weight_hh: the recurrence's.
        up: W_up.
        real: the mask.
        narrow: O W_down + b_down.
        hidden: the outputs of the recurrence.
        grad_x: (B, T, d), written; (0, 0, 0) if it is not wanted.
        grad_down: (K, d), added to; (0, 0) if it is not wanted.
        grad_narrow: (B, T, K), written.
        grad_inner: the gradient of the recurrence's sums, (B, T, K), written; zero at padding.
        grad_up: (K, d), added to; (0, 0) if it is not wanted.
        grad_up_bias: (d,), added to; (0,) if it is not wanted.
        grad_state: (B, K), written.
    """
    batch, length = x.shape[:2]
    k = down.shape[0]
    products = np.empty((TOKENS, k), dtype=np.float32)
    factors = np.empty((TOKENS, k), dtype=np.float32)
    narrowed = np.empty((TOKENS, k), dtype=np.float32)
    carried = np.empty(k)
    inner = np.empty(k)
    whole = (length + TOKENS - 1) // TOKENS
    for b in range(batch):
        rows, grads = x[b], grad[b]
        for i in range(k):
            carried[i] = 0
        for group in range(whole - 1, -1, -1):
            start = group * TOKENS
            count = min(TOKENS, length - start)
            for s in range(count):
                for i in range(k):
                    h = np.float64(hidden[b, start + s, i])
                    factors[s, i] = h * _normal_cdf(h)
            if count == TOKENS:
                for block in range(0, k, 4):
                    _project(grads, start, up, block, products)
                if grad_up.size > 0:
                    for i in range(k):
                        _gather(grad_up[i], grads, start, factors, i)
            else:
                for s in range(count):
                    _project_one(grads[start + s], up, products[s])
                    if grad_up.size > 0:
                        for i in range(k):
                            _gather_one(grad_up[i], grads[start + s], factors[s, i])
            if grad_up_bias.size > 0:
                _gather_sum(grad_up_bias, grads, start, count)
            for s in range(count - 1, -1, -1):
                t = start + s
                for i in range(k):
                    h = np.float64(hidden[b, t, i])
                    carried[i] += products[s, i] * (_normal_cdf(h) + h * _normal_density(h))
                if grad_hidden.size > 0:
                    for i in range(k):
                        carried[i] += grad_hidden[b, t, i]
                if real.size > 0 and not real[b, t]:
                    for i in range(k):
                        grad_inner[b, t, i] = 0
                        narrowed[s, i] = 0
                        grad_narrow[b, t, i] = 0
                    continue
                for i in range(k):
                    h = np.float64(hidden[b, t, i])
                    inner[i] = carried[i] * (1 - h * h)
                    grad_inner[b, t, i] = inner[i]
                for j in range(k):
                    below, before = 0.0, 0.0
                    for i in range(k):
                        below += weight_ih[i, j] * inner[i]
                        before += weight_hh[i, j] * inner[i]
                    narrowed[s, j] = below
                    grad_narrow[b, t, j] = below
                    carried[j] = before
            if grad_x.size > 0:
                for s in range(count):
                    target = grad_x[b, start + s]
                    _spread(target, grads[start + s], narrowed[s], down, 0)
                    for block in range(4, k, 4):
                        _spread(target, target, narrowed[s], down, block)
            if grad_down.size > 0:
                if count == TOKENS:
                    for i in range(k):
                        _gather(grad_down[i], rows, start, narrowed, i)
                else:
                    for s in range(count):
                        for i in range(k):
                            _gather_one(grad_down[i], rows[start + s], narrowed[s, i])
        for i in range(k):
            grad_state[b, i] = carried[i]
