"""KiloGram: what people see in tangrams, as a whole and piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..values import shown, table
from .jsonl import Record, iterate_jsonl
from .vl_examples import ExampleReader, example

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["load_kilogram_captions", "load_kilogram_parts"]

PIECES = tuple("1234567")
UNNAMED = "UNKNOWN"  # stands for the name of a piece that an annotator left out
Shape = dict[str, Any]


def load_kilogram_captions(
    annotations: str | Path, shapes: str | Path, *, each: str = "annotation", prompt: str = "caption: "
) -> Dataset:
    """What a tangram looks like.

    Source: Ji et al., "Abstract Visual Reasoning with Tangram Shapes", EMNLP 2022.

    Args:
        annotations: an object per line with `tangram`, `whole`, `set`, and `part` {piece: name} or `part_names`.
        shapes: an object per line with `tangram`, `viewbox` [x, y, width, height], `pieces` {number: [[x, y], ...]}.
        each: one row per "annotation" (with a target), or per "shape" (with references only).
        prompt: the whole text of the input.

    Returns:
        A dataset with the columns of `example`: `answers` every description of the tangram, `group` the set; and
        `pieces` {"1" ... "7": corners}, `viewbox`. Pieces may reach outside the view box, as they do in the drawings.

    Raises:
        FileNotFoundError: no such file.
        ValueError: by file, line and field, a field that is missing, duplicate or invalid; a tangram without
            a shape.
    """
    rows = _captions(*_read(annotations, shapes, each), each, prompt)
    return ExampleReader.dataset(rows, **_columns())


def load_kilogram_parts(
    annotations: str | Path, shapes: str | Path, *, each: str = "annotation", prompt: str = "part: "
) -> Dataset:
    """What a piece of a tangram is: "what is piece k?", of the annotations that name pieces by number.

    Args:
        annotations: see `load_kilogram_captions`; the lines with `part_names` only are left out.
        shapes: see `load_kilogram_captions`.
        each: one row per piece of each "annotation" (with a target), or per piece of each "shape" (with the names
            from all annotators).
        prompt: before the question.

    Returns:
        As `load_kilogram_captions`; `answers` holds a name per annotator. Pieces that an annotator left without a name
        ("UNKNOWN") are left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: as `load_kilogram_captions`, or no annotation names pieces by number.
    """
    records, drawn = _read(annotations, shapes, each)
    named = {name: [record for record in of_tangram if "part" in record] for name, of_tangram in records.items()}
    named = {name: of_tangram for name, of_tangram in named.items() if of_tangram}
    if not named:
        raise ValueError(
            f"{annotations} names no piece by its number ('part'); take one that does, such as the dense set"
        )
    return ExampleReader.dataset(_parts(named, drawn, each, prompt), **_columns())


def _columns() -> dict[str, Any]:
    from datasets import List as ListOf
    from datasets import Value

    real = Value("float64")
    return {"pieces": {name: ListOf(ListOf(real)) for name in PIECES}, "viewbox": ListOf(real)}


def _read(annotations: str | Path, shapes: str | Path, each: str) -> tuple[dict[str, list[Record]], dict[str, Shape]]:
    if each not in ("annotation", "shape"):
        raise ValueError(f"each must be 'annotation' or 'shape', not {each!r}")
    reader, drawn = ExampleReader("tangram"), {}
    for record in iterate_jsonl(shapes, required=("tangram", "viewbox", "pieces")):
        drawn[reader.key(record, "tangram")] = _shape(record)
    records: dict[str, list[Record]] = {}
    for record in iterate_jsonl(annotations, required=("tangram", "whole")):
        name = record.text("tangram")
        if name not in drawn:
            raise ValueError(f"{record.where('tangram')}: {name!r} has no shape in {shapes}")
        record.text("whole")
        if "part" in record:
            _check_parts(record)
        records.setdefault(name, []).append(record)
    return records, drawn


def _shape(record: Record) -> Shape:
    viewbox = table(record["viewbox"], record.where("viewbox"))
    if len(viewbox) != 4 or not (viewbox[2:] > 0).all():
        raise ValueError(f"{record.where('viewbox')} must be [x, y, width, height], not {shown(record['viewbox'])}")
    given = record["pieces"]
    if not isinstance(given, dict) or sorted(given) != list(PIECES):
        names = sorted(given) if isinstance(given, dict) else given
        raise ValueError(f"{record.where('pieces')} must be the pieces 1 to 7, not {shown(names)}")
    pieces = {name: _corners(given[name], f"{record.where('pieces')}: piece {name}") for name in PIECES}
    return {"pieces": pieces, "viewbox": viewbox.tolist()}


def _corners(corners: Any, where: str) -> list[list[float]]:
    # A few of the published drawings give x and y of a corner as two entries instead of one pair.
    flat = table(corners, where, columns=0)
    if flat.shape[1] not in (1, 2) or flat.size % 2 or flat.size < 6:
        raise ValueError(f"{where} must be at least three corners [x, y], not {shown(corners)}")
    return flat.reshape(-1, 2).tolist()


def _check_parts(record: Record) -> None:
    parts = record["part"]
    if not isinstance(parts, dict) or not parts or set(parts) - set(PIECES):
        raise ValueError(f"{record.where('part')} must be names of the pieces 1 to 7, not {shown(parts)}")
    for piece in parts:
        Record(parts, f"{record.where('part')}").text(piece)


def _group(record: Record) -> str | None:
    return record.text("set") if "set" in record else None


def _captions(
    records: dict[str, list[Record]], drawn: dict[str, Shape], each: str, prompt: str
) -> Iterator[dict[str, Any]]:
    for name, of_tangram in records.items():
        captions = [record["whole"].strip() for record in of_tangram]
        row: dict[str, Any] = {"sentence": "", "text": prompt, "visuals": [name], "answers": captions, **drawn[name]}
        if each == "shape":
            yield example("kilogram_caption", name, group=_group(of_tangram[0]), **row)
            continue
        for position, (record, caption) in enumerate(zip(of_tangram, captions, strict=True)):
            yield example("kilogram_caption", f"{name}#{position}", target=caption, group=_group(record), **row)


def _parts(
    records: dict[str, list[Record]], drawn: dict[str, Shape], each: str, prompt: str
) -> Iterator[dict[str, Any]]:
    for name, of_tangram in records.items():
        for piece in PIECES:
            named = [
                (position, record)
                for position, record in enumerate(of_tangram)
                if record["part"].get(piece, UNNAMED) != UNNAMED
            ]
            answers = [record["part"][piece].strip() for _, record in named]
            question = f"what is piece {piece}?"
            row: dict[str, Any] = {
                "sentence": question,
                "text": f"{prompt}{question}",
                "visuals": [name],
                "answers": answers,
                **drawn[name],
            }
            if each == "shape" and named:
                yield example("kilogram_part", f"{name}/{piece}", group=_group(named[0][1]), **row)
            elif each == "annotation":
                for (position, record), answer in zip(named, answers, strict=True):
                    key = f"{name}/{piece}#{position}"
                    yield example("kilogram_part", key, target=answer, group=_group(record), **row)
