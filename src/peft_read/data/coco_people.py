"""The people in COCO's images as boxes and key points, with the captions of the images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..values import count, id_of, shown, table
from .jsonl import Record, iterate_jsonl
from .vl_examples import TASK_PROMPTS, ExampleReader
from .vl_images import caption_rows, captions_of

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["load_coco_people"]

KEY_POINTS = 17
TOLERANCE = 1e-3  # boxes and key points are rounded, and may end a little outside


def load_coco_people(
    annotations: str | Path,
    *,
    each: str = "caption",
    require_people: bool = True,
    prompt: str = TASK_PROMPTS["caption"],
) -> Dataset:
    """Captions of images with annotated people.

    Source: Lin et al., "Microsoft COCO", ECCV 2014; its captions and key points, joined by image.

    Args:
        annotations: an object per line with `image_id`, `width`, `height`, `captions`, and `people`, a list of
            {"box_cxcywh" in fractions of the image, "keypoints" 17 x [x, y, visibility 0, 1 or 2]}, or null.
        each: one row per "caption" (with a target), or per "image" (with references only).
        require_people: leave out the images without persons; else their `people` is empty.
        prompt: the whole text of the input.

    Returns:
        A dataset with the columns of `example`, and `width`, `height`, `people`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: by file, line and field, a field that is missing, duplicate or invalid, boxes outside the
            image included.
    """
    from datasets import List as ListOf
    from datasets import Value

    if each not in ("caption", "image"):
        raise ValueError(f"each must be 'caption' or 'image', not {each!r}")
    real = Value("float64")
    person = {"box_cxcywh": ListOf(real), "keypoints": ListOf(ListOf(real))}
    return ExampleReader.dataset(
        _rows(annotations, each, require_people, prompt),
        width=Value("int64"),
        height=Value("int64"),
        people=ListOf(person),
    )


def _rows(annotations: str | Path, each: str, require_people: bool, prompt: str) -> Iterator[dict[str, Any]]:
    reader = ExampleReader("image")
    for record in iterate_jsonl(annotations, required=("image_id", "width", "height", "captions", "people")):
        image = reader.new(id_of(record["image_id"], record.where("image_id")), record.place)
        people = record["people"] or []
        if not isinstance(people, list):
            raise ValueError(f"{record.where('people')} must be a list of persons or null, not {shown(people)}")
        more = {name: count(record[name], record.where(name)) for name in ("width", "height")}
        captions = captions_of(record, "captions", record["captions"])
        checked = [_person(one, record, position) for position, one in enumerate(people)]
        if checked or not require_people:
            yield from caption_rows(
                "coco_people", image, captions, each=each, prompt=prompt, visuals=[image], people=checked, **more
            )


def _person(person: Any, record: Record, position: int) -> dict[str, Any]:
    where = f"{record.where('people')}: person {position}"
    if not isinstance(person, dict):
        raise ValueError(f"{where} must be an object, not {shown(person)}")
    box = table(person.get("box_cxcywh"), f"{where}: 'box_cxcywh'", low=0, high=1)
    if len(box) != 4 or not (box[2:] > 0).all():
        raise ValueError(f"{where}: 'box_cxcywh' must be [x, y, width, height], not {shown(person.get('box_cxcywh'))}")
    if (box[:2] - box[2:] / 2 < -TOLERANCE).any() or (box[:2] + box[2:] / 2 > 1 + TOLERANCE).any():
        raise ValueError(f"{where}: 'box_cxcywh' ends outside the image: {shown(person['box_cxcywh'])}")
    points = table(person.get("keypoints"), f"{where}: 'keypoints'", columns=3, low=-TOLERANCE, high=2)
    if len(points) != KEY_POINTS or (points[:, :2] > 1 + TOLERANCE).any() or not set(points[:, 2]) <= {0.0, 1.0, 2.0}:
        raise ValueError(
            f"{where}: 'keypoints' must be {KEY_POINTS} rows x, y in the image, visibility 0, 1 or 2, not "
            f"{shown(person['keypoints'])}"
        )
    return {"box_cxcywh": box.tolist(), "keypoints": points.tolist()}
