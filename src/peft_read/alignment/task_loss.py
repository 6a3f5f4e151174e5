"""Whether a model's loss is the mean over its own micro-batch, or its part of the whole optimiser step."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["is_local_mean"]

CLOSEST = 1e-2  # readings nearer to each other than this settle nothing
FLOAT32 = 1e-3  # how well a loss in float32 matches the mean of its own logits
ROUNDINGS = 8  # of the model's dtype, between the logits and its loss
WAY_OUT = (
    "so it is not known what to divide its loss by. If it is a mean over its micro-batch, set "
    "accepts_loss_kwargs = False on the model before the trainer is built: Trainer then divides by the accumulation "
    "steps. If the trainer has a compute_loss of its own, say with its attribute loss_is_scaled_for_ga whether what "
    "that returns is divided already."
)


def is_local_mean(
    loss: Tensor,
    logits: Tensor | None,
    labels: Tensor,
    num_items_in_batch: Tensor | int,
    *,
    model_dtype: torch.dtype | None = None,
) -> tuple[bool, bool]:
    """Whether the model divided its cross-entropy by its own tokens, rather than by those of the step.

    The loss is the mean of the micro-batch or the sum over the micro-batch / `num_items_in_batch`. The nearer of the
    two is taken, by the ratio: a loss that was rounded to bfloat16 equals neither.

    Args:
        loss: of the micro-batch, as the model returned it, a scalar.
        logits: (B, L, V); None: the model returned none.
        labels: (B, L), -100 = no label.
        num_items_in_batch: the labels of the whole step.
        model_dtype: of the weights; the loss may have been rounded to it.

    Returns:
        The answer, and whether it holds for later micro-batches too: not where both readings are about the same.

    Raises:
        ValueError: the loss is neither, or there are no logits of these labels to tell.
    """
    tokens, items = int(labels.ne(-100).sum()), int(num_items_in_batch)
    if tokens in (0, items):
        return False, False
    if logits is None or logits.shape[:-1] != labels.shape:
        shape = None if logits is None else tuple(logits.shape)
        raise ValueError(f"the model has logits of shape {shape} for labels of shape {tuple(labels.shape)}, {WAY_OUT}")
    with torch.no_grad():
        summed = nn.functional.cross_entropy(
            logits.float().flatten(0, -2), labels.flatten().to(logits.device), reduction="sum"
        )
    reported, local_mean, exact = float(loss.detach()), float(summed) / tokens, float(summed) / items
    if not all(0 < value < math.inf for value in (reported, local_mean, exact)):
        return False, False  # NaN is reported elsewhere, and 0 is both
    coarsest = max(
        torch.finfo(dtype).eps
        for dtype in (logits.dtype, loss.dtype, model_dtype)
        if isinstance(dtype, torch.dtype) and dtype.is_floating_point
    )
    tolerance = max(FLOAT32, ROUNDINGS * coarsest)
    from_local, from_exact = abs(math.log(reported / local_mean)), abs(math.log(reported / exact))
    if min(from_local, from_exact) > tolerance:
        raise ValueError(
            f"the model's loss ({reported:.4g}) is neither the mean cross-entropy of its micro-batch "
            f"({local_mean:.4g}) nor its part of the whole step ({exact:.4g}), {WAY_OUT}"
        )
    return from_local < from_exact, abs(math.log(local_mean / exact)) > max(CLOSEST, tolerance)
