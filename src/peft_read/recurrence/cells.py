"""The recurrences of an adapter: RNN, GRU and LSTM as mask-aware leaf modules, one direction or both."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .arguments import GATES, ScanArguments, state_width
from .scan import recur

__all__ = ["CELLS", "GRU", "LSTM", "RNN", "Cell", "Identity", "build_cell"]

NAMES = {
    suffix: tuple(name + suffix for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    for suffix in ("", "_reverse")
}


class Cell(nn.Module):
    """A recurrence over tokens, with the parameters of `torch.nn.RNNCell`.

    A token that the mask calls padding never enters the state: it repeats the output of the last real token before
    it (the initial state where there is none). Sequences without padding give exactly what `torch.nn.RNN`, `GRU` and
    `LSTM` give with the same weights.

    It is a leaf module that owns its parameters and uses them only inside `forward`, so that wrappers which gather
    the weights of one module at a time (FSDP) may treat it like any linear layer.

    Args:
        size: the width k of inputs and outputs.
        bias: whether the bias vectors exist.
        bidirectional: half of the outputs come from a recurrence that runs backward in time. Each direction has the
            width k/2 and reads all k inputs, as in `torch.nn.RNN(k, k // 2, bidirectional=True)`; the parameters of
            the second have the suffix `_reverse`. There is no state to carry over then.

    Raises:
        ValueError: if the width is not positive, or is odd where it is to be split in two.
    """

    weight_ih: nn.Parameter
    weight_hh: nn.Parameter
    bias_ih: nn.Parameter | None
    bias_hh: nn.Parameter | None
    kind: str

    def __init__(self, size: int, *, bias: bool = True, bidirectional: bool = False) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"A cell needs a width of at least 1, got {size}.")
        if bidirectional and size % 2:
            raise ValueError(f"A bidirectional cell splits its width in two, so it must be even, got {size}.")
        self.size = size
        self.bidirectional = bidirectional
        width, gates = size // 2 if bidirectional else size, GATES[self.kind]
        for suffix in NAMES if bidirectional else ("",):
            self.register_parameter(f"weight_ih{suffix}", nn.Parameter(torch.empty(gates * width, size)))
            self.register_parameter(f"weight_hh{suffix}", nn.Parameter(torch.empty(gates * width, width)))
            for name in ("bias_ih", "bias_hh"):
                vector = nn.Parameter(torch.empty(gates * width)) if bias else None
                self.register_parameter(name + suffix, vector)
        self.reset_parameters()

    def reset_parameters(self, *, zero: bool = False) -> None:
        """Draw the weights from PyTorch's uniform ±1/√width (or set them to zero) and set the biases to zero."""
        bound = 1 / math.sqrt(self.weight_hh.shape[1])
        for name, parameter in self.named_parameters():
            if zero or name.startswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.uniform_(parameter, -bound, bound)

    @property
    def weight(self) -> nn.Parameter:
        """The recurrent weights, under the name by which FSDP's wrapping policy recognises a trainable leaf."""
        return self.weight_hh

    @property
    def state_size(self) -> int:
        """How many numbers the state of one token has; none if it cannot be carried over."""
        return 0 if self.bidirectional else state_width(self.kind, self.size)

    def forward(
        self, x: Tensor, state: Tensor | None = None, mask: Tensor | None = None, *, keep_states: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Run the recurrence forward in time, in at least float32 and outside autocast.

        Args:
            x: the inputs, (B, T, k).
            state: the state before the first token, (B, S) with S = `state_size`; zero if absent.
            mask: (B, T), True = a real token; every token is real if absent.
            keep_states: ask for the state after every token, which an LSTM does not compute otherwise.

        Returns:
            The outputs (B, T, k) and the states after each token (B, T, S); the latter is None where the cell would
            have to compute it and `keep_states` is False.
        """
        if x.dtype is not torch.float32:
            x = x.to(torch.promote_types(x.dtype, torch.float32))
        if state is not None:
            state = state.to(x.dtype)
        device = "cpu" if x.is_cpu else x.device.type
        if torch.is_autocast_enabled(device):  # to enter the context costs as much as a short recurrence
            with torch.autocast(device_type=device, enabled=False):
                return self._run_all(x, state, mask, keep_states)
        return self._run_all(x, state, mask, keep_states)

    def _run_all(
        self, x: Tensor, state: Tensor | None, mask: Tensor | None, keep_states: bool
    ) -> tuple[Tensor, Tensor | None]:
        """One direction or both."""
        batch, length, _ = x.shape
        if batch == 0 or length == 0:  # the fused kernels refuse what has no tokens
            return x.new_zeros(x.shape), x.new_zeros(batch, length, self.state_size)
        if not self.bidirectional:
            return self._run(x, state, mask, "", keep_states)
        if state is not None:
            raise ValueError("A bidirectional cell cannot continue from a state: it needs the whole sequence.")
        ahead, _ = self._run(x, None, mask, "", False)
        back, _ = self._run(x.flip(1), None, None if mask is None else mask.flip(1), "_reverse", False)
        return torch.cat((ahead, back.flip(1)), dim=-1), None

    def _run(
        self, x: Tensor, state: Tensor | None, mask: Tensor | None, suffix: str, keep_states: bool
    ) -> tuple[Tensor, Tensor | None]:
        """One direction."""
        own, dtype, weights = self._parameters, x.dtype, []
        for name in NAMES[suffix]:
            # A parameter need not be one: torch's parametrizations and FSDP put other tensors in its place.
            parameter = own[name] if name in own else getattr(self, name)
            weights.append(parameter if parameter is None or parameter.dtype is dtype else parameter.to(dtype))
        arguments = ScanArguments(x, state, mask, *weights)  # type: ignore[arg-type]
        return recur(self.kind, arguments, keep_states=keep_states)

    def extra_repr(self) -> str:
        """The width, and what kind of cell it is."""
        return f"{self.size}, bias={self.bias_ih is not None}, bidirectional={self.bidirectional}"


class RNN(Cell):
    """The Elman recurrence h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh), equation (5)'s RNN."""

    kind = "rnn"


