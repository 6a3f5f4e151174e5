"""The token cross-entropy of sequence-to-sequence models, with the exact scaling of transformers' Trainer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["sequence_cross_entropy"]


def sequence_cross_entropy(logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Cross-entropy over the tokens whose label is not -100.

    Called plainly it is the mean over tokens. The Trainer passes the number of label tokens of ALL micro-batches of
    one optimiser step; then the sum is divided by that number, so that gradient accumulation gives exactly the
    gradient of one large batch, also where micro-batches hold different numbers of tokens.

    Args:
        logits: (B, T, vocabulary).
        labels: (B, T) int64; -100 is ignored.
        num_items_in_batch: number of label tokens to divide by; None: those of this batch.

    Returns:
        A float32 scalar.
    """
    logits = logits.float().flatten(0, -2)
    labels = labels.to(logits.device).flatten()
    if num_items_in_batch is None:
        return nn.functional.cross_entropy(logits, labels)
    if torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(logits.device)
    return nn.functional.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch
