"""Predictions in the format in which each vision-and-language benchmark takes them, written whole."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import write_whole
from ..values import listed, shown

__all__ = ["SUBMISSION_TASKS", "write_predictions"]

SUBMISSION_TASKS = ("vqa", "gqa", "nlvr", "caption", "tvqa", "how2qa", "tvc", "yc2c")


def write_predictions(
    path: str | Path, task: str, rows: Iterable[Mapping[str, Any]], predictions: Sequence[str], *, other: int = 0
) -> Path:
    """Write what a model said of each row.

    | task | file |
    |---|---|
    | vqa | JSON array of {"question_id": int, "answer"} |
    | gqa | JSON array of {"questionId": text, "prediction"} |
    | nlvr | lines `<identifier>,True` or `False` |
    | caption | JSON array of {"image_id": int, "caption"} |
    | tvqa, how2qa | JSON object {question id: number of the choice} |
    | tvc, yc2c | a JSON object per line: {"vid_name", "clip_id", "descs": [{"desc"}]}, tvc with "ts" |

    Args:
        path: the file; it holds all predictions or what it held before.
        task: one of these.
        rows: of the task's reader, in the order of the predictions.
        predictions: a text per row.
        other: the number of the choice where an answer is not one of "a0", "a1", ..., as the original counts it.

    Returns:
        The path.

    Raises:
        ValueError: another task, another number of predictions, a prediction that is not a string, ids (by row) that
            the benchmark does not have or that appear twice.
        OSError: the file cannot be written.
    """
    if task not in SUBMISSION_TASKS:
        raise ValueError(f"task must be one of {', '.join(map(repr, SUBMISSION_TASKS))}, not {task!r}")
    rows = list(rows)
    if isinstance(predictions, str) or len(rows) != len(predictions) or not rows:
        raise ValueError(
            f"{len(rows)} rows and {len(predictions)} predictions: pass one text per row, and at least one"
        )
    if wrong := [
        (row.get("id"), text) for row, text in zip(rows, predictions, strict=True) if not isinstance(text, str)
    ]:
        raise ValueError(f"the prediction of {wrong[0][0]!r} must be a string, not {shown(wrong[0][1])}")
    keys = [_key(task, row) for row in rows]
    if twice := [key for key, times in Counter(keys).items() if times > 1]:
        raise ValueError(f"{len(twice)} ids appear twice, such as {listed(twice)}: one prediction per id")
    said = list(zip(rows, keys, (text.strip() for text in predictions), strict=True))
    with write_whole(path) as file:
        if task == "vqa":
            json.dump([{"question_id": _number(key), "answer": text} for _, key, text in said], file, indent=1)
        elif task == "gqa":
            json.dump([{"questionId": key, "prediction": text} for _, key, text in said], file, indent=1)
        elif task == "caption":
            json.dump([{"image_id": _number(key), "caption": text} for _, key, text in said], file, indent=1)
        elif task in ("tvqa", "how2qa"):
            json.dump({key: _choice(text, other) for _, key, text in said}, file, indent=1)
        elif task == "nlvr":
            file.writelines(f"{key},{text.lower() == 'true'}\n" for _, key, text in said)
        else:
            file.writelines(json.dumps(_clip(task, row, key, text)) + "\n" for row, key, text in said)
    return Path(path)


def _key(task: str, row: Mapping[str, Any]) -> str:
    """What the benchmark calls a row."""
    if task == "nlvr" and str(row.get("group")).count("-") != 3:  # NLVR has no identifier of its own beside the id
        row = {**row, "group": row.get("id")}
    field = {"nlvr": "group", "caption": "group", "tvc": "group", "yc2c": "group"}.get(task, "id")
    key = row.get(field)
    if not isinstance(key, str) or not key:
        raise ValueError(f"row {row.get('id')!r} has no {field!r}, the id of {task} submissions: {shown(key)}")
    if task in ("vqa", "caption"):
        _number(key)
    return key


def _number(key: str) -> int:
    if not key.isdecimal():
        raise ValueError(f"the id {key!r} must be a whole number, as the benchmark's are")
    return int(key)


def _choice(text: str, other: int) -> int:
    return int(text[1:]) if text[:1] == "a" and text[1:].isdecimal() else other


def _clip(task: str, row: Mapping[str, Any], key: str, text: str) -> dict[str, Any]:
    moment = {"ts": [row["start"], row["end"]]} if task == "tvc" else {}
    return {"vid_name": row["visuals"][0], "clip_id": key, **moment, "descs": [{"desc": text}]}
