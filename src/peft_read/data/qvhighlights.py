"""QVHighlights: the official annotations as a `datasets.Dataset`, and the paper's low-resource split."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..spans import check_windows, clips_of
from ..values import count, is_given, number, shown, table
from .jsonl import Record, dataset_of, find_annotations, iterate_jsonl

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["ground_truth_records", "load_qvhighlights", "low_resource_split"]

LABELS = ("relevant_windows", "relevant_clip_ids", "saliency_scores")
ANNOTATORS, BEST_RATING = 3, 4
LARGEST_ID = 2**63 - 1  # of the column's type


def load_qvhighlights(annotations: str | Path, *, require_labels: bool = True, clip_seconds: float = 2.0) -> Dataset:
    """Reads one annotation file, such as `highlight_train_release.jsonl` (also `.xz`, `.gz`).

    Source: Lei et al., "QVHighlights", NeurIPS 2021.

    Args:
        annotations: the file.
        require_labels: False where there are none, as in the official test file, or only moments; then the other
            columns hold None.
        clip_seconds: length of the clips that `relevant_clip_ids` counts; 2 in QVHighlights.

    Returns:
        A dataset with the columns of the file, `qid`, `query`, `vid`, `duration` (seconds), `relevant_windows`
        [[start, end], ...] in seconds, `relevant_clip_ids`, `saliency_scores` (three numbers 0 to 4 per
        relevant clip),
        and `clip_scores`, the sum of the three over 12 for every clip of the video, 0 outside the relevant ones.

    Raises:
        FileNotFoundError: no such file.
        ValueError: by file, line and field: an invalid line, a field that is missing or has another type, a query
            without labels, a duplicate qid, windows that are reversed, negative or after the end of the video, clips
            that are negative, duplicate or after the end of the video, ratings that are not integers from 0 to 4.
    """
    from datasets import Features, Value
    from datasets import List as ListOf

    path, seconds = find_annotations(annotations), number(clip_seconds, "clip_seconds", above=0)
    features = Features(
        {
            "qid": Value("int64"),
            "query": Value("string"),
            "vid": Value("string"),
            "duration": Value("float64"),
            "relevant_windows": ListOf(ListOf(Value("float64"))),
            "relevant_clip_ids": ListOf(Value("int64")),
            "saliency_scores": ListOf(ListOf(Value("int64"))),
            "clip_scores": ListOf(Value("float64")),
        }
    )
    return dataset_of(_rows(path, require_labels, seconds), features)


def _rows(path: Path, require_labels: bool, clip_seconds: float) -> Iterator[dict[str, Any]]:
    seen: set[int] = set()
    for record in iterate_jsonl(path, required=("qid", "query", "vid", "duration", *(LABELS * require_labels))):
        qid = count(record["qid"], record.where("qid"), low=-LARGEST_ID)
        if qid > LARGEST_ID:
            raise ValueError(f"{record.where('qid')} is too large: {qid}")
        if qid in seen:
            raise ValueError(f"{record.place}: qid {qid} appears twice")
        seen.add(qid)
        yield {
            "qid": qid,
            "query": record.text("query"),
            "vid": record.text("vid"),
            "duration": number(record["duration"], record.where("duration"), above=0),
            **_labels(record, require_labels, clip_seconds),
        }


def _labels(record: Record, required: bool, clip_seconds: float) -> dict[str, Any]:
    place = f"{record.place}: qid {record['qid']}"
    given = {name: record.get(name) if is_given(record.get(name)) else None for name in LABELS}
    windows, clips, scores = given.values()
    duration = float(record["duration"])
    if (clips is None) != (scores is None):
        counts = [0 if part is None else len(part) if hasattr(part, "__len__") else 1 for part in (clips, scores)]
        raise ValueError(f"{place}: {counts[0]} relevant clips, but {counts[1]} saliency scores")
    if required and (windows is None or clips is None):
        raise ValueError(f"{place} has no labels; require_labels=False takes it")
    if windows is not None:
        where = record.where("relevant_windows")
        moments = table(windows, where, columns=2)
        check_windows(moments, where, end=max(duration, clips_of(duration, clip_seconds, partial=True) * clip_seconds))
        given["relevant_windows"] = moments.tolist()
    if clips is None:
        return {**given, "clip_scores": None}
    ids = table(clips, record.where("relevant_clip_ids"), low=0, whole=True).astype(np.int64)
    ratings = table(
        scores, record.where("saliency_scores"), columns=ANNOTATORS, low=0, high=BEST_RATING, whole=True
    ).astype(np.int64)
    if len(ids) != len(ratings):
        raise ValueError(f"{place}: {len(ids)} relevant clips, but {len(ratings)} saliency scores")
    if len(np.unique(ids)) < len(ids):
        raise ValueError(f"{record.where('relevant_clip_ids')} names a clip twice: {shown(clips)}")
    if ids.max() * clip_seconds >= duration:
        raise ValueError(
            f"{record.where('relevant_clip_ids')} names clip {ids.max()}, which begins at "
            f"{ids.max() * clip_seconds:g} s; the video ends at {duration:g} s"
        )
    # The remainder after the last whole clip counts as a clip if an annotation names it.
    total = np.zeros(max(clips_of(duration, clip_seconds), int(ids.max()) + 1))
    total[ids] = ratings.sum(axis=1) / (ANNOTATORS * BEST_RATING)
    return {
        **given,
        "relevant_clip_ids": ids.tolist(),
        "saliency_scores": ratings.tolist(),
        "clip_scores": total.tolist(),
    }


def ground_truth_records(data: Dataset) -> list[dict[str, Any]]:
    """The dataset as the records that `evaluate_qvhighlights` takes; integral durations become integers."""
    names = ("qid", "query", "vid", "duration", *LABELS)
    records = []
    for row in data.select_columns(list(names)):
        seconds = row["duration"]
        records.append({**row, "duration": int(seconds) if seconds == int(seconds) else seconds})
    return records


def low_resource_split(
    data: Dataset, *, num_train: int = 700, num_validation: int | None = 150, seed: int = 0, pool: int | None = None
) -> tuple[Dataset, Dataset]:
    """Draws the queries of a low-resource experiment from one split.

    Whole source videos are drawn, not queries: QVHighlights cuts several 150-second videos out of one source, and a
    backbone that was pretrained on the training side must not have seen the queries that it is selected on.

    Args:
        data: from `load_qvhighlights`.
        num_train: queries to train on; the last source that is drawn may give only some of its queries.
        num_validation: queries of the other sources to select on; None = all of them.
        seed: of the draw.
        pool: queries of the training side, of which the first `num_train` are taken; None = `num_train`. Draws of
            several sizes from one pool are nested, and their validation parts are the same.

    Returns:
        Training and validation part; they share no source video, for any `num_train` of the pool.

    Raises:
        ValueError: fewer queries than asked for, a pool smaller than `num_train`, or a number that is not positive.
    """
    count(num_train, "num_train")
    side = num_train if pool is None else count(pool, "pool")
    if side < num_train:
        raise ValueError(f"pool={pool} is smaller than num_train={num_train}, which is drawn from it")
    if num_validation is not None:
        count(num_validation, "num_validation")
    sources: dict[str, list[int]] = {}
    for index, vid in enumerate(data["vid"]):
        sources.setdefault(source_of(vid), []).append(index)
    generator = np.random.default_rng(seed)
    names = list(sources)
    order = [names[index] for index in generator.permutation(len(names))]
    training: list[int] = []
    drawn = 0
    while drawn < len(order) and len(training) < side:
        training += generator.permutation(sources[order[drawn]]).tolist()
        drawn += 1
    others = [index for source in order[drawn:] for index in sources[source]]
    wanted = len(others) if num_validation is None else num_validation
    if not 0 < side <= len(training) or not 0 < wanted <= len(others):
        raise ValueError(
            f"num_train={side} and num_validation={num_validation} cannot be drawn from {len(data)} queries of "
            f"{len(sources)} sources: after the training part {len(others)} queries are left"
        )
    validation = generator.permutation(others)[:wanted]
    return data.select(sorted(training[:num_train])), data.select(sorted(validation.tolist()))


def source_of(vid: str) -> str:
    """The YouTube video that `<source>_<start>_<end>` was cut from; another id is a source of its own."""
    cut = re.fullmatch(r"(.+)_[0-9]+(\.[0-9]+)?_[0-9]+(\.[0-9]+)?", vid, re.DOTALL)
    return cut.group(1) if cut else vid
