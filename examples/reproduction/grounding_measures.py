"""The official figures of the grounding datasets, of a split and of each of its queries or videos."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from peft_read.data import ground_truth_records
from peft_read.data.qvhighlights import source_of
from peft_read.metrics import evaluate_qvhighlights, tvsum_map, youtube_highlights_map

# What is kept of every query: the figures that are means over queries, and that tables show.
QUERY_FIGURES = (
    "MR-full-mAP",
    "MR-full-R1@0.5",
    "MR-full-R1@0.7",
    "HL-min-VeryGood-mAP",
    "HL-min-VeryGood-Hit1",
)


def figures(dataset: str, records: Sequence[dict], rows: Any, clip_seconds: float) -> dict[str, float]:
    """The dataset's official figures; none where it has no labels."""
    labels = _labels(dataset, rows)
    if labels is None:
        return {}
    found = _measure(dataset, clip_seconds)(_comparable(records, labels), labels)
    return {name: value for name, value in found.items() if not math.isnan(value)}  # NaN: no window of that length


def figures_of_each(dataset: str, records: Sequence[dict], rows: Any, clip_seconds: float) -> dict[str, Any]:
    """The figures of every query, or video, alone: `ids`, `sources`, and a list for each figure in percent.

    A source is what a video was cut from: its queries are not independent examples. The mean over all is the figure of
    the split: QVHighlights' are means over queries, TVSum's and YouTube Highlights' over videos. Empty where there
    are no labels.
    """
    labels = _labels(dataset, rows)
    if labels is None:
        return {}
    records, videos = _comparable(records, labels), list(rows["vid"])
    if dataset == "qvhighlights":
        found = evaluate_qvhighlights(records, labels, clip_seconds=clip_seconds, per_query=True)["per_query"]
        return {
            "ids": found["qid"],
            "sources": [source_of(vid) for vid in videos],
            "figures": {name: found[name] for name in QUERY_FIGURES if name in found},
        }
    measure = _measure(dataset, clip_seconds)
    each = [measure([record], [label]) for record, label in zip(records, labels, strict=True)]
    columns = {name: [round(found[name], 2) for found in each] for name in each[0]}
    return {"ids": videos, "sources": videos, "figures": columns}


def _labels(dataset: str, rows: Any) -> list[Any] | None:
    if dataset != "qvhighlights":
        return list(rows["label" if dataset == "tvsum" else "match"])
    return None if any(windows is None for windows in rows["relevant_windows"]) else ground_truth_records(rows)


def _comparable(records: Sequence[dict], labels: Sequence[Any]) -> Sequence[dict]:
    """Without highlights, where people have marked moments and rated no clip."""
    if isinstance(labels[0], dict) and any(label["relevant_clip_ids"] is None for label in labels):
        return [{name: value for name, value in r.items() if name != "pred_saliency_scores"} for r in records]
    return records


def _measure(dataset: str, clip_seconds: float) -> Callable[[Sequence[dict], Sequence[Any]], dict[str, float]]:
    if dataset == "qvhighlights":
        return lambda records, truth: evaluate_qvhighlights(records, truth, clip_seconds=clip_seconds)["brief"]

    def highlights(records: Sequence[dict], labels: Sequence[Any]) -> dict[str, float]:
        # The features of a video may be a clip or two longer than its labels; nobody has rated those clips.
        scores = [r["pred_saliency_scores"][: len(label)] for r, label in zip(records, labels, strict=True)]
        if dataset == "tvsum":
            return {"top5-mAP": 100 * tvsum_map(scores, labels)}
        return {"mAP": 100 * youtube_highlights_map(scores, labels)}

    return highlights
