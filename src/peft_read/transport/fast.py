"""Which solver answers a stack of problems here: compiled loops, a fused kernel, or plain torch."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

from .. import backends
from .newton import solve_newton
from .problem import Kernel, Problem, Scaling

__all__ = ["LARGEST_FUSED_SIDE", "runs_kernel", "solve_on_host"]

LARGEST_FUSED_SIDE = 1024  # the vectors of a problem stay in registers
Solver = Callable[..., Scaling]


def runs_kernel(cost: Tensor) -> bool:
    """Whether the Triton kernel solves problems (..., N, M): on CUDA, or with TRITON_INTERPRET=1 on the CPU."""
    if backends.backend(cost.device.type) != "triton":
        return False
    refusal = ""
    if not cost.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        refusal = "its tensors are on the CPU"
    elif cost.dtype == torch.float64:
        refusal = "it is float64"
    elif max(cost.shape[-2:]) > LARGEST_FUSED_SIDE:
        refusal = f"a side is longer than {LARGEST_FUSED_SIDE}"
    if refusal:
        backends.refuse("transport problem", "triton", refusal)
        return False
    device = cost.device
    return backends.passes(("triton transport", device), lambda: _try_kernel(device))


def solve_on_host(problem: Problem, kernel: Kernel) -> Solver:
    """The solver for problems whose values may be looked at: the compiled loops, or torch."""
    if backends.backend(problem.cost.device.type) != "numba":
        return solve_newton
    refusal = ""
    if problem.cost.device.type != "cpu":
        refusal = "its tensors are not on the CPU"
    elif kernel.dtype != torch.float32:
        refusal = (
            "it is float64" if problem.cost.dtype == torch.float64 else "it ranges over more than 42 temperatures"
        )
    if refusal:
        backends.refuse("transport problem", "numba", refusal)
    elif backends.passes(("numba transport",), _try_loops):
        from .numba_kernels import solve_compiled

        return solve_compiled
    return solve_newton


def _example(device: torch.device) -> Problem:
    """Two small problems whose answer is known."""
    cost = torch.tensor([[[0.0, 1.0], [1.0, 0.2], [0.5, 0.5]]], device=device).expand(2, 3, 2).contiguous()
    rows, cols = cost.new_full((2, 3), 1 / 3).double(), cost.new_full((2, 2), 1 / 2).double()
    total = torch.tensor([0.5, 0.9], dtype=torch.float64, device=device)
    no = torch.zeros(2, dtype=torch.bool, device=device)
    return Problem(cost, rows, cols, total, cost.amin((1, 2)), cost.amax((1, 2)), 0.05, None, 20.0, False, no, no)


def _try_loops() -> str:
    from . import numba_kernels

    problem = _example(torch.device("cpu"))
    kernel = Kernel(problem, torch.float32, False)
    with backends.compiling("the transport loops", numba_kernels.solve_all):
        scaling = numba_kernels.solve_compiled(problem, kernel, tol=1e-5, max_iter=20)
    return _compare(problem, kernel, scaling)


def _try_kernel(device: torch.device) -> str:
    from .triton_kernels import solve_fused

    problem = _example(device)
    left, right, _, n_iter, done = solve_fused(
        problem.cost, problem.rows, problem.cols, problem.total, problem.reg, None, tol=1e-5
    )
    scaling = Scaling(left, right, n_iter.long(), done > 0)
    return _compare(problem, Kernel(problem, torch.float32, False), scaling)


def _compare(problem: Problem, kernel: Kernel, scaling: Scaling) -> str:
    known = solve_newton(problem, kernel, tol=1e-6, max_iter=50)
    plans = [kernel.plan(solution.log_left, solution.log_right) for solution in (scaling, known)]
    close = bool(((plans[0] - plans[1]).abs() <= 1e-4).all())  # false of a NaN too
    return "" if close and bool(scaling.converged.all()) else "its plan differs from that of torch"
