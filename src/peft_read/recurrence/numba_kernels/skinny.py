"""Products of tall matrices with very narrow ones, for the CPU: what an adapter's projections are.

BLAS is made for wider ones. Here a row of the tall matrix is read once for four columns of the narrow one, and the
loops over the d columns become vector instructions. Tensors are given by their addresses, see `memory.py`; d is a
multiple of 16, so that no loop has a rest.
"""

# mypy: allow-untyped-defs
import numpy as np

from .memory import compiled_loop, floats_at

__all__ = ["expand", "gather", "narrow"]


@compiled_loop
def narrow(rows, weight, out, count, d, k):
    """Set out = rows weightᵀ: (count, d) by (k, d) gives (count, k), summed in float64."""
    rows, weight, out = floats_at(rows, (count, d)), floats_at(weight, (k, d)), floats_at(out, (count, k))
    for n in range(count):
        for i in range(0, k - k % 4, 4):
            first = second = third = fourth = 0.0
            for j in range(d):
                row = np.float64(rows[n, j])
                first += row * weight[i, j]
                second += row * weight[i + 1, j]
                third += row * weight[i + 2, j]
                fourth += row * weight[i + 3, j]
            out[n, i], out[n, i + 1], out[n, i + 2], out[n, i + 3] = first, second, third, fourth
        for i in range(k - k % 4, k):
            first = 0.0
            for j in range(d):
                first += np.float64(rows[n, j]) * weight[i, j]
            out[n, i] = first


@compiled_loop
def expand(rows, factors, weight, out, count, d, k):
    """Set out = rows + factors weight: (count, k) by (k, d) gives (count, d)."""
    rows, out = floats_at(rows, (count, d)), floats_at(out, (count, d))
    factors, weight = floats_at(factors, (count, k)), floats_at(weight, (k, d))
    for n in range(count):
        for j in range(d):
            out[n, j] = rows[n, j]
        for i in range(0, k - k % 4, 4):
            a, b, c, e = factors[n, i], factors[n, i + 1], factors[n, i + 2], factors[n, i + 3]
            for j in range(d):
                first = a * weight[i, j] + b * weight[i + 1, j]
                out[n, j] += first + (c * weight[i + 2, j] + e * weight[i + 3, j])
        for i in range(k - k % 4, k):
            a = factors[n, i]
            for j in range(d):
                out[n, j] += a * weight[i, j]


@compiled_loop
def gather(rows, factors, out, count, d, k):
    """Set out = factorsᵀ rows: (count, k) by (count, d) gives (k, d)."""
    rows, factors, out = floats_at(rows, (count, d)), floats_at(factors, (count, k)), floats_at(out, (k, d))
    for i in range(k):
        for j in range(d):
            out[i, j] = 0
    for n in range(0, count - count % 4, 4):
        for i in range(k):
            a, b, c, e = factors[n, i], factors[n + 1, i], factors[n + 2, i], factors[n + 3, i]
            for j in range(d):
                first = a * rows[n, j] + b * rows[n + 1, j]
                out[i, j] += first + (c * rows[n + 2, j] + e * rows[n + 3, j])
    for n in range(count - count % 4, count):
        for i in range(k):
            a = factors[n, i]
            for j in range(d):
                out[i, j] += a * rows[n, j]
