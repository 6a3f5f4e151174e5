"""YouTube Highlights: the annotations of UMT, and their jsonl form, as a `datasets.Dataset`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..values import is_given, listed, number, shown, table
from .jsonl import Record, dataset_of, find_annotations, iterate_jsonl, iterate_members

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
        annotations: `.json`: {video: {"match": one number per clip, "domain", "clip": [[first frame, last frame]],
            "frames", "fps"}}, without a division into splits; `.jsonl`: one record per video, one file per split.
        domain: keep one of the six domains.
        videos: keep these videos, such as those of a split.

    Returns:
        A dataset with the columns `vid`, `query` (the domain), `domain`, `duration` (seconds), `match` (1 = highlight,
        0 = between, -1 = not), `clip_scores` (1 where match > 0, else 0), and `clip_seconds` [[start, end], ...]. Its
        clips overlap and are about 100 frames long; they are not the 2-second clips of the other datasets.

    Raises:
        FileNotFoundError: no such file.
        ValueError: by file, line or id, and field: an invalid record, a duplicate video, one without `match`, matches
            and clips that differ in number, clips that are reversed or after the end of the video, a rate that is not
            positive; an unknown video, a domain without videos.
    """
    from datasets import Features, Value
    from datasets import List as ListOf

    path = find_annotations(annotations)
    wanted = None if videos is None else _listed_once(videos)
    features = Features(
        {
            "vid": Value("string"),
            "query": Value("string"),
            "domain": Value("string"),
            "duration": Value("float64"),
            "match": ListOf(Value("int64")),
            "clip_scores": ListOf(Value("float64")),
            "clip_seconds": ListOf(ListOf(Value("float64"))),
        }
    )
    domains: dict[str, str] = {}
    kept: Iterable[dict[str, Any]] = _kept(path, domain, wanted, domains)
    if wanted is not None:
        by_id = {row["vid"]: row for row in kept}
        if unknown := [vid for vid in wanted if vid not in domains]:
            raise ValueError(f"{path} has no {len(unknown)} of the videos: {listed(unknown)}")
        kept = [by_id[vid] for vid in wanted if vid in by_id]
    data = dataset_of(kept, features)
    if not len(data):
        known = sorted(set(domains.values()))
        raise ValueError(f"{path} has no video of the domain {domain!r}; its domains are {known}")
    return data


def _listed_once(videos: Iterable[str]) -> list[str]:
    wanted = [videos] if isinstance(videos, str) else list(videos)
    if isinstance(videos, str) or not wanted or len(set(wanted)) < len(wanted):
        raise ValueError(
            f"videos must be a list of different ids, not {shown(videos if isinstance(videos, str) else wanted)}"
        )
    return wanted


def _kept(
    path: Path, domain: str | None, wanted: list[str] | None, domains: dict[str, str]
) -> Iterator[dict[str, Any]]:
    """Rows of one domain and of the wanted videos; `domains` receives that of every video of the file."""
    records: Iterator[Record]
    if ".jsonl" in path.name:
        records = iterate_jsonl(path, required=("vid",))
    else:
        records = (Record({"vid": vid, **fields}, fields.place) for vid, fields in iterate_members(path))
    chosen = None if wanted is None else set(wanted)
    for record in records:
        row = _row(record)
        if row["vid"] in domains:
            raise ValueError(f"{record.place}: the video {row['vid']!r} was already given")
        domains[row["vid"]] = row["domain"]
        if domain in (None, row["domain"]) and (chosen is None or row["vid"] in chosen):
            yield row


def _row(record: Record) -> dict[str, Any]:
    vid, domain = record.text("vid"), record.text("domain")
    if not is_given(record.get("match")):
        raise ValueError(f"{record.place}: {vid!r} has no 'match'")
    match = table(record["match"], record.where("match"), low=-1, high=1, whole=True)
    rate = number(record.get("fps"), record.where("fps"), above=0)
    frames = number(_from_text(record.get("frames")), record.where("frames"), above=0)
    clips = table(record.get("clip"), record.where("clip"), columns=2, low=0)
    if len(clips) != len(match):
        raise ValueError(f"{record.where('clip')} has {len(clips)} clips, 'match' has {len(match)}")
    wrong = clips[(clips[:, 1] <= clips[:, 0]) | (clips[:, 0] >= frames)]
    if len(wrong):
        raise ValueError(
            f"{record.where('clip')} holds the clip {wrong[0].tolist()}: a clip is [first frame, last frame] inside "
            f"the video's {frames:g} frames"
        )
    return {
        "vid": vid,
        "query": domain,
        "domain": domain,
        "duration": frames / rate,
        "match": match.astype(int).tolist(),
        "clip_scores": (match > 0).astype(float).tolist(),
        "clip_seconds": (clips / rate).tolist(),
    }


def _from_text(value: Any) -> Any:
    """The published file writes the number of frames as a string."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
