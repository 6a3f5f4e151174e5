"""The solver in compiled loops for the CPU: ascent sweeps with Anderson's mixing, then Newton for what is left.

The same dual, stopping rule and answers as `newton.py`, one problem after the other with everything in the cache. One
sweep costs two passes over the kernel; most problems of training need about ten. What is not done after
`MIXED_SWEEPS` is a flat dual, and gets Newton steps with the same Laplacian and the same search along slopes as
in `newton.py`, where the comments explain them. Optional: needs numba (the extra `fast`).
"""

# mypy: allow-untyped-defs
import numpy as np
import torch
from torch import Tensor

from ..backends import compiled_loop
from .newton import CHEAPEST, FLAT, LINE_SEARCH_TRIALS, LONGEST_STEP, RIDGE, ROUNDING, UNIFORM_RIDGE, solve_newton
from .problem import Kernel, Problem, Scaling

__all__ = ["solve_all", "solve_compiled"]

MIXED_SWEEPS = 40
MEMORY = 5  # of Anderson's mixing
LOOSER = 2.0  # times the tolerance of Newton: measured errors stay ten times below what is promised
LARGEST_NEWTON_SIDE = 96  # beyond it the matrix products of torch are faster than these loops
# Reassociation lets the sums vectorise; infinities keep their meaning.
_compiled = compiled_loop(fastmath={"reassoc", "contract", "arcp", "nsz"})


def solve_compiled(problem: Problem, kernel: Kernel, *, tol: float, max_iter: int) -> Scaling:
    """Solves every problem until one more half sweep would move less than `tol` of its mass.

    Args:
        problem: P problems on the CPU, the columns being the shorter side.
        kernel: their kernel in the exponential domain.
        tol: the relative mass at which a problem is done.
        max_iter: Newton steps at most.
    """
    count, n_rows, n_cols = problem.cost.shape
    matrix = kernel.by_rows.numpy()
    dtype = kernel.dtype
    left = np.zeros((count, n_rows))
    right = np.zeros((count, n_cols))
    n_iter = np.zeros(count, dtype=np.int64)
    converged = np.zeros(count, dtype=np.bool_)
    total = problem.total.numpy() if problem.penalty is None else np.full(count, -1.0)  # a negative total: penalty
    solve_all(
        matrix,
        _array(problem.cost),
        _array(problem.rows),
        _array(problem.cols),
        total,
        (problem.high - problem.low).double().numpy(),
        problem.rows_full.numpy(),
        problem.cols_full.numpy(),
        (LOOSER * tol, ROUNDING[dtype] * (1 + n_rows / 128), ROUNDING[dtype], RIDGE[dtype], UNIFORM_RIDGE[dtype]),
        max_iter if n_cols <= LARGEST_NEWTON_SIDE else 0,
        left,
        right,
        n_iter,
        converged,
    )
    scaling = Scaling(*map(torch.from_numpy, (left, right, n_iter, converged)))
    if bool(scaling.converged.all()):
        return scaling
    rest = (~scaling.converged).nonzero()[:, 0]
    again = solve_newton(problem.select(rest), kernel.select(rest), tol=tol, max_iter=max_iter)
    scaling.log_left[rest], scaling.log_right[rest] = again.log_left, again.log_right
    scaling.n_iter[rest], scaling.converged[rest] = again.n_iter, again.converged
    return scaling


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().numpy()


@_compiled
def solve_all(
    matrix, cost, rows, cols, total, spread, rows_full, cols_full, settings, max_newton, left, right, n_iter, converged
):
    """All problems, one after the other; sets left, right, n_iter and converged. A negative total is a penalty."""
    for p in range(matrix.shape[0]):
        n, m = rows.shape[1], cols.shape[1]
        while n > 1 and rows[p, n - 1] == 0:
            n -= 1
        # Padded rows are left out; padded columns cost little, and cutting them would cost the contiguous layout.
        k, c, a, b = matrix[p, :n], cost[p, :n], rows[p, :n], cols[p]
        y = np.zeros(m)
        v = np.zeros(m, dtype=matrix.dtype)
        ktu = np.zeros(m, dtype=matrix.dtype)
        scale = np.zeros(n, dtype=matrix.dtype)
        r = np.zeros(n)
        full = (rows_full[p], cols_full[p])
        sweeps, done, w = _mixed_sweeps(k, c, a, b, total[p], spread[p], full, settings, y, v, r, scale, ktu)
        n_iter[p] = sweeps
        if not done and max_newton > 0:
            steps, done, w = _newton(
                k, c, a, b, total[p], spread[p], full, settings, max_newton, y, v, r, scale, ktu, w
            )
            n_iter[p] += steps
        converged[p] = done
        for i in range(rows.shape[1]):
            left[p, i] = np.log(scale[i]) if i < n and scale[i] > 0 else -np.inf
        for j in range(m):
            if b[j] > 0:
                right[p, j] = min(y[j], np.log(b[j] / ktu[j]))  # overfull columns are cut down
            else:
                right[p, j] = -np.inf


