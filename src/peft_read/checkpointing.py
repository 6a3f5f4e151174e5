"""Checkpointing functions that recompute a block in the context of its first computation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

__all__ = [
    "ScopedCheckpoint", "as_it_was", "scope_checkpoints", "stacks_in", "unscope_checkpoints", "with_gradient",
]  # fmt: skip

NAMES = ("_gradient_checkpointing_func", "checkpoint_fn")  # transformers; torch's CheckpointWrapper

# Called in the forward pass; what it returns is called once per computation of the block, with whether this is a
# recomputation of a forward pass that kept no graph, and gives the context to run in.
Capture = Callable[[], Callable[[bool], AbstractContextManager[Any]]]


class ScopedCheckpoint:
    """A checkpointing function whose blocks run in the context that a method's layers need.

    Backward recomputes a block after the forward pass has ended and its context is closed.

    Args:
        checkpoint: the function.
        capture: notes in the forward pass what the layers need.
        owner: the method that wrapped it, by which it is removed again.
    """

    def __init__(self, checkpoint: Any, capture: Capture, owner: object) -> None:
        self.checkpoint = checkpoint
        self.capture = capture
        self.owner = owner

    def __call__(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Checkpoint the function, which will run in the captured context each time."""
        context = self.capture()
        without_graph: list[bool] = []

        def scoped(*inner: Any, **named: Any) -> Any:
            again = bool(without_graph)
            without_graph.append(not torch.is_grad_enabled())
            with context(again and without_graph[0]):
                return function(*inner, **named)

        return self.checkpoint(scoped, *args, **kwargs)


def stacks_in(model: nn.Module) -> list[nn.Module]:
    """The modules below a model that own blocks and may be called by themselves, such as its encoder.

    Blocks themselves, and what is inside of them, do not count. Whether a block is checkpointed is not asked, since
    that is switched on and off.

    Args:
        model: the model.
    """
    children = [] if isinstance(model, nn.ModuleList) else model.children()
    return [stack for child in children for stack in [*([child] if _owns_blocks(child) else []), *stacks_in(child)]]


def _owns_blocks(module: nn.Module) -> bool:
    if hasattr(module, "gradient_checkpointing") or isinstance(module, nn.Sequential):
        return True
    return any(isinstance(child, nn.ModuleList) for child in module.children())


def scope_checkpoints(model: nn.Module, capture: Capture, owner: object) -> None:
    """Wrap the checkpointing functions below a module, once per owner.

    Args:
        model: the module.
        capture: of `ScopedCheckpoint`; of a function that the owner has wrapped already it takes the former's place.
        owner: of `ScopedCheckpoint`; compared with `==`.
    """
    for own in _own_attributes(model):
        for name in NAMES:
            function = own.get(name)
            if function is None:
                continue
            wrapper = _wrapper_of(function, owner)
            if wrapper is None:
                own[name] = ScopedCheckpoint(function, capture, owner)
            else:
                wrapper.capture = capture


def _own_attributes(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Those of a module and all below it that have modules of their own: what has none has nothing to recompute.

    Every training step goes this way, since checkpointing can be switched on at any time; `modules()` takes five times
    as long. A module that is shared comes several times.
    """
    waiting = [model]
    while waiting:
        module = waiting.pop()
        yield module.__dict__
        # Asked of the module: traced ones have no such entry of their own.
        waiting.extend(child for child in module._modules.values() if child is not None and child._modules)


def _wrapper_of(function: Any, owner: object) -> ScopedCheckpoint | None:
    while isinstance(function, ScopedCheckpoint):
        if function.owner == owner:
            return function
        function = function.checkpoint
    return None


def unscope_checkpoints(model: nn.Module, owner: object) -> None:
    """Take one owner's wrappers off again."""
    for own in _own_attributes(model):
        for name in NAMES:
            function = own.get(name)
            if _wrapper_of(function, owner) is not None:
                own[name] = _without(function, owner)


def _without(function: Any, owner: object) -> Any:
    if not isinstance(function, ScopedCheckpoint):
        return function
    inner = _without(function.checkpoint, owner)
    return inner if function.owner == owner else ScopedCheckpoint(inner, function.capture, function.owner)


@contextmanager
def as_it_was(places: Sequence[tuple[nn.Module, str]], values: Sequence[Any]) -> Iterator[None]:
    """Give attributes of modules the values that they had, for the time of a recomputation.

    Args:
        places: modules and the names of attributes of theirs.
        values: of each.
    """
    before = _put(places, values)
    try:
        yield
    finally:
        _put(places, before)


def _put(places: Sequence[tuple[nn.Module, str]], values: Sequence[Any]) -> list[Any]:
    before = [getattr(module, name) for module, name in places]
    for (module, name), value, present in zip(places, values, before, strict=True):
        if value is not present:  # nearly all are as they were, and setting one costs more than asking
            setattr(module, name, value)
    return before


def with_gradient(layer: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """What a layer of transformers is given, so that reentrant checkpointing trains it.

    That kind computes gradients only in a layer with an input that needs one, and features, or what frozen layers make
    of them, need none.

    Args:
        layer: a `GradientCheckpointingLayer`.
        states: its first input, of any shape.
    """
    if (
        not states.requires_grad
        and getattr(layer, "gradient_checkpointing", False)
        and layer.training
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    ):
        return states.detach().requires_grad_()
    return states
