"""One stack of transport problems in the form that every solver takes, and the Gibbs kernel they iterate with."""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["Kernel", "Problem", "Scaling"]

# exp(-range/reg) has to stay representable squared: a potential may be as large as the range itself. float32 reaches
# exp(-87), float64 exp(-708).
_EXP_RANGE = {torch.float32: 42.0, torch.float64: 340.0}


@dataclass(frozen=True)
class Problem:
    """min <T, C> + reg Σ T (log T - 1) over T >= 0, T 1 <= rows, T' 1 <= cols, Σ T = total.

    P problems at once. With a `penalty` the total is free and reg·KL(T | reference) - penalty·Σ T takes the place of
    the entropy, where the reference is the independent plan rows ⊗ cols scaled to the largest feasible mass.

    Attributes:
        cost: (P, N, M), float32 or float64, finite everywhere, 0 on padding.
        rows: (P, N) float64 weights, 0 on padding.
        cols: (P, M) float64 weights, 0 on padding.
        total: (P,) float64, the mass to move; ignored with a penalty.
        low: (P,) the smallest real cost; high: (P,) the largest.
        reg: the entropic temperature.
        penalty: the reward per unit of mass, or None.
        span: the largest (high - low) / reg, the penalty counted as one more cost.
        padded: whether any row or column is padding (or has no weight).
        rows_full: (P,) bool, the total takes everything that the rows have, so that T 1 = rows.
        cols_full: (P,) bool, likewise for the columns. Both at once is balanced transport.
    """

    cost: Tensor
    rows: Tensor
    cols: Tensor
    total: Tensor
    low: Tensor
    high: Tensor
    reg: float
    penalty: float | None
    span: float
    padded: bool
    rows_full: Tensor
    cols_full: Tensor

    @property
    def mT(self) -> "Problem":
        """The same problems with rows and columns exchanged."""
        return replace(
            self,
            cost=self.cost.mT.contiguous(),  # once, not in every pass
            rows=self.cols,
            cols=self.rows,
            rows_full=self.cols_full,
            cols_full=self.rows_full,
        )

    def select(self, index: Tensor) -> "Problem":
        """Some of the problems."""
        stacked = ("cost", "rows", "cols", "total", "low", "high", "rows_full", "cols_full")
        return replace(self, **{name: getattr(self, name)[index] for name in stacked})

    def log_reference(self) -> tuple[Tensor, Tensor]:
        """The logarithms of what K carries besides the cost, (P, N) and (P, M); 0 without a penalty."""
        if self.penalty is None:
            return torch.zeros_like(self.rows), torch.zeros_like(self.cols)
        row_sum, col_sum = self.rows.sum(-1, keepdim=True), self.cols.sum(-1, keepdim=True)
        return (
            finite_log(self.rows / torch.maximum(row_sum, col_sum)),
            finite_log(self.cols) + self.penalty / self.reg,
        )


@dataclass(frozen=True)
class Scaling:
    """A solution in scaling form, T = diag(exp log_left) K diag(exp log_right), with its record.

    Attributes:
        log_left: (P, N) float64, the row scaling times the mass scaling; -inf on padding.
        log_right: (P, M) float64, the column scaling; -inf on padding.
        n_iter: (P,) int64. converged: (P,) bool.
    """

    log_left: Tensor
    log_right: Tensor
    n_iter: Tensor
    converged: Tensor

    @property
    def mT(self) -> "Scaling":
        """The solution of the transposed problems."""
        return replace(self, log_left=self.log_right, log_right=self.log_left)


