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
from torch import Tensor
from torch.nn import functional as F

from ... import backends
from ..arguments import GATES, Adapted, AdapterArguments, ScanArguments, Scanned, unfit, unfit_scan
from ..gates import gradients_of_gates, slopes_of_gru
from ..operation import Gradients, Implementation

__all__ = ["ADAPTER", "SCANS"]

NARROW = 16  # inputs and states; wider ones are projected by a matrix product
LARGEST_SCAN_WIDTH = 64
LARGEST_ADAPTER_WIDTH = 8  # wider ones are as fast in parts, by BLAS
MOST_THREADS = 4  # the loops are a single thread's; more threads of torch overtake them
VECTOR = 16  # numbers of O at a time
LOWEST_ADDRESS = 1 << 40  # of memory, as a rule; a tensor that lies lower is asked whether its storage was freed


@torch.compiler.assume_constant_result
def _threads() -> int:
    return torch.get_num_threads()


@cache
def _loops(name: str) -> Any:
    """The loops of a module, compiled: it runs inside the first trial of what needs them."""
    return importlib.import_module(f".{name}", __package__)


def _addresses(*given: Tensor | None) -> tuple[list[int], Any]:
    """The addresses of tensors, of contiguous copies of some, 0 for None; and what must live as long as they are used.

    Raises:
        RuntimeError: if a tensor has no memory.
    """
    addresses, copies = [], []
    for tensor in given:
        if tensor is not None and (not tensor.is_contiguous() or tensor.is_neg()):
            copies.append(tensor := tensor.resolve_neg().contiguous())
        addresses.append(address := 0 if tensor is None else tensor.data_ptr())
        if address < LOWEST_ADDRESS and tensor is not None and not tensor.untyped_storage().data_ptr():
            raise RuntimeError(
                f"A tensor of the recurrence, of shape {tuple(tensor.shape)}, has no memory: its storage was freed, "
                "as FSDP does with weights that are not gathered. Call the module through its wrapper."
            )
    return addresses, (given, copies)


def _scan(arguments: ScanArguments) -> Scanned:
    x, state, mask, weight_ih, weight_hh, bias_ih, bias_hh = arguments
    batch, length, inputs = x.shape
    gates, width = weight_hh.shape
    outputs = x.new_empty(batch, length, width)
    by_input: Tensor | None = weight_ih
    if inputs > NARROW or width > NARROW:
        bias = bias_ih if bias_ih is None or bias_hh is None or gates > width else bias_ih + bias_hh
        x, by_input = F.linear(x, weight_ih, bias), None
    addresses, _kept = _addresses(x, by_input, weight_hh, bias_ih, bias_hh, state, mask)
    _loops("scan").scan_forward(*addresses, outputs.data_ptr(), batch, length, inputs, width, gates)
    return Scanned(outputs)


def _scan_backward(
    arguments: ScanArguments, results: Scanned, grad: Tensor, others: Gradients, needs: ScanArguments
) -> ScanArguments:
    x, state, mask, weight_ih, weight_hh, _, _ = arguments
    outputs = results.outputs
    (batch, length, width), (gates, inputs) = outputs.shape, weight_ih.shape
    slopes, kept = (None, None) if gates == width else slopes_of_gru(arguments, outputs)
    outer = outputs.new_empty(batch, length, width) if slopes is None else slopes.new_empty(slopes.shape)
    grad_state = outputs.new_empty(batch, width)
    addresses, _kept = _addresses(grad, outputs, mask, slopes, kept, weight_hh)
    _loops("scan").scan_backward(*addresses, outer.data_ptr(), grad_state.data_ptr(), batch, length, width, gates)
    inner = outer
    if slopes is not None:
        inner = torch.cat((outer[..., : 2 * width], outer[..., 3 * width :]), dim=-1)
        outer = outer[..., : 3 * width]
    if inputs > NARROW or width > NARROW:
        return gradients_of_gates(inner, outer, grad_state, arguments, outputs, needs)
    found = [x.new_empty(shape) for shape in (x.shape, (gates, inputs), (gates, width), (gates,), (gates,))]
    addresses, _kept = _addresses(inner, outer, x, weight_ih, state, outputs, *found)
    _loops("scan").gradients_of_gates(*addresses, batch, length, inputs, width, gates)
    return ScanArguments(found[0], grad_state, None, *found[1:])


