"""Batches for the grounding models: padded features with masks, moments, and pairs of clips for the saliency loss."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..spans import check_windows, seconds_to_clips
from ..values import array_of, count, id_of, is_given, listed, number, shown, table
from .clip_features import ClipFeatures, TextFeatures

__all__ = ["MomentDetrCollator", "UMTCollator", "annotated_pairs", "ranked_pairs", "window_pairs"]

logger = logging.getLogger(__name__)

Row = Mapping[str, Any]
Pairs = tuple[list[int], list[int]]  # salient clips, and less salient clips in the same order
PairSampler = Callable[..., Pairs]

NO_PAIR = -1  # in place of a clip's index: no pair
PADDING = -100  # padding rows of `span_labels`, the value that transformers' Trainer pads with
# The features of a few videos end a clip or two before the annotations; what comes later was cut away.
LATE_CLIPS = 3


def annotated_pairs(row: Row, num_clips: int, generator: np.random.Generator) -> Pairs:
    """Two pairs of clips from QVHighlights' annotations, as Moment-DETR draws them.

    Hard: the relevant clip with the highest summed rating against the one with the lowest. Easy: a random relevant
    clip against a random other one; a copy of the hard pair where every clip is relevant. A relevant clip up to three
    after the features counts as the last, as in the original; one further on was cut away and takes no part.

    Args:
        row: with `relevant_clip_ids` and `saliency_scores`.
        num_clips: clips that the features have.
        generator: for the easy pair.

    Returns:
        Two pairs; a clip paired with itself where there is nothing to compare.

    Raises:
        ValueError: clips and ratings differ in number, clips are not non-negative integers, ratings are not finite.
    """
    where = _where(row)
    relevant = table(row["relevant_clip_ids"], f"{where}'relevant_clip_ids'", low=0, whole=True).astype(np.int64)
    ratings = table(row["saliency_scores"], f"{where}'saliency_scores'", columns=0)
    if len(relevant) != len(ratings):
        raise ValueError(f"{where}{len(relevant)} relevant clips, but {len(ratings)} saliency scores")
    inside = relevant < num_clips + LATE_CLIPS
    relevant, ratings = np.minimum(relevant[inside], num_clips - 1), ratings[inside]
    if not len(relevant):
        return [0, 0], [0, 0]
    order = np.argsort(ratings.sum(axis=1))
    hard = int(relevant[order[-1]]), int(relevant[order[0]])
    other = np.ones(num_clips, dtype=bool)
    other[relevant] = False
    outside = np.flatnonzero(other)
    easy = hard
    if len(outside):  # integers() draws as choice() does, in a tenth of its time
        salient = int(relevant[generator.integers(len(relevant))])
        easy = salient, int(outside[generator.integers(len(outside))])
    positive, negative = zip(hard, easy, strict=True)
    return list(positive), list(negative)


def window_pairs(row: Row, num_clips: int, generator: np.random.Generator, *, clip_seconds: float = 2.0) -> Pairs:
    """Two random clips inside the row's windows against two outside, for weak labels without ratings.

    A clip is inside if its centre is. Without a clip on either side, a clip is paired with itself.

    Args:
        row: with `relevant_windows` in seconds.
        num_clips: clips that the features have.
        generator: of the random draws.
        clip_seconds: length of a clip; a collator passes its own.

    Raises:
        ValueError: windows that are reversed, negative or not finite.
    """
    middle = (np.arange(num_clips) + 0.5) * number(clip_seconds, "clip_seconds", above=0)
    inside = np.zeros(num_clips, dtype=bool)
    for start, end in _windows(row):
        inside |= (middle >= start) & (middle <= end)
    if inside.all() or not inside.any():
        return [0, 0], [0, 0]
    positive, negative = (generator.choice(np.flatnonzero(side), size=2) for side in (inside, ~inside))
    return positive.tolist(), negative.tolist()


def ranked_pairs(row: Row, num_clips: int, generator: np.random.Generator, *, count: int = 32) -> Pairs:
    """The best clip against the worst, and random pairs of clips with different scores, the better one first.

    For datasets that score every clip and name no moments (TVSum, YouTube Highlights); not part of the
    original, which does not train Moment-DETR on them. Where all scores are equal a clip is paired with itself.

    Args:
        row: with `clip_scores`.
        num_clips: clips that the features have.
        generator: of the random draws.
        count: pairs.

    Raises:
        ValueError: scores that are not finite numbers.
    """
    scores = table(row["clip_scores"], f"{_where(row)}'clip_scores'", empty=False)[:num_clips]
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


# What the samplers of this file read of a row.
COLUMNS: dict[Callable[..., Pairs], tuple[str, ...]] = {
    annotated_pairs: ("relevant_clip_ids", "saliency_scores"),
    window_pairs: ("relevant_windows",),
    ranked_pairs: ("clip_scores",),
}


class MomentDetrCollator:
    """Batches rows for `MomentDetrForTemporalGrounding`.

    Moments are given to the model as fractions of (number of clips x clip length), as in the original, at most
    `max_windows` of them. A moment after the last clip of the features is dropped, and counted in `dropped_moments`;
    one that ends after it is cut there. Rows without labels (None, or no such columns) give batches without labels.

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
        self.pairs = None if pairs is None else _with_clip_seconds(pairs, self.clip_seconds)
        self._columns = COLUMNS.get(getattr(pairs, "func", pairs)) if pairs is not None else None  # type: ignore[arg-type]
        self.dropped_moments = 0
        self.generator = np.random.default_rng(0) if generator is None else generator
        self._worker_seed: int | None = None

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Collates the rows."""
        _check_batch(rows)
        self._seed_worker()
        tokens = [self.text.raw(row) for row in rows]
        videos = [self.clips(row, words, text_id=self.text.id(row)) for row, words in zip(rows, tokens, strict=True)]
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
        windows = _windows(row)
        inside = windows[windows[:, 0] < num_clips * self.clip_seconds]
        if len(inside) < len(windows):
            if not self.dropped_moments:
                logger.warning(
                    "%s%d of %d moments lie after the %d clips of its features and are dropped; `check` lists all",
                    *(_where(row), len(windows) - len(inside), len(windows), num_clips),
                )
            self.dropped_moments += len(windows) - len(inside)
        kept = inside.astype(np.float32)
        if len(kept) > self.max_windows:
            kept = kept[self.generator.permutation(len(kept))[: self.max_windows]]
        if self.span_loss_type == "ce":
            return seconds_to_clips(torch.from_numpy(kept), self.clip_seconds, num_clips).numpy()
        # The features of a few videos end a clip before the annotation does.
        start, end = (kept / np.float32(num_clips * self.clip_seconds)).clip(0, 1).T
        return np.stack(((start + end) * np.float32(0.5), end - start), axis=1)  # centre and width

    def _have_pairs(self, rows: Sequence[Row]) -> bool:
        if self._columns is not None:
            present = [_all_have(rows, column) for column in self._columns]  # all are looked at
            return all(present)
        return all(is_given(row.get("relevant_windows")) or is_given(row.get("clip_scores")) for row in rows)

    def _seed_worker(self) -> None:
        worker = torch.utils.data.get_worker_info()
        if worker is not None and worker.seed != self._worker_seed:
            self._worker_seed = worker.seed
            self.generator = np.random.default_rng(worker.seed)


class UMTCollator:
    """Batches rows for `UMTForTemporalGrounding`.

    Streams and labels are cut to the shortest; where they differ by more clips than `video.max_difference`, before
    `max_clips`, their rates differ, which is an error. A moment after the last clip is dropped, and counted in
    `dropped_moments`; one that ends after it is cut there.

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
        self.dropped_moments = 0

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
        text_id = None if self.text is None else self.text.id(row)
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
        windows, end = _windows(row), num_clips * self.video.clip_seconds
        inside = windows[windows[:, 0] < end]
        self.dropped_moments += len(windows) - len(inside)
        return torch.from_numpy(np.minimum(inside, end)).float()


