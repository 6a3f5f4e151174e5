"""The solver as a fused Triton kernel for CUDA: one program per problem, the whole iteration in one launch.

Ascent sweeps with Anderson's mixing of the last two changes, to the stopping rule of `newton.py`. The first launch
exponentiates in float32 and solves nearly everything in some ten sweeps; what it leaves, because the cost ranges too
far for exponentials or the dual is flat, a second launch solves with logarithms in float64, going down to the
temperature in halves. Programs with nothing left to do end at once, without a synchronisation with the host. The cost
is read tile by tile, from the cache after the first sweep. Optional: needs triton, which comes with torch for CUDA.
"""

# mypy: allow-untyped-defs
import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kernel_launch import launch
from .newton import CHEAPEST, ROUNDING

__all__ = ["in_halves", "launch_settings", "log_or_zero", "solve_fused"]

SWEEPS, MORE_SWEEPS = 300, 2_000
# Sweeps without progress until the mixing starts anew, and how often that happens until it mixes one change instead of
# two. Two take fewer sweeps, one alone does not go in circles (tests/test_transport_triton.py has a problem).
PATIENCE, FAILURES = tl.constexpr(6), tl.constexpr(3)
FORGIVING = tl.constexpr(64)  # the first sweep, and its doubles, at which the failures are forgotten
FILL_ITERATIONS = 100
TILE_NUMBERS = {False: 4096, True: 2048}  # of the matrix in registers at a time, in float32 and float64
LARGEST_RANGE = 42.0  # of (max C - min C) / reg in float32 exponentials


