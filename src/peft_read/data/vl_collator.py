"""Batches for models that read text and visual tokens: VL-BART and VL-T5."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..values import array_of, count, id_of, is_given, listed, number, shown
from .features import Features, read_features

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["VIDEO_TASKS", "VLCollator", "resize_frames"]

Row = Mapping[str, Any]
#: Features and, where there are any, boxes and image ids of an example.
VisualTokens = Callable[[Row], Sequence[Any]]

VIDEO_TASKS = ("tvqa", "how2qa", "tvc", "yc2c")
# In tokens, special tokens included, as in the original; other tasks are not cut.
TEXT_LENGTHS = {"vqa": 20, "gqa": 20, "caption": 40, **dict.fromkeys(VIDEO_TASKS, 600)}
TARGET_LENGTHS = {"vqa": 10, "caption": 40, **dict.fromkeys(VIDEO_TASKS, 20)}


def resize_frames(features: Tensor, length: int) -> Tensor:
    """A fixed number of frames: fewer are padded with zeros, more are max-pooled over time.

    Args:
        features: (frames, width).
        length: frames wanted.

    Returns:
        (length, width).
    """
    frames = len(features)
    if frames < length:
        return nn.functional.pad(features, (0, 0, 0, length - frames))
    return nn.functional.adaptive_max_pool1d(features.T, length).T if frames > length else features


class VLCollator:
    """Batches the rows of the vision-and-language readers, all of one task.

    The target is drawn among the answers by their scores where the row has scores and a `draw` (`MultitaskDataset`
    gives one); else it is the row's own.

    Args:
        tokenizer: with `pad_token_id`; its special tokens are kept, in text and target.
        visuals: where the visual tokens come from, one for all tasks or one for each: features by id (`FeatureStore`,
            each (V, width)), looked up by a row's `visuals`; or a function from a row to features
            (V, width), boxes (V, 4) and image ids (V,), of which the last two may be absent.
        boxes: by id, each (V, 4) in fractions of the image; None: zero, as for features of a grid or a video.
        text_lengths: tokens of the text, one number or one for each task; None: the original's (20 in VQA and GQA, 40
            in captions, 600 in videos). Other tasks are not cut. The end is cut off, which in videos is the
            prompt.
        target_lengths: tokens of the target; None: the original's (10 in VQA, 40 in captions, 20 in videos).
        video_tokens: length that the features of a video are resized to, see `resize_frames`; None: unchanged.
        video_tasks: the tasks whose `visuals` are videos.

    Returns:
        A batch of `input_ids`, `attention_mask` (B, S); `visual_features` (B, V, width), `visual_boxes` (B, V, 4),
        `visual_mask` (0 = padding), `image_ids` (B, V), the images of a row one after the other; `labels` (B, T),
        padded with -100, and `scores` (B,), where the rows have targets; `task`.

    Raises:
        ValueError: rows of several tasks, or (by id) without a text, visual tokens, or with features or boxes of
            another shape, that are not finite, or boxes outside the image; a target in some rows only.
        KeyError: no features of an id.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        visuals: Features | VisualTokens | Mapping[str, Any],
        *,
        boxes: Features | Mapping[str, Any] | None = None,
        text_lengths: Mapping[str, int | None] | int | None = None,
        target_lengths: Mapping[str, int | None] | int | None = None,
        video_tokens: int | None = 64,
        video_tasks: Sequence[str] = VIDEO_TASKS,
    ) -> None:
        if getattr(tokenizer, "pad_token_id", None) is None:
            raise ValueError("the tokenizer has no pad_token_id: batches cannot be padded")
        self.tokenizer, self.visuals, self.boxes = tokenizer, visuals, boxes
        self.text_lengths = _lengths(text_lengths, TEXT_LENGTHS, "text_lengths")
        self.target_lengths = _lengths(target_lengths, TARGET_LENGTHS, "target_lengths")
        self.video_tokens = None if video_tokens is None else count(video_tokens, "video_tokens")
        self.video_tasks = tuple(video_tasks)

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Collates the rows."""
        if isinstance(rows, Mapping) or not len(rows):
            raise ValueError(f"a batch is a list of at least one row, each a dict, not {shown(rows)}")
        tasks = sorted({str(row.get("task")) for row in rows})
        task = rows[0].get("task")
        if len(tasks) > 1 or not isinstance(task, str):
            raise ValueError(
                f"a batch holds one task, and these rows are of {listed([repr(task) for task in tasks])}: use "
                "MultitaskBatchSampler, or a dataset of one task"
            )
        texts = [self.encode(_text(row, "text"), self._length(self.text_lengths, task)) for row in rows]
        batch: dict[str, Any] = {
            "input_ids": _pad(texts, self.tokenizer.pad_token_id),
            "attention_mask": _pad([[1] * len(text) for text in texts], 0),
            **_stack(rows, [self.visual_tokens(row) for row in rows]),
            "task": task,
        }
        targets = [_target(row) for row in rows]
        if lacking := [_where(row) for row, target in zip(rows, targets, strict=True) if target is None]:
            if len(lacking) < len(rows):
                raise ValueError(
                    f"{len(lacking)} of the {len(rows)} rows of a batch have no target: {listed(lacking)}"
                )
            return batch
        length = self._length(self.target_lengths, task)
        batch["labels"] = _pad([self.encode(target[0], length) for target in targets if target], -100)
        batch["scores"] = torch.tensor([target[1] for target in targets if target], dtype=torch.float32)
        return batch

    def visual_tokens(self, row: Row) -> tuple[Tensor, Tensor, Tensor]:
        """Features (V, width), boxes (V, 4) and image ids (V,) of one row."""
        where, task = _where(row), row.get("task")
        source: Any = self.visuals
        if isinstance(source, Mapping) and task in source:
            source = source[task]
        if callable(source) and not hasattr(source, "__getitem__"):
            parts: Sequence[Any] = source(row)
            features, boxes, images = (*parts, None, None)[:3]
        else:
            features, boxes, images = self._stored(row, source, where)
        features = _table(features, f"{where}: the visual features")
        boxes = torch.zeros(len(features), 4) if boxes is None else _table(boxes, f"{where}: the boxes", columns=4)
        images = (
            torch.zeros(len(features), dtype=torch.long) if images is None else _whole(images, f"{where}: image ids")
        )
        if not len(features) == len(boxes) == len(images):
            raise ValueError(f"{where}: {len(features)} visual tokens, {len(boxes)} boxes, {len(images)} image ids")
        if boxes.numel() and (boxes.min() < -BOX_TOLERANCE or boxes.max() > 1 + BOX_TOLERANCE):
            raise ValueError(
                f"{where}: a box reaches outside the image ({float(boxes.min()):g} to {float(boxes.max()):g}): boxes "
                "are x1, y1, x2, y2 in fractions of the image; divide pixels by its width and height"
            )
        return features, boxes, images

    def check(self, rows: Iterable[Row]) -> None:
        """Reads text, target and visual tokens of every row once, and warns of texts that will be cut.

        Raises:
            ValueError: as in a batch, before any training.
        """
        cut: dict[tuple[str, str], int] = {}
        for row in rows:
            task, target = str(row.get("task")), _target(row)
            self.visual_tokens(row)
            for what, text, lengths in (
                ("texts", _text(row, "text"), self.text_lengths),
                ("targets", None if target is None else target[0], self.target_lengths),
            ):
                length = self._length(lengths, task)
                if text is not None and length is not None and len(self.encode(text, None)) > length:
                    cut[task, what] = cut.get((task, what), 0) + 1
        for (task, what), times in cut.items():
            warnings.warn(
                f"{times} {what} of task {task!r} are longer than their limit and lose their end", stacklevel=2
            )

    def encode(self, text: str, max_length: int | None) -> list[int]:
        """Token ids with special tokens, at most `max_length`."""
        options = {} if max_length is None else {"max_length": max_length, "truncation": True}
        return self.tokenizer(text, **options)["input_ids"]

    @staticmethod
    def _length(lengths: Mapping[str, int | None] | int, task: str) -> int | None:
        return lengths.get(task) if isinstance(lengths, Mapping) else lengths

    def _stored(self, row: Row, source: Any, where: str) -> tuple[Any, Any, Any]:
        ids = row.get("visuals")
        if not isinstance(ids, list | tuple) or not ids:
            raise ValueError(f"{where}: 'visuals' must name its images or its video, not {shown(ids)}")
        keys = [id_of(key, f"{where}: 'visuals'") for key in ids]
        parts = [torch.from_numpy(np.array(read_features(source, key))) for key in keys]
        if row.get("task") in self.video_tasks and self.video_tokens is not None:
            parts = [resize_frames(part, self.video_tokens) for part in parts]
        if len({part.shape[1] for part in parts}) > 1:
            raise ValueError(f"{where}: features of different widths: {[part.shape[1] for part in parts]}")
        images = torch.cat([torch.full((len(part),), index) for index, part in enumerate(parts)])
        boxes = None if self.boxes is None else np.concatenate([read_features(self.boxes, key) for key in keys])
        return torch.cat(parts), boxes, images


BOX_TOLERANCE = 1e-3  # boxes are rounded where they are published


def _lengths(given: Any, known: Mapping[str, int], name: str) -> Mapping[str, int | None] | int:
    if given is None:
        return known
    if not isinstance(given, Mapping):
        return count(given, name, low=2)
    return {**known, **{k: v if v is None else count(v, f"{name} of {k!r}", low=2) for k, v in given.items()}}


def _where(row: Row) -> str:
    return f"{row.get('task')} {row.get('id')!r}"


def _text(row: Row, field: str) -> str:
    if not isinstance(row.get(field), str):
        raise ValueError(f"{_where(row)}: {field!r} must be a string, not {shown(row.get(field))}")
    return row[field]


def _target(row: Row) -> tuple[str, float] | None:
    """The answer to train on and its score."""
    if row.get("target") is None:
        return None
    target, scores, answers = _text(row, "target"), row.get("scores"), row.get("answers")
    if row.get("draw") is not None and is_given(scores) and is_given(answers) and any(scores):  # type: ignore[arg-type]
        assert scores is not None and answers is not None
        if len(scores) != len(answers):
            raise ValueError(f"{_where(row)}: {len(answers)} answers and {len(scores)} scores")
        sums = np.cumsum(np.asarray(scores, dtype=np.float64))
        chosen = int(np.searchsorted(sums, float(row["draw"]) * sums[-1], side="right"))
        return str(answers[chosen]), float(scores[chosen])
    score = row.get("score")
    return target, 1.0 if score is None else number(score, f"{_where(row)}: 'score'", low=0, high=1)


def _table(value: Any, where: str, columns: int | None = None) -> Tensor:
    array = np.asarray(array_of(value))
    if array.ndim != 2 or array.dtype.kind not in "fiu" or (columns and array.shape[1] != columns) or not len(array):
        raise ValueError(f"{where} must be numbers (V, {columns or 'width'}), not of the shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{where} hold NaN or infinite values (token {int(np.argmax(~np.isfinite(array).all(1)))})")
    return torch.from_numpy(np.array(array, dtype=np.float32))


def _whole(value: Any, where: str) -> Tensor:
    array = np.asarray(array_of(value))
    if array.ndim != 1 or array.dtype.kind not in "iu" or (array < 0).any():
        raise ValueError(f"{where}: image ids must be whole numbers (V,) from 0 on, not {shown(value)}")
    return torch.from_numpy(np.array(array, dtype=np.int64))


def _stack(rows: Sequence[Row], tokens: Sequence[tuple[Tensor, Tensor, Tensor]]) -> dict[str, Tensor]:
    if len({features.shape[1] for features, _, _ in tokens}) > 1:
        widths = listed(
            [f"{_where(row)} ({features.shape[1]})" for row, (features, _, _) in zip(rows, tokens, strict=True)]
        )
        raise ValueError(f"the visual features of a batch have different widths: {widths}")
    features, boxes, images = (
        nn.utils.rnn.pad_sequence(list(part), batch_first=True) for part in zip(*tokens, strict=True)
    )
    mask = _pad([[1] * len(part) for part, _, _ in tokens], 0)
    return {"visual_features": features, "visual_boxes": boxes, "visual_mask": mask, "image_ids": images}


def _pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=torch.long)
