"""What MultitaskMixin is given: settings that would have no effect, and the tasks of data and batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..data.multitask import MultitaskDataset, TaskView
from ..values import shown

__all__ = ["check_tasks_named", "refuse_what_has_no_effect", "task_of", "tasks_of"]


def refuse_what_has_no_effect(
    trainer: Any, mixin: type, *, sizes: Mapping[str, int] | None, generation: Mapping[str, Any] | None
) -> None:
    """Checks the arguments of the Trainer against those of the mixin.

    Args:
        trainer: a subclass of the mixin and of transformers' Trainer.
        mixin: `MultitaskMixin`.
        sizes: its `task_batch_sizes`.
        generation: its `task_generation`.

    Raises:
        ValueError: one of them would have no effect.
    """
    args = trainer.args
    ineffective = {
        "train_sampling_strategy": getattr(args, "train_sampling_strategy", "random") not in ("random", None),
        "group_by_length": getattr(args, "group_by_length", False),
        "dataloader_drop_last": args.dataloader_drop_last,
        "label_smoothing_factor": args.label_smoothing_factor,
    }
    if given := [name for name, value in ineffective.items() if value]:
        raise ValueError(
            f"{', '.join(given)} would have no effect: batches and losses are those of the tasks; unset it"
        )
    if sizes is not None and args.auto_find_batch_size:
        raise ValueError(
            "auto_find_batch_size would have no effect: task_batch_sizes are taken as they are; unset one of them"
        )
    generates = getattr(args, "predict_with_generate", False) and not args.prediction_loss_only
    if generation and not generates:
        raise ValueError(
            "task_generation would have no effect: nothing is generated without predict_with_generate=True of "
            "Seq2SeqTrainingArguments, and with prediction_loss_only=True"
        )
    if trainer.compute_loss_func is not None:
        raise ValueError("compute_loss_func would have no effect: the losses are those of the tasks (task_losses)")
    order = type(trainer).__mro__
    for later in order[order.index(mixin) + 1 :]:
        if "compute_loss" in vars(later) and not later.__module__.startswith("transformers."):
            raise ValueError(
                f"{later.__name__} comes after MultitaskMixin and its part of the loss would be lost: "
                f"class {type(trainer).__name__}({later.__name__}, MultitaskMixin, ...)"
            )


def check_tasks_named(given: Mapping[str, Mapping[str, Any] | None], tasks: tuple[str, ...], evaluation: Any) -> None:
    """Checks the names of tasks in settings.

    Args:
        given: by name of the setting, what it says by task.
        tasks: those of the training data.
        evaluation: the evaluation data, which may have others.

    Raises:
        ValueError: a setting names a task that no data has.
    """
    known: list[Any] = [*tasks]
    for name, part in evaluation.items() if isinstance(evaluation, Mapping) else ():
        known += part.tasks if isinstance(part, MultitaskDataset) else [getattr(part, "task", name)]
    if isinstance(evaluation, TaskView):
        known.append(evaluation.task)
    for setting, of_tasks in given.items():
        if tasks and (unknown := sorted(set(of_tasks or {}) - set(known), key=str)):
            raise ValueError(f"{setting} names tasks without data: {unknown}; there are {list(dict.fromkeys(known))}")


def tasks_of(training: Any, evaluation: Any) -> tuple[str, ...]:
    """The tasks of the training data, or of the evaluation data where there is no other.

    Raises:
        ValueError: the training data is not a `MultitaskDataset`.
    """
    if isinstance(training, MultitaskDataset):
        return training.tasks
    if training is not None:
        raise ValueError(f"the train_dataset must be a MultitaskDataset, not {type(training).__name__}")
    return tuple(evaluation) if isinstance(evaluation, Mapping) else ()


def task_of(batch: Mapping[str, Any]) -> str:
    """The task of a batch.

    Raises:
        ValueError: it has none, or several.
    """
    task = batch.get("task")
    if isinstance(task, list | tuple) and task and all(isinstance(name, str) for name in task):
        if len(set(task)) > 1:
            raise ValueError(
                f"a batch mixes the tasks {', '.join(map(repr, sorted(set(task))))}: a model serves one at a time; "
                "use MultitaskBatchSampler, or a dataset of one task"
            )
        task = task[0]
    if not isinstance(task, str):
        raise ValueError(f"a batch must name its task, as VLCollator does: its 'task' is {shown(task)}")
    return task
