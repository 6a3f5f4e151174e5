"""The whole adapter in one compiled pass over the tokens, as a differentiable function, and the cases it takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .backends import LARGEST_FUSED_WIDTH, MOST_FUSED_THREADS, backend
from .fast import Reference, _are_plain, _gradients, _is_mask, addresses, loops

__all__ = ["adapter_fits", "adapter_in_one_pass", "run_the_adapter_once"]

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


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
    if not (
        type(down) is nn.Linear
        and type(up) is nn.Linear
        and getattr(cell, "kind", None) == "rnn"
        and not cell.bidirectional
        and (type(dropout) is nn.Identity or (type(dropout) is nn.Dropout and not dropout.training))
        and output.dim() == 3
        and output.is_contiguous()
        and output.numel() > 0
    ):
        return False
    width, d = down.out_features, down.in_features
    if width > LARGEST_FUSED_WIDTH or output.shape[-1] != d or up.out_features != d:
        return False
    for module in (down, cell, dropout, up):
        if _is_watched(module):
            return False
    weights: list[Any] = [*_weights(down, cell, up)]
    shapes = ((width, d), (width,), (width, width), (width, width), (width,), (width,), (d, width), (d,))
    for weight, shape in zip(weights, shapes, strict=True):
        if weight is not None and weight.shape != shape:
            return False
    return (
        (weights[1] is None) == (weights[7] is None)
        and _is_mask(mask, output)
        and not torch.is_autocast_enabled("cpu")
        and _are_plain((output, *weights))
    )


def _weights(down: Any, cell: Any, up: Any) -> tuple[Any, ...]:
    return (
        down.weight, down.bias, cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh, up.weight, up.bias,
    )  # fmt: skip


def _is_watched(module: Any) -> bool:
    """Whether calling a module does more than its class says."""
    own = module.__dict__
    if "forward" in own:
        return True
    for name in HOOKS:
        if own[name]:
            return True
    everywhere = nn.modules.module
    return bool(
        everywhere._global_forward_hooks
        or everywhere._global_forward_pre_hooks
        or everywhere._global_backward_hooks
        or everywhere._global_backward_pre_hooks
    )


def adapter_in_one_pass(
    output: torch.Tensor,
    down: nn.Linear,
    cell: Any,
    up: nn.Linear,
    state: torch.Tensor | None,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """On the CPU, in eager mode: arguments and results are those of `adapter_operator.adapter_in_one_pass`."""
    arguments = (output, None if state is None else state.float(), mask, *_weights(down, cell, up))
    if torch.is_grad_enabled():
        for tensor in arguments:
            if tensor is not None and tensor.requires_grad:
                return _Adapter.apply(cell.run_in_torch, *arguments)
    out, _, hidden = _adapter(*arguments)
    return out, hidden


def _adapter(
    x: torch.Tensor, state: Any, mask: Any, down: Any, down_bias: Any, weight_ih: Any, weight_hh: Any, bias_ih: Any,
    bias_hh: Any, up: Any, up_bias: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The output, O W_down and the states."""
    batch, length, d = x.shape
    width = len(down)
    out, narrow, hidden = x.new_empty(x.shape), x.new_empty(batch, length, width), x.new_empty(batch, length, width)
    _kept, found = addresses(
        (x, down, down_bias, weight_ih, weight_hh, bias_ih, bias_hh, up, up_bias, state, mask, out, narrow, hidden)
    )
    loops("compiled_adapter").adapter_forward(*found, batch, length, d, width)
    return out, narrow, hidden


class _Adapter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, reference: Reference, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.reference = reference
        out, narrow, hidden = _adapter(*arguments)
        ctx.save_for_backward(*arguments, narrow, hidden)
        ctx.set_materialize_grads(False)
        return out, hidden

    @staticmethod
    def backward(ctx: Any, grad: Any, grad_hidden: Any) -> tuple[Any, ...]:
        *arguments, narrow, hidden = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():
            pairs = zip(_adapter_in_torch(ctx.reference, *arguments), (grad, grad_hidden), strict=True)
            results, grads = zip(*((one, grad) for one, grad in pairs if grad is not None), strict=True)
            return None, *_gradients(results, grads, arguments, needs)
        x, state, mask, down, _, weight_ih, weight_hh, _, _, up, _ = arguments
        batch, length, d = x.shape
        width = len(down)
        grad = x.new_zeros(x.shape) if grad is None else grad.resolve_neg()
        grad_hidden = None if grad_hidden is None else grad_hidden.resolve_neg()
        grad_x = x.new_empty(x.shape) if needs[0] else None
        grad_state, grad_down_bias, grad_bias = x.new_empty(batch, width), x.new_empty(width), x.new_empty(width)
        grad_down = x.new_empty(width, d) if needs[3] else None
        grad_weight_ih, grad_weight_hh = x.new_empty(width, width), x.new_empty(width, width)
        grad_up = x.new_empty(d, width) if needs[9] else None
        grad_up_bias = x.new_empty(d) if needs[10] else None
        _kept, found = addresses(
            (grad, grad_hidden, x, down, weight_ih, weight_hh, up, state, mask, narrow, hidden, grad_x, grad_state,
             grad_down, grad_down_bias, grad_weight_ih, grad_weight_hh, grad_bias, grad_up, grad_up_bias)
        )  # fmt: skip
        loops("compiled_adapter").adapter_backward(*found, batch, length, d, width)
        return (
            None,
            grad_x,
            grad_state if needs[1] else None,
            None,
            grad_down,
            grad_down_bias if needs[4] else None,
            grad_weight_ih if needs[5] else None,
            grad_weight_hh if needs[6] else None,
            grad_bias if needs[7] else None,
            grad_bias.clone() if needs[8] else None,
            grad_up,
            grad_up_bias,
        )


def _adapter_in_torch(
    reference: Reference, x: torch.Tensor, state: Any, mask: Any, down: Any, down_bias: Any, weight_ih: Any,
    weight_hh: Any, bias_ih: Any, bias_hh: Any, up: Any, up_bias: Any,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    weights = [weight for weight in (weight_ih, weight_hh, bias_ih, bias_hh) if weight is not None]
    state = x.new_zeros(len(x), len(down)) if state is None else state
    hidden, _ = reference(F.linear(x, down, down_bias), state, weights, mask)
    return x + F.linear(F.gelu(hidden), up, up_bias), hidden


def run_the_adapter_once() -> None:
    """Run the pass on small inputs, which compiles it if it is not compiled."""
    from .cells import CELLS

    with torch.enable_grad():
        out, _ = adapter_in_one_pass(
            torch.randn(1, 2, 8), nn.Linear(8, 4), CELLS["rnn"](4), nn.Linear(4, 8), None, None
        )
        out.sum().backward()
