"""The losses of VL-Adapter's tasks: sums and what they are divided by, so that several batches can share a divisor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..values import listed, shown

__all__ = ["LOSS_KINDS", "TASK_LOSSES", "LossSum", "check_losses", "task_loss"]

LOSS_KINDS = ("sample_mean", "scored_sample_mean", "token_mean")
#: The kind of loss of each benchmark, as the original trains it.
TASK_LOSSES: Mapping[str, str] = {
    "vqa": "scored_sample_mean",
    "gqa": "sample_mean",
    "nlvr": "sample_mean",
    "caption": "token_mean",
    "tvqa": "sample_mean",
    "how2qa": "sample_mean",
    "tvc": "sample_mean",
    "yc2c": "sample_mean",
}


class LossSum(NamedTuple):
    """A loss before it is divided.

    Attributes:
        total: float32 scalar, the sum over examples or tokens.
        divisor: float32 scalar, their number.
    """

    total: Tensor
    divisor: Tensor

    @property
    def mean(self) -> Tensor:
        """The loss of these examples alone; 0 where there is nothing to divide by."""
        return self.total / self.divisor.clamp(min=1)


def task_loss(
    logits: Tensor, labels: Tensor, kind: str, scores: Tensor | None = None, *, shift: bool = False
) -> LossSum:
    """Cross-entropy over the target tokens, averaged as a task has it.

    With c_ij the cross-entropy of token j of example i and n_i its number of target tokens:

    * `"sample_mean"`: the mean over examples of sum_j c_ij / n_i;
    * `"scored_sample_mean"`: the mean over examples of score_i · sum_j c_ij / n_i, for VQA, whose answers are drawn by
      their score;
    * `"token_mean"`: sum_ij c_ij / sum_i n_i, for captions.

    An example without a target token adds nothing to the total.

    Source: Sung et al., "VL-Adapter", CVPR 2022, and its published code.

    Args:
        logits: (B, T, vocabulary).
        labels: (B, T) int64; -100 is ignored.
        kind: one of the above.
        scores: (B,) from 0 to 1, of the answers; of `"scored_sample_mean"` only.
        shift: logits[:, t] predicts labels[:, t + 1], as in decoder-only models; else labels[:, t].

    Raises:
        ValueError: another kind, labels or scores that do not fit the logits, scores that are missing.

    Example:
        >>> logits, labels = torch.zeros(2, 3, 5), torch.tensor([[1, 2, 3], [4, -100, -100]])
        >>> tuple(task_loss(logits, labels, kind).divisor.item() for kind in ("sample_mean", "token_mean"))
        (2.0, 4.0)
    """
    if kind not in LOSS_KINDS:
        raise ValueError(f"the kind of a loss must be one of {', '.join(map(repr, LOSS_KINDS))}, not {kind!r}")
    if logits.dim() != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} must be (B, T, V) and (B, T)")
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    labels = labels.to(logits.device)
    tokens = nn.functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none"
    ).view(labels.shape)  # (B, T), 0 where ignored
    lengths = labels.ne(-100).sum(1)
    if kind == "token_mean":
        return LossSum(tokens.sum(), lengths.sum().float())
    examples = tokens.sum(1) / lengths.clamp(min=1)  # (B,)
    if kind == "scored_sample_mean":
        if scores is None or scores.shape != examples.shape:
            given = "none" if scores is None else f"{tuple(scores.shape)}"
            raise ValueError(f"{kind!r} needs the score of every answer, (B,) = ({len(labels)},), and got {given}")
        examples = examples * scores.to(examples)
    return LossSum(examples.sum(), torch.tensor(float(len(labels)), device=logits.device))


def check_losses(tasks: tuple[str, ...], kinds: Mapping[str, str] | None) -> dict[str, str]:
    """The kind of loss of every task.

    Args:
        tasks: their names.
        kinds: by task, for those that are not in `TASK_LOSSES`, or differ from it.

    Raises:
        ValueError: a task without a kind, or a kind that does not exist.
    """
    if kinds is not None and not isinstance(kinds, Mapping):
        raise ValueError(f"the losses must be a mapping from task to kind, not {shown(kinds)}")
    chosen = {**TASK_LOSSES, **(kinds or {})}
    if lacking := [task for task in tasks if task not in chosen]:
        raise ValueError(
            f"no kind of loss for {listed([repr(task) for task in lacking])}: name one of "
            f"{', '.join(map(repr, LOSS_KINDS))} for each, as in task_losses={{{lacking[0]!r}: 'sample_mean'}}"
        )
    if wrong := {task: kind for task, kind in chosen.items() if kind not in LOSS_KINDS}:
        raise ValueError(f"the kind of a loss must be one of {', '.join(map(repr, LOSS_KINDS))}, not {shown(wrong)}")
    return {task: chosen[task] for task in tasks}
