"""The scan of a recurrence, and which implementation runs it: compiled loops, a Triton kernel, or torch.

| | CPU, `numba` | CUDA, `triton` |
|---|---|---|
| RNN | width <= 64: 15x to 73x torch forward (k=4) | width <= 64: 2.1x cuDNN forward (k=4, T=512, an H100) |
| GRU | width <= 64: 2.4x (k=64) to 89x (k=4) | cuDNN: our kernel had 0.3x to 0.6x of it at k=64 |
| LSTM | states asked for, or width and batch <= 8: 1.8x, 4.6x; else 0.98x to 1.02x, so torch | cuDNN, likewise |

docs/recurrence.md has the rows and how they were measured.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import GATES, ScanArguments, Scanned, numbers, some_padding, state_width
from .numba_kernels.launch import scan_by_loops
from .operation import Operation
from .torch_scan import scan_in_torch
from .triton_kernels.launch import RNN_SCAN

__all__ = ["recur"]

FEW = 8  # up to so many narrow sequences torch's LSTM, one kernel, is slower than the loops


def recur(kind: str, arguments: ScanArguments, *, keep_states: bool = False) -> tuple[Tensor, Tensor | None]:
    """Run a cell of one direction.

    Args:
        kind: "rnn", "gru" or "lstm".
        arguments: its tensors.
        keep_states: ask for the states after every token, which an LSTM in torch does not give by itself.

    Returns:
        The outputs (B, T, k), and the states (B, T, S) where they are asked for or cost nothing.
    """
    width = arguments.weight_hh.shape[1]
    implementation = None
    if kind != "lstm" or keep_states or (width <= FEW and arguments.x.shape[0] <= FEW):
        implementation = SCANS[kind].choose(arguments)
    if implementation is None:
        outputs, cell_states, _ = scan_in_torch(kind, arguments, keep_states)
    elif kind == "lstm":
        outputs, cell_states = SCANS[kind](implementation, arguments)
    else:
        (outputs,), cell_states = SCANS[kind](implementation, arguments), None
    if kind != "lstm":
        return outputs, outputs
    return outputs, None if cell_states is None or not keep_states else torch.cat((outputs, cell_states), dim=-1)


def _operation(kind: str) -> Operation[ScanArguments, Scanned]:
    gates = GATES[kind]

    def shapes(arguments: ScanArguments) -> Scanned:
        x, width = arguments.x, arguments.weight_hh.shape[1]
        one, four = (*x.shape[:2], width), (*x.shape[:2], 4 * width)
        return Scanned(
            x.new_empty(one),
            x.new_empty(one) if kind == "lstm" else None,
            None if kind == "rnn" else x.new_empty(four),
        )

    def example(width: int, dtype: torch.dtype, device: torch.device) -> ScanArguments:
        rows = gates * width
        return ScanArguments(
            numbers(device, 3, 5, width), numbers(device, 3, state_width(kind, width)), some_padding(device),
            numbers(device, rows, width), numbers(device, rows, width), numbers(device, rows), numbers(device, rows),
        )  # fmt: skip

    return Operation(
        f"scan_{kind}",
        ScanArguments,
        Scanned,
        visible=2 if kind == "lstm" else 1,
        needed=Scanned._fields,
        shapes=shapes,
        reference=lambda arguments: scan_in_torch(kind, arguments),
        example=example,
        implementations={"numba": scan_by_loops(kind)} | ({"triton": RNN_SCAN} if kind == "rnn" else {}),
    )


SCANS = {kind: _operation(kind) for kind in GATES}
