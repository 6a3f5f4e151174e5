"""Reads text and JSON files, plain or compressed; errors name the file and the line."""

from __future__ import annotations

import gzip
import json
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ..values import id_of, shown

if TYPE_CHECKING:
    from datasets import Dataset, Features

__all__ = [
    "Record",
    "dataset_of",
    "find_annotations",
    "iterate_jsonl",
    "iterate_members",
    "parse_json",
    "read_jsonl",
    "read_lines",
]

COMPRESSED = (".xz", ".gz")
CHUNK = 2000  # records that are Python objects at the same time


class Record(dict):
    """One JSON object of a file, with its place in the file.

    Args:
        fields: the object.
        place: file and line, or file and key.
    """

    def __init__(self, fields: Mapping[str, Any], place: str) -> None:
        super().__init__(fields)
        self.place = place

    def where(self, field: str) -> str:
        """The beginning of every message about a field."""
        return f"{self.place}: {field!r}"

    def text(self, field: str) -> str:
        """A field that must be a non-empty string.

        Raises:
            ValueError: it is not a string, is blank, or cannot be encoded.
        """
        value = self.get(field)
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{self.where(field)} must be a non-empty string, not {shown(value)}")
        return encodable(value, self.where(field))


def encodable(text: str, where: str) -> str:
    """The text unchanged; lone surrogates, which can be neither stored nor tokenised, are refused.

    Raises:
        ValueError: it holds a lone surrogate.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} is not valid Unicode: {shown(text)} (character {error.start})") from error
    return text


def find_annotations(path: str | Path) -> Path:
    """The file itself, or the same with `.xz` or `.gz` appended to its name.

    Raises:
        FileNotFoundError: none of them exists; the message lists what the folder holds.
    """
    path = Path(path)
    for candidate in (path, *(path.with_name(path.name + suffix) for suffix in COMPRESSED if path.name)):
        if candidate.is_file():
            return candidate
    others = sorted(file.name for file in path.parent.glob("*.json*")) if path.parent.is_dir() else []
    what = "is not a regular file" if path.exists() else "does not exist (nor with .xz or .gz)"
    raise FileNotFoundError(f"{path} {what}; annotations in its folder: {others or 'none'}")


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Line numbers and lines of a UTF-8 file, without line ends and without a byte-order mark; one at a time.

    Raises:
        ValueError: another encoding (by line), or a compressed file that is truncated or invalid.
    """
    try:
        with _open(path) as file:
            for number, raw in enumerate(file, start=1):
                yield number, _decoded(raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw, path, number)
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is truncated, or not a {path.suffix} file: {error}") from error


