"""TVSum: importance annotations as a `datasets.Dataset`, and features of frames brought to 2-second clips."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .clip_features import PooledFeatures
from .features import Features
from .jsonl import find_annotations, read_json, read_jsonl

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["TVSUM_DOMAINS", "leave_one_video_out", "load_tvsum", "pool_frames"]

TVSUM_DOMAINS = ("BK", "BT", "DS", "FM", "GA", "MS", "PK", "PR", "VT", "VU")
CLIP_SECONDS = 2
# The same fields under the names of the files that circulate.
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
        annotations: `.json`: {video: {"anno": [clips][20], ...}}; `.jsonl`: records with `vid`, `query` or `title`,
            `domain` or `category`, `label` or `label_2s`. Also `.xz`, `.gz`.
        domain: keep one of the ten domains.

    Returns:
        A dataset with the columns `vid`, `query`, `domain`, `duration` (seconds), `label` (clips, annotators) of 1 to
        5, `clip_scores` = (sum - annotators) / (4 annotators) in [0, 1] for every 2-second clip, and `num_frames`
        (None where the file does not tell).

    Raises:
        FileNotFoundError: no such file.
        ValueError: a record without labels or with ragged ones, a domain without videos.
    """
    from datasets import Dataset

    path = find_annotations(annotations)
    if ".jsonl" in path.name:
        records = read_jsonl(path, required=("vid",))
    else:
        records = [{"vid": vid, **fields} for vid, fields in read_json(path).items()]
    rows = [_row(record, path) for record in records]
    if domain is not None:
        known = sorted({row["domain"] for row in rows if row["domain"]})
        rows = [row for row in rows if row["domain"] == domain]
        if not rows:
            raise ValueError(f"{path} has no video of the domain {domain!r}; its domains are {known or 'not told'}")
    return Dataset.from_list(rows)


def _row(record: Mapping[str, Any], path: Path) -> dict[str, Any]:
    row = {ours: next((record[name] for name in names if name in record), None) for ours, names in NAMES.items()}
    try:
        label = np.asarray(row["label"], dtype=np.float64)
    except (TypeError, ValueError):
        label = np.zeros(0)
    if label.ndim != 2 or not label.size:
        raise ValueError(f"{path}: {row['vid']!r} has no labels of the shape (clips, annotators)")
    annotators = label.shape[1]
    return {
        **row,
        "query": row["query"] or "",
        "num_frames": None if row["num_frames"] is None else int(row["num_frames"]),
        "duration": float(CLIP_SECONDS * len(label)),
        "label": label.tolist(),
        "clip_scores": ((label.sum(axis=1) - annotators) / (4 * annotators)).tolist(),
    }


def leave_one_video_out(data: Dataset) -> list[tuple[Dataset, Dataset]]:
    """One fold a video of one domain: all others to train on, this one to test on.

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
        data: from `load_tvsum`, of a file that tells the number of frames.
        interval: frames from one row to the next.

    Raises:
        ValueError: the number of frames is not known.
    """
    clip_of_row = {}
    for row in data:
        if not row["num_frames"]:
            raise ValueError(f"the number of frames of {row['vid']!r} is not known: its rows cannot be put into clips")
        clips, frames = len(row["label"]), row["num_frames"]
        count = len(features[row["vid"]]) if row["vid"] in features else 0
        clip_of_row[row["vid"]] = np.minimum(interval * np.arange(count) * clips // frames, clips - 1)
    return PooledFeatures(features, clip_of_row)
