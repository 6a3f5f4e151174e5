"""Which single pass runs a whole adapter, eager or inside `torch.compile`, on the CPU or on CUDA.

As in `operators.py`: the compiled pass of `one_pass.py` on the CPU, the Triton kernel on CUDA, and while torch.compile
traces the operator `peft_read::adapter`, which runs either of them. Second derivatives go to torch.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from . import one_pass
from .backends import LARGEST_FUSED_WIDTH, MOST_FUSED_THREADS
from .fast import Reference
from .operators import _are_plain, _interpreted, _is_exporting, _is_observed, _runs_kernels, _traced_backend

__all__ = ["adapter_fits", "adapter_in_one_pass"]

LARGEST_KERNEL_WIDTH = 16
HALF = (torch.bfloat16, torch.float16)


def adapter_fits(
    output: torch.Tensor,
    mask: torch.Tensor | None,
    down: nn.Module,
    cell: nn.Module,
    dropout: nn.Module,
    up: nn.Module,
) -> bool:
    """Whether O + GELU(RNN(O W_down)) W_up can be computed in one pass over O (B, T, d).

    Modules that something has hooked into, wrapped or replaced are called as
    modules.
    """
    if not torch.compiler.is_compiling():
        if not (output.is_cuda and _is_observed()) and _runs_kernels(output):
            return not _is_observed() and _kernel_takes(output, mask, down, cell, dropout, up)
        return one_pass.adapter_fits(output, mask, down, cell, dropout, up)
    backend = _traced_backend(output.device.type)
    if _is_exporting():
        return False
    if backend == "triton" and (output.device.type == "cuda" or _interpreted()):
        return _kernel_takes(output, mask, down, cell, dropout, up)
    return (
        backend == "numba"
        and output.device.type == "cpu"
        and output.dtype == torch.float32
        and _threads() <= MOST_FUSED_THREADS
        and _is_adapter(output, mask, down, cell, dropout, up, LARGEST_FUSED_WIDTH)
    )


def adapter_in_one_pass(
    output: torch.Tensor,
    down: nn.Linear,
    cell: Any,
    up: nn.Linear,
    state: torch.Tensor | None,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """O + GELU(RNN(O W_down)) W_up, and the states after each token.

    Args:
        output: O, (B, T, d).
        down: W_down.
        cell: the RNN.
        up: W_up.
        state: the state before the first token, (B, k), an earlier output of the recurrence, so that all of it is in
            [-1, 1]; zero if absent.
        mask: (B, T), True = a real token; every token is real if absent.

    Returns:
        (B, T, d) and (B, T, k).
    """
    if not torch.compiler.is_compiling() and not _runs_kernels(output):
        return one_pass.adapter_in_one_pass(output, down, cell, up, state, mask)
    arguments = (
        output, None if state is None else state.float(), mask, down.weight, down.bias, cell.weight_ih,
        cell.weight_hh, cell.bias_ih, cell.bias_hh, up.weight, up.bias,
    )  # fmt: skip
    if torch.compiler.is_compiling():
        out, _, hidden = torch.ops.peft_read.adapter(*arguments)
        return out, hidden
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in arguments):
        return _KernelAdapter.apply(cell.run_in_torch, *arguments)
    out, _, hidden = _by_kernel(*arguments)
    return out, hidden


def _kernel_takes(output: torch.Tensor, mask: Any, down: Any, cell: Any, dropout: Any, up: Any) -> bool:
    """Whether the Triton kernel's registers hold this adapter."""
    from .triton_adapter import registers_suffice

    return (
        (output.dtype == torch.float32 or output.dtype in HALF)
        and _is_adapter(output, mask, down, cell, dropout, up, LARGEST_KERNEL_WIDTH)
        and registers_suffice(output.shape[-1], down.out_features)
    )


def _is_adapter(
    output: torch.Tensor, mask: torch.Tensor | None, down: Any, cell: Any, dropout: Any, up: Any, widest: int
) -> bool:
    """Whether all parts are what they seem, and as wide as they say."""
    if not (
        type(down) is nn.Linear
        and type(up) is nn.Linear
        and getattr(cell, "kind", None) == "rnn"
        and not cell.bidirectional
        and (type(dropout) is nn.Identity or (type(dropout) is nn.Dropout and not dropout.training))
        and output.dim() == 3
        and output.is_contiguous()
        and output.numel() > 0
        and not torch.is_autocast_enabled(output.device.type)
    ):
        return False
    width, d = down.out_features, down.in_features
    if width > widest or output.shape[-1] != d or up.out_features != d:
        return False
    if mask is not None and (mask.shape != output.shape[:2] or mask.dtype != torch.bool):
        return False
    for module in (down, cell, dropout, up):
        if one_pass._is_watched(module):
            return False
    weights = (
        down.weight, down.bias, cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh, up.weight, up.bias,
    )  # fmt: skip
    shapes = ((width, d), (width,), (width, width), (width, width), (width,), (width,), (d, width), (d,))
    for weight, shape in zip(weights, shapes, strict=True):
        if weight is not None and (
            weight.shape != shape or weight.dtype != torch.float32 or weight.device != output.device
        ):
            return False
    return (
        _are_plain(output, mask, *weights)
        and (down.bias is None) == (up.bias is None)
        and (cell.bias_ih is None) == (cell.bias_hh is None)
    )