def _decoded(raw: bytes, path: Path, number: int) -> str:
    if b"\0" in raw:
        raise ValueError(f"{path}, line {number}: a NUL byte; the file is not UTF-8 text (UTF-16, or binary?)")
    try:
        return raw.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}, line {number}: not UTF-8 (byte {raw[error.start]:#04x} at position {error.start}); convert it"
        ) from error


def iterate_members(path: str | Path) -> Iterator[tuple[str, Record]]:
    """The members of a file with one JSON object of objects, {id: {...}}; one at a time, for large files.

    Raises:
        ValueError: by file and line: it is not such a file, or an id appears twice.
    """
    path = find_annotations(path)
    text = "\n".join(line for _, line in read_lines(path))
    position, line, counted = _skip(text, 0), 1, 0
    if text[position : position + 1] != "{":
        raise ValueError(f"{path}: a JSON object {{id: {{...}}}} was expected, not {shown(text[position:][:20])}")
    position, closed = _skip(text, position + 1), False
    seen: set[str] = set()
    while position < len(text) and not closed:
        line, counted = line + text.count("\n", counted, position), position
        if text[position] == "}" and not seen:
            break
        place = f"{path}, line {line}"
        key, position = _parsed(text, position, place)
        position = _skip(text, position)
        if not isinstance(key, str) or text[position : position + 1] != ":":
            raise ValueError(f"{place}: invalid JSON: a string and ':' were expected")
        fields, position = _parsed(text, _skip(text, position + 1), place)
        if key in seen:
            raise ValueError(f"{place}: {key!r} appears twice")
        seen.add(key)
        if not isinstance(fields, dict):
            raise ValueError(f"{place}: {key!r} must be a JSON object, not {shown(fields)}")
        yield id_of(key, place), Record(fields, f"{place}, {key!r}")
        position = _skip(text, position)
        if text[position : position + 1] not in (",", "}"):
            raise ValueError(f"{place}: invalid JSON: ',' or '}}' was expected after {key!r}; is the file cut off?")
        closed = text[position] == "}"
        position = _skip(text, position + 1)
    if not seen:
        raise ValueError(f"{path} is empty")
    if not closed or position < len(text):
        raise ValueError(f"{path}: invalid JSON: {'text after the object' if closed else 'it is cut off'}")


_SPACE = re.compile(r"[ \t\r\n]*")


def _skip(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} appears twice in one object")
    return fields


_decoder = json.JSONDecoder(object_pairs_hook=_unique)


def _parsed(text: str, position: int, place: str) -> tuple[Any, int]:
    """A JSON value and where it ends."""
    try:
        return _decoder.raw_decode(text, position)
    except RecursionError as error:
        raise ValueError(f"{place}: JSON that cannot be read: it is nested too deeply") from error
    except ValueError as error:  # invalid JSON, or a number of thousands of digits
        raise ValueError(f"{place}: invalid JSON: {getattr(error, 'msg', error)}") from error


def parse_json(text: str, place: str) -> Any:
    """One JSON value and nothing else.

    Raises:
        ValueError: invalid JSON, text after it, or a field that appears twice in one object.
    """
    value, end = _parsed(text, _skip(text, 0), place)
    if _skip(text, end) < len(text):
        raise ValueError(f"{place}: invalid JSON: text after the value")
    return value


def read_jsonl(path: str | Path, *, required: Iterable[str] = ()) -> list[Record]:
    """The records of a file with one JSON object per line; empty lines are left out.

    Args:
        path: `.jsonl`, also with `.xz` or `.gz`.
        required: fields that every record must have.

    Raises:
        ValueError: a line that is not a JSON object or lacks a field, or an empty file.
    """
    return list(iterate_jsonl(path, required=required))


def iterate_jsonl(path: str | Path, *, required: Iterable[str] = ()) -> Iterator[Record]:
    """As `read_jsonl`, one record at a time."""
    path, required = find_annotations(path), list(required)
    has_records = False
    for number, line in read_lines(path):
        if not line.strip():
            continue
        has_records, place = True, f"{path}, line {number}"
        record, end = _parsed(line, _skip(line, 0), place)
        if _skip(line, end) < len(line):
            raise ValueError(f"{place}: invalid JSON: text after the object")
        if not isinstance(record, dict):
            raise ValueError(f"{place}: a JSON object was expected, not {type(record).__name__}")
        if missing := [field for field in required if field not in record]:
            raise ValueError(f"{place}: no {', '.join(map(repr, missing))}")
        yield Record(record, place)
    if not has_records:
        raise ValueError(f"{path} is empty")


def dataset_of(rows: Iterable[dict[str, Any]], features: Features) -> Dataset:
    """A dataset built from rows `CHUNK` at a time, so that not all of them are Python objects at once.

    The rows hold plain Python numbers and lists of the types in `features`, so they need no encoding.
    """
    import pyarrow
    from datasets import Dataset, concatenate_datasets
    from datasets.table import InMemoryTable

    iterator = iter(rows)
    parts = []
    while chunk := list(islice(iterator, CHUNK)):
        parts.append(Dataset(InMemoryTable(pyarrow.Table.from_pylist(chunk, schema=features.arrow_schema))))
    return concatenate_datasets(parts) if len(parts) > 1 else (parts or [Dataset.from_list([], features=features)])[0]


def _open(path: Path) -> IO[bytes]:
    if path.suffix == ".xz":
        return lzma.open(path, "rb")
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    return path.open("rb")
