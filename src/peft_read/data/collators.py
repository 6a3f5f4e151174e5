"""Batches for the grounding models: padded features with masks, moments, and pairs of clips for the saliency loss."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..spans import begins_inside, seconds_to_clips
from ..values import array_of, count, id_of, is_given, listed, number, shown, table
from .clip_features import ClipFeatures, TextFeatures
from .pairs import (
    COLUMNS,
    PairSampler,
    Row,
    annotated_pairs,
    ranked_pairs,
    row_name,
    window_pairs,
    windows_of,
    with_clip_seconds,
)

__all__ = ["MomentDetrCollator", "UMTCollator", "annotated_pairs", "ranked_pairs", "window_pairs"]

logger = logging.getLogger(__name__)

NO_PAIR = -1  # in place of a clip's index: no pair
PADDING = -100  # padding rows of `span_labels`, the value that transformers' Trainer pads with
WORKERS = 128  # that count apart


class MomentDetrCollator:
    """Batches rows for `MomentDetrForTemporalGrounding`.

    Moments are given to the model as fractions of (number of clips x clip length), as in the original, at most
    `max_windows` of them. A moment after the last clip of the features is dropped, and counted in `dropped_moments`;
    one that ends after it is cut there. Rows without labels (None, or no such columns) give batches without labels.
    An empty list of `relevant_windows` is a label: a query without any moment, which trains the background. Where such
    a row's `relevant_clip_ids` and `saliency_scores` are empty too, it has no pair.

    Args:
        clips: features of the video.
        text: features of the query.
        pairs: how pairs of clips are drawn: `annotated_pairs`, `window_pairs`, `ranked_pairs`; None = no saliency
            labels.
        span_loss_type: of the model's configuration, `"l1"` or `"ce"`.
        max_windows: moments kept of a query, a random subset where there are more.
        clip_seconds: length of a clip; None = that of `clips`.
        generator: of all random draws; by default one with seed 0. In a worker process of a DataLoader it is
            replaced by one with the worker's seed, so that workers and epochs draw differently.

    Returns:
        A batch of `video_features` (B, L, Dv), `video_mask` (B, L), `text_features` (B, T, Dt), `text_mask` (B, T);
        with moments `span_labels` (B, n, 2), padded with rows of -100, and `span_mask` (B, n), 1 = a moment; with
        pairs `saliency_pos_labels`, `saliency_neg_labels` (B, P), -1 where there is nothing to compare.

    Raises:
        ValueError: invalid options; a row (by qid) with invalid labels, or a batch in which only some rows have
            labels.
    """

    def __init__(
        self,
        clips: ClipFeatures,
        text: TextFeatures,
        *,
        pairs: PairSampler | None = annotated_pairs,
        span_loss_type: str = "l1",
        max_windows: int = 5,
        clip_seconds: float | None = None,
        generator: np.random.Generator | None = None,
    ) -> None:
        if span_loss_type not in ("l1", "ce"):
            raise ValueError(f"span_loss_type={span_loss_type!r} is neither 'l1' nor 'ce'")
        self.clips, self.text, self.span_loss_type = clips, text, span_loss_type
        self.max_windows = count(max_windows, "max_windows")
        self.clip_seconds = (
            clips.clip_seconds if clip_seconds is None else number(clip_seconds, "clip_seconds", above=0)
        )
        self.pairs = None if pairs is None else with_clip_seconds(pairs, self.clip_seconds)
        self._columns = COLUMNS.get(getattr(pairs, "func", pairs)) if pairs is not None else None  # type: ignore[arg-type]
        self._dropped = _DroppedMoments()
        self.generator = np.random.default_rng(0) if generator is None else generator
        self._worker_seed: int | None = None

    @property
    def dropped_moments(self) -> int:
        """Moments dropped so far, in the worker processes of a DataLoader too."""
        return self._dropped.count()

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Collates the rows."""
        _check_batch(rows)
        self._seed_worker()
        tokens = [self.text.raw(row) for row in rows]
        videos = [
            self.clips(row, words, text_id=(self.text, self.text.id(row)))
            for row, words in zip(rows, tokens, strict=True)
        ]
        batch: dict[str, Any] = {
            **_padded("video", videos),
            **_padded("text", [self.text.prepared(words) for words in tokens]),
        }
        if _all_have(rows, "relevant_windows"):
            spans = [self._spans(row, len(video)) for row, video in zip(rows, videos, strict=True)]
            batch["span_labels"], batch["span_mask"] = _padded_rows(spans, PADDING)
        if self.pairs is not None and self._have_pairs(rows):
            drawn = [self.pairs(row, len(video), self.generator) for row, video in zip(rows, videos, strict=True)]
            positive, negative = (torch.tensor([pair[side] for pair in drawn]) for side in (0, 1))
            nothing = positive == negative  # a clip paired with itself: a constant in the loss, without a gradient
            batch["saliency_pos_labels"] = positive.masked_fill(nothing, NO_PAIR)
            batch["saliency_neg_labels"] = negative.masked_fill(nothing, NO_PAIR)
        return batch

    def check(self, rows: Iterable[Row]) -> tuple[int, int]:
        """Reads the features of all rows once, and warns of what will be cut.

        Returns:
            The widths of the clips and of the tokens.

        Raises:
            ValueError: see `ClipFeatures.check` and `TextFeatures.check`.
        """
        rows = list(rows)
        return self.clips.check(rows, clip_seconds=self.clip_seconds), self.text.check(rows)

    def _spans(self, row: Row, num_clips: int) -> NDArray:
        inside = self._dropped.without_late(row, num_clips, self.clip_seconds)
        if len(inside) > self.max_windows:
            inside = inside[self.generator.permutation(len(inside))[: self.max_windows]]
        if self.span_loss_type == "ce":
            return seconds_to_clips(torch.from_numpy(inside), self.clip_seconds, num_clips).numpy()
        # The features of a few videos end a clip before the annotation does.
        start, end = (inside.astype(np.float32) / np.float32(num_clips * self.clip_seconds)).clip(0, 1).T
        return np.stack(((start + end) * np.float32(0.5), end - start), axis=1)  # centre and width

    def _have_pairs(self, rows: Sequence[Row]) -> bool:
        if self._columns is not None:
            present = [_all_have(rows, column) for column in self._columns]  # all are looked at
            return all(present)
        return all(_is_labelled(row, "relevant_windows") or _is_labelled(row, "clip_scores") for row in rows)

    def _seed_worker(self) -> None:
        worker = torch.utils.data.get_worker_info()
        if worker is not None and worker.seed != self._worker_seed:
            self._worker_seed = worker.seed
            self.generator = np.random.default_rng(worker.seed)


