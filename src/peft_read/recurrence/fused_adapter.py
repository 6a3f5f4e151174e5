"""The whole RNN adapter O + GELU(RNN(O W_down)) W_up as one operation, and when it is one.

| | CPU, `numba` | CUDA, `triton` |
|---|---|---|
| forward and backward | width <= 8, d a multiple of 16, loops for the two projections: 0.5 (k=4) and 0.7 (k=8) of the time of the adapter without a recurrence | width <= 16, launches parallel over tokens but for the scan: 0.58 (32x512x768, k=4) and 1.2 (8x2048x2048, k=8) of it on an H200, with earlier kernels |

O stays as it is where the mask is False. GRU, LSTM, both directions, dropout in training and modules that something
hooks into run in their parts. docs/recurrence.md has the rows.
"""  # noqa: E501

from __future__ import annotations

import torch
from torch import Tensor, nn

from .arguments import Adapted, AdapterArguments, numbers, some_padding
from .cells import RNN
from .numba_kernels.launch import ADAPTER as BY_LOOPS
from .operation import Operation
from .torch_scan import adapter_in_torch
from .triton_kernels.launch import ADAPTER as BY_KERNELS

__all__ = ["adapt_in_one"]

GLOBAL_HOOKS = tuple(f"_global_{way}{kind}" for way in ("forward", "backward") for kind in ("_hooks", "_pre_hooks"))


def adapt_in_one(
    output: Tensor,
    down: nn.Module,
    cell: nn.Module,
    dropout: nn.Module,
    up: nn.Module,
    *,
    state: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor] | None:
    """O + GELU(RNN(O W_down)) W_up in one operation, if there is one that takes this adapter.

    Args:
        output: O, (B, T, d).
        down: W_down, a linear layer.
        cell: the recurrence.
        dropout: between GELU and W_up.
        up: W_up, a linear layer.
        state: the state before the first token, (B, k); zero if absent.
        mask: (B, T), True = a real token; every token is real if absent.

    Returns:
        The adapted (B, T, d), which is O where the mask is False, and the states after each token (B, T, k); None
        where the parts have to be run one by one.
    """
    if not (
        type(down) is nn.Linear
        and type(up) is nn.Linear
        and type(cell) is RNN
        and not cell.bidirectional
        and (type(dropout) is nn.Identity or (type(dropout) is nn.Dropout and not dropout.training))
        and output.dim() == 3
        and output.is_contiguous()
        and output.numel() > 0
        and output.shape[-1] == down.in_features == up.out_features
        and down.out_features == cell.size == up.in_features
        and not (_has_hooks(down) or _has_hooks(cell) or _has_hooks(dropout) or _has_hooks(up) or _has_global_hooks())
    ):
        return None
    arguments = AdapterArguments(
        output, None if state is None else state.float(), mask, down.weight, down.bias, cell.weight_ih,
        cell.weight_hh, cell.bias_ih, cell.bias_hh, up.weight, up.bias,
    )  # fmt: skip
    implementation = OPERATION.choose(arguments) if _is_whole(arguments) else None
    return None if implementation is None else OPERATION(implementation, arguments)  # type: ignore[return-value]


def _has_hooks(module: nn.Module) -> bool:
    """Whether calling a module does more than its class says: hooks, or a `forward` put in its place."""
    own = module.__dict__
    hooked = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    return bool(hooked) or "forward" in own


def _has_global_hooks() -> bool:
    everywhere = nn.modules.module
    # The lengths, since torch.compile of torch 2.11 cannot trace bool() of a dictionary.
    return any(len(getattr(everywhere, name)) > 0 for name in GLOBAL_HOOKS)


def _is_whole(arguments: AdapterArguments) -> bool:
    """Whether weights are where they belong: wrappers such as FSDP put flat or empty ones in their place."""
    (batch, _, d), width = arguments.x.shape, arguments.down.shape[0]
    square, vector = (width, width), (width,)
    shapes = ((batch, width), (width, d), vector, square, square, vector, vector, (d, width), (d,))
    for tensor, shape in zip((arguments.state, *arguments[3:]), shapes, strict=True):
        if tensor is not None and tensor.shape != shape:
            return False
    outside, inside = arguments.down_bias is None, arguments.bias_ih is None
    return outside == (arguments.up_bias is None) and inside == (arguments.bias_hh is None)


def _shapes(arguments: AdapterArguments) -> Adapted:
    x, down = arguments.x, arguments.down
    narrow = down.new_empty(x.shape[0], x.shape[1], down.shape[0])
    return Adapted(x.new_empty(x.shape), narrow, torch.empty_like(narrow))


def _example(width: int, dtype: torch.dtype, device: torch.device) -> AdapterArguments:
    square, vector = numbers(device, width, width), numbers(device, width)
    return AdapterArguments(
        numbers(device, 3, 5, 32).to(dtype), numbers(device, 3, width), some_padding(device),
        numbers(device, width, 32), vector, square, square.T.contiguous(), vector.clone(), vector.clone(),
        numbers(device, 32, width), numbers(device, 32),
    )  # fmt: skip


OPERATION = Operation(
    "adapter",
    AdapterArguments,
    Adapted,
    visible=2,
    needed=("hidden", "narrow"),
    shapes=_shapes,
    reference=adapter_in_torch,
    example=_example,
    implementations={"numba": BY_LOOPS, "triton": BY_KERNELS},
)
