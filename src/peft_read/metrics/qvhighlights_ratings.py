"""Highlight detection (HL) of QVHighlights: rankings of clips against the ratings of three annotators."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..spans import clips_of
from ..values import number, shown, table
from .qvhighlights_records import CHUNK, Records, concatenated, field, joined

__all__ = ["LEVELS", "highlight_detection", "ranking_precisions"]

LEVELS = {"Fair": 2, "Good": 3, "VeryGood": 4}
ANNOTATORS, BEST_RATING = 3, 4


def highlight_detection(predicted: Records, true: Records, clip_seconds: float) -> tuple[NDArray, NDArray]:
    """Average precision (N, levels, annotators) and whether the best clip is a hit (N, levels) of every query."""
    scores, lengths = _checked_scores({qid: record["pred_saliency_scores"] for qid, record in predicted.items()})
    ratings, clips = _checked_ratings(true, clip_seconds)
    starts, places = np.cumsum(lengths) - lengths, np.cumsum(clips) - clips
    levels = np.array(list(LEVELS.values()))
    precisions = np.zeros((len(clips), len(levels) * ANNOTATORS))
    hits = np.zeros((len(clips), len(levels)), dtype=bool)
    # Videos are grouped by their number of clips and scores, so that a chunk needs no padding.
    for shape in np.unique(np.stack((clips, lengths), axis=1), axis=0):
        same = np.flatnonzero((clips == shape[0]) & (lengths == shape[1]))
        for start in range(0, len(same), CHUNK):
            part = same[start : start + CHUNK]
            clip_scores = scores[starts[part, None] + np.arange(shape[1])]
            rated = ratings[places[part, None] + np.arange(shape[0])]  # (N, clips, 3)
            best = clip_scores.argmax(axis=1)
            padded = np.zeros((len(part), shape[0]))
            padded[:, : shape[1]] = clip_scores[:, : shape[0]]
            labels = (rated[:, :, None] >= levels[:, None]).reshape(len(part), shape[0], -1)
            precisions[part] = _chunk_precisions(padded, labels)
            highest = rated[np.arange(len(part)), np.minimum(best, shape[0] - 1)].max(axis=1)
            hits[part] = (best < shape[0])[:, None] & (highest[:, None] >= levels)
    return precisions.reshape(len(clips), len(levels), ANNOTATORS), hits


def _checked_scores(scores: Mapping[Hashable, Any]) -> tuple[NDArray[np.float64], NDArray]:
    rows = joined(scores, None)
    if rows is not None and (rows[1] > 0).all():
        return rows
    return concatenated(
        [table(value, f"query {qid!r}: 'pred_saliency_scores'", empty=False) for qid, value in scores.items()]
    )


def _checked_ratings(true: Records, clip_seconds: float) -> tuple[NDArray[np.float64], NDArray]:
    """The ratings of the clips of all videos, concatenated (all clips, 3), zero outside the relevant clips."""
    seconds = np.array(
        [number(field(qid, record, "duration"), f"query {qid!r}: 'duration'", above=0) for qid, record in true.items()]
    )
    ids = {qid: field(qid, record, "relevant_clip_ids") for qid, record in true.items()}
    given = {qid: field(qid, record, "saliency_scores") for qid, record in true.items()}
    chosen, rated = joined(ids, None), joined(given, ANNOTATORS)
    clips = np.array([clips_of(duration, clip_seconds) for duration in seconds.tolist()])
    if chosen is None or rated is None or not _fit(*chosen, *rated, seconds / clip_seconds):
        relevant, scores = [], []
        for index, (qid, value) in enumerate(ids.items()):  # what is wrong is named
            where = f"query {qid!r}: 'relevant_clip_ids'"
            own = table(value, where, low=0, whole=True)
            if len(set(own.tolist())) < len(own):
                raise ValueError(f"{where} names a clip twice: {shown(value)}")
            if len(own) and own.max() * clip_seconds >= seconds[index]:
                raise ValueError(
                    f"{where} names clip {int(own.max())}, which begins at {own.max() * clip_seconds:g} s; the video "
                    f"ends at {seconds[index]:g} s"
                )
            where = f"query {qid!r}: 'saliency_scores'"
            ratings = table(given[qid], where, columns=ANNOTATORS, low=0, high=BEST_RATING, whole=True)
            if len(ratings) != len(own):
                raise ValueError(f"{where} rates {len(ratings)} clips, and {len(own)} are relevant")
            relevant.append(own)
            scores.append(ratings)
        chosen, rated = concatenated(relevant), concatenated(scores)
    (rows, counts), (values, _) = chosen, rated
    query = np.repeat(np.arange(len(counts)), counts)
    np.maximum.at(clips, query, rows.astype(np.int64) + 1)
    clips = np.maximum(clips, 1)
    ratings = np.zeros((clips.sum(), ANNOTATORS))
    ratings[(np.cumsum(clips) - clips)[query] + rows.astype(np.int64)] = values
    return ratings, clips


def _fit(ids: NDArray, counts: NDArray, ratings: NDArray, rated: NDArray, clips: NDArray) -> bool:
    """Whether clips are integers inside their videos, without duplicates, each with ratings from 0 to 4."""
    query = np.repeat(np.arange(len(counts)), counts)
    if not np.array_equal(counts, rated) or (ids != np.floor(ids)).any() or (ids < 0).any():
        return False
    if (ids >= clips[query]).any() or len(np.unique(np.stack((query, ids), axis=1), axis=0)) < len(ids):
        return False
    return bool(((ratings >= 0) & (ratings <= BEST_RATING) & (ratings == np.floor(ratings))).all())


def ranking_precisions(scores: NDArray, labels: NDArray) -> NDArray:
    """As `_chunk_precisions`, of one ranking (clips,) with labels (clips, columns); (columns,)."""
    return _chunk_precisions(np.asarray(scores)[None], np.asarray(labels)[None])[0]


def _chunk_precisions(scores: NDArray, labels: NDArray) -> NDArray:
    """Interpolated average precision of rankings for several label columns.

    Clips of equal score share a threshold. From the lowest threshold up, a precision is the largest so far; the
    mean is taken over the thresholds at which the recall (as float32) changes.

    Args:
        scores: (N, clips).
        labels: (N, clips, columns), booleans.

    Returns:
        (N, columns): 0 for a column without positives, 1 for one without negatives.
    """
    clips = scores.shape[1]
    order = np.argsort(-scores, axis=1, kind="stable")
    ranked = np.take_along_axis(scores, order, axis=1)
    threshold = np.append(ranked[:, 1:] != ranked[:, :-1], np.ones((len(scores), 1), dtype=bool), axis=1)[..., None]
    positives = np.cumsum(np.take_along_axis(labels, order[..., None], axis=1), axis=1, dtype=np.float64)
    total = positives[:, -1]
    precision = np.where(threshold, positives / np.arange(1, clips + 1)[:, None], 0.0)
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    recall = (positives / np.maximum(total, 1)[:, None]).astype(np.float32)
    recall = np.maximum.accumulate(np.where(threshold, recall, 0), axis=1)
    before = np.concatenate((np.zeros_like(recall[:, :1]), recall[:, :-1]), axis=1)
    counted = threshold & (recall != before)
    means = np.where(counted, precision, 0.0)[:, ::-1].sum(axis=1) / np.maximum(counted.sum(axis=1), 1)
    return np.where(total == clips, 1.0, np.where(total > 0, means, 0.0))
