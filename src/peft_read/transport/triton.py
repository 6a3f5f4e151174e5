"""The solver as one fused Triton kernel for CUDA: a program a problem, the whole iteration in one launch.

Ascent sweeps with Anderson's mixing of the last two changes, to the stopping rule of `newton.py`, with no word to the
host until all problems are done. The kernel matrix is read tile by tile, from the cache after the first sweep. What
is not done after `SWEEPS` gets Newton steps in torch. Optional: needs triton, which comes with torch for CUDA.
"""

# mypy: allow-untyped-defs
import torch
import triton
import triton.language as tl

from .newton import CHEAPEST, ROUNDING, solve_newton
from .problem import Kernel, Problem, Scaling

__all__ = ["solve_fused"]

SWEEPS = 200
FILL_ITERATIONS = 40
TILE_SIZE = 4096  # numbers of the matrix in registers at a time


def solve_fused(problem: Problem, kernel: Kernel, *, tol: float, max_iter: int) -> Scaling:
    """Solves every problem until one more half sweep would move less than `tol` of its mass.

    Args:
        problem: P problems, no side longer than `fast.LARGEST_FUSED_SIDE`.
        kernel: their float32 kernel in the exponential domain.
        tol: the relative mass at which a problem is done.
        max_iter: Newton steps at most, for the problems that the sweeps do not solve.
    """
    count, n_rows, n_cols = problem.cost.shape
    device = problem.cost.device
    left, scratch = torch.empty(2, count, n_rows, device=device)
    right = torch.empty(count, n_cols, device=device)
    n_iter, done = torch.empty(2, count, dtype=torch.int32, device=device)
    block_cols = triton.next_power_of_2(n_cols)
    _sweeps[(count,)](
        kernel.by_rows,
        problem.cost.detach().contiguous(),
        problem.rows.float().contiguous(),
        problem.cols.float().contiguous(),
        problem.total.float(),
        (problem.high - problem.low).float(),
        problem.rows_full.int(),
        problem.cols_full.int(),
        scratch,
        left,
        right,
        n_iter,
        done,
        n_rows,
        n_cols,
        tol,
        ROUNDING[torch.float32] * (1 + n_rows / 128),
        SWEEPS,
        FILLS=FILL_ITERATIONS,
        LOWEST_PRICE=CHEAPEST,
        PENALISED=problem.penalty is not None,
        BLOCK_ROWS=triton.next_power_of_2(n_rows),
        BLOCK_COLS=block_cols,
        TILE=max(1, min(triton.next_power_of_2(n_rows), TILE_SIZE // block_cols)),
        num_warps=4 if n_rows * n_cols <= 8192 else 8,
    )
    found = Scaling(left.double().log(), right.double(), n_iter.long(), done > 0)
    if bool(found.converged.all()):
        return found
    rest = (~found.converged).nonzero()[:, 0]
    again = solve_newton(problem.select(rest), kernel.select(rest), tol=tol, max_iter=max_iter)
    found.log_left[rest], found.log_right[rest] = again.log_left, again.log_right
    found.n_iter[rest], found.converged[rest] = again.n_iter, again.converged
    return found


@triton.jit
def _sweeps(
    matrix, cost, rows, cols, totals, spreads, rows_full, cols_full, scratch, left, right, n_iter, converged,
    n, m, tol, floor, sweeps,
    FILLS: tl.constexpr, LOWEST_PRICE: tl.constexpr, PENALISED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    problem = tl.program_id(0).to(tl.int64)
    row, col, tile = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_COLS), tl.arange(0, TILE)
    matrix += problem * n * m
    cost += problem * n * m
    scratch += problem * n
    left += problem * n
    a = tl.load(rows + problem * n + row, row < n, 0.0)
    b = tl.load(cols + problem * m + col, col < m, 0.0)
    total, spread = tl.load(totals + problem), tl.load(spreads + problem)
    rows_tight, cols_tight = tl.load(rows_full + problem) > 0, tl.load(cols_full + problem) > 0

    y = tl.zeros([BLOCK_COLS], tl.float32)
    y1, y2, f1, f2 = y, y, y, y
    pull = y
    known = 0
    best = float("inf")
    sweep = 0
    done = 0
    while (done == 0) & (sweep <= sweeps):
        # r = K v
        v = tl.exp(y)
        for start in range(0, n, TILE):
            line = start + tile
            k = tl.load(matrix + line[:, None] * m + col[None, :], (line[:, None] < n) & (col[None, :] < m), 0.0)
            tl.store(scratch + line, tl.sum(k * v[None, :], 1), line < n)
        tl.debug_barrier()
        r = tl.load(scratch + row, row < n, 0.0)
        # The w that fills the rows to the mass: Newton's method from the left.
        w = total * 0 + 1.0
        if not PENALISED:
            w = total / tl.sum(r, 0)
            fill = 0
            climbing = 1
            while (climbing > 0) & (fill < FILLS):
                is_full = w * r >= a
                held = tl.sum(tl.where(is_full, a, 0.0), 0)
                flow = tl.sum(tl.where(is_full, 0.0, r), 0)
                better = tl.where(flow > 0, (total - held) / tl.where(flow > 0, flow, 1.0), w)
                climbing = (better > w * (1 + 1e-6)).to(tl.int32)
                w = tl.maximum(w, better)
                fill += 1
        is_full = rows_tight | (a < w * r)
        scale = tl.where(a > 0, tl.where(is_full, a / tl.where(r > 0, r, 1.0), w), 0.0)
        tl.store(left + row, scale, row < n)
        tl.debug_barrier()
        # pull = K' w u
        pull = tl.zeros([BLOCK_COLS], tl.float32)
        for start in range(0, n, TILE):
            line = start + tile
            k = tl.load(matrix + line[:, None] * m + col[None, :], (line[:, None] < n) & (col[None, :] < m), 0.0)
            pull += tl.sum(k * tl.load(left + line, line < n, 0.0)[:, None], 0)
        mass_of_col = v * pull
        mass = tl.maximum(tl.sum(mass_of_col, 0), 1e-37)
        allowed = tl.where(cols_tight, b, tl.minimum(b, pull))
        moved = tl.sum(tl.abs(allowed - mass_of_col), 0) / mass
        if moved <= tl.maximum(tol, floor):
            value = tl.zeros([BLOCK_COLS], tl.float32)
            for start in range(0, n, TILE):
                line = start + tile
                inside = (line[:, None] < n) & (col[None, :] < m)
                k = tl.load(matrix + line[:, None] * m + col[None, :], inside, 0.0)
                c = tl.load(cost + line[:, None] * m + col[None, :], inside, 0.0)
                value += tl.sum(k * c * tl.load(left + line, line < n, 0.0)[:, None], 0)
            mean = tl.abs(tl.sum(value * v, 0)) / mass
            price = tl.where(spread > 0, mean / tl.where(spread > 0, spread, 1.0), 1.0)
            price = tl.minimum(tl.maximum(price, LOWEST_PRICE), 1.0)
            done = (moved <= tl.maximum(tol * price, floor)).to(tl.int32)
        if (done == 0) & (sweep < sweeps):
            real = b > 0
            target = tl.where(real, tl.log(tl.where(real, b / tl.where(real, pull, 1.0), 1.0)), 0.0)
            target = tl.where(cols_tight, target, tl.minimum(target, 0.0))
            f = target - y
            if moved > 2 * best:  # the mixing went astray: forget, and sweep plainly
                known = 0
            best = tl.minimum(best, moved)
            # The least-squares combination of the last one or two changes, columns weighted by their mass.
            d1, d2 = f - f1, f1 - f2
            s11, s22 = tl.sum(d1 * d1 * mass_of_col, 0), tl.sum(d2 * d2 * mass_of_col, 0)
            s12 = tl.sum(d1 * d2 * mass_of_col, 0)
            t1, t2 = tl.sum(d1 * f * mass_of_col, 0), tl.sum(d2 * f * mass_of_col, 0)
            determinant = s11 * s22 - s12 * s12
            two = (known >= 2) & (determinant > 1e-5 * s11 * s22)
            one = (known >= 1) & (s11 > 0)
            safe = tl.where(two, determinant, 1.0)
            g1 = tl.where(two, (t1 * s22 - t2 * s12) / safe, tl.where(one, t1 / tl.where(one, s11, 1.0), 0.0))
            g2 = tl.where(two, (t2 * s11 - t1 * s12) / safe, 0.0)
            new = target - g1 * (y + f - y1 - f1) - g2 * (y1 + f1 - y2 - f2)
            y2, f2 = y1, f1
            y1, f1 = y, f
            # With all columns full only differences of y count: keep the largest at 0, and exp(y) in range.
            top = tl.max(tl.where(real, new, -float("inf")), 0)
            y = tl.where(real, tl.where(cols_tight, new - top, tl.minimum(new, 0.0)), 0.0)
            known += 1
        sweep += 1
    cap = tl.log(tl.where(b > 0, b / tl.where(b > 0, pull, 1.0), 1.0))
    tl.store(right + problem * m + col, tl.where(b > 0, tl.minimum(y, cap), -float("inf")), col < m)
    tl.store(n_iter + problem, sweep - 1)
    tl.store(converged + problem, done)
