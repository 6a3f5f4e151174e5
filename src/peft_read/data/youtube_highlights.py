"""YouTube Highlights: the annotations of UMT, and their jsonl form, as a `datasets.Dataset`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .jsonl import find_annotations, read_json, read_jsonl

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["YOUTUBE_DOMAINS", "load_youtube_highlights"]

YOUTUBE_DOMAINS = ("dog", "gymnastics", "parkour", "skating", "skiing", "surfing")


def load_youtube_highlights(
    annotations: str | Path, *, domain: str | None = None, videos: Iterable[str] | None = None
) -> Dataset:
    """Reads `youtube_anno.json`, or `youtube_highlight_{train,val}_release.jsonl` (also `.xz`, `.gz`).

    Source: Sun et al., "Ranking Domain-specific Highlights by Analyzing Edited Videos", ECCV 2014; Liu et al., "UMT".

    Args:
        annotations: `.json`: {video: {"match": one number a clip, "domain", "clip": [[first frame, last frame]],
            "frames", "fps"}}, without a division into splits; `.jsonl`: one record a video, one file a split.
        domain: keep one of the six domains.
        videos: keep these videos, such as those of a split.

    Returns:
        A dataset with the columns `vid`, `query` (the domain), `domain`, `duration` (seconds), `match` (1 = highlight,
        0 = between, -1 = not), `clip_scores` (1 where match > 0, else 0), and `clip_seconds` [[start, end], ...]. Its
        clips overlap and are about 100 frames long; they are not the 2-second clips of the other datasets.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a video without `match`, an unknown video, a domain without videos.
    """
    from datasets import Dataset

    path = find_annotations(annotations)
    if ".jsonl" in path.name:
        records = {record["vid"]: record for record in read_jsonl(path, required=("vid", "match"))}
    else:
        records = read_json(path)
    if videos is not None:
        videos = list(videos)
        if unknown := [vid for vid in videos if vid not in records]:
            raise ValueError(f"{path} has no {len(unknown)} of the videos: {', '.join(unknown[:5])}")
        records = {vid: records[vid] for vid in videos}
    if domain is not None:
        known = sorted({record["domain"] for record in records.values()})
        records = {vid: record for vid, record in records.items() if record["domain"] == domain}
        if not records:
            raise ValueError(f"{path} has no video of the domain {domain!r}; its domains are {known}")
    return Dataset.from_list([_row(vid, record, path) for vid, record in records.items()])


def _row(vid: str, record: dict[str, Any], path: Path) -> dict[str, Any]:
    if not record.get("match"):
        raise ValueError(f"{path}: {vid!r} has no 'match'")
    rate, frames = float(record["fps"]), float(record["frames"])
    return {
        "vid": vid,
        "query": record["domain"],
        "domain": record["domain"],
        "duration": frames / rate,
        "match": [int(value) for value in record["match"]],
        "clip_scores": [float(value > 0) for value in record["match"]],
        "clip_seconds": [[first / rate, last / rate] for first, last in record["clip"]],
    }