def _scan_of(kind: str) -> Implementation[ScanArguments, Scanned]:
    def refusal(arguments: ScanArguments) -> str:
        place = "" if arguments.x.is_cpu else "its tensors are not on the CPU"
        return place or unfit_scan(arguments, GATES[kind], LARGEST_SCAN_WIDTH)

    return Implementation(
        refusal, _scan, _scan_backward, width=lambda arguments: 4,
        preparing=lambda: backends.compiling("the scan", _loops("scan").scan_backward),
    )  # fmt: skip


def _product(loop: str, rows: Tensor, *factors: Tensor, k: int, shape: Sequence[int]) -> Tensor:
    """What a loop of `skinny.py` makes of rows (B, T, d) and of what is k wide."""
    out = rows.new_empty(shape)
    addresses, _kept = _addresses(rows, *factors)
    getattr(_loops("skinny"), loop)(*addresses, out.data_ptr(), rows.shape[0] * rows.shape[1], rows.shape[2], k)
    return out


def _active(hidden: Tensor, mask: Tensor | None, up_bias: Tensor | None) -> Tensor:
    """GELU(h), and a one for the bias of W_up; zero at padding."""
    active = F.gelu(hidden)
    if up_bias is not None:
        active = F.pad(active, (0, 1), value=1.0)
    return active if mask is None else torch.where(mask[..., None], active, 0)


def _adapter_refusal(arguments: AdapterArguments) -> str:
    x, state, mask, *weights = arguments
    if arguments.down.shape[0] > LARGEST_ADAPTER_WIDTH:
        return f"it is wider than {LARGEST_ADAPTER_WIDTH}"
    if x.shape[-1] % VECTOR:
        return f"the width of O is no multiple of {VECTOR}"
    if _threads() > MOST_THREADS:
        return f"torch has more than {MOST_THREADS} threads"
    if torch.is_autocast_enabled("cpu"):
        return "it is under autocast"
    return unfit((x, state, *weights), mask, x) if x.is_cpu else "its tensors are not on the CPU"


def _adapter(arguments: AdapterArguments) -> Adapted:
    x, mask, up, up_bias, k = arguments.x, arguments.mask, arguments.up, arguments.up_bias, len(arguments.down)
    narrow = _product("narrow", x, arguments.down, k=k, shape=(*x.shape[:2], k))
    if arguments.down_bias is not None:
        narrow += arguments.down_bias
    hidden = _scan(arguments.within(narrow)).outputs
    lines = up.T if up_bias is None else torch.cat((up.T, up_bias[None]))
    out = _product("expand", x, _active(hidden, mask, up_bias), lines, k=len(lines), shape=x.shape)
    return Adapted(out, hidden, narrow)


def _adapter_backward(
    arguments: AdapterArguments, results: Adapted, grad: Tensor, others: Gradients, needs: AdapterArguments
) -> AdapterArguments:
    x, mask, down, up_bias = arguments.x, arguments.mask, arguments.down, arguments.up_bias
    hidden, narrow, (k, d) = results.hidden, results.narrow, down.shape
    slope = _product("narrow", grad, arguments.up.T, k=k, shape=hidden.shape)
    # In float64: these errors are all summed up in the gradients of the recurrence.
    slope = torch.ops.aten.gelu_backward(slope.double(), hidden.double()).float()
    if mask is not None:
        slope = torch.where(mask[..., None], slope, 0)
    if others[0] is not None:
        slope = slope + others[0]
    inside = _scan_backward(arguments.within(narrow), Scanned(hidden), slope, (), needs.within(True))  # type: ignore[arg-type]
    lines = None
    if needs.up or needs.up_bias:
        active = _active(hidden, mask, up_bias)
        lines = _product("gather", grad, active, k=active.shape[2], shape=(active.shape[2], d))
    return AdapterArguments(
        _product("expand", grad, inside.x, down, k=k, shape=x.shape) if needs.x else None,  # type: ignore[arg-type]
        inside.state,
        None,
        _product("gather", x, inside.x, k=k, shape=(k, d)) if needs.down else None,  # type: ignore[arg-type]
        inside.x.sum((0, 1)) if needs.down_bias else None,
        *inside[3:],  # type: ignore[arg-type]
        None if lines is None else lines[: len(down)].T.contiguous(),  # type: ignore[arg-type]
        None if lines is None else lines[-1],
    )


SCANS = {kind: _scan_of(kind) for kind in ("rnn", "gru")}
ADAPTER = Implementation(
    _adapter_refusal, _adapter, _adapter_backward, width=lambda arguments: 4,
    preparing=lambda: backends.compiling("the adapter", _loops("skinny").gather),
)  # fmt: skip
