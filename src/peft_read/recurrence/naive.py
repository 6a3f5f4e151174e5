"""The update rules of the cells as plain loops over tokens: the definition that faster versions must equal."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["gru_step", "lstm_step", "naive_recurrence", "rnn_step"]

Weights = Mapping[str, Tensor | None]  # by their names in torch.nn.RNNCell; the biases may be None


def rnn_step(x: Tensor, state: Tensor, weights: Weights) -> Tensor:
    """One step h' = tanh(W_ih x + b_ih + W_hh h + b_hh), (B, k)."""
    inner, outer = _gates(x, state, weights)
    return torch.tanh(inner + outer)


def gru_step(x: Tensor, state: Tensor, weights: Weights) -> Tensor:
    """One step h' = (1 - z) n + z h, with n = tanh(W_in x + b_in + r (W_hn h + b_hn)), (B, k)."""
    inner, outer = _gates(x, state, weights)
    reset_in, update_in, new_in = inner.chunk(3, dim=-1)
    reset_out, update_out, new_out = outer.chunk(3, dim=-1)
    reset = torch.sigmoid(reset_in + reset_out)
    update = torch.sigmoid(update_in + update_out)
    new = torch.tanh(new_in + reset * new_out)
    return (1 - update) * new + update * state


def lstm_step(x: Tensor, state: Tensor, weights: Weights) -> Tensor:
    """One step c' = f c + i g and h' = o tanh(c'), the state being [h; c] of width 2k, (B, 2k)."""
    hidden, cell_state = state.chunk(2, dim=-1)
    inner, outer = _gates(x, hidden, weights)
    input_gate, forget_gate, candidate, output_gate = (inner + outer).chunk(4, dim=-1)
    cell_state = torch.sigmoid(forget_gate) * cell_state + torch.sigmoid(input_gate) * torch.tanh(candidate)
    return torch.cat((torch.sigmoid(output_gate) * torch.tanh(cell_state), cell_state), dim=-1)


STEPS = {"rnn": rnn_step, "gru": gru_step, "lstm": lstm_step}


def naive_recurrence(
    cell: str, x: Tensor, weights: Weights, state: Tensor | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run one cell over a batch of sequences, token by token.

    Args:
        cell: "rnn", "gru" or "lstm".
        x: the inputs, (B, T, input size).
        weights: `weight_ih`, `weight_hh`, `bias_ih`, `bias_hh`.
        state: the state before the first token, (B, S); zero if absent. S is k, or 2k for the LSTM.
        mask: (B, T), True = a real token; a token that is not leaves the state as it is.

    Returns:
        The outputs (B, T, k) and the states after each token (B, T, S).
    """
    size = weights["weight_hh"].shape[1]  # type: ignore[union-attr]
    if state is None:
        state = x.new_zeros(x.shape[0], 2 * size if cell == "lstm" else size)
    states = []
    for t in range(x.shape[1]):
        new = STEPS[cell](x[:, t], state, weights)
        state = new if mask is None else torch.where(mask[:, t, None], new, state)
        states.append(state)
    trajectory = torch.stack(states, dim=1)
    return trajectory[..., :size], trajectory


def _gates(x: Tensor, hidden: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
    """What the inputs and what the state contribute to the gates, each (B, gates · k)."""
    inner = F.linear(x, weights["weight_ih"], weights["bias_ih"])  # type: ignore[arg-type]
    return inner, F.linear(hidden, weights["weight_hh"], weights["bias_hh"])  # type: ignore[arg-type]
