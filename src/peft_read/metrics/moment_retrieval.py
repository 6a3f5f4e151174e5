"""The official metrics of QVHighlights: moment retrieval (MR) and highlight detection (HL)."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..spans import check_windows, clips_of
from ..values import id_of, number, shown, table
from .qvhighlights_ratings import LEVELS, highlight_detection
from .qvhighlights_records import CHUNK, Record, Records, concatenated, field, joined

__all__ = ["evaluate_qvhighlights"]

THRESHOLDS = [round(0.5 + 0.05 * i, 2) for i in range(10)]
# A window belongs to a range if its length in seconds is above the first and not above the second number.
RANGES = {"full": None, "long": (30, 150), "middle": (10, 30), "short": (0, 10)}
MAX_WINDOWS = 10


def evaluate_qvhighlights(
    predictions: Sequence[Record],
    ground_truth: Sequence[Record],
    *,
    match_number: bool = True,
    clip_seconds: float = 2.0,
    per_query: bool = False,
) -> dict[str, Any]:
    """Evaluate a submission as the official evaluator of QVHighlights does, to the last digit.

    Lists, arrays and tensors are taken alike. Input is checked as in the readers of `peft_read.data`: a number
    that is not finite would be ranked like any other.

    Args:
        predictions: records with `qid` and `pred_relevant_windows` (rows start, end, score; best first),
            `pred_saliency_scores` (one number per clip), or both, the same in every record.
        ground_truth: the records of the official annotation files, `relevant_windows`, `duration`,
            `relevant_clip_ids`, `saliency_scores`.
        match_number: whether both must hold the same queries; False evaluates those that both hold.
        clip_seconds: length of a clip. A video has int(duration / clip_seconds) clips, and one more if an
            annotation names the remainder.
        per_query: add the figures of every query, for tests and intervals over queries.

    Returns:
        The official result: `"brief"`; for each range of window lengths `"MR-mAP"` and `"MR-R1"` by IoU threshold;
        for each highlight level `"HL-mAP"` and `"HL-Hit1"`. Percentages, rounded to two decimals. A range without
        windows gives NaN (the official program stops there).
        With `per_query` also `"per_query"`: `"qid"`, and for each figure of `"brief"` that is a mean over queries a
        list of percentages in that order (a query without predicted windows, which the official mean average precision
        leaves out, has 0).

    Raises:
        ValueError: the queries differ or appear twice, there is none, or (by qid) a field is missing, has another
            shape, or holds NaN, infinity, or invalid windows, clips or ratings.

    Example:
        >>> truth = [{"qid": 1, "duration": 4, "relevant_windows": [[0, 2]], "relevant_clip_ids": [0],
        ...     "saliency_scores": [[4, 4, 4]]}]
        >>> result = evaluate_qvhighlights([{"qid": 1, "pred_saliency_scores": [0.9, 0.1]}], truth)
        >>> result["brief"].get("HL-min-VeryGood-Hit1")
        100.0
    """
    clip_seconds = number(clip_seconds, "clip_seconds", above=0)
    predicted, true = _by_query(predictions, ground_truth, match_number=match_number)
    has_windows, has_scores = (
        _all_have(predicted, name) for name in ("pred_relevant_windows", "pred_saliency_scores")
    )
    if not (has_windows or has_scores):
        raise ValueError("the predictions hold neither 'pred_relevant_windows' nor 'pred_saliency_scores'")
    brief: dict[str, float] = {}
    results: dict[str, Any] = {}
    each: dict[str, NDArray] = {}
    if has_windows:
        moments = _Moments(predicted, true, clip_seconds)
        for name, limits in RANGES.items():
            results[name] = moments.result(limits)
        each = moments.each() if per_query else {}
        brief = {f"MR-{name}-mAP": results[name]["MR-mAP"]["average"] for name in RANGES}
        brief |= {f"MR-full-mAP@{iou}": results["full"]["MR-mAP"][iou] for iou in ("0.5", "0.75")}
        brief |= {f"MR-full-R1@{iou}": results["full"]["MR-R1"][iou] for iou in ("0.5", "0.7")}
        brief = dict(sorted(brief.items()))
    if has_scores:
        precisions, hits = highlight_detection(predicted, true, clip_seconds)
        for i, name in enumerate(f"HL-min-{level}" for level in LEVELS):
            results[name] = {
                "HL-mAP": _percent(np.mean(precisions[:, i].copy())),
                "HL-Hit1": _percent(np.mean(hits[:, i])),
            }
            brief |= {f"{name}-mAP": results[name]["HL-mAP"], f"{name}-Hit1": results[name]["HL-Hit1"]}
            each |= {f"{name}-mAP": precisions[:, i].mean(axis=1), f"{name}-Hit1": hits[:, i]}
    found = {"brief": brief, **dict(sorted(results.items()))}
    if per_query:
        columns = {name: [_percent(value) for value in values] for name, values in each.items()}
        found["per_query"] = {"qid": list(predicted), **columns}
    return found


def _by_query(
    predictions: Sequence[Record], ground_truth: Sequence[Record], *, match_number: bool
) -> tuple[Records, Records]:
    predicted, true = _keyed(predictions, "predictions"), _keyed(ground_truth, "ground truth")
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


def _keyed(records: Sequence[Record], name: str) -> dict[Hashable, Record]:
    if isinstance(records, Mapping | str):
        raise ValueError(f"{name} must be a list of records, not {shown(records)}")
    keyed: dict[Hashable, Record] = {}
    for index, record in enumerate(records):
        if not isinstance(record, Mapping):
            raise ValueError(f"{name}, record {index}: a dict is expected, not {shown(record)}")
        qid = record.get("qid")
        if type(qid) is not int:
            text = id_of(qid, f"{name}, record {index}: 'qid'")
            qid = text if isinstance(qid, str) else int(text)
        if qid in keyed:
            raise ValueError(f"{name}: qid {qid!r} appears twice")
        keyed[qid] = record
    return keyed


def _all_have(records: Records, field: str) -> bool:
    """Whether the records hold the field; all or none must."""
    lacking = [qid for qid, record in records.items() if record.get(field) is None]
    if 0 < len(lacking) < len(records):
        raise ValueError(
            f"{len(lacking)} of {len(records)} predictions have no {field!r}, the first is qid {lacking[0]!r}"
        )
    return not lacking


def _percent(value: float | np.floating) -> float:
    return float(f"{100 * value:.2f}")


class _Moments:
    """Predicted and true windows of all queries as padded arrays: each query's overlaps are computed once."""

    def __init__(self, predicted: Records, true: Records, clip_seconds: float) -> None:
        candidates = {qid: record["pred_relevant_windows"] for qid, record in predicted.items()}
        windows = {qid: field(qid, record, "relevant_windows") for qid, record in true.items()}
        self.candidates, self.num_candidates = _padded(*_checked_windows(candidates, 3))
        self.windows, self.num_windows = _padded(*_checked_windows(windows, 2))
        if (empty := np.flatnonzero(self.num_windows == 0)).size:
            raise ValueError(f"query {list(true)[empty[0]]!r} has no relevant_windows in the ground truth")
        for own, (qid, record) in zip(self.windows, true.items(), strict=True):
            if record.get("duration") is not None:
                seconds = number(record["duration"], f"query {qid!r}: 'duration'", above=0)
                last = float(own[:, 1].max())  # padding is 0
                if last > seconds and last > clips_of(seconds, clip_seconds, partial=True) * clip_seconds:
                    raise ValueError(
                        f"query {qid!r}: 'relevant_windows' ends at {last:g} s, the video at {seconds:g} s"
                    )

    def result(self, limits: tuple[float, float] | None) -> dict[str, dict[str, float]]:
        """Mean average precision and recall of the first window, by IoU threshold, for windows of one range."""
        valid = np.arange(self.windows.shape[1]) < self.num_windows[:, None]  # (N, M)
        if limits is not None:
            length = self.windows[..., 1] - self.windows[..., 0]
            valid &= (limits[0] < length) & (length <= limits[1])
        queries = np.flatnonzero(valid.any(axis=1))
        if not queries.size:
            unknown = {str(threshold): float("nan") for threshold in THRESHOLDS}
            return {"MR-mAP": {**unknown, "average": float("nan")}, "MR-R1": unknown}
        hits, precisions = self._measured(queries, valid)
        answered = queries[self.num_candidates[queries] > 0]
        by_threshold = np.mean(precisions[answered], axis=0) if len(answered) else np.zeros(len(THRESHOLDS))
        mean_precision = {str(t): _percent(p) for t, p in zip(THRESHOLDS, by_threshold, strict=True)}
        mean_precision["average"] = _percent(np.mean(by_threshold))
        return {"MR-mAP": mean_precision, "MR-R1": {str(t): _percent(np.mean(hits[queries] >= t)) for t in THRESHOLDS}}

    def each(self) -> dict[str, NDArray]:
        """The figures of every query, over windows of all lengths."""
        valid = np.arange(self.windows.shape[1]) < self.num_windows[:, None]
        hits, precisions = self._measured(np.arange(len(self.windows)), valid)
        of_threshold = dict(zip(THRESHOLDS, precisions.T, strict=True))
        return {
            "MR-full-mAP": precisions.mean(axis=1),
            **{f"MR-full-mAP@{t}": of_threshold[t] for t in (0.5, 0.75)},
            **{f"MR-full-R1@{t}": hits >= t for t in (0.5, 0.7)},
        }

    def _measured(self, queries: NDArray, valid: NDArray) -> tuple[NDArray, NDArray]:
        """Overlaps of the first windows (N,) and average precisions (N, thresholds) of some queries, else 0.

        Args:
            queries: indices of those that are measured.
            valid: (N, M), False where a true window does not count.
        """
        hits, precisions = np.zeros(len(self.windows)), np.zeros((len(self.windows), len(THRESHOLDS)))
        # Queries are grouped by their number of windows, because padding costs time.
        order = queries[np.argsort(self.num_windows[queries], kind="stable")]
        for start in range(0, len(order), CHUNK):
            part = order[start : start + CHUNK]
            most = self.num_windows[part].max()
            windows, keep = self.windows[part, :most], valid[part, :most]
            candidates, number = self.candidates[part], self.num_candidates[part]
            hits[part] = _first_overlaps(candidates[:, 0], windows, keep) * (number > 0)
            precisions[part] = _padded_precisions(candidates[:, :MAX_WINDOWS], number, windows, keep)
        return hits, precisions


