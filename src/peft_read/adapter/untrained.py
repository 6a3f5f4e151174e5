"""After the first backward pass, warn of READ's parameters that got no gradient, and say why."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .layer import READLayer

__all__ = ["GradientWatch", "forget_gradients", "named", "watch_gradients"]

PATIENCE = 3  # backward passes: in the first, W_up is zero and nothing but W_up gets a gradient that is not


class GradientWatch:
    """A forward hook of the adapted model that watches the first backward passes, warns once, and removes itself.

    It detects three problems that raise no error: a layer that the forward pass never calls, since the model reads its
    weights itself or does not use it; a layer whose output does not reach the loss, such as an unused pooling head;
    and a recurrence over sequences of one token, or of which only the first token counts.
    """

    def __init__(self) -> None:
        self.passes = 0
        self.running: _OnePass | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"passes": self.passes, "running": None}  # the hooks of a pass are of this model's parameters

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """Watch the backward pass that starts at this output."""
        if not model.training or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        if torch._C._current_graph_task_id() != -1:  # a backward pass that computes the forward pass again
            return
        if self.passes >= PATIENCE:
            forget_gradients(model)
            return
        results = [tensor for tensor in _tensors(output) if tensor.requires_grad]
        if results:
            self.stop()  # the pass before may never go backward, and its hooks would stay
            self.running = _OnePass(self, model)
            self.running.begin(results)

    def stop(self) -> None:
        """Take the hooks of the last pass off."""
        if self.running is not None:
            self.running.stop()
            self.running = None


class _OnePass:
    """One backward pass: which parameters it reached."""

    def __init__(self, watch: GradientWatch, model: nn.Module) -> None:
        self.watch = watch
        self.model = model
        self.reached: set[str] = set()
        self.handles: list[Any] = []
        self.begun = False

    def begin(self, results: list[torch.Tensor]) -> None:
        """Hook the parameters and, for the end of the pass, the model's outputs."""
        for name, parameter in _trained(self.model):
            self.handles.append(parameter.register_post_accumulate_grad_hook(_note(self.reached, name)))
        for result in results:
            self.handles.append(result.register_hook(self._queue))

    def _queue(self, gradient: torch.Tensor) -> None:
        if not self.begun:
            self.begun = True
            # The one way to be called when a whole backward pass is over, those inside of it included.
            torch.autograd.Variable._execution_engine.queue_callback(self._end)

    def stop(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()

    def _end(self) -> None:
        self.stop()
        self.watch.passes += 1
        if not self.reached:  # gradients that are kept elsewhere, as sharded parameters have them
            return
        layers = {name: module for name, module in self.model.named_modules() if isinstance(module, READLayer)}
        lines = [line for line in (*_unreached(layers, self.model, self.reached), *_without_past(layers)) if line]
        if lines:
            self.watch.passes = PATIENCE
            warnings.warn("Some of READ's parameters got no gradient. " + " ".join(lines), stacklevel=2)


def _note(reached: set[str], name: str) -> Any:
    def note(parameter: torch.Tensor) -> None:
        reached.add(name)

    return note


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in model.named_parameters():
        if ".readapter_" in f".{name}" and parameter.requires_grad:
            yield name, parameter


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _tensors(value)


def _unreached(layers: dict[str, READLayer], model: nn.Module, reached: set[str]) -> Iterator[str]:
    """The layers none of whose parameters the pass reached."""
    trained: dict[str, set[str]] = {}
    for name, _ in _trained(model):
        trained.setdefault(name.partition(".readapter_")[0], set()).add(name)
    dead = [name for name, parameters in trained.items() if name in layers and not parameters & reached]
    uncalled = [name for name in dead if layers[name].longest == 0]
    unused = [name for name in dead if layers[name].longest > 0]
    if uncalled:
        yield (
            f"Never called: {named(uncalled)}; the model reads their weights itself, or did not use them in this pass."
        )
    if unused:
        yield f"Without a way to the loss: {named(unused)}; their output is not used."
    if dead:
        yield "Leave them out with `exclude_modules`, unless another batch uses them."


def _without_past(layers: dict[str, READLayer]) -> Iterator[str]:
    """The layers whose recurrence got a gradient of zero although the layer itself is trained."""
    short: list[str] = []
    first: list[str] = []
    for name, layer in layers.items():
        for adapter, cell in layer.readapter_cell.items():
            recurrent = getattr(cell, "weight_hh", None)
            down: Any = layer.readapter_down[adapter]
            if recurrent is None or recurrent.grad is None or down.weight.grad is None:
                continue
            if bool((recurrent.grad != 0).any()) or not bool((down.weight.grad != 0).any()):
                continue
            (short if layer.longest <= 1 else first).append(name)
    if short:
        yield (
            f"The recurrence (weight_hh) of {named(short)}: every sequence that it saw had one token. Describe the "
            "sequences with `sequence_scope`, or save the parameters with cell='none' there (cell_pattern)."
        )
    if first:
        yield (
            f"The recurrence (weight_hh) of {named(first)}: only the first token of each sequence reaches the loss, "
            "as before a head that reads a class token, and nothing comes before it. The rest of these layers "
            "is trained."
        )


def named(names: list[str]) -> str:
    """Paths of modules for a message, a few of them, with * for the numbers where several differ in them alone."""
    kinds: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        kinds.setdefault(re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name), []).append(name)
    shown = [kind if len(same) > 1 else same[0] for kind, same in kinds.items()]
    return ", ".join(map(repr, shown[:6])) + (f" and {len(shown) - 6} more kinds" if len(shown) > 6 else "")


def watch_gradients(model: nn.Module) -> None:
    """Watch the first backward passes of a model with READ, once."""
    forget_gradients(model)
    model.register_forward_hook(GradientWatch(), with_kwargs=True)


def forget_gradients(model: nn.Module) -> None:
    """Stop watching."""
    for number, hook in list(model._forward_hooks.items()):
        if not isinstance(hook, GradientWatch):
            continue
        hook.stop()
        del model._forward_hooks[number]
        model._forward_hooks_with_kwargs.pop(number, None)
