"""Recurrences for adapters: sequences in, sequences out."""

from .adapter_operator import adapter_fits, adapter_in_one_pass
from .backends import show_backends, use_backend, warm_up
from .cells import CELLS, GRU, LSTM, RNN, Cell, Identity, build_cell
from .segments import Segments

__all__ = [
    "CELLS",
    "GRU",
    "LSTM",
    "RNN",
    "Cell",
    "Identity",
    "Segments",
    "adapter_fits",
    "adapter_in_one_pass",
    "build_cell",
    "show_backends",
    "use_backend",
    "warm_up",
]
