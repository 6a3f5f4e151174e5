"""The derivative of the optimal plan in the cost, in closed form.

At the optimum T = exp((f_i + g_j + h - C_ij) / reg), where the potentials of the constraints that hold with equality
move with the cost and the others are 0. So for a change dC

    dT = -T (dC - P dC) / reg,

P the projection, weighted by T, on the matrices x_i [row i full] + y_j [column j full] + c [mass fixed]. P is
symmetric in the weighted product, so the same formula carries gradients back.
"""

from typing import Any

import torch
from torch import Tensor

from .problem import Problem

__all__ = ["ImplicitPlan", "envelope_cost"]

ACTIVE = 1e-9  # a log potential nearer to its bound than this is at it
RIDGE = 1e-12  # of a matrix with diagonal 1, in float64: closes the directions that change nothing


def envelope_cost(cost: Tensor, plan: Tensor, value: Tensor | None = None) -> Tensor:
    """<T, C> (P,) with the gradient T, as if the plan did not move with the cost: right once, and wrong twice.

    The value may be known.
    """
    if not (torch.is_grad_enabled() and cost.requires_grad):
        return (plan * cost).sum((-2, -1)) if value is None else value
    # Tells the second derivative from the first without keeping the cost: it is empty.
    return _EnvelopeCost.apply(cost, plan, cost[:, :0].sum(), value)


class _EnvelopeCost(torch.autograd.Function):
    @staticmethod
    def forward(cost: Tensor, plan: Tensor, source: Tensor, value: Tensor | None) -> Tensor:
        return (plan * cost).sum((-2, -1)) if value is None else value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:3])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        plan, source = ctx.saved_tensors
        return _once(gradients[0][:, None, None] * plan, source), None, None, None


class _Once(torch.autograd.Function):
    """The identity on a gradient; cannot be differentiated again."""

    @staticmethod
    def forward(gradient: Tensor, source: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        raise RuntimeError(
            'the second derivative of a transport cost in gradient="envelope" or "implicit" would be wrong, as the '
            'first one does not say how it moves with the cost: use gradient="unrolled"'
        )


def _once(gradient: Tensor, source: Tensor) -> Tensor:
    """The gradient, an error for those who differentiate it in what `source` was computed from.

    torch's `once_differentiable` would not do: it looks at the incoming gradient alone, which is a constant where the
    cost is the loss.
    """
    return _Once.apply(gradient, source) if torch.is_grad_enabled() and source.requires_grad else gradient


class ImplicitPlan(torch.autograd.Function):
    """Gives a plan that was found without autograd the gradient of the optimum."""

    @staticmethod
    def forward(ctx: Any, cost: Tensor, plan: Tensor, log_left: Tensor, log_right: Tensor, problem: Problem) -> Tensor:
        """Returns the plan; `log_left` and `log_right` tell which constraints hold with equality."""
        ctx.save_for_backward(cost, plan, log_left, log_right)
        ctx.problem = problem
        return plan.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """-T (W - P W) / reg for the incoming gradient W."""
        cost, plan, log_left, log_right = ctx.saved_tensors
        weight = gradients[0].double()
        with torch.no_grad():
            rest = weight - _projection(plan.double(), weight, log_left, log_right, ctx.problem)
            gradient = (-plan.double() * rest / ctx.problem.reg).to(plan.dtype)
        return _once(gradient, cost), None, None, None, None


def _projection(plan: Tensor, weight: Tensor, log_left: Tensor, log_right: Tensor, problem: Problem) -> Tensor:
    """P W, (P, N, M)."""
    full_rows = _active(log_left, problem.rows, problem)  # (P, N)
    full_cols = _active(log_right, problem.cols, problem)
    # Full rows are a group each; with the mass fixed, the other rows are one group together.
    groups = plan * full_rows[..., None]
    open_rows = ~full_rows & (problem.rows > 0)
    row_sums, weighted = plan.sum(-1), plan * weight
    tiny = torch.finfo(torch.float64).tiny
    inverse = torch.where(full_rows, 1 / row_sums.clamp_min(tiny), 0)
    cols = plan.sum(-2)
    hessian = torch.diag_embed(cols) - groups.mT @ (groups * inverse[..., None])
    target = weighted.sum(-2) - (groups.mT @ (inverse * weighted.sum(-1))[..., None])[..., 0]
    open_cols = (plan * open_rows[..., None]).sum(-2)
    open_mass = open_cols.sum(-1, keepdim=True)
    mean = (weighted.sum(-1) * open_rows).sum(-1, keepdim=True) / open_mass.clamp_min(tiny)
    if problem.penalty is None:
        hessian = hessian - open_cols[..., :, None] * (open_cols / open_mass.clamp_min(tiny))[..., None, :]
        target = target - open_cols * mean
    root = cols.clamp_min(tiny).sqrt()
    hessian = hessian / (root[..., :, None] * root[..., None, :])
    both = full_cols[..., :, None] & full_cols[..., None, :]
    hessian = torch.where(both, hessian, 0)
    hessian.diagonal(dim1=-2, dim2=-1).copy_(torch.where(full_cols, hessian.diagonal(dim1=-2, dim2=-1) + RIDGE, 1))
    y = torch.linalg.solve(hessian, torch.where(full_cols, target / root, 0)[..., None])[..., 0] / root
    x = inverse * (weighted.sum(-1) - (groups @ y[..., None])[..., 0])
    if problem.penalty is None:
        common = mean - (open_cols * y).sum(-1, keepdim=True) / open_mass.clamp_min(tiny)
        x = torch.where(open_rows, common, x)
    return x[..., :, None] + y[..., None, :]


def _active(log_potential: Tensor, weights: Tensor, problem: Problem) -> Tensor:
    """Which constraints of one side hold with equality: those whose potential is below its bound.

    The bound is the largest potential of the side (0, or the scale of the mass). Where all are below it, the largest
    one spans together with the others what the fixed mass spans, so leaving it out changes nothing.
    """
    valid = weights > 0
    if problem.penalty is not None:
        return valid & (log_potential < -ACTIVE)
    return valid & (log_potential < log_potential.masked_fill(~valid, -torch.inf).amax(-1, keepdim=True) - ACTIVE)
