"""The Triton kernels as implementations of the two operations: which cases they take, and how they are launched.

An adapter is three launches each way. Down projection and "GELU, up, add" are parallel over tokens, only the scan
between them is sequential; backward likewise, where the last launch also has the gradients of W_down and W_up: O and
the gradient are each read once for both. No value is read back from the device. triton is imported when the first
kernel is needed.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..arguments import GATES, PLAIN, Adapted, AdapterArguments, ScanArguments, Scanned, unfit, unfit_scan
from ..gates import gradients_of_gates
from ..operation import Implementation

__all__ = ["ADAPTER", "RNN_SCAN", "filled", "scan_settings", "tile_settings"]

LARGEST_SCAN_WIDTH = 64
LARGEST_ADAPTER_WIDTH = 16  # wider ones are matrix products that cuBLAS does well
LARGEST_GRID = 2**31 - 1
WIDE = (torch.float32, torch.bfloat16, torch.float16)
# Tokens x width x columns that a program multiplies at a time. It is one warp: threads of several would exchange their
# parts of a tile in every step.
TILE_NUMBERS, COLUMN_NUMBERS = 2048, 2048
PROGRAMS, PART_TOKENS = 2048, 64  # over columns: parts of so many tokens, or fewer and larger ones


def filled(k: int) -> int:
    """The width of a kernel's vectors: the next power of two, at least 2."""
    return max(2, 1 << (k - 1).bit_length())


