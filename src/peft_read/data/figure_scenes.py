"""Figures of seven pieces, as in KiloGram, with statements and questions about them."""

from __future__ import annotations

from typing import Any

import numpy as np

from .scene_facts import Facts, Random, pick
from .scene_tokens import SceneTokens, piece_tokens

__all__ = ["figure", "piece_facts"]

PIECES = {"1": "square", "2": "parallelogram", "3": "big triangle", "4": "big triangle"}
PIECES |= {"5": "middle triangle", "6": "small triangle", "7": "small triangle"}
_TRIANGLE = np.array(((0, 0), (2, 0), (0, 2)), dtype=float)
OUTLINES = {
    "1": np.array(((0, 0), (1, 0), (1, 1), (0, 1)), dtype=float),
    "2": np.array(((0, 0), (1, 0), (2, 1), (1, 1)), dtype=float),
    **{name: _TRIANGLE * scale for name, scale in zip("34567", (1, 1, 0.7071, 0.5, 0.5), strict=True)},
}
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "middle", "right")


def figure(rng: Random) -> tuple[Any, SceneTokens]:
    """Seven pieces, turned by multiples of 45 degrees and near each other; numbers are shuffled among the pieces."""
    spread = rng.uniform(1.0, 2.5, size=2)
    placed = {}
    for name, outline in OUTLINES.items():
        angle = rng.integers(8) * np.pi / 4
        turn = np.array(((np.cos(angle), -np.sin(angle)), (np.sin(angle), np.cos(angle))))
        placed[name] = (outline - outline.mean(0)) @ turn.T + rng.normal(size=2) * spread
    corners = np.concatenate(list(placed.values()))
    low, high = corners.min(0), corners.max(0)
    numbers = dict(zip(placed, rng.permutation(7) + 1, strict=True))
    pieces = {str(numbers[name]): piece.tolist() for name, piece in placed.items()}
    kinds = {str(numbers[name]): PIECES[name] for name in placed}
    centres = {str(numbers[name]): (piece.mean(0) - low) / (high - low).max() for name, piece in placed.items()}
    extent = (high - low) / (high - low).max()
    scene = {"kinds": kinds, "centres": centres, "extent": extent}
    return scene, piece_tokens(pieces, (*low, *(high - low)))


def _where(centre: np.ndarray, extent: np.ndarray) -> str:
    column, row = (min(2, int(3 * value / size)) for value, size in zip(centre, extent, strict=True))
    words = (ROWS[row], COLUMNS[column])
    return "middle" if words == ("middle", "middle") else " ".join(word for word in words if word != "middle")


def piece_facts(scene: Any, rng: Random) -> Facts:
    """Facts about the pieces of a figure, their places, and its outline."""
    kinds, centres = scene["kinds"], scene["centres"]
    number, other = (str(value + 1) for value in rng.permutation(7)[:2])
    where = _where(centres[number], scene["extent"])
    shape = "wide" if scene["extent"][1] < 0.8 else "tall" if scene["extent"][0] < 0.8 else "square"
    form = pick(rng, ("is", "where", "end", "whole"))
    if form == "is":
        said = pick(rng, (kinds[number], pick(rng, sorted(set(kinds.values())))))
        statement, holds = f"piece {number} is a {said}", said == kinds[number]
    elif form == "where":
        said = pick(rng, (where, pick(rng, ("top", "bottom", "top left", "bottom right", "left", "middle"))))
        statement, holds = f"piece {number} is at the {said}", said == where
    elif form == "end":
        highest = min(centres, key=lambda name: centres[name][1])
        said = pick(rng, (kinds[highest], pick(rng, sorted(set(kinds.values())))))
        statement, holds = f"a figure with a {said} at the top", said == kinds[highest]
    else:
        lowest = max(centres, key=lambda name: centres[name][1])
        said = pick(rng, (shape, pick(rng, ("wide", "tall", "square"))))
        statement, holds = f"a {said} figure standing on a {kinds[lowest]}", said == shape
    if rng.random() < 0.7:
        return Facts(statement, holds, f"what is piece {number}?", f"{kinds[number]} at the {where}")
    question = f"which is higher, piece {number} or piece {other}?"
    return Facts(statement, holds, question, min((number, other), key=lambda name: centres[name][1]))
