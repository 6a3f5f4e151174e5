"""Safeguarded semismooth Newton on the dual of partial transport, all problems of a stack at once.

The dual of the problem in `problem.py`, in the scaled potentials log u <= 0, log v <= 0 and log w, is to maximise

    Σ a_i log u_i + Σ b_j log v_j + s log w - Σ_ij T_ij,   T_ij = w u_i K_ij v_j.

For a given v the best (u, w) is known exactly: w fills the rows until the mass is s, T 1 = min(a, w K v). What is left
is a concave function of y = log v <= 0 on the short side of the matrix, with

    gradient  b - T' 1,
    Hessian   -[ diag(T' 1) - T_S' diag(1 / a_S) T_S - c c' / m ],

S the rows that are full, c and m the column sums and the mass of the other rows. Newton's method on the columns that
are not held by their bound converges in a handful of steps where first-order schemes need thousands. Unguarded it can
cycle between active sets; so every step goes no further than the dual rises, and adds one ascent sweep, which never
lowers it.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .problem import Kernel, Problem, Scaling, finite_log

__all__ = ["fill_rows", "solve_newton"]

WARM_SWEEPS = 3
LONGEST_STEP = 20.0  # of one log potential in one step; where the dual is flat Newton's step knows no limit
LINE_SEARCH_TRIALS = 10
FLAT = 0.5  # a slope of at most this share of the first one counts as the top
ROUNDING = {torch.float32: 1e-6, torch.float64: 1e-14}  # of a column sum, relative
CHEAPEST = 0.01  # mean cost of the plan over the range of the cost, below which the accuracy is relative to the range
# Of a matrix with entries of order 1: where the dual is flatter than this, the gradient is rounding.
RIDGE = {torch.float32: 1e-7, torch.float64: 1e-14}
# A penalty that moves nearly everything leaves the uniform shift of log v nearly without effect.
UNIFORM_RIDGE = {torch.float32: 1e-6, torch.float64: 1e-13}
FILL_ITERATIONS = 100  # the filling ends after as many steps as there are groups of rows; this is never reached


@dataclass(frozen=True)
class _Dual:
    """The constants of the reduced dual function, and its evaluation."""

    problem: Problem
    index: Tensor  # (P,) which of the problems are left; all other fields are of these only
    kernel: Kernel
    rows: Tensor  # (P, N) float64
    cols: Tensor  # (P, M)
    log_rows: Tensor
    log_cols: Tensor
    total: Tensor  # (P, 1)
    rows_full: Tensor  # (P, 1) bool
    cols_full: Tensor  # (P, 1) bool

    @classmethod
    def of(cls, problem: Problem, kernel: Kernel) -> "_Dual":
        return cls(
            problem,
            torch.arange(len(problem.cost), device=problem.cost.device),
            kernel,
            problem.rows,
            problem.cols,
            finite_log(problem.rows),
            finite_log(problem.cols),
            problem.total[:, None],
            problem.rows_full[:, None],
            problem.cols_full[:, None],
        )

    def select(self, chosen: Tensor) -> "_Dual":
        stacked = ("index", "rows", "cols", "log_rows", "log_cols", "total", "rows_full", "cols_full")
        parts: dict[str, Any] = {name: getattr(self, name)[chosen] for name in stacked}
        return replace(self, kernel=self.kernel.select(chosen), **parts)

    @property
    def penalised(self) -> bool:
        return self.problem.penalty is not None

    def rows_at(self, y: Tensor, start: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Fills the rows for log v = y, (P, M).

        Returns:
            log_u_full (P, N), the log scaling at which each row is full; log w (P, 1); log(K' w u) (P, M).
        """
        log_u_full = self.log_rows - self.kernel.log_row_sums(y)
        if self.penalised:
            log_mass = torch.zeros_like(log_u_full[:, :1])
        else:
            log_mass = fill_rows(self.rows, log_u_full, self.total, self.rows_full, start)
        return log_u_full, log_mass, self.kernel.log_col_sums(self.left(log_u_full, log_mass))

    def left(self, log_u_full: Tensor, log_mass: Tensor) -> Tensor:
        """log(w u), the row scaling that keeps every row within its weight."""
        left = torch.where(self.rows_full, log_u_full, torch.minimum(log_u_full, log_mass))
        return torch.where(self.rows > 0, left, -math.inf)

    def ascent(self, log_ktu: Tensor) -> Tensor:
        """The best log v for fixed rows, given log(K' w u): the column half of a sweep."""
        free = torch.where(self.cols > 0, self.log_cols - log_ktu, 0)
        return torch.where(self.cols_full, free, free.clamp_max(0))

    def feasible(self, y: Tensor) -> Tensor:
        """Within the bound y <= 0; one column at it unless all are full, which never lowers the dual."""
        top = y.masked_fill(self.cols == 0, -math.inf).amax(-1, keepdim=True)
        shifted = y if self.penalised else y - top.clamp_max(0)
        return torch.where(self.cols_full, y - top, shifted.clamp_max(0))


