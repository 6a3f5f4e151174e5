"""NLVR: statements about three boxes of shapes, given as lists of objects."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..values import number, shown
from .jsonl import Record, iterate_jsonl
from .scene_tokens import COLOURS, PICTURE_SIDE, TYPES
from .vl_examples import TASK_PROMPTS, ExampleReader, example
from .vl_images import truth_of

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["load_nlvr"]

BOXES = 3


def load_nlvr(annotations: str | Path, *, prompt: str = TASK_PROMPTS["nlvr"]) -> Dataset:
    """Reads NLVR in its published format, one JSON object per line.

    Source: Suhr et al., "A Corpus of Natural Language for Visual Reasoning", ACL 2017.

    Args:
        annotations: such as `dev.json`, with `sentence`, `label` "true" or "false", `identifier` "n-m" (examples of
            one n share a sentence: keep them in one split) and `structured_rep`, three lists of objects.
        prompt: before the statement.

    Returns:
        A dataset with the columns of `example`, and `boxes`: three lists of {"x_loc", "y_loc", "size", "type",
        "color"}, in units of a box that is 100 wide. `group` is n.

    Raises:
        FileNotFoundError: no such file.
        ValueError: by file, line and field, a field that is missing, duplicate or invalid, an object outside
            its box included.
    """
    from datasets import List as ListOf
    from datasets import Value

    number, text = Value("float64"), Value("string")
    shape = {"x_loc": number, "y_loc": number, "size": number, "type": text, "color": text}
    return ExampleReader.dataset(_rows(annotations, prompt), boxes=ListOf(ListOf(shape)))


def _rows(annotations: str | Path, prompt: str) -> Iterator[dict[str, Any]]:
    reader = ExampleReader("example")
    for record in iterate_jsonl(annotations, required=("sentence", "identifier", "structured_rep")):
        key, sentence = reader.key(record, "identifier"), record.text("sentence")
        boxes = record["structured_rep"]
        if not isinstance(boxes, list) or len(boxes) != BOXES or not all(isinstance(box, list) for box in boxes):
            raise ValueError(f"{record.where('structured_rep')} must be {BOXES} lists of objects, not {shown(boxes)}")
        target = truth_of(record, "label") if record.get("label") is not None else None
        yield example(
            "nlvr", key, sentence=sentence, text=f"{prompt}{sentence}", target=target,
            answers=[target] if target else [], visuals=[key], group=key.split("-")[0],
            boxes=[[_object(item, record) for item in box] for box in boxes],
        )  # fmt: skip


def _object(item: Any, record: Record) -> dict[str, Any]:
    where = record.where("structured_rep")
    if not isinstance(item, dict):
        raise ValueError(f"{where} holds {shown(item)}, which is not an object")
    size = number(item.get("size"), f"{where}: 'size'", above=0, high=PICTURE_SIDE)
    place = {
        name: number(item.get(name), f"{where}: {name!r}", low=0, high=PICTURE_SIDE - size)
        for name in ("x_loc", "y_loc")
    }
    for name, known in (("type", TYPES), ("color", COLOURS)):
        if item.get(name) not in known:
            raise ValueError(f"{where}: {name!r} must be one of {', '.join(known)}, not {shown(item.get(name))}")
    return {**place, "size": size, "type": item["type"], "color": item["color"]}