@torch.compiler.assume_constant_result
def _threads() -> int:
    return torch.get_num_threads()


def _by_kernel(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from .triton_adapter import adapter_forward

    return adapter_forward(*arguments)


class _KernelAdapter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, reference: Reference, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.reference = reference
        out, narrow, hidden = _by_kernel(*arguments)
        ctx.save_for_backward(*arguments, narrow, hidden)
        ctx.set_materialize_grads(False)
        return out, hidden

    @staticmethod
    def backward(ctx: Any, grad: Any, grad_hidden: Any) -> tuple[Any, ...]:
        from .triton_adapter import adapter_gradients

        saved, needs = ctx.saved_tensors, ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():  # somebody wants second derivatives
            x, *rest = saved[:11]
            found = one_pass._adapter_in_torch(ctx.reference, x.float(), *rest)
            found = found[0].to(x.dtype), found[1]
            pairs = zip(found, (grad, grad_hidden), strict=True)
            results, grads = zip(*((one, grad) for one, grad in pairs if grad is not None), strict=True)
            leaves = [one for one, need in zip(saved, needs, strict=False) if need]
            seconds = iter(torch.autograd.grad(results, leaves, grads, create_graph=True, allow_unused=True))
            return None, *(next(seconds) if need else None for need in needs)
        return None, *adapter_gradients(grad, grad_hidden, saved, needs)


ARGUMENTS = (
    "Tensor x, Tensor? state, Tensor? mask, Tensor down, Tensor? down_bias, Tensor weight_ih, Tensor weight_hh, "
    "Tensor? bias_ih, Tensor? bias_hh, Tensor up, Tensor? up_bias"
)


@torch.library.custom_op(
    "peft_read::adapter", mutates_args=(), schema=f"({ARGUMENTS}) -> (Tensor out, Tensor narrow, Tensor hidden)"
)
def _adapter_operator(*arguments: Any) -> Any:
    run = _by_kernel if _runs_kernels(arguments[0]) else one_pass._adapter
    return tuple(one.contiguous() for one in run(*arguments))


@_adapter_operator.register_fake
def _(x: Any, state: Any, mask: Any, down: Any, *others: Any) -> Any:
    narrow = down.new_empty(x.shape[0], x.shape[1], down.shape[0])
    return x.new_empty(x.shape), narrow, torch.empty_like(narrow)


@torch.library.custom_op(
    "peft_read::adapter_backward",
    mutates_args=(),
    schema=f"(bool[] needs, Tensor? grad, Tensor? grad_hidden, {ARGUMENTS}, Tensor narrow, Tensor hidden) -> Tensor[]",
)
def _adapter_backward_operator(needs: list[bool], grad: Any, grad_hidden: Any, *saved: Any) -> Any:
    if _runs_kernels(saved[0]):
        from .triton_adapter import adapter_gradients

        found = adapter_gradients(grad, grad_hidden, saved, needs)
        if needs[7] and needs[8]:
            found = (*found[:8], found[8].clone(), *found[9:])  # type: ignore[union-attr]
    else:
        context = SimpleNamespace(saved_tensors=saved, needs_input_grad=(False, *needs))
        with torch.no_grad():
            found = one_pass._Adapter.backward(context, grad, grad_hidden)[1:]
    # An operator may not return views, and nothing twice.
    return [one.clone() if one._is_view() else one for one in found if one is not None]


@_adapter_backward_operator.register_fake
def _(needs: Any, grad: Any, grad_hidden: Any, *saved: Any) -> Any:
    return [one.new_empty(one.shape) for one, need in zip(saved, needs, strict=False) if need]


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    ctx.save_for_backward(*inputs, *output[1:])
    ctx.set_materialize_grads(False)


def _operator_backward(ctx: Any, grad: Any, grad_narrow: Any, grad_hidden: Any) -> tuple[Any, ...]:
    needs = list(ctx.needs_input_grad)
    found = iter(torch.ops.peft_read.adapter_backward(needs, grad, grad_hidden, *ctx.saved_tensors))
    return tuple(next(found) if need else None for need in needs)


_adapter_operator.register_autograd(_operator_backward, setup_context=_keep_for_backward)