def _checked_windows(windows: Mapping[Hashable, Any], columns: int) -> tuple[NDArray[np.float64], NDArray]:
    """The windows of all queries, concatenated: (start, end, score) of a submission, (start, end) of the truth."""
    name = "pred_relevant_windows" if columns == 3 else "relevant_windows"
    together = joined(windows, columns)
    if together is not None:
        rows, _ = together
        wrong = (rows[:, 0] < 0) | (rows[:, 1] < rows[:, 0]) | ((columns == 2) & (rows[:, 1] == rows[:, 0]))
        if not wrong.any():
            return together
    tables = []
    for qid, value in windows.items():  # what is wrong is named
        where = f"query {qid!r}: {name!r}"
        tables.append(table(value, where, columns=columns))
        check_windows(tables[-1][:, :2], where, allow_empty=columns == 3)
    return concatenated(tables)


def _padded(rows: NDArray, counts: NDArray) -> tuple[NDArray[np.float64], NDArray]:
    """(N, most, columns) with zeros after each query's rows, at least one row."""
    padded = np.zeros((len(counts), max(1, int(counts.max(initial=0))), rows.shape[1]))
    query = np.repeat(np.arange(len(counts)), counts)
    place = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    padded[query, place] = rows
    return padded, counts


def _overlap(a: NDArray, b: NDArray) -> tuple[NDArray, NDArray, NDArray]:
    """Lengths of the intersection, the union and the hull of (..., 2), in the official order of operations."""
    intersection = np.maximum(0.0, np.minimum(a[..., 1], b[..., 1]) - np.maximum(a[..., 0], b[..., 0]))
    union = (a[..., 1] - a[..., 0]) + (b[..., 1] - b[..., 0]) - intersection
    return intersection, union, np.maximum(a[..., 1], b[..., 1]) - np.minimum(a[..., 0], b[..., 0])


