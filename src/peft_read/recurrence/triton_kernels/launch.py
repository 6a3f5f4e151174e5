"""The Triton kernels as implementations of the two operations: which cases they take, and how they are launched.

An adapter is three launches each way. Down projection and "GELU, up, add" are parallel over tokens, only the scan
between them is sequential; backward likewise, with the gradients of W_down and W_up as matrix products of torch. No
value is read back from the device. triton is imported when the first kernel is needed.
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

from ..arguments import GATES, PLAIN, Adapted, AdapterArguments, ScanArguments, Scanned, fit_together, unfit
from ..gates import gradients_of_gates
from ..operation import Implementation

__all__ = ["ADAPTER", "RNN_SCAN", "filled", "scan_settings", "tile_settings"]

LARGEST_SCAN_WIDTH = 64
LARGEST_ADAPTER_WIDTH = 16  # wider ones are matrix products that cuBLAS does well
LARGEST_GRID = 2**31 - 1
WIDE = (torch.float32, torch.bfloat16, torch.float16)
TILE_NUMBERS = 8192  # tokens x width x columns that a program multiplies at a time: 64 registers a thread of 4 warps


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
    return {"K": width, "TOKENS": max(2, TILE_NUMBERS // (width * columns)), "COLUMNS": columns, "num_warps": 4}


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
    x, state, mask, *weights = arguments
    if arguments.weight_hh.shape[1] > LARGEST_SCAN_WIDTH:
        return f"it is wider than {LARGEST_SCAN_WIDTH}"
    if not fit_together(arguments, GATES["rnn"]):
        return "its tensors do not fit together"
    if x.shape[0] > LARGEST_GRID:
        return "it has too many sequences"
    return _place(x) or unfit((x, state, *weights), mask, x)


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


RNN_SCAN = Implementation(
    _scan_refusal,
    _scan,
    _scan_backward,
    width=lambda arguments: filled(arguments.weight_hh.shape[1]),
)


def _adapter_refusal(arguments: AdapterArguments) -> str:
    x, state, mask, *weights = arguments
    if arguments.down.shape[0] > LARGEST_ADAPTER_WIDTH:
        return f"it is wider than {LARGEST_ADAPTER_WIDTH}"
    if type(x) not in PLAIN or x.dtype not in WIDE:
        return "O is neither float32, bfloat16 nor float16"
    if x.shape[0] > LARGEST_GRID:
        return "it has too many sequences"
    return _place(x) or unfit((state, *weights), mask, x)


def _over_tokens(x: Tensor, settings: dict[str, int], *, columns: bool) -> tuple[int, ...]:
    """The grid of a launch over the B T tokens, and over the columns of O if they are independent."""
    tokens, d = x.shape[0] * x.shape[1], x.shape[2]
    rows = -(-tokens // settings["TOKENS"])
    return (rows, -(-d // settings["COLUMNS"])) if columns else (rows,)


def _adapter(arguments: AdapterArguments) -> Adapted:
    x, state, mask, down, down_bias, weight_ih, weight_hh, bias_ih, bias_hh, up, up_bias = arguments
    batch, length, d = x.shape
    k, kernels = len(down), _kernels("adapter")
    settings = tile_settings(k, d)
    narrow, inner = down.new_empty(2, batch, length, k).unbind()
    with _on(x):
        kernels.down_forward[_over_tokens(x, settings, columns=False)](
            x, down.contiguous(), _pointer(down_bias, down), weight_ih.contiguous(), _pointer(bias_ih, down),
            _pointer(bias_hh, down), narrow, inner, batch * length, d, k, SHIFTED=down_bias is not None,
            BIASED=bias_ih is not None, **settings,
        )  # fmt: skip
    hidden, out = _launch_scan(inner, state, mask, weight_hh), torch.empty_like(x)
    with _on(x):
        kernels.up_forward[_over_tokens(x, settings, columns=True)](
            x, hidden, up.contiguous(), _pointer(up_bias, up), _pointer(mask, x), out, batch * length, d, k,
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
    carried, active = torch.empty_like(hidden), hidden.new_empty(batch * length, k + 1)
    with _on(x):
        kernels.up_backward[_over_tokens(x, settings, columns=False)](
            grad, hidden, up.contiguous(), _pointer(grads[1], hidden), _pointer(mask, hidden), carried, active,
            batch * length, d, k, SEEN=grads[1] is not None, MASKED=mask is not None, **settings,
        )  # fmt: skip
    inner, grad_state = _launch_scan_backward(carried, mask, arguments.weight_hh, hidden)
    within, wanted = arguments.within(results.narrow), needs.within(True)  # type: ignore[arg-type]
    inside = gradients_of_gates(inner, inner, grad_state, within, hidden, wanted)
    low = inside.x.flatten(0, 1)  # the gradient of O W_down, (B · T, k)
    grad_x = torch.empty_like(x) if needs.x else None
    if grad_x is not None:
        with _on(x):
            kernels.down_backward[_over_tokens(x, settings, columns=True)](
                grad, low, down.contiguous(), grad_x, batch * length, d, k, **settings
            )
    # GELU(h), and a one for the bias, both zero at padding: the gradients of W_up and its bias at once.
    lifted = grad.flatten(0, 1).to(down.dtype).T @ active if needs.up or needs.up_bias else None
    return AdapterArguments(
        grad_x,  # type: ignore[arg-type]
        grad_state,
        None,
        low.T @ x.flatten(0, 1).to(down.dtype) if needs.down else None,  # type: ignore[arg-type]
        low.sum(0) if needs.down_bias else None,
        *inside[3:],  # type: ignore[arg-type]
        None if lifted is None else lifted[:, :k],  # type: ignore[arg-type]
        None if lifted is None else lifted[:, k],
    )


ADAPTER = Implementation(
    _adapter_refusal,
    _adapter,
    _adapter_backward,
    width=lambda arguments: filled(arguments.down.shape[0]),
)
