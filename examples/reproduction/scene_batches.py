"""Scenes with a text and a target as batches for VL-BART and VL-T5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from peft_read.data import SCENE_FEATURE_DIM, SceneTokens

NOTHING = SceneTokens(
    np.zeros((0, SCENE_FEATURE_DIM), np.float32), np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
)


class SceneCollator:
    """Pads texts, targets and visual tokens of rows with `task`, `text`, `target` and `tokens`.

    `tokens` is a `SceneTokens`, or None where there is nothing to see. With `draw`, a number from 0 to 1 that the
    dataset draws anew in each epoch, rows that say `shuffle_pictures` show their pictures in another order.

    Args:
        tokenizer: of both sides.
        max_text: tokens of a text at most.
        max_target: tokens of a target at most.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_text: int = 64, max_target: int = 40) -> None:
        self.tokenizer, self.max_text, self.max_target = tokenizer, max_text, max_target

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The model's inputs, `labels` with -100 for padding, and the `task` of every row."""
        texts = self._encode([row["text"] for row in rows], self.max_text)
        targets = self._encode([row["target"] for row in rows], self.max_target)
        seen = [_tokens(row) for row in rows]
        length = max(1, max(len(tokens.features) for tokens in seen))
        batch: dict[str, Any] = {
            "input_ids": texts["input_ids"],
            "attention_mask": texts["attention_mask"],
            "visual_features": torch.zeros(len(seen), length, SCENE_FEATURE_DIM),
            "visual_boxes": torch.zeros(len(seen), length, 4),
            "visual_mask": torch.zeros(len(seen), length, dtype=torch.long),
            "image_ids": torch.zeros(len(seen), length, dtype=torch.long),
            "labels": targets["input_ids"].masked_fill(targets["attention_mask"] == 0, -100),
        }
        for index, tokens in enumerate(seen):
            count = len(tokens.features)
            batch["visual_features"][index, :count] = torch.from_numpy(tokens.features)
            batch["visual_boxes"][index, :count] = torch.from_numpy(tokens.boxes)
            batch["image_ids"][index, :count] = torch.from_numpy(tokens.image_ids)
            batch["visual_mask"][index, :count] = 1
        if all("task" in row for row in rows):
            batch["task"] = [row["task"] for row in rows]
        return batch

    def _encode(self, texts: list[str], length: int) -> Any:
        """Tokens with </s> behind them."""
        ended = [f"{text}{self.tokenizer.eos_token}" for text in texts]
        return self.tokenizer(ended, padding=True, truncation=True, max_length=length, return_tensors="pt")


def _tokens(row: Mapping[str, Any]) -> SceneTokens:
    tokens: SceneTokens = row["tokens"] or NOTHING
    if not row.get("shuffle_pictures") or "draw" not in row:
        return tokens
    orders = list(permutations(range(int(tokens.image_ids.max()) + 1)))
    order = np.array(orders[int(row["draw"] * len(orders))])
    return tokens._replace(image_ids=order[tokens.image_ids])
