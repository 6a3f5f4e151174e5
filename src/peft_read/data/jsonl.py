"""Reading annotation files: lines of JSON, plain or compressed, with the file and line of whatever is wrong."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

__all__ = ["find_annotations", "read_json", "read_jsonl"]

COMPRESSED = (".xz", ".gz")


def find_annotations(path: str | Path) -> Path:
    """The file itself, or the same with `.xz` or `.gz` behind its name.

    Raises:
        FileNotFoundError: none of them exists; the message lists what the folder holds.
    """
    path = Path(path)
    for candidate in (path, *(path.with_name(path.name + suffix) for suffix in COMPRESSED)):
        if candidate.is_file():
            return candidate
    found = sorted(file.name for file in path.parent.glob("*.json*")) if path.parent.is_dir() else []
    raise FileNotFoundError(
        f"{path} does not exist (nor with .xz or .gz); annotations in its folder: {found or 'none'}"
    )


def read_json(path: str | Path) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: it is no JSON.
    """
    path = find_annotations(path)
    with _open(path) as file:
        try:
            return json.load(file)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is no JSON: {error}") from error


def read_jsonl(path: str | Path, *, required: Iterable[str] = ()) -> list[dict[str, Any]]:
    """The records of a file with one JSON object a line; empty lines are left out.

    Args:
        path: `.jsonl`, also with `.xz` or `.gz`.
        required: fields that every record must have.

    Raises:
        ValueError: a line that is no JSON object or lacks a field, or an empty file.
    """
    path, required = find_annotations(path), list(required)
    records = []
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: no JSON: {error}") from error
            if not isinstance(record, Mapping):
                raise ValueError(f"{path}, line {number}: a JSON object was expected, not {type(record).__name__}")
            if missing := [field for field in required if field not in record]:
                raise ValueError(f"{path}, line {number}: no {', '.join(map(repr, missing))}")
            records.append(dict(record))
    if not records:
        raise ValueError(f"{path} is empty")
    return records


def _open(path: Path) -> IO[str]:
    if path.suffix == ".xz":
        return lzma.open(path, "rt", encoding="utf-8")
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")
