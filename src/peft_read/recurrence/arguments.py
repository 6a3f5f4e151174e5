"""What the two operations of this room take and give: the scan of a recurrence, and a whole RNN adapter.

B sequences of T tokens, I inputs, k hidden units, d the width of a model; G is the number of gates: 1 for an RNN, 3
for a GRU, 4 for an LSTM. What is absent is None. Gradients come in the classes of the arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, float32, nn, strided

__all__ = [
    "GATES",
    "PLAIN",
    "Adapted",
    "AdapterArguments",
    "ScanArguments",
    "Scanned",
    "numbers",
    "some_padding",
    "state_width",
    "unfit",
    "unfit_scan",
]

PLAIN = (Tensor, nn.Parameter)
GATES = {"rnn": 1, "gru": 3, "lstm": 4}


def state_width(kind: str, width: int) -> int:
    """How many numbers the state of one token has: h, and c of an LSTM."""
    return 2 * width if kind == "lstm" else width


def numbers(device: torch.device, *shape: int) -> Tensor:
    """Numbers in [-0.5, 0.5] for a trial, the same every time and without a generator."""
    return torch.linspace(-9, 9, torch.Size(shape).numel(), device=device).sin().view(shape) / 2


def some_padding(device: torch.device) -> Tensor:
    """A mask (3, 5) for a trial: padding in the middle, on the left and on the right."""
    return torch.tensor([[1, 1, 0, 1, 1], [0, 0, 1, 1, 1], [1, 1, 1, 0, 0]], device=device).bool()


def unfit(tensors: Sequence[Tensor | None], mask: Tensor | None, x: Tensor) -> str:
    """Why tensors cannot be handed to a loop or a kernel beside x, "" if they can."""
    place = x.get_device()
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in PLAIN:
            return "a tensor is of a subclass"
        if tensor.dtype is not float32:
            return "a tensor is not float32"
        if tensor.get_device() != place or tensor.layout is not strided:
            return "its tensors are not dense ones on one device"
    if mask is not None and (mask.dtype is not torch.bool or mask.shape != x.shape[:2] or mask.get_device() != place):
        return "the mask is not boolean, one entry per token"
    return ""


class ScanArguments(NamedTuple):
    """The recurrence of one direction over a batch of sequences."""

    x: Tensor  # (B, T, I), float32 on the fast paths
    state: Tensor | None  # before the first token, (B, k), or (B, 2 k) of an LSTM; zero if absent
    mask: Tensor | None  # (B, T) bool, True = a real token; every token is real if absent
    weight_ih: Tensor  # (G k, I), the gates in torch's order
    weight_hh: Tensor  # (G k, k)
    bias_ih: Tensor | None  # (G k,); both biases or neither
    bias_hh: Tensor | None  # (G k,)


class Scanned(NamedTuple):
    """The result of a scan. A token that is padding repeats the state before it."""

    outputs: Tensor  # h_t, (B, T, k)


def unfit_scan(arguments: ScanArguments, gates: int, largest: int) -> str:
    """Why a scan cannot be handed to a loop or a kernel, which would read beyond a tensor that is too small."""
    x, state, mask, weight_ih, weight_hh, bias_ih, bias_hh = arguments
    rows, width = weight_hh.shape
    if width > largest:
        return f"it is wider than {largest}"
    if not (
        rows == gates * width
        and weight_ih.shape == (rows, x.shape[-1])
        and (bias_ih is None) == (bias_hh is None)
        and (bias_ih is None or bias_ih.shape == (rows,))
        and (bias_hh is None or bias_hh.shape == (rows,))
        and (state is None or state.shape == (x.shape[0], width))
    ):
        return "its tensors do not fit together"
    return unfit((x, state, weight_ih, weight_hh, bias_ih, bias_hh), mask, x)


class AdapterArguments(NamedTuple):
    """O + GELU(RNN(O W_down)) W_up."""

    x: Tensor  # O, (B, T, d)
    state: Tensor | None  # before the first token, (B, k)
    mask: Tensor | None  # (B, T) bool
    down: Tensor  # W_down, (k, d)
    down_bias: Tensor | None  # (k,)
    weight_ih: Tensor  # (k, k)
    weight_hh: Tensor  # (k, k)
    bias_ih: Tensor | None  # (k,); both or neither
    bias_hh: Tensor | None  # (k,)
    up: Tensor  # W_up, (d, k)
    up_bias: Tensor | None  # (d,)

    def within(self, x: Tensor) -> ScanArguments:
        """The recurrence inside, of inputs x: O W_down + b_down, (B, T, k)."""
        return ScanArguments(x, self.state, self.mask, *self[5:9])  # type: ignore[arg-type]


class Adapted(NamedTuple):
    """The result of an adapter. O stays as it is where the mask is False, W_up's bias included."""

    out: Tensor  # (B, T, d), in the dtype of O
    hidden: Tensor  # the states after each token, (B, T, k)
    narrow: Tensor | None = None  # O W_down + b_down, (B, T, k), for the backward pass
