"""The compiled loops as differentiable functions of tensors, and the cases that they can take.

Whatever does not fit goes to the torch path: other devices and dtypes, tensor subclasses, torch.compile, functorch's
transforms, forward-mode derivatives, tracing. Second derivatives are taken through the torch path too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from .backends import LARGEST_FUSED_WIDTH, LARGEST_SCAN_WIDTH, MOST_FUSED_THREADS, backend

__all__ = ["adapter_fits", "adapter_in_one_pass", "compiled_scan", "run_everything_once", "scan_fits"]

NARROW = 16
GATES = {"rnn": 1, "gru": 3, "lstm": 4}
# (inputs, state, weights, mask) -> outputs and states, in torch
Reference = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
Weights = Sequence[torch.Tensor]


def scan_fits(
    kind: str,
    x: torch.Tensor,
    state: torch.Tensor,
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
    width = weights[1].shape[-1]
    if kind == "lstm" and not keep_states and (width > LARGEST_FUSED_WIDTH or len(x) > 8):
        return False
    rows = GATES[kind] * width
    shapes = [(rows, x.shape[-1]), (rows, width), (rows,), (rows,)]
    return (
        width <= LARGEST_SCAN_WIDTH
        and _are_plain(x, state, *weights)
        and _is_mask(mask, x)
        and state.shape == (x.shape[0], width * (2 if kind == "lstm" else 1))
        and all(weight.shape == shape for weight, shape in zip(weights, shapes, strict=False))
    )


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
    if torch.compiler.is_compiling() or backend() != "numba" or torch.get_num_threads() > MOST_FUSED_THREADS:
        return False
    weights = [*down.parameters(), *cell.parameters(), *up.parameters()]
    width = getattr(down, "out_features", 0)
    return (
        type(down) is nn.Linear
        and getattr(cell, "kind", None) == "rnn"
        and not cell.bidirectional
        and all(weight.shape == (width, width) for weight in (cell.weight_ih, cell.weight_hh))
        and type(up) is nn.Linear
        and (type(dropout) is nn.Identity or (type(dropout) is nn.Dropout and not dropout.training))
        and width <= LARGEST_FUSED_WIDTH
        and output.dim() == 3
        and output.numel() > 0
        and output.is_contiguous()
        and output.shape[-1] == down.in_features == up.out_features
        and down.weight.shape == (width, down.in_features)
        and up.weight.shape == (up.out_features, width)
        and _is_mask(mask, output)
        and (down.bias is None) == (up.bias is None)
        and not any(map(_is_watched, (down, cell, dropout, up)))
        and not torch.is_autocast_enabled("cpu")
        and _are_plain(output, *weights)
    )


def _are_plain(*tensors: torch.Tensor) -> bool:
    """Whether all are ordinary float32 tensors on the CPU, and nothing but eager autograd is looking on."""
    return (
        all(
            type(tensor) in (torch.Tensor, nn.Parameter)
            and tensor.dtype == torch.float32
            and tensor.device.type == "cpu"
            and tensor.layout == torch.strided
            for tensor in tensors
        )
        # None of these has a public door; each is checked by a test.
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch.autograd.forward_ad._current_level < 0
        and not torch.jit.is_tracing()
    )


def _is_mask(mask: torch.Tensor | None, x: torch.Tensor) -> bool:
    return mask is None or (mask.shape == x.shape[:2] and mask.dtype == torch.bool and mask.device == x.device)


def _is_watched(module: Any) -> bool:
    """Whether calling a module does more than its class says."""
    own = module.__dict__
    everywhere = nn.modules.module
    return (
        "forward" in own
        or any(
            own[name] for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        )
        or bool(everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks)
        or bool(everywhere._global_backward_hooks or everywhere._global_backward_pre_hooks)
    )


def compiled_scan(
    kind: str, x: torch.Tensor, state: torch.Tensor, weights: Weights, mask: torch.Tensor | None, reference: Reference
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a cell in compiled loops.

    Args:
        kind: "rnn", "gru" or "lstm".
        x: (B, T, I).
        state: (B, S).
        weights: `weight_ih`, `weight_hh`, and with biases `bias_ih`, `bias_hh`.
        mask: (B, T) or None.
        reference: the same in torch, for second derivatives.

    Returns:
        The outputs (B, T, k) and, of the LSTM, the memories c_t (B, T, k); of the others the outputs again.
    """
    bias_ih, bias_hh = weights[2:] if len(weights) == 4 else (None, None)
    arguments = (x, state, mask, weights[0], weights[1], bias_ih, bias_hh)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in arguments):
        outputs, memories = _Scan.apply(kind, reference, *arguments)
    else:
        outputs, memories, _ = _scan(kind, *arguments)
    return outputs, outputs if memories is None else memories


