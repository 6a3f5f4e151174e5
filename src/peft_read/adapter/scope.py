"""What one forward pass tells READ's layers: padding, sequence boundaries, and what came before.

A layer inside a feed-forward block sees a tensor and nothing else. The stack of blocks around it is given the mask,
the positions and the cache, so hooks on the stack (`openings.py`) open a scope for the time of its forward
(`running.py`), and the layers look there.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextvars import Token
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from .cache import WAY_OUT, FixedStates, States, is_begun, saved_states
from .segments import Segments

__all__ = ["Scope", "Tower"]


@dataclass(frozen=True)
class Tower:
    """What an encoder of images, video or sound was given.

    Args:
        rows: how many images, videos or clips the batch holds; None if unknown.
        lengths: (n,), how many tokens each of them has where they stand one after the other; None if unknown.
        frames: (B, F): the rows are the F frames of B videos; None if they are not, or it is unknown.
    """

    rows: int | None = None
    lengths: torch.Tensor | None = None
    frames: tuple[int, int] | None = None


class Scope:
    """The sequences that one stack of blocks is working on.

    Args:
        batch: B, None if unknown.
        length: T, the new tokens of each sequence, None if unknown.
        mask: (B, T), False = padding; None if all are.
        segment_ids: (B, T), tokens of a row with different ids are different sequences; None if a row is one.
        cache: the cache that the stack writes its keys and values to, if any.
        past: how many tokens the cache holds before this pass; a tensor where a compiled graph cannot know.
        keeps_states: whether the states of this pass may be wanted later.
        source: the sequence that the stack's cross-attention reads, (B, S, d), if any.
        source_mask: (B, S), False = padding.
        explicit: whether the user opened it.
        owner: the module whose hooks opened it.
        outer: the scope around it.
        tower: what the model around the stack was given, if that is not text.
        unclear: why the sequences in the rows cannot be told, and the way out, if they cannot.
    """

    def __init__(
        self,
        *,
        batch: int | None = None,
        length: int | None = None,
        mask: torch.Tensor | None = None,
        segment_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        past: int | torch.Tensor = 0,
        keeps_states: bool = False,
        source: torch.Tensor | None = None,
        source_mask: torch.Tensor | None = None,
        explicit: bool = False,
        owner: nn.Module | None = None,
        outer: Scope | None = None,
        tower: Tower | None = None,
        unclear: str | None = None,
    ) -> None:
        self.batch = batch
        self.length = length
        self.mask = mask
        self.segment_ids = segment_ids
        self.cache = cache
        self.past = past
        self.keeps_states = keeps_states
        self.source = source
        self.source_mask = source_mask
        self.explicit = explicit
        self.owner = owner
        self.outer = outer
        self.tower = tower
        self.unclear = unclear
        self.unless: torch.Tensor | None = None  # (), True = unclear, where a compiled graph cannot ask
        self.others: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {}  # what a block is given besides
        self.pending: dict[Hashable, States] = {}
        self.calls: dict[str, int] = {}
        self.written = length  # how many tokens the pass writes to the cache
        self.opened_by: object = None  # the hook that opened it
        self.token: Token | None = None
        self.frame: FrameType | None = None  # the call of its module, where an export runs it
        self._has_padding: bool | None = None
        self._segments: Segments | None = None
        self._moved: dict[tuple[int, torch.device], tuple[torch.Tensor, torch.Tensor]] = {}

    def around(self) -> Iterator[Scope]:
        """The scope itself and those around it, from the inside out."""
        scope: Scope | None = self
        while scope is not None:
            yield scope
            scope = scope.outer

    def within(self, batch: int, length: int, owner: nn.Module) -> Scope:
        """The scope of a block in the same pass whose rows have another length, as where a model puts tokens first.

        It shares the cache, the states and the count of calls with the scope of its stack.

        Args:
            batch: B.
            length: T, the tokens of each row of the block.
            owner: the block.
        """
        inner = Scope(batch=batch, length=length, owner=owner, outer=self, tower=self.tower, source=self.source)
        inner.source_mask = self.source_mask
        if batch == self.batch and self.keeps_states:
            inner.cache, inner.past, inner.keeps_states = self.cache, self.past, True
            inner.pending, inner.calls = self.pending, self.calls
            for scope in self.around():
                if scope.pending is self.pending:
                    scope.written = length
        return inner

    @property
    def has_padding(self) -> bool:
        """Whether any token is padding, for questions that wait for the device; a graph takes every mask for some."""
        if self.mask is None or torch.compiler.is_compiling():
            return self.mask is not None
        if self._has_padding is None:
            self._has_padding = not bool(self.mask.all())
        return self._has_padding

    @property
    def segments(self) -> Segments | None:
        """The segments of the rows, worked out once for all layers; None if every row is one sequence."""
        if self.segment_ids is None:
            return None
        if self._segments is None:
            self._segments = Segments(self.segment_ids, self.on(self.segment_ids.device, self.mask))
        return self._segments

    def segments_of(self, rows: torch.Tensor) -> Segments | None:
        """The segments of some of the rows."""
        segment_ids, mask = (self.on(rows.device, tensor) for tensor in (self.segment_ids, self.mask))
        if segment_ids is None:
            return None
        return Segments(segment_ids[rows], None if mask is None else mask[rows])

    def on(self, device: torch.device, tensor: torch.Tensor | None) -> torch.Tensor | None:
        """One of the scope's tensors on the device of a layer, moved once for all layers there.

        The layers of a stack may be on several devices, and what it was given is on one.
        """
        if tensor is None or tensor.device == device:
            return tensor
        key = (id(tensor), device)
        if key not in self._moved:
            self._moved[key] = (tensor, tensor.to(device))  # with the first of them, so that its id stays its own
        return self._moved[key][1]

    def keep(self, key: Hashable, states: torch.Tensor, rows: torch.Tensor | None) -> None:
        """Remember the states (B, T, S) of this pass, which join the cache when the stack has finished."""
        if rows is None:
            self.pending[key] = States(states)
            return
        everyone = states.new_zeros(self.batch or 0, *states.shape[1:]).index_copy(0, rows, states)
        computed = torch.zeros(self.batch or 0, dtype=torch.bool, device=states.device).index_fill(0, rows, True)
        self.pending[key] = States(everyone, computed)

    def source_of(self, x: torch.Tensor, *, batch_first: bool = True) -> tuple[tuple[int, int], Any] | None:
        """The sequence beside its own that a layer's input is, or is made of: what cross-attention reads, mostly.

        Args:
            x: the layer's input.
            batch_first: its layout; the sources themselves are (B, S, d).

        Returns:
            (B, S) and the mask (B, S), None without padding; None if the input is not one of them.
        """
        sources = [] if self.source is None else [(self.source, self.source_mask, batch_first)]
        # What a block is given has its layout; what the stack is given is (B, S, d).
        sources += [(tensor, mask, True) for tensor, mask in self.others.values()]
        for source, mask, same_layout in sources:
            seen = x if same_layout or x.dim() != 3 else x.transpose(0, 1)
            if x is source or self._is_made_of(seen, source):
                return (source.shape[0], source.shape[1]), mask
        return None

    def _is_made_of(self, x: torch.Tensor, source: torch.Tensor) -> bool:
        if x.dim() != 3 or x.shape[:2] != source.shape[:2]:
            return False
        if source.shape[:2] != (self.batch, self.length):
            return True
        # The two sequences have the same shape. Checkpointing detaches its inputs, which leaves their memory.
        return not torch.compiler.is_compiling() and x.shape == source.shape and x.data_ptr() == source.data_ptr()

    def call_index(self, path: str) -> int:
        """How often a layer has been called in this pass; blocks that share weights are called several times."""
        count = self.calls.get(path, 0)
        self.calls[path] = count + 1
        return count

    def state_before(self, key: Hashable, path: str, adapter: str, rows: torch.Tensor | None) -> torch.Tensor | None:
        """The state (B, S) that a recurrence continues from; None at the beginning of the sequences.

        Raises:
            RuntimeError: if the cache holds other tokens than this adapter saw, or other rows.
        """
        if self.cache is None or not is_begun(self.past):
            return None
        entry = saved_states(self.cache).get(key)
        known = isinstance(self.past, int)
        seen = 0 if entry is None else entry.length if known else None
        if entry is None or (seen is not None and seen < self.past):
            raise RuntimeError(
                f"READ layer {path!r} (adapter {adapter!r}) has recurrent states for {seen} tokens but the KV cache "
                f"already holds {self.past if known else 'some'}. The adapter was switched, disabled or added after "
                f"the cache was begun, or the cache was rebuilt from its tensors. {WAY_OUT}"
            )
        # `crop` and `reset` keep the two equal. On a cache of fixed size the states that are left over are never read.
        if seen is not None and seen > self.past and not isinstance(entry, FixedStates):
            raise RuntimeError(
                f"READ layer {path!r} (adapter {adapter!r}) has recurrent states for {seen} tokens but the KV cache "
                f"holds {self.past}. Keys and values were taken out of it by hand, as where tokens are evicted, and "
                "READ cannot tell which. Roll back with the cache's own `crop`; where tokens are evicted use "
                "cell='none', or hide them by the attention mask instead."
            )
        if entry.trajectory.shape[0] != self.batch:
            raise RuntimeError(
                f"READ layer {path!r} (adapter {adapter!r}) has recurrent states for {entry.trajectory.shape[0]} "
                f"sequences but is given {self.batch}. {WAY_OUT}"
            )
        if entry.rows is not None and not bool((entry.rows if rows is None else entry.rows[rows]).all()):
            raise RuntimeError(
                f"READ layer {path!r} (adapter {adapter!r}): the rows of `adapter_names` changed while the KV cache "
                f"was in use. {WAY_OUT}"
            )
        return entry.before(self.past)
