"""Batches for the grounding models: features padded with their masks, moments, and pairs of clips for the saliency."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..spans import seconds_to_clips, start_end_to_centre_width
from .clip_features import ClipFeatures, TextFeatures

__all__ = ["MomentDetrCollator", "UMTCollator", "annotated_pairs", "ranked_pairs", "window_pairs"]

Row = Mapping[str, Any]
Pairs = tuple[list[int], list[int]]  # salient clips, and less salient clips in the same order
PairSampler = Callable[[Row, int, np.random.Generator], Pairs]


def annotated_pairs(row: Row, num_clips: int, generator: np.random.Generator) -> Pairs:
    """Two pairs of clips from QVHighlights' annotations, as Moment-DETR draws them.

    Hard: the relevant clip with the highest summed rating against the one with the lowest. Easy: a random relevant
    clip against a random other one; a copy of the hard pair where every clip is relevant.

    Args:
        row: with `relevant_clip_ids` and `saliency_scores`.
        num_clips: clips that the features have; a later clip becomes the last.
        generator: for the easy pair.
    """
    relevant = np.asarray(row["relevant_clip_ids"])
    order = np.argsort(np.asarray(row["saliency_scores"]).sum(axis=1))
    hard = int(relevant[order[-1]]), int(relevant[order[0]])
    outside = np.setdiff1d(np.arange(num_clips), relevant)
    easy = (int(generator.choice(relevant)), int(generator.choice(outside))) if len(outside) else hard
    positive, negative = zip(hard, easy, strict=True)
    return [min(clip, num_clips - 1) for clip in positive], [min(clip, num_clips - 1) for clip in negative]


def window_pairs(row: Row, num_clips: int, generator: np.random.Generator, *, clip_seconds: float = 2.0) -> Pairs:
    """Two random clips inside the row's windows against two outside, for weak labels without ratings.

    A clip is inside if its middle is. Where nothing is inside or nothing outside, a clip is paired with itself, which
    gives no gradient.

    Args:
        row: with `relevant_windows` in seconds.
        num_clips: clips that the features have.
        generator: of the draw.
        clip_seconds: length of a clip.
    """
    middle = (np.arange(num_clips) + 0.5) * clip_seconds
    inside = np.zeros(num_clips, dtype=bool)
    for start, end in row["relevant_windows"]:
        inside |= (middle >= start) & (middle <= end)
    if inside.all() or not inside.any():
        return [0, 0], [0, 0]
    positive, negative = (generator.choice(np.flatnonzero(side), size=2) for side in (inside, ~inside))
    return positive.tolist(), negative.tolist()


def ranked_pairs(row: Row, num_clips: int, generator: np.random.Generator, *, count: int = 32) -> Pairs:
    """The best clip against the worst, and random pairs of clips with different scores, the better one first.

    For datasets that score every clip and name no moments (TVSum, YouTube Highlights); not of the original, which
    does not train Moment-DETR on them. Where all scores are equal a clip is paired with itself, without a gradient.

    Args:
        row: with `clip_scores`.
        num_clips: clips that the features have.
        generator: of the draw.
        count: pairs.
    """
    scores = np.asarray(row["clip_scores"])[:num_clips]
    if scores.min() == scores.max():
        return [0] * count, [0] * count
    positive, negative = [int(scores.argmax())], [int(scores.argmin())]
    while len(positive) < count:
        for a, b in generator.integers(len(scores), size=(count, 2)):
            if scores[a] != scores[b] and len(positive) < count:
                better, worse = (a, b) if scores[a] > scores[b] else (b, a)
                positive.append(int(better))
                negative.append(int(worse))
    return positive, negative


class MomentDetrCollator:
    """Batches rows for `MomentDetrForTemporalGrounding`.

    Moments are given to the model as shares of (number of clips x clip length), as in the original, at most
    `max_windows` of them. Rows without labels (None, or no such columns) give batches without labels.

    Args:
        clips: features of the video.
        text: features of the query.
        pairs: how pairs of clips are drawn: `annotated_pairs`, `window_pairs`, `ranked_pairs`; None = no saliency
            labels.
        span_loss_type: of the model's configuration, `"l1"` or `"ce"`.
        max_windows: moments kept of a query, a random subset where there are more.
        clip_seconds: length of a clip.
        generator: of every draw; a default one with seed 0 if absent. In a worker process of a DataLoader the
            worker's own seed takes its place, so that workers and epochs do not repeat each other's draws.

    Returns:
        A batch of `video_features` (B, L, Dv), `video_mask` (B, L), `text_features` (B, T, Dt), `text_mask` (B, T);
        with moments `span_labels`, a list of (n, 2); with pairs `saliency_pos_labels`, `saliency_neg_labels` (B, P).
    """

    def __init__(
        self,
        clips: ClipFeatures,
        text: TextFeatures,
        *,
        pairs: PairSampler | None = annotated_pairs,
        span_loss_type: str = "l1",
        max_windows: int = 5,
        clip_seconds: float = 2.0,
        generator: np.random.Generator | None = None,
    ) -> None:
        if span_loss_type not in ("l1", "ce"):
            raise ValueError(f"span_loss_type={span_loss_type!r} is neither 'l1' nor 'ce'")
        self.clips, self.text, self.pairs = clips, text, pairs
        self.span_loss_type, self.max_windows, self.clip_seconds = span_loss_type, max_windows, clip_seconds
        self.generator = np.random.default_rng(0) if generator is None else generator
        self._worker_seed: int | None = None

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Collates the rows."""
        self._seed_worker()
        videos = [self.clips(row, self.text.raw(row)) for row in rows]
        batch: dict[str, Any] = {
            **_padded("video", videos),
            **_padded("text", [self.text(row) for row in rows]),
        }
        if all(row.get("relevant_windows") for row in rows):
            batch["span_labels"] = [self._spans(row, len(video)) for row, video in zip(rows, videos, strict=True)]
        if self.pairs is not None and all(_has_labels(row) for row in rows):
            drawn = [self.pairs(row, len(video), self.generator) for row, video in zip(rows, videos, strict=True)]
            batch["saliency_pos_labels"] = torch.tensor([positive for positive, _ in drawn])
            batch["saliency_neg_labels"] = torch.tensor([negative for _, negative in drawn])
        return batch

    def _spans(self, row: Row, num_clips: int) -> Tensor:
        windows = torch.tensor(row["relevant_windows"], dtype=torch.float32)
        if len(windows) > self.max_windows:
            windows = windows[self.generator.permutation(len(windows))[: self.max_windows]]
        if self.span_loss_type == "ce":
            return seconds_to_clips(windows, self.clip_seconds, num_clips)
        # The features of a few videos end a clip before the annotation does.
        shares = (windows / (num_clips * self.clip_seconds)).clamp(0, 1)
        return start_end_to_centre_width(shares)

    def _seed_worker(self) -> None:
        worker = torch.utils.data.get_worker_info()
        if worker is not None and worker.seed != self._worker_seed:
            self._worker_seed = worker.seed
            self.generator = np.random.default_rng(worker.seed)


