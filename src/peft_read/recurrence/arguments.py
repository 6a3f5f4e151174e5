"""What the two operations of this room take and give: the scan of a recurrence, and a whole RNN adapter.

B sequences of T tokens, I inputs, k hidden units, d the width of a model; G is the number of gates: 1 for an RNN, 3
for a GRU, 4 for an LSTM. What is absent is None. Gradients come in the classes of the arguments.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "GATES",
    "Adapted",
    "AdapterArguments",
    "ScanArguments",
    "Scanned",
    "numbers",
    "some_padding",
    "state_width",
    "states_before",
]

GATES = {"rnn": 1, "gru": 3, "lstm": 4}


def state_width(kind: str, width: int) -> int:
    """How many numbers the state of one token has: h, and c of an LSTM."""
    return 2 * width if kind == "lstm" else width


def states_before(outputs: Tensor, state: Tensor | None) -> Tensor:
    """h_{t-1} of every token, (B, T, k), from all h_t and the state before the first token."""
    batch, _, width = outputs.shape
    first = outputs.new_zeros(batch, width) if state is None else state[:, :width]
    return torch.cat((first[:, None], outputs[:, :-1]), dim=1)


def numbers(device: torch.device, *shape: int) -> Tensor:
    """Numbers in [-0.5, 0.5] for a trial, the same every time and without a generator."""
    return torch.linspace(-9, 9, torch.Size(shape).numel(), device=device).sin().view(shape) / 2


def some_padding(device: torch.device) -> Tensor:
    """A mask (3, 5) for a trial: padding in the middle, on the left and on the right."""
    return torch.tensor([[1, 1, 0, 1, 1], [0, 0, 1, 1, 1], [1, 1, 1, 0, 0]], device=device).bool()


class ScanArguments(NamedTuple):
    """The recurrence of one direction over a batch of sequences."""

    x: Tensor  # (B, T, I), float32 on the fast paths
    state: Tensor | None  # before the first token, (B, k) or (B, 2k) of an LSTM; zero if absent
    mask: Tensor | None  # (B, T) bool, True = a real token; every token is real if absent
    weight_ih: Tensor  # (G k, I), the gates in torch's order
    weight_hh: Tensor  # (G k, k)
    bias_ih: Tensor | None  # (G k,); both biases or neither
    bias_hh: Tensor | None  # (G k,)


class Scanned(NamedTuple):
    """The result of a scan. A token that is padding repeats the state before it."""

    outputs: Tensor  # h_t, (B, T, k)
    cell_states: Tensor | None  # c_t of an LSTM, (B, T, k)
    gates: Tensor | None = None  # what the backward pass of a GRU or LSTM needs, (B, T, 4 k)


class AdapterArguments(NamedTuple):
    """O + GELU(RNN(O W_down)) W_up."""

    x: Tensor  # O, (B, T, d)
    state: Tensor | None  # before the first token, (B, k), an earlier state: all of it in [-1, 1]
    mask: Tensor | None  # (B, T) bool
    down: Tensor  # W_down, (k, d)
    down_bias: Tensor | None  # (k,)
    weight_ih: Tensor  # (k, k)
    weight_hh: Tensor  # (k, k)
    bias_ih: Tensor | None  # (k,); both or neither
    bias_hh: Tensor | None  # (k,)
    up: Tensor  # W_up, (d, k)
    up_bias: Tensor | None  # (d,)


class Adapted(NamedTuple):
    """The result of an adapter. O stays as it is where the mask is False, W_up's bias included."""

    out: Tensor  # (B, T, d), in the dtype of O
    hidden: Tensor  # the states after each token, (B, T, k)
    narrow: Tensor | None = None  # O W_down + b_down, (B, T, k), for the backward pass
