"""Whether a plan keeps its promises, read off the plan itself: constraints, mass, and how far it is from the optimum.

With T = exp((f_i + g_j + h - C_ij) / reg) and f, g <= 0, primal and dual value of a plan differ by

    Σ f_i (T 1 - a)_i + Σ g_j (T' 1 - b)_j + h (Σ T - s):

a constraint that is not met with equality where it has a price. For a plan that exceeds nothing and moves the mass s
the sum is the distance to the optimum of the regularised problem, for a plan from any solver.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .newton import CHEAPEST, ROUNDING
from .problem import Problem, Scaling

__all__ = ["Certificate", "Finished", "keeps_promises"]

LARGEST_EXCESS = 1e-5  # of a weight, relative to the mean weight of the longer side if that is more
LARGEST_MISSING = 1e-3  # of the mass
GAP = 4.0  # times the tolerance


class Certificate(NamedTuple):
    """One number per problem."""

    converged: Tensor  # (P,) bool
    mass: Tensor  # (P,) float64
    excess: Tensor  # (P,) float64, by how much the plan exceeds a weight at the worst place


class Finished(NamedTuple):
    """What a fused launch makes of the solutions of P problems."""

    plan: Tensor  # (P, N, M), float32; NaN for a cost that is not finite
    value: Tensor | None  # (P,), <T, C>, if it is known
    certificate: Certificate  # mass and excess in float32


def keeps_promises(problem: Problem, plan: Tensor, scaling: Scaling, tol: float) -> tuple[Certificate, Tensor]:
    """Judge plans (P, N, M), and their <T, C>, (P,) float64; nothing waits for a device.

    Plans of a linear programme or of the printed algorithm have no scalings (NaN): their own test stands in for the
    distance to the optimum. A problem with nothing real has nothing to promise.
    """
    row_sums, col_sums = plan.sum(-1, dtype=torch.float64), plan.sum(-2, dtype=torch.float64)
    over_rows, over_cols = row_sums - problem.rows, col_sums - problem.cols
    mass = row_sums.sum(-1)
    excess = torch.maximum(over_rows.amax(-1), over_cols.amax(-1)).clamp_min(0)
    left, right = scaling.log_left, scaling.log_right  # -inf on padding
    if problem.penalty is None:
        highest = left.amax(-1), right.amax(-1)
        left, right = left - highest[0][:, None], right - highest[1][:, None]
        threshold = problem.reg * (highest[0] + highest[1]) + problem.low
        missing = mass - problem.total
        kept_mass = missing.abs() <= LARGEST_MISSING * problem.total
    else:
        threshold, missing, kept_mass = torch.zeros_like(mass), torch.zeros_like(mass), mass >= 0
    row_gaps, col_gaps = left * over_rows, right * over_cols
    if problem.padded:
        real_rows, real_cols = problem.rows > 0, problem.cols > 0
        row_gaps, col_gaps = torch.where(real_rows, row_gaps, 0), torch.where(real_cols, col_gaps, 0)
    gap = problem.reg * (row_gaps.sum(-1) + col_gaps.sum(-1)) + threshold * missing
    value = (plan * problem.cost.detach()).sum((-2, -1), dtype=torch.float64)
    spread = (problem.high.double() - problem.low.double()) * mass
    noise = ROUNDING[plan.dtype] * (1 + sum(plan.shape[-2:]) / 128)
    allowed = GAP * (tol * torch.maximum(value.abs(), CHEAPEST * spread) + noise * (spread + problem.reg * mass))
    optimal = (gap.abs() <= allowed) | gap.isnan()
    largest = LARGEST_EXCESS * torch.maximum(problem.rows.amax(-1), problem.cols.amax(-1)).clamp_min(1)
    promised = kept_mass & (excess <= largest) & optimal
    if problem.padded:
        promised = promised | ~(real_rows.any(-1) & real_cols.any(-1))
    return Certificate(scaling.converged & promised, mass, excess), value
