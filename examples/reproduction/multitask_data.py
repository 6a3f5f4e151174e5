"""The task suites of `vl_multitask.py`: generated scenes, human sentences on scenes, VL-Adapter's benchmarks."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
from moment_tasks import moment_features, moment_rows

from peft_read.data import (
    FeatureStore,
    SceneTokens,
    generate_vl_mini,
    load_coco_captions,
    load_coco_people,
    load_gqa,
    load_how2qa,
    load_kilogram_captions,
    load_kilogram_parts,
    load_nlvr,
    load_nlvr2,
    load_tvc,
    load_tvqa,
    load_vqa,
    load_yc2c,
    people_tokens,
    piece_tokens,
    shape_tokens,
)
from peft_read.metrics import cider_scores, normalize_vqa_answer, rouge_scores

Row = Mapping[str, Any]
Rows = Sequence[Row]
SPLITS = ("train", "validation", "test")
TOPIC = "comparing"  # the one that the backbone beside the script has never seen


@dataclass(frozen=True)
class Task:
    """How one task is trained and measured.

    Args:
        metric: its name in the report.
        scores: of each prediction, given all of them and their rows; 0 to 100 (CIDEr: 0 to 1000), higher is better.
            The figure of a task is their mean.
        loss: the kind of its loss, see `peft_read.vl_adapter.losses`.
        max_length: tokens that are generated at most.
    """

    metric: str
    scores: Callable[[Sequence[str], Rows], list[float]]
    loss: str = "sample_mean"
    max_length: int = 10


@dataclass(frozen=True)
class Suite:
    """Rows of every split and task, and where their visual tokens come from.

    Args:
        splits: split -> task -> rows with the columns of peft_read.data's readers.
        visuals: as `VLCollator` takes them.
        boxes: as `VLCollator` takes them; None where `visuals` brings them, or there are none.
    """

    splits: dict[str, dict[str, Any]]
    visuals: Any
    boxes: Any = None


def unit_of(row: Row) -> str:
    """What examples have in common, and is one observation in a test: NLVR's sentence, else the picture or video."""
    return str(row["group"] if row["task"] == "nlvr" else (row.get("visuals") or [row["id"]])[0])


def exact_match(predictions: Sequence[str], rows: Rows) -> list[float]:
    """100 for an answer that is the target, letter by letter."""
    return [100.0 * (text == row["target"]) for text, row in zip(predictions, rows, strict=True)]


def soft_accuracy(predictions: Sequence[str], rows: Rows) -> list[float]:
    """The score of each answer in VQA, as `scores` gives it for each of a row's `answers`; 0 for any other."""
    return [
        100 * dict(zip(row["answers"], row["scores"], strict=True)).get(text, 0.0)
        for text, row in zip(predictions, rows, strict=True)
    ]


def consensus(predictions: Sequence[str], rows: Rows) -> list[float]:
    """VQA's rule for any number of people: a third for each who gave the answer, one at most."""
    scores = []
    for text, row in zip(predictions, rows, strict=True):
        said = normalize_vqa_answer(text)
        scores.append(100 * min(1.0, sum(normalize_vqa_answer(answer) == said for answer in row["answers"]) / 3))
    return scores


def caption_score(predictions: Sequence[str], rows: Rows) -> list[float]:
    """CIDEr times 100, of lower-case words without punctuation."""
    references = [[words(text) for text in row["answers"]] for row in rows]
    return [100 * score for score in cider_scores([words(text) for text in predictions], references)]


def rouge_l(predictions: Sequence[str], rows: Rows) -> list[float]:
    """ROUGE-L against the one reference."""
    return [
        rouge_scores([text], [row["target"]], variant="rouge_score")["rougeL"]
        for text, row in zip(predictions, rows, strict=True)
    ]


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
        "kilogram_caption": Task("CIDEr", caption_score, "token_mean", 20),
        "kilogram_part": Task("consensus accuracy", consensus),
        "coco_people": Task("CIDEr", caption_score, "token_mean", 24),
    },
    "moments": {
        "moment_caption": Task("CIDEr", caption_score, "token_mean", 24),
        "moment_choice": Task("accuracy", exact_match, max_length=4),
    },
    "image": {
        "vqa": Task("soft accuracy", soft_accuracy, "scored_sample_mean"),
        "gqa": Task("accuracy", exact_match),
        "nlvr": Task("accuracy", exact_match, max_length=4),
        "caption": Task("CIDEr", caption_score, "token_mean", 20),
    },
    "video": {
        "tvqa": Task("accuracy", exact_match, max_length=4),
        "how2qa": Task("accuracy", exact_match, max_length=4),
        "tvc": Task("CIDEr", caption_score, max_length=20),
        "yc2c": Task("CIDEr", caption_score, max_length=20),
    },
}
READERS: dict[str, Callable[..., Any]] = {
    "vqa": load_vqa,
    "gqa": load_gqa,
    "nlvr": load_nlvr2,
    "tvqa": load_tvqa,
    "how2qa": load_how2qa,
    "tvc": load_tvc,
    "yc2c": load_yc2c,
}


