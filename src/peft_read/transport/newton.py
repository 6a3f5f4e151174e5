"""Safeguarded semismooth Newton on the dual of partial transport, all problems of a stack at once.

The dual of the problem in `problem.py`, in the scaled potentials log u <= 0, log v <= 0 and log w, is to maximise

    Σ a_i log u_i + Σ b_j log v_j + s log w - Σ_ij T_ij,   T_ij = w u_i K_ij v_j.

For a given v the best (u, w) is known exactly: w fills the rows until the mass is s, T 1 = min(a, w K v). What is left
is a concave function of y = log v <= 0 on the short side of the matrix, with

    gradient  b - T' 1,
    Hessian   -[ diag(T' 1) - T_S' diag(1 / a_S) T_S - c c' / m ],

S the rows that are full, c and m the column sums and the mass of the other rows. Newton's method on the columns that
are not held by their bound converges in a handful of steps where first-order schemes need thousands. Unguarded it can
cycle between active sets; so every step compares the dual at three step lengths and at the plain ascent point, keeps
the best, and adds one ascent sweep, which never decreases the dual.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .problem import Kernel, Problem, Scaling, finite_log

__all__ = ["fill_rows", "solve_newton"]

WARM_SWEEPS = 3
STEP_LENGTHS = (1.0, 0.3, 0.05)
LONGEST_STEP = 5.0  # of one log potential in one step: beyond it the quadratic model says nothing
RIDGE = {torch.float32: 1e-6, torch.float64: 1e-12}  # some units of rounding of the scaled Hessian (diagonal 1)
FILL_ITERATIONS = 100  # the filling ends after as many steps as there are groups of rows; this is never reached


@dataclass(frozen=True)
class _Dual:
    """The constants of the reduced dual function, and its evaluation."""

    kernel: Kernel
    rows: Tensor  # (P, N) float64
    cols: Tensor  # (P, M)
    log_rows: Tensor
    log_cols: Tensor
    total: Tensor  # (P,)
    rows_full: Tensor  # (P, 1) bool
    cols_full: Tensor  # (P, 1) bool
    penalised: bool

    @classmethod
    def of(cls, problem: Problem, kernel: Kernel) -> "_Dual":
        return cls(
            kernel,
            problem.rows,
            problem.cols,
            finite_log(problem.rows),
            finite_log(problem.cols),
            problem.total,
            problem.rows_full[:, None],
            problem.cols_full[:, None],
            problem.penalty is not None,
        )

    def select(self, index: Tensor) -> "_Dual":
        stacked = ("rows", "cols", "log_rows", "log_cols", "total", "rows_full", "cols_full")
        parts = {name: getattr(self, name)[index] for name in stacked}
        return replace(self, kernel=self.kernel.select(index), **parts)

    def rows_at(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Fills the rows for log v = y, (S, P, M).

        Returns:
            level (S, P, N), the log scaling at which each row is full; log w (S, P, 1); the dual value (S, P).
        """
        level = self.log_rows - self.kernel.log_row_sums(y)
        if self.penalised:
            log_mass = level.new_zeros(*level.shape[:-1], 1)
        else:
            log_mass = fill_rows(self.rows, level, self.total, self.rows_full)
        slack = torch.where(self.rows > 0, level - log_mass, 0)
        value = (self.rows * torch.where(self.rows_full, slack, slack.clamp_max(0))).sum(-1) + (self.cols * y).sum(-1)
        if self.penalised:
            value = value - (self.rows * (-slack).clamp_max(0).exp()).sum(-1)
        else:
            value = value + self.total * log_mass[..., 0]
        return level, log_mass, value

    def left(self, level: Tensor, log_mass: Tensor) -> Tensor:
        """log(w u), the row scaling that keeps every row within its weight."""
        left = torch.where(self.rows_full, level, torch.minimum(level, log_mass))
        return torch.where(self.rows > 0, left, -math.inf)

    def ascent(self, pull: Tensor) -> Tensor:
        """The best log v for fixed rows, given log(K' w u): the column half of a sweep."""
        free = torch.where(self.cols > 0, self.log_cols - pull, 0)
        return torch.where(self.cols_full, free, free.clamp_max(0))

    def feasible(self, y: Tensor) -> Tensor:
        """Within the bound y <= 0; one column at it unless all are full, which never lowers the dual."""
        top = y.masked_fill(self.cols == 0, -math.inf).amax(-1, keepdim=True)
        shifted = y if self.penalised else y - top.clamp_max(0)
        return torch.where(self.cols_full, y - top, shifted.clamp_max(0))


