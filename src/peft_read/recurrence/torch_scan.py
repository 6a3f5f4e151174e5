"""The recurrences by torch's own functions: for every device and dtype, and for all derivatives."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .arguments import Adapted, AdapterArguments, ScanArguments, Scanned, state_width

__all__ = ["adapter_in_torch", "scan_in_torch"]


def scan_in_torch(kind: str, arguments: ScanArguments, keep_cell_states: bool = True) -> Scanned:
    """Run a cell of one direction; the cell states of an LSTM only on request, because torch does not return them."""
    x, state, mask, *given = arguments
    weights = [weight for weight in given if weight is not None]
    width = weights[1].shape[1]
    if state is None:
        state = x.new_zeros(x.shape[0], state_width(kind, width))
    keep_cell_states = keep_cell_states and kind == "lstm"
    if mask is None:
        return _scan(kind, x, state, weights, keep_cell_states)
    # The real tokens of every row go to its front, and the results back.
    front = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)  # (B, T)
    outputs, cell_states, _ = _scan(kind, _take(x, front), state, weights, keep_cell_states)
    seen = mask.cumsum(dim=1)  # (B, T): real tokens up to and including this one; 0 = the initial state
    outputs = _take(torch.cat((state[:, None, :width], outputs), dim=1), seen)
    if cell_states is not None:
        cell_states = _take(torch.cat((state[:, None, width:], cell_states), dim=1), seen)
    return Scanned(outputs, cell_states)


def adapter_in_torch(arguments: AdapterArguments) -> Adapted:
    """O + GELU(RNN(O W_down)) W_up, O unchanged at padding, in the dtype of the weights and back."""
    x, state, mask, down, down_bias, *recurrence, up, up_bias = arguments
    narrow = F.linear(x.to(down.dtype), down, down_bias)
    hidden = scan_in_torch("rnn", ScanArguments(narrow, state, mask, *recurrence)).outputs  # type: ignore[arg-type]
    delta = F.linear(F.gelu(hidden), up, up_bias)
    if mask is not None:
        delta = torch.where(mask[..., None], delta, 0)
    return Adapted(x + delta.to(x.dtype), hidden, narrow)


def _take(sequence: Tensor, index: Tensor) -> Tensor:
    """Select steps of a sequence (B, L, S) by an index (B, T), row by row: (B, T, S)."""
    return sequence.gather(1, index[..., None].expand(-1, -1, sequence.shape[-1]))


def _scan(kind: str, x: Tensor, state: Tensor, weights: list[Tensor], keep_cell_states: bool) -> Scanned:
    # "Training" matters to cuDNN alone, which otherwise keeps nothing for the backward pass of a model in eval mode.
    settings = (weights, len(weights) == 4, 1, 0.0, torch.is_grad_enabled(), False, True)
    if kind == "rnn":
        return Scanned(torch.rnn_tanh(x, state[None], *settings)[0], None)
    if kind == "gru":
        return Scanned(torch.gru(x, state[None], *settings)[0], None)
    hidden, cell_state = state.chunk(2, dim=-1)
    outputs = torch.lstm(x, (hidden[None].contiguous(), cell_state[None].contiguous()), *settings)[0]
    if not keep_cell_states:
        return Scanned(outputs, None)
    # All gates follow from the outputs, so only c_t = f_t c_{t-1} + i_t g_t is left to do step by step.
    previous = torch.cat((hidden[:, None], outputs[:, :-1]), dim=1)
    biases = weights[2:] or (None, None)
    gates = F.linear(x, weights[0], biases[0]) + F.linear(previous, weights[1], biases[1])
    opened, kept, new, _ = gates.chunk(4, dim=-1)
    kept, added = kept.sigmoid(), opened.sigmoid() * new.tanh()
    cell_states = []
    for t in range(x.shape[1]):
        cell_state = kept[:, t] * cell_state + added[:, t]
        cell_states.append(cell_state)
    return Scanned(outputs, torch.stack(cell_states, dim=1))