def load_suite(
    name: str, tasks: Sequence[str], data_dir: str | None, sizes: Mapping[str, int | None], seed: int
) -> Suite:
    """Reads or generates one suite.

    Args:
        name: of `SUITES`.
        tasks: which of its tasks.
        data_dir: "scenes": nlvr/{dev,hidden,test}.jsonl, kilogram/{annotations,shapes}.jsonl,
            coco_people/val2017.jsonl, plain or .xz. "moments": see `moment_rows`. "image" and "video": per task a
            folder with {train,validation,test}.json (jsonl for videos; of captions dataset_coco.json), features and
            boxes (folders or .npz; videos have no boxes), and subtitles.jsonl for videos. Validation rows have a
            target each, for the loss.
        sizes: rows per task of each split at most; None = all.
        seed: of the choice of training rows. Validation and test rows do not depend on it.

    Raises:
        ValueError: a file is broken, or a split is empty.
        FileNotFoundError: a file is not there.
    """
    if name == "vl_mini":
        whole = {
            split: {task: _generated(task, sizes[split] or number, seed=start) for task in tasks}
            for split, number, start in zip(SPLITS, (600, 150, 300), (11, 12, 13), strict=True)
        }
        return Suite(whole, lambda row: row["tokens"])
    assert data_dir is not None
    if name == "scenes":
        loaders = {"nlvr": _nlvr, "kilogram_caption": _captions, "kilogram_part": _parts, "coco_people": _people}
        parts_of = {task: loaders[task](Path(data_dir)) for task in tasks}
        suite = Suite({}, scene_tokens)
    elif name == "moments":
        parts_of = {task: moment_rows(Path(data_dir), task) for task in tasks}
        suite = Suite({}, moment_features(Path(data_dir)))
    else:
        parts_of = {task: _published(task, Path(data_dir) / task) for task in tasks}
        stores = {task: FeatureStore(_place(Path(data_dir) / task, "features")) for task in tasks}
        boxes = [FeatureStore(_place(Path(data_dir) / task, "boxes")) for task in tasks] if name == "image" else []
        suite = Suite({}, stores, ChainMap(*boxes) if boxes else None)  # type: ignore[arg-type]
    for split in SPLITS:
        start = seed if split == "train" else 0
        suite.splits[split] = {task: _some(parts[split], sizes[split], seed=start) for task, parts in parts_of.items()}
    if empty := [
        f"{task} ({split})" for split, parts in suite.splits.items() for task in parts if not len(parts[task])
    ]:
        raise ValueError(f"no examples of {', '.join(empty)} in {data_dir}")
    return suite


def scene_tokens(row: Row) -> SceneTokens:
    """The visual tokens of a row of NLVR, KiloGram or COCO's people.

    NLVR's three boxes are a set: a training row, which has a `draw`, shows them in another order each epoch.
    """
    if "people" in row:
        return people_tokens(row["people"])
    if "pieces" in row:
        return piece_tokens(row["pieces"], row["viewbox"])
    tokens = shape_tokens(row["boxes"])
    if row.get("draw") is None:
        return tokens
    orders = list(permutations(range(3)))
    order = np.array(orders[int(row["draw"] * len(orders))])
    return tokens._replace(image_ids=order[tokens.image_ids])


def _generated(task: str, number: int, *, seed: int) -> list[dict[str, Any]]:
    drawn = generate_vl_mini(number, seed=seed, tasks=[task], topics=[TOPIC])
    return [
        {"task": task, "id": str(index), "text": f"{task}: {e.text}", "target": e.target, "tokens": e.tokens}
        for index, e in enumerate(drawn)
    ]


def _some(rows: Any, size: int | None, *, seed: int) -> Any:
    if size is None or size >= len(rows):
        return rows
    chosen = np.sort(np.random.default_rng(seed).choice(len(rows), size, replace=False)).tolist()
    return [rows[index] for index in chosen] if isinstance(rows, list) else rows.select(chosen)


