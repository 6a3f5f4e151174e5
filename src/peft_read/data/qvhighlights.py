"""QVHighlights: the official annotations as a `datasets.Dataset`, and the paper's low-resource split."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .jsonl import read_jsonl

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["ground_truth_records", "load_qvhighlights", "low_resource_split"]

CLIP_SECONDS = 2
LABELS = ("relevant_windows", "relevant_clip_ids", "saliency_scores")
MAX_SCORE = 12  # three annotators, each 0 to 4


def load_qvhighlights(annotations: str | Path, *, require_labels: bool = True) -> Dataset:
    """Reads one annotation file, such as `highlight_train_release.jsonl` (also `.xz`, `.gz`).

    Source: Lei et al., "QVHighlights", NeurIPS 2021.

    Args:
        annotations: the file.
        require_labels: False where there are none, as in the official test file; then those columns hold None.

    Returns:
        A dataset with the columns of the file, `qid`, `query`, `vid`, `duration` (seconds), `relevant_windows`
        [[start, end], ...] in seconds, `relevant_clip_ids`, `saliency_scores` (three numbers 0 to 4 a relevant clip),
        and `clip_scores`, the sum of the three over 12 for every clip of the video, 0 outside the relevant ones.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a broken line, a query without labels, labels that contradict each other (by qid), or a qid that
            comes twice.
    """
    from datasets import Dataset, Features, Value
    from datasets import List as ListOf

    records = read_jsonl(annotations, required=("qid", "query", "vid", "duration", *(LABELS * require_labels)))
    seen: set[int] = set()
    for record in records:
        if record["qid"] in seen:
            raise ValueError(f"{annotations}: qid {record['qid']} comes twice")
        seen.add(record["qid"])
        record["clip_scores"] = _clip_scores(record) if all(record.get(name) for name in LABELS) else None
        if record["clip_scores"] is None and require_labels:
            raise ValueError(f"{annotations}: qid {record['qid']} has no labels; require_labels=False takes it")
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
    return Dataset.from_list([{name: record.get(name) for name in features} for record in records], features=features)


def _clip_scores(record: Mapping[str, Any]) -> list[float]:
    clips, scores = record["relevant_clip_ids"], record["saliency_scores"]
    if len(clips) != len(scores):
        raise ValueError(f"qid {record['qid']}: {len(clips)} relevant clips, but {len(scores)} saliency scores")
    # The official files hold a query or two whose last relevant clip lies behind the video's duration.
    total = np.zeros(max(int(record["duration"] / CLIP_SECONDS), max(clips) + 1))
    total[clips] = np.asarray(scores, dtype=np.float64).sum(axis=1) / MAX_SCORE
    return total.tolist()


def ground_truth_records(data: Dataset) -> list[dict[str, Any]]:
    """The dataset as the records that `evaluate_qvhighlights` takes, durations whole where they are."""
    names = ("qid", "query", "vid", "duration", *LABELS)
    records = []
    for row in data.select_columns(list(names)):
        seconds = row["duration"]
        records.append({**row, "duration": int(seconds) if seconds == int(seconds) else seconds})
    return records


def low_resource_split(
    data: Dataset, *, num_train: int = 700, num_validation: int | None = 150, seed: int = 0
) -> tuple[Dataset, Dataset]:
    """Draws the queries of a low-resource experiment from one split.

    Whole source videos are drawn, not queries: QVHighlights cuts several 150-second videos out of one source, and a
    backbone that was pretrained on the training side must not have seen the queries that it is selected on.

    Args:
        data: from `load_qvhighlights`.
        num_train: queries to train on; the last source that is drawn may give only some of its queries.
        num_validation: queries of the other sources to select on; None = all of them.
        seed: of the draw.

    Returns:
        Training and validation part, which share no source.

    Raises:
        ValueError: fewer queries than asked for.
    """
    sources: dict[str, list[int]] = {}
    for index, vid in enumerate(data["vid"]):
        sources.setdefault(source_of(vid), []).append(index)
    generator = np.random.default_rng(seed)
    order = [list(sources)[index] for index in generator.permutation(len(sources))]
    training: list[int] = []
    while order and len(training) < num_train:
        training += generator.permutation(sources[order.pop(0)]).tolist()
    others = [index for source in order for index in sources[source]]
    wanted = len(others) if num_validation is None else num_validation
    if not 0 < num_train <= len(training) or not 0 < wanted <= len(others):
        raise ValueError(
            f"num_train={num_train} and num_validation={num_validation} cannot be drawn from {len(data)} queries of "
            f"{len(sources)} sources: after the training part {len(others)} queries are left"
        )
    validation = generator.permutation(others)[:wanted]
    return data.select(sorted(training[:num_train])), data.select(sorted(validation.tolist()))


def source_of(vid: str) -> str:
    """The YouTube video that `<source>_<start>_<end>` was cut from."""
    return vid.rsplit("_", 2)[0]
