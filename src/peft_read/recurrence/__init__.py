"""Recurrences for adapters: sequences in, sequences out."""

from .cells import CELLS, GRU, LSTM, RNN, Cell, Identity, build_cell
from .fused_adapter import adapt_in_one

__all__ = ["CELLS", "GRU", "LSTM", "RNN", "Cell", "Identity", "adapt_in_one", "build_cell"]