class Kernel:
    """K = exp(-(C - low) / reg), zero on padding: the only thing that an iteration asks of the cost.

    In the exponential domain K is stored, by rows and by columns (a vector-matrix product along the stored order is
    several times faster than the other one). In the log domain -(C - low) / reg is stored instead, and every sum is
    a log-sum-exp: slower, but exact for any range of the cost.

    Args:
        problem: the problems.
        dtype: of the matrix, float32 or float64.
        log_domain: whether to keep logarithms.
    """

    def __init__(self, problem: Problem, dtype: torch.dtype, log_domain: bool) -> None:
        self.dtype, self.log_domain = dtype, log_domain
        matrix = self.exponents(problem, dtype)
        self.by_rows = (matrix if log_domain else matrix.exp_()).contiguous()

    @staticmethod
    def exponents(problem: Problem, dtype: torch.dtype) -> Tensor:
        """-(C - low) / reg with what a penalty adds, -inf on padding, (P, N, M)."""
        wide = dtype if 1e-30 < problem.reg < 1e30 else torch.float64  # float32 cannot hold 1 / reg
        low = problem.low.to(wide)[:, None, None]
        # In place: fresh memory for each product would cost more than the product.
        matrix = (low - problem.cost.to(wide)).mul_(1 / problem.reg).to(dtype)
        if problem.penalty is not None:
            left, right = problem.log_reference()
            # The shift by `low` has to be paid back here: under a penalty the scale of K is the answer.
            matrix = matrix + (
                left[:, :, None] + (right - (problem.low.double() / problem.reg)[:, None])[:, None, :]
            ).to(dtype)
        if problem.padded:
            valid = (problem.rows > 0)[:, :, None] & (problem.cols > 0)[:, None, :]
            matrix = torch.where(valid, matrix, -math.inf)
        return matrix

    @cached_property
    def by_cols(self) -> Tensor:
        """The transpose, stored as such, (P, M, N)."""
        return self.by_rows.mT.contiguous()

    def select(self, index: Tensor) -> "Kernel":
        """The kernel of some of the problems."""
        part = object.__new__(Kernel)
        part.dtype, part.log_domain = self.dtype, self.log_domain
        part.by_rows = self.by_rows[index]
        if "by_cols" in vars(self):
            part.by_cols = self.by_cols[index]
        return part

    def log_row_sums(self, log_right: Tensor) -> Tensor:
        """The log of K v for log v of shape (P, M): (P, N) float64."""
        return _log_product(log_right, self.by_cols, self.log_domain)

    def log_col_sums(self, log_left: Tensor) -> Tensor:
        """The log of K' u for log u of shape (P, N): (P, M) float64."""
        return _log_product(log_left, self.by_rows, self.log_domain)

    def plan(self, log_left: Tensor, log_right: Tensor, index: Tensor | None = None) -> Tensor:
        """diag(u) K diag(v) of all or of some problems, (P, N, M) in the dtype of the kernel."""
        matrix = self.by_rows if index is None else self.by_rows[index]
        left, right = log_left.to(matrix.dtype), log_right.to(matrix.dtype)
        if self.log_domain:
            return (matrix + left[:, :, None] + right[:, None, :]).exp()
        return (matrix * left.exp()[:, :, None]).mul_(right.exp()[:, None, :])


def _log_product(log_vector: Tensor, matrix: Tensor, log_domain: bool) -> Tensor:
    """log(Σ_k exp(log_vector_k) A_kl) for every problem, (P, K), (P, K, L) -> (P, L)."""
    # What is nothing, as on padding, has no gradient, where that of its logarithm is not a number.
    if log_domain:
        terms = matrix + log_vector.to(matrix.dtype)[:, :, None]
        if not torch.is_grad_enabled():
            return terms.logsumexp(1).double()
        nothing = (terms == -math.inf).all(1)
        return torch.where(nothing, -math.inf, torch.where(nothing[:, None], 0, terms).logsumexp(1)).double()
    product = (log_vector.exp().to(matrix.dtype)[:, None, :] @ matrix)[:, 0].double()
    return product.log() if not torch.is_grad_enabled() else torch.where(product > 0, finite_log(product), -math.inf)


def finite_log(weights: Tensor) -> Tensor:
    """The log where it exists, 0 where the weight is 0 (those places are padding, and masked everywhere)."""
    return torch.where(weights > 0, weights, 1).log()


def domain_for(problem: Problem, at_least: torch.dtype) -> tuple[torch.dtype, bool]:
    """The cheapest (dtype, log_domain) in which the problems' range of cost over temperature is safe."""
    for dtype in (torch.float32, torch.float64):
        if problem.span <= _EXP_RANGE[dtype] and (dtype == at_least or dtype == torch.float64):
            return dtype, False
    return torch.float64, True