@_compiled
def _rows_at(k, a, total, rows_full, y, v, r, scale, ktu, w):
    """Fills the rows for log v = y: sets v, r = K v, scale = w u and ktu = K' w u; returns w."""
    n, m = k.shape
    for j in range(m):
        v[j] = 1.0 if y[j] == 0 else np.exp(y[j])
    for i in range(n):
        dot = v[0] * 0
        for j in range(m):
            dot += k[i, j] * v[j]
        r[i] = dot
    if rows_full or total < 0:
        w = 1.0
    else:
        w = _fill(a, r, total, w)
    for j in range(m):
        ktu[j] = 0
    for i in range(n):
        if a[i] == 0:
            scale[i] = 0
            continue
        scale[i] = a[i] / r[i] if rows_full or a[i] < w * r[i] else w
        factor = scale[i]
        for j in range(m):
            ktu[j] += factor * k[i, j]
    return w


@_compiled
def _fill(a, r, total, w):
    """The w with Σ min(a, w r) = total, by Newton's method from the guess w (0: none)."""
    last = -1
    for _ in range(100):
        held, flow, count = 0.0, 0.0, 0
        for i in range(len(a)):
            is_full = w * r[i] >= a[i]
            held += a[i] if is_full else 0.0
            flow += 0.0 if is_full else r[i]
            count += 1 if is_full else 0
        if count == last:  # the sets of full rows are nested: as many rows are the same rows
            break
        if total <= held or flow <= 0:  # the guess was too far to the right
            w = total / np.sum(r)
            continue
        w = (total - held) / flow
        last = count
    return w


@_compiled
def _target(b, ktu, j, cols_full):
    """The best log v_j for fixed rows."""
    if b[j] == 0 or (ktu[j] <= b[j] and not cols_full):
        return 0.0
    return np.log(b[j] / ktu[j])


@_compiled
def _is_done(k, c, b, spread, cols_full, settings, v, scale, ktu):
    """(whether the problem is done, the mass that the next half sweep would move)."""
    tol, floor = settings[0], settings[1]
    n, m = k.shape
    mass, moved = 1e-300, 0.0
    for j in range(m):
        col = np.float64(v[j]) * ktu[j]
        mass += col
        moved += abs((b[j] if cols_full else min(b[j], np.float64(ktu[j]))) - col)
    moved /= mass
    if moved > max(tol, floor):
        return False, moved
    value = 0.0
    for i in range(n):
        row = v[0] * 0
        for j in range(m):
            row += k[i, j] * v[j] * c[i, j]
        value += np.float64(scale[i]) * row
    price = 1.0 if spread == 0 else min(max(abs(value) / mass / spread, CHEAPEST), 1.0)
    return moved <= max(tol * price, floor), moved


