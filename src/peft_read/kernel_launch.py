"""Triton kernels launched with little time of the host.

A call of a Triton kernel asks anew what was compiled for such arguments, which takes longer than a narrow kernel runs.
Here a launch with the same sizes, dtypes and settings as an earlier one goes to the compiled kernel directly, by the
door that Triton's tutorials use for kernels that are compiled ahead.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["launch"]

BOOL, BYTES = torch.bool, torch.uint8
ALIGNMENT = 16  # of addresses, in bytes: what Triton compiles another kernel for
FIRST_VERSION = (3, 3)  # of Triton whose compiled kernels take the compile-time arguments too
MOST = 4096  # launches kept: sequences of ever new lengths are no reason to grow for ever
LAUNCHERS: dict[tuple[Any, ...], tuple[Callable[..., None], tuple[Any, ...]]] = {}


def launch(kernel: Any, grid: tuple[int, ...], *given: Any, **settings: Any) -> None:
    """Run a kernel on the device of its tensors.

    Args:
        kernel: a Triton kernel whose last arguments are compile-time settings.
        grid: the numbers of programs, at most three.
        given: the arguments before the settings: tensors, which are made contiguous, masks as bytes; numbers; None for
            a tensor that is absent and never read. The first one is a tensor.
        settings: the compile-time settings, `num_warps` and others of Triton's among them.
    """
    first = given[0]
    device = first.get_device()  # -1 on the CPU, in Triton's interpreter
    places, pointers, key = 0, [], [id(kernel), device, grid, *settings.values()]
    for one in given:
        kind = type(one)
        if kind is float:  # not compiled in
            pointers.append(one)
        elif kind is int:
            key.append(one)
            pointers.append(one)
        else:
            tensor: Tensor = first if one is None else one
            if not tensor.is_contiguous():
                tensor = tensor.contiguous()
            dtype = tensor.dtype
            pointers.append(tensor.view(BYTES) if dtype is BOOL else tensor)
            places |= tensor.data_ptr()
            key.append(dtype)
    with torch.cuda.device(device) if device >= 0 and device != torch.cuda.current_device() else nullcontext():
        known = LAUNCHERS.get(tuple(key)) if places % ALIGNMENT == 0 else None
        if known is not None:
            run, constants = known
            run(*pointers, *constants)
            return
        # Contractions of floats are no default of all versions of Triton.
        compiled = kernel[grid](*pointers, enable_fp_fusion=True, **settings)
        if places % ALIGNMENT == 0 and _can_be_kept(compiled):
            if len(LAUNCHERS) >= MOST:
                LAUNCHERS.clear()
            constants = tuple(settings[name] for name in kernel.arg_names if name in settings)
            LAUNCHERS[tuple(key)] = compiled[grid + (1,) * (3 - len(grid))], constants


def _can_be_kept(compiled: Any) -> bool:
    """Whether a launch has given its compiled kernel: not in the interpreter, and not in old versions."""
    return compiled is not None and _version() >= FIRST_VERSION and isinstance(compiled, _compiled_kernel())


@cache
def _version() -> tuple[int, ...]:
    import triton

    return tuple(int(part) for part in triton.__version__.split(".")[:2])


@cache
def _compiled_kernel() -> type:
    from triton.compiler import CompiledKernel

    return CompiledKernel
