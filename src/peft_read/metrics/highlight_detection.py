"""The highlight metrics of TVSum and YouTube Highlights as UMT (Liu et al., CVPR 2022) computes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["tvsum_map", "youtube_highlights_map"]


def tvsum_map(scores: Sequence[ArrayLike], annotations: Sequence[ArrayLike], top_k: int = 5) -> float:
    """Top-k mean average precision of one TVSum domain.

    For each annotator a clip is positive if its importance is above the (lower) median of the video. The average
    precision of a video's k best clips is normalised by the positives AMONG THEM; a video without any counts 0. The
    mean is taken over videos, then over annotators.

    Args:
        scores: predicted scores, one (clips,) a video; shorter than the annotation where a feature stream is.
        annotations: importance, one (clips, annotators) a video.
        top_k: clips that count.

    Returns:
        A fraction, rounded to 5 decimals as in the original.

    Raises:
        ValueError: the lists do not fit each other.

    Example:
        >>> tvsum_map([[0.9, 0.1, 0.5]], [[[5], [1], [1]]], top_k=1)
        1.0
    """
    _check(scores, annotations, "annotations")
    per_video = []
    for predicted, importance in zip(scores, annotations, strict=True):
        importance = np.asarray(importance, dtype=np.float64)
        if importance.ndim != 2:
            raise ValueError(f"annotations of a video must be (clips, annotators), not {importance.shape}")
        median = np.sort(importance, axis=0)[(len(importance) - 1) // 2]
        labels = importance > median
        ranking = _ranking(predicted, len(labels))[:top_k]
        per_video.append([_trapezoid_precision(column) for column in labels[ranking].T])
    if len({len(row) for row in per_video}) > 1:
        raise ValueError(f"every video needs as many annotators, not {[len(row) for row in per_video]}")
    return round(float(np.mean(np.mean(per_video, axis=0))), 5)


def youtube_highlights_map(scores: Sequence[ArrayLike], matches: Sequence[ArrayLike]) -> float:
    """Mean average precision of one domain of YouTube Highlights.

    A clip is positive if its match is above 0; a video without any counts 0.

    Args:
        scores: predicted scores, one (clips,) a video.
        matches: the annotation, one (clips,) a video: 1 = highlight, 0 = between, -1 = not.

    Returns:
        A fraction, rounded to 5 decimals as in the original.

    Raises:
        ValueError: the lists do not fit each other.
    """
    _check(scores, matches, "matches")
    precisions = []
    for predicted, match in zip(scores, matches, strict=True):
        labels = np.asarray(match) > 0
        precisions.append(_trapezoid_precision(labels[_ranking(predicted, len(labels))]))
    return round(sum(precisions) / len(precisions), 5)


def _check(scores: Sequence[Any], labels: Sequence[Any], name: str) -> None:
    if len(scores) != len(labels) or not len(scores):
        raise ValueError(f"{len(scores)} videos have scores and {len(labels)} have {name}; pass one a video, and some")


def _ranking(scores: ArrayLike, clips: int) -> NDArray:
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 1 or not 0 < len(scores) <= clips:
        raise ValueError(f"the scores of a video of {clips} annotated clips have the shape {scores.shape}")
    return np.argsort(-scores, kind="stable")


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
