"""Batches of scenes, and of texts without a scene, for the pretraining of VL-BART."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from peft_read.data import SCENE_FEATURE_DIM, SceneTokens


class SceneCollator:
    """Pads texts, targets and visual tokens of rows with `text`, `target` and `tokens`, or None where there are none.

    Tasks are mixed, and nothing to see is allowed, which `VLCollator` refuses.

    Args:
        tokenizer: of both sides; it ends a text with </s>.
        max_text: tokens of a text at most.
        max_target: tokens of a target at most.
        width: of the features.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_text: int = 128,
        max_target: int = 40,
        width: int = SCENE_FEATURE_DIM,
    ) -> None:
        self.tokenizer, self.max_text, self.max_target, self.width = tokenizer, max_text, max_target, width
        self.nothing = SceneTokens(
            np.zeros((0, width), np.float32), np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
        )

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The model's inputs, and `labels` with -100 for padding."""
        texts = self._encode([row["text"] for row in rows], self.max_text)
        targets = self._encode([row["target"] for row in rows], self.max_target)
        seen: list[SceneTokens] = [row["tokens"] or self.nothing for row in rows]
        length = max(1, max(len(tokens.features) for tokens in seen))
        batch: dict[str, Any] = {
            "input_ids": texts["input_ids"],
            "attention_mask": texts["attention_mask"],
            "visual_features": torch.zeros(len(seen), length, self.width),
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
        return batch

    def _encode(self, texts: list[str], length: int) -> Any:
        return self.tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
