"""Hooks on an adapted model: weights are generated once per forward pass, and kept for its checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import nn

from ..checkpointing import as_it_was, scope_checkpoints, stacks_in, unscope_checkpoints
from ..tasks import TaskModule, forget_choices_in, keep_choices_in
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


class _KeepGenerated:
    """Forward pre-hook of a model, or a stack, in training: its checkpointed blocks keep the weights of a pass."""

    def __call__(self, module: nn.Module, args: tuple) -> None:
        if module.training and not torch.compiler.is_compiling():
            shared = _shared_by(module)
            if shared:
                scope_checkpoints(module, partial(_capture, shared), OWNER)


def _shared_by(model: nn.Module) -> list[HyperformerShared]:
    """What generates weights for the layers in a model or a stack."""
    layers = [part for part in model.modules() if isinstance(part, TaskModule)]
    parts = dict.fromkeys(part for layer in layers for part in layer.depends_on)
    return [part for part in parts if isinstance(part, HyperformerShared)]


def _capture(shared: list[HyperformerShared]) -> Callable[[bool], AbstractContextManager[None]]:
    """The context of a block's computation: the generated weights."""
    places = [(module, "generated") for module in shared]
    generated = [dict(module.generated) for module in shared]

    def context(without_graph: bool) -> AbstractContextManager[None]:
        # A block whose first computation kept no graph runs backward by itself when it is recomputed, and must
        # generate its weights anew: the graph of those of the pass could be gone through only once.
        return as_it_was(places, [{} for _ in generated] if without_graph else generated)

    return context


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
    """Let a model's checkpointed blocks be recomputed for the task, and with the weights, of their computation."""
    keep_choices_in(model)
    for module in (model, *stacks_in(model)):
        has_hook = any(isinstance(hook, _KeepGenerated) for hook in module._forward_pre_hooks.values())
        if not has_hook and _shared_by(module):
            module.register_forward_pre_hook(_KeepGenerated())


def remove_hooks(model: nn.Module) -> None:
    """Take all hooks of this file off a model; found by looking, since a copied model has hooks but no handles."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for number in [n for n, hook in hooks.items() if isinstance(hook, _Generate | _Forget | _KeepGenerated)]:
                del hooks[number]
                module._forward_hooks_always_called.pop(number, None)
    unscope_checkpoints(model, OWNER)
    forget_choices_in(model)
