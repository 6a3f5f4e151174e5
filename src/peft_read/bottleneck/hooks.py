"""Hooks on an adapted model: weights are generated once per forward pass, and kept with the task for checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from ..peft_methods.checkpointing import scope_checkpoints, unscope_checkpoints
from ..tasks import TaskModule, task_modules
from .shared import HyperformerShared

__all__ = ["generate_in", "keep_tasks_in", "remove_hooks"]

OWNER = "bottleneck"


class _Generate:
    """Forward pre-hook of a stack: generate the weights of its adapters once for the whole pass.

    Args:
        shared: what generates.
        stack: the key of the stack.
    """

    def __init__(self, shared: HyperformerShared, stack: str) -> None:
        self.shared = shared
        self.stack = stack

    def __call__(self, module: nn.Module, args: tuple) -> None:
        self.shared.generate(self.stack)


class _Forget:
    """Forward hook of a stack: drop the weights generated for the pass, also if it failed."""

    def __init__(self, generate: _Generate) -> None:
        self.generate = generate

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.generate.shared.forget(self.generate.stack)


class _KeepTasks:
    """Forward pre-hook of a model in training: its checkpointed blocks are recomputed for the task of this pass."""

    def __call__(self, module: nn.Module, args: tuple) -> None:
        if module.training and not torch.compiler.is_compiling():
            scope_checkpoints(module, partial(_capture, list(task_modules(module))), OWNER)


def _capture(modules: list[TaskModule]) -> Callable[[bool], AbstractContextManager[None]]:
    """The context of a block's computation: the task of each module, and the generated weights."""
    tasks = [module.task for module in modules]
    generated = [dict(module.generated) for module in modules if isinstance(module, HyperformerShared)]

    def context(without_graph: bool) -> AbstractContextManager[None]:
        # A block whose first computation kept no graph runs backward by itself when it is recomputed, and must
        # generate its weights anew: the graph of those of the pass could be gone through only once.
        return _as_it_was(modules, tasks, [{} for _ in generated] if without_graph else generated)

    return context


@contextmanager
def _as_it_was(modules: list[TaskModule], tasks: list[str | None], generated: list[dict]) -> Iterator[None]:
    shared = [module for module in modules if isinstance(module, HyperformerShared)]
    before = [module.task for module in modules], [module.generated for module in shared]
    _put(modules, tasks, shared, generated)
    try:
        yield
    finally:
        _put(modules, before[0], shared, before[1])


def _put(
    modules: list[TaskModule], tasks: list[str | None], shared: list[HyperformerShared], generated: list[dict]
) -> None:
    for module, task in zip(modules, tasks, strict=True):
        module.task = task
    for module, weights in zip(shared, generated, strict=True):
        module.generated = weights


def generate_in(stack: nn.Module, shared: HyperformerShared, key: str) -> None:
    """Generate a stack's weights at the beginning of its forward passes.

    Args:
        stack: the module.
        shared: what generates.
        key: of the stack.
    """
    if any(isinstance(hook, _Generate) and hook.stack == key for hook in stack._forward_pre_hooks.values()):
        return
    generate = _Generate(shared, key)
    stack.register_forward_pre_hook(generate)
    stack.register_forward_hook(_Forget(generate), always_call=True)


def keep_tasks_in(model: nn.Module) -> None:
    """Let a model's checkpointed blocks be recomputed for the task that they were computed for."""
    if not any(isinstance(hook, _KeepTasks) for hook in model._forward_pre_hooks.values()):
        model.register_forward_pre_hook(_KeepTasks())


def remove_hooks(model: nn.Module) -> None:
    """Take all hooks of this file off a model; found by looking, since a copied model has hooks but no handles."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for number in [n for n, hook in hooks.items() if isinstance(hook, _Generate | _Forget | _KeepTasks)]:
                del hooks[number]
                module._forward_hooks_always_called.pop(number, None)
    unscope_checkpoints(model, OWNER)
