"""The official metrics of QVHighlights: moment retrieval (MR) and highlight detection (HL)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["evaluate_qvhighlights"]

Record = Mapping[str, Any]
Window = Sequence[float]

THRESHOLDS = [round(0.5 + 0.05 * i, 2) for i in range(10)]
# A window belongs to a range if its length in seconds is above the first and not above the second number.
RANGES = {"full": None, "long": (30, 150), "middle": (10, 30), "short": (0, 10)}
LEVELS = {"Fair": 2, "Good": 3, "VeryGood": 4}
CLIP_SECONDS = 2
MAX_WINDOWS = 10


def evaluate_qvhighlights(
    predictions: Sequence[Record], ground_truth: Sequence[Record], *, match_number: bool = True
) -> dict[str, Any]:
    """Evaluate a submission as the official evaluator of QVHighlights does, to the last digit.

    Args:
        predictions: records with `qid` and `pred_relevant_windows` (rows start, end, score; best first),
            `pred_saliency_scores` (one number a clip), or both. What the first record lacks is not evaluated.
        ground_truth: the records of the official annotation files, `relevant_windows`, `duration`,
            `relevant_clip_ids`, `saliency_scores`.
        match_number: whether both must hold the same queries; False evaluates those that both hold.

    Returns:
        The official result: `"brief"`; for each range of window lengths `"MR-mAP"` and `"MR-R1"` by IoU threshold;
        for each highlight level `"HL-mAP"` and `"HL-Hit1"`. Percentages, rounded to two decimals. A range without
        windows gives NaN (the official program stops there).

    Raises:
        ValueError: the queries differ, there is none, or a query has no ground-truth window.

    Example:
        >>> truth = [{"qid": 1, "duration": 4, "relevant_windows": [[0, 2]], "relevant_clip_ids": [0],
        ...     "saliency_scores": [[4, 4, 4]]}]
        >>> result = evaluate_qvhighlights([{"qid": 1, "pred_saliency_scores": [0.9, 0.1]}], truth)
        >>> result["brief"]["HL-min-VeryGood-Hit1"]
        100.0
    """
    predicted, true = _by_query(predictions, ground_truth, match_number=match_number)
    brief: dict[str, float] = {}
    results: dict[str, Any] = {}
    first = next(iter(predicted.values()))
    if "pred_relevant_windows" in first:
        for name, limits in RANGES.items():
            results[name] = _moment_retrieval(predicted, true, limits)
        brief = {f"MR-{name}-mAP": results[name]["MR-mAP"]["average"] for name in RANGES}
        brief |= {f"MR-full-mAP@{iou}": results["full"]["MR-mAP"][iou] for iou in ("0.5", "0.75")}
        brief |= {f"MR-full-R1@{iou}": results["full"]["MR-R1"][iou] for iou in ("0.5", "0.7")}
        brief = dict(sorted(brief.items()))
    if "pred_saliency_scores" in first:
        highlights = _highlight_detection(predicted, true)
        results.update(highlights)
        for name, scores in highlights.items():
            brief |= {f"{name}-mAP": scores["HL-mAP"], f"{name}-Hit1": scores["HL-Hit1"]}
    return {"brief": brief, **dict(sorted(results.items()))}


def _by_query(
    predictions: Sequence[Record], ground_truth: Sequence[Record], *, match_number: bool
) -> tuple[dict[Any, Record], dict[Any, Record]]:
    predicted = {record["qid"]: record for record in predictions}
    true = {record["qid"]: record for record in ground_truth}
    if match_number and predicted.keys() != true.keys():
        missing, unknown = list(true.keys() - predicted.keys()), list(predicted.keys() - true.keys())
        raise ValueError(
            f"predictions and ground truth hold different queries: {len(missing)} not predicted {missing[:5]}, "
            f"{len(unknown)} unknown {unknown[:5]}; match_number=False evaluates the common ones"
        )
    predicted = {qid: record for qid, record in predicted.items() if qid in true}
    if not predicted:
        raise ValueError("no query to evaluate")
    return predicted, {qid: true[qid] for qid in predicted}


def _percent(value: float | np.floating) -> float:
    return float(f"{100 * value:.2f}")


# --- Moment retrieval ---------------------------------------------------------------------------------------------


def _moment_retrieval(
    predicted: Mapping[Any, Record], true: Mapping[Any, Record], limits: tuple[float, float] | None
) -> dict[str, dict[str, float]]:
    """Mean average precision and recall of the first window, by IoU threshold, for windows of one range of lengths."""
    precisions, overlaps = [], []
    for qid, record in predicted.items():
        windows = true[qid]["relevant_windows"]
        if limits is not None:
            windows = [window for window in windows if limits[0] < window[1] - window[0] <= limits[1]]
            if not windows:
                continue
        elif not windows:
            raise ValueError(f"query {qid!r} has no relevant_windows in the ground truth")
        candidates = record["pred_relevant_windows"]
        overlaps.append(_first_overlap(candidates, windows))
        if candidates:
            precisions.append(_average_precisions(candidates[:MAX_WINDOWS], windows))
    if not overlaps:
        unknown = {str(threshold): float("nan") for threshold in THRESHOLDS}
        return {"MR-mAP": {**unknown, "average": float("nan")}, "MR-R1": unknown}
    by_threshold = np.mean(precisions, axis=0) if precisions else np.zeros(len(THRESHOLDS))
    mean_precision = {str(t): _percent(p) for t, p in zip(THRESHOLDS, by_threshold, strict=True)}
    mean_precision["average"] = _percent(np.mean(by_threshold))
    hits = np.array(overlaps)
    return {"MR-mAP": mean_precision, "MR-R1": {str(t): _percent(np.mean(hits >= t)) for t in THRESHOLDS}}


def _overlap(a: Window, b: Window) -> tuple[float, float, float]:
    """Lengths of the intersection, the union and the hull, in the official order of operations."""
    intersection = max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
    return intersection, (a[1] - a[0]) + (b[1] - b[0]) - intersection, max(a[1], b[1]) - min(a[0], b[0])


def _iou(a: Window, b: Window) -> float:
    intersection, union, _ = _overlap(a, b)
    return intersection / union if union else 0.0


def _first_overlap(candidates: Sequence[Window], windows: Sequence[Window]) -> float:
    """Overlap of the first predicted window with the true window of the largest IoU: intersection over hull."""
    if not candidates:
        return 0.0
    best = max(windows, key=lambda window: _iou(candidates[0], window))
    intersection, _, hull = _overlap(candidates[0], best)
    return intersection / hull if hull else 0.0


def _average_precisions(candidates: Sequence[Window], windows: Sequence[Window]) -> list[float]:
    """Average precision of one query at every threshold.

    In the order of their scores, predictions take the still free true window of the largest IoU, if that IoU reaches
    the threshold; the others are false.
    """
    ranked = sorted(candidates, key=lambda window: -window[2])
    overlaps = [[_iou(candidate, window) for window in windows] for candidate in ranked]
    # among equal IoUs the later window comes first, as a reversed ascending sort has it
    orders = [sorted(range(len(windows)), key=row.__getitem__)[::-1] for row in overlaps]
    precisions = []
    for threshold in THRESHOLDS:
        taken: set[int] = set()
        hits = []
        for row, order in zip(overlaps, orders, strict=True):
            match = next((j for j in order if row[j] < threshold or j not in taken), None)
            hit = match is not None and row[match] >= threshold
            if hit and match is not None:
                taken.add(match)
            hits.append(hit)
        precisions.append(_interpolated_precision(hits, len(windows)))
    return precisions


def _interpolated_precision(hits: Sequence[bool], total: int) -> float:
    """Area under the precision envelope over recall (PASCAL VOC 2011)."""
    if not any(hits):
        return 0.0
    true_positives = np.cumsum(hits)
    precision = np.append(true_positives / np.arange(1, len(hits) + 1), 0.0)
    recall = np.concatenate(([0.0], true_positives / total, [1.0]))
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    steps = np.flatnonzero(recall[1:] != recall[:-1])
    return float(np.sum((recall[steps + 1] - recall[steps]) * envelope[steps]))


# --- Highlight detection ------------------------------------------------------------------------------------------


def _highlight_detection(predicted: Mapping[Any, Record], true: Mapping[Any, Record]) -> dict[str, dict[str, float]]:
    """Mean average precision and hit rate of the best clip, for every minimal rating of a positive clip."""
    precisions: dict[str, list[NDArray]] = {name: [] for name in LEVELS}
    hits: dict[str, list[bool]] = {name: [] for name in LEVELS}
    for qid, record in predicted.items():
        ratings = _ratings(true[qid])  # (clips, 3)
        scores = np.asarray(record["pred_saliency_scores"], dtype=np.float64)
        best = int(np.argmax(scores))
        padded = np.zeros(len(ratings))
        padded[: len(scores)] = scores[: len(ratings)]
        labels = np.concatenate([ratings >= level for level in LEVELS.values()], axis=1)
        by_column = _ranking_precisions(padded, labels).reshape(len(LEVELS), -1)
        for name, level, row in zip(LEVELS, LEVELS.values(), by_column, strict=True):
            precisions[name].append(row)
            hits[name].append(best < len(ratings) and bool((ratings[best] >= level).any()))
    return {
        f"HL-min-{name}": {"HL-mAP": _percent(np.mean(precisions[name])), "HL-Hit1": _percent(np.mean(hits[name]))}
        for name in LEVELS
    }


def _ratings(record: Record) -> NDArray:
    """The ratings of all clips of a video by the three annotators (clips, 3), zero outside the relevant clips."""
    ratings = np.zeros((int(record["duration"] / CLIP_SECONDS), 3))
    if len(record["relevant_clip_ids"]):
        ratings[np.asarray(record["relevant_clip_ids"])] = record["saliency_scores"]
    return ratings


def _ranking_precisions(scores: NDArray, labels: NDArray) -> NDArray:
    """Interpolated average precision of one ranking for several label columns.

    Clips of equal score enter together. From the lowest threshold up, a precision is the best so far; the mean is
    taken over the thresholds at which the recall (as float32) changes.

    Args:
        scores: (clips,).
        labels: (clips, columns), booleans.

    Returns:
        (columns,): 0 for a column without positives, 1 for one without negatives.
    """
    order = np.argsort(-scores, kind="stable")
    last_of_ties = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    positives = np.cumsum(labels[order], axis=0)[last_of_ties].astype(np.float64)  # (thresholds, columns)
    precision = np.maximum.accumulate((positives / (last_of_ties + 1)[:, None])[::-1], axis=0)
    total = positives[-1]
    results = (total == len(scores)).astype(np.float64)
    for column in np.flatnonzero((total > 0) & (total < len(scores))):
        recall = np.append(positives[::-1, column] / total[column], 0.0).astype(np.float32)
        results[column] = precision[np.flatnonzero(np.diff(recall)), column].mean()
    return results
