"""READ on one module: O + GELU(RNN(O W_down)) W_up, added to the output O of the module it wraps."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ..recurrence import build_cell
from .config import READConfig

__all__ = ["Linear", "READLayer", "output_width"]

CANNOT_MERGE = (
    "READ cannot be merged into the base weights: GELU and the recurrence over tokens are not linear, so no weight "
    "matrix computes O + GELU(RNN(O W_down)) W_up. Keep the adapter beside the model, or drop it with `unload()`."
)


def output_width(module: nn.Module) -> int | None:
    """The width d of a linear-like module's output, quantised ones included; None if it is no linear layer."""
    if isinstance(module, nn.Linear):
        return module.out_features
    if isinstance(module, Conv1D):
        return module.nf
    for name in ("out_features", "outfeatures", "output_size"):
        width = getattr(module, name, None)
        if isinstance(width, int):
            return width
    return None


class READLayer(BaseTunerLayer):
    """What READ adds to a module, one set of weights an adapter."""

    adapter_layer_names: tuple[str, ...] = ("readapter_down", "readapter_cell", "readapter_up")
    other_param_names: tuple[str, ...] = ("r", "cell_name", "readapter_dropout")

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        self.base_layer = base_layer
        self.r: dict[str, int] = {}
        self.cell_name: dict[str, str] = {}
        self.readapter_down = nn.ModuleDict({})
        self.readapter_cell = nn.ModuleDict({})
        self.readapter_up = nn.ModuleDict({})
        self.readapter_dropout = nn.ModuleDict({})
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.kwargs = kwargs

        base = self.get_base_layer()
        width = output_width(base)
        if width is None:
            raise ValueError(
                f"Target module {base} is not supported: READ needs a module with one output tensor (..., d) of known "
                "width, such as torch.nn.Linear or transformers' Conv1D."
            )
        self.in_features = getattr(base, "in_features", width)
        self.out_features = width

    def update_layer(self, adapter_name: str, *, r: int, cell: str, config: READConfig) -> None:
        """Add the weights of one adapter.

        Args:
            adapter_name: the adapter's name.
            r: the width k of its bottleneck.
            cell: the name of its recurrence.
            config: where the rest is taken from.
        """
        if r < 1:
            raise ValueError(f"`r` should be a positive integer value but the value passed is {r}")
        bias = config.use_bias
        self.r[adapter_name] = r
        self.cell_name[adapter_name] = cell
        self.readapter_dropout[adapter_name] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.readapter_down[adapter_name] = nn.Linear(self.out_features, r, bias=bias)
        self.readapter_cell[adapter_name] = build_cell(cell, r, bias=bias, bidirectional=config.bidirectional)
        self.readapter_up[adapter_name] = nn.Linear(r, self.out_features, bias=bias)
        self.reset_read_parameters(adapter_name, config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def reset_read_parameters(self, adapter_name: str, init_weights: bool | str = True) -> None:
        """Initialise one adapter: W_down Kaiming normal, the recurrence uniform, biases zero.

        W_up is zero for `True` (the adapter is the identity), random for `False`; "paper" zeroes the recurrence too.
        """
        down: Any = self.readapter_down[adapter_name]
        up: Any = self.readapter_up[adapter_name]
        cell: Any = self.readapter_cell[adapter_name]
        nn.init.kaiming_normal_(down.weight)
        cell.reset_parameters(zero=init_weights == "paper")
        if init_weights is False:
            nn.init.kaiming_normal_(up.weight)
        else:
            nn.init.zeros_(up.weight)
        for layer in (down, up):
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: READ is not linear."""
        raise NotImplementedError(CANNOT_MERGE)

    def unmerge(self) -> None:
        """Refuse: nothing was merged."""
        raise NotImplementedError(CANNOT_MERGE)


class Linear(nn.Module, READLayer):
    """READ around a module whose output is one tensor (..., d).

    Args:
        base_layer: the module whose output O is adapted.
        adapter_name: the name of the first adapter.
        r: its width k.
        cell: the name of its recurrence.
        config: the rest of its settings.
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, *, r: int, cell: str, config: READConfig, **kwargs: Any
    ) -> None:
        super().__init__()
        READLayer.__init__(self, base_layer, **kwargs)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r=r, cell=cell, config=config)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base layer's output and, for every active adapter, GELU(RNN(O W_down)) W_up of that output."""
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        delta = None
        for adapter in self.active_adapters:
            if adapter in self.readapter_down:
                one = self._delta(adapter, result)
                delta = one if delta is None else delta + one
        return result if delta is None else result + delta.to(result.dtype)

    def _delta(self, adapter: str, output: torch.Tensor) -> torch.Tensor:
        down, up = self.readapter_down[adapter], self.readapter_up[adapter]
        hidden = down(self._cast_input_dtype(output, down.weight.dtype))  # type: ignore[arg-type]
        hidden, _ = self.readapter_cell[adapter](hidden)
        hidden = self.readapter_dropout[adapter](F.gelu(hidden))
        return up(self._cast_input_dtype(hidden, up.weight.dtype))  # type: ignore[arg-type]

    def __repr__(self) -> str:
        return "read." + super().__repr__()
