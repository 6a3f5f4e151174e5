"""Whether a model's logits are compared with the labels at their own place, or with those one place further on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING

from ..alignment.streams import unwrap_model

__all__ = ["check_shift", "loss_shifts_labels"]

SHIFTED = ("ForCausalLM",)
AT_THEIR_PLACE = ("ForMaskedLM", "ForTokenClassification")
TOLERANCE, ROUNDINGS = 1e-3, 8  # relative, in float32; and of the logits' dtype
WAY_OUT = (
    "say which with loss_shifts_labels=True (logits[:, t] predicts labels[:, t + 1], as in decoder-only models) or "
    "loss_shifts_labels=False (labels[:, t], as in encoder-decoder models)"
)


def loss_shifts_labels(model: nn.Module) -> bool:
    """Whether the logits at t predict the label at t + 1, as those of decoder-only models do.

    Args:
        model: wrapped (peft, DDP, torch.compile) or not.

    Raises:
        ValueError: the model is neither an encoder-decoder nor has a loss of transformers that tells.
    """
    base: Any = unwrap_model(model)
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        return False
    loss = getattr(base, "loss_function", None)
    if any(loss is LOSS_MAPPING[name] for name in SHIFTED):
        return True
    if any(loss is LOSS_MAPPING[name] for name in AT_THEIR_PLACE):
        return False
    raise ValueError(
        f"{type(base).__name__} is no encoder-decoder model and has no known loss_function, so it is not known which "
        f"label its logits predict: {WAY_OUT}"
    )


def check_shift(model: nn.Module, loss: Tensor, logits: Tensor, labels: Tensor, shift: bool) -> None:
    """Compares the reading that was taken with the model's own loss.

    Args:
        model: for the message.
        loss: the model's own, of this batch, a scalar.
        logits: (B, T, V).
        labels: (B, T), -100 = no label.
        shift: the reading.

    Raises:
        ValueError: the model's loss is that of the other reading.
    """
    with torch.no_grad():
        labels = labels.to(logits.device)
        place = nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        following = nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())
    own, taken, other = (float(x) for x in (loss.detach(), *((following, place) if shift else (place, following))))
    tolerance = max(TOLERANCE, ROUNDINGS * torch.finfo(logits.dtype).eps)
    if abs(own - other) <= tolerance * abs(other) and not abs(own - taken) <= tolerance * abs(taken):
        name = type(unwrap_model(model)).__name__
        raise ValueError(
            f"{name}'s own loss ({own:.5g}) compares logits[:, t] with labels[:, t{'' if shift else ' + 1'}], and a "
            f"model of its kind would with labels[:, t{' + 1' if shift else ''}] ({taken:.5g}): {WAY_OUT}"
        )
