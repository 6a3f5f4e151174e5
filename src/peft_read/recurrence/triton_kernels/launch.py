"""The Triton kernels as implementations of the two operations: which cases they take, and how they are launched.

An adapter is three launches forward. Down projection and "GELU, up, add" are parallel over tokens, only the scan
between them is sequential. Backward likewise, and a fourth has the gradients of the recurrence's weights; the last
also has those of W_down and W_up: O and the gradient are each read once for both. No value is read back from the
device. triton is imported when the first kernel is needed.
"""

from __future__ import annotations

import importlib
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...kernel_launch import launch
from ..arguments import GATES, PLAIN, Adapted, AdapterArguments, ScanArguments, Scanned, unfit, unfit_scan
from ..gates import gradients_of_gates
from ..operation import Gradients, Implementation

__all__ = ["ADAPTER", "RNN_SCAN", "filled", "scan_settings", "tile_settings"]

LARGEST_SCAN_WIDTH = 64
LARGEST_ADAPTER_WIDTH = 16  # wider ones are matrix products that cuBLAS does well
LARGEST_GRID = 2**31 - 1
WIDE = (torch.float32, torch.bfloat16, torch.float16)
# Tokens x width x columns of a tile. A program is one warp: several would exchange their parts of it in every step.
TILE_NUMBERS = 2048
PROGRAMS, PART_TOKENS = 2048, 64  # over columns: parts of so many tokens, or fewer and larger ones


def filled(k: int) -> int:
    """The width of a kernel's vectors: the next power of two, at least 2."""
    return max(2, 1 << (k - 1).bit_length())


