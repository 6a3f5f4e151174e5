"""`partial_optimal_transport`: checks what comes in, picks the solver, and says what the gradient is."""

import math
import warnings

import torch
from torch import Tensor

from . import exact, fast
from .dykstra import solve_dykstra
from .gradients import ImplicitPlan
from .paper import printed_algorithm
from .plan import TransportPlan
from .problem import Kernel, Problem, domain_for

__all__ = ["partial_optimal_transport"]

METHODS = ("auto", "newton", "numba", "triton", "dykstra", "paper", "exact")
GRADIENTS = ("envelope", "implicit", "unrolled")
MARGINALS = ("uniform", "count")
DEFAULT_ITERATIONS = {"dykstra": 20_000, "paper": 1_000}
NEWTON_STEPS = 100
LARGEST_RELATIVE_RANGE = 1e4  # of (max C - min C) / reg: beyond it float64 log potentials lose the fourth digit
FULL = {torch.float32: 1e-6, torch.float64: 1e-12}  # a mass closer to everything than this is everything
SAFETY = 0.05  # of `tol`: moved mass is a first-order quantity, its price can be above the mean cost

_warned = False


def partial_optimal_transport(
    cost: Tensor,
    mass: float | Tensor = 0.5,
    reg: float = 0.05,
    *,
    row_weights: Tensor | None = None,
    col_weights: Tensor | None = None,
    marginals: str = "uniform",
    penalty: float | None = None,
    row_mask: Tensor | None = None,
    col_mask: Tensor | None = None,
    method: str = "auto",
    tol: float = 1e-4,
    max_iter: int | None = None,
    gradient: str = "envelope",
) -> TransportPlan:
    """Moves a fraction of the mass between two weighted sets at the least cost, for a stack of problems at once.

        min <T, C> + reg Σ T (log T - 1)   over   T >= 0,  T 1 <= a,  T' 1 <= b,  Σ T = mass · min(Σ a, Σ b)

    Equations (7) and (8) of the READ-PVLA paper with entropy, after Benamou et al. (2015); `mass=1` with equal totals
    is balanced entropic transport.

    Args:
        cost: (..., N, M), finite where it is real; anything on padding. Half precision is solved in float32.
        mass: fraction of the smaller side to move, in (0, 1]; a float, or a tensor that broadcasts to (...).
        reg: temperature of the entropy, in units of the cost, > 0.
        row_weights: (..., N) capacities a >= 0; default 1 / (number of real rows).
        col_weights: (..., M) capacities b >= 0; default 1 / (number of real columns).
        marginals: "uniform", or "count": every real row and column has the capacity 1, so that a row goes to at most
            one column.
        penalty: a reward per unit of mass, in units of the cost. The mass is then an outcome: `mass` is not used, and
            reg·KL(T | a b' · min(Σa, Σb) / (Σa Σb)) takes the place of the entropy.
        row_mask: (..., N), non-zero = real; any dtype. Masks and weights broadcast over the leading shape.
        col_mask: (..., M), likewise.
        method: "newton" (any device), "dykstra" (the plain reference), "paper" (Algorithm 1 as printed: moves the
            whole mass 1, ignores `mass` and `tol`), "exact" (no entropy; POT), or "auto", the fastest that is
            installed and fits, with the same answer; "numba" and "triton" insist on one of the fast paths.
        tol: relative accuracy asked of the cost.
        max_iter: at most so many Newton steps or sweeps; the default depends on the method.
        gradient: "envelope": ∂cost/∂C = T, the exact gradient of the regularised value; "implicit": the exact
            gradient of <T, C> itself, and a differentiable plan; "unrolled": automatic differentiation through the
            sweeps of "dykstra" or "paper".

    Returns:
        A `TransportPlan`, in float64 for a float64 cost and in float32 otherwise. Problems without a real row or
        column have cost 0 and gradient 0.

    Raises:
        ValueError: for an argument outside its range; the message names it.
        ImportError: for method="exact" without POT.

    Example:
        >>> import torch
        >>> cost = torch.tensor([[0.0, 1.0], [1.0, 0.2]])
        >>> plan = partial_optimal_transport(cost, mass=0.5, reg=0.01)
        >>> plan.plan.round(decimals=3)
        tensor([[0.5000, 0.0000],
                [0.0000, 0.0000]])
    """
    chosen = _checked_options(method, gradient, marginals, tol, max_iter, reg, penalty)
    if not isinstance(cost, Tensor) or cost.dim() < 2 or not cost.is_floating_point():
        raise ValueError("cost must be a floating-point tensor of shape (..., N, M).")
    leading, (n_rows, n_cols) = cost.shape[:-2], cost.shape[-2:]
    with torch.autocast(cost.device.type, enabled=False):
        matrix = cost if cost.dtype == torch.float64 else cost.float()
        if not matrix.numel():
            return _nothing(matrix, leading)
        matrix = matrix.reshape(-1, n_rows, n_cols)
        rows = _weights("row", row_weights, row_mask, marginals, (*leading, n_rows), cost.device)
        cols = _weights("col", col_weights, col_mask, marginals, (*leading, n_cols), cost.device)
        if row_mask is not None or col_mask is not None or row_weights is not None or col_weights is not None:
            real = (rows > 0)[:, :, None] & (cols > 0)[:, None, :]
            matrix = torch.where(real, matrix, 0)
            low = matrix.detach().masked_fill(~real, math.inf).amin((-2, -1))
            high = matrix.detach().masked_fill(~real, -math.inf).amax((-2, -1))
            exists = (rows > 0).any(-1) & (cols > 0).any(-1)
            low, high = torch.where(exists, low, 0), torch.where(exists, high, 0)
        else:
            flat = matrix.detach().flatten(1)
            low, high = flat.amin(1), flat.amax(1)
            exists = None
        span = _span(low, high, penalty) / reg
        if not math.isfinite(span):
            raise ValueError("cost must be finite on every real row and column, got NaN or infinity.")
        fraction = _fraction(mass, leading, cost.device) if chosen != "paper" else rows.new_ones(())
        row_sums, col_sums = rows.sum(-1), cols.sum(-1)
        total = fraction * torch.minimum(row_sums, col_sums)
        problem = Problem(
            matrix,
            rows,
            cols,
            total,
            low,
            high,
            float(reg),
            penalty,
            span=span,
            padded=exists is not None,
            rows_full=_takes_all(total, row_sums, matrix.dtype, penalty),
            cols_full=_takes_all(total, col_sums, matrix.dtype, penalty),
        )
        if exists is None or bool(exists.all()):
            plan, n_iter, converged = _solved(problem, chosen, tol, max_iter, gradient)
        else:
            kept = (exists.nonzero()[:, 0],)
            found = _solved(problem.select(kept[0]), chosen, tol, max_iter, gradient)
            plan = torch.zeros_like(matrix).index_put(kept, found[0])
            n_iter = torch.zeros_like(total).long().index_put(kept, found[1])
            converged = torch.ones_like(exists).index_put(kept, found[2])
        return _result(problem, plan, n_iter, converged, leading, chosen)