def fill_rows(rows: Tensor, level: Tensor, total: Tensor, rows_full: Tensor) -> Tensor:
    """The log w such that Σ_i min(a_i, w r_i) = s, where level_i = log a_i - log r_i.

    The sum is concave and piecewise linear in w, so Newton's method from the left climbs to the root without passing
    it, in as many steps as new groups of rows fill up.

    Args:
        rows: (P, N) weights a.
        level: (..., P, N), the log w at which a row is full; +inf on padding.
        total: (P,) the mass s.
        rows_full: (P, 1), problems in which every row is full: their log w is 0.

    Returns:
        (..., P, 1).
    """
    lowest = level.amin(-1, keepdim=True)
    total = total[:, None]
    log_mass = lowest + (total / (rows * (lowest - level).exp()).sum(-1, keepdim=True)).log()
    for _ in range(FILL_ITERATIONS):
        flow = rows * (log_mass - level).clamp_max(0).exp()
        full = level <= log_mass
        held = torch.where(full, rows, 0).sum(-1, keepdim=True)
        step = ((total - held) / torch.where(full, 0, flow).sum(-1, keepdim=True)).log()
        step = torch.where(rows_full | (step <= 1e-14), 0, step)  # NaN, where no row is left, ends as "no step" too
        step = step.nan_to_num(0.0, 0.0, 0.0)
        log_mass = log_mass + step
        if not bool(step.any()):
            break
    return torch.where(rows_full, 0, log_mass)


def solve_newton(problem: Problem, *, dtype: torch.dtype, log_domain: bool, tol: float, max_iter: int) -> Scaling:
    """Solves every problem until one more half sweep would move less than `tol` of its mass.

    Args:
        problem: P problems.
        dtype: of the matrices; the vectors are float64 always.
        log_domain: whether exp(-C / reg) would leave the range of `dtype`.
        tol: the relative mass at which a problem is done.
        max_iter: Newton steps at most.
    """
    if problem.cost.shape[-2] < problem.cost.shape[-1]:
        return solve_newton(problem.mT, dtype=dtype, log_domain=log_domain, tol=tol, max_iter=max_iter).mT
    count = len(problem.cost)
    y_found = torch.zeros_like(problem.cols)
    left_found = torch.zeros_like(problem.rows)
    n_iter = torch.full((count,), max_iter, device=problem.cost.device)
    converged = torch.zeros(count, dtype=torch.bool, device=problem.cost.device)

    dual = _Dual.of(problem, Kernel(problem, dtype, log_domain))
    index = torch.arange(count, device=problem.cost.device)
    y = torch.zeros_like(problem.cols)
    for _ in range(WARM_SWEEPS):
        level, log_mass, _ = dual.rows_at(y[None])
        left = dual.left(level, log_mass)
        y = dual.feasible(dual.ascent(dual.kernel.log_col_sums(left)[0]))
    for step in range(max_iter + 1):
        level, log_mass, _ = (part[0] for part in dual.rows_at(y[None]))
        left = dual.left(level, log_mass)
        pull = dual.kernel.log_col_sums(left[None])[0]
        cols = (y + pull).exp()
        ascent = dual.ascent(pull)
        move = ascent - y
        moved = (cols * move.expm1().abs()).sum(-1) / cols.sum(-1).clamp_min(torch.finfo(dtype).tiny)
        done = moved <= tol
        last = step == max_iter
        if last or bool(done.any()):
            # The rows are exact; scaling the overfull columns down makes the plan feasible at the price of the mass
            # that they had too much, at most `tol` of it.
            here = index if last else index[done]
            part = slice(None) if last else done
            cap = torch.where(dual.cols > 0, dual.log_cols - pull, 0)
            y_found[here] = torch.minimum(y, cap)[part]
            left_found[here] = left[part]
            converged[here] = done[part]
            n_iter[here] = step
            if last or bool(done.all()):
                break
            keep = (~done).nonzero()[:, 0]
            dual, index, y = dual.select(keep), index[keep], y[keep]
            level, log_mass, left = level[keep], log_mass[keep], left[keep]
            cols, ascent = cols[keep], ascent[keep]
        direction = _newton_direction(dual, y, level, log_mass, left, cols)
        trials = torch.stack([*(y + length * direction for length in STEP_LENGTHS), ascent])
        trials = dual.feasible(trials)
        levels, log_masses, values = dual.rows_at(trials)
        best = values.nan_to_num(-math.inf).argmax(0)
        pick = (best, torch.arange(len(best), device=best.device))
        y = trials[pick]
        left = dual.left(levels[pick], log_masses[pick])
        y = dual.feasible(dual.ascent(dual.kernel.log_col_sums(left[None])[0]))
    return Scaling(left_found, y_found, n_iter, converged)