@_compiled
def _mixed_sweeps(k, c, a, b, total, spread, full, settings, y, v, r, scale, ktu):
    """Ascent sweeps with Anderson's mixing, from and into y; (sweeps, done, w)."""
    m = k.shape[1]
    rows_full, cols_full = full
    residual, last_residual, last_y = np.zeros(m), np.zeros(m), np.zeros(m)
    changes_y, changes_f = np.zeros((MEMORY, m)), np.zeros((MEMORY, m))
    products, system, weights = np.zeros((MEMORY, MEMORY)), np.zeros((MEMORY, MEMORY)), np.zeros(MEMORY)
    known, slot, best, w = 0, 0, np.inf, 0.0
    for sweep in range(MIXED_SWEEPS + 1):
        w = _rows_at(k, a, total, rows_full, y, v, r, scale, ktu, w)
        done, moved = _is_done(k, c, b, spread, cols_full, settings, v, scale, ktu)
        if done or sweep == MIXED_SWEEPS:
            return sweep, done, w
        for j in range(m):
            residual[j] = _target(b, ktu, j, cols_full) - y[j]
        if sweep > 0:
            for j in range(m):
                changes_y[slot, j] = y[j] - last_y[j]
                changes_f[slot, j] = residual[j] - last_residual[j]
            known = max(known, slot + 1)
            for h in range(known):
                product = 0.0
                for j in range(m):
                    product += changes_f[h, j] * changes_f[slot, j]
                products[h, slot] = product
                products[slot, h] = product
            slot = (slot + 1) % MEMORY
        if moved > 2 * best:  # the mixing diverged: drop its history, and sweep without it
            known, slot = 0, 0
        best = min(best, moved)
        last_y[:] = y
        last_residual[:] = residual
        _mixing(products, changes_f, residual, known, system, weights)
        for j in range(m):
            y[j] += residual[j]
        for h in range(known):
            for j in range(m):
                y[j] -= weights[h] * (changes_y[h, j] + changes_f[h, j])
        for j in range(m):
            y[j] = y[j] if cols_full or y[j] < 0 else 0.0
    return MIXED_SWEEPS, False, w


@_compiled
def _mixing(products, changes_f, residual, known, system, weights):
    """Sets the weights of the last changes whose combination comes nearest to the residual."""
    largest = 0.0
    for g in range(known):
        weights[g] = 0.0
        largest = max(largest, products[g, g])
        for j in range(len(residual)):
            weights[g] += changes_f[g, j] * residual[j]
    for g in range(known):
        for h in range(known):
            system[g, h] = products[g, h]
        system[g, g] += 1e-10 * largest + 1e-300
    _cholesky_solve(system, weights, known)


@_compiled
def _cholesky_solve(system, target, size):
    """Solves in place for a positive definite system (lower triangle); False where it is not."""
    for g in range(size):
        for h in range(g + 1):
            value = system[g, h]
            for q in range(h):
                value -= system[g, q] * system[h, q]
            if g > h:
                system[g, h] = value / system[h, h]
            elif value <= 0:
                return False
            else:
                system[g, g] = np.sqrt(value)
    for g in range(size):
        value = target[g]
        for q in range(g):
            value -= system[g, q] * target[q]
        target[g] = value / system[g, g]
    for g in range(size - 1, -1, -1):
        value = target[g]
        for q in range(g + 1, size):
            value -= system[q, g] * target[q]
        target[g] = value / system[g, g]
    return True


@_compiled
def _newton(k, c, a, b, total, spread, full, settings, limit, y, v, r, scale, ktu, w):
    """Newton steps from and into y; (steps, done, w). Expects v, r, scale, ktu and w to belong to y."""
    m = k.shape[1]
    rows_full, cols_full = full
    penalised = total < 0
    direction, point = np.zeros(m), np.zeros(m)
    for step in range(limit + 1):
        if step > 0:
            w = _rows_at(k, a, total, rows_full, y, v, r, scale, ktu, w)
        done, _ = _is_done(k, c, b, spread, cols_full, settings, v, scale, ktu)
        if done or step == limit:
            return step, done, w
        first, noise = _direction(k, a, b, penalised, full, settings, y, v, r, scale, ktu, w, direction)
        low, high, low_slope, high_slope, chosen, length = 0.0, np.inf, first, -first, 0.0, 1.0
        for trial in range(LINE_SEARCH_TRIALS):
            if first <= 0:
                break
            for j in range(m):
                free = y[j] + length * direction[j]
                point[j] = free if cols_full or free < 0 else 0.0
            w = _rows_at(k, a, total, rows_full, point, v, r, scale, ktu, w)
            slope = 0.0
            for j in range(m):
                part = (b[j] - np.float64(v[j]) * ktu[j]) * direction[j]
                if cols_full or y[j] + length * direction[j] <= 0 or part < 0:
                    slope += part
            if slope > 0 or abs(slope) <= FLAT * first + noise:
                chosen = length
            if abs(slope) <= FLAT * first + noise or (slope > 0 and length >= 1):
                break
            if slope > 0:
                low, low_slope = length, slope
            else:
                high, high_slope = length, slope
            if trial % 2 == 0:
                length = low + (high - low) * low_slope / (low_slope - high_slope)
            else:
                length = np.sqrt(max(low, high * 1e-4) * high)
        for j in range(m):
            free = y[j] + chosen * direction[j]
            y[j] = free if cols_full or free < 0 else 0.0
        w = _rows_at(k, a, total, rows_full, y, v, r, scale, ktu, w)
        top = -np.inf
        for j in range(m):
            if b[j] > 0:
                y[j] = _target(b, ktu, j, cols_full)
                top = max(top, y[j])
        if cols_full or not penalised:
            for j in range(m):
                y[j] -= top if b[j] > 0 else 0.0
    return limit, False, w


