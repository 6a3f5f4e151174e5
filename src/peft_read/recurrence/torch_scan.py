"""The recurrences by torch's own functions: for every device and dtype, and for all derivatives."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .arguments import Adapted, AdapterArguments, ScanArguments, state_width

__all__ = ["adapter_in_torch", "scan_in_torch"]


def scan_in_torch(kind: str, arguments: ScanArguments, keep_cell_states: bool = False) -> tuple[Tensor, Tensor | None]:
    """The outputs h_t of one direction and, on request, because torch keeps them to itself, an LSTM's c_t."""
    x, state, mask, *given = arguments
    weights = [weight for weight in given if weight is not None]
    width = weights[1].shape[1]
    if state is None:
        state = x.new_zeros(x.shape[0], state_width(kind, width))
    if mask is None:
        return _scan(kind, x, state, weights, keep_cell_states)
    # The real tokens of every row go to its front, and the results back.
    front = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)  # (B, T)
    outputs, cell_states = _scan(kind, _take(x, front), state, weights, keep_cell_states)
    seen = mask.cumsum(dim=1)  # (B, T): real tokens up to and including this one; 0 = the initial state
    outputs = _take(torch.cat((state[:, None, :width], outputs), dim=1), seen)
    if cell_states is not None:
        cell_states = _take(torch.cat((state[:, None, width:], cell_states), dim=1), seen)
    return outputs, cell_states


def adapter_in_torch(arguments: AdapterArguments) -> Adapted:
    """O + GELU(RNN(O W_down)) W_up, O unchanged at padding, in the dtype of the weights and back."""
    x, down = arguments.x, arguments.down
    narrow = F.linear(x.to(down.dtype), down, arguments.down_bias)
    hidden, _ = scan_in_torch("rnn", arguments.within(narrow))
    delta = F.linear(F.gelu(hidden), arguments.up, arguments.up_bias)
    if arguments.mask is not None:
        delta = torch.where(arguments.mask[..., None], delta, 0)
    return Adapted(x + delta.to(x.dtype), hidden, narrow)


def _take(sequence: Tensor, index: Tensor) -> Tensor:
    """Select steps of a sequence (B, L, S) by an index (B, T), row by row: (B, T, S)."""
    return sequence.gather(1, index[..., None].expand(-1, -1, sequence.shape[-1]))


def _scan(
    kind: str, x: Tensor, state: Tensor, weights: list[Tensor], keep_cell_states: bool
) -> tuple[Tensor, Tensor | None]:
    # "Training" matters to cuDNN alone, which otherwise keeps nothing for the backward pass of a model in eval mode.
    settings = (weights, len(weights) == 4, 1, 0.0, torch.is_grad_enabled(), False, True)
    if kind == "rnn":
        return torch.rnn_tanh(x, state[None], *settings)[0], None
    if kind == "gru":
        return torch.gru(x, state[None], *settings)[0], None
    hidden, cell_state = state.chunk(2, dim=-1)
    outputs = torch.lstm(x, (hidden[None].contiguous(), cell_state[None].contiguous()), *settings)[0]
    if not keep_cell_states:
        return outputs, None
    # All gates follow from the outputs, so only c_t = f_t c_{t-1} + i_t g_t is left to do.
    previous = torch.cat((hidden[:, None], outputs[:, :-1]), dim=1)
    biases = weights[2:] or (None, None)
    gates = F.linear(x, weights[0], biases[0]) + F.linear(previous, weights[1], biases[1])
    opened, kept, new, _ = gates.chunk(4, dim=-1)
    return outputs, _cell_states(kept.sigmoid(), opened.sigmoid() * new.tanh(), cell_state)


def _cell_states(kept: Tensor, added: Tensor, first: Tensor) -> Tensor:
    """All c_t = kept_t c_{t-1} + added_t in log2 T steps: each doubles how far back a token has been followed."""
    added = torch.cat((added[:, :1] + kept[:, :1] * first[:, None], added[:, 1:]), dim=1)
    reach = 1
    while reach < added.shape[1]:
        added = torch.cat((added[:, :reach], added[:, reach:] + kept[:, reach:] * added[:, :-reach]), dim=1)
        kept = torch.cat((kept[:, :reach], kept[:, reach:] * kept[:, :-reach]), dim=1)
        reach *= 2
    return added