def fill_rows(
    rows: Tensor, log_u_full: Tensor, total: Tensor, rows_full: Tensor, start: Tensor | None = None
) -> Tensor:
    """The log w such that Σ_i min(a_i, w r_i) = s, where log_u_full_i = log a_i - log r_i.

    The sum is concave and piecewise linear in w, so Newton's method climbs to the root without passing it, in as many
    steps as new groups of rows fill up; from the right its first step goes to the left of the root.

    Args:
        rows: (P, N) weights a.
        log_u_full: (P, N), the log w at which a row is full; +inf on padding.
        total: (P, 1) the mass s.
        rows_full: (P, 1), problems in which every row is full: their log w is 0.
        start: (P, 1), a guess.

    Returns:
        (P, 1).
    """
    log_mass = _lower_bound(rows, log_u_full, total) if start is None else start
    last_full = None
    for _ in range(FILL_ITERATIONS):
        gap = log_mass - log_u_full
        full = gap >= 0
        if last_full is not None and bool((full == last_full).all()):
            break
        held = (rows * full).sum(-1, keepdim=True)
        below = torch.where(full, -math.inf, gap)
        nearest = below.amax(-1, keepdim=True)  # rows may be further from full than an exponential reaches
        flow = (rows * (below - nearest).exp()).sum(-1, keepdim=True)
        step = ((total - held) / flow).log() - nearest
        if start is not None and last_full is None:
            bound = _lower_bound(rows, log_u_full, total)
            log_mass = torch.where(step.isfinite(), log_mass + step, bound)
        else:
            log_mass = torch.where(step > 0, log_mass + step, log_mass)
        last_full = full
    return torch.where(rows_full, 0, log_mass)


def _lower_bound(rows: Tensor, log_u_full: Tensor, total: Tensor) -> Tensor:
    """The log w that would do if no row could be full, (P, 1)."""
    lowest = log_u_full.amin(-1, keepdim=True)
    return lowest + (total / (rows * (lowest - log_u_full).exp()).sum(-1, keepdim=True)).log()


