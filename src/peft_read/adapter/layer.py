"""READ on one module: O + GELU(RNN(O W_down)) W_up, added to the output O of the module it wraps."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn import functional as F

from ..peft_methods.endings import device_of
from ..peft_methods.mixed import mixed_rows
from ..recurrence import Identity, adapt_in_one, build_cell
from .config import READConfig
from .running import current_scope, outside_graphs
from .scope import Scope
from .sequences import Notice, Sequences, as_sequences, padding_of
from .targets import in_and_out

__all__ = ["Linear", "READLayer"]

CANNOT_MERGE = (
    "READ cannot be merged into the base weights: GELU and the recurrence over tokens are not linear, so no weight "
    "matrix computes O + GELU(RNN(O W_down)) W_up. Keep the adapter beside the model, or drop it with `unload()`."
)

LAYOUTS = {True: "(B, T, d)", False: "(T, B, d)"}


class READLayer(BaseTunerLayer):
    """What READ adds to a module, one set of weights per adapter.

    Args:
        base_layer: the module whose output O is adapted.
        path: where the layer stands in the model; its states on a cache are filed under this name.
        batch_first: whether the module sees (B, T, d) rather than (T, B, d).
        chunked: whether its block calls it with pieces of the sequences (`chunk_size_feed_forward`).
        notice: warns once for all layers of a model.
        width: the width d of the output of a module that does not tell it, such as a mixture of experts.
    """

    adapter_layer_names: tuple[str, ...] = ("readapter_down", "readapter_cell", "readapter_up")
    other_param_names: tuple[str, ...] = ("r", "cell_name", "readapter_dropout")

    def __init__(
        self,
        base_layer: nn.Module,
        *,
        path: str = "",
        batch_first: bool = True,
        chunked: bool = False,
        notice: Notice | None = None,
        width: int | None = None,
        **kwargs: Any,
    ) -> None:
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
        self.path = path
        self.batch_first = batch_first
        self.chunked = chunked
        self.notice = notice or Notice()
        self.cast_input_dtype_enabled = True  # peft.helpers.disable_input_dtype_casting switches it
        self.longest = 0  # tokens in the longest sequence seen in training; 0 if the layer was never called
        self._had_scope = False

        base = self.get_base_layer()
        widths = in_and_out(base)
        if widths is None and width is not None and list(base.children()):
            widths = (width, width)
        if widths is None:
            raise ValueError(
                f"Target module {base} is not supported: READ needs a module with one output tensor (..., d) of known "
                "width, such as torch.nn.Linear or transformers' Conv1D, or the feed-forward part of a block."
            )
        self.in_features, self.out_features = widths

    @property
    def is_recurrent(self) -> bool:
        """Whether any adapter has a recurrence, which asks for the order of the tokens."""
        return any(not isinstance(cell, Identity) for cell in self.readapter_cell.values())

    def check_layout(self, batch_first: bool) -> None:
        """Refuse a further adapter of another layout than that of the layer.

        Args:
            batch_first: of the further adapter.

        Raises:
            ValueError: if the two differ.
        """
        if batch_first != self.batch_first:
            raise ValueError(
                f"READ layer {self.path!r} takes its module's output for {LAYOUTS[self.batch_first]} since its first "
                f"adapter, and this one has batch_first={batch_first}, {LAYOUTS[batch_first]}. The adapters of a "
                f"model see the same output: use batch_first={self.batch_first}, or begin again with `unload()`."
            )

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

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        place = device_of(self.get_base_layer()) if device is None else device
        super()._move_adapter_to_device_of_base_layer(adapter_name, place)

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
        **kwargs: `path`, `batch_first`, `chunked`, `notice` and `width` of `READLayer`.
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, *, r: int, cell: str, config: READConfig, **kwargs: Any
    ) -> None:
        super().__init__()
        READLayer.__init__(self, base_layer, **kwargs)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r=r, cell=cell, config=config)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The base layer's output and, for every active adapter, GELU(RNN(O W_down)) W_up of that output.

        Of a tuple, such as a mixture of experts may return with the scores of its router, the first entry is adapted.
        """
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        if isinstance(result, tuple):
            return (self._adapted(result[0], x), *result[1:])
        return self._adapted(result, x)

    @outside_graphs
    def _adapted(self, result: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        mixed = mixed_rows()
        active = self.active_adapters if mixed is None else mixed.adapters
        active = [adapter for adapter in active if adapter in self.readapter_down]
        if not active or not result.numel():  # no token of this kind, such as sound in a batch of text
            return result
        sequences = self._sequences(result, x, active, mixed is not None)
        if self.training and not torch.compiler.is_compiling():
            self.longest = max(self.longest, sequences.longest)
        if mixed is None and len(active) == 1:
            adapted = self._in_one_pass(active[0], sequences)
            if adapted is not None:
                return sequences.restore(adapted)
        delta = None
        for adapter in active:
            rows = None if mixed is None else mixed.rows_of(adapter, sequences.tensor.shape[0], result.device)
            added = self._delta(adapter, sequences, rows)
            delta = added if delta is None else delta + added
        assert delta is not None
        return result + sequences.restore(delta).to(result.dtype)

    def _sequences(self, result: torch.Tensor, x: torch.Tensor, active: list[str], mixed: bool) -> Sequences:
        """The sequences in the base layer's output, which only a recurrence or a mixed batch asks for."""
        if not mixed and all(isinstance(self.readapter_cell[adapter], Identity) for adapter in active):
            valid = padding_of(result, self._scope(), batch_first=self.batch_first)
            return Sequences(result, lambda delta: delta, valid)
        return as_sequences(
            result,
            x,
            self._scope(),
            path=self.path,
            batch_first=self.batch_first,
            notice=self.notice,
            chunked=self.chunked,
        )

    def _scope(self) -> Scope | None:
        """The scope of the running stack.

        Raises:
            RuntimeError: if there was one in the forward pass that the backward pass is recomputing.
        """
        scope = current_scope()
        if torch.compiler.is_compiling():
            return scope
        if scope is not None:
            self._had_scope = True
        elif self._had_scope and torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                f"READ layer {self.path!r} is recomputed in a backward pass without the mask it had in the forward "
                "pass. READ knows the checkpointing of transformers and torch's CheckpointWrapper; around other "
                "checkpointed functions, open `sequence_scope(mask=...)` inside the function."
            )
        return scope

    def _in_one_pass(self, adapter: str, sequences: Sequences) -> torch.Tensor | None:
        """The adapted (B, T, d) where compiled loops can go through it once; None where they cannot."""
        down: Any = self.readapter_down[adapter]
        up: Any = self.readapter_up[adapter]
        cell: Any = self.readapter_cell[adapter]
        dropout = self.readapter_dropout[adapter]
        scope = sequences.scope
        if isinstance(cell, Identity) or cell.bidirectional or (scope is not None and scope.segments is not None):
            return None
        key = (self.path, adapter, sequences.call)
        before = None if scope is None else scope.state_before(key, self.path, adapter, None)
        fused = adapt_in_one(sequences.tensor, down, cell, dropout, up, state=before, mask=sequences.mask)
        if fused is None:
            return None
        adapted, states = fused
        if scope is not None and sequences.keeps_states:
            scope.keep(key, states, None)
        return adapted

    def _delta(self, adapter: str, sequences: Sequences, rows: torch.Tensor | None) -> torch.Tensor:
        """What one adapter adds to (B, T, d), or to some of its rows and zero to the others."""
        down: Any = self.readapter_down[adapter]
        up: Any = self.readapter_up[adapter]
        output = sequences.tensor if rows is None else sequences.tensor[rows]
        hidden = down(self._cast_input_dtype(output, down.weight.dtype))
        hidden = self._recur(adapter, hidden, sequences, rows)
        hidden = self.readapter_dropout[adapter](F.gelu(hidden))
        delta = up(self._cast_input_dtype(hidden, up.weight.dtype))
        mask = sequences.mask if rows is None or sequences.mask is None else sequences.mask[rows]
        if mask is not None:  # W_up's bias on padding would reach the text through convolutions and scans of the base
            delta = torch.where(mask[..., None], delta, 0)
        if rows is None:
            return delta
        return delta.new_zeros(*sequences.tensor.shape).index_copy(0, rows, delta)

    def _recur(
        self, adapter: str, hidden: torch.Tensor, sequences: Sequences, rows: torch.Tensor | None
    ) -> torch.Tensor:
        """Run one adapter's recurrence over (B, T, k): segment by segment, or on from the states on the cache."""
        cell: Any = self.readapter_cell[adapter]
        if isinstance(cell, Identity):
            return hidden
        mask = sequences.mask if rows is None or sequences.mask is None else sequences.mask[rows]
        scope = sequences.scope
        segments = None if scope is None else scope.segments if rows is None else scope.segments_of(rows)
        if cell.bidirectional and scope is not None and scope.cache is not None:
            raise ValueError(
                f"READ layer {self.path!r} is bidirectional, and its stack decodes with a KV cache: what a token "
                "adds would depend on tokens that do not exist yet. Adapt the encoder only (target_modules), or use "
                "bidirectional=False."
            )
        if segments is not None:
            segments = segments.on(hidden.device)
            hidden, states = cell(segments.split(hidden), None, segments.mask, keep_states=sequences.keeps_states)
            hidden, states = segments.join(hidden), None if states is None else segments.carried(states)
        else:
            key = (self.path, adapter, sequences.call)
            before = None if scope is None else scope.state_before(key, self.path, adapter, rows)
            before = before if before is None or rows is None else before[rows]
            hidden, states = cell(hidden, before, mask, keep_states=sequences.keeps_states)
        if scope is not None and sequences.keeps_states and states is not None:
            scope.keep((self.path, adapter, sequences.call), states, rows)
        return hidden

    def __repr__(self) -> str:
        return "read." + super().__repr__()
