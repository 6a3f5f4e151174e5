"""MultitaskMixin: several tasks in any subclass of transformers.Trainer, one task per batch."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.trainer_utils import seed_worker

from ..alignment.evaluation import counted_rows
from ..alignment.wrapping import search_for_unused, wrap_again
from ..data.multitask import MultitaskBatchSampler, MultitaskDataset
from ..tasks import name_after_tasks, set_task, task_modules
from ..values import shown
from .checkpoints import adapter_folders, trained_as_before
from .losses import LossSum, check_losses, task_loss
from .settings import check_tasks_named, refuse_what_has_no_effect, task_of, tasks_of
from .shift import check_shift, loss_shifts_labels

__all__ = ["MultitaskMixin"]

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

NOT_OF_THE_MODEL = ("task", "scores")  # entries of a batch that are the trainer's


class MultitaskMixin(_Base):
    """Trains the tasks of a `MultitaskDataset` together, one task per batch; put it before the trainer.

    Every batch carries the name of its task under `task` (`VLCollator` makes such batches). Before the forward pass
    `set_task` sets it on the model, and the loss is the task's own (`peft_read.vl_adapter.losses`).

    One optimiser step may hold batches of several tasks, from gradient accumulation and from several processes. With M
    batches in the step, m_t of them of task t, its loss is sum_t m_t / M · L_t, where L_t is the loss of task t over
    **all** its examples in the step. Batches of one task therefore give the gradient of one large batch, and how the
    batches are spread over processes and accumulation steps changes nothing.

    Logs `loss`, and `<task>_loss` for each task that was trained since the last log, over all processes. A
    `MultitaskDataset` as `eval_dataset` is evaluated task by task: `eval_<task>_loss` and the metrics of
    `task_metrics`. A run that is resumed equals the uninterrupted one, with an adapter of peft for each task too.

    The logits of decoder-only models predict the next label, as in their own loss.

    With `PVLALossMixin`, that one comes first: `class T(PVLALossMixin, MultitaskMixin, Seq2SeqTrainer)`.

    Args:
        task_batch_sizes: examples per batch and process, by task; None: `per_device_train_batch_size` for all.
        task_sampling: "round_robin" or "balanced", see `MultitaskBatchSampler`; a mapping of its options to set more:
            `{"sampling": "balanced", "restart": True}`.
        task_losses: the kind of loss of tasks that `TASK_LOSSES` does not list, or lists otherwise.
        task_metrics: by task, a function from an `EvalPrediction` to a dict of numbers, in place of `compute_metrics`.
        task_generation: by task, arguments of `generate` under `predict_with_generate`, such as `{"num_beams": 5}`;
            those of a call of `evaluate` or `predict` go before them.
        loss_shifts_labels: whether logits[:, t] predicts labels[:, t + 1]; None: what the model tells.
        *args, **kwargs: of the Trainer.

    Raises:
        ValueError: a training dataset that is not a `MultitaskDataset`; a task without a batch size or loss, or that
            the model has no weights for; options of the Trainer that would have no effect; a mixin after this one that
            computes a loss; a model that does not tell which label its logits predict; in training, a batch without a
            task, or of several.

    Example:
        ```python
        class VLTrainer(MultitaskMixin, Seq2SeqTrainer): ...

        trainer = VLTrainer(
            model, args, train_dataset=MultitaskDataset({"vqa": vqa, "nlvr": nlvr}), data_collator=VLCollator(...),
            task_batch_sizes={"vqa": 60, "nlvr": 20},
        )
        ```
    """

    # What compute_loss returns is divided as the whole optimiser step wants it.
    loss_is_scaled_for_ga = True
    not_of_the_model = NOT_OF_THE_MODEL

    def __init__(
        self,
        *args: Any,
        task_batch_sizes: Mapping[str, int] | None = None,
        task_sampling: str | Mapping[str, Any] = "round_robin",
        task_losses: Mapping[str, str] | None = None,
        task_metrics: Mapping[str, Callable[[Any], Mapping[str, float]]] | None = None,
        task_generation: Mapping[str, Mapping[str, Any]] | None = None,
        loss_shifts_labels: bool | None = None,
        **kwargs: Any,
    ) -> None:
        if task_metrics is not None:
            if kwargs.get("compute_metrics") is not None:
                raise ValueError("give task_metrics or compute_metrics, not both")
            kwargs["compute_metrics"] = self._metrics_of_task
        if loss_shifts_labels not in (None, True, False):
            raise ValueError(f"loss_shifts_labels must be True, False or None, not {shown(loss_shifts_labels)}")
        self._given_shift, self._shift_is_checked = loss_shifts_labels, False
        super().__init__(*args, **kwargs)
        refuse_what_has_no_effect(self, MultitaskMixin, sizes=task_batch_sizes, generation=task_generation)
        # The collator needs the whole row, of which the model takes nothing as it stands.
        self.args.remove_unused_columns = False
        # Said also to versions of transformers that know no `loss_is_scaled_for_ga`.
        self.model_accepts_loss_kwargs = True
        self._task_metrics, self._task_generation = dict(task_metrics or {}), dict(task_generation or {})
        self._task_batch_sizes = task_batch_sizes
        self._task_options = {"sampling": task_sampling} if isinstance(task_sampling, str) else dict(task_sampling)
        if isinstance(self.eval_dataset, MultitaskDataset):
            self.eval_dataset = self.eval_dataset.by_task()  # type: ignore[assignment]
        self._tasks = tasks_of(self.train_dataset, self.eval_dataset)
        self.task_losses = check_losses(self._tasks, task_losses)
        named = {"task_losses": task_losses, "task_metrics": task_metrics, "task_generation": task_generation}
        check_tasks_named(named, self._tasks, self.eval_dataset)
        if self.model is not None:
            self._check_model(self.model)
        self._given_losses = task_losses
        self._sampler: MultitaskBatchSampler | None = None
        self._evaluated_task = ""
        self._asked: dict[str, Any] = {}  # arguments of generate, in the running call of evaluate or predict
        self._forget_counts()
        self.add_callback(_Epochs(self))

    def _check_model(self, model: nn.Module) -> None:
        self._shifts_labels(model)
        modules = [module for module in task_modules(model) if module.task_names]
        for module in modules:
            if unknown := [task for task in self._tasks if task not in module.task_names]:
                raise ValueError(
                    f"the model has weights for the tasks {list(module.task_names)}, and none for {unknown}, which "
                    "the data has: name the same tasks in both"
                )
        adapters = set(getattr(model, "peft_config", ())) & set(self._tasks)  # one LoRA per task, for example
        name_after_tasks(model, adapters)
        if modules or adapters:
            search_for_unused(self, True)  # the weights of the other tasks get no gradient from a batch

    def _shifts_labels(self, model: nn.Module) -> bool:
        return loss_shifts_labels(model) if self._given_shift is None else self._given_shift

    def _targets(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, bool]:
        """What the logits are compared with, and whether those at t with the label at t + 1."""
        if batch.get("shift_labels") is not None:  # moved already, by the collator or for context parallelism
            return batch["shift_labels"], False
        return batch["labels"], self._shifts_labels(model)

    def _forget_counts(self) -> None:
        """Forgets what an earlier or an aborted run of the training loop has counted."""
        self._step_counts: Tensor | None = None  # (tasks, 2): batches, and what the loss is divided by
        self._logged = torch.zeros(len(self._tasks), 2, device=self.args.device)  # totals and divisors since the log
        self._evaluated = torch.zeros(2, device=self.args.device)  # total and divisor of one evaluation

    def get_train_dataloader(self) -> DataLoader:
        """The loader of `MultitaskBatchSampler`; every process gets whole batches.

        Raises:
            ValueError: not a `MultitaskDataset`, or an epoch whose length varies.
        """
        if not isinstance(self.train_dataset, MultitaskDataset):
            raise ValueError(f"the train_dataset must be a MultitaskDataset, not {type(self.train_dataset).__name__}")
        processes = self.accelerator.num_processes
        options = {
            "seed": self.args.data_seed if self.args.data_seed is not None else self.args.seed,
            **self._task_options,
        }
        sizes = self._train_batch_size if self._task_batch_sizes is None else self._task_batch_sizes
        self._sampler = sampler = MultitaskBatchSampler(self.train_dataset, sizes, multiple_of=processes, **options)
        if sampler.length_varies:
            short = [task for task in sampler.tasks if sampler.available[task] < sampler.n_batches]
            raise ValueError(
                f"'balanced' takes {sampler.n_batches} batches of each task and {short} have fewer, so that epochs "
                "differ in length, and the Trainer's schedule and resuming with it: "
                f"set n_batches={min(sampler.available.values())}, or restart=True, in task_sampling"
            )
        arguments = self.args
        loader: DataLoader = DataLoader(
            self.train_dataset,
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=arguments.dataloader_num_workers,
            pin_memory=arguments.dataloader_pin_memory,
            persistent_workers=arguments.dataloader_persistent_workers,
            prefetch_factor=arguments.dataloader_prefetch_factor,
            multiprocessing_context=arguments.dataloader_multiprocessing_context,
            in_order=arguments.dataloader_in_order,
            worker_init_fn=partial(
                seed_worker, num_workers=arguments.dataloader_num_workers, rank=arguments.process_index
            ),
        )
        # The sampler has evened the batches out; older versions of accelerate refuse to do it for lengths that vary.
        before, self.accelerator.even_batches = self.accelerator.even_batches, False
        try:
            return self.accelerator.prepare(loader)
        finally:
            self.accelerator.even_batches = before

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer; also counts batches, examples and tokens of each task in the optimiser step."""
        batches, num_items_in_batch = super().get_batch_samples(*args, **kwargs)
        counts = torch.zeros(len(self._tasks), 2, device=self.args.device)
        assert self.model is not None
        for batch in batches:
            task = task_of(batch)
            number, (labels, shift) = self._number_of(task), self._targets(self.model, batch)
            labels = labels[:, 1:] if shift else labels
            counts[number, 0] += 1
            token_mean = self.task_losses[task] == "token_mean"
            counts[number, 1] += labels.ne(-100).sum().to(counts.device) if token_mean else len(labels)
        self._step_counts = self.accelerator.gather(counts.unsqueeze(0)).sum(0)
        return batches, num_items_in_batch

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """The loss of the batch's task; in training, its part of the optimiser step's."""
        task = task_of(inputs)
        set_task(model, task)
        outputs = model(**{name: value for name, value in inputs.items() if name not in NOT_OF_THE_MODEL})
        logits, (labels, shift) = outputs["logits"], self._targets(model, inputs)
        kind, scores = self._kind_of(task), inputs.get("scores")
        summed = task_loss(logits, labels, kind, scores, shift=shift)
        self._check_shift(model, outputs, inputs, shift)
        if not model.training:
            real, counted = counted_rows(self, len(labels)), summed
            if real < len(labels):
                some = scores[:real] if scores is not None else None
                counted = task_loss(logits[:real], labels[:real], kind, some, shift=shift)
            self._evaluated += torch.stack([counted.total.detach(), counted.divisor]).to(self._evaluated)
        loss = self._part_of_step(summed, task) if model.training else summed.mean
        return (loss, outputs) if return_outputs else loss

    def _check_shift(self, model: nn.Module, outputs: Any, batch: Mapping[str, Any], shift: bool) -> None:
        """Compares the model's own loss of the first batch with the reading of its labels."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
        if not self._shift_is_checked and self._given_shift is None and loss is not None and loss.dim() == 0:
            self._shift_is_checked = True
            if batch.get("shift_labels") is None:
                check_shift(model, loss, outputs["logits"], batch["labels"], shift)

    def _part_of_step(self, summed: LossSum, task: str) -> Tensor:
        number = self._number_of(task)
        if self._step_counts is None:  # called by hand, outside the training loop
            return summed.mean
        self._logged[number] += torch.stack([summed.total.detach(), summed.divisor]).to(self._logged)
        batches, divisor = self._step_counts[number]
        share = batches / self._step_counts[:, 0].sum()
        # DDP averages over processes, hence their number.
        return summed.total * (share * self.accelerator.num_processes / divisor.clamp(min=1)).to(summed.total)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in the Trainer."""
        wrap_again(self)
        try:
            return super().train(*args, **kwargs)
        finally:
            self._forget_counts()  # compute_loss outside the loop belongs to no optimiser step

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in the Trainer, for the task of the batch; where it generates, the loss is the task's too."""
        self._evaluated_task = task = task_of(inputs)
        set_task(model, task)
        generates = getattr(self.args, "predict_with_generate", False) and not self.args.prediction_loss_only
        if prediction_loss_only or not generates:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        given = {name: value for name, value in inputs.items() if name not in (*NOT_OF_THE_MODEL, "labels")}
        options = {**getattr(self, "_gen_kwargs", {}), **self._task_generation.get(task, {})}
        for length, other in (("max_length", "max_new_tokens"), ("max_new_tokens", "max_length")):
            if length in self._asked and other not in self._asked:
                options.pop(other, None)
        options |= {**self._asked, **kwargs}
        _, tokens, _ = super().prediction_step(model, given, False, ignore_keys, **options)
        if inputs.get("labels") is None:
            return None, tokens, None
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss.detach(), tokens, inputs["labels"]

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As in the Trainer; `<prefix>_loss` is over all examples, where the Trainer takes the mean of batch means."""
        self._evaluated.zero_()
        # Seq2SeqTrainer keeps the repetitions with which several processes fill up the last batch.
        self.gather_function = self.accelerator.gather_for_metrics
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", args[4] if len(args) > 4 else "eval")
        total, divisor = self.accelerator.gather(self._evaluated.unsqueeze(0)).sum(0).tolist()
        if divisor and output.metrics is not None:
            output.metrics[f"{prefix}_loss"] = total / divisor
        return output

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **kwargs: Any,
    ) -> dict[str, float]:
        """As in the Trainer; a `MultitaskDataset` task by task, each with the arguments of `generate` in `kwargs`."""
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(data, MultitaskDataset):
            data = data.by_task()
        if not isinstance(data, dict):
            self._asked = {name: value for name, value in kwargs.items() if value is not None}
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix, **kwargs)
        metrics: dict[str, float] = {}
        for task, part in data.items():
            # By its name the Trainer finds a loader of its own data that it has kept.
            part = task if eval_dataset is None else part
            metrics |= self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{task}", **kwargs)
        return metrics

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """As in the Trainer."""
        of_the_trainer = ("test_dataset", "ignore_keys", "metric_key_prefix")
        self._asked = {name: v for name, v in kwargs.items() if name not in of_the_trainer and v is not None}
        return super().predict(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # The Trainer leaves the active adapter trained and freezes the others.
        own = self.accelerator.unwrap_model(self.model if model is None else model)
        if self._has_adapters_by_name(own):
            adapter_folders(own, resume_from_checkpoint)
        with trained_as_before(own):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        # The Trainer looks for one adapter, in the checkpoint itself.
        own = self.accelerator.unwrap_model(self.model)
        with trained_as_before(own):
            if not self._has_adapters_by_name(own):
                super()._load_best_model()
                return
            for name, folder in adapter_folders(own, str(self.state.best_model_checkpoint)).items():
                own.load_adapter(str(folder), name)

    def _has_adapters_by_name(self, model: nn.Module) -> bool:
        """Whether the Trainer writes a folder for each adapter."""
        whole = self.is_deepspeed_enabled or self.is_fsdp_enabled  # these write the model as it is
        return isinstance(model, PeftModel) and set(model.peft_config) != {"default"} and not whole

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds `<task>_loss` to the training log."""
        if "loss" in logs:
            sums = self.accelerator.gather(self._logged.unsqueeze(0)).sum(0)
            for task, (total, divisor) in zip(self._tasks, sums.tolist(), strict=True):
                if divisor:
                    logs[f"{task}_loss"] = total / divisor
            self._logged.zero_()
        super().log(logs, *args, **kwargs)

    def _metrics_of_task(self, prediction: Any) -> dict[str, float]:
        metric = self._task_metrics.get(self._evaluated_task)
        return dict(metric(prediction)) if metric is not None else {}

    def _number_of(self, task: str) -> int:
        if task not in self._tasks:
            raise ValueError(f"a batch of task {task!r}, and the training data has the tasks {list(self._tasks)}")
        return self._tasks.index(task)

    def _kind_of(self, task: str) -> str:
        return self.task_losses.get(task) or check_losses((task,), self._given_losses)[task]


class _Epochs(TrainerCallback):
    """Keeps sampler and sums with the training loop: resuming in several processes sets the epoch of no sampler."""

    def __init__(self, trainer: MultitaskMixin) -> None:
        self.trainer = weakref.ref(trainer)  # the trainer holds its callbacks

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (trainer := self.trainer()) is not None:
            trainer._forget_counts()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer()
        if trainer is not None and trainer._sampler is not None:
            trainer._sampler.set_epoch(int(state.epoch or 0))