def solve_newton(
    problem: Problem, kernel: Kernel, *, tol: float, max_iter: int, start: Tensor | None = None
) -> Scaling:
    """Solves every problem until one more half sweep would move less than `tol` of its mass.

    Args:
        problem: P problems; the columns should be the shorter side.
        kernel: their kernel; the vectors are float64 whatever its dtype.
        tol: the relative mass at which a problem is done.
        max_iter: Newton steps at most.
        start: log column scalings (P, M) to begin with; 0 if absent.
    """
    dtype = kernel.dtype
    count = len(problem.cost)
    y_found = torch.zeros_like(problem.cols)
    left_found = torch.zeros_like(problem.rows)
    n_iter = torch.full((count,), max_iter, device=problem.cost.device)
    converged = torch.zeros(count, dtype=torch.bool, device=problem.cost.device)

    dual = _Dual.of(problem, kernel)
    floor = ROUNDING[dtype] * (1 + problem.rows.shape[-1] / 128)
    y, log_mass = torch.zeros_like(problem.cols) if start is None else start, None
    for _ in range(WARM_SWEEPS):
        _, log_mass, log_ktu = dual.rows_at(y, log_mass)
        y = dual.feasible(dual.ascent(log_ktu))
    for step in range(max_iter + 1):
        log_u_full, log_mass, log_ktu = dual.rows_at(y, log_mass)
        cols = (y + log_ktu).exp()
        move = dual.ascent(log_ktu) - y
        moved = (cols * move.expm1().abs()).sum(-1) / cols.sum(-1).clamp_min(torch.finfo(dtype).tiny)
        done = moved <= max(tol, floor)
        if bool(done.any()):
            chosen = done.nonzero()[:, 0]
            strict = (_price(dual, chosen, log_u_full, log_mass, y) * tol).clamp_min(floor)
            done[chosen] = moved[chosen] <= strict
        last = step == max_iter
        if last or bool(done.any()):
            # The rows are exact; scaling the overfull columns down makes the plan feasible at the price of the mass
            # that they had too much, at most `tol` of it.
            part = torch.ones_like(done) if last else done
            here = dual.index[part]
            cap = torch.where(dual.cols > 0, dual.log_cols - log_ktu, 0)
            y_found[here] = torch.minimum(y, cap)[part]
            left_found[here] = dual.left(log_u_full, log_mass)[part]
            converged[here] = done[part]
            n_iter[here] = step
            if bool(part.all()):
                break
            keep = (~done).nonzero()[:, 0]
            dual = dual.select(keep)
            y, log_u_full, log_mass, cols = y[keep], log_u_full[keep], log_mass[keep], cols[keep]
        direction = _newton_direction(dual, y, log_u_full, log_mass, cols)
        log_mass, log_ktu = _line_search(dual, y, direction, cols, log_mass)
        y = dual.feasible(dual.ascent(log_ktu))
    return Scaling(left_found, torch.where(problem.cols > 0, y_found, -math.inf), n_iter, converged)


def _price(dual: _Dual, chosen: Tensor, log_u_full: Tensor, log_mass: Tensor, y: Tensor) -> Tensor:
    """How much tighter the tolerance of some problems must be because misplaced mass costs more than the mean.

    A plan of low cost in a matrix of high costs is the hard case: there a little mass in the wrong place is a large
    share of the cost.
    """
    problem, index = dual.problem, dual.index[chosen]
    plan = dual.kernel.plan(dual.left(log_u_full, log_mass)[chosen], y[chosen], chosen)
    cost = (plan * problem.cost[index]).sum((-2, -1)) / plan.sum((-2, -1)).clamp_min(torch.finfo(plan.dtype).tiny)
    spread = (problem.high - problem.low)[index]
    return (cost.abs() / spread).nan_to_num(1.0).clamp(CHEAPEST, 1)


def _line_search(dual: _Dual, y: Tensor, direction: Tensor, cols: Tensor, log_mass: Tensor) -> tuple[Tensor, Tensor]:
    """Goes up along a direction, and returns log w and log(K' w u) at the point reached.

    The dual is concave, so its slope is enough: where the slope is still positive the dual has only risen, and a
    slope of nearly 0 is the top. Slopes stand above rounding where differences of the dual itself do not. The full
    step is nearly always taken; a kink on the way, where a row fills or opens, is found by secants and bisections of
    the logarithm.
    """
    tiny = torch.finfo(torch.float64).tiny
    first = ((dual.cols - cols) * direction).sum(-1)
    noise = ROUNDING[dual.kernel.dtype] * (cols * direction.abs()).sum(-1)
    length = torch.ones_like(first)
    low, high = torch.zeros_like(first), torch.full_like(first, math.inf)
    low_slope, high_slope = first, -first
    chosen = torch.zeros_like(first)
    settled = first <= 0  # not uphill: only rounding is left, the ascent sweep decides
    for trial in range(LINE_SEARCH_TRIALS):
        free = y + length[:, None] * direction
        inside = dual.cols_full | (free <= 0)
        point = torch.where(inside, free, 0)
        _, log_mass, log_ktu = dual.rows_at(point, log_mass)
        slope = (dual.cols - (point + log_ktu).exp()) * direction
        # A column that stopped at its bound moves no further; but if the dual falls there, the step was too long.
        slope = torch.where(inside, slope, slope.clamp_max(0)).sum(-1)
        top = slope.abs() <= FLAT * first + noise
        rising = slope > 0
        chosen = torch.where(~settled & (top | rising), length, chosen)
        settled = settled | top | (rising & (length >= 1))
        if bool(settled.all()):
            break
        low, low_slope = torch.where(rising, length, low), torch.where(rising, slope, low_slope)
        high, high_slope = torch.where(rising, high, length), torch.where(rising, high_slope, slope)
        if trial % 2 == 0:
            between = low + (high - low) * low_slope / (low_slope - high_slope).clamp_min(tiny)
        else:
            between = (torch.maximum(low, high * 1e-4) * high).sqrt()
        length = torch.where(settled, chosen, between)
    if bool((chosen != length).any()):
        free = y + chosen[:, None] * direction
        _, log_mass, log_ktu = dual.rows_at(torch.where(dual.cols_full, free, free.clamp_max(0)), log_mass)
    return log_mass, log_ktu


