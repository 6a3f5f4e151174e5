"""Algorithm 1 of the paper as it is printed, with its line numbers.

    Require: C, temperature τ, a, b, s, N_iter
     1  L_PVLA = ∞
     2  for s = 1 to min(N_L, N_V) do
     3      T = exp(-C / τ)
     4      T = T / (1' T 1)
     5      for i = 1 to N_iter do
     6          p_a = min(a / (T 1), 1)
     7          T_a = diag(p_a) T
     8          p_b = min(b / (T_a' 1), 1)
     9          T_b = diag(p_b) T_a
    10          T = T_b / (1' T_b 1)
    11      end for
    12      L_PVLA = min(L_PVLA, Σ T_ij C_ij)
    13  end for

`s` does not occur between lines 3 and 12, so that every pass of the loop computes the same bits: one pass is the whole
algorithm. And with Σa = Σb = 1 the three projections meet only in the balanced plans: what it converges to, slowly,
is entropic transport of the whole mass.
"""

import torch
from torch import Tensor

__all__ = ["printed_algorithm"]


def printed_algorithm(cost: Tensor, rows: Tensor, cols: Tensor, reg: float, n_iter: int) -> Tensor:
    """Lines 3 to 11 for a stack of problems.

    Args:
        cost: (P, N, M) C, finite on padding.
        rows: (P, N) a, in the dtype of the cost; 0 on padding.
        cols: (P, M) b.
        reg: the temperature τ.
        n_iter: N_iter.

    Returns:
        (P, N, M) the plan T, of total 1, exactly 0 on padding.
    """
    tiny = torch.finfo(cost.dtype).tiny  # an empty row is padding: 0 / tiny instead of 0 / 0
    valid = (rows > 0)[:, :, None] & (cols > 0)[:, None, :]
    plan = torch.where(valid, torch.exp(-cost / reg), 0)  # 3
    plan = plan / plan.sum((-2, -1), keepdim=True)  # 4
    for _ in range(n_iter):  # 5
        row_scale = (rows / plan.sum(-1).clamp_min(tiny)).clamp_max(1)  # 6
        plan = row_scale[:, :, None] * plan  # 7
        col_scale = (cols / plan.sum(-2).clamp_min(tiny)).clamp_max(1)  # 8
        plan = plan * col_scale[:, None, :]  # 9
        plan = plan / plan.sum((-2, -1), keepdim=True)  # 10
    return plan