@cache
def scan_settings(k: int) -> dict[str, int]:
    """Compile-time settings of the scans; W_hh is spread over as many threads as hold it in their registers."""
    return {"K": filled(k), "num_warps": max(1, min(8, filled(k) ** 2 // 1024))}


@cache
def tile_settings(k: int, d: int, most: int = 2) -> dict[str, int]:
    """Compile-time settings of the launches over tiles of at most so many tokens, and of columns of the width d."""
    columns = min(128, max(16, filled(d)))
    tokens = max(1, min(most, TILE_NUMBERS // (filled(k) * columns)))
    return {"K": filled(k), "TOKENS": tokens, "COLUMNS": columns, "num_warps": 1}


@cache
def narrow_settings(k: int) -> dict[str, int]:
    """Those of the launch over tokens that sums products of two vectors of the width."""
    return {"K": filled(k), "TOKENS": max(1, TILE_NUMBERS // 2 // filled(k) ** 2), "num_warps": 1}


def token_parts(tokens: int, blocks: int, tile: int) -> tuple[int, int]:
    """How many parts the tokens have, and the size of one, whole tiles; sums have one order on all cards."""
    parts = max(1, min(-(-tokens // PART_TOKENS), PROGRAMS // blocks))
    part = -(-tokens // (parts * tile)) * tile
    return -(-tokens // part), part


@cache
def _kernel(name: str) -> Any:
    return getattr(importlib.import_module(".scan" if name.startswith("rnn") else ".adapter", __package__), name)


def _place(x: Tensor) -> str:
    """Why a tensor is not where kernels run: on CUDA, or with Triton's interpreter on the CPU; or is too large."""
    if x.shape[0] > LARGEST_GRID:
        return "it has too many sequences"
    if x.device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    return "its tensors are on the CPU"


def _scan_refusal(arguments: ScanArguments) -> str:
    return _place(arguments.x) or unfit_scan(arguments, GATES["rnn"], LARGEST_SCAN_WIDTH)


def _scan(arguments: ScanArguments) -> Scanned:
    x, state, mask, weight_ih, weight_hh, bias_ih, bias_hh = arguments
    inner = F.linear(x, weight_ih, None if bias_ih is None or bias_hh is None else bias_ih + bias_hh)
    return Scanned(_launch_scan(inner, state, mask, weight_hh))


def _launch_scan(inner: Tensor, state: Tensor | None, mask: Tensor | None, weight_hh: Tensor) -> Tensor:
    outputs = torch.empty_like(inner, memory_format=torch.contiguous_format)
    batch, length, k = inner.shape
    launch(
        _kernel("rnn_forward"), (batch,), inner, weight_hh, state, mask, outputs, length, k,
        CONTINUED=state is not None, MASKED=mask is not None, **scan_settings(k),
    )  # fmt: skip
    return outputs


def _launch_scan_backward(
    grad: Tensor, mask: Tensor | None, weight_hh: Tensor, outputs: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of what is inside tanh, zero at padding, and of the state before the first token."""
    batch, length, k = outputs.shape
    inner, grad_state = torch.empty_like(outputs), outputs.new_empty(batch, k)
    launch(
        _kernel("rnn_backward"), (batch,), grad, weight_hh, mask, outputs, inner, grad_state, length, k,
        MASKED=mask is not None, **scan_settings(k),
    )  # fmt: skip
    return inner, grad_state


def _scan_backward(
    arguments: ScanArguments, results: Scanned, grad: Tensor, others: Gradients, needs: ScanArguments
) -> ScanArguments:
    outputs = results.outputs
    inner, grad_state = _launch_scan_backward(grad, arguments.mask, arguments.weight_hh, outputs)
    return gradients_of_gates(inner, inner, grad_state, arguments, outputs, needs)


RNN_SCAN = Implementation(_scan_refusal, _scan, _scan_backward, lambda given: filled(given.weight_hh.shape[1]))


def _adapter_refusal(arguments: AdapterArguments) -> str:
    x, state, mask, *weights = arguments
    if arguments.down.shape[0] > LARGEST_ADAPTER_WIDTH:
        return f"it is wider than {LARGEST_ADAPTER_WIDTH}"
    if type(x) not in PLAIN or x.dtype not in WIDE:
        return "O is neither float32, bfloat16 nor float16"
    return _place(x) or unfit((state, *weights), mask, x)


def _adapter(arguments: AdapterArguments) -> Adapted:
    x, state, mask, down, down_bias, weight_ih, weight_hh, bias_ih, bias_hh, up, up_bias = arguments
    batch, length, d = x.shape
    k, settings = len(down), tile_settings(len(down), d)
    grid = (-(-batch * length // settings["TOKENS"]),)
    narrow, inner = down.new_empty(2, batch, length, k).unbind()
    launch(
        _kernel("down_forward"), grid, x, down, down_bias, weight_ih, bias_ih, bias_hh, narrow, inner, batch * length,
        d, k, SHIFTED=down_bias is not None, BIASED=bias_ih is not None, **settings,
    )  # fmt: skip
    hidden, out = _launch_scan(inner, state, mask, weight_hh), torch.empty_like(x)
    launch(
        _kernel("up_forward"), grid, x, hidden, up.T, up_bias, mask, out, batch * length, d, k,
        LIFTED=up_bias is not None, MASKED=mask is not None, **settings,
    )  # fmt: skip
    return Adapted(out, hidden, narrow)


def _adapter_backward(
    arguments: AdapterArguments, results: Adapted, grad: Tensor, others: Gradients, needs: AdapterArguments
) -> AdapterArguments:
    x, state, mask, down, _, weight_ih, weight_hh, *_, up, _ = arguments
    (batch, length, d), k, hidden = x.shape, len(down), results.hidden
    tokens, settings, narrow = batch * length, tile_settings(k, d), narrow_settings(k)
    grad, grad_hidden = grad.contiguous(), others[0]
    carried, low, active = torch.empty_like(hidden), torch.empty_like(hidden), hidden.new_empty(tokens, k + 1)
    launch(
        _kernel("up_backward"), (-(-tokens // settings["TOKENS"]),), grad, hidden, up.T, grad_hidden, mask, carried,
        active, tokens, d, k, SEEN=grad_hidden is not None, MASKED=mask is not None, **settings,
    )  # fmt: skip
    inner, grad_state = _launch_scan_backward(carried, mask, weight_hh, hidden)
    parts, part = token_parts(tokens, 1, narrow["TOKENS"])
    sums = hidden.new_empty(parts, (2 * k + 3) * k)
    launch(
        _kernel("narrow_backward"), (parts,), inner, results.narrow, hidden, state, weight_ih, low, sums, tokens,
        length, part, k, CONTINUED=state is not None, **narrow,
    )  # fmt: skip
    by_input, by_state, bias_ih, bias_hh, down_bias = sums.sum(0).split((k * k, k * k, k, k, k))
    grad_x, settings = torch.empty_like(x) if needs.x else None, tile_settings(k, d, 4)
    blocks = -(-d // settings["COLUMNS"])
    parts, part = token_parts(tokens, blocks, settings["TOKENS"])
    sums = down.new_empty(parts, 2 * k + 1, d)
    launch(
        _kernel("columns_backward"), (blocks, parts), grad, x, low, active, down, grad_x, sums, tokens, part, d, k,
        PASSED_ON=needs.x, UP=bool(needs.up or needs.up_bias), DOWN=needs.down, **settings,
    )  # fmt: skip
    wide = sums.sum(0)
    found = (by_input.view(k, k), by_state.view(k, k), bias_ih, bias_hh, wide[:k].T, wide[k])
    return AdapterArguments(grad_x, grad_state, None, wide[k + 1 :], down_bias, *found)  # type: ignore[arg-type]


ADAPTER = Implementation(_adapter_refusal, _adapter, _adapter_backward, lambda given: filled(given.down.shape[0]))