def _with_clip_seconds(pairs: PairSampler, clip_seconds: float) -> PairSampler:
    """The sampler with the length of a clip bound, if it has that argument."""
    chosen = getattr(pairs, "keywords", {}).get("clip_seconds")
    if chosen is not None and chosen != clip_seconds:
        raise ValueError(f"pairs has clip_seconds={chosen}, the collator {clip_seconds:g}: pass one of them")
    try:
        asks = "clip_seconds" in inspect.signature(pairs).parameters
    except (TypeError, ValueError):  # a callable without a signature
        asks = False
    return functools.partial(pairs, clip_seconds=clip_seconds) if asks else pairs


def _check_batch(rows: Sequence[Row]) -> None:
    if isinstance(rows, Mapping) or not len(rows) or not all(isinstance(row, Mapping) for row in rows):
        raise ValueError(f"a batch is a list of at least one row, each a dict, not {shown(rows)}")


def _where(row: Row) -> str:
    """The name of a row in messages."""
    names = [f"{name} {shown(row[name])}" for name in ("qid", "vid") if row.get(name) is not None]
    return f"{names[0]}: " if names else ""


def _all_have(rows: Sequence[Row], column: str) -> bool:
    """Whether the rows have a label; all or none must."""
    lacking = [row for row in rows if not is_given(row.get(column))]
    if 0 < len(lacking) < len(rows):
        raise ValueError(
            f"{len(lacking)} of the {len(rows)} rows of a batch have no {column!r} ("
            f"{listed([_where(row).rstrip(': ') for row in lacking])}); label all rows of a dataset or none"
        )
    return not lacking


def _windows(row: Row) -> NDArray[np.float64]:
    where = f"{_where(row)}'relevant_windows'"
    windows = table(row["relevant_windows"], where, columns=2)
    check_windows(windows, where)
    return windows


def _clip_scores(row: Row) -> NDArray[np.float64]:
    return table(row["clip_scores"], f"{_where(row)}'clip_scores'", low=0, high=1)


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