class GRU(Cell):
    """The gated recurrent unit, with PyTorch's gates (reset, update, new)."""

    kind = "gru"


class LSTM(Cell):
    """The long short-term memory, with PyTorch's gates (input, forget, cell, output); its state is (h, c)."""

    kind = "lstm"


class Identity(nn.Module):
    """No recurrence: READ without its cell is a bottleneck adapter like that of Houlsby et al. (arXiv 1902.00751)."""

    state_size = 0

    def reset_parameters(self, *, zero: bool = False) -> None:
        """Nothing to set."""

    def forward(
        self, x: Tensor, state: Tensor | None = None, mask: Tensor | None = None, *, keep_states: bool = False
    ) -> tuple[Tensor, None]:
        """Return the inputs as they are."""
        return x, None


CELLS: dict[str, type[nn.Module]] = {"rnn": RNN, "gru": GRU, "lstm": LSTM, "none": Identity}


def build_cell(name: str, size: int, *, bias: bool = True, bidirectional: bool = False) -> nn.Module:
    """The cell of a given name and width.

    Args:
        name: one of `CELLS`: "rnn", "gru", "lstm", or "none" for no recurrence.
        size: the width k.
        bias: whether the cell has biases.
        bidirectional: half of the width runs backward in time.

    Raises:
        ValueError: if the name is unknown.
    """
    if name not in CELLS:
        raise ValueError(f"Unknown cell {name!r}; choose one of {', '.join(map(repr, CELLS))}.")
    kind = CELLS[name]
    if not issubclass(kind, Cell):
        return kind()
    return kind(size, bias=bias, bidirectional=bidirectional)
