"""Which task a model serves: one switch for everything in it whose weights depend on the task."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType

from torch import nn

__all__ = ["TaskModule", "set_task", "task_modules"]


class TaskModule:
    """A mixin for modules whose weights depend on the task, such as an adapter with a set of weights per task.

    Attributes:
        task_names: the tasks it has weights for.
        task: the one that the next forward passes serve; None before the first `set_task`.
    """

    task_names: tuple[str, ...] = ()
    task: str | None = None


class set_task:
    """Choose the task that the next forward passes of a model serve.

    Called as a function it takes effect at once and stays; as a context, `with set_task(model, "vqa"):`, the tasks
    from before come back at its end. A model whose tasks share every weight has nothing to switch and is left alone.

    Args:
        model: the model, wrapped (peft, DDP, torch.compile) or not.
        task: the name of the task.

    Raises:
        ValueError: if a part of the model has weights for other tasks only.
    """

    def __init__(self, model: nn.Module, task: str) -> None:
        self._before: list[tuple[TaskModule, str | None]] = []
        modules = list(task_modules(model))
        for module in modules:
            if task not in module.task_names:
                known = ", ".join(map(repr, module.task_names)) or "none"
                raise ValueError(f"task {task!r} is unknown to this model, which has weights for: {known}")
        for module in modules:
            self._before.append((module, module.task))
            module.task = task

    def __enter__(self) -> set_task:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for module, task in self._before:
            module.task = task


def task_modules(model: nn.Module) -> Iterator[TaskModule]:
    """Everything in a model that `set_task` switches."""
    return (module for module in model.modules() if isinstance(module, TaskModule))
