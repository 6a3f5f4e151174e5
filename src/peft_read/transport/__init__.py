"""Partial optimal transport, batched and masked: costs, solvers, and the plan they return."""

from .costs import cosine_cost, squared_euclidean_cost
from .masks import real_entries
from .partial import partial_optimal_transport
from .plan import TransportPlan

__all__ = [
    "TransportPlan",
    "cosine_cost",
    "partial_optimal_transport",
    "real_entries",
    "squared_euclidean_cost",
]