@_compiled
def _direction(k, a, b, penalised, full, settings, y, v, r, scale, ktu, w, direction):
    """Newton's direction for the columns that their bound does not hold; (slope, its rounding)."""
    rounding, ridge, uniform_ridge = settings[2], settings[3], settings[4]
    n, m = k.shape
    rows_full, cols_full = full
    zero = v[0] * 0
    links = np.zeros((m, m), dtype=k.dtype)
    flow = np.zeros(m, dtype=k.dtype)
    opened = np.zeros(m)
    mass, col_sum, open_mass = 0.0, 0.0, 0.0
    for i in range(n):
        if a[i] == 0:
            continue
        for j in range(m):
            flow[j] = scale[i] * k[i, j] * v[j]
        if rows_full or a[i] <= w * r[i]:
            mass += a[i]
            inverse = zero
            inverse += 1 / a[i]
            for j in range(m):
                factor = flow[j] * inverse
                for q in range(j):
                    links[j, q] += factor * flow[q]
        else:
            mass += np.float64(scale[i]) * r[i]
            for j in range(m):
                opened[j] += flow[j]
    free = np.zeros(m, dtype=np.int64)
    count, anchored = 0, False
    for j in range(m):
        col_sum += np.float64(v[j]) * ktu[j]
        open_mass += opened[j]
    cols = np.zeros(m)
    for j in range(m):
        direction[j] = 0.0
        cols[j] = max(np.float64(v[j]) * ktu[j] * (mass / col_sum), 1e-300)
        if b[j] > 0 and (cols_full or y[j] < 0 or b[j] < cols[j]):
            free[count] = j
            count += 1
        elif b[j] > 0:
            anchored = True
    system, target = np.zeros((count, count)), np.zeros(count)
    diagonal = np.zeros(m)
    inverse_open = 0.0 if penalised or open_mass <= 0 else 1 / open_mass
    for j in range(m):
        diagonal[j] += opened[j] if penalised else opened[j] * (open_mass - opened[j]) * inverse_open
        for q in range(j):
            diagonal[j] += links[j, q]
            diagonal[q] += links[j, q]
    free_sum = 0.0
    for g in range(count):
        free_sum += cols[free[g]]
    strength = 0.0
    if cols_full or not anchored:
        strength = (uniform_ridge if penalised else 1.0) / max(free_sum, 1e-300)
    for g in range(count):
        j = free[g]
        root = np.sqrt(cols[j])
        for h in range(g):
            q = free[h]
            other = np.sqrt(cols[q])
            link = links[max(j, q), min(j, q)] + opened[j] * opened[q] * inverse_open
            system[g, h] = -link / (root * other) + strength * root * other
        system[g, g] = diagonal[j] / cols[j] + ridge + strength * cols[j]
        target[g] = (b[j] - cols[j]) / root
    solved = _cholesky_solve(system, target, count)
    slope, noise = 0.0, 0.0
    for g in range(count):
        j = free[g]
        step = target[g] / np.sqrt(cols[j]) if solved else (b[j] - cols[j]) / cols[j]
        direction[j] = min(max(step, -LONGEST_STEP), LONGEST_STEP)
        slope += (b[j] - cols[j]) * direction[j]
        noise += cols[j] * abs(direction[j]) * rounding
    return slope, noise
