"""TVSum: importance annotations as a `datasets.Dataset`, and frame features pooled to 2-second clips."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..values import count, listed, number, table
from .clip_features import PooledFeatures
from .features import Features, row_count
from .jsonl import Record, dataset_of, find_annotations, iterate_jsonl, iterate_members

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["TVSUM_DOMAINS", "leave_one_video_out", "load_tvsum", "pool_frames"]

TVSUM_DOMAINS = ("BK", "BT", "DS", "FM", "GA", "MS", "PK", "PR", "VT", "VU")
CLIP_SECONDS = 2
ANNOTATORS = 20  # of the published labels
MAX_DIFFERENCE = 2  # allowed difference between a video's rows and what its frames give
# The names of the same fields in the published files.
NAMES = {
    "vid": ("vid",),
    "query": ("query", "title"),
    "domain": ("domain", "category"),
    "label": ("label", "anno", "label_2s"),
    "num_frames": ("n_frames", "frames"),
}


def load_tvsum(annotations: str | Path, *, domain: str | None = None) -> Dataset:
    """Reads `tvsum_anno.json` (UMT), or the jsonl of QD-DETR (`tvsum_train.jsonl`, `tvsum_val.jsonl`).

    Source: Song et al., "TVSum", CVPR 2015; the 2-second labels are those of UMT and QD-DETR.

    Args:
        annotations: `.json`: `{video: {"anno": [clips][20], ...}}`; `.jsonl`: records with `vid`, `query` or `title`,
            `domain` or `category`, `label` or `label_2s`. Also `.xz`, `.gz`.
        domain: keep one of the ten domains.

    Returns:
        A dataset with the columns `vid`, `query`, `domain`, `duration` (seconds), `label` (clips, annotators) of 1 to
        5, `clip_scores` = (sum - annotators) / (4 annotators) in [0, 1] for every 2-second clip, and `num_frames`
        (None where the file does not have it).

    Raises:
        FileNotFoundError: no such file.
        ValueError: by file, line or id, and field: an invalid record, a duplicate video, labels that are ragged,
            transposed, or not numbers from 1 to 5, videos with different numbers of annotators; a domain without
            videos.
    """
    from datasets import Features, Value
    from datasets import List as ListOf

    path = find_annotations(annotations)
    rows = list(_rows(path))
    if domain is not None:
        known = sorted({row["domain"] for row in rows if row["domain"]})
        rows = [row for row in rows if row["domain"] == domain]
        if not rows:
            raise ValueError(f"{path} has no video of the domain {domain!r}; its domains are {known or 'not given'}")
    features = Features(
        {
            "vid": Value("string"),
            "query": Value("string"),
            "domain": Value("string"),
            "label": ListOf(ListOf(Value("float64"))),
            "num_frames": Value("int64"),
            "duration": Value("float64"),
            "clip_scores": ListOf(Value("float64")),
        }
    )
    return dataset_of(rows, features)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    records: Iterator[Record]
    if ".jsonl" in path.name:
        records = iterate_jsonl(path, required=("vid",))
    else:
        records = (Record({"vid": vid, **fields}, fields.place) for vid, fields in iterate_members(path))
    seen: dict[str, str] = {}
    annotators: tuple[int, str] | None = None
    for record in records:
        row = _row(record)
        if row["vid"] in seen:
            raise ValueError(f"{record.place}: the video {row['vid']!r} was already given ({seen[row['vid']]})")
        seen[row["vid"]] = record.place
        width = len(row["label"][0])
        if annotators is not None and width != annotators[0]:
            raise ValueError(
                f"{record.place}: {row['vid']!r} has labels of {width} annotators, {annotators[1]!r} of "
                f"{annotators[0]}; rows are clips and columns annotators"
            )
        annotators = (width, row["vid"])
        yield row


def _row(record: Record) -> dict[str, Any]:
    columns = {
        ours: next((name for name in names if record.get(name) is not None), None) for ours, names in NAMES.items()
    }
    vid = record.text("vid")
    label = np.zeros((0, 0))
    if columns["label"] is not None:
        wanted = "no labels of the shape (clips, annotators), from 1 to 5"
        where = f"{record.place}: {vid!r} has {wanted}; {columns['label']!r}"
        label = table(record[columns["label"]], where, columns=0, low=1, high=5)
    if not label.size:
        raise ValueError(f"{record.place}: {vid!r} has no labels of the shape (clips, annotators)")
    clips, annotators = label.shape
    if clips == ANNOTATORS != annotators:
        raise ValueError(
            f"{record.where(str(columns['label']))} has {clips} rows and {annotators} columns: is it transposed? Rows "
            f"are clips, columns the {ANNOTATORS} annotators"
        )
    frames = (
        None
        if columns["num_frames"] is None
        else number(record[columns["num_frames"]], record.where(columns["num_frames"]), low=1)
    )
    return {
        "vid": vid,
        "query": "" if columns["query"] is None else record.text(columns["query"]),
        "domain": None if columns["domain"] is None else record.text(columns["domain"]),
        "num_frames": None if frames is None else int(frames),
        "duration": float(CLIP_SECONDS * clips),
        "label": label.tolist(),
        "clip_scores": ((label.sum(axis=1) - annotators) / (4 * annotators)).tolist(),
    }


def leave_one_video_out(data: Dataset) -> list[tuple[Dataset, Dataset]]:
    """One fold per video of one domain: all others to train on, this one to test on.

    Raises:
        ValueError: fewer than two videos.
    """
    if len(data) < 2:
        raise ValueError(f"{len(data)} video(s) cannot be divided into training and test")
    others = [[j for j in range(len(data)) if j != i] for i in range(len(data))]
    return [(data.select(rest), data.select([i])) for i, rest in enumerate(others)]


def pool_frames(features: Features, data: Dataset, *, interval: int = 15) -> PooledFeatures:
    """Features of every `interval`-th frame, averaged over 2-second clips.

    Row j shows frame `interval` · j, which lies in clip floor(interval · j · clips / frames).

    Args:
        features: by video id, one row every `interval` frames.
        data: from `load_tvsum`, from a file with the number of frames.
        interval: frames from one row to the next.

    Raises:
        ValueError: the number of frames is not known, or the features do not have one row every `interval` frames.
    """
    interval = count(interval, "interval")
    clip_of_row, other_rate = {}, []
    for row in data:
        if not row["num_frames"]:
            raise ValueError(f"the number of frames of {row['vid']!r} is not known: its rows cannot be put into clips")
        clips, frames = len(row["label"]), row["num_frames"]
        rows = row_count(features, row["vid"]) or 0
        if rows and abs(rows - math.ceil(frames / interval)) > MAX_DIFFERENCE:
            other_rate.append(f"{row['vid']} ({rows} rows for {frames} frames)")
        clip_of_row[row["vid"]] = np.minimum(interval * np.arange(rows) * clips // frames, clips - 1)
    if other_rate:
        raise ValueError(
            f"{len(other_rate)} videos do not have one row every {interval} frames: {listed(other_rate)}; pass the "
            "interval of these features"
        )
    return PooledFeatures(features, clip_of_row)
