"""A trial of the Triton kernels on the GPU at hand, before they are chosen by themselves."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["kernels_work"]

TOLERANCE = 1e-2  # relative; cuBLAS may round to TF32 on either side, a wrong kernel is off by far more


@cache
def kernels_work(device: str = "cuda") -> bool:
    """Whether every kernel gives torch's values and gradients on a small masked problem; warns where one does not.

    Runs once a process, which compiles the kernels the first time. Random numbers of the process are not used up.
    """
    try:
        wrong = _find_wrong(device)
    except Exception as error:
        wrong = f"{type(error).__name__}: {error}"
    if wrong:
        warnings.warn(
            f"READ's Triton kernels do not work here ({wrong}); the recurrence runs on torch's own, with the same "
            'results but slower. use_backend("torch") or PEFT_READ_RECURRENCE=torch silences this.',
            stacklevel=2,
        )
    return not wrong


def _find_wrong(device: str) -> str:
    """The first kernel that disagrees with torch, or nothing."""
    from . import adapter_operator, one_pass, operators
    from .cells import CELLS

    with _disable_current_modes(), torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mask = torch.ones(3, 5, dtype=torch.bool)
        mask[0, 2], mask[1, :2], mask[2, 3:] = False, False, False
        for kind in operators.GATES:
            cell: Any = CELLS[kind](4)
            leaves = _on(device, torch.randn(3, 5, 4), torch.randn(3, cell.state_size), *cell.parameters())
            x, state, *weights = leaves
            arguments = (x, state, mask.to(device), *weights)
            found = operators._KernelScan.apply(kind, cell.run_in_torch, *arguments)[:1]
            if _differ(found, cell.run_in_torch(x, state, weights, arguments[2])[:1], leaves):
                return f"the scan of the {kind.upper()} is wrong"
        cell, down, up = CELLS["rnn"](4), torch.nn.Linear(16, 4), torch.nn.Linear(4, 16)
        weights = [p for module in (down, cell, up) for p in module.parameters()]
        leaves = _on(device, torch.randn(3, 5, 16), torch.randn(3, 4).tanh(), *weights)
        arguments = (*leaves[:2], mask.to(device), *leaves[2:])
        found = adapter_operator._KernelAdapter.apply(cell.run_in_torch, *arguments)
        if _differ(found, one_pass._adapter_in_torch(cell.run_in_torch, *arguments), leaves):
            return "the pass over the whole adapter is wrong"
    return ""


def _on(device: str, *tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.detach().to(device).requires_grad_() for tensor in tensors]


def _differ(found: Any, known: Any, leaves: list[torch.Tensor]) -> bool:
    """Whether values or gradients are further apart than rounding brings them."""
    probes = [torch.linspace(-1, 1, one.numel(), device=one.device).view(one.shape) for one in known]
    both = []
    for outputs in (found, known):
        total = torch.stack([(one * probe).sum() for one, probe in zip(outputs, probes, strict=True)]).sum()
        both.append([*outputs, *torch.autograd.grad(total, leaves)])
    return any(
        not bool((ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max().clamp_min(1e-3))  # false of a NaN too
        for ours, theirs in zip(*both, strict=True)
    )
