"""The linear program without entropy, by POT's network simplex: the reference, one problem at a time on the CPU.

An extra row and an extra column take up what stays where it is: they turn the partial problem into a balanced one
(Chapel, Alaya and Gasso 2020).
"""

import numpy as np
import torch
from torch import Tensor

from .problem import Problem

__all__ = ["solve_exact"]


def solve_exact(problem: Problem) -> Tensor:
    """The optimal plans, (P, N, M) float64 on the CPU.

    Raises:
        ImportError: if POT is not installed.
        RuntimeError: if the simplex does not finish.
    """
    try:
        import ot
    except ImportError as error:
        raise ImportError('method="exact" needs POT (`pip install POT`); the other methods do not.') from error
    plans = torch.zeros(problem.cost.shape, dtype=torch.float64)
    for number in range(len(plans)):
        rows, cols = problem.rows[number].cpu().numpy(), problem.cols[number].cpu().numpy()
        real_rows, real_cols = rows > 0, cols > 0
        cost = problem.cost[number].detach().cpu().double().numpy()[np.ix_(real_rows, real_cols)]
        rows, cols = rows[real_rows], cols[real_cols]
        staying_rows, staying_cols = _staying(problem, number, rows.sum(), cols.sum())
        extended = np.zeros((len(rows) + 1, len(cols) + 1))
        extended[:-1, :-1] = cost - (problem.penalty or 0.0)
        if problem.penalty is None:
            # More expensive than any two real cells: nothing goes from the extra row to the extra column.
            extended[-1, -1] = 2 * np.abs(cost).max() + 1
        sources, targets = np.append(rows, staying_rows), np.append(cols, staying_cols)
        targets *= sources.sum() / targets.sum()
        plan, log = ot.emd(sources, targets, extended, numItermax=10_000_000, log=True)
        if log["warning"] is not None:
            raise RuntimeError(f"POT's network simplex did not solve problem {number}: {log['warning']}")
        whole = np.zeros((len(real_rows), len(real_cols)))
        whole[np.ix_(real_rows, real_cols)] = plan[:-1, :-1]
        plans[number] = torch.from_numpy(whole)
    return plans


def _staying(problem: Problem, number: int, row_sum: float, col_sum: float) -> tuple[float, float]:
    """How much the extra row and the extra column hold: (weight of the extra row, weight of the extra column)."""
    if problem.penalty is not None:
        return col_sum, row_sum
    total = float(problem.total[number])
    return max(col_sum - total, 0.0), max(row_sum - total, 0.0)
