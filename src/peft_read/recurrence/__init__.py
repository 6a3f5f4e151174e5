"""Recurrences for adapters: sequences in, sequences out."""

from .cells import CELLS, GRU, LSTM, RNN, Cell, Identity, build_cell
from .fused_adapter import adapt_in_one
from .segments import Segments
from .warm_up import warm_up

__all__ = ["CELLS", "GRU", "LSTM", "RNN", "Cell", "Identity", "Segments", "adapt_in_one", "build_cell", "warm_up"]
