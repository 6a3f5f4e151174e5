"""Dykstra's projections for partial transport: three vectors, two products per sweep, in plain torch.

The readable reference of the folder. POT's `entropic_partial_wasserstein` (Benamou et al. 2015, section 5) keeps
three dense correction matrices; each of them has rank one, so that its iteration is exactly

    u = min(a / (w K v), 1)
    v = min(b / (w K' u), 1)
    w = s / (u' K v)                 T = w diag(u) K diag(v)
"""

import torch

from .problem import Kernel, Problem, Scaling, finite_log

__all__ = ["solve_dykstra"]

CHECK_EVERY = 10
OVERFULL = 1e-4  # share of the mass that converged columns may hold too much; it is cut off


def solve_dykstra(problem: Problem, kernel: Kernel, *, tol: float, max_iter: int) -> Scaling:
    """Sweeps until the mass that all later sweeps would move is estimated at less than `tol` of the total.

    Differentiable in the kernel, if autograd records. A problem that is not converged keeps its last sweep as it is.

    Args:
        problem: P problems.
        kernel: their Gibbs kernel.
        tol: relative mass; 0 runs all `max_iter` sweeps.
        max_iter: sweeps at most.
    """
    real_rows, real_cols = problem.rows > 0, problem.cols > 0
    log_rows, log_cols = finite_log(problem.rows), finite_log(problem.cols)
    log_total = None if problem.penalty is not None else problem.total.log()[:, None]
    rows_free, cols_free = ~problem.rows_full[:, None], ~problem.cols_full[:, None]
    log_u = torch.where(real_rows, 0.0, -torch.inf).double()
    log_v = torch.where(real_cols, 0.0, -torch.inf).double()
    log_w = torch.zeros_like(problem.total)[:, None]
    if log_total is not None:
        log_w = log_total - torch.logsumexp(kernel.log_row_sums(log_v) + log_u, -1, keepdim=True)
    converged = torch.zeros(len(problem.cost), dtype=torch.bool, device=problem.cost.device)
    n_iter = torch.full_like(converged, max_iter, dtype=torch.int64)
    last_moved = torch.full_like(problem.total, torch.inf)

    for sweep in range(1, max_iter + 1):
        before = log_v + log_w
        log_u_full = log_rows - log_w - kernel.log_row_sums(log_v)
        log_u = torch.where(real_rows, torch.where(rows_free, log_u_full.clamp_max(0), log_u_full), -torch.inf)
        col_sums = kernel.log_col_sums(log_u)
        log_v_full = log_cols - log_w - col_sums
        log_v = torch.where(real_cols, torch.where(cols_free, log_v_full.clamp_max(0), log_v_full), -torch.inf)
        if log_total is not None:
            log_w = log_total - torch.logsumexp(log_v + col_sums, -1, keepdim=True)
        if tol > 0 and (sweep % CHECK_EVERY == 0 or sweep == max_iter):
            with torch.no_grad():
                now = (log_v + log_w + col_sums).exp()  # (P, M) the mass of every column
                change = torch.where(real_cols, log_v + log_w - before, 0)
                moved = (now * change.expm1().abs()).sum(-1) / now.sum(-1).clamp_min(torch.finfo(now.dtype).tiny)
                # What is still to come is a geometric series: a slow rate makes a small step a large error.
                rate = (moved / last_moved).clamp(0, 0.9999) ** (1 / CHECK_EVERY)
                # A sweep that hardly moves may stand on a plateau, with columns that hold too much.
                over = (now - problem.cols).clamp_min(0).sum(-1) / now.sum(-1).clamp_min(torch.finfo(now.dtype).tiny)
                done = ~converged & (moved / (1 - rate) <= tol) & (over <= OVERFULL)
                n_iter[done], last_moved = sweep, moved
                converged |= done
                if bool(converged.all()):
                    break
    log_left = log_u + log_w
    if tol > 0:
        # Feasible to the last digit: the little that a converged plan has too much is cut off.
        row_excess = torch.where(real_rows, log_rows - log_left - kernel.log_row_sums(log_v), 0).clamp_max(0)
        log_left = torch.where(converged[:, None], log_left + row_excess, log_left)
        col_excess = torch.where(real_cols, log_cols - log_v - kernel.log_col_sums(log_left), 0).clamp_max(0)
        log_v = torch.where(converged[:, None], log_v + col_excess, log_v)
    return Scaling(log_left, log_v, n_iter, converged)
