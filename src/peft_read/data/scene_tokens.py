"""Visual tokens of scenes that are given as objects: shapes in boxes, the pieces of a tangram, people with key points.

The three kinds share one layout of features, so that one backbone reads them all. A token has `SCENE_FEATURE_DIM` = 71
numbers: three that name the kind, then a part for each kind, zero in the tokens of the others.

* shape: type (3), colour (3), size
* piece: four corners relative to the centre (8), size, direction of the longest side
* person: 17 key points relative to the box: x, y, and whether it is seen (51)

Boxes are (x1, y1, x2, y2) in fractions of the picture, cut at its border.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

__all__ = ["SCENE_FEATURE_DIM", "SceneTokens", "people_tokens", "piece_tokens", "shape_tokens"]

TYPES = ("triangle", "circle", "square")
COLOURS = ("Yellow", "Black", "#0099ff")
KEY_POINTS = 17
SHAPE, PIECE, PERSON = 3, 10, 20  # where the parts begin
SCENE_FEATURE_DIM = PERSON + 3 * KEY_POINTS
PICTURE_SIDE = 100  # of one box of shapes, in the unit of its coordinates


class SceneTokens(NamedTuple):
    """The visual input of one example.

    Args:
        features: (V, 71) float32.
        boxes: (V, 4) float32, each x1, y1, x2, y2 in [0, 1].
        image_ids: (V,) int64, the picture each token belongs to.
    """

    features: np.ndarray
    boxes: np.ndarray
    image_ids: np.ndarray


def shape_tokens(pictures: Sequence[Sequence[Mapping[str, Any]]]) -> SceneTokens:
    """Tokens of shapes in boxes, as NLVR gives them: a token per object, the box it lies in as its picture.

    Args:
        pictures: for each box its objects, with `x_loc`, `y_loc`, `size` (in hundredths of the box), `type`, `color`.

    Raises:
        ValueError: an unknown type or colour, or no object at all.
    """
    rows, boxes, image_ids = [], [], []
    for index, picture in enumerate(pictures):
        for item in picture:
            row = _row(0)
            row[SHAPE + _index(TYPES, item, "type")] = 1
            row[SHAPE + 3 + _index(COLOURS, item, "color")] = 1
            row[SHAPE + 6] = item["size"] / 30  # the largest size
            rows.append(row)
            corner = np.array((item["x_loc"], item["y_loc"]), dtype=np.float32)
            boxes.append(np.concatenate((corner, corner + item["size"])) / PICTURE_SIDE)
            image_ids.append(index)
    return _tokens(rows, boxes, image_ids)


def piece_tokens(pieces: Mapping[str, Sequence[Sequence[float]]], viewbox: Sequence[float]) -> SceneTokens:
    """Tokens of a tangram, as KiloGram gives it: a token per piece, in the order of the pieces' numbers.

    Args:
        pieces: by number, the corners (x, y) of each polygon, at most four.
        viewbox: x, y, width and height of the picture, in the unit of the corners.

    Raises:
        ValueError: a polygon with more than four corners or fewer than three.
    """
    left, top, width, height = viewbox
    side = max(width, height)
    rows, boxes = [], []
    for name in sorted(pieces, key=int):
        corners = np.asarray(pieces[name], dtype=np.float32).reshape(-1, 2)
        if not 3 <= len(corners) <= 4:
            raise ValueError(f"piece {name!r} has {len(corners)} corners; a piece of a tangram has three or four")
        placed = (corners - (left, top)) / side
        sides = np.roll(placed, -1, axis=0) - placed
        longest = sides[np.argmax((sides**2).sum(1))]
        row = _row(1)
        row[PIECE : PIECE + 2 * len(corners)] = 4 * (placed - placed.mean(0)).ravel()
        row[PIECE + 8] = 4 * np.sqrt(_area(placed))
        row[PIECE + 9] = (np.arctan2(longest[1], longest[0]) % np.pi) / np.pi
        rows.append(row)
        boxes.append(np.concatenate((placed.min(0), placed.max(0))))
    return _tokens(rows, boxes, [0] * len(rows))


def people_tokens(people: Sequence[Mapping[str, Any]]) -> SceneTokens:
    """Tokens of people, as COCO's key points give them: a token per person.

    Args:
        people: for each person `box_cxcywh`, in fractions of the picture, and 17 `keypoints` (x, y, visibility 0, 1
            or 2).

    Raises:
        ValueError: another number of key points, or no person.
    """
    rows, boxes = [], []
    for person in people:
        points = np.asarray(person["keypoints"], dtype=np.float32)
        if points.shape != (KEY_POINTS, 3):
            raise ValueError(
                f"key points have the shape {points.shape}, a person has {KEY_POINTS} of x, y, visibility"
            )
        x, y, width, height = person["box_cxcywh"]
        seen = points[:, 2] > 0
        relative = (points[:, :2] - (x, y)) / np.maximum((width, height), 1e-6)
        row = _row(2)
        row[PERSON:] = np.concatenate((2 * relative * seen[:, None], seen[:, None]), axis=1).ravel()
        rows.append(row)
        boxes.append(np.array((x - width / 2, y - height / 2, x + width / 2, y + height / 2), dtype=np.float32))
    return _tokens(rows, boxes, [0] * len(rows))


def _row(kind: int) -> np.ndarray:
    row = np.zeros(SCENE_FEATURE_DIM, dtype=np.float32)
    row[kind] = 1
    return row


def _index(known: Sequence[str], item: Mapping[str, Any], key: str) -> int:
    if item[key] not in known:
        raise ValueError(f"{key} {item[key]!r} of an object is not one of {known}")
    return known.index(item[key])


def _area(corners: np.ndarray) -> float:
    """The area of a polygon (N, 2), by the shoelace formula."""
    x, y = corners.T
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


def _tokens(rows: list[np.ndarray], boxes: list[np.ndarray], image_ids: list[int]) -> SceneTokens:
    if not rows:
        raise ValueError("a scene without objects has no visual tokens")
    placed = np.stack(boxes).astype(np.float32).clip(0, 1)
    return SceneTokens(np.stack(rows).astype(np.float32), placed, np.array(image_ids, dtype=np.int64))
