"""The scope that is current: opened and closed around a forward pass, in eager mode, in graphs and over threads."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from pathlib import Path
from threading import Lock
from types import FrameType
from typing import ParamSpec, TypeVar

import torch
from torch import nn

from .scope import Scope

__all__ = [
    "current_scope",
    "enter_scope",
    "forget_interrupted",
    "leave_scope",
    "outside_graphs",
    "run_in_scope",
    "sequence_scope",
]

HERE = Path(__file__).parent
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


def current_scope() -> Scope | None:
    """The scope of the stack that is running, if any."""
    if torch.compiler.is_dynamo_compiling():
        if _ANY_OPEN:
            return _read_outside_graphs()
        return _TRACED[-1] if _TRACED else None
    return _read()


def _read() -> Scope | None:
    scope = _opened_here()
    # Eager code between two pieces of one compiled graph. Other eager code, perhaps in another thread, has nothing to
    # do with what is on the list, nor with what an interrupted pass has left there.
    if scope is None and _TRACED and _is_between_graphs():
        return _TRACED[-1]
    return scope


def _opened_here() -> Scope | None:
    """The scope in the ContextVar, without those that a failed export left there: its hooks are not called then."""
    scope = _CURRENT.get()
    while scope is not None and scope.frame is not None and not _is_running(scope.frame):
        scope.token = scope.frame = None
        scope = scope.outer
        _CURRENT.set(scope)
    return scope


def _frames() -> Iterator[FrameType]:
    """The Python frames of this thread, from the inside out."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_running(frame: FrameType) -> bool:
    return any(around is frame for around in _frames())


def _is_between_graphs() -> bool:
    """Whether something that torch.compile has compiled is calling, from this thread."""
    compiler = sys.modules.get("torch._dynamo.eval_frame")  # not imported for the question
    return compiler is not None and any(frame.f_code.co_filename == compiler.__file__ for frame in _frames())


_read_outside_graphs = torch.compiler.disable(_read)


def outside_graphs(function: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """Let a function that asks for the scope leave a compiled graph if the scope may have been opened outside of it.

    That is so around a compiled block in a stack that is not compiled, and in a user's `sequence_scope`. The graph
    would not see the scope; outside of it the function is eager code like any other.
    """
    eager = torch.compiler.disable(function)

    @wraps(function)
    def choose(*args: _Given.args, **kwargs: _Given.kwargs) -> _Result:
        if torch.compiler.is_dynamo_compiling() and _ANY_OPEN:
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
    if torch.compiler.is_dynamo_compiling():
        _TRACED.append(scope)
        return
    _forget_failed_traces(scope.owner)
    scope.token = _CURRENT.set(scope)
    if torch.compiler.is_compiling():  # torch.export runs the model as it is, and no compiled graph meanwhile
        scope.frame = next(frame for frame in _frames() if not frame.f_code.co_filename.startswith(str(HERE)))
    else:
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
        return
    if scope.frame is None:
        _count_open(-1)
    _CURRENT.reset(scope.token)
    scope.token = scope.frame = None


def forget_interrupted(opening: object) -> None:
    """Drop the scopes that a forward pass left open which was interrupted: its hooks do not see a KeyboardInterrupt.

    Args:
        opening: the hook that is about to open a scope; its module is not running.
    """
    scope = _opened_here()
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
