"""The compiled scans as differentiable functions of tensors, and the cases that they can take.

Whatever does not fit goes elsewhere: CUDA and torch.compile to `operators.py`, other dtypes, tensor subclasses,
functorch's transforms, forward-mode derivatives, tracing and second derivatives to the torch path. A narrow scan runs
for some microseconds, so what happens around it is kept short: loops instead of generators, and no array is made of a
tensor.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import _C, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from .backends import LARGEST_FUSED_WIDTH, LARGEST_SCAN_WIDTH, backend

__all__ = ["addresses", "compiled_scan", "loops", "run_every_scan_once", "scan_fits"]

NARROW = 16  # inputs and states; wider ones are projected, and their gradients summed, by matrix products
GATES = {"rnn": 1, "gru": 3, "lstm": 4}
PLAIN = (torch.Tensor, nn.Parameter)
# (inputs, state, weights, mask) -> outputs and states, in torch
Reference = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
Weights = Sequence[torch.Tensor]


def scan_fits(
    kind: str,
    x: torch.Tensor,
    state: torch.Tensor | None,
    weights: Weights,
    mask: torch.Tensor | None,
    keep_states: bool = True,
) -> bool:
    """Whether the compiled loops should run a cell: "rnn", "gru" or "lstm" over x (B, T, I).

    Torch's own LSTM is a single kernel, and faster than they are for all but few narrow sequences; it keeps the
    memories c_t to itself, though.
    """
    if torch.compiler.is_compiling() or kind not in GATES or backend() != "numba":
        return False
    batch, _, inputs = x.shape
    rows, width = weights[1].shape
    if (
        width > LARGEST_SCAN_WIDTH
        or rows != GATES[kind] * width
        or weights[0].shape != (rows, inputs)
        or (kind == "lstm" and not keep_states and (width > LARGEST_FUSED_WIDTH or batch > 8))
        or (state is not None and state.shape != (batch, width * (2 if kind == "lstm" else 1)))
    ):
        return False
    for bias in weights[2:]:
        if bias.shape != (rows,):
            return False
    return _are_plain((x, state, *weights)) and _is_mask(mask, x)


def _are_plain(tensors: Sequence[torch.Tensor | None]) -> bool:
    """Whether all are ordinary float32 tensors on the CPU, and nothing but eager autograd is looking on."""
    for tensor in tensors:
        if tensor is not None and not (
            type(tensor) in PLAIN
            and tensor.dtype is torch.float32
            and tensor.is_cpu
            and tensor.layout is torch.strided
            and not tensor.is_neg()
        ):
            return False
    # None of these has a public door; each is checked by a test.
    return (
        not _C._are_functorch_transforms_active()
        and _C._len_torch_dispatch_stack() == 0
        and forward_ad._current_level < 0
        and not _C._get_tracing_state()
    )


def _is_mask(mask: torch.Tensor | None, x: torch.Tensor) -> bool:
    """Whether a mask, if there is one, has one boolean for each token of x (B, T, I)."""
    return mask is None or (
        type(mask) in PLAIN and mask.dtype is torch.bool and mask.is_cpu and mask.shape == x.shape[:2]
    )


@cache
def loops(name: str) -> Any:
    """A module of compiled loops, imported when it is needed: it imports numba."""
    return importlib.import_module(f".{name}", __package__)


def addresses(tensors: Sequence[torch.Tensor | None]) -> tuple[list[torch.Tensor | None], list[int]]:
    """Contiguous versions of tensors, which must be kept as long as their addresses, and these; 0 for None.

    Raises:
        RuntimeError: if a tensor has no memory.
    """
    kept: list[torch.Tensor | None] = []
    found = []
    for tensor in tensors:
        address = 0
        if tensor is not None:
            tensor = tensor.contiguous()
            address = tensor.data_ptr()
            if address == 0:
                raise RuntimeError(
                    f"A tensor of the recurrence, of shape {tuple(tensor.shape)}, has no memory: its storage was "
                    "freed, as FSDP does with weights that are not gathered. Call the module through its wrapper."
                )
        kept.append(tensor)
        found.append(address)
    return kept, found


def compiled_scan(
    kind: str,
    x: torch.Tensor,
    state: torch.Tensor | None,
    weights: Weights,
    mask: torch.Tensor | None,
    reference: Reference,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a cell on the CPU, in eager mode; arguments and results are those of `operators.compiled_scan`."""
    weight_ih, weight_hh, bias_ih, bias_hh = weights if len(weights) == 4 else (*weights, None, None)
    arguments: Any = (x, state, mask, weight_ih, weight_hh, bias_ih, bias_hh)
    if torch.is_grad_enabled():
        for tensor in arguments:
            if tensor is not None and tensor.requires_grad:
                outputs, memories = _Scan.apply(kind, reference, *arguments)
                return outputs, outputs if memories is None else memories
    outputs, memories, _ = _scan(kind, *arguments)
    return outputs, outputs if memories is None else memories


