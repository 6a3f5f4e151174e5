"""Statements, questions and answers about VL-mini's scenes of any kind, and numbers in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["NUMBERS", "Facts", "Random", "about", "pick"]

NUMBERS = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
Random = np.random.Generator


@dataclass(frozen=True)
class Facts:
    """What can be said of one scene: a statement that may be true or not, a question with its answer."""

    statement: str
    holds: bool
    question: str
    answer: str


def pick(rng: Random, choices: Sequence[Any]) -> Any:
    """One of the choices, each with the same probability."""
    return choices[int(rng.integers(len(choices)))]


def about(rng: Random, true_number: int) -> int:
    """A number near the true one."""
    return max(0, true_number + int(rng.choice((-1, 0, 0, 0, 1, 2))))
