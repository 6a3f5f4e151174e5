"""Which solver answers a stack of problems fastest here: compiled loops, a fused kernel, or plain torch."""

import importlib.util
import logging
import os
import threading
from collections.abc import Callable
from functools import cache

import torch

from .newton import solve_newton
from .problem import Kernel, Problem, Scaling

__all__ = ["solver_for", "warm_up"]

logger = logging.getLogger(__name__)
Solver = Callable[..., Scaling]
LARGEST_FUSED_SIDE = 1024  # the vectors of a problem stay in registers


def solver_for(method: str, problem: Problem, kernel: Kernel) -> Solver:
    """The solver to call for "auto", "newton", "numba" or "triton".

    Raises:
        ImportError: where a fast path that was asked for by name is not installed.
        ValueError: where it does not fit the problem.
    """
    if method == "newton":
        return solve_newton
    if method == "numba":
        if not is_installed("numba"):
            raise ImportError('method="numba" needs numba (`pip install "peft-read[fast]"`); "newton" does not.')
        if not _numba_fits(problem, kernel):
            raise ValueError(
                'method="numba" works on the CPU, in float32, and where (max cost - min cost) / reg is at most 42; '
                'use method="newton".'
            )
        from .compiled import solve_compiled

        return solve_compiled
    if method == "triton" or (problem.cost.is_cuda and _triton_fits(problem, kernel) and is_installed("triton")):
        if not is_installed("triton"):
            raise ImportError('method="triton" needs triton (it comes with torch for CUDA); "newton" does not.')
        if not _triton_fits(problem, kernel):
            raise ValueError(
                'method="triton" works on CUDA, in float32, on sides up to 1024, and where (max cost - min cost) / '
                'reg is at most 42; use method="newton".'
            )
        from .triton import solve_fused

        return solve_fused
    if _numba_fits(problem, kernel) and is_installed("numba"):
        return _numba_once_compiled() or solve_newton
    return solve_newton


def warm_up() -> None:
    """Waits until the compiled loops for the CPU are there, so that `auto` makes the same choice from now on.

    Training calls it once: with loops that arrive in the middle of a run, a resumed run, or another process of the
    same run, would differ from an uninterrupted one in the last digits. Without numba it does nothing. The first call
    on a machine compiles for some seconds, later ones load.
    """
    if not is_installed("numba"):
        return
    from . import compiled

    if compiled.is_ready():
        return
    with _lock:
        for thread in _threads:
            thread.join()
        if not compiled.is_ready():
            logger.warning("compiling the transport loops, once for this installation (some 20 seconds)")
            compiled.compile_now()


@cache
def is_installed(package: str) -> bool:
    """Whether a package can be imported."""
    return importlib.util.find_spec(package) is not None


def _numba_fits(problem: Problem, kernel: Kernel) -> bool:
    return problem.cost.device.type == "cpu" and kernel.dtype == torch.float32 and not kernel.log_domain


def _triton_fits(problem: Problem, kernel: Kernel) -> bool:
    on_device = problem.cost.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"  # the interpreter runs on the CPU
    fits = max(problem.cost.shape[-2:]) <= LARGEST_FUSED_SIDE
    return on_device and fits and kernel.dtype == torch.float32 and not kernel.log_domain


def _numba_once_compiled() -> Solver | None:
    """The numba solver, unless that would keep the caller waiting for a compiler.

    Compiling takes many seconds, once per machine: numba keeps the machine code beside the package. Where it is
    there, it is used from the first call on. Where it is not, a thread compiles it, and torch answers until then. It
    is no daemon: a process that ends early waits for it, instead of pulling the compiler down under its feet.
    """
    from . import compiled

    if compiled.is_ready():
        return compiled.solve_compiled
    with _lock:
        if not _threads:
            _threads.append(threading.Thread(target=compiled.compile_now, name="peft_read-compile"))
            _threads[0].start()
    return None


_lock = threading.Lock()
_threads: list[threading.Thread] = []
