"""Pairs of clips for the saliency loss, drawn from what a row says of its clips."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..spans import check_windows
from ..values import number, shown, table

__all__ = [
    "COLUMNS",
    "PairSampler",
    "Pairs",
    "Row",
    "annotated_pairs",
    "ranked_pairs",
    "row_name",
    "window_pairs",
    "windows_of",
    "with_clip_seconds",
]

Row = Mapping[str, Any]
Pairs = tuple[list[int], list[int]]  # salient clips, and less salient clips in the same order
PairSampler = Callable[..., Pairs]

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
    where = row_name(row)
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
    for start, end in windows_of(row):
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
    scores = table(row["clip_scores"], f"{row_name(row)}'clip_scores'", empty=False)[:num_clips]
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


def with_clip_seconds(pairs: PairSampler, clip_seconds: float) -> PairSampler:
    """The sampler with the length of a clip bound, if it has that argument."""
    chosen = getattr(pairs, "keywords", {}).get("clip_seconds")
    if chosen is not None and chosen != clip_seconds:
        raise ValueError(f"pairs has clip_seconds={chosen}, the collator {clip_seconds:g}: pass one of them")
    try:
        asks = "clip_seconds" in inspect.signature(pairs).parameters
    except (TypeError, ValueError):  # a callable without a signature
        asks = False
    return functools.partial(pairs, clip_seconds=clip_seconds) if asks else pairs


def row_name(row: Row) -> str:
    """The name of a row in messages."""
    names = [f"{name} {shown(row[name])}" for name in ("qid", "vid") if row.get(name) is not None]
    return f"{names[0]}: " if names else ""


def windows_of(row: Row) -> NDArray[np.float64]:
    """The windows (n, 2) of a row, in seconds.

    Raises:
        ValueError: windows that are reversed, negative or not finite.
    """
    where = f"{row_name(row)}'relevant_windows'"
    windows = table(row["relevant_windows"], where, columns=2)
    check_windows(windows, where)
    return windows
