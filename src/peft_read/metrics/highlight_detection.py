"""The highlight metrics of TVSum and YouTube Highlights as UMT (Liu et al., CVPR 2022) computes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..values import count, shown, table

__all__ = ["tvsum_map", "youtube_highlights_map"]


def tvsum_map(scores: Sequence[Any], annotations: Sequence[Any], top_k: int = 5) -> float:
    """Top-k mean average precision of one TVSum domain.

    For each annotator a clip is positive if its importance is above the (lower) median of the video. The average
    precision of a video's k best clips is normalised by the positives AMONG THEM; a video without any counts 0. The
    mean is taken over videos, then over annotators.

    Args:
        scores: predicted scores, one (clips,) per video; may be shorter than the annotation, as feature streams are.
        annotations: importance, 1 to 5, one (clips, annotators) per video.
        top_k: the number of best clips to evaluate.

    Returns:
        A fraction, rounded to 5 decimals as in the original.

    Raises:
        ValueError: the lists do not fit each other, or (by the number of the video) scores or annotations are not
            finite numbers: NaN would be ranked like any other score.

    Example:
        >>> tvsum_map([[0.9, 0.1, 0.5]], [[[5], [1], [1]]], top_k=1)
        1.0
    """
    _check(scores, annotations, "annotations")
    top_k = count(top_k, "top_k")
    per_video = []
    for index, (predicted, given) in enumerate(zip(scores, annotations, strict=True)):
        importance = _importance(given, index)
        median = np.sort(importance, axis=0)[(len(importance) - 1) // 2]
        labels = importance > median
        ranking = _ranking(predicted, len(labels), index)[:top_k]
        per_video.append([_trapezoid_precision(column) for column in labels[ranking].T])
    if len({len(row) for row in per_video}) > 1:
        raise ValueError(f"every video needs the same number of annotators, not {[len(row) for row in per_video]}")
    return round(float(np.mean(np.mean(per_video, axis=0))), 5)


def youtube_highlights_map(scores: Sequence[Any], matches: Sequence[Any]) -> float:
    """Mean average precision of one domain of YouTube Highlights.

    A clip is positive if its match is above 0; a video without any counts 0.

    Args:
        scores: predicted scores, one (clips,) per video.
        matches: the annotation, one (clips,) per video: 1 = highlight, 0 = between, -1 = not.

    Returns:
        A fraction, rounded to 5 decimals as in the original.

    Raises:
        ValueError: the lists do not fit each other, or (by the number of the video) scores are not finite numbers or
            matches are not -1, 0 or 1.
    """
    _check(scores, matches, "matches")
    precisions = []
    for index, (predicted, match) in enumerate(zip(scores, matches, strict=True)):
        labels = table(match, f"video {index}: the list of matches", low=-1, high=1, whole=True, empty=False) > 0
        precisions.append(_trapezoid_precision(labels[_ranking(predicted, len(labels), index)]))
    return round(sum(precisions) / len(precisions), 5)


def _check(scores: Sequence[Any], labels: Sequence[Any], name: str) -> None:
    for given in (scores, labels):
        if isinstance(given, str | bytes) or not hasattr(given, "__len__") or not hasattr(given, "__getitem__"):
            raise ValueError(f"scores and {name} must be lists with one entry per video, not {shown(given)}")
    if len(scores) != len(labels) or not len(scores):
        raise ValueError(
            f"{len(scores)} videos have scores and {len(labels)} have {name}; pass one per video, and at least one"
        )


def _importance(given: Any, index: int) -> NDArray[np.float64]:
    try:
        importance = table(given, f"video {index}: the table of annotations", columns=0, low=1, high=5)
    except ValueError as error:
        flat = getattr(given, "shape", None) or (len(given),) if hasattr(given, "__len__") else ()
        if len(flat) == 1 and not (len(given) and hasattr(given[0], "__len__")):
            raise ValueError(f"annotations of a video must be (clips, annotators), not {tuple(flat)}") from error
        raise
    if not importance.size:
        raise ValueError(f"video {index}: it has no annotations")
    return importance


def _ranking(scores: Any, clips: int, index: int) -> NDArray:
    checked = table(scores, f"video {index}: the list of scores")
    if not 0 < len(checked) <= clips:
        raise ValueError(
            f"the scores of a video of {clips} annotated clips have the shape {checked.shape}, video {index}"
        )
    return np.argsort(-checked, kind="stable")


def _trapezoid_precision(ranked_labels: NDArray) -> float:
    """Area under precision over recall by trapezoids, from recall 0 and precision 1, of labels in ranked order."""
    total = int(ranked_labels.sum())
    if not total:
        return 0.0
    area, recall, precision = 0.0, 0.0, 1.0
    for rank, hits in enumerate(np.cumsum(ranked_labels).tolist(), start=1):
        new_recall, new_precision = hits / total, hits / rank
        area += (new_recall - recall) * (precision + new_precision) / 2
        recall, precision = new_recall, new_precision
    return area