def _ratio(part: NDArray, whole: NDArray) -> NDArray:
    return np.divide(part, whole, out=np.zeros_like(part), where=whole != 0)


def _first_overlaps(first: NDArray, windows: NDArray, valid: NDArray) -> NDArray:
    """Intersection over hull of the first predicted windows (N, 3) and the true window of the largest IoU."""
    intersection, union, hull = _overlap(first[:, None], windows)
    best = np.where(valid, _ratio(intersection, union), -1.0).argmax(axis=1)[:, None]
    return _ratio(*(np.take_along_axis(part, best, axis=1)[:, 0] for part in (intersection, hull)))


def _average_precisions(candidates: Sequence[Sequence[float]], windows: Sequence[Sequence[float]]) -> list[float]:
    """Average precision of one query at every threshold, of all candidates that are given."""
    predicted = np.asarray(candidates, dtype=np.float64).reshape(1, -1, 3)
    true = np.asarray(windows, dtype=np.float64).reshape(1, -1, 2)
    valid = np.ones(true.shape[:2], dtype=bool)
    return _padded_precisions(predicted, np.array([predicted.shape[1]]), true, valid)[0].tolist()


def _padded_precisions(candidates: NDArray, number: NDArray, windows: NDArray, valid: NDArray) -> NDArray:
    """Average precision of every query at every threshold.

    In the order of their scores, predictions take the unmatched true window of the largest IoU (among equal ones the
    later, as a reversed ascending sort has it), if that IoU reaches the threshold; the others are false.

    Args:
        candidates: (N, K, 3), padded after the first `number`.
        number: (N,).
        windows: (N, M, 2).
        valid: (N, M), False where a window does not count.

    Returns:
        (N, thresholds).
    """
    given = np.arange(candidates.shape[1]) < number[:, None]
    ranking = np.argsort(np.where(given, -candidates[..., 2], np.inf), axis=1, kind="stable")
    ranked = np.take_along_axis(candidates, ranking[..., None], axis=1)
    given = np.take_along_axis(given, ranking, axis=1)
    intersection, union, _ = _overlap(ranked[:, :, None], windows[:, None])
    iou = np.where(valid[:, None] & given[..., None], _ratio(intersection, union), -1.0)[:, :, ::-1]  # (N, K, M)
    limits = np.array(THRESHOLDS)[:, None]
    free = np.ones((len(windows), len(THRESHOLDS), windows.shape[1]), dtype=bool)
    hits = np.zeros((len(windows), candidates.shape[1], len(THRESHOLDS)), dtype=bool)
    for k in range(candidates.shape[1]):
        open_ious = np.where(free & (iou[:, k, None] >= limits), iou[:, k, None], -1.0)
        best = open_ious.argmax(axis=2)[..., None]
        hits[:, k] = np.take_along_axis(open_ious, best, axis=2)[..., 0] >= 0
        np.put_along_axis(free, best, np.take_along_axis(free, best, axis=2) & ~hits[:, k, :, None], axis=2)
    return _interpolated_precisions(hits, valid.sum(axis=1))


def _interpolated_precisions(hits: NDArray, total: NDArray) -> NDArray:
    """Areas (N, thresholds) under the precision envelopes (PASCAL VOC 2011) of hits (N, K, thresholds)."""
    true_positives = np.cumsum(hits, axis=1, dtype=np.float64)
    precision = true_positives / np.arange(1, hits.shape[1] + 1)[:, None]
    envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    recall = true_positives / total[:, None, None]
    area, before = np.zeros((len(hits), hits.shape[2])), np.zeros((len(hits), hits.shape[2]))
    for k in range(hits.shape[1]):
        area += (recall[:, k] - before) * envelope[:, k]
        before = recall[:, k]
    return area
