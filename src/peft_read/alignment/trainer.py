"""PVLALossMixin: the alignment loss in any subclass of transformers.Trainer, scaled exactly."""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from .aligner import Aligner, PVLAConfig
from .checkpoints import last_whole_checkpoint, seal_checkpoint
from .evaluation import counted_rows
from .loss import AlignmentDistance
from .recorder import drops_blocks
from .streams import ROW_PER_EXAMPLE, rows_of, unwrap_model
from .sums import Sums, failures, totals
from .task_loss import StepCounts, TaskLoss, nothing_without_labels
from .wrapping import search_for_unused, wrap_again

__all__ = ["PVLALossMixin"]

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


class PVLALossMixin(_Base):
    """Adds partial video-language alignment to a `Trainer` or a subclass of it; put it before the trainer.

    Total loss = task loss + weight x PVLA. The PVLA term is the mean over blocks and over **all** examples of the
    optimiser step, for any micro-batches, gradient accumulation and number of processes. A task loss that is the mean
    over its micro-batch, and not over the step (BART, T5, classification, models with `accepts_loss_kwargs = False`),
    is weighted by the labels that it is the mean of, or else by the examples, see `docs/alignment.md`.

    Logs `loss`, `task_loss`, `pvla_loss` (the unweighted transport distance) and `pvla_mass`; evaluation adds
    `eval_pvla_loss` and leaves `eval_loss` alone. Works with READ, with any other peft method, and with full
    fine-tuning; with `model_init`, `hyperparameter_search` and `auto_find_batch_size` the alignment follows the model
    that is trained.

    Every checkpoint is sealed with the sizes and hashes of its files when it is finished; resuming takes the newest
    intact one, see `last_whole_checkpoint`.

    Args:
        pvla_config: what to align; None = the plain Trainer.
        *args, **kwargs: of the Trainer.

    Raises:
        ValueError: more than one GPU in one process (DataParallel); launch one process per GPU. No PVLAConfig, or
            streams that do not fit the model. In training, a task loss of which nobody knows what to divide it by.

    Example:
        ```python
        class SummarisationTrainer(PVLALossMixin, Seq2SeqTrainer): ...

        trainer = SummarisationTrainer(model=model, args=args, ..., pvla_config=PVLAConfig(weight=0.01))
        ```
    """

    def __init__(self, *args: Any, pvla_config: PVLAConfig | None = None, **kwargs: Any) -> None:
        if pvla_config is not None and not isinstance(pvla_config, PVLAConfig):
            raise ValueError(f"pvla_config must be a PVLAConfig or None, got {pvla_config!r}")
        super().__init__(*args, **kwargs)
        self.pvla_config = pvla_config
        self._aligner: Aligner | None = None
        self._measured = 0  # batches of evaluations
        self.add_callback(_Follower(self))
        if pvla_config is None:
            return
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} GPUs in one process means DataParallel, whose replicas cannot be recorded; launch "
                "one process per GPU (accelerate launch, torchrun), or show one GPU with CUDA_VISIBLE_DEVICES"
            )
        assert isinstance(self.model, nn.Module)
        self._aligner = Aligner(self.model, pvla_config)
        if not drops_blocks(self.model):
            # The Trainer's default is True nearly always, under which a parameter that only the alignment reaches is
            # marked ready twice: once as unused, since the alignment is no output of the model, and once by its
            # gradient. READ's parameters all lie on the path of the task loss.
            search_for_unused(self, False)
        self._note_settings(self.model)
        self._eval_sums = Sums()
        self._begin_training()

    def _add_to_evaluation(self, result: AlignmentDistance) -> None:
        self._measured += 1
        real = counted_rows(self, result.distance.shape[1])
        self._eval_sums.add(examples=real, **totals(result, real))

    def _begin_training(self) -> None:
        """Forgets what an earlier or an aborted run of the training loop has counted."""
        self._step_counts_by_process: list[StepCounts] | None = None
        self._task_loss = TaskLoss(self.accelerator.gather, self.label_smoother)
        self._train_sums = Sums()
        self._steps_since_log = 0

    def _note_settings(self, model: nn.Module) -> None:
        """READ's configuration keeps a record for the model card; only adapters that are trained get it."""
        assert self.pvla_config is not None
        configs = getattr(model, "peft_config", {})
        active = getattr(model, "active_adapters", None) if configs else None
        names = active() if callable(active) else active
        for name, adapter in configs.items():
            if hasattr(adapter, "pvla") and (names is None or name in names):
                adapter.pvla = self.pvla_config.record()

    def _follow(self, model: nn.Module) -> Aligner:
        """The Aligner, on this model: `model_init` and every trial of a search bring a new one."""
        assert self._aligner is not None
        if self._aligner.attach(model):
            self._note_settings(self.accelerator.unwrap_model(model))
        return self._aligner

    def _seal(self, step: int) -> None:
        self.accelerator.wait_for_everyone()  # every process writes its own random state
        # hyperparameter_search has a folder for each trial, which is written and read by nobody else.
        checkpoint = Path(self.args.output_dir or ".") / f"checkpoint-{step}"
        if self.args.should_save and checkpoint.is_dir():
            seal_checkpoint(checkpoint)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer; also counts the examples and labels of the optimiser step."""
        batches, num_items_in_batch = super().get_batch_samples(*args, **kwargs)
        if self._aligner is not None:
            counts = StepCounts.of_step(batches, self.accelerator.gather, self.args.device)
            self._step_counts_by_process = counts
            # Trainer goes on asking for steps of a dataset without length that has ended; those are none.
            self._steps_since_log += any(count.examples for count in counts)
        return batches, num_items_in_batch

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Task loss, plus weight x PVLA when training."""
        if self._aligner is None:
            return super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch, **kwargs
            )
        batch = dict(inputs)
        aligner = self._follow(model)
        compute: Callable[..., Any] = super().compute_loss
        if self._is_part_of_step(model) and num_items_in_batch is not None and self._task_loss.is_divided is None:
            # Before the pass that is trained on, whose hooks and checkpoints no other may come between.
            self._task_loss.ask(
                model,
                lambda items: compute(model, dict(batch), num_items_in_batch=items, **kwargs).detach(),
                num_items_in_batch,
                self.args.device,
            )
        with aligner.record() as recording:
            loss, outputs = compute(
                model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch, **kwargs
            )
        if not model.training:
            result = aligner.distance(recording, batch, outputs, progress=self._progress)
            self._add_to_evaluation(result)
            return (loss, outputs) if return_outputs else loss

        loss = self._exact_task_loss(model, loss, outputs, batch, num_items_in_batch)
        result = aligner.distance(recording, batch, outputs, progress=self._progress)
        self._check_count(batch, result.distance.shape[1])
        share = self._share_of_step(result.distance.shape[1], num_items_in_batch)
        pvla = result.mean() * share
        divisor = 1 if self._trainer_takes_loss_as_scaled(num_items_in_batch) else self._accumulation_steps
        self._train_sums.add(
            0,
            task_loss=loss.detach() / divisor,
            pvla_loss=pvla.detach() / divisor,
            pvla_mass=result.over_blocks()[1].mean() * share / divisor,
            **failures(result),
        )
        loss = loss + aligner.config.weight_at(self._progress) * pvla.to(loss.dtype)
        return (loss, outputs) if return_outputs else loss

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in the Trainer; `resume_from_checkpoint=True` takes the last complete checkpoint."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(self.args.output_dir or ".")
            if resume_from_checkpoint is None:
                raise ValueError(f"{self.args.output_dir} holds no complete checkpoint to resume from")
        wrap_again(self)
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            if self._aligner is not None:
                self._begin_training()  # compute_loss outside the loop belongs to no optimiser step

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As in the Trainer; where it generates, one more forward pass under `no_grad` measures the alignment.

        An encoder-decoder model without labels has no such pass, and is not measured.
        """
        before = self._measured
        result = super().prediction_step(model, inputs, *args, **kwargs)
        if self._aligner is not None and self._measured == before:
            given = self._inputs_of_a_pass(model, inputs)
            if given is None:
                return result
            batch = self._prepare_inputs(inputs)
            aligner = self._follow(model)
            with torch.no_grad(), self.compute_loss_context_manager(), aligner.record() as recording:
                outputs = model(**{name: batch[name] for name in given})
            distance = aligner.distance(recording, batch, outputs, progress=self._progress)
            self._add_to_evaluation(distance)
        return result

    def _inputs_of_a_pass(self, model: nn.Module, batch: Mapping[str, Any]) -> list[str] | None:
        """The entries of a batch that a forward pass takes; None: a decoder would have nothing to read."""
        parameters = inspect.signature(unwrap_model(model).forward).parameters
        decoder = ("labels", "decoder_input_ids", "decoder_inputs_embeds")
        if "decoder_input_ids" in parameters and all(batch.get(name) is None for name in decoder):
            return None
        anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        own = getattr(self, "not_of_the_model", ())
        return [name for name in batch if name in parameters or (anything and name not in own)]

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As in the Trainer, with `<prefix>_pvla_loss` among the metrics."""
        if self._aligner is None:
            return super().evaluation_loop(*args, **kwargs)
        self._eval_sums = Sums()
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", args[4] if len(args) > 4 else "eval")
        sums = self._eval_sums
        # Gathered on every rank, seen or unseen data: a conditional collective would hang.
        values = torch.tensor([sums.get("pvla_loss"), float(sums.examples)], device=self.args.device)
        total, examples = self.accelerator.gather(values.unsqueeze(0)).sum(0).tolist()
        self._aligner.refuse_packed()  # after the gather, in which the other processes wait for this one
        if examples and output.metrics is not None:
            output.metrics[f"{prefix}_pvla_loss"] = total / examples
        elif not examples:
            logger.warning("no %s_pvla_loss: without labels an encoder-decoder model has no pass to measure", prefix)
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds `task_loss`, `pvla_loss` and `pvla_mass` to the training log, averaged like `loss`."""
        if self._aligner is not None and "loss" in logs:
            steps = max(1, self._steps_since_log)
            names = ("task_loss", "pvla_loss", "pvla_mass")
            values = torch.tensor([self._train_sums.get(name) for name in names], device=self.args.device)
            means = self.accelerator.gather(values.unsqueeze(0)).mean(0) / steps
            self._report_failures()
            logs.update(dict(zip(names, means.tolist(), strict=True)))
            self._train_sums = Sums()
            self._steps_since_log = 0
        super().log(logs, *args, **kwargs)

    def _report_failures(self) -> None:
        """Report what went wrong in the alignment since the last log, when the device is read anyway.

        Raises:
            FloatingPointError: by block, a distance was NaN or infinite.
            ValueError: rows of a batch held several packed samples.
        """
        assert self._aligner is not None
        self._aligner.refuse_packed()
        bad = self._train_sums.values.get("bad")
        if bad is not None and bool(bad.any()):
            index = int(bad.nonzero()[0])
            name = f" ({' <-> '.join(self._aligner.pair.names[index])})" if self._aligner.pair is not None else ""
            raise FloatingPointError(
                f"the alignment of block {index}{name} was NaN or infinite for {int(bad[index])} examples since the "
                "last log: its states, or a mask that is to be added to scores, hold NaN or infinity. The weights "
                "have been trained on it: go back to an earlier checkpoint."
            )
        if unsolved := int(self._train_sums.get("unsolved")):
            logger.warning("%d transport problems did not converge since the last log", unsolved)

    @property
    def _progress(self) -> float:
        return self.state.global_step / max(1, self.state.max_steps or 1)

    @property
    def _accumulation_steps(self) -> int:
        return getattr(self, "current_gradient_accumulation_steps", self.args.gradient_accumulation_steps)

    def _trainer_takes_loss_as_scaled(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Whether `training_step` will not divide the loss by the number of accumulation steps."""
        if getattr(self, "loss_is_scaled_for_ga", None) is not None:
            return bool(self.loss_is_scaled_for_ga)
        scaled = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return bool(scaled or self.compute_loss_func is not None)

    def _check_count(self, batch: Mapping[str, Any], examples: int) -> None:
        """Raises if the shares of the optimiser step, by the batches that were counted, would not sum to 1."""
        name, rows = rows_of(batch)
        if self._step_counts_by_process is not None and len(rows) != examples:
            raise ValueError(
                f"the alignment has {examples} examples in a batch whose {name!r} has {len(rows)} rows, by which it "
                f"was counted: its share of the optimiser step is unknown. Give the batch an entry with one row per "
                f"example under one of {', '.join(ROW_PER_EXAMPLE)}; an extractor returns one row per example, with "
                "a mask of zeros where there is nothing to align"
            )

    def _share_of_step(self, examples: int, num_items_in_batch: Tensor | int | None) -> float:
        """Factor that turns this micro-batch's mean into its part of the mean over the whole optimiser step.

        DDP averages gradients over processes, hence the factor of the world size; Trainer divides an unscaled loss by
        the accumulation steps, hence that factor.
        """
        if self._step_counts_by_process is None:  # compute_loss called by hand, outside the training loop
            return 1.0
        step_examples = sum(count.examples for count in self._step_counts_by_process)
        share = examples * self.accelerator.num_processes / step_examples
        return share if self._trainer_takes_loss_as_scaled(num_items_in_batch) else share * self._accumulation_steps

    def _is_part_of_step(self, model: nn.Module) -> bool:
        """Whether this is one of several micro-batches of a step, whose loss nobody else divides."""
        if self.compute_loss_func is not None or getattr(self, "loss_is_scaled_for_ga", None) is not None:
            return False  # these have a loss of their own, which they scale themselves
        several = self._accumulation_steps * self.accelerator.num_processes > 1
        return model.training and several and self._step_counts_by_process is not None

    def _exact_task_loss(
        self,
        model: nn.Module,
        loss: Tensor,
        outputs: Any,
        batch: Mapping[str, Any],
        num_items_in_batch: Tensor | int | None,
    ) -> Tensor:
        """Turns a mean over the micro-batch into its part of the step's loss; what is divided already stays.

        Raises:
            ValueError: it is not known what to divide the loss by.
        """
        if not self._is_part_of_step(model):
            return nothing_without_labels(loss, batch)
        taken_as_divided = self._trainer_takes_loss_as_scaled(num_items_in_batch)
        if taken_as_divided and self._task_loss.is_divided is not False:
            return loss if self._task_loss.is_divided else nothing_without_labels(loss, batch)
        processes, everywhere = self.accelerator.num_processes, self.args.average_tokens_across_devices
        counts = self._step_counts_by_process
        assert counts is not None
        # The user may want each process to divide by its own labels, as the Trainer then does.
        step = (
            StepCounts(*map(sum, zip(*counts, strict=True))) if everywhere else counts[self.accelerator.process_index]
        )
        # What the Trainer takes for the step's part, it has multiplied by the processes against DDP's averaging.
        factor = processes if everywhere else 1
        return self._task_loss.part(
            loss,
            outputs,
            batch,
            step,
            times=1 if taken_as_divided else factor * self._accumulation_steps,
            factor=factor if taken_as_divided else 1,
            taken_as_divided=taken_as_divided,
            model_dtype=getattr(self.model, "dtype", None),
        )


class _Follower(TrainerCallback):
    """Tells the trainer when a run of the training loop begins, and when a checkpoint is finished."""

    def __init__(self, trainer: PVLALossMixin) -> None:
        self.trainer = weakref.ref(trainer)  # the trainer holds its callbacks

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (trainer := self.trainer()) is not None:
            trainer._begin_training()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (trainer := self.trainer()) is not None:
            trainer._seal(state.global_step)
