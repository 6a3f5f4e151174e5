"""The scan of a recurrence, and which implementation runs it: compiled loops, a Triton kernel, or torch.

| | CPU, `numba` | CUDA, `triton` |
|---|---|---|
| RNN | width <= 64: 14x to 62x torch forward (k=4) | earlier, on an H200: 2.6x cuDNN forward (k=4), 2.0x at k=16 |
| GRU | width <= 64: 2.6x (k=64) to 67x (k=4) | cuDNN: a kernel was slower than it at k=64 |
| LSTM | torch: loops had 0.98x to 1.02x of it in four of six shapes | cuDNN, likewise |

docs/recurrence.md and docs/recurrence_cuda.md have the rows and how they were measured.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from .arguments import GATES, ScanArguments, Scanned, numbers, some_padding
from .numba_kernels.launch import SCANS as BY_LOOPS
from .operation import Operation
from .torch_scan import scan_in_torch
from .triton_kernels.launch import RNN_SCAN

__all__ = ["recur"]


def recur(kind: str, arguments: ScanArguments, *, keep_states: bool = False) -> tuple[Tensor, Tensor | None]:
    """Run a cell of one direction.

    Args:
        kind: "rnn", "gru" or "lstm".
        arguments: its tensors.
        keep_states: ask for the states after every token, which torch's LSTM does not give by itself.

    Returns:
        The outputs (B, T, k), and the states (B, T, S) where they are asked for or cost nothing.
    """
    if (operation := SCANS.get(kind)) is not None:
        if (implementation := operation.choose(arguments)) is not None:
            (outputs,) = operation(implementation, arguments)
            return outputs, outputs
    elif not torch.compiler.is_compiling():
        backends.refuse(f"scan_{kind}", backends.backend(arguments.x.device.type), "it has no loop or kernel")
    outputs, cell_states = scan_in_torch(kind, arguments, keep_states and kind == "lstm")
    if kind != "lstm":
        return outputs, outputs
    return outputs, None if cell_states is None else torch.cat((outputs, cell_states), dim=-1)


def _operation(kind: str) -> Operation[ScanArguments, Scanned]:
    def shapes(arguments: ScanArguments) -> Scanned:
        x = arguments.x
        return Scanned(x.new_empty(*x.shape[:2], arguments.weight_hh.shape[1]))

    def example(width: int, dtype: torch.dtype, device: torch.device) -> ScanArguments:
        rows = GATES[kind] * width
        return ScanArguments(
            numbers(device, 3, 5, width), numbers(device, 3, width), some_padding(device),
            numbers(device, rows, width), numbers(device, rows, width), numbers(device, rows), numbers(device, rows),
        )  # fmt: skip

    return Operation(
        f"scan_{kind}",
        ScanArguments,
        Scanned,
        visible=1,
        needed=("outputs",),
        shapes=shapes,
        reference=lambda arguments: Scanned(scan_in_torch(kind, arguments)[0]),
        example=example,
        implementations={"numba": BY_LOOPS[kind]} | ({"triton": RNN_SCAN} if kind == "rnn" else {}),
    )


SCANS = {kind: _operation(kind) for kind in BY_LOOPS}
