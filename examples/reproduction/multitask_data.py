"""The task suites of `vl_multitask.py`: generated scenes, and real human sentences on scenes given as objects."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peft_read.data import VL_MINI_TASKS, generate_vl_mini, people_tokens, piece_tokens, shape_tokens
from peft_read.data.jsonl import read_jsonl
from peft_read.metrics import cider_score, rouge_scores

Rows = list[dict[str, Any]]
Splits = dict[str, dict[str, Rows]]  # split -> task -> rows
TOPIC = "comparing"  # the one that the backbone beside the script has never seen


@dataclass(frozen=True)
class Task:
    """How one task is trained and measured.

    Args:
        metric: its name in the report.
        score: of predictions and rows, 0 to 100 (CIDEr: 0 to 1000), higher is better.
        loss: the kind of its loss, see `peft_read.vl_adapter.losses`.
        max_length: tokens that are generated at most.
    """

    metric: str
    score: Callable[[Sequence[str], Rows], float]
    loss: str = "sample_mean"
    max_length: int = 10


def exact_match(predictions: Sequence[str], rows: Rows) -> float:
    """Percentage of answers that are the target, letter by letter but for case."""
    hits = [text.strip().lower() == row["target"].strip().lower() for text, row in zip(predictions, rows, strict=True)]
    return 100 * float(np.mean(hits))


def consensus(predictions: Sequence[str], rows: Rows) -> float:
    """VQA's accuracy without its rules of spelling: a third for each person who gave the answer, at most one."""
    scores = []
    for text, row in zip(predictions, rows, strict=True):
        given = sum(answer.strip().lower() == text.strip().lower() for answer in row["references"])
        scores.append(min(1.0, given / 3))
    return 100 * float(np.mean(scores))


def caption_score(predictions: Sequence[str], rows: Rows) -> float:
    """CIDEr times 100, of lower-case words without punctuation."""
    return 100 * cider_score(
        [words(text) for text in predictions], [[words(text) for text in row["references"]] for row in rows]
    )


def rouge_l(predictions: Sequence[str], rows: Rows) -> float:
    """ROUGE-L against the one reference."""
    return rouge_scores(list(predictions), [row["target"] for row in rows], variant="rouge_score")["rougeL"]


def words(text: str) -> str:
    """Lower case, letters and digits only."""
    return " ".join("".join(letter if letter.isalnum() else " " for letter in text.lower()).split())


SUITES: dict[str, dict[str, Task]] = {
    "vl_mini": {
        "verify": Task("accuracy", exact_match, max_length=4),
        "ask": Task("accuracy", exact_match),
        "describe": Task("ROUGE-L", rouge_l, "token_mean", 30),
    },
    "scenes": {
        "nlvr": Task("accuracy", exact_match, max_length=4),
        "tangram_caption": Task("CIDEr", caption_score, "token_mean", 20),
        "tangram_part": Task("consensus accuracy", consensus),
        "people_caption": Task("CIDEr", caption_score, "token_mean", 24),
    },
}


def load_suite(name: str, data_dir: str | None, sizes: dict[str, int | None], *, seed: int) -> Splits:
    """Rows with `text`, `target`, `tokens`, `references`, by split and task.

    Args:
        name: of `SUITES`.
        data_dir: where the files of "scenes" are.
        sizes: rows per task of each split at most; None = all.
        seed: of the choice of training rows. Validation and test rows do not depend on it.

    Raises:
        ValueError: a file is broken, or a split is empty.
    """
    if name == "vl_mini":
        made = {
            split: {task: _generated(task, sizes[split] or number, seed=start) for task in VL_MINI_TASKS}
            for split, (number, start) in {"train": (600, 11), "validation": (150, 12), "test": (300, 13)}.items()
        }
        return made
    assert data_dir is not None
    folder = Path(data_dir)
    whole = {
        "nlvr": _nlvr(folder / "nlvr"),
        **_kilogram(folder / "kilogram"),
        "people_caption": _people(folder / "coco_people"),
    }
    splits: Splits = {}
    for split in ("train", "validation", "test"):
        splits[split] = {
            task: _some(parts[split], sizes[split], seed=seed if split == "train" else 0)
            for task, parts in whole.items()
        }
    if empty := [f"{task} ({split})" for split, tasks in splits.items() for task, rows in tasks.items() if not rows]:
        raise ValueError(f"no examples of {', '.join(empty)} in {data_dir}")
    return splits


def _generated(task: str, count: int, *, seed: int) -> Rows:
    return [
        {"text": f"{task}: {drawn.text}", "target": drawn.target, "tokens": drawn.tokens, "references": [drawn.target]}
        for drawn in generate_vl_mini(count, seed=seed, tasks=[task], topics=[TOPIC])
    ]


def _some(rows: Rows, size: int | None, *, seed: int) -> Rows:
    if size is None or size >= len(rows):
        return rows
    chosen = np.sort(np.random.default_rng(seed).choice(len(rows), size, replace=False))
    return [rows[index] for index in chosen]