def _newton_direction(dual: _Dual, y: Tensor, log_u_full: Tensor, log_mass: Tensor, cols: Tensor) -> Tensor:
    """The Newton step for the columns that their bound does not hold, (P, M) float64; 0 for the others."""
    left = dual.left(log_u_full, log_mass)
    # The rows know the mass to the last digit; without it the uniform part of the gradient would be rounding.
    mass = (dual.rows * (left - log_u_full).exp()).sum(-1, keepdim=True)
    cols = cols * (mass / cols.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny))
    gradient = dual.cols - cols
    held = (dual.cols == 0) | (~dual.cols_full & (y >= 0) & (gradient >= 0))
    root = cols.clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    full = dual.rows_full | (log_u_full <= log_mass)
    half = dual.kernel.plan(torch.where(full & (dual.rows > 0), left - dual.log_rows / 2, -math.inf), y)
    links = (half.mT @ half).double()
    open_cols = (y + dual.kernel.log_col_sums(torch.where(full, -math.inf, left))).exp()
    if not dual.penalised:
        open_mass = open_cols.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        links = links + open_cols[:, :, None] * (open_cols / open_mass)[:, None, :]
    # diag(cols) - links has the row sums 0 (or the open mass, under a penalty): a graph Laplacian. Its small
    # eigenvalues, between groups of tokens that hardly touch, survive only if the diagonal is summed, not subtracted.
    links.diagonal(dim1=-2, dim2=-1).zero_()
    diagonal = links.sum(-1) + (open_cols if dual.penalised else 0)
    links = links / (root[:, :, None] * root[:, None, :])
    hessian = torch.where(held[:, :, None] | held[:, None, :], 0, -links)
    hessian.diagonal(dim1=-2, dim2=-1).copy_(torch.where(held, 1, diagonal / root.square() + RIDGE[dual.kernel.dtype]))
    # With every column free, shifting all of log v only trades against w: close that direction.
    anchored = (held & (dual.cols > 0)).any(-1, keepdim=True)
    root_free = torch.where(held, 0, root)
    uniform = root_free / root_free.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    uniform = torch.where(anchored, 0, uniform) * (
        math.sqrt(UNIFORM_RIDGE[dual.kernel.dtype]) if dual.penalised else 1
    )
    hessian = hessian + uniform[:, :, None] * uniform[:, None, :]
    target = torch.where(held, 0, gradient / root)
    factor, failed = torch.linalg.cholesky_ex(hessian)
    solution = torch.cholesky_solve(target[..., None], factor)[..., 0]
    # Where rounding made the matrix indefinite, the plain gradient step: the safeguard does the rest.
    direction = torch.where((failed > 0)[:, None], target, solution) / root
    return direction.nan_to_num(0.0, 0.0, 0.0).clamp(-LONGEST_STEP, LONGEST_STEP)
