"""Moments of QVHighlights as a captioning and a multiple-choice task, in the forms of VL-Adapter's video tasks."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peft_read.data import FeatureStore, SceneTokens, load_qvhighlights, low_resource_split, resize_frames
from peft_read.data.qvhighlights import source_of

CHOICES = 5
VIDEO_TOKENS = 64  # of a video, as VL-Adapter has it
SPLITS = {"train": "val", "validation": "val", "test": "test"}


def moment_rows(folder: Path, task: str) -> dict[str, list[dict[str, Any]]]:
    """Rows by split: the published validation split to train, and to select on 150 queries of other sources; test.

    * `moment_caption`: the clips of the relevant windows; the target is the human query.
    * `moment_choice`: all clips, and five queries of which one belongs to the video: "a0" to "a4". The wrong ones are
      of other videos, the first of them, where there is one, of another video from the same source.

    Args:
        folder: with qvhighlights/highlight_val_release.jsonl and highlight_test_with_gt.jsonl, plain or .xz.
        task: "moment_caption" or "moment_choice".
    """
    files = {name: _file(folder / "qvhighlights", stem) for name, stem in _STEMS.items()}
    val = load_qvhighlights(files["val"])
    train, validation = low_resource_split(val, num_train=len(val) - 200, num_validation=150, seed=0)
    parts = {"train": train, "validation": validation, "test": load_qvhighlights(files["test"])}
    if task == "moment_caption":
        return {split: [_caption(row) for row in rows] for split, rows in _lists(parts).items()}
    return {split: _choices(rows) for split, rows in _lists(parts).items()}


_STEMS = {"val": "highlight_val_release", "test": "highlight_test_with_gt"}


def moment_features(folder: Path) -> Any:
    """A function from a row to its visual tokens: the clips it names, brought to at most 64."""
    names = [f"qvhighlights_{part}_captions.npz" for part in ("val", "test")]
    stores = ChainMap(*(FeatureStore(folder / "features" / name) for name in names))  # type: ignore[arg-type]

    def tokens(row: Mapping[str, Any]) -> SceneTokens:
        return clip_tokens(stores[row["visuals"][0]], row["clips"])

    return tokens


def clip_tokens(features: np.ndarray, clips: Sequence[int] | None) -> SceneTokens:
    """Some clips (or all) of a video as visual tokens without boxes; more than 64 are max-pooled over time."""
    chosen = features if clips is None else features[[clip for clip in clips if clip < len(features)]]
    if len(chosen) > VIDEO_TOKENS:
        chosen = resize_frames(torch.from_numpy(np.array(chosen)), VIDEO_TOKENS).numpy()
    zeros = np.zeros((len(chosen), 4), np.float32)
    return SceneTokens(np.asarray(chosen, np.float32), zeros, np.zeros(len(chosen), np.int64))


def _file(folder: Path, stem: str) -> Path:
    for path in (folder / f"{stem}.jsonl", folder / f"{stem}.jsonl.xz"):
        if path.exists():
            return path
    raise FileNotFoundError(f"{folder} has no {stem}.jsonl or {stem}.jsonl.xz")


def _lists(parts: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    columns = ["qid", "query", "vid", "relevant_clip_ids"]
    return {split: list(rows.select_columns(columns)) for split, rows in parts.items()}


def _caption(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "task": "moment_caption",
        "id": str(row["qid"]),
        "text": "moment: ",
        "target": row["query"],
        "answers": [row["query"]],
        "visuals": [row["vid"]],
        "clips": sorted(row["relevant_clip_ids"]),
    }


def _choices(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    by_source: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_source.setdefault(source_of(row["vid"]), []).append(row)
    if len(by_source) <= CHOICES:
        raise ValueError(f"queries of {len(by_source)} sources are too few for {CHOICES} choices")
    return [_choice(row, rows, by_source[source_of(row["vid"])]) for row in rows]


def _choice(row: dict[str, Any], rows: Sequence[dict[str, Any]], near: Sequence[dict[str, Any]]) -> dict[str, Any]:
    rng = np.random.default_rng((7, int(row["qid"])))
    wrong = [other["query"] for other in near if other["vid"] != row["vid"] and other["query"] != row["query"]][:1]
    while len(wrong) < CHOICES - 1:
        other = rows[int(rng.integers(len(rows)))]
        if source_of(other["vid"]) != source_of(row["vid"]) and other["query"] not in (row["query"], *wrong):
            wrong.append(other["query"])
    place = int(rng.integers(CHOICES))
    offered = [*wrong[:place], row["query"], *wrong[place:]]
    return {
        "task": "moment_choice",
        "id": str(row["qid"]),
        "text": choice_text(offered),
        "target": f"a{place}",
        "answers": [f"a{place}"],
        "visuals": [row["vid"]],
        "clips": None,
    }


def choice_text(offered: Sequence[str]) -> str:
    """The question and its choices, as VL-Adapter writes them."""
    return "choose: " + " ".join(f"a{place}: {text.strip('. ')}." for place, text in enumerate(offered))
