"""The columns that all readers of vision-and-language tasks share."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..values import id_of, number, shown
from .jsonl import Record, find_annotations, iterate_jsonl, iterate_members, parse_json, read_lines

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = [
    "TASK_PROMPTS",
    "ExampleReader",
    "best_of",
    "example",
    "label_of",
    "read_array",
    "read_json",
    "read_records",
    "records_of",
]

#: The task's prompt; GQA's is misspelt because the original was trained with it.
TASK_PROMPTS: Mapping[str, str] = {
    "vqa": "vqa: ",
    "gqa": "gpa: ",
    "nlvr": "nlvr: ",
    "caption": "caption: ",
    "tvqa": "tvqa: ",
    "how2qa": "how2qa: ",
    "tvc": "tvc: ",
    "yc2c": "yc2c: ",
}


def example(
    task: str,
    key: str,
    *,
    sentence: str,
    text: str,
    visuals: Sequence[str],
    target: str | None = None,
    score: float | None = None,
    answers: Sequence[str] = (),
    scores: Sequence[float] = (),
    group: str | None = None,
    start: float | None = None,
    end: float | None = None,
    **more: Any,
) -> dict[str, Any]:
    """One row.

    Args:
        task: its name.
        key: the benchmark's id of the question, image or clip.
        sentence: the question or statement.
        text: the tokenizer's input, prompt included.
        visuals: ids of the images or the video whose features it needs.
        target: the expected output; None where the file has none.
        score: of the target, from 0 to 1.
        answers: all right answers, or all references.
        scores: of the answers, where they differ.
        group: the key that results are grouped by: NLVR2's identifier, TVQA's show, VQA's type of answer.
        start: of the moment, in seconds.
        end: of the moment, in seconds.
        **more: columns of one dataset.
    """
    if target is not None and score is None:
        score = 1.0
    return {
        "task": task, "id": key, "sentence": sentence, "text": text, "target": target, "score": score,
        "answers": list(answers), "scores": list(scores), "visuals": list(visuals), "group": group, "start": start,
        "end": end, **more,
    }  # fmt: skip


class ExampleReader:
    """Collects rows into a dataset and refuses an id that appears twice.

    Args:
        what: the name of the ids in messages.
    """

    def __init__(self, what: str = "question") -> None:
        self.what = what
        self._places: dict[str, str] = {}

    def key(self, record: Record, field: str) -> str:
        """The id of a record.

        Raises:
            ValueError: it is missing, invalid, or was already given.
        """
        return self.new(id_of(record.get(field), record.where(field)), record.place)

    def new(self, key: str, place: str) -> str:
        """The id, if it is new.

        Raises:
            ValueError: it was already given.
        """
        if key in self._places:
            raise ValueError(f"{place}: the {self.what} {key!r} was already given ({self._places[key]})")
        self._places[key] = place
        return key

    @staticmethod
    def dataset(rows: Iterable[dict[str, Any]], **more: Any) -> Dataset:
        """The rows with the shared columns and `more` of `datasets`' features."""
        from datasets import Features, Value
        from datasets import List as ListOf

        from .jsonl import dataset_of

        text, number = Value("string"), Value("float64")
        columns = {
            "task": text, "id": text, "sentence": text, "text": text, "target": text, "score": number,
            "answers": ListOf(text), "scores": ListOf(number), "visuals": ListOf(text), "group": text, "start": number,
            "end": number, **more,
        }  # fmt: skip
        return dataset_of(rows, Features(columns))


def read_json(path: str | Path) -> Any:
    """The one JSON value of a file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: invalid JSON.
    """
    path = find_annotations(path)
    return parse_json("\n".join(line for _, line in read_lines(path)), str(path))


def records_of(value: Any, path: str | Path, field: str | None = None) -> list[Record]:
    """The objects of an array, or of the array `field` of an object, each with its index as its place.

    Raises:
        ValueError: another shape, an entry that is not an object, or no entry.
    """
    if field is not None:
        if not isinstance(value, dict) or field not in value:
            raise ValueError(f"{path}: a JSON object with {field!r} was expected, not {shown(value)}")
        value = value[field]
    if not isinstance(value, list) or not value:
        what = repr(field) if field else "the file"
        raise ValueError(f"{path}: {what} must be a list of JSON objects, not {shown(value)}")
    records = []
    for position, entry in enumerate(value, start=1):
        place = f"{path}, entry {position}"
        if not isinstance(entry, dict):
            raise ValueError(f"{place}: a JSON object was expected, not {shown(entry)}")
        records.append(Record(entry, place))
    return records


def read_array(path: str | Path, field: str | None = None) -> list[Record]:
    """As `records_of`, from a file."""
    return records_of(read_json(path), path, field)


def read_records(path: str | Path, *, key: str | None = None) -> list[Record]:
    """The objects of a file, in any of three forms: an array, one per line, or {id: object}.

    Args:
        path: the file.
        key: the field that the ids of {id: object} go to; None: that form is not accepted.

    Raises:
        FileNotFoundError: no such file.
        ValueError: by file and line, none of these forms.
    """
    path = find_annotations(path)
    beginning = next((line.lstrip() for _, line in read_lines(path) if line.strip()), "")
    if beginning.startswith("["):
        return read_array(path)
    if _is_one_record(beginning):
        return list(iterate_jsonl(path))
    if key is None:
        raise ValueError(f"{path}: a JSON array, or a JSON object per line, was expected, not {shown(beginning[:40])}")
    return [Record({key: name, **record}, record.place) for name, record in iterate_members(path)]


def _is_one_record(line: str) -> bool:
    """Whether a line holds an object of its own whose fields are not all objects, as one of {id: object} would."""
    try:
        value = json.loads(line)
    except ValueError:
        return False
    return isinstance(value, dict) and not (value and all(isinstance(field, dict) for field in value.values()))


def label_of(record: Record, field: str = "label") -> tuple[list[str], list[float]]:
    """Answers and their scores from {answer: score}.

    Raises:
        ValueError: another shape, or scores outside 0 to 1.
    """
    label = record[field]
    if not isinstance(label, dict):
        raise ValueError(f"{record.where(field)} must be an object {{answer: score}}, not {shown(label)}")
    if blank := [answer for answer, score in label.items() if not answer.strip()]:
        raise ValueError(f"{record.where(field)} holds a blank answer: {shown(blank[0])}")
    scores = [
        number(score, f"{record.where(field)}: the score of {answer!r}", low=0, high=1)
        for answer, score in label.items()
    ]
    return list(label), scores


def best_of(answers: Sequence[str], scores: Sequence[float]) -> tuple[str, float]:
    """The first of the best answers; an empty answer with score 0 if there is none, as in the original."""
    if not any(scores):
        return "", 0.0
    best = max(range(len(scores)), key=lambda index: (scores[index], -index))
    return answers[best], scores[best]