def scan_settings(k: int) -> dict[str, int]:
    """Compile-time settings of the scans; W_hh is spread over as many threads as hold it in their registers."""
    width = filled(k)
    return {"K": width, "num_warps": max(1, min(8, width * width // 1024))}


def tile_settings(k: int, d: int) -> dict[str, int]:
    """Compile-time settings of the launches over tokens: tiles of tokens x columns of the model's width d."""
    width = filled(k)
    columns = min(128, max(16, filled(d)))
    return {"K": width, "TOKENS": max(1, TILE_NUMBERS // (width * columns)), "COLUMNS": columns, "num_warps": 1}


def column_settings(k: int, d: int) -> dict[str, int]:
    """Compile-time settings of the launch over columns, which sums two products and holds a matrix at a time."""
    width = filled(k)
    columns = min(128, max(16, filled(d)), COLUMN_NUMBERS // width)
    return {"K": width, "TOKENS": max(1, COLUMN_NUMBERS // (width * columns)), "COLUMNS": columns, "num_warps": 1}


def token_parts(tokens: int, blocks: int, tile: int) -> tuple[int, int]:
    """Into how many parts the launch over columns divides the tokens, and the tokens of a part, a multiple of a tile.

    A function of the sizes alone, so that sums have the same order on every card.
    """
    parts = max(1, min(-(-tokens // PART_TOKENS), PROGRAMS // blocks))
    part = -(-tokens // (parts * tile)) * tile
    return -(-tokens // part), part


@cache
def _kernels(name: str) -> Any:
    """The kernels of a module."""
    return importlib.import_module(f".{name}", __package__)


def _place(x: Tensor) -> str:
    """Why a tensor is not where kernels run: on CUDA, or with Triton's interpreter on the CPU."""
    if x.device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    return "its tensors are on the CPU"


def _on(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _pointer(tensor: Tensor | None, anything: Tensor) -> Tensor:
    """A tensor to point at; a mask as bytes, and anything at all for what is absent and never read."""
    if tensor is None:
        return anything
    tensor = tensor.contiguous()
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor


def _scan_refusal(arguments: ScanArguments) -> str:
    if arguments.x.shape[0] > LARGEST_GRID:
        return "it has too many sequences"
    return _place(arguments.x) or unfit_scan(arguments, GATES["rnn"], LARGEST_SCAN_WIDTH)


def _scan(arguments: ScanArguments) -> Scanned:
    x, state, mask, weight_ih, weight_hh, bias_ih, bias_hh = arguments
    inner = F.linear(x, weight_ih, None if bias_ih is None or bias_hh is None else bias_ih + bias_hh)
    return Scanned(_launch_scan(inner, state, mask, weight_hh))


def _launch_scan(inner: Tensor, state: Tensor | None, mask: Tensor | None, weight_hh: Tensor) -> Tensor:
    inner, outputs = inner.contiguous(), torch.empty_like(inner, memory_format=torch.contiguous_format)
    batch, length, k = inner.shape
    with _on(inner):
        _kernels("scan").rnn_forward[(batch,)](
            inner, weight_hh.contiguous(), _pointer(state, inner), _pointer(mask, inner), outputs, length, k,
            CONTINUED=state is not None, MASKED=mask is not None, **scan_settings(k),
        )  # fmt: skip
    return outputs


def _launch_scan_backward(grad: Tensor, mask: Tensor | None, weight_hh: Tensor, outputs: Tensor) -> tuple[Any, Any]:
    """The gradients of what is inside tanh, zero at padding, and of the state before the first token."""
    grad, inner = grad.contiguous(), torch.empty_like(outputs)
    batch, length, k = outputs.shape
    grad_state = outputs.new_empty(batch, k)
    with _on(outputs):
        _kernels("scan").rnn_backward[(batch,)](
            grad, weight_hh.contiguous(), _pointer(mask, grad), outputs, inner, grad_state, length, k,
            MASKED=mask is not None, **scan_settings(k),
        )  # fmt: skip
    return inner, grad_state


def _scan_backward(
    arguments: ScanArguments, results: Scanned, grads: Sequence[Tensor | None], needs: ScanArguments
) -> ScanArguments:
    outputs = results.outputs
    grad = torch.zeros_like(outputs) if grads[0] is None else grads[0]
    inner, grad_state = _launch_scan_backward(grad, arguments.mask, arguments.weight_hh, outputs)
    return gradients_of_gates(inner, inner, grad_state, arguments, outputs, needs)


RNN_SCAN = Implementation(_scan_refusal, _scan, _scan_backward, lambda given: filled(given.weight_hh.shape[1]))


def _adapter_refusal(arguments: AdapterArguments) -> str:
    x, state, mask, *weights = arguments
    if arguments.down.shape[0] > LARGEST_ADAPTER_WIDTH:
        return f"it is wider than {LARGEST_ADAPTER_WIDTH}"
    if type(x) not in PLAIN or x.dtype not in WIDE:
        return "O is neither float32, bfloat16 nor float16"
    if x.shape[0] > LARGEST_GRID:
        return "it has too many sequences"
    return _place(x) or unfit((state, *weights), mask, x)


def _adapter(arguments: AdapterArguments) -> Adapted:
    x, state, mask, down, down_bias, weight_ih, weight_hh, bias_ih, bias_hh, up, up_bias = arguments
    batch, length, d = x.shape
    k, kernels = len(down), _kernels("adapter")
    settings = tile_settings(k, d)
    grid = (-(-batch * length // settings["TOKENS"]),)
    narrow, inner = down.new_empty(2, batch, length, k).unbind()
    with _on(x):
        kernels.down_forward[grid](
            x, down.contiguous(), _pointer(down_bias, down), weight_ih.contiguous(), _pointer(bias_ih, down),
            _pointer(bias_hh, down), narrow, inner, batch * length, d, k, SHIFTED=down_bias is not None,
            BIASED=bias_ih is not None, **settings,
        )  # fmt: skip
    hidden, out = _launch_scan(inner, state, mask, weight_hh), torch.empty_like(x)
    with _on(x):
        kernels.up_forward[grid](
            x, hidden, up.T.contiguous(), _pointer(up_bias, up), _pointer(mask, x), out, batch * length, d, k,
            LIFTED=up_bias is not None, MASKED=mask is not None, **settings,
        )  # fmt: skip
    return Adapted(out, hidden, narrow)


def _adapter_backward(
    arguments: AdapterArguments, results: Adapted, grads: Sequence[Tensor | None], needs: AdapterArguments
) -> AdapterArguments:
    x, mask, down, up, hidden = arguments.x, arguments.mask, arguments.down, arguments.up, results.hidden
    batch, length, d = x.shape
    k, kernels = len(down), _kernels("adapter")
    settings = tile_settings(k, d)
    grad = torch.zeros_like(x) if grads[0] is None else grads[0].contiguous()
    tokens = batch * length
    carried, active = torch.empty_like(hidden), hidden.new_empty(tokens, k + 1)
    with _on(x):
        kernels.up_backward[(-(-tokens // settings["TOKENS"]),)](
            grad, hidden, up.T.contiguous(), _pointer(grads[1], hidden), _pointer(mask, hidden), carried, active,
            tokens, d, k, SEEN=grads[1] is not None, MASKED=mask is not None, **settings,
        )  # fmt: skip
    inner, grad_state = _launch_scan_backward(carried, mask, arguments.weight_hh, hidden)
    within, wanted = arguments.within(results.narrow), needs.within(True)  # type: ignore[arg-type]
    inside = gradients_of_gates(inner, inner, grad_state, within, hidden, wanted)
    low = inside.x.flatten(0, 1)  # the gradient of O W_down, (B · T, k)
    wants_up, wants_down = bool(needs.up or needs.up_bias), bool(needs.down)
    grad_x = torch.empty_like(x) if needs.x else None
    settings = column_settings(k, d)
    blocks = -(-d // settings["COLUMNS"])
    parts, part = token_parts(tokens, blocks, settings["TOKENS"])
    lifted, lowered = down.new_empty(parts, k + 1, d), down.new_empty(parts, k, d)
    with _on(x):
        kernels.columns_backward[(blocks, parts)](
            grad, x, low, active, down.contiguous(), grad if grad_x is None else grad_x, lifted, lowered, tokens, part,
            d, k, PASSED_ON=grad_x is not None, UP=wants_up, DOWN=wants_down, **settings,
        )  # fmt: skip
    # GELU(h), and a one for the bias, both zero at padding: the gradients of W_up and its bias at once.
    lifted = lifted.sum(0)
    return AdapterArguments(
        grad_x,  # type: ignore[arg-type]
        grad_state,
        None,
        lowered.sum(0) if wants_down else None,  # type: ignore[arg-type]
        low.sum(0) if needs.down_bias else None,
        *inside[3:],  # type: ignore[arg-type]
        lifted[:k].T if wants_up else None,  # type: ignore[arg-type]
        lifted[k] if wants_up else None,
    )


ADAPTER = Implementation(_adapter_refusal, _adapter, _adapter_backward, lambda given: filled(given.down.shape[0]))
