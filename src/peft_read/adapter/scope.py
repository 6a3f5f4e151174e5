"""What one forward pass tells READ's layers: padding, sequence boundaries, and what came before.

A layer inside a feed-forward block sees a tensor and nothing else. The stack of blocks around it is given the mask,
the positions and the cache, so hooks on the stack (`openings.py`) open a scope for the time of its forward, and the
layers look there.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass
from functools import wraps
from threading import Lock
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn
from transformers.cache_utils import Cache

from .cache import WAY_OUT, States, is_begun, saved_states
from .segments import Segments

__all__ = [
    "Scope",
    "Tower",
    "current_scope",
    "enter_scope",
    "forget_interrupted",
    "leave_scope",
    "outside_graphs",
    "run_in_scope",
    "sequence_scope",
]

_CURRENT: ContextVar[Scope | None] = ContextVar("peft_read_scope", default=None)
# torch.compile cannot trace a ContextVar. While it traces, scopes are kept on this plain list instead.
_TRACED: list[Scope] = []
# Whether any thread has a scope in the ContextVar: a plain value, which compiled graphs guard. One that was traced
# while none was open is not used while one is.
_ANY_OPEN = False
_OPEN = 0
_LOCK = Lock()

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")


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
        unclear: why the sequences in the rows cannot be told, if they cannot.
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
        self.others: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {}  # what a block is given besides
        self.pending: dict[Hashable, States] = {}
        self.calls: dict[str, int] = {}
        self.written = length  # how many tokens the pass writes to the cache
        self.opened_by: object = None  # the hook that opened it
        self.token: Token | None = None
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
            RuntimeError: if the cache holds tokens that this adapter did not see.
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


def current_scope() -> Scope | None:
    """The scope of the stack that is running, if any."""
    if torch.compiler.is_compiling():
        if _ANY_OPEN:
            return _read_outside_graphs()
        return _TRACED[-1] if _TRACED else None
    return _read()


def _read() -> Scope | None:
    scope = _CURRENT.get()
    if scope is None and _TRACED:  # eager code between two pieces of one compiled graph
        return _TRACED[-1]
    return scope


_read_outside_graphs = torch.compiler.disable(_read)


def outside_graphs(function: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """Let a function that asks for the scope leave a compiled graph if the scope may have been opened outside of it.

    That is so around a compiled block in a stack that is not compiled, and in a user's `sequence_scope`. The graph
    would not see the scope; outside of it the function is eager code like any other.
    """
    eager = torch.compiler.disable(function)

    @wraps(function)
    def choose(*args: _Given.args, **kwargs: _Given.kwargs) -> _Result:
        if torch.compiler.is_compiling() and _ANY_OPEN:
            return eager(*args, **kwargs)
        return function(*args, **kwargs)

    # torch.compile counts its attempts per code object, and gives up after eight.
    choose.__code__ = choose.__code__.replace(co_name=function.__name__)  # type: ignore[attr-defined]
    return choose


def _count_open(change: int) -> None:
    global _OPEN, _ANY_OPEN
    with _LOCK:
        _OPEN += change
        _ANY_OPEN = _OPEN > 0


def enter_scope(scope: Scope) -> None:
    """Make a scope the current one; `leave_scope` ends it."""
    if torch.compiler.is_compiling():
        _TRACED.append(scope)
    else:
        _forget_failed_traces(scope.owner)
        scope.token = _CURRENT.set(scope)
        _count_open(1)


def _forget_failed_traces(owner: nn.Module | None) -> None:
    """Drop scopes that an aborted compilation left behind: a stack that is being entered is not running."""
    for index, scope in enumerate(_TRACED):
        if scope.owner is owner:
            del _TRACED[index:]
            return


def leave_scope(scope: Scope) -> None:
    """Go back to the scope that was current before."""
    if scope.token is None:
        _TRACED.pop()
    else:
        _count_open(-1)
        _CURRENT.reset(scope.token)
        scope.token = None


def forget_interrupted(opening: object) -> None:
    """Drop the scopes that a forward pass left open which was interrupted: its hooks do not see a KeyboardInterrupt.

    Args:
        opening: the hook that is about to open a scope; its module is not running.
    """
    scope = _CURRENT.get()
    left_open = []
    for around in scope.around() if scope is not None else ():
        left_open.append(around)
        if around.opened_by is opening and around.token is not None:
            for stale in left_open:
                if stale.token is not None:
                    stale.token = None
                    _count_open(-1)
            _CURRENT.set(around.outer)
            return


@contextmanager
def run_in_scope(scope: Scope | None) -> Iterator[None]:
    """Run a piece of a forward pass, perhaps later and in another thread, in the scope it belongs to."""
    token = _CURRENT.set(scope)
    _count_open(1)
    try:
        yield
    finally:
        _count_open(-1)
        _CURRENT.reset(token)


@contextmanager
def sequence_scope(mask: torch.Tensor | None = None, segment_ids: torch.Tensor | None = None) -> Iterator[None]:
    """Tell READ which tokens are real and which belong together, for models whose own arguments do not say so.

    What is given here wins over what a stack's own arguments say, wherever the shapes agree: for modules that put out
    (B, T, d), or (B · T, d).

    Args:
        mask: (B, T), any dtype, 0 = padding.
        segment_ids: (B, T) integers; tokens of a row with different ids are different sequences.

    Raises:
        ValueError: if the two shapes differ, or neither is given.

    Example:
        ```python
        with sequence_scope(mask=frame_mask):
            model(frames)
        ```
    """
    given = [tensor for tensor in (mask, segment_ids) if tensor is not None]
    if not given:
        raise ValueError("sequence_scope needs a mask (B, T), segment_ids (B, T), or both.")
    shapes = {tuple(tensor.shape) for tensor in given}
    if len(shapes) > 1 or given[0].dim() != 2:
        raise ValueError(f"mask and segment_ids must have one shape (B, T), got {sorted(shapes)}.")
    batch, length = given[0].shape
    valid = None if mask is None else mask.bool()
    outer = current_scope()
    scope = Scope(batch=batch, length=length, mask=valid, segment_ids=segment_ids, explicit=True, outer=outer)
    with run_in_scope(scope):
        yield
