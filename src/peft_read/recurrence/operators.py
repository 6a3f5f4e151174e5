"""Which loops run a recurrence, eager or inside `torch.compile`, on the CPU or on CUDA.

* Eager on the CPU: the compiled loops of `fast.py`.
* Eager on CUDA: the Triton kernels.
* While torch.compile traces: the operator `peft_read::scan`, which is one node of the graph and runs either of them.

What fits none of these goes to torch, as do second derivatives.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import functional as F

from . import backends, fast
from .backends import LARGEST_SCAN_WIDTH

__all__ = ["compiled_scan", "scan_fits"]

GATES = {"rnn": 1, "gru": 3, "lstm": 4}
LARGEST_GRID = 2**31 - 1


def scan_fits(
    kind: str,
    x: torch.Tensor,
    state: torch.Tensor | None,
    weights: fast.Weights,
    mask: torch.Tensor | None,
    keep_states: bool = True,
) -> bool:
    """Whether compiled loops or kernels should run a cell: "rnn", "gru" or "lstm" over x (B, T, I)."""
    if not torch.compiler.is_compiling():
        return fast.scan_fits(kind, x, state, weights, mask, keep_states) or _kernels_fit(kind, x, weights, mask)
    if kind not in GATES or x.dtype != torch.float32 or weights[1].shape[-1] > LARGEST_SCAN_WIDTH or _is_exporting():
        return False
    if not _are_plain(x, state, mask, *weights):
        return False
    backend = _traced_backend(x.device.type)
    if backend == "triton":
        return x.device.type == "cuda" or _interpreted()
    if backend != "numba" or x.device.type != "cpu":
        return False
    # Torch's own LSTM is one kernel; `fast.scan_fits` has the same rule.
    return kind != "lstm" or keep_states or (weights[1].shape[-1] <= fast.LARGEST_FUSED_WIDTH and x.shape[0] <= 8)


def compiled_scan(
    kind: str,
    x: torch.Tensor,
    state: torch.Tensor | None,
    weights: fast.Weights,
    mask: torch.Tensor | None,
    reference: fast.Reference,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a cell that fits.

    Args:
        kind: "rnn", "gru" or "lstm".
        x: (B, T, I).
        state: (B, S); zero if absent.
        weights: `weight_ih`, `weight_hh`, and with biases `bias_ih`, `bias_hh`.
        mask: (B, T) or None.
        reference: the same in torch, for second derivatives.

    Returns:
        The outputs (B, T, k) and, of the LSTM, the memories c_t (B, T, k); of the others the outputs again.
    """
    bias_ih, bias_hh = weights[2:] if len(weights) == 4 else (None, None)
    arguments = (x, state, mask, weights[0], weights[1], bias_ih, bias_hh)
    if torch.compiler.is_compiling():
        outputs, memories, _ = torch.ops.peft_read.scan(kind, *arguments)
        return outputs, memories if kind == "lstm" else outputs
    if not _runs_kernels(x):
        return fast.compiled_scan(kind, x, state, weights, mask, reference)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in arguments):
        outputs, memories = _KernelScan.apply(kind, reference, *arguments)
    else:
        outputs, memories, _ = _by_kernels(kind, *arguments)
    return outputs, outputs if memories is None else memories


def _kernels_fit(kind: str, x: torch.Tensor, weights: fast.Weights, mask: torch.Tensor | None) -> bool:
    """Whether the Triton kernels should run a cell in eager mode."""
    return (
        kind in GATES
        and not (x.is_cuda and _is_observed())  # first: choosing the kernels may start a trial of them
        and _runs_kernels(x)
        and weights[1].shape[-1] <= LARGEST_SCAN_WIDTH
        and x.shape[0] <= LARGEST_GRID
        and _are_plain(x, *weights)
        and all(tensor.dtype == torch.float32 and tensor.device == x.device for tensor in (x, *weights))
        and (mask is None or (mask.shape == x.shape[:2] and mask.dtype == torch.bool and mask.device == x.device))
        and not _is_observed()
    )