def launch_settings(n_rows: int, n_cols: int, wide: bool) -> dict[str, int]:
    """Compile-time settings for problems of a size."""
    block_rows, block_cols = triton.next_power_of_2(n_rows), triton.next_power_of_2(n_cols)
    return {
        "BLOCK_ROWS": block_rows,
        "BLOCK_COLS": block_cols,
        "TILE": max(1, min(block_rows, TILE_NUMBERS[wide] // block_cols)),
        "num_warps": 4 if n_rows * n_cols <= 8192 else 8,
    }


def solve_fused(
    cost: Tensor, rows: Tensor, cols: Tensor, total: Tensor, reg: float, penalty: float | None, *, tol: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Solves every problem until one more half sweep would move less than `tol` of its mass.

    Args:
        cost: (P, N, M) float32, contiguous; anything where a weight is 0. Columns should be the shorter side.
        rows: (P, N) float64 weights.
        cols: (P, M) float64 weights.
        total: (P,) float64, the mass to move; ignored with a penalty.
        reg: the temperature.
        penalty: as in `Problem`.
        tol: the relative mass at which a problem is done.

    Returns:
        log_left (P, N), log_right (P, M), the lowest and highest real cost (P, 2), all float64; sweeps (P,); done
        (P,), int32: 1 = done, 0 = out of sweeps, -1 = a real cost is not finite. A problem with nothing real is done.
    """
    count, n_rows, n_cols = cost.shape
    left, scratch = cost.new_empty(2, count, n_rows, dtype=torch.float64).unbind()
    right = cost.new_empty(count, n_cols, dtype=torch.float64)
    bounds = cost.new_empty(count, 2, dtype=torch.float64)
    n_iter, done = torch.zeros(2, count, dtype=torch.int32, device=cost.device).unbind()
    floor = ROUNDING[torch.float32] * (1 + n_rows / 128)
    for wide, limit in ((False, SWEEPS), (True, MORE_SWEEPS)):
        launch(
            sweeps, (count,), cost, rows, cols, total, scratch, left, right, bounds, n_iter, done, n_rows, n_cols,
            *in_halves(1 / reg), *in_halves(penalty or 0.0), tol, floor, limit, FILLS=FILL_ITERATIONS,
            LOWEST_PRICE=CHEAPEST, LARGEST=LARGEST_RANGE, PENALISED=penalty is not None, WIDE=wide,
            **launch_settings(n_rows, n_cols, wide),
        )  # fmt: skip
    return left, right, bounds, n_iter, done


def in_halves(number: float) -> tuple[float, float]:
    """A float64 as two float32, which is how Triton passes numbers."""
    first = float(np.float32(number))
    return first, number - first


@triton.jit
def exponents(cost, rows, line, col, b, low, inverse, n, m, WIDE: tl.constexpr):
    """(low - C) / reg of some rows, -inf on padding."""
    inside = (line[:, None] < n) & (col[None, :] < m)
    valid = (tl.load(rows + line, line < n, 0.0) > 0)[:, None] & (b > 0)[None, :]
    c = tl.load(cost + line[:, None] * m + col[None, :], inside, 0.0)
    if WIDE:
        exponent = (low - c.to(tl.float64)) * inverse
    else:
        exponent = (low - c.to(tl.float64)).to(tl.float32) * inverse.to(tl.float32)
    return tl.where(valid, exponent, -float("inf"))


@triton.jit
def log_or_zero(x):
    """The logarithm where there is one."""
    return tl.log(tl.where(x > 0, x, 1.0))


@triton.jit
def sweeps(
    cost, rows, cols, totals, scratch, left, right, bounds, n_iter, converged, n, m, inverse_first, inverse_rest,
    penalty_first, penalty_rest, tol, floor, limit,
    FILLS: tl.constexpr, LOWEST_PRICE: tl.constexpr, LARGEST: tl.constexpr, PENALISED: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """All sweeps of one problem. Vectors are float64, the matrix is float32 or, if WIDE, float64 logarithms."""
    problem = tl.program_id(0).to(tl.int64)
    row, col, tile = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_COLS), tl.arange(0, TILE)
    cost += problem * n * m
    rows += problem * n
    scratch += problem * n
    left += problem * n
    a = tl.load(rows + row, row < n, 0.0)
    b = tl.load(cols + problem * m + col, col < m, 0.0)
    row_sum, col_sum = tl.sum(a, 0), tl.sum(b, 0)
    inverse_reg = row_sum * 0 + inverse_first + inverse_rest
    penalty = row_sum * 0 + penalty_first + penalty_rest
    total = tl.load(totals + problem)
    tight = 1 - 1e-6
    rows_tight = (total >= row_sum * tight) & (not PENALISED)
    cols_tight = (total >= col_sum * tight) & (not PENALISED)
    log_a, log_b = log_or_zero(a), log_or_zero(b)

    # The range of the real costs, and whether all are numbers.
    low = tl.full([], float("inf"), tl.float64)
    high = tl.full([], -float("inf"), tl.float64)
    wrong = tl.full([], 0, tl.int32)
    for start in tl.range(0, n, TILE):
        line = start + tile
        inside = (line[:, None] < n) & (col[None, :] < m)
        valid = (tl.load(rows + line, line < n, 0.0) > 0)[:, None] & (b > 0)[None, :]
        c = tl.load(cost + line[:, None] * m + col[None, :], inside, 0.0).to(tl.float64)
        finite = tl.abs(c) <= 1e300
        wrong += tl.sum(tl.sum((valid & (finite == 0)).to(tl.int32), 1), 0)
        low = tl.minimum(low, tl.min(tl.min(tl.where(valid & finite, c, float("inf")), 1), 0))
        high = tl.maximum(high, tl.max(tl.max(tl.where(valid & finite, c, -float("inf")), 1), 0))
    exists = high >= low
    low, high = tl.where(exists, low, 0.0), tl.where(exists, high, 0.0)
    spread = high - low
    span = spread * inverse_reg
    if PENALISED:
        span = (tl.maximum(high, penalty) - tl.minimum(low, penalty)) * inverse_reg
    # Under a penalty K carries the reference r = a b' / max(Σa, Σb) and the reward, at the true level of the cost.
    row_shift, col_shift = log_a * 0, log_b * 0
    if PENALISED:
        row_shift = log_a - log_or_zero(tl.maximum(row_sum, col_sum))
        col_shift = log_b + (penalty - low) * inverse_reg

    skip = (tl.load(converged + problem) != 0) if WIDE else (span > LARGEST)
    done = tl.where(exists, 0, 1).to(tl.int32)
    done = tl.where(wrong > 0, -1, done)
    done = tl.where(skip, 2, done)
    # Logarithms go down to the temperature in halves, so that no potential has far to go.
    stretch = tl.full([], 1.0, tl.float64)
    if WIDE:
        while stretch * LARGEST < span:
            stretch = stretch * 2
    y = tl.zeros([BLOCK_COLS], tl.float64)
    # One array per name: names that start as the same value are taken for one by Triton, and not carried by the loop.
    y1, y2 = tl.zeros([BLOCK_COLS], tl.float64), tl.zeros([BLOCK_COLS], tl.float64)
    f1, f2 = tl.zeros([BLOCK_COLS], tl.float64), tl.zeros([BLOCK_COLS], tl.float64)
    log_ktu = tl.zeros([BLOCK_COLS], tl.float64)
    known = tl.full([], 0, tl.int32)
    best = tl.full([], float("inf"), tl.float64)
    waited = tl.full([], 0, tl.int32)  # sweeps since the best one
    failures = tl.full([], 0, tl.int32)  # of the mixing
    sweep = tl.full([], 0, tl.int32)
    while (done == 0) & (sweep <= limit):
        inverse = inverse_reg / stretch
        column_shift = col_shift
        if PENALISED:
            column_shift = log_b + (penalty - low) * inverse
        # log r = log K v
        v = y + column_shift
        for start in tl.range(0, n, TILE):
            line = start + tile
            e = exponents(cost, rows, line, col, b, low, inverse, n, m, WIDE)
            if WIDE:
                e += v[None, :]
                top = tl.max(e, 1)
                top = tl.where(top == -float("inf"), 0.0, top)
                summed = top + tl.log(tl.sum(tl.exp(e - top[:, None]), 1))
            else:
                summed = tl.log(tl.sum(tl.exp(e) * tl.exp(v.to(tl.float32))[None, :], 1).to(tl.float64))
            tl.store(scratch + line, summed, line < n)
        tl.debug_barrier()
        log_r = tl.load(scratch + row, row < n, 0.0) + row_shift
        log_u_full = tl.where(a > 0, log_a - log_r, float("inf"))
        # The w that fills the rows to the mass: Newton's method from the left.
        log_w = tl.full([], 0.0, tl.float64)
        if not PENALISED:
            lowest = tl.min(log_u_full, 0)
            log_w = lowest + tl.log(total / tl.sum(tl.where(a > 0, a * tl.exp(lowest - log_u_full), 0.0), 0))
            fill = tl.full([], 0, tl.int32)
            climbing = tl.full([], 1, tl.int32)
            while (climbing > 0) & (fill < FILLS):
                gap = log_w - log_u_full
                held = tl.sum(tl.where(gap >= 0, a, 0.0), 0)
                below = tl.where((gap >= 0) | (a == 0), -float("inf"), gap)
                nearest = tl.max(below, 0)
                nearest = tl.where(nearest == -float("inf"), 0.0, nearest)
                flow = tl.sum(a * tl.exp(below - nearest), 0)
                rest = total - held
                movable = (flow > 0) & (rest > 0)
                ratio = tl.where(movable, rest / tl.where(movable, flow, 1.0), 1.0)
                step = tl.where(movable, tl.log(ratio) - nearest, 0.0)
                climbing = (step > 1e-12).to(tl.int32)
                log_w = log_w + tl.maximum(step, 0.0)
                fill += 1
        log_scale = tl.where(rows_tight, log_u_full, tl.minimum(log_u_full, log_w))
        log_scale = tl.where(a > 0, log_scale + row_shift, -float("inf"))
        tl.store(left + row, log_scale, row < n)
        tl.debug_barrier()
        # log_ktu = log K' w u
        highest = tl.full([BLOCK_COLS], -float("inf"), tl.float64)
        ktu = tl.zeros([BLOCK_COLS], tl.float64)
        for start in tl.range(0, n, TILE):
            line = start + tile
            e = exponents(cost, rows, line, col, b, low, inverse, n, m, WIDE)
            scale = tl.load(left + line, line < n, -float("inf"))
            if WIDE:
                e += scale[:, None]
                higher = tl.maximum(highest, tl.max(e, 0))
                base = tl.where(higher == -float("inf"), 0.0, higher)
                ktu = ktu * tl.exp(highest - base) + tl.sum(tl.exp(e - base[None, :]), 0)
                highest = higher
            else:
                ktu += tl.sum(tl.exp(e) * tl.exp(scale.to(tl.float32))[:, None], 0).to(tl.float64)
        log_ktu = log_or_zero(ktu) + column_shift
        if WIDE:
            log_ktu += tl.where(highest == -float("inf"), 0.0, highest)
        mass_of_col = tl.where(b > 0, tl.exp(y + log_ktu), 0.0)
        mass = tl.maximum(tl.sum(mass_of_col, 0), 1e-300)
        target = tl.where(b > 0, log_b - log_ktu, 0.0)
        target = tl.where(cols_tight, target, tl.minimum(target, 0.0))
        moved = tl.sum(tl.abs(tl.where(b > 0, tl.exp(target + log_ktu), 0.0) - mass_of_col), 0) / mass
        enough = tl.where(stretch > 1, 1e-2, tl.maximum(tol, floor))
        settled = moved <= enough
        if settled & (stretch == 1):
            value = tl.zeros([BLOCK_COLS], tl.float64)
            for start in tl.range(0, n, TILE):
                line = start + tile
                inside = (line[:, None] < n) & (col[None, :] < m)
                e = exponents(cost, rows, line, col, b, low, inverse, n, m, WIDE)
                c = tl.load(cost + line[:, None] * m + col[None, :], inside, 0.0)
                scale = tl.load(left + line, line < n, -float("inf"))
                part = tl.exp(e.to(tl.float64) + scale[:, None] + v[None, :])
                value += tl.sum(tl.where(part > 0, part * c, 0.0), 0)
            mean = tl.abs(tl.sum(value, 0)) / mass
            price = tl.where(spread > 0, mean / tl.where(spread > 0, spread, 1.0), 1.0)
            price = tl.minimum(tl.maximum(price, LOWEST_PRICE), 1.0)
            done = (moved <= tl.maximum(tol * price, floor)).to(tl.int32)
        if (done == 0) & (sweep < limit):
            f = target - y
            waited = tl.where(moved < best, 0, waited + 1)
            if (moved > 2 * best) | (waited >= PATIENCE):  # the mixing diverged, or goes in circles: drop its history
                known = known * 0
                waited = waited * 0
                failures += 1
            # Again two changes, ever more rarely: one alone can be too slow where the dual is flat.
            failures = tl.where((sweep >= FORGIVING) & ((sweep & (sweep - 1)) == 0), 0, failures)
            best = tl.minimum(best, moved)
            # The least-squares combination of the last one or two changes, columns weighted by their mass.
            d1, d2 = f - f1, f1 - f2
            s11, s22 = tl.sum(d1 * d1 * mass_of_col, 0), tl.sum(d2 * d2 * mass_of_col, 0)
            s12 = tl.sum(d1 * d2 * mass_of_col, 0)
            t1, t2 = tl.sum(d1 * f * mass_of_col, 0), tl.sum(d2 * f * mass_of_col, 0)
            determinant = s11 * s22 - s12 * s12
            two = (known >= 2) & (failures < FAILURES) & (determinant > 1e-5 * s11 * s22)
            one = (known >= 1) & (s11 > 0)
            safe = tl.where(two, determinant, 1.0)
            g1 = tl.where(two, (t1 * s22 - t2 * s12) / safe, tl.where(one, t1 / tl.where(one, s11, 1.0), 0.0))
            g2 = tl.where(two, (t2 * s11 - t1 * s12) / safe, 0.0)
            new = target - g1 * (y + f - y1 - f1) - g2 * (y1 + f1 - y2 - f2)
            y2, f2 = y1, f1
            y1, f1 = y, f
            # With all columns full only differences of y count: keep the largest at 0, and exp(y) in range.
            top_y = tl.max(tl.where(b > 0, new, -float("inf")), 0)
            y = tl.where(b > 0, tl.where(cols_tight, new - top_y, tl.minimum(new, 0.0)), 0.0)
            known += 1
            if settled & (stretch > 1):  # half the temperature: the same potentials are twice as many of it
                stretch = stretch / 2
                y = y * 2
                known = known * 0
                best = tl.full([], float("inf"), tl.float64)
                waited = waited * 0
        sweep += 1
    if skip.to(tl.int32) == 0:
        # What K carries under a penalty is not part of the scalings.
        tl.store(left + row, tl.load(left + row, row < n, 0.0) - row_shift, row < n)
        tl.debug_barrier()
        cap = tl.where(b > 0, log_b - log_ktu, 0.0)  # overfull columns are cut down
        log_right = tl.where(b > 0, tl.minimum(y, cap), -float("inf"))
        tl.store(right + problem * m + col, tl.where(exists, log_right, -float("inf")), col < m)
        if exists == 0:
            tl.store(left + row, tl.full([BLOCK_ROWS], -float("inf"), tl.float64), row < n)
        tl.store(bounds + problem * 2, low)
        tl.store(bounds + problem * 2 + 1, high)
        tl.store(n_iter + problem, tl.load(n_iter + problem) + tl.maximum(sweep - 1, 0))
        tl.store(converged + problem, done)