class UMTCollator:
    """Batches rows for `UMTForTemporalGrounding`.

    Streams and labels are cut to the shortest; where they differ by more clips than `video.max_difference`, before
    `max_clips`, their rates differ, which is an error. A moment after the last clip is dropped, and counted in
    `dropped_moments`; one that ends after it is cut there. An empty list of `relevant_windows` is a label, a query
    without any moment.

    Args:
        video: features of the clips.
        audio: features of a second stream; None where the model has none.
        text: features of the query; None where the model has none.

    Returns:
        A batch of `video_features`, `video_mask`; `audio_features`; `text_features`, `text_mask`; for rows with
        `clip_scores` `saliency_labels` (B, L), padded with -1; for rows with `relevant_windows` `boundary_labels`
        (B, n, 2) in seconds, padded with -1, and `boundary_mask` (B, n), 1 = a moment.

    Raises:
        ValueError: the query similarity without text, streams with different clip lengths; a row (by qid or vid) with
            invalid labels, or a batch in which only some rows have labels.
    """

    def __init__(
        self, video: ClipFeatures, *, audio: ClipFeatures | None = None, text: TextFeatures | None = None
    ) -> None:
        if text is None and (video.similarity is not None or (audio is not None and audio.similarity is not None)):
            raise ValueError("the query similarity needs text features")
        if audio is not None and audio.clip_seconds != video.clip_seconds:
            raise ValueError(
                f"the clips of the video last {video.clip_seconds:g} s, those of the audio {audio.clip_seconds:g} s: "
                "bring one stream to the clips of the other (PooledFeatures)"
            )
        self.video, self.audio, self.text = video, audio, text
        self._dropped = _DroppedMoments()

    @property
    def dropped_moments(self) -> int:
        """Moments dropped so far, in the worker processes of a DataLoader too."""
        return self._dropped.count()

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Collates the rows."""
        _check_batch(rows)
        streams = [self._streams(row) for row in rows]
        batch: dict[str, Any] = _padded("video", [video for video, _ in streams])
        if self.audio is not None:
            batch["audio_features"] = _padded("audio", [audio for _, audio in streams])["audio_features"]
        if self.text is not None:
            batch.update(_padded("text", [self.text(row) for row in rows]))
        if _all_have(rows, "clip_scores"):
            labels = [
                torch.from_numpy(_clip_scores(row)[: len(video)]).float().unsqueeze(1)
                for row, (video, _) in zip(rows, streams, strict=True)
            ]
            batch["saliency_labels"] = _padded_rows(labels, -1)[0].squeeze(2)
        if _all_have(rows, "relevant_windows"):
            windows = [self._moments(row, len(video)) for row, (video, _) in zip(rows, streams, strict=True)]
            batch["boundary_labels"], batch["boundary_mask"] = _padded_rows(windows, -1)
        return batch

    def check(self, rows: Iterable[Row]) -> dict[str, int]:
        """Reads the features of all rows once, and warns of what will be cut.

        Returns:
            The widths of the streams, by name.

        Raises:
            ValueError: see `ClipFeatures.check` and `TextFeatures.check`; streams of a video that differ by more than
                `video.max_difference` clips.
        """
        rows = list(rows)
        widths = {"video": self.video.check(rows)}
        if self.audio is not None:
            widths["audio"] = self.audio.check(rows)
            for vid in dict.fromkeys(id_of(row["vid"], "'vid' of a row") for row in rows):
                self._check_rate(vid, None)
        if self.text is not None:
            widths["text"] = self.text.check(rows)
        return widths

    def _streams(self, row: Row) -> tuple[NDArray, NDArray]:
        """Video and audio of one row, equally long (the audio is empty where there is none)."""
        tokens = None if self.text is None else self.text.raw(row)
        text_id = None if self.text is None else (self.text, self.text.id(row))
        scores = _clip_scores(row) if is_given(row.get("clip_scores")) else None
        vid = id_of(row.get("vid"), "'vid' of a row")
        self._check_rate(vid, scores)
        at_most = None if scores is None else len(scores)
        video = self.video(row, tokens, at_most=at_most, text_id=text_id)
        if self.audio is None:
            return video, video[:, :0]
        audio = self.audio(row, tokens, at_most=len(video), text_id=text_id)
        if len(audio) < len(video):  # again, because the temporal endpoints depend on the length
            video = self.video(row, tokens, at_most=len(audio), text_id=text_id)
        return video, audio

    def _check_rate(self, vid: str, scores: NDArray | None) -> None:
        counts = {"clips of video": self.video.num_clips(vid)}
        if self.audio is not None:
            counts["of audio"] = self.audio.num_clips(vid)
        if scores is not None:
            counts["labels"] = len(scores)
        known = [length for length in counts.values() if length is not None]
        if known and max(known) - min(known) > self.video.max_difference:
            lengths = ", ".join(f"{length} {what}" for what, length in counts.items())
            raise ValueError(
                f"{vid!r} has {lengths}: they differ by more than max_difference={self.video.max_difference}, so "
                "their rates differ"
            )

    def _moments(self, row: Row, num_clips: int) -> Tensor:
        inside = self._dropped.without_late(row, num_clips, self.video.clip_seconds)
        return torch.from_numpy(np.minimum(inside, num_clips * self.video.clip_seconds)).float()


class _DroppedMoments:
    """Moments that begin after the features of their video, counted over the worker processes of a DataLoader."""

    def __init__(self) -> None:
        # Shared memory, with a place for every worker: two that add to one number at once would lose a moment.
        self._counts = torch.zeros(1 + WORKERS, dtype=torch.int64).share_memory_()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._counts.share_memory_()  # of a copy; what a worker gets is shared already, and stays as it is

    def count(self) -> int:
        return int(self._counts.sum())

    def without_late(self, row: Row, num_clips: int, clip_seconds: float) -> NDArray[np.float64]:
        """The other windows of a row (n, 2); the first time that some are left out, a warning names the row."""
        windows = windows_of(row)
        inside = windows[begins_inside(windows[:, 0], num_clips * clip_seconds)]
        if dropped := len(windows) - len(inside):
            if not self.count():
                logger.warning(
                    "%s%d of %d moments lie after the %d clips of its features and are dropped; `check` lists all",
                    *(row_name(row), dropped, len(windows), num_clips),
                )
            worker = torch.utils.data.get_worker_info()
            self._counts[0 if worker is None else 1 + worker.id % WORKERS] += dropped
        return inside


def _check_batch(rows: Sequence[Row]) -> None:
    if isinstance(rows, Mapping) or not len(rows) or not all(isinstance(row, Mapping) for row in rows):
        raise ValueError(f"a batch is a list of at least one row, each a dict, not {shown(rows)}")


def _all_have(rows: Sequence[Row], column: str) -> bool:
    """Whether the rows have a label; all or none must."""
    lacking = [row for row in rows if not _is_labelled(row, column)]
    if 0 < len(lacking) < len(rows):
        raise ValueError(
            f"{len(lacking)} of the {len(rows)} rows of a batch have no {column!r} ("
            f"{listed([row_name(row).rstrip(': ') for row in lacking])}); label all rows of a dataset or none"
        )
    return not lacking


def _is_labelled(row: Row, column: str) -> bool:
    """Whether a row has a label. Empty lists are one where the windows are empty: the query has no moment."""
    value, windows = row.get(column), row.get("relevant_windows")
    if value is None or column == "clip_scores" or windows is None or is_given(windows):
        return is_given(value)
    return True


def _clip_scores(row: Row) -> NDArray[np.float64]:
    return table(row["clip_scores"], f"{row_name(row)}'clip_scores'", low=0, high=1)


def _padded(kind: str, sequences: Sequence[NDArray]) -> dict[str, Tensor]:
    """Features padded with zeros to the longest, and their mask, 0 = padding."""
    if len({features.shape[1] for features in sequences}) > 1:
        widths = sorted({features.shape[1] for features in sequences})
        raise ValueError(f"the {kind} features of a batch have different widths: {widths}; `check` names them")
    padded, mask = _padded_rows([array_of(features) for features in sequences], 0)
    return {f"{kind}_features": padded, f"{kind}_mask": mask}


def _padded_rows(sequences: Sequence[Tensor | NDArray], value: float) -> tuple[Tensor, Tensor]:
    """The rows (n, width) of every example, padded with `value` to (B, n, width), and the mask (B, n)."""
    first = torch.as_tensor(np.array(sequences[0][:0])) if isinstance(sequences[0], np.ndarray) else sequences[0]
    longest = max(len(rows) for rows in sequences)
    padded = torch.full((len(sequences), longest, sequences[0].shape[1]), value, dtype=first.dtype)
    mask = torch.zeros(len(sequences), longest, dtype=torch.long)
    for index, rows in enumerate(sequences):
        if isinstance(rows, np.ndarray):
            padded[index, : len(rows)].numpy()[...] = rows  # cached features are read-only, which torch warns of
        else:
            padded[index, : len(rows)] = rows
        mask[index, : len(rows)] = 1
    return padded, mask
