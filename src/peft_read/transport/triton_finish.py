"""What is made of the fused solver's scalings, as one more Triton kernel: plan, cost and certificate in one launch.

In torch these are some hundred operations, which keep the host longer than the device. Optional: needs triton.
"""

# mypy: allow-untyped-defs
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kernel_launch import launch
from .certificate import GAP, LARGEST_EXCESS, LARGEST_MISSING, Certificate, Finished
from .newton import CHEAPEST, ROUNDING
from .triton_kernels import in_halves, log_or_zero

__all__ = ["finish_fused", "finish_settings"]

TILE_NUMBERS = 2048  # of the plan in registers at a time


def finish_settings(n_rows: int, n_cols: int) -> dict[str, int]:
    """Compile-time settings for problems of a size."""
    block_cols = triton.next_power_of_2(n_cols)
    return {
        "BLOCK_ROWS": triton.next_power_of_2(n_rows),
        "BLOCK_COLS": block_cols,
        "TILE": max(1, TILE_NUMBERS // block_cols),
        "num_warps": 4,
    }


def finish_fused(
    cost: Tensor, rows: Tensor, cols: Tensor, total: Tensor, left: Tensor, right: Tensor, bounds: Tensor, done: Tensor,
    reg: float, penalty: float | None, *, tol: float,
) -> Finished:  # fmt: skip
    """The plans of scalings, their costs, and whether they keep their promises (`certificate.py`), in one launch.

    Args:
        cost: (P, N, M) float32, contiguous.
        rows: (P, N) float64 weights.
        cols: (P, M) float64 weights.
        total: (P,) float64, the mass to move; ignored with a penalty.
        left: (P, N) log scalings, as `solve_fused` gives them.
        right: (P, M), likewise.
        bounds: (P, 2), the lowest and highest cost.
        done: (P,), the state of the solver.
        reg: the temperature.
        penalty: as in `Problem`.
        tol: the relative accuracy that was asked for.
    """
    count, n_rows, n_cols = cost.shape
    plan, (value, mass, excess) = torch.empty_like(cost), cost.new_empty(3, count).unbind()
    converged = torch.empty(count, dtype=torch.bool, device=cost.device)
    noise = ROUNDING[torch.float32] * (1 + (n_rows + n_cols) / 128)
    launch(
        finish, (count,), cost, rows, cols, total, left, right, bounds, done, plan, value, mass, excess, converged,
        n_rows, n_cols, *in_halves(reg), *in_halves(penalty or 0.0), tol, noise, GAP=GAP, LOWEST_PRICE=CHEAPEST,
        EXCESS=LARGEST_EXCESS, MISSING=LARGEST_MISSING, PENALISED=penalty is not None,
        **finish_settings(n_rows, n_cols),
    )  # fmt: skip
    return Finished(plan, value, Certificate(converged, mass, excess))


@triton.jit
def finish(
    cost, rows, cols, totals, left, right, bounds, done, plan, value, mass, excess, converged, n, m, reg_first,
    reg_rest, penalty_first, penalty_rest, tol, noise,
    GAP: tl.constexpr, LOWEST_PRICE: tl.constexpr, EXCESS: tl.constexpr, MISSING: tl.constexpr,
    PENALISED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Plan, cost and certificate of one problem, in float64; the formulas are those of `certificate.py`."""
    problem = tl.program_id(0).to(tl.int64)
    row, col, tile = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_COLS), tl.arange(0, TILE)
    cost += problem * n * m
    plan += problem * n * m
    rows += problem * n
    left += problem * n
    a = tl.load(rows + row, row < n, 0.0)
    b = tl.load(cols + problem * m + col, col < m, 0.0)
    f = tl.load(left + row, row < n, -float("inf"))
    g = tl.load(right + problem * m + col, col < m, -float("inf"))
    reg, penalty = tl.sum(a, 0) * 0 + reg_first + reg_rest, tl.sum(a, 0) * 0 + penalty_first + penalty_rest
    low, high = tl.load(bounds + problem * 2), tl.load(bounds + problem * 2 + 1)
    state = tl.load(done + problem)
    highest_f = tl.max(tl.where(a > 0, f, -float("inf")), 0)
    highest_g = tl.max(tl.where(b > 0, g, -float("inf")), 0)
    shift_f, shift_g = highest_f, highest_g
    row_level, col_level = tl.full([], 0.0, tl.float64), b * 0
    if PENALISED:
        shift_f, shift_g = tl.full([], 0.0, tl.float64), tl.full([], 0.0, tl.float64)
        row_level = -log_or_zero(tl.maximum(tl.sum(a, 0), tl.sum(b, 0)))
        col_level = log_or_zero(b) + (penalty - low) / reg
    total = tl.full([], 0.0, tl.float64)  # mass, cost, the largest excess of a row, and Σ f (T 1 - a)
    price = tl.full([], 0.0, tl.float64)
    worst = tl.full([], 0.0, tl.float64)
    gap = tl.full([], 0.0, tl.float64)
    col_sums = tl.zeros([BLOCK_COLS], tl.float64)
    for start in tl.range(0, n, TILE):
        line = start + tile
        here = line < n
        inside = here[:, None] & (col[None, :] < m)
        weight = tl.load(rows + line, here, 0.0)
        scale = tl.load(left + line, here, -float("inf"))
        level = scale + row_level
        if PENALISED:
            level += log_or_zero(weight)
        c = tl.load(cost + line[:, None] * m + col[None, :], inside, 0.0).to(tl.float64)
        exponent = (low - c) / reg + level[:, None] + (g + col_level)[None, :]
        part = tl.exp(tl.where((weight > 0)[:, None] & (b > 0)[None, :], exponent, -float("inf"))).to(tl.float32)
        tl.store(plan + line[:, None] * m + col[None, :], tl.where(state < 0, float("nan"), part), inside)
        part = part.to(tl.float64)
        row_sums = tl.sum(part, 1)
        over = row_sums - weight
        total += tl.sum(row_sums, 0)
        price += tl.sum(tl.sum(tl.where(part > 0, part * c, 0.0), 1), 0)
        worst = tl.maximum(worst, tl.max(over, 0))
        gap += tl.sum(tl.where(weight > 0, (scale - shift_f) * over, 0.0), 0)
        col_sums += tl.sum(part, 0)
    over_cols = col_sums - b
    worst = tl.maximum(worst, tl.max(over_cols, 0))
    gap = (gap + tl.sum(tl.where(b > 0, (g - shift_g) * over_cols, 0.0), 0)) * reg
    asked = tl.load(totals + problem)
    kept = total >= 0
    if not PENALISED:
        gap += (reg * (highest_f + highest_g) + low) * (total - asked)
        kept = tl.abs(total - asked) <= MISSING * asked
    spread = (high - low) * total
    allowed = GAP * (tol * tl.maximum(tl.abs(price), LOWEST_PRICE * spread) + noise * (spread + reg * total))
    largest = EXCESS * tl.maximum(tl.maximum(tl.max(a, 0), tl.max(b, 0)), 1.0)
    fine = kept & (worst <= largest) & ((tl.abs(gap) <= allowed) | (gap != gap))
    nothing = (tl.max(a, 0) <= 0) | (tl.max(b, 0) <= 0)
    wrong = tl.where(state < 0, float("nan"), 0.0)
    tl.store(value + problem, price + wrong)
    tl.store(mass + problem, total + wrong)
    tl.store(excess + problem, worst + wrong)
    tl.store(converged + problem, ((state > 0) & (fine | nothing)).to(tl.uint8))