def _span(low: Tensor, high: Tensor, penalty: float | None) -> float:
    """The largest range of the real costs of a problem; a penalty counts as one more cost."""
    if penalty is not None:
        low, high = low.clamp_max(penalty), high.clamp_min(penalty)
    return float((high - low).amax())


def _takes_all(total: Tensor, weight_sum: Tensor, dtype: torch.dtype, penalty: float | None) -> Tensor:
    """Whether the total is all that one side has: (P,) bool."""
    return total >= weight_sum * (1 - FULL[dtype] if penalty is None else math.inf)


def _solved(
    problem: Problem, method: str, tol: float, max_iter: int | None, gradient: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(plan, n_iter, converged); the plan carries the gradient that was asked for."""
    max_iter = DEFAULT_ITERATIONS.get(method, NEWTON_STEPS) if max_iter is None else max_iter
    if not len(problem.cost):
        return problem.cost, problem.total.long(), problem.total > 0
    if method != "exact" and problem.span > LARGEST_RELATIVE_RANGE:
        raise ValueError(
            f"reg={problem.reg} is too small for a cost that ranges over {problem.span * problem.reg:.6g}: "
            f"reg must be at least 1/{LARGEST_RELATIVE_RANGE:.0f} of that range. Scale the cost, raise reg, or use "
            'method="exact".'
        )
    with torch.set_grad_enabled(gradient == "unrolled" and torch.is_grad_enabled()):
        scaling = None
        if method == "exact":
            plan = exact.solve_exact(problem).to(problem.cost)
            n_iter, converged = torch.zeros_like(problem.total).long(), torch.ones_like(problem.total).bool()
        elif method == "paper":
            plan, n_iter, converged = _paper(problem, tol, max_iter)
        else:
            at_least = problem.cost.dtype if tol > 1e-6 else torch.float64
            dtype, log_domain = domain_for(problem, at_least)
            # Every solver but Dykstra's works on the shorter side, as columns.
            tall = problem if problem.cost.shape[-2] >= problem.cost.shape[-1] or method == "dykstra" else problem.mT
            kernel = Kernel(tall, dtype, log_domain)
            if method == "dykstra":
                scaling = solve_dykstra(tall, kernel, tol=tol * SAFETY, max_iter=max_iter)
            else:
                solver = fast.solver_for(method, tall, kernel)
                scaling = solver(tall, kernel, tol=tol * SAFETY, max_iter=max_iter)
            plan = kernel.plan(scaling.log_left, scaling.log_right).to(problem.cost.dtype)
            if tall is not problem:
                plan, scaling = plan.mT, scaling.mT
            n_iter, converged = scaling.n_iter, scaling.converged
    if gradient == "implicit" and scaling is not None:
        plan = ImplicitPlan.apply(problem.cost, plan, scaling.log_left, scaling.log_right, problem)
    return plan, n_iter, converged


def _paper(problem: Problem, tol: float, max_iter: int) -> tuple[Tensor, Tensor, Tensor]:
    dtype, log_domain = domain_for(problem, problem.cost.dtype)
    if log_domain:
        raise ValueError(
            f'reg={problem.reg} is too small for method="paper", which exponentiates the cost as printed: '
            f"(max cost - min cost) / reg is {problem.span:.4g}, and may be at most 340."
        )
    # Line 4 divides by the sum of exp(-C / reg): any shift of the cost cancels there.
    shifted = (problem.cost - problem.low[:, None, None]).to(dtype)
    plan = printed_algorithm(shifted, problem.rows.to(dtype), problem.cols.to(dtype), problem.reg, max_iter)
    plan = plan.to(problem.cost.dtype)
    error = (plan.detach().sum(-1) - problem.rows).abs().sum(-1) + (plan.detach().sum(-2) - problem.cols).abs().sum(-1)
    return plan, torch.full_like(problem.total, max_iter).long(), error <= tol


def _result(
    problem: Problem, plan: Tensor, n_iter: Tensor, converged: Tensor, leading: torch.Size, method: str
) -> TransportPlan:
    value = (plan * problem.cost).sum((-2, -1))
    found = plan.detach()
    row_sums, col_sums = found.sum(-1), found.sum(-2)
    excess = torch.maximum((row_sums - problem.rows).amax(-1), (col_sums - problem.cols).amax(-1)).clamp_min(0)
    if method != "paper" and not bool(converged.all()):
        _warn_once(int((~converged).sum()), len(converged))
    return TransportPlan(
        plan.reshape(*leading, *plan.shape[-2:]),
        value.reshape(leading),
        row_sums.sum(-1).reshape(leading),
        n_iter.reshape(leading),
        converged.reshape(leading),
        excess.to(found.dtype).reshape(leading),
    )


def _nothing(matrix: Tensor, leading: torch.Size) -> TransportPlan:
    """The answer to problems without rows or without columns."""
    zero = matrix.detach().new_zeros(leading)
    return TransportPlan(matrix.detach(), matrix.sum((-2, -1)), zero, zero.long(), zero == 0, zero.clone())


def _weights(
    side: str,
    weights: Tensor | None,
    mask: Tensor | None,
    marginals: str,
    shape: tuple[int, ...],
    device: torch.device,
) -> Tensor:
    """The capacities of one side, (P, N) float64, 0 on padding."""
    if mask is None and weights is None:
        weight = 1.0 if marginals == "count" else 1 / shape[-1]
        return torch.full((math.prod(shape[:-1]), shape[-1]), weight, dtype=torch.float64, device=device)
    real = torch.ones(shape[-1], dtype=torch.bool, device=device)
    if mask is not None:
        _check_mask(f"{side}_mask", mask, shape)
        real = mask.to(device) != 0
    if weights is None:
        found = real.double()
        if marginals == "uniform":
            found = found / found.sum(-1, keepdim=True).clamp_min(1)
        return found.broadcast_to(shape).reshape(-1, shape[-1])
    name = f"{side}_weights"
    if marginals == "count":
        raise ValueError(f'{name} cannot be given with marginals="count", which sets every weight to 1.')
    if not isinstance(weights, Tensor) or weights.is_complex() or not _broadcasts(weights.shape, shape):
        raise ValueError(f"{name} must be a real tensor of shape {shape}, or broadcast to it, got {_shape(weights)}.")
    found = weights.detach().to(device).double()
    if not bool(((found >= 0) & found.isfinite()).all()):
        raise ValueError(f"{name} must be finite and at least 0, got {float(found.nan_to_num(-math.inf).amin())}.")
    found, real = found.broadcast_to(shape), real.broadcast_to(shape)
    found = torch.where(real, found, 0).reshape(-1, shape[-1])
    if bool(((found.sum(-1) <= 0) & real.reshape(-1, shape[-1]).any(-1)).any()):
        raise ValueError(
            f"{name} sums to zero in a problem that has real entries: every problem needs a positive sum."
        )
    return found


def _check_mask(name: str, mask: Tensor, shape: tuple[int, ...]) -> None:
    if not isinstance(mask, Tensor) or not _broadcasts(mask.shape, shape):
        raise ValueError(f"{name} must be a tensor of shape {shape}, or broadcast to it, got {_shape(mask)}.")
    if mask.is_complex():
        raise ValueError(f"{name} must be boolean, integer or floating point (non-zero = real), got {mask.dtype}.")
    if mask.is_floating_point() and not bool((mask >= 0).all()):
        raise ValueError(
            f"{name} has negative or NaN entries: it must be non-zero on real entries and 0 on padding, not a mask to "
            "be added to attention scores."
        )


def _fraction(mass: float | Tensor, leading: torch.Size, device: torch.device) -> Tensor:
    if isinstance(mass, int | float) and 0 < mass <= 1:
        return torch.full((math.prod(leading),), mass, dtype=torch.float64, device=device)
    fraction = torch.as_tensor(mass, dtype=torch.float64, device=device).detach()
    if not _broadcasts(fraction.shape, leading):
        raise ValueError(f"mass must be a number or broadcast to shape {tuple(leading)}, got {tuple(fraction.shape)}.")
    if not bool(((fraction > 0) & (fraction <= 1)).all()):
        wrong = fraction[~((fraction > 0) & (fraction <= 1))][0]
        raise ValueError(f"mass must be in (0, 1], the fraction of the smaller side to move, got {float(wrong)}.")
    return fraction.broadcast_to(leading).reshape(-1)


def _checked_options(
    method: str,
    gradient: str,
    marginals: str,
    tol: float,
    max_iter: int | None,
    reg: float,
    penalty: float | None,
) -> str:
    """Raises for options that are wrong by themselves or together; returns the method with "auto" narrowed down."""
    for name, value, allowed in (
        ("method", method, METHODS), ("gradient", gradient, GRADIENTS), ("marginals", marginals, MARGINALS),
    ):  # fmt: skip
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")
    for name, number in (("reg", reg), ("tol", tol)):
        if isinstance(number, Tensor) or not 0 < number < math.inf:
            raise ValueError(f"{name} must be a finite number above 0, got {number!r}.")
    if max_iter is not None and max_iter < 1:
        raise ValueError(f"max_iter must be at least 1, got {max_iter!r}.")
    if penalty is not None and not math.isfinite(penalty):
        raise ValueError(f"penalty must be a finite number or None, got {penalty!r}.")
    if method == "paper" and (marginals == "count" or penalty is not None):
        raise ValueError('method="paper" moves the mass 1: it takes neither marginals="count" nor a penalty.')
    if method == "exact" and gradient == "implicit":
        raise ValueError('method="exact" is piecewise constant in the plan: use gradient="envelope".')
    if method == "paper" and gradient == "implicit":
        raise ValueError('method="paper" stops short of its limit: use gradient="envelope" or "unrolled".')
    if gradient == "unrolled":
        if method not in ("auto", "dykstra", "paper"):
            raise ValueError(f'gradient="unrolled" needs method="dykstra" or "paper", got {method!r}.')
        return "dykstra" if method == "auto" else method
    return method


def _broadcasts(shape: torch.Size, target: tuple[int, ...]) -> bool:
    return len(shape) <= len(target) and all(
        size in (1, full) for size, full in zip(reversed(shape), reversed(target), strict=False)
    )


def _shape(value: object) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _warn_once(failed: int, count: int) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"{failed} of {count} transport problems did not reach the tolerance (see TransportPlan.converged); raise "
            "max_iter, reg or tol. Later failures will not be reported.",
            RuntimeWarning,
            stacklevel=4,
        )
