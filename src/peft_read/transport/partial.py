"""`partial_optimal_transport`: checks what comes in, picks the solver, and says what the gradient is."""

import math
import warnings
from dataclasses import replace

import torch
from torch import Tensor

from . import exact, fast
from .arguments import check_device, check_size, checked_fraction, checked_options, checked_weights, smaller_sum
from .certificate import Finished, keeps_promises
from .dykstra import solve_dykstra
from .gradients import ImplicitPlan, envelope_cost
from .newton import solve_newton
from .paper import printed_algorithm
from .plan import TransportPlan
from .problem import Kernel, Problem, Scaling, domain_for

__all__ = ["partial_optimal_transport"]

DEFAULT_ITERATIONS = {"dykstra": 20_000, "paper": 1_000}
NEWTON_STEPS = 100
LARGEST_RELATIVE_RANGE = 1e4  # of (max C - min C) / reg: beyond it float64 log potentials lose the fourth digit
FULL = {torch.float32: 1e-6, torch.float64: 1e-12}  # a mass closer to everything than this is everything
COARSEST = 20.0  # range of the cost in temperatures from which the way down begins, in halves
COARSE, COARSE_STEPS = 1e-3, 30  # how well, and in how many Newton steps, the higher temperatures are solved
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
    check: bool | None = None,
) -> TransportPlan:
    """Moves a fraction of the mass between two weighted sets at the least cost, for a stack of problems at once.

        min <T, C> + reg Σ T (log T - 1)   over   T >= 0,  T 1 <= a,  T' 1 <= b,  Σ T = mass · min(Σ a, Σ b)

    Equations (7) and (8) of the READ-PVLA paper with entropy, after Benamou et al. (2015); `mass=1` with equal totals
    is balanced entropic transport.

    Args:
        cost: (..., N, M), finite except on padding. Half precision is solved in float32.
        mass: fraction of the smaller side to move, in (0, 1]; a float, or a tensor that broadcasts to (...).
        reg: temperature of the entropy, in units of the cost, > 0.
        row_weights: (..., N) capacities a >= 0; default 1 / (number of real rows).
        col_weights: (..., M) capacities b >= 0; default 1 / (number of real columns).
        marginals: "uniform", or "count": every real row and column has the capacity 1, so that a row goes to at most
            one column.
        penalty: a reward per unit of mass, in units of the cost. The mass is then an outcome: `mass` is not used, and
            reg·KL(T | a b' · min(Σa, Σb) / (Σa Σb)) takes the place of the entropy.
        row_mask: (..., N), 0 = padding; any dtype. Masks and weights broadcast over the leading shape.
        col_mask: (..., M), likewise.
        method: the algorithm. "newton" (in torch, any device with float64), "dykstra" (the plain reference), "paper"
            (Algorithm 1 as printed: moves the whole mass 1, ignores `mass` and `tol`), "exact" (no entropy; POT), or
            "auto": Newton's dual by the fastest implementation that is installed and fits; `use_backend` steers which.
        tol: relative accuracy asked of the cost.
        max_iter: at most so many Newton steps or sweeps; the default depends on the method.
        gradient: "envelope": ∂cost/∂C = T, the exact gradient of the regularised value; "implicit": the exact
            gradient of <T, C> itself, and a differentiable plan; "unrolled": automatic differentiation through the
            sweeps of "dykstra" or "paper", and the only one with second derivatives; of the others they are an error.
        check: whether to look at values before solving, which waits for a device. By default on the CPU only; what
            is wrong on a device then shows in its result: NaN in `cost` and `plan`, False in `converged`.

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
    chosen = checked_options(method, gradient, marginals, tol, max_iter, reg, penalty)
    tol, penalty = float(tol), None if penalty is None else float(penalty)  # numpy's are not what kernels take
    if not isinstance(cost, Tensor) or cost.dim() < 2 or not cost.is_floating_point():
        raise ValueError("cost must be a floating-point tensor of shape (..., N, M).")
    check_device(cost.device)
    leading, (n_rows, n_cols) = cost.shape[:-2], cost.shape[-2:]
    with torch.autocast(cost.device.type, enabled=False):
        matrix = cost if cost.dtype == torch.float64 else cost.float()
        if not matrix.numel():
            return _nothing(matrix, leading)
        fused = chosen == "auto" and tol > 1e-6 and fast.runs_kernel(matrix)
        check = (not fused if check is None else check) or (cost.device.type == "cpu" and not fused)
        matrix = matrix.reshape(-1, n_rows, n_cols)
        rows, bad_rows = checked_weights(
            "row", row_weights, row_mask, marginals, (*leading, n_rows), cost.device, check
        )
        cols, bad_cols = checked_weights(
            "col", col_weights, col_mask, marginals, (*leading, n_cols), cost.device, check
        )
        even_rows, even_cols = row_mask is None and row_weights is None, col_mask is None and col_weights is None
        padded = not (even_rows and even_cols)
        if padded and (check or not fused or gradient == "implicit"):  # the kernel does not look at padding
            matrix = torch.where((rows > 0)[:, :, None] & (cols > 0)[:, None, :], matrix, 0)
        fraction, bad_mass = checked_fraction(mass, leading, cost.device, check)
        if chosen == "paper":
            fraction, bad_mass = 1.0, None
        counted = marginals == "count"
        row_sums: float | Tensor = (n_rows if counted else 1.0) if even_rows else rows.sum(-1)
        col_sums: float | Tensor = (n_cols if counted else 1.0) if even_cols else cols.sum(-1)
        unit = None
        if row_weights is not None or col_weights is not None:
            # Weights of any size: the plan of a hundredth of all weights is a hundredth of the plan.
            unit = torch.as_tensor(smaller_sum(row_sums, col_sums))
            unit = torch.where(unit > 0, unit, 1).log2().floor().exp2()
            rows, cols = rows / unit[:, None], cols / unit[:, None]
            row_sums, col_sums = row_sums / unit, col_sums / unit
        total = fraction * smaller_sum(row_sums, col_sums)
        if not isinstance(total, Tensor):
            total = rows.new_full(rows.shape[:1], total)
        if check:
            check_size(total if unit is None else total * unit, matrix, penalty)
        if fused:
            if check and not bool(matrix.isfinite().all()):
                raise ValueError(NOT_FINITE)
            finished, n_iter = _by_kernel(matrix, rows, cols, total, float(reg), penalty, padded, tol, gradient)
        else:
            finished, n_iter = _by_method(
                matrix, rows, cols, total, row_sums, col_sums, float(reg), penalty, padded, chosen, tol, max_iter,
                gradient,
            )  # fmt: skip
        bad = [entries for entries in (bad_rows, bad_cols, bad_mass) if entries is not None]
        poison = torch.stack(bad).any(0) if bad else None
        return _result(matrix, finished, n_iter, unit, poison, leading, warn=check and chosen != "paper")


NOT_FINITE = "cost must be finite on every real row and column, got NaN or infinity."
Solved = tuple[Finished, Tensor]  # the plans, which carry the gradient asked for, and the iterations (P,)


def _by_kernel(
    matrix: Tensor, rows: Tensor, cols: Tensor, total: Tensor, reg: float, penalty: float | None, padded: bool,
    tol: float, gradient: str,
) -> Solved:  # fmt: skip
    """By the fused kernels, without synchronising with the host."""
    from .triton_finish import finish_fused
    from .triton_kernels import solve_fused

    turned = matrix.shape[-2] < matrix.shape[-1]
    with torch.no_grad():
        given = (matrix.mT, cols, rows) if turned else (matrix, rows, cols)
        left, right, bounds, n_iter, done = solve_fused(
            given[0].contiguous(), given[1], given[2], total, reg, penalty, tol=tol * SAFETY
        )
        if turned:
            left, right = right, left
        finished = finish_fused(
            matrix.contiguous(), rows, cols, total, left, right, bounds, done, reg, penalty, tol=tol
        )
    if gradient == "implicit":
        unknown = finished.certificate.converged  # which side is taken whole is for other solvers to know
        problem = Problem(
            matrix, rows, cols, total, bounds[:, 0], bounds[:, 1], reg, penalty, 0.0, padded, unknown, unknown
        )
        finished = finished._replace(plan=ImplicitPlan.apply(matrix, finished.plan, left, right, problem))
    return finished, n_iter.long()


def _by_method(
    matrix: Tensor, rows: Tensor, cols: Tensor, total: Tensor, row_sums: float | Tensor, col_sums: float | Tensor,
    reg: float, penalty: float | None, padded: bool, method: str, tol: float, max_iter: int | None, gradient: str,
) -> Solved:  # fmt: skip
    """By the method named, and on the values."""
    flat = matrix.detach()
    exists = None
    if padded:
        valid = (rows > 0)[:, :, None] & (cols > 0)[:, None, :]
        low, high = (
            flat.masked_fill(~valid, math.inf).amin((-2, -1)),
            flat.masked_fill(~valid, -math.inf).amax((-2, -1)),
        )
        exists = (rows > 0).any(-1) & (cols > 0).any(-1)
        low, high = torch.where(exists, low, 0), torch.where(exists, high, 0)
    else:
        low, high = flat.amin((-2, -1)), flat.amax((-2, -1))
    span = _span(low, high, penalty) / reg
    if not math.isfinite(span):
        raise ValueError(NOT_FINITE)
    problem = Problem(
        matrix, rows, cols, total, low, high, reg, penalty, span=span, padded=padded,
        rows_full=_takes_all(total, row_sums, matrix.dtype, penalty),
        cols_full=_takes_all(total, col_sums, matrix.dtype, penalty),
    )  # fmt: skip
    if exists is None or bool(exists.all()):
        plan, scaling = _solved(problem, method, tol, max_iter, gradient)
    else:
        kept = (exists.nonzero()[:, 0],)
        some, of_some = _solved(problem.select(kept[0]), method, tol, max_iter, gradient)
        plan = torch.zeros_like(matrix).index_put(kept, some)
        scaling = Scaling(
            torch.full_like(rows, -math.inf).index_put(kept, of_some.log_left),
            torch.full_like(cols, -math.inf).index_put(kept, of_some.log_right),
            torch.zeros_like(total).long().index_put(kept, of_some.n_iter),
            torch.ones_like(exists).index_put(kept, of_some.converged),
        )
    # Whether a problem converged is computed from the plan, not taken from its solver.
    certificate, value = keeps_promises(problem, plan.detach(), scaling, tol)
    return Finished(plan, value.to(plan.dtype), certificate), scaling.n_iter


def _span(low: Tensor, high: Tensor, penalty: float | None) -> float:
    """The largest range of the real costs of a problem; a penalty counts as one more cost."""
    if penalty is not None:
        low, high = low.clamp_max(penalty), high.clamp_min(penalty)
    return float((high.double() - low.double()).amax())


def _takes_all(total: Tensor, weight_sum: float | Tensor, dtype: torch.dtype, penalty: float | None) -> Tensor:
    """Whether the total is all that one side has: (P,) bool."""
    return total >= weight_sum * (1 - FULL[dtype] if penalty is None else math.inf)


def _solved(problem: Problem, method: str, tol: float, max_iter: int | None, gradient: str) -> tuple[Tensor, Scaling]:
    """The plan, which carries the gradient that was asked for, and the scalings (of plans that have them)."""
    max_iter = DEFAULT_ITERATIONS.get(method, NEWTON_STEPS) if max_iter is None else max_iter
    if not len(problem.cost):
        nothing = problem.total.long()
        return problem.cost, Scaling(problem.rows, problem.cols, nothing, nothing > 0)
    if method != "exact" and problem.span > LARGEST_RELATIVE_RANGE:
        raise ValueError(
            f"reg={problem.reg} is too small for a cost that ranges over {problem.span * problem.reg:.6g}: "
            f"reg must be at least 1/{LARGEST_RELATIVE_RANGE:.0f} of that range. Scale the cost, raise reg, or use "
            'method="exact".'
        )
    with torch.set_grad_enabled(gradient == "unrolled" and torch.is_grad_enabled()):
        if method == "exact":
            plan = exact.solve_exact(problem).to(problem.cost)
            zeros = torch.zeros_like(problem.total).long()
            return plan, Scaling(_no_scaling(problem.rows), _no_scaling(problem.cols), zeros, zeros == 0)
        if method == "paper":
            return _paper(problem, tol, max_iter)
        at_least = problem.cost.dtype if tol > 1e-6 else torch.float64
        dtype, log_domain = domain_for(problem, at_least)
        # Every solver but Dykstra's works on the shorter side, as columns.
        tall = problem if problem.cost.shape[-2] >= problem.cost.shape[-1] or method == "dykstra" else problem.mT
        kernel = Kernel(tall, dtype, log_domain)
        if method == "dykstra":
            scaling = solve_dykstra(tall, kernel, tol=tol * SAFETY, max_iter=max_iter)
        else:
            solver = fast.solve_on_host(tall, kernel) if method == "auto" else solve_newton
            start = {"start": _from_above(tall)} if log_domain else {}
            scaling = solver(tall, kernel, tol=tol * SAFETY, max_iter=max_iter, **start)
        plan = kernel.plan(scaling.log_left, scaling.log_right).to(problem.cost.dtype)
        if tall is not problem:
            plan, scaling = plan.mT.contiguous(), scaling.mT
    if gradient == "implicit":
        plan = ImplicitPlan.apply(problem.cost, plan, scaling.log_left, scaling.log_right, problem)
    return plan, scaling


def _no_scaling(weights: Tensor) -> Tensor:
    return torch.full_like(weights, math.nan)


def _from_above(problem: Problem) -> Tensor:
    """Log column scalings to start from where the temperature is far below the range of the cost.

    The same problem is solved roughly at higher temperatures first, each half of the one before: a potential that is
    a thousand temperatures long would take Newton's bounded steps too long from nothing.
    """
    start, stretch = torch.zeros_like(problem.cols), 2.0 ** math.ceil(math.log2(problem.span / COARSEST))
    while stretch > 1:
        coarse = replace(problem, reg=problem.reg * stretch, span=problem.span / stretch)
        kernel = Kernel(coarse, torch.float64, True)
        coarse_right = solve_newton(coarse, kernel, tol=COARSE, max_iter=COARSE_STEPS, start=start).log_right
        start, stretch = torch.where(problem.cols > 0, coarse_right, 0) * 2, stretch / 2
    return start


def _paper(problem: Problem, tol: float, max_iter: int) -> tuple[Tensor, Scaling]:
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
    n_iter = torch.full_like(problem.total, max_iter).long()
    return plan, Scaling(_no_scaling(problem.rows), _no_scaling(problem.cols), n_iter, error <= tol)


def _result(
    matrix: Tensor, finished: Finished, n_iter: Tensor, unit: Tensor | None, poison: Tensor | None,
    leading: torch.Size, *, warn: bool,
) -> TransportPlan:  # fmt: skip
    """The result in the shape and the unit of what was given, NaN where that was wrong."""
    plan, value, (converged, mass, excess) = finished
    if unit is not None:
        plan = (plan.double() * unit[:, None, None]).to(plan.dtype)
        mass, excess = mass * unit, excess * unit
        value = None if value is None else (value.double() * unit).to(plan.dtype)
    if poison is not None:
        plan, converged = torch.where(poison[:, None, None], math.nan, plan), converged & ~poison
        value = None if value is None else torch.where(poison, math.nan, value)
    # A plan that carries a gradient brings its own part of the derivative.
    value = (plan * matrix).sum((-2, -1)) if plan.requires_grad else envelope_cost(matrix, plan, value)
    if warn and not bool(converged.all()):
        _warn_once(int((~converged).sum()), len(converged))
    shaped = [plan, value, mass.to(plan.dtype), n_iter, converged, excess.to(plan.dtype)]
    if len(leading) != 1:
        shaped = [one.reshape(leading + one.shape[1:]) for one in shaped]
    return TransportPlan(*shaped)


def _nothing(matrix: Tensor, leading: torch.Size) -> TransportPlan:
    """The answer to problems without rows or without columns."""
    zero = matrix.detach().new_zeros(leading)
    return TransportPlan(matrix.detach(), matrix.sum((-2, -1)), zero, zero.long(), zero == 0, zero.clone())


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
