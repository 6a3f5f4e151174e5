"""Which part of an optimiser step's task loss the loss of one micro-batch is."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .streams import rows_of

__all__ = ["StepCounts", "TaskLoss", "nothing_without_labels"]

logger = logging.getLogger(__name__)

FLOAT32 = 1e-3  # how well a loss in float32 matches the mean of its own logits
ROUNDINGS = 8  # of the model's dtype, between the logits and its loss
WAY_OUT = (
    "so it is not known what to divide its loss by. If it is a mean over its micro-batch, set "
    "accepts_loss_kwargs = False on the model before the trainer is built: micro-batches then count by their "
    "examples. If the trainer has a compute_loss of its own, say with its attribute loss_is_scaled_for_ga whether "
    "what that returns is divided already."
)
Gather = Callable[[Tensor], Tensor]


class StepCounts(NamedTuple):
    """What a mean can be over: examples, labels, and labels without the first of each row."""

    examples: Any
    labels: Any
    next_labels: Any

    @classmethod
    def of(cls, batch: Mapping[str, Any]) -> StepCounts:
        """The counts of one micro-batch; those of labels are scalar tensors, so that nothing waits for the device."""
        examples, labels = len(rows_of(batch)[1]), class_labels(batch)
        if labels is None:
            return cls(examples, 0, 0)
        moved = "shift_labels" in batch or labels.dim() < 2
        every = labels.ne(-100).sum()
        return cls(examples, every, every if moved else labels[..., 1:].ne(-100).sum())

    @classmethod
    def of_step(cls, batches: Sequence[Mapping[str, Any]], gather: Gather, device: Any) -> list[StepCounts]:
        """The counts of an optimiser step's micro-batches, one entry per process."""
        counts = torch.zeros(3, dtype=torch.long, device=device)
        for batch in batches:
            counts += torch.stack([torch.as_tensor(count, device=device) for count in cls.of(batch)])
        return [cls(*row) for row in gather(counts.unsqueeze(0)).tolist()]


def class_labels(batch: Mapping[str, Any]) -> Tensor | None:
    """The labels that a cross-entropy reads: whole numbers, -100 = none; None: the batch has no such labels."""
    labels = batch.get("shift_labels")
    labels = batch.get("labels") if labels is None else labels
    whole = isinstance(labels, Tensor) and labels.dim() and not labels.is_floating_point()
    return labels if whole else None


