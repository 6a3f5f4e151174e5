"""The compiled loops as implementations of the two operations: which cases they take, and how they are called.

A narrow scan runs for some microseconds, so what happens around it is kept short: loops instead of generators, and
tensors are handed over by their addresses. numba is imported when the first loop is needed.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ... import backends
from ..arguments import GATES, Adapted, AdapterArguments, ScanArguments, Scanned, state_width, states_before
from ..operation import Implementation

__all__ = ["ADAPTER", "scan_by_loops"]

NARROW = 16  # inputs and states; wider ones are projected, and their gradients summed, by matrix products
LARGEST_SCAN_WIDTH = 64
# k=8 takes 0.48 of the time of an adapter without a recurrence, k=16 would take 1.4 of it, and in parts takes 1.1.
LARGEST_ADAPTER_WIDTH = 8
MOST_THREADS = 4  # the one pass over the tokens is a single thread's; more threads of torch overtake it
PLAIN = (Tensor, nn.Parameter)


@torch.compiler.assume_constant_result
def _threads() -> int:
    return torch.get_num_threads()


def _unfit(tensors: Sequence[Tensor | None], mask: Tensor | None, x: Tensor) -> str:
    """Why tensors cannot be handed over."""
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in PLAIN:
            return "a tensor is of a subclass"
        if tensor.dtype is not torch.float32:
            return "a tensor is not float32"
        if not tensor.is_cpu or tensor.layout is not torch.strided:
            return "a tensor is not a dense one on the CPU"
    if mask is not None and (mask.dtype is not torch.bool or mask.shape != x.shape[:2] or not mask.is_cpu):
        return "the mask is not boolean, one entry per token"
    return ""


@cache
def _loops(name: str) -> Any:
    """The loops of a module, compiled: it runs inside the first trial of what needs them."""
    return importlib.import_module(f".{name}", __package__)


def _addresses(tensors: Sequence[Tensor | None]) -> tuple[list[Tensor | None], list[int]]:
    """Contiguous versions of tensors, which must be kept as long as their addresses, and these; 0 for None.

    Raises:
        RuntimeError: if a tensor has no memory.
    """
    kept: list[Tensor | None] = []
    addresses = []
    for tensor in tensors:
        address = 0
        if tensor is not None:
            tensor = (tensor.resolve_neg() if tensor.is_neg() else tensor).contiguous()
            address = tensor.data_ptr()
            if address == 0:
                raise RuntimeError(
                    f"A tensor of the recurrence, of shape {tuple(tensor.shape)}, has no memory: its storage was "
                    "freed, as FSDP does with weights that are not gathered. Call the module through its wrapper."
                )
        kept.append(tensor)
        addresses.append(address)
    return kept, addresses


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return None if first is None or second is None else first + second


def scan_by_loops(kind: str) -> Implementation[ScanArguments, Scanned]:
    """The scans of "rnn", "gru" or "lstm"."""
    gates = GATES[kind]

    def refusal(arguments: ScanArguments) -> str:
        x, state, mask, weight_ih, weight_hh, bias_ih, bias_hh = arguments
        rows, width = weight_hh.shape
        if width > LARGEST_SCAN_WIDTH:
            return f"it is wider than {LARGEST_SCAN_WIDTH}"
        if (
            rows != gates * width
            or weight_ih.shape != (rows, x.shape[-1])
            or (bias_ih is None) != (bias_hh is None)
            or (bias_ih is not None and bias_ih.shape != (rows,))
            or (state is not None and state.shape != (x.shape[0], state_width(kind, width)))
        ):
            return "its tensors do not fit together"
        return _unfit((x, state, weight_ih, weight_hh, bias_ih, bias_hh), mask, x)

    forward = {"rnn": _rnn, "gru": _gru, "lstm": _lstm}[kind]
    backward = {"rnn": _rnn_backward, "gru": _gru_backward, "lstm": _lstm_backward}[kind]
    module = "rnn" if kind == "rnn" else "gated"
    return Implementation(
        refusal,
        forward,
        backward,
        width=lambda arguments: 4,
        preparing=lambda: backends.compiling(
            f"the scan of the {kind.upper()}", getattr(_loops(module), f"{kind}_backward")
        ),
    )


def _rnn(arguments: ScanArguments) -> Scanned:
    x, state, mask, weight_ih, weight_hh, bias_ih, bias_hh = arguments
    batch, length, inputs = x.shape
    width = weight_hh.shape[1]
    outputs = x.new_empty(batch, length, width)
    by_input: Tensor | None = weight_ih
    if inputs > NARROW or width > NARROW:
        x, inputs = F.linear(x, weight_ih, _sum(bias_ih, bias_hh)), width
        by_input = bias_ih = bias_hh = None
    _kept, addresses = _addresses((x, by_input, weight_hh, bias_ih, bias_hh, state, mask, outputs))
    _loops("rnn").rnn_forward(*addresses, batch, length, inputs, width)
    return Scanned(outputs, None)


def _rnn_backward(
    arguments: ScanArguments, results: Scanned, grads: Sequence[Tensor | None], needs: Any
) -> tuple[Tensor | None, ...]:
    x, state, mask, weight_ih, weight_hh, _, _ = arguments
    grad = _dense(grads[0], results.outputs)
    batch, length, inputs = x.shape
    width = len(weight_hh)
    grad_state = x.new_empty(batch, width)
    if inputs > NARROW or width > NARROW:
        inner = x.new_empty(batch, length, width)
        _kept, addresses = _addresses((grad, None, None, weight_hh, state, mask, results.outputs, inner, grad_state))
        _loops("rnn").rnn_backward(*addresses, 0, 0, 0, batch, length, width, width)
        return _gradients_of_gates(inner, inner, grad_state, arguments, results, needs)
    grad_x = x.new_empty(x.shape) if needs.x else None
    grad_ih, grad_hh, grad_bias = x.new_empty(width, inputs), x.new_empty(width, width), x.new_empty(width)
    _kept, addresses = _addresses(
        (grad, x, weight_ih, weight_hh, state, mask, results.outputs, grad_x, grad_state, grad_ih, grad_hh, grad_bias)
    )
    _loops("rnn").rnn_backward(*addresses, batch, length, inputs, width)
    return (
        grad_x,
        grad_state if needs.state else None,
        None,
        grad_ih if needs.weight_ih else None,
        grad_hh if needs.weight_hh else None,
        grad_bias if needs.bias_ih else None,
        grad_bias.clone() if needs.bias_hh else None,
    )


def _gru(arguments: ScanArguments) -> Scanned:
    x, state, mask, weight_ih, weight_hh, bias_ih, bias_hh = arguments
    batch, length, width = x.shape[0], x.shape[1], weight_hh.shape[1]
    outputs, gates = x.new_empty(batch, length, width), x.new_empty(batch, length, 4 * width)
    inner = F.linear(x, weight_ih, bias_ih)
    _kept, addresses = _addresses((inner, weight_hh, bias_hh, state, mask, outputs, gates))
    _loops("gated").gru_forward(*addresses, batch, length, width)
    return Scanned(outputs, None, gates)


def _gru_backward(
    arguments: ScanArguments, results: Scanned, grads: Sequence[Tensor | None], needs: Any
) -> tuple[Tensor | None, ...]:
    x, state, mask, _, weight_hh, _, _ = arguments
    batch, length, width = results.outputs.shape
    grad = _dense(grads[0], results.outputs)
    inner, outer = x.new_empty(2, batch, length, 3 * width).unbind()
    grad_state = x.new_empty(batch, width)
    _kept, addresses = _addresses(
        (grad, weight_hh, state, mask, results.outputs, results.gates, inner, outer, grad_state)
    )
    _loops("gated").gru_backward(*addresses, batch, length, width)
    return _gradients_of_gates(inner, outer, grad_state, arguments, results, needs)


def _lstm(arguments: ScanArguments) -> Scanned:
    x, state, mask, weight_ih, weight_hh, bias_ih, bias_hh = arguments
    batch, length, width = x.shape[0], x.shape[1], weight_hh.shape[1]
    outputs, cell_states = x.new_empty(batch, length, width), x.new_empty(batch, length, width)
    # Nothing is written at padding and nothing read; but an operator has one answer.
    gates = (x.new_empty if mask is None else x.new_zeros)(batch, length, 4 * width)
    inner = F.linear(x, weight_ih, _sum(bias_ih, bias_hh))
    _kept, addresses = _addresses((inner, weight_hh, state, mask, outputs, cell_states, gates))
    _loops("gated").lstm_forward(*addresses, batch, length, width)
    return Scanned(outputs, cell_states, gates)


def _lstm_backward(
    arguments: ScanArguments, results: Scanned, grads: Sequence[Tensor | None], needs: Any
) -> tuple[Tensor | None, ...]:
    x, state, mask, _, weight_hh, _, _ = arguments
    batch, length, width = results.outputs.shape
    grad, grad_cell_states = _dense(grads[0], results.outputs), grads[1]
    inner, grad_state = x.new_empty(batch, length, 4 * width), x.new_empty(batch, 2 * width)
    _kept, addresses = _addresses(
        (grad, grad_cell_states, weight_hh, state, mask, results.cell_states, results.gates, inner, grad_state)
    )
    _loops("gated").lstm_backward(*addresses, batch, length, width)
    return _gradients_of_gates(inner, inner, grad_state, arguments, results, needs)


def _dense(grad: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if grad is None else grad


def _gradients_of_gates(
    inner: Tensor, outer: Tensor, grad_state: Tensor, arguments: ScanArguments, results: Scanned, needs: Any
) -> tuple[Tensor | None, ...]:
    """The gradients of the arguments from those of the gates, W_ih x + b_ih (inner) and W_hh h + b_hh (outer)."""
    x, state, _, weight_ih, _, _, _ = arguments
    outputs = results.outputs
    with torch.autocast("cpu", enabled=False):
        return (
            inner @ weight_ih if needs.x else None,
            grad_state if needs.state else None,
            None,
            _outer_sum(inner, x) if needs.weight_ih else None,
            _outer_sum(outer, states_before(outputs, state)) if needs.weight_hh else None,
            inner.sum((0, 1)) if needs.bias_ih else None,
            outer.sum((0, 1)) if needs.bias_hh else None,
        )


def _outer_sum(grad: Tensor, vectors: Tensor) -> Tensor:
    """Σ over tokens of grad_t vector_tᵀ, for narrow vectors in float64: BLAS sums thin columns in one long chain."""
    grad, vectors = grad.flatten(0, 1), vectors.flatten(0, 1)
    if vectors.shape[-1] <= NARROW:
        return (grad.double().T @ vectors.double()).float()
    return grad.T @ vectors


def _adapter_refusal(arguments: AdapterArguments) -> str:
    x, state, mask, *weights = arguments
    if arguments.down.shape[0] > LARGEST_ADAPTER_WIDTH:
        return f"it is wider than {LARGEST_ADAPTER_WIDTH}"
    if _threads() > MOST_THREADS:
        return f"torch has more than {MOST_THREADS} threads"
    if torch.is_autocast_enabled("cpu"):
        return "it is under autocast"
    return _unfit((x, state, *weights), mask, x)


def _adapter(arguments: AdapterArguments) -> Adapted:
    x, state, mask, *weights = arguments
    batch, length, d = x.shape
    width = len(arguments.down)
    out, narrow, hidden = x.new_empty(x.shape), x.new_empty(batch, length, width), x.new_empty(batch, length, width)
    _kept, addresses = _addresses((x, *weights, state, mask, out, narrow, hidden))
    _loops("adapter").adapter_forward(*addresses, batch, length, d, width)
    return Adapted(out, hidden, narrow)


def _adapter_backward(
    arguments: AdapterArguments, results: Adapted, grads: Sequence[Tensor | None], needs: Any
) -> tuple[Tensor | None, ...]:
    x, state, mask, down, _, weight_ih, weight_hh, _, _, up, _ = arguments
    batch, length, d = x.shape
    width = len(down)
    grad, grad_hidden = _dense(grads[0], x), grads[1]
    grad_x = x.new_empty(x.shape) if needs.x else None
    grad_state, grad_down_bias, grad_bias = x.new_empty(batch, width), x.new_empty(width), x.new_empty(width)
    grad_down = x.new_empty(width, d) if needs.down else None
    grad_ih, grad_hh = x.new_empty(width, width), x.new_empty(width, width)
    grad_up = x.new_empty(d, width) if needs.up else None
    grad_up_bias = x.new_empty(d) if needs.up_bias else None
    _kept, addresses = _addresses(
        (grad, grad_hidden, x, down, weight_ih, weight_hh, up, state, mask, results.narrow, results.hidden, grad_x,
         grad_state, grad_down, grad_down_bias, grad_ih, grad_hh, grad_bias, grad_up, grad_up_bias)
    )  # fmt: skip
    _loops("adapter").adapter_backward(*addresses, batch, length, d, width)
    return (
        grad_x,
        grad_state if needs.state else None,
        None,
        grad_down,
        grad_down_bias if needs.down_bias else None,
        grad_ih if needs.weight_ih else None,
        grad_hh if needs.weight_hh else None,
        grad_bias if needs.bias_ih else None,
        grad_bias.clone() if needs.bias_hh else None,
        grad_up,
        grad_up_bias,
    )


ADAPTER = Implementation(
    _adapter_refusal,
    _adapter,
    _adapter_backward,
    width=lambda arguments: 4,
    preparing=lambda: backends.compiling("the pass over the whole adapter", _loops("adapter").adapter_backward),
)