def _are_plain(*tensors: torch.Tensor | None) -> bool:
    """Whether none is of a subclass, such as DTensor, which an operator or kernel would not know."""
    for tensor in tensors:
        if tensor is not None and type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            return False
    return True


def _is_observed() -> bool:
    """Whether something else than eager autograd is looking on; `fast.py` asks the same."""
    return (
        torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.autograd.forward_ad._current_level >= 0
        or torch.jit.is_tracing()
    )


def _runs_kernels(x: torch.Tensor) -> bool:
    """Whether tensors of this kind are Triton's: on CUDA, or with TRITON_INTERPRET=1 on the CPU, to test them."""
    return backends.backend(x.device.type) == "triton" and (x.is_cuda or _interpreted())


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _is_exporting() -> bool:
    """An exported program must run where this package is not installed."""
    return getattr(torch.compiler, "is_exporting", lambda: False)()


def _traced_backend(device: str) -> str:
    """The backend while torch.compile traces: `use_backend` is guarded, what the process started with is constant."""
    if backends._forced is not None and backends._forced != "auto":
        return backends._forced
    return _settled_backend(device)


@torch.compiler.assume_constant_result
def _settled_backend(device: str) -> str:
    return backends.backend(device)


def _by_kernels(
    kind: str, x: torch.Tensor, state: torch.Tensor | None, mask: Any, weight_ih: Any, weight_hh: Any, bias_ih: Any,
    bias_hh: Any,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
    """The outputs, the memories of an LSTM, and the gates of a GRU or LSTM."""
    from .triton_scan import scan_forward

    bias = bias_ih if kind == "gru" or bias_ih is None else bias_ih + bias_hh
    state = _first_state(kind, x, state, weight_hh)
    return scan_forward(kind, F.linear(x, weight_ih, bias), weight_hh, bias_hh, state, mask)


def _first_state(kind: str, x: torch.Tensor, state: torch.Tensor | None, weight_hh: torch.Tensor) -> torch.Tensor:
    width = weight_hh.shape[1] * (2 if kind == "lstm" else 1)
    return x.new_zeros(len(x), width) if state is None else state


def _gradients_by_kernels(
    kind: str, grad_outputs: Any, grad_memories: Any, saved: Any, needs: Any
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of x, state, mask, weight_ih, weight_hh, bias_ih, bias_hh; None where none is needed."""
    from .triton_scan import scan_backward

    x, state, mask, weight_ih, weight_hh, _, _, outputs, memories, gates = saved
    state = _first_state(kind, x, state, weight_hh)
    grad_outputs = torch.zeros_like(outputs) if grad_outputs is None else grad_outputs
    inner, outer, first = scan_backward(
        kind, grad_outputs, grad_memories, weight_hh, state, mask, outputs, memories, gates
    )
    with torch.autocast(x.device.type, enabled=False):
        before = torch.cat((state[:, None, : weight_hh.shape[1]], outputs[:, :-1]), dim=1)
        return (
            inner @ weight_ih if needs[0] else None,
            first if needs[1] else None,
            None,
            inner.flatten(0, 1).T @ x.flatten(0, 1) if needs[3] else None,
            outer.flatten(0, 1).T @ before.flatten(0, 1) if needs[4] else None,
            inner.sum((0, 1)) if needs[5] else None,
            outer.sum((0, 1)) if needs[6] else None,
        )


class _KernelScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kind: str, reference: fast.Reference, *arguments: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        ctx.kind, ctx.reference = kind, reference
        outputs, memories, gates = _by_kernels(kind, *arguments)
        ctx.save_for_backward(*arguments, outputs, memories, gates)
        ctx.set_materialize_grads(False)
        return outputs, memories

    @staticmethod
    def backward(ctx: Any, grad_outputs: Any, grad_memories: Any) -> tuple[Any, ...]:
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():  # somebody wants second derivatives
            found = fast._scan_in_torch(ctx.kind, ctx.reference, *saved[:7])
            pairs = zip(found, (grad_outputs, grad_memories), strict=False)
            results, grads = zip(*((one, grad) for one, grad in pairs if grad is not None), strict=True)
            leaves = [one for one, need in zip(saved, needs, strict=False) if need]
            seconds = iter(torch.autograd.grad(results, leaves, grads, create_graph=True, allow_unused=True))
            return None, None, *(next(seconds) if need else None for need in needs)
        return None, None, *_gradients_by_kernels(ctx.kind, grad_outputs, grad_memories, saved, needs)


# The operators. What a cell does not have (biases, a mask) is None; what it does not return has no elements.
ARGUMENTS = (
    "Tensor x, Tensor? state, Tensor? mask, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh"
)


@torch.library.custom_op(
    "peft_read::scan", mutates_args=(), schema=f"(str kind, {ARGUMENTS}) -> (Tensor, Tensor, Tensor)"
)
def _scan_operator(kind: str, *arguments: Any) -> Any:
    run = _by_kernels if _runs_kernels(arguments[0]) else fast._scan
    outputs, memories, gates = run(kind, *arguments)
    mask = arguments[2]
    if gates is not None and mask is not None:  # no loop needs them at padding, but an operator has one answer
        gates.masked_fill_(~mask[..., None], 0)
    return tuple(outputs.new_empty(0) if one is None else one for one in (outputs, memories, gates))


@_scan_operator.register_fake
def _(kind: str, x: Any, state: Any, mask: Any, weight_ih: Any, weight_hh: Any, bias_ih: Any, bias_hh: Any) -> Any:
    (batch, length), k = x.shape[:2], weight_hh.shape[1]
    return (
        x.new_empty(batch, length, k),
        x.new_empty(batch, length, k) if kind == "lstm" else x.new_empty(0),
        x.new_empty(0) if kind == "rnn" else x.new_empty(batch, length, 4 * k),
    )


@torch.library.custom_op(
    "peft_read::scan_backward",
    mutates_args=(),
    schema=f"(str kind, bool[] needs, Tensor? grad_outputs, Tensor? grad_memories, {ARGUMENTS}, Tensor outputs, "
    "Tensor memories, Tensor gates) -> Tensor[]",
)
def _scan_backward_operator(
    kind: str, needs: list[bool], grad_outputs: Any, grad_memories: Any, *arguments_and_results: Any
) -> Any:
    *arguments, outputs, memories, gates = arguments_and_results
    saved = (
        *arguments, outputs, memories if kind == "lstm" else None, None if kind == "rnn" else gates,
    )  # fmt: skip
    if _runs_kernels(outputs):
        found = _gradients_by_kernels(kind, grad_outputs, grad_memories, saved, needs)
    else:
        context = SimpleNamespace(kind=kind, saved_tensors=saved, needs_input_grad=(False, False, *needs))
        with torch.no_grad():
            found = fast._Scan.backward(context, grad_outputs, grad_memories)[2:]
    # An operator may not return a tensor twice, nor a view of one.
    return [one.clone() if one._is_view() else one for one in found if one is not None]


@_scan_backward_operator.register_fake
def _(kind: str, needs: Any, grad_outputs: Any, grad_memories: Any, *arguments_and_results: Any) -> Any:
    return [one.new_empty(one.shape) for one, need in zip(arguments_and_results, needs, strict=False) if need]


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    kind, *arguments = inputs
    ctx.kind = kind
    ctx.save_for_backward(*arguments, *output)
    ctx.set_materialize_grads(False)


def _operator_backward(ctx: Any, grad_outputs: Any, grad_memories: Any, grad_gates: Any) -> tuple[Any, ...]:
    needs = list(ctx.needs_input_grad[1:])
    if ctx.kind != "lstm":
        grad_memories = None
    found = iter(torch.ops.peft_read.scan_backward(ctx.kind, needs, grad_outputs, grad_memories, *ctx.saved_tensors))
    return None, *(next(found) if need else None for need in needs)


_scan_operator.register_autograd(_operator_backward, setup_context=_keep_for_backward)