class TaskLoss:
    """Turns the losses of micro-batches into parts of the loss of their optimiser step, for one run of training.

    A model divides its loss by `num_items_in_batch`, or returns the mean of the micro-batch, which is then weighted
    by the labels that it is the mean of, or else by its examples. Which one is measured until a micro-batch tells it.
    Processes ask together, so that all of them come to one answer.

    Args:
        gather: of the accelerator: (1, k) of each process to (processes, k).
        smoother: the Trainer's label smoother, or None.
    """

    def __init__(self, gather: Gather, smoother: Callable[..., Tensor] | None = None) -> None:
        self.gather, self.smoother = gather, smoother
        self.is_divided: bool | None = None
        self.unit: str | None = None  # a field of StepCounts

    def ask(
        self,
        model: nn.Module,
        loss_of: Callable[[Any], Tensor],
        num_items_in_batch: Tensor | int,
        device: torch.device,
    ) -> None:
        """Finds out whether a loss is divided by `num_items_in_batch`, by doubling it.

        Two forward passes without gradient, in eval mode so that dropout is no difference; the random state, the
        model's mode and the weights stay as they are.

        Args:
            model: as the Trainer calls it, in training mode.
            loss_of: the loss of the micro-batch for a `num_items_in_batch`.
            num_items_in_batch: of the step.
            device: of the model, whose random state is kept beside the CPU's.

        Raises:
            ValueError: one part of the loss is divided and another is not.
        """
        model.eval()
        try:
            with torch.no_grad():  # both from the same random state, for models that draw numbers in eval mode too
                with _random_state_kept(device):
                    once = loss_of(num_items_in_batch)
                with _random_state_kept(device):
                    twice = loss_of(2 * num_items_in_batch)
        finally:
            model.train()
            torch.clear_autocast_cache()  # it may hold weights that were cast without a gradient
        tolerance = _tolerance(once.dtype, roundings=2)  # halves are rounded as wholes are
        whole, half = float(once), float(twice)
        told = math.isfinite(whole) and math.isfinite(half) and whole != 0
        ratio = torch.tensor([[half / whole if told else math.nan]], device=once.device)
        ratios = [value for value in self.gather(ratio).flatten().tolist() if not math.isnan(value)]
        if not ratios:
            return
        if all(abs(value - 0.5) <= tolerance for value in ratios):
            self.is_divided = True
        elif all(abs(value - 1) <= tolerance for value in ratios):
            self.is_divided = False
        else:
            raise ValueError(
                f"twice the num_items_in_batch makes the loss {ratios[0]:.4g} times as large, neither half nor the "
                "same: one part is divided by the labels of the step and another is not, which would count once for "
                "every micro-batch. Switch the other part off (routers of experts: output_router_logits=False), or "
                "set the trainer's attribute loss_is_scaled_for_ga = True to train on the loss as it is"
            )

    def part(
        self,
        loss: Tensor,
        outputs: Any,
        batch: Mapping[str, Any],
        step: StepCounts,
        *,
        times: int,
        factor: int = 1,
        taken_as_divided: bool,
        model_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """The micro-batch's part of the step's loss; without labels it has none.

        Args:
            loss: as the Trainer returned it, a scalar, a mean over the micro-batch.
            outputs: of the model, in the same pass.
            batch: what the model was given.
            step: the counts of the whole step.
            times: what the Trainer and DDP divide the sum of the parts by, later on.
            factor: what the Trainer has multiplied the loss by.
            taken_as_divided: whether the Trainer takes the loss for its part of the step.
            model_dtype: of the weights; the loss may have been rounded to it.

        Raises:
            ValueError: `taken_as_divided`, and it cannot be told what the loss is a mean of.
        """
        unit = self.unit
        if unit is None:
            unit = self._find_unit(loss, outputs, batch, factor, taken_as_divided, model_dtype)
        if unit is None:  # no process has a label here
            return nothing_without_labels(loss, batch)
        count, total = getattr(StepCounts.of(batch), unit), max(1, getattr(step, unit))
        if isinstance(count, int):
            share = count * times / total  # in this order 1 for micro-batches of one size
            return loss if share == 1 else loss * share
        return torch.where(count > 0, loss * (count.to(loss.device) * times / total).to(loss.dtype), 0)

    def _find_unit(
        self,
        loss: Tensor,
        outputs: Any,
        batch: Mapping[str, Any],
        factor: int,
        taken_as_divided: bool,
        model_dtype: torch.dtype | None,
    ) -> str | None:
        """The count that weights this micro-batch; kept for later ones, unless two readings are about the same."""
        labels, logits = class_labels(batch), _logits(outputs)
        means = None if labels is None else self._means(logits, labels, moved="shift_labels" in batch)
        reported = float(loss.detach()) / factor
        if labels is not None and not (bool(labels.ne(-100).any()) and reported and math.isfinite(reported)):
            distances = [math.nan, math.nan]  # NaN is reported elsewhere, and 0 is any mean
        else:
            distances = [
                abs(math.log(reported / mean)) if reported > 0 and 0 < mean < math.inf else math.inf
                for mean in means or (math.nan, math.nan)
            ]
        rows = self.gather(torch.tensor([distances], device=loss.device)).tolist()
        rows = [row for row in rows if not any(map(math.isnan, row))]
        if not rows:
            return None
        near = dict(zip(("labels", "next_labels"), (max(column) for column in zip(*rows, strict=True)), strict=True))
        unit, other = sorted(near, key=near.__getitem__)
        tolerance = _tolerance(loss.dtype, model_dtype, None if logits is None else logits.dtype)
        if near[unit] <= tolerance:
            if near[other] > max(tolerance / ROUNDINGS, 2 * near[unit]):
                self.unit = unit
            return unit
        self.unit = "examples"
        per_example = labels is None or labels.numel() == len(labels)
        if per_example and (loss is _own_loss(outputs) or not taken_as_divided):
            return self.unit
        reason = _why_not(reported, outputs, logits, labels, means)
        if taken_as_divided:
            raise ValueError(f"{reason}, {WAY_OUT}")
        logger.warning("%s: in the task loss, micro-batches count by their examples", reason)
        return self.unit

    def _means(self, logits: Tensor | None, labels: Tensor, *, moved: bool) -> tuple[float, float] | None:
        """The mean loss of the labels by logits at their place, and at the place before; NaN where there is none."""
        if logits is not None and labels.numel() == len(labels) == logits.shape[:-1].numel():
            labels = labels.view(logits.shape[:-1])  # one class for each example, (B,) or (B, 1)
        labels = labels if logits is None else labels.to(logits.device)
        if logits is None or logits.shape[:-1] != labels.shape:
            return None
        real = labels[labels.ne(-100)]
        if not real.numel() or real.min() < 0 or real.max() >= logits.shape[-1]:
            return None
        with torch.no_grad():
            here = self._mean(logits, labels)
            before = math.nan if moved or labels.dim() < 2 else self._mean(logits[..., :-1, :], labels[..., 1:])
        return here, before

    def _mean(self, logits: Tensor, labels: Tensor) -> float:
        real = labels.ne(-100)  # only these rows of a large vocabulary are copied
        logits, labels = logits[real].float(), labels[real]
        if self.smoother is not None:
            return float(self.smoother({"logits": logits}, labels))
        return float(nn.functional.cross_entropy(logits, labels))


def nothing_without_labels(loss: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """The loss; 0 for a micro-batch without any label, whose mean over nothing is NaN."""
    labels = class_labels(batch)
    return loss if labels is None else torch.where(labels.ne(-100).any().to(loss.device), loss, 0)


def _logits(outputs: Any) -> Tensor | None:
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
    return logits if isinstance(logits, Tensor) and logits.dim() > 1 else None


def _own_loss(outputs: Any) -> Any:
    """The loss that the model itself returned, the first of a tuple."""
    if isinstance(outputs, Mapping):
        return outputs.get("loss")
    return outputs[0] if isinstance(outputs, tuple) and outputs else None


def _why_not(
    reported: float, outputs: Any, logits: Tensor | None, labels: Tensor | None, means: tuple[float, float] | None
) -> str:
    """Why the loss is not known to be a mean over the labels."""
    if means is not None:
        return (
            f"the model's loss ({reported:.4g}) is neither the mean cross-entropy of its micro-batch ({means[0]:.4g}) "
            "nor divided by the labels of the whole step"
        )
    if isinstance(outputs, tuple):
        return (
            "the model's outputs are a tuple, in which nobody can find the logits by name (take return_dict=False out "
            "of the batch or of the model's configuration)"
        )
    if labels is None:
        return f"the loss ({reported:.4g}) is not the model's own and its labels are no classes"
    if logits is None or logits.shape[:-1] != labels.shape:
        shape = None if logits is None else tuple(logits.shape)
        return f"the model has logits of shape {shape} for labels of shape {tuple(labels.shape)}"
    return f"the labels are no classes of logits of shape {tuple(logits.shape)}"


def _tolerance(*dtypes: Any, roundings: int = ROUNDINGS) -> float:
    coarsest = max(torch.finfo(d).eps for d in dtypes if isinstance(d, torch.dtype) and d.is_floating_point)
    return max(FLOAT32, roundings * coarsest)


def _random_state_kept(device: torch.device) -> AbstractContextManager[None]:
    if device.type in ("cpu", "mps"):  # torch keeps no state of mps by number
        return torch.random.fork_rng(devices=[])
    devices = None if device.index is None else [device.index]
    return torch.random.fork_rng(devices=devices, device_type=device.type)