def _scan(
    kind: str,
    x: torch.Tensor,
    state: torch.Tensor,
    mask: torch.Tensor | None,
    weight_ih: torch.Tensor,
    weight_hh: torch.Tensor,
    bias_ih: torch.Tensor | None,
    bias_hh: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The outputs, the memories of an LSTM, and the gates of a GRU or LSTM."""
    from . import compiled

    batch, length, width = *x.shape[:2], weight_hh.shape[1]
    bias = bias_ih if kind == "gru" or bias_ih is None or bias_hh is None else bias_ih + bias_hh
    inner = _array(F.linear(x, weight_ih, bias))
    outputs = x.new_empty(batch, length, width)
    common = (_array(state), _array_of_mask(mask), _array(outputs))
    if kind == "rnn":
        compiled.rnn_forward(inner, _copy(weight_hh), *common)
        return outputs, None, None
    gates = x.new_empty(batch, length, 4 * width)
    if kind == "gru":
        outer = x.new_zeros(3 * width) if bias_hh is None else bias_hh
        compiled.gru_forward(inner, _copy(weight_hh), _copy(outer), *common, _array(gates))
        return outputs, None, gates
    memories = outputs.new_empty(outputs.shape)
    compiled.lstm_forward(inner, _copy(weight_hh), *common, _array(memories), _array(gates))
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
        from . import compiled

        x, state, mask, weight_ih, weight_hh, bias_ih, bias_hh, outputs, memories, gates = ctx.saved_tensors
        arguments, needs = (x, state, mask, weight_ih, weight_hh, bias_ih, bias_hh), ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():  # somebody wants second derivatives
            grads = [grad for grad in (grad_outputs, grad_memories) if grad is not None]
            found = _scan_in_torch(ctx.kind, ctx.reference, *arguments)
            found = [one for one, grad in zip(found, (grad_outputs, grad_memories), strict=False) if grad is not None]
            return None, None, *_gradients(found, grads, arguments, needs)
        if grad_outputs is None:
            grad_outputs = torch.zeros_like(outputs)
        grad_inner, grad_state = x.new_empty(*x.shape[:2], len(weight_hh)), state.new_empty(state.shape)
        real, written = _array_of_mask(mask), (_array(grad_inner), _array(grad_state))
        grad_outer = grad_inner
        if ctx.kind == "rnn":
            compiled.rnn_backward(_array(grad_outputs), _copy(weight_hh), real, _array(outputs), *written)
        elif ctx.kind == "gru":
            grad_outer = grad_inner.new_empty(grad_inner.shape)
            compiled.gru_backward(
                _array(grad_outputs), _copy(weight_hh), _array(state), real, *map(_array, (outputs, gates)),
                written[0], _array(grad_outer), written[1],
            )  # fmt: skip
        else:
            grad_memories = x.new_empty(0, 0, 0) if grad_memories is None else grad_memories
            compiled.lstm_backward(
                _array(grad_outputs), _array(grad_memories), _copy(weight_hh), _array(state), real,
                *map(_array, (memories, gates)), *written,
            )  # fmt: skip
        with torch.autocast("cpu", enabled=False):
            width = weight_hh.shape[1]
            return (
                None,
                None,
                grad_inner @ weight_ih if needs[0] else None,
                grad_state if needs[1] else None,
                None,
                _outer_sum(grad_inner, x) if needs[3] else None,
                _recurrent_gradient(grad_outer, state[:, :width], outputs) if needs[4] else None,
                grad_inner.sum((0, 1)) if needs[5] else None,
                grad_outer.sum((0, 1)) if needs[6] else None,
            )


def _scan_in_torch(kind: str, reference: Reference, x: torch.Tensor, state: Any, mask: Any, *weights: Any) -> Any:
    outputs, states = reference(x, state, [weight for weight in weights if weight is not None], mask)
    if kind != "lstm":
        return (outputs,)
    assert states is not None
    return outputs, states[..., outputs.shape[-1] :]


def _recurrent_gradient(grad_outer: torch.Tensor, state: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """The gradient of W_hh: Σ over tokens of the gate's gradient times the state before it."""
    return _outer_sum(grad_outer, torch.cat((state[:, None], outputs[:, :-1]), dim=1))


def _outer_sum(grad: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """Σ over tokens of grad_t vector_tᵀ, for narrow vectors in float64: BLAS sums thin columns in one long chain."""
    grad, vectors = grad.flatten(0, 1), vectors.flatten(0, 1)
    if vectors.shape[-1] <= NARROW:
        return (grad.double().T @ vectors.double()).float()
    return grad.T @ vectors


def _gradients(outputs: Any, grads: Any, inputs: Any, needs: Any) -> list[torch.Tensor | None]:
    """Gradients that can be differentiated again, None for inputs that need none."""
    wanted = [one for one, need in zip(inputs, needs, strict=True) if need]
    found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needs]


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
    if state is None:
        state = output.new_zeros(len(output), cell.size)
    arguments = (
        output, state.float(), mask, down.weight, down.bias, cell.weight_ih, cell.weight_hh, cell.bias_ih,
        cell.bias_hh, up.weight, up.bias,
    )  # fmt: skip
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in arguments):
        return _Adapter.apply(cell.run_in_torch, *arguments)
    out, _, hidden = _adapter(*_filled(arguments))
    return out, hidden[..., : cell.size]