def _file(folder: Path, name: str) -> Path:
    """The file, plain or compressed."""
    for path in (folder / f"{name}.jsonl", folder / f"{name}.jsonl.xz"):
        if path.exists():
            return path
    raise FileNotFoundError(f"{folder / name}.jsonl (or .xz) does not exist")


def _parts(groups: Iterable[str], shares: dict[str, float]) -> dict[str, str]:
    """Group -> split, in the given shares; the same for every seed."""
    names = sorted(set(groups))
    order = np.random.default_rng(0).permutation(len(names))
    bounds = np.cumsum([round(share * len(names)) for share in shares.values()])
    return {
        names[index]: list(shares)[int(np.searchsorted(bounds, place, "right"))] for place, index in enumerate(order)
    }


def _nlvr(folder: Path) -> dict[str, Rows]:
    """Trains on dev and most of hidden, selects on the rest of hidden, reports test; no sentence is in two of them."""
    parts: dict[str, Rows] = defaultdict(list)
    fields = ("sentence", "label", "identifier", "structured_rep")
    for file in ("dev", "hidden", "test"):
        records = list(read_jsonl(_file(folder, file), required=fields))
        sentences = [record["identifier"].split("-")[0] for record in records]
        places = _parts(sentences, {"validation": 0.25, "train": 0.75}) if file == "hidden" else {}
        for record, sentence in zip(records, sentences, strict=True):
            row = {
                "text": f"nlvr: {record['sentence']}",
                "target": record["label"],
                "references": [record["label"]],
                "tokens": shape_tokens(record["structured_rep"]),
                "shuffle_pictures": True,  # the three boxes are a set
            }
            parts[{"dev": "train", "test": "test"}.get(file) or places[sentence]].append(row)
    return parts


def _kilogram(folder: Path) -> dict[str, dict[str, Rows]]:
    """Whole descriptions and names of parts; no tangram is in two splits."""
    shapes = {r["tangram"]: r for r in read_jsonl(_file(folder, "shapes"), required=("tangram", "viewbox", "pieces"))}
    records = list(read_jsonl(_file(folder, "annotations"), required=("tangram", "whole", "set")))
    tokens = {name: piece_tokens(_corners(shape["pieces"]), shape["viewbox"]) for name, shape in shapes.items()}
    # Descriptions: the densely annotated tangrams to train; of the others those with several texts.
    by_tangram: dict[str, list[str]] = defaultdict(list)
    for record in records:
        by_tangram[record["tangram"]].append(record["whole"])
    sparse = {r["tangram"] for r in records if r["set"] == "dev_texts"}
    places = _parts(sparse, {"validation": 0.3, "test": 0.7})
    captions: dict[str, Rows] = defaultdict(list)
    for record in records:
        if record["set"] != "dev_texts":
            captions["train"].append(_described(tokens[record["tangram"]], record["whole"], [record["whole"]]))
    for name in sorted(sparse):
        captions[places[name]].append(_described(tokens[name], by_tangram[name][0], by_tangram[name]))
    # Names of parts: only the dense tangrams have numbered pieces.
    dense = [record for record in records if record["set"] == "dense"]
    places = _parts((r["tangram"] for r in dense), {"train": 0.7, "validation": 0.1, "test": 0.2})
    names: dict[tuple[str, str], list[str]] = defaultdict(list)
    for record in dense:
        for piece, name in record["part"].items():
            names[record["tangram"], piece].append(name)
    parts: dict[str, Rows] = defaultdict(list)
    for (tangram, piece), answers in sorted(names.items()):
        split = places[tangram]
        for answer in answers if split == "train" else [max(answers, key=answers.count)]:
            parts[split].append(
                {
                    "text": f"tangram part: what is piece {piece}?",
                    "target": answer,
                    "references": answers,
                    "tokens": tokens[tangram],
                }
            )
    return {"tangram_caption": captions, "tangram_part": parts}


def _described(tokens: Any, target: str, references: list[str]) -> dict[str, Any]:
    return {"text": "tangram:", "target": target, "references": references, "tokens": tokens}


def _corners(pieces: dict[str, list[list[float]]]) -> dict[str, Any]:
    """The corners of each piece (N, 2); some files list x and y one after the other."""
    return {name: np.asarray(values, dtype=float).reshape(-1, 2) for name, values in pieces.items()}


def _people(folder: Path) -> dict[str, Rows]:
    """Captions of the images with people; no image is in two splits."""
    records = read_jsonl(_file(folder, "val2017"), required=("image_id", "captions", "people"))
    seen = [record for record in records if record["people"]]
    places = _parts((str(r["image_id"]) for r in seen), {"train": 0.75, "validation": 0.05, "test": 0.2})
    parts: dict[str, Rows] = defaultdict(list)
    for record in seen:
        split, tokens = places[str(record["image_id"])], people_tokens(record["people"])
        captions = [caption.strip() for caption in record["captions"]]
        for caption in captions if split == "train" else captions[:1]:
            parts[split].append({"text": "people:", "target": caption, "references": captions, "tokens": tokens})
    return parts