def _scan(
    kind: str, x: torch.Tensor, state: Any, mask: Any, weight_ih: Any, weight_hh: Any, bias_ih: Any, bias_hh: Any
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The outputs, the memories of an LSTM, and the gates of a GRU or LSTM."""
    batch, length, inputs = x.shape
    width = weight_hh.shape[1]
    outputs = x.new_empty(batch, length, width)
    if kind == "rnn":
        if inputs > NARROW or width > NARROW:
            x, inputs = F.linear(x, weight_ih, None if bias_ih is None else bias_ih + bias_hh), width
            weight_ih = bias_ih = bias_hh = None
        _kept, found = addresses((x, weight_ih, weight_hh, bias_ih, bias_hh, state, mask, outputs))
        loops("compiled_rnn").rnn_forward(*found, batch, length, inputs, width)
        return outputs, None, None
    gates = x.new_empty(batch, length, 4 * width)
    if kind == "gru":
        inner = F.linear(x, weight_ih, bias_ih)
        _kept, found = addresses((inner, weight_hh, bias_hh, state, mask, outputs, gates))
        loops("compiled").gru_forward(*found, batch, length, width)
        return outputs, None, gates
    inner = F.linear(x, weight_ih, None if bias_ih is None or bias_hh is None else bias_ih + bias_hh)
    memories = x.new_empty(batch, length, width)
    _kept, found = addresses((inner, weight_hh, state, mask, outputs, memories, gates))
    loops("compiled").lstm_forward(*found, batch, length, width)
    return outputs, memories, gates


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kind: str, reference: Reference, *arguments: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        ctx.kind, ctx.reference = kind, reference
        outputs, memories, gates = _scan(kind, *arguments)
        ctx.save_for_backward(*arguments, outputs, memories, gates)
        ctx.set_materialize_grads(False)
        return outputs, memories

    @staticmethod
    def backward(ctx: Any, grad_outputs: Any, grad_memories: Any) -> tuple[Any, ...]:
        *arguments, outputs, memories, gates = ctx.saved_tensors
        needs = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():  # somebody wants second derivatives
            grads = [grad for grad in (grad_outputs, grad_memories) if grad is not None]
            found = _scan_in_torch(ctx.kind, ctx.reference, *arguments)
            found = [one for one, grad in zip(found, (grad_outputs, grad_memories), strict=False) if grad is not None]
            return None, None, *_gradients(found, grads, arguments, needs)
        grad_outputs = torch.zeros_like(outputs) if grad_outputs is None else grad_outputs.resolve_neg()
        grad_memories = None if grad_memories is None else grad_memories.resolve_neg()
        if ctx.kind == "rnn":
            return None, None, *_rnn_gradients(grad_outputs, arguments, outputs, needs)
        return (
            None,
            None,
            *_gated_gradients(ctx.kind, grad_outputs, grad_memories, arguments, outputs, memories, gates, needs),
        )


def _rnn_gradients(grad: torch.Tensor, arguments: Any, outputs: torch.Tensor, needs: Any) -> tuple[Any, ...]:
    """The gradients of an RNN's seven arguments."""
    x, state, mask, weight_ih, weight_hh, _, _ = arguments
    batch, length, inputs = x.shape
    width = len(weight_hh)
    if inputs > NARROW or width > NARROW:
        grad_inner, grad_state = x.new_empty(batch, length, width), x.new_empty(batch, width)
        _kept, found = addresses((grad, None, None, weight_hh, state, mask, outputs, grad_inner, grad_state))
        loops("compiled_rnn").rnn_backward(*found, 0, 0, 0, batch, length, width, width)
        return _gradients_of_gates(grad_inner, grad_inner, grad_state, arguments, outputs, needs)
    grad_x = x.new_empty(x.shape) if needs[0] else None
    grad_state, grad_bias = x.new_empty(batch, width), x.new_empty(width)
    grad_weight_ih, grad_weight_hh = x.new_empty(width, inputs), x.new_empty(width, width)
    _kept, found = addresses(
        (grad, x, weight_ih, weight_hh, state, mask, outputs, grad_x, grad_state, grad_weight_ih, grad_weight_hh,
         grad_bias)
    )  # fmt: skip
    loops("compiled_rnn").rnn_backward(*found, batch, length, inputs, width)
    return (
        grad_x,
        grad_state if needs[1] else None,
        None,
        grad_weight_ih if needs[3] else None,
        grad_weight_hh if needs[4] else None,
        grad_bias if needs[5] else None,
        grad_bias.clone() if needs[6] else None,
    )


def _gated_gradients(
    kind: str, grad: Any, grad_memories: Any, arguments: Any, outputs: Any, memories: Any, gates: Any, needs: Any
) -> tuple[Any, ...]:
    """The gradients of a GRU's or an LSTM's seven arguments."""
    x, state, mask, _, weight_hh, _, _ = arguments
    batch, length, width = outputs.shape
    grad_inner = x.new_empty(batch, length, len(weight_hh))
    grad_state = x.new_empty(batch, width * (2 if kind == "lstm" else 1))
    grad_outer = grad_inner
    if kind == "gru":
        grad_outer = x.new_empty(batch, length, len(weight_hh))
        _kept, found = addresses((grad, weight_hh, state, mask, outputs, gates, grad_inner, grad_outer, grad_state))
        loops("compiled").gru_backward(*found, batch, length, width)
    else:
        _kept, found = addresses(
            (grad, grad_memories, weight_hh, state, mask, memories, gates, grad_inner, grad_state)
        )
        loops("compiled").lstm_backward(*found, batch, length, width)
    return _gradients_of_gates(grad_inner, grad_outer, grad_state, arguments, outputs, needs)


def _gradients_of_gates(
    grad_inner: torch.Tensor, grad_outer: torch.Tensor, grad_state: Any, arguments: Any, outputs: Any, needs: Any
) -> tuple[Any, ...]:
    """The gradients of the seven arguments from those of the gates, W_ih x + b_ih and W_hh h + b_hh."""
    x, state, _, weight_ih, _, _, _ = arguments
    first = outputs.new_zeros(len(outputs), outputs.shape[-1]) if state is None else state[:, : outputs.shape[-1]]
    with torch.autocast("cpu", enabled=False):
        return (
            grad_inner @ weight_ih if needs[0] else None,
            grad_state if needs[1] else None,
            None,
            _outer_sum(grad_inner, x) if needs[3] else None,
            _outer_sum(grad_outer, torch.cat((first[:, None], outputs[:, :-1]), dim=1)) if needs[4] else None,
            grad_inner.sum((0, 1)) if needs[5] else None,
            grad_outer.sum((0, 1)) if needs[6] else None,
        )


def _outer_sum(grad: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """Σ over tokens of grad_t vector_tᵀ, for narrow vectors in float64: BLAS sums thin columns in one long chain."""
    grad, vectors = grad.flatten(0, 1), vectors.flatten(0, 1)
    if vectors.shape[-1] <= NARROW:
        return (grad.double().T @ vectors.double()).float()
    return grad.T @ vectors


def _scan_in_torch(kind: str, reference: Reference, x: torch.Tensor, state: Any, mask: Any, *given: Any) -> Any:
    weights = [weight for weight in given if weight is not None]
    if state is None:
        state = x.new_zeros(len(x), weights[1].shape[1] * (2 if kind == "lstm" else 1))
    outputs, states = reference(x, state, weights, mask)
    if kind != "lstm":
        return (outputs,)
    assert states is not None
    return outputs, states[..., outputs.shape[-1] :]


def _gradients(outputs: Any, grads: Any, inputs: Any, needs: Any) -> list[torch.Tensor | None]:
    """Gradients that can be differentiated again, None for inputs that need none."""
    wanted = [one for one, need in zip(inputs, needs, strict=True) if need]
    found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needs]


def run_every_scan_once() -> None:
    """Run every scan on small inputs, which compiles what is not compiled."""
    from .cells import CELLS

    with torch.enable_grad():
        for kind, gates in GATES.items():
            cell: Any = CELLS[kind](4)
            weights = [torch.randn(gates * 4, 4, requires_grad=True) for _ in range(2)]
            outputs, memories = compiled_scan(kind, torch.randn(1, 2, 4), None, weights, None, cell.run_in_torch)
            (outputs.sum() + memories.sum()).backward()