def _filled(arguments: Sequence[Any]) -> tuple[Any, ...]:
    """The tensors with their width filled up to a multiple of four, W_up turned round, and a bias for every bias."""
    x, state, mask, down, down_bias, weight_ih, weight_hh, bias_ih, bias_hh, up, up_bias = arguments
    more = -len(down) % 4
    bias = down.new_zeros(len(down)) if bias_ih is None else bias_ih + bias_hh
    down_bias = down.new_zeros(len(down)) if down_bias is None else down_bias
    up = up.T
    if more:
        state, down_bias, bias = (F.pad(one, (0, more)) for one in (state, down_bias, bias))
        down, up = (F.pad(one, (0, 0, 0, more)) for one in (down, up))
        weight_ih, weight_hh = (F.pad(one, (0, more, 0, more)) for one in (weight_ih, weight_hh))
    return x, state, mask, down, down_bias, weight_ih, weight_hh, bias, up, up_bias


def _adapter(
    x: torch.Tensor, state: torch.Tensor, mask: Any, down: Any, down_bias: Any, weight_ih: Any, weight_hh: Any,
    bias: Any, up: Any, up_bias: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The output, O W_down and the states, the width being filled up."""
    from .compiled_adapter import adapter_forward

    out, narrow = x.new_empty(x.shape), x.new_empty(*x.shape[:2], len(down))
    hidden = narrow.new_empty(narrow.shape)
    up_bias = x.new_empty(0) if up_bias is None else up_bias
    adapter_forward(
        _array(x), *map(_copy, (down, down_bias, weight_ih, weight_hh, bias, up, up_bias)), _array(state),
        _array_of_mask(mask), *map(_array, (out, narrow, hidden)),
    )  # fmt: skip
    return out, narrow, hidden


class _Adapter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, reference: Reference, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.reference = reference
        out, narrow, hidden = _adapter(*_filled(arguments))
        ctx.save_for_backward(*arguments, narrow, hidden)
        ctx.set_materialize_grads(False)
        return out, hidden[..., : len(arguments[3])].clone()

    @staticmethod
    def backward(ctx: Any, grad: Any, grad_hidden: Any) -> tuple[Any, ...]:
        from .compiled_adapter import adapter_backward

        *arguments, narrow, hidden = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():
            pairs = zip(_adapter_in_torch(ctx.reference, *arguments), (grad, grad_hidden), strict=True)
            found, grads = zip(*((one, grad) for one, grad in pairs if grad is not None), strict=True)
            return None, *_gradients(found, grads, arguments, needs)
        width = len(arguments[3])
        x, state, mask, down, _, weight_ih, weight_hh, _, up, _ = _filled(arguments)
        grad = torch.zeros_like(x) if grad is None else grad
        none = x.new_empty(0, 0, 0)
        grad_hidden = none if grad_hidden is None else F.pad(grad_hidden, (0, len(down) - width))
        grad_x = x.new_empty(x.shape) if needs[0] else none
        grad_down = down.new_zeros(down.shape) if needs[3] else x.new_empty(0, 0)
        grad_up = up.new_zeros(up.shape) if needs[9] else x.new_empty(0, 0)
        grad_up_bias = x.new_zeros(x.shape[-1]) if needs[10] else x.new_empty(0)
        grad_narrow, grad_inner, grad_state = (
            narrow.new_empty(narrow.shape),
            narrow.new_empty(narrow.shape),
            state.new_empty(state.shape),
        )
        adapter_backward(
            *map(_array, (grad, grad_hidden, x)), *map(_copy, (down, weight_ih, weight_hh, up)), _array_of_mask(mask),
            *map(_array, (narrow, hidden, grad_x, grad_down, grad_narrow, grad_inner, grad_up, grad_up_bias,
                          grad_state)),
        )  # fmt: skip
        with torch.autocast("cpu", enabled=False):
            recurrent = _recurrent_gradient(grad_inner, state, hidden)[:width, :width] if needs[6] else None
            bias = grad_inner.sum((0, 1))[:width] if needs[7] or needs[8] else None
            return (
                None,
                grad_x if needs[0] else None,
                grad_state[:, :width] if needs[1] else None,
                None,
                grad_down[:width] if needs[3] else None,
                grad_narrow.sum((0, 1))[:width] if needs[4] else None,
                _outer_sum(grad_inner, narrow)[:width, :width] if needs[5] else None,
                recurrent,
                bias if needs[7] else None,
                bias if needs[8] else None,
                grad_up[:width].T if needs[9] else None,
                grad_up_bias if needs[10] else None,
            )


def _adapter_in_torch(
    reference: Reference, x: torch.Tensor, state: Any, mask: Any, down: Any, down_bias: Any, weight_ih: Any,
    weight_hh: Any, bias_ih: Any, bias_hh: Any, up: Any, up_bias: Any,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    weights = [weight for weight in (weight_ih, weight_hh, bias_ih, bias_hh) if weight is not None]
    hidden, _ = reference(F.linear(x, down, down_bias), state, weights, mask)
    return x + F.linear(F.gelu(hidden), up, up_bias), hidden


# What the loops write to is made with `new_empty(shape)`: `empty_like` would keep strides, and a copy be written to.
def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().contiguous().numpy()


def _copy(tensor: torch.Tensor) -> np.ndarray:
    """Weights are copied: a storage that numpy has seen can never be resized again, which is how FSDP frees them."""
    return tensor.detach().clone(memory_format=torch.contiguous_format).numpy()


def _array_of_mask(mask: torch.Tensor | None) -> np.ndarray:
    return np.empty((0, 0), dtype=np.bool_) if mask is None else mask.contiguous().numpy()


def run_everything_once() -> None:
    """Run every loop on small inputs, which compiles what is not compiled."""
    from .cells import CELLS

    with torch.enable_grad():
        for kind, gates in GATES.items():
            cell: Any = CELLS[kind](4)
            x = torch.randn(1, 2, 4)
            weights = [torch.randn(gates * 4, 4, requires_grad=True) for _ in range(2)]
            outputs, memories = compiled_scan(
                kind, x, x.new_zeros(1, cell.state_size), weights, None, cell.run_in_torch
            )
            (outputs.sum() + memories.sum()).backward()
        cell = CELLS["rnn"](4)
        out, _ = adapter_in_one_pass(torch.randn(1, 2, 8), nn.Linear(8, 4), cell, nn.Linear(4, 8), None, None)
        out.sum().backward()
