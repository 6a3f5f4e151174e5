"""Recurrences for adapters: sequences in, sequences out."""

from .cells import CELLS, GRU, LSTM, RNN, Cell, Identity, build_cell
from .segments import Segments

__all__ = ["CELLS", "GRU", "LSTM", "RNN", "Cell", "Identity", "Segments", "build_cell"]