class UMTCollator:
    """Batches rows for `UMTForTemporalGrounding`.

    Args:
        video: features of the clips; streams and labels are cut to the shortest.
        audio: features of a second stream; None where the model has none.
        text: features of the query; None where the model has none.

    Returns:
        A batch of `video_features`, `video_mask`; `audio_features`; `text_features`, `text_mask`; for rows with
        `clip_scores` `saliency_labels` (B, L), padded with -1; for rows with `relevant_windows` `boundary_labels`
        (B, n, 2) in seconds, padded with -1, and `boundary_mask` (B, n).

    Raises:
        ValueError: the query similarity without text.
    """

    def __init__(
        self, video: ClipFeatures, *, audio: ClipFeatures | None = None, text: TextFeatures | None = None
    ) -> None:
        if text is None and (video.similarity is not None or (audio is not None and audio.similarity is not None)):
            raise ValueError("the query similarity needs text features")
        self.video, self.audio, self.text = video, audio, text

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Collates the rows."""
        streams = [self._streams(row) for row in rows]
        batch: dict[str, Any] = _padded("video", [video for video, _ in streams])
        if self.audio is not None:
            batch["audio_features"] = _padded("audio", [audio for _, audio in streams])["audio_features"]
        if self.text is not None:
            batch.update(_padded("text", [self.text(row) for row in rows]))
        if all(row.get("clip_scores") for row in rows):
            labels = [
                torch.tensor(row["clip_scores"][: len(video)], dtype=torch.float32)
                for row, (video, _) in zip(rows, streams, strict=True)
            ]
            batch["saliency_labels"] = pad_sequence(labels, batch_first=True, padding_value=-1.0)
        if all(row.get("relevant_windows") for row in rows):
            windows = [torch.tensor(row["relevant_windows"], dtype=torch.float32) for row in rows]
            batch["boundary_labels"] = pad_sequence(windows, batch_first=True, padding_value=-1.0)
            batch["boundary_mask"] = _mask(windows)
        return batch

    def _streams(self, row: Row) -> tuple[np.ndarray, np.ndarray]:
        """Video and audio of one row, equally long (the audio is empty where there is none)."""
        tokens = None if self.text is None else self.text.raw(row)
        scores = row.get("clip_scores")
        video = self.video(row, tokens, at_most=len(scores) if scores else None)
        if self.audio is None:
            return video, video[:, :0]
        audio = self.audio(row, tokens, at_most=len(video))
        if len(audio) < len(video):  # again, because the temporal endpoints depend on the length
            video = self.video(row, tokens, at_most=len(audio))
        return video, audio


def _has_labels(row: Row) -> bool:
    return bool(row.get("relevant_windows") or row.get("clip_scores"))


def _padded(kind: str, sequences: Sequence[np.ndarray]) -> dict[str, Tensor]:
    """Features padded with zeros to the longest, and their mask, 1 = real."""
    tensors = [torch.from_numpy(np.ascontiguousarray(features)) for features in sequences]
    return {f"{kind}_features": pad_sequence(tensors, batch_first=True), f"{kind}_mask": _mask(tensors)}


def _mask(sequences: Sequence[Tensor]) -> Tensor:
    return pad_sequence([torch.ones(len(sequence), dtype=torch.long) for sequence in sequences], batch_first=True)