def _newton_direction(dual: _Dual, y: Tensor, level: Tensor, log_mass: Tensor, left: Tensor, cols: Tensor) -> Tensor:
    """The Newton step for the columns that their bound does not hold, (P, M) float64; 0 for the others."""
    matrix = dual.kernel.by_rows
    gradient = dual.cols - cols
    held = (dual.cols == 0) | (~dual.cols_full & (y >= 0) & (gradient >= 0))
    root = cols.clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    right = torch.where(held, -math.inf, y - root.log())
    full = dual.rows_full | (level <= log_mass)
    # diag(cols)^-1/2 H diag(cols)^-1/2 = I - B'B - q q': entries of order 1 whatever the weights are.
    half = dual.kernel.plan(torch.where(full & (dual.rows > 0), left - dual.log_rows / 2, -math.inf), right)
    scaled = -(half.mT @ half)
    if not dual.penalised:
        flow = torch.where(full, -math.inf, left)
        open_mass = torch.where(full, 0, dual.rows * (left - level).exp()).sum(-1, keepdim=True)
        open_cols = (dual.kernel.log_col_sums(flow[None])[0] + right).exp() / open_mass.clamp_min(1e-300).sqrt()
        scaled = scaled - (open_cols[:, :, None] * open_cols[:, None, :]).to(matrix.dtype)
        # With every column free, shifting all of log v only trades against w: close that direction.
        uniform = torch.where(held.any(-1, keepdim=True) & ~dual.cols_full, 0, root / root.norm(dim=-1, keepdim=True))
        uniform = torch.where(held, 0, uniform)
        scaled = scaled + (uniform[:, :, None] * uniform[:, None, :]).to(matrix.dtype)
    scaled.diagonal(dim1=-2, dim2=-1).add_(1 + RIDGE[matrix.dtype])
    target = torch.where(held, 0, gradient / root)
    factor, failed = torch.linalg.cholesky_ex(scaled)
    solution = torch.cholesky_solve(target.to(matrix.dtype)[..., None], factor)[..., 0].double()
    # Where rounding made the matrix indefinite, the plain gradient step: the safeguard does the rest.
    direction = torch.where((failed > 0)[:, None], target, solution) / root
    direction = direction.nan_to_num(0.0, 0.0, 0.0)
    return direction * (LONGEST_STEP / direction.abs().amax(-1, keepdim=True).clamp_min(LONGEST_STEP))
