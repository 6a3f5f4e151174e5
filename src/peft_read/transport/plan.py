"""What a transport solver returns: the plan, its cost, and how well it keeps its promises."""

from dataclasses import dataclass

from torch import Tensor

__all__ = ["TransportPlan"]


@dataclass(frozen=True)
class TransportPlan:
    """The solution of a stack of transport problems of any leading shape (...).

    Attributes:
        plan: (..., N, M), non-negative, exactly 0 on padding. Without a gradient under `gradient="envelope"`.
        cost: (...,), the transport cost Σ T·C (the entropy is not in it, and it is not divided by the mass);
            differentiable in the cost matrix.
        mass: (...,), the mass that the plan carries, Σ T.
        n_iter: (...,) int64, Newton steps, or sweeps of the other methods; 0 where there was nothing to transport.
        converged: (...,) bool, whether the solver's own test of the tolerance was met.
        marginal_error: (...,), by how much the plan exceeds a row or column weight at the worst place; 0 if nowhere.
    """

    plan: Tensor
    cost: Tensor
    mass: Tensor
    n_iter: Tensor
    converged: Tensor
    marginal_error: Tensor
