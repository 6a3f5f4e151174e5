"""Which task a model serves: one switch for everything in it whose weights depend on the task."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from types import TracebackType
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from .checkpointing import as_it_was, scope_checkpoints, stacks_in, unscope_checkpoints

__all__ = ["TaskModule", "forget_choices_in", "keep_choices_in", "name_after_tasks", "set_task", "task_modules"]

OWNER = "tasks"


class TaskModule:
    """A mixin for modules whose weights depend on the task, such as an adapter with a set of weights per task.

    Attributes:
        task_names: the tasks it has weights for; a module without any does not depend on the task.
        task: the one that the next forward passes serve; None before the first `set_task`.
        depends_on: modules elsewhere in the model whose task it reads.
    """

    task_names: tuple[str, ...] = ()
    task: str | None = None
    depends_on: tuple[nn.Module, ...] = ()


class set_task:
    """Choose the task that the next forward passes of a model serve.

    Called as a function it takes effect at once and stays; as a context, `with set_task(model, "vqa"):`, the tasks
    from before come back at its end. A model whose tasks share every weight has nothing to switch and is left alone.

    Adapters of peft that are named after tasks, one LoRA per task for example, are switched too: the one of this name
    becomes the active one. Unlike `model.set_adapter`, this freezes none of the others, so that all tasks can be
    trained in turn by one optimizer; `model.base_model.set_requires_grad(["vqa", "gqa"])` makes them all trainable
    before that optimizer is made. A task without an adapter of its own is served by the adapter "default" if there is
    one, and not by that of the task before. An adapter of another name that somebody has activated stays active where
    no adapter has the task's name, and where it is active together with one of a task:
    `model.base_model.set_adapter(["style", "vqa"])`, then `set_task(model, "gqa")` leaves "style" and "gqa" active.
    Which adapters are named after tasks is known of "default", of those that `set_task` has switched to, and of those
    that `name_after_tasks` was told of.

    From then on gradient checkpointing (transformers' own, torch's `CheckpointWrapper`) recomputes a block for the
    task that it was computed for, even if another has been set before the backward pass.

    Args:
        model: the model, wrapped (peft, DDP, torch.compile) or not.
        task: the name of the task.

    Raises:
        ValueError: if a part of the model has weights for other tasks only.
    """

    def __init__(self, model: nn.Module, task: str) -> None:
        self._before: list[tuple[Any, str, Any]] = []
        name, switched = _adapters_of(model, task)
        modules = [module for module in task_modules(model) if module.task_names]
        for module in modules:
            if task not in module.task_names and not (name == task and module in switched):
                known = ", ".join(map(repr, module.task_names))
                raise ValueError(f"task {task!r} is unknown to this model, which has weights for: {known}")
        of_tasks = _of_tasks(_adapted_layers(model)) | {"default", name}
        _warn_where_others_are_dropped(switched, name, of_tasks)
        for adapted in switched:
            attribute = "active_adapter" if isinstance(adapted, BaseTuner | PeftModel) else "_active_adapter"
            self._change(adapted, attribute, _as_active(adapted, name, of_tasks))
        if switched and name == task:
            name_after_tasks(model, [task])
        for module in task_modules(model):
            self._change(module, "task", task)
        if self._before:
            tuners = [module for module in model.modules() if isinstance(module, BaseTuner)]
            for adapted in [tuner.model for tuner in tuners] or [model]:
                keep_choices_in(adapted)

    def _change(self, module: Any, attribute: str, value: Any) -> None:
        self._before.append((module, attribute, getattr(module, attribute)))
        setattr(module, attribute, value)

    def __enter__(self) -> set_task:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for module, attribute, value in reversed(self._before):
            setattr(module, attribute, value)


class _KeepChoices:
    """Forward pre-hook of a model, or a stack, in training: its checkpointed blocks keep the choices of a pass."""

    def __call__(self, module: nn.Module, args: tuple) -> None:
        if not module.training or torch.compiler.is_compiling():
            return
        choices = _choices_in(module)  # each time: adapters come and go
        if choices:
            scope_checkpoints(module, partial(_capture, choices), OWNER)
        else:
            unscope_checkpoints(module, OWNER)


def _choices_in(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """What chooses the weights of a forward pass: the attributes of modules that hold the task and the adapters."""
    choices: list[tuple[nn.Module, str]] = []
    modules = dict.fromkeys(model.modules())
    modules |= {part: None for module in modules if isinstance(module, TaskModule) for part in module.depends_on}
    for module in modules:
        if isinstance(module, TaskModule):
            choices.append((module, "task"))
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            choices += [(module, "_active_adapter"), (module, "_disable_adapters")]
    return choices


def _capture(choices: list[tuple[nn.Module, str]]) -> Callable[[bool], AbstractContextManager[None]]:
    chosen = [getattr(module, name) for module, name in choices]
    return lambda without_graph: as_it_was(choices, chosen)


def keep_choices_in(model: nn.Module) -> None:
    """Let a model's checkpointed blocks be recomputed for the task, and with the adapters, of their computation.

    Args:
        model: the module that is called, without peft's wrappers; its stacks may be called by themselves.
    """
    for module in (model, *stacks_in(model)):
        has_hook = any(isinstance(hook, _KeepChoices) for hook in module._forward_pre_hooks.values())
        if not has_hook and (module is model or _choices_in(module)):
            module.register_forward_pre_hook(_KeepChoices())


def forget_choices_in(model: nn.Module) -> None:
    """Take back what `keep_choices_in` did, also in a copied model."""
    for module in model.modules():
        for number in [n for n, hook in module._forward_pre_hooks.items() if isinstance(hook, _KeepChoices)]:
            del module._forward_pre_hooks[number]
    unscope_checkpoints(model, OWNER)


def task_modules(model: nn.Module) -> Iterator[TaskModule]:
    """Everything in a model that `set_task` switches."""
    return (module for module in model.modules() if isinstance(module, TaskModule))


def name_after_tasks(model: nn.Module, tasks: Iterable[str]) -> None:
    """Says which adapters of a model belong to one task each; `set_task` gives them to no other task.

    Args:
        model: the model.
        tasks: the names of the adapters, which are those of the tasks.
    """
    for layer in _adapted_layers(model):
        layer._adapters_of_tasks = _named_after_tasks(layer) | set(tasks)


def _named_after_tasks(layer: Any) -> frozenset[str]:
    return getattr(layer, "_adapters_of_tasks", frozenset())


def _of_tasks(layers: list[Any]) -> frozenset[str]:
    return frozenset().union(*map(_named_after_tasks, layers))


def _adapted_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def _adapters_of(model: nn.Module, task: str) -> tuple[str, list[nn.Module]]:
    """The name of the adapter of peft that serves a task, and the parts of a model to switch to it, in order.

    Raises:
        ValueError: if there are several adapters, none of them "default", and none has this name.
    """
    layers = _adapted_layers(model)
    names: dict[type, set[str]] = {}
    for layer in layers:
        names.setdefault(type(layer), set()).update(layer._get_available_adapters())
    everything = sorted(set().union(*names.values()))
    if task in everything:
        # A layer without this adapter is switched with the others of its kind, or it would go on serving another task.
        switched: list[Any] = [layer for layer in layers if task in names[type(layer)]]
        name, wrappers = task, [module for module in _saved_modules(model) if task in module._adapters]
    elif "default" in everything and _serves_another_task(model, layers):
        # Nothing may go on serving the other task, not even where "default" has no weights.
        switched, name, wrappers = list(layers), "default", _saved_modules(model)
    else:
        # An adapter called "default" is named after no task, nor are then those beside it that no task has used.
        named_after_tasks = len(everything) > 1 and "default" not in everything
        if named_after_tasks and not any(module.task_names for module in task_modules(model)):
            known = ", ".join(map(repr, everything))
            raise ValueError(f"task {task!r} is unknown to this model, which has adapters for: {known}")
        return task, []
    _warn_where_frozen(switched, name)
    tuners = [m for m in model.modules() if isinstance(m, BaseTuner | PeftModel) and name in m.peft_config]
    return name, [*switched, *wrappers, *tuners]


def _as_active(adapted: Any, name: str, of_tasks: frozenset[str]) -> str | list[str]:
    """The adapters that are active with that of a task, as a part of a model keeps them.

    Args:
        adapted: the part.
        name: of the task's adapter, which takes the place of those of other tasks.
        of_tasks: the names of all of those.
    """
    active = list(adapted.active_adapters)
    if isinstance(adapted, AuxiliaryTrainingWrapper):  # one at a time; an empty list is peft's sign for none
        others = [other for other in active if other not in of_tasks and other in adapted._adapters]
        return name if name in adapted._adapters else others[0] if others else []
    if of_tasks.isdisjoint(active):
        active = []
    place = next((index for index, other in enumerate(active) if other in of_tasks), 0)
    after = [other for other in active[place:] if other not in of_tasks]
    names = [*active[:place], name, *after]
    is_list = isinstance(adapted, BaseTunerLayer) or (isinstance(adapted, BaseTuner) and len(names) > 1)
    return names if is_list else name


def _saved_modules(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]


def _serves_another_task(model: nn.Module, layers: list[Any]) -> bool:
    """Whether an adapter that belongs to one task is active."""
    of_tasks = _of_tasks(layers)
    active = [module.active_adapters for module in (*layers, *_saved_modules(model))]
    return any(name in of_tasks for names in active for name in names)


def _warn_where_others_are_dropped(adapted: list[Any], name: str, of_tasks: frozenset[str]) -> None:
    """Says that several active adapters, none of which is known to belong to a task, give way to that of a task."""
    for layer in adapted:
        active = layer.active_adapters if isinstance(layer, BaseTunerLayer) else []
        if len(active) > 1 and of_tasks.isdisjoint(active):
            warnings.warn(
                f"the adapter {name!r} takes the place of {', '.join(map(repr, active))}, since none of them is known "
                "to belong to a task; call name_after_tasks(model, [...]) with those that do, and the others stay",
                stacklevel=3,
            )
            return


def _warn_where_frozen(layers: list[Any], adapter: str) -> None:
    """Says that an adapter is not trained while those of other tasks are."""
    for layer in layers:
        trained = {
            name: any(parameter.requires_grad for parameter in parameters.parameters())
            for part in layer.adapter_layer_names
            for name, parameters in getattr(layer, part).items()
            if isinstance(parameters, nn.Module)
        }
        if layer.training and trained and not trained.get(adapter, True) and any(trained.values()):
            others = [name for name, is_trained in trained.items() if is_trained]
            warnings.warn(
                f"the adapter {adapter!r} is frozen and {', '.join(map(repr, others))} trained; "
                f"to train all of them, call model.base_model.set_requires_grad({sorted([*others, adapter])}) before "
                "the optimizer is made",
                stacklevel=4,
            )
            return
