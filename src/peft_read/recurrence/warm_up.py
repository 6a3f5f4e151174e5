"""Compile everything at once: optional, because what is needed is compiled at its first use anyway."""

from __future__ import annotations

import torch
from torch import nn

from .cells import CELLS, RNN
from .fused_adapter import adapt_in_one

__all__ = ["warm_up"]


def warm_up(device: str | torch.device = "cpu") -> None:
    """Compile the loops or kernels of every cell and of the adapter, e.g. while an image of a machine is built.

    Some twenty seconds, once for each version of this package, of numba and of Python; later less than one.
    """
    for kind in ("rnn", "gru", "lstm"):
        CELLS[kind](4).to(device)(torch.zeros(1, 2, 4, device=device), keep_states=True)
    down, cell, up = nn.Linear(8, 4).to(device), RNN(4).to(device), nn.Linear(4, 8).to(device)
    adapt_in_one(torch.zeros(1, 2, 8, device=device), down, cell, nn.Identity(), up)