def _place(folder: Path, name: str, *endings: str) -> Path:
    """The first of these that exists."""
    for ending in endings or ("", ".npz"):
        if (folder / f"{name}{ending}").exists():
            return folder / f"{name}{ending}"
    raise FileNotFoundError(f"{folder} has no {' or '.join(name + ending for ending in endings or ('', '.npz'))}")


def _lines(folder: Path, name: str) -> Path:
    return _place(folder, name, ".jsonl", ".jsonl.xz", ".json")


def _shares(groups: Sequence[str], shares: Mapping[str, float]) -> dict[str, str]:
    """Group -> split, in the given shares; the same for every seed."""
    names = sorted(set(groups))
    order = np.random.default_rng(0).permutation(len(names))
    bounds = np.cumsum([round(share * len(names)) for share in shares.values()])[:-1]
    chosen = np.searchsorted(bounds, np.arange(len(names)), "right")
    return {names[index]: list(shares)[split] for index, split in zip(order, chosen, strict=True)}


def _where(rows: Any, keep: Callable[[Row], bool], columns: Sequence[str]) -> Any:
    narrow = rows.select_columns(list(columns))
    return rows.select([index for index, row in enumerate(narrow) if keep(row)])


def _nlvr(folder: Path) -> dict[str, Any]:
    """Trains on dev and three quarters of hidden, selects on the rest of hidden, reports test; split by sentence."""
    from datasets import concatenate_datasets

    dev, hidden, test = (load_nlvr(_lines(folder / "nlvr", name)) for name in ("dev", "hidden", "test"))
    split = _shares(hidden["group"], {"train": 0.75, "validation": 0.25})
    train, validation = (
        _where(hidden, lambda row, name=name: split[row["group"]] == name, ["group"])
        for name in ("train", "validation")
    )
    return {"train": concatenate_datasets([dev, train]), "validation": validation, "test": test}


def _captions(folder: Path) -> dict[str, Any]:
    """Trains on the densely annotated tangrams and the once annotated ones, reports on those with about ten texts."""
    files = [_lines(folder / "kilogram", name) for name in ("annotations", "shapes")]
    each, whole = (load_kilogram_captions(*files, each=kind, prompt="tangram: ") for kind in ("annotation", "shape"))
    several = _where(whole, lambda row: row["group"] == "dev_texts", ["group"])
    split = _shares(several["id"], {"validation": 0.3, "test": 0.7})
    return {
        name: _where(rows, lambda row, name=name: split.get(row["visuals"][0], "train") == name, ["visuals"])
        for name, rows in (("train", each), ("validation", each), ("test", whole))
    }


def _parts(folder: Path) -> dict[str, Any]:
    """Names of pieces, of the densely annotated tangrams; no tangram is in two splits."""
    files = [_lines(folder / "kilogram", name) for name in ("annotations", "shapes")]
    each, whole = (load_kilogram_parts(*files, each=kind) for kind in ("annotation", "shape"))
    tangrams = [visuals[0] for visuals in whole["visuals"]]
    split = _shares(tangrams, {"train": 0.7, "validation": 0.1, "test": 0.2})
    return {
        name: _where(rows, lambda row, name=name: split[row["visuals"][0]] == name, ["visuals"])
        for name, rows in (("train", each), ("validation", each), ("test", whole))
    }


def _people(folder: Path) -> dict[str, Any]:
    """Captions of the images with people; no image is in two splits."""
    file = _lines(folder / "coco_people", "val2017")
    each, whole = (load_coco_people(file, each=kind, prompt="people: ") for kind in ("caption", "image"))
    split = _shares(whole["id"], {"train": 0.75, "validation": 0.05, "test": 0.2})
    return {
        name: _where(rows, lambda row, name=name: split[row["visuals"][0]] == name, ["visuals"])
        for name, rows in (("train", each), ("validation", each), ("test", whole))
    }


def _published(task: str, folder: Path) -> dict[str, Any]:
    if task == "caption":
        file = folder / "dataset_coco.json"
        validation = load_coco_captions(file, "val", each="caption")
        return {"validation": validation, **{name: load_coco_captions(file, name) for name in ("train", "test")}}
    reader = READERS[task]
    files = {split: _place(folder, split, ".json", ".jsonl") for split in SPLITS}
    if SUITES["video"].get(task) is None:
        return {split: reader(file) for split, file in files.items()}
    subtitles = folder / "subtitles.jsonl"
    return {split: reader(file, subtitles if subtitles.exists() else None) for split, file in files.items()}
