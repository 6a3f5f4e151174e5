"""Scenes of coloured shapes in three boxes, as in NLVR: scattered or in towers, with statements and questions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from .scene_facts import NUMBERS, Facts, Random, about, pick
from .scene_tokens import COLOURS, TYPES, SceneTokens, shape_tokens

__all__ = ["SCATTERED_TOPICS", "TOWER_TOPICS", "scattered", "towers"]

COLOUR_WORDS = dict(zip(COLOURS, ("yellow", "black", "blue"), strict=True))
SIZE_WORDS = {10: "small", 20: "medium", 30: "big"}

Scene = list[list[dict[str, Any]]]  # three boxes of objects


def scattered(rng: Random) -> tuple[Scene, SceneTokens]:
    """One to seven objects per box, which do not overlap; a third of them stand at an edge."""
    scene: Scene = []
    for _ in range(3):
        palette = pick(rng, (COLOURS, COLOURS, COLOURS[:2], COLOURS[1:], COLOURS[:1]))
        objects: list[dict[str, Any]] = []
        for _ in range(int(rng.integers(1, 8))):
            size = int(rng.choice((10, 20, 30), p=(0.3, 0.5, 0.2)))
            place = rng.integers(0, 101 - size, size=2)
            if rng.random() < 0.35:
                place[int(rng.integers(2))] = pick(rng, (0, 100 - size))
            new = {"x_loc": int(place[0]), "y_loc": int(place[1]), "size": size}
            new |= {"type": pick(rng, TYPES), "color": pick(rng, palette)}
            if not any(_overlap(new, other) for other in objects):
                objects.append(new)
        scene.append(objects)
    return scene, shape_tokens(scene)


def _overlap(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(a[axis] < b[axis] + b["size"] and b[axis] < a[axis] + a["size"] for axis in ("x_loc", "y_loc"))


def towers(rng: Random) -> tuple[Scene, SceneTokens]:
    """A tower of one to four blocks in each box; the first block is the base."""
    scene = [
        [
            {"x_loc": 40, "y_loc": 80 - 21 * level, "size": 20, "type": "square", "color": pick(rng, COLOURS)}
            for level in range(int(rng.integers(1, 5)))
        ]
        for _ in range(3)
    ]
    return scene, shape_tokens(scene)


@dataclass(frozen=True)
class Kind:
    """A description of objects: None matches every colour, type or size."""

    colour: str | None
    type: str | None
    size: int | None = None

    def matches(self, item: dict[str, Any]) -> bool:
        """Whether an object fits the description."""
        wanted = {"color": self.colour, "type": self.type, "size": self.size}
        return all(value is None or item[key] == value for key, value in wanted.items())

    def among(self, objects: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The objects of this sort."""
        return [item for item in objects if self.matches(item)]

    def words(self, rng: Random, plural: bool = False) -> str:
        """Such as "small black circle"; what has no type is an item, an object or a shape."""
        noun = self.type or pick(rng, ("item", "object", "item"))
        parts = [SIZE_WORDS.get(self.size or 0, ""), COLOUR_WORDS.get(self.colour or "", ""), noun + "s" * plural]
        return " ".join(filter(None, parts))

    def one(self, rng: Random) -> str:
        """The same with its article."""
        words = self.words(rng)
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _kind(rng: Random) -> Kind:
    colour = pick(rng, COLOURS) if rng.random() < 0.75 else None
    type_ = pick(rng, TYPES) if rng.random() < (0.45 if colour else 0.8) else None
    return Kind(colour, type_, pick(rng, (10, 20, 30)) if rng.random() < 0.1 else None)


def _amount(rng: Random, number: int) -> str:
    """Words for "this many"."""
    if number == 0:
        return "no"
    word = pick(rng, (NUMBERS[number], str(number)))
    return f"{pick(rng, ('exactly', 'at least', 'at most', 'only', ''))} {word}".strip()


def _fits(words: str, number: int, true_number: int) -> bool:
    """Whether the words of `_amount` are true of the actual number; a bare number means "at least"."""
    if number == 0 or words.startswith(("exactly", "only")):
        return true_number == number
    return true_number <= number if words.startswith("at most") else true_number >= number


def _there(number: int) -> str:
    return "there is" if number == 1 else "there are"


def _counting(scene: Scene, rng: Random) -> Facts:
    kind = _kind(rng)
    everything = [item for box in scene for item in box]
    per_box = [len(kind.among(box)) for box in scene]
    if rng.random() < 0.4:  # over all boxes
        true = len(kind.among(everything))
        number = about(rng, min(true, 8))
        words = _amount(rng, number)
        holds = _fits(words, number, true)
        statement = f"{_there(number)} {words} {kind.words(rng, number != 1)}"
    else:
        number = about(rng, min(int(pick(rng, per_box)), 6))
        words = _amount(rng, number)
        fits_here = [_fits(words, number, here) for here in per_box]
        noun = kind.words(rng, number != 1)
        form = pick(rng, ("there is a box with", "each box contains", "every grey box has", "boxes"))
        if form == "boxes":
            boxes = about(rng, min(sum(fits_here), 2)) or 1
            statement = (
                f"there {'is' if boxes == 1 else 'are'} {NUMBERS[boxes]} box{'es' * (boxes > 1)} with {words} {noun}"
            )
            holds = sum(fits_here) >= boxes
        else:
            statement = f"{form} {words} {noun}"
            holds = any(fits_here) if form.startswith("there") else all(fits_here)
    if rng.random() < 0.7:
        question, answer = f"how many {kind.words(rng, True)} are there?", str(len(kind.among(everything)))
    else:
        question = f"how many boxes contain {kind.one(rng)}?"
        answer = str(sum(here > 0 for here in per_box))
    return Facts(statement, holds, question, answer)


def _comparing(scene: Scene, rng: Random) -> Facts:
    everything = [item for box in scene for item in box]
    colours = Counter(item["color"] for item in everything)
    first, second = rng.permutation(len(COLOURS))[:2]
    a, b = COLOURS[first], COLOURS[second]
    where, chosen = ("", everything) if rng.random() < 0.5 else _box_of(scene, rng)
    n_a, n_b = (len(Kind(colour, None).among(chosen)) for colour in (a, b))
    form = pick(rng, ("more", "same", "all", "different"))
    if form == "more":
        statement, holds = f"there are more {COLOUR_WORDS[a]} items than {COLOUR_WORDS[b]} items{where}", n_a > n_b
    elif form == "same":
        statement = "there is a box with all items of the same colour"
        holds = any(len({item["color"] for item in box}) == 1 for box in scene)
    elif form == "all":
        kind = Kind(None, pick(rng, TYPES))
        of_type = kind.among(everything)
        statement = f"all {kind.words(rng, True)} are {COLOUR_WORDS[a]}"
        holds = bool(of_type) and all(item["color"] == a for item in of_type)
    else:
        number = int(rng.integers(1, 4))
        colour = "only one colour" if number == 1 else f"{NUMBERS[number]} different colours"
        statement = f"there is a box with items of {colour}"
        holds = any(len({item["color"] for item in box}) == number for box in scene)
    if rng.random() < 0.5:
        best = max(colours.values())
        common = sorted(COLOUR_WORDS[colour] for colour, number in colours.items() if number == best)
        return Facts(statement, holds, "which colour is the most common?", " and ".join(common))
    difference = abs(colours[a] - colours[b])
    question = f"what is the difference between the numbers of {COLOUR_WORDS[a]} and {COLOUR_WORDS[b]} items?"
    return Facts(statement, holds, question, str(difference))


def _box_of(scene: Scene, rng: Random) -> tuple[str, list[dict[str, Any]]]:
    """The fullest or the emptiest box, where there is one."""
    sizes = [len(box) for box in scene]
    for word, size in (("most", max(sizes)), ("fewest", min(sizes))):
        if sizes.count(size) == 1 and rng.random() < 0.7:
            return f" in the box with the {word} items", scene[sizes.index(size)]
    return "", [item for box in scene for item in box]


def _relations(scene: Scene, rng: Random) -> Facts:
    kind, other = _kind(rng), _kind(rng)
    word, before = pick(
        rng,
        (
            ("above", lambda a, b: a["y_loc"] + a["size"] <= b["y_loc"]),
            ("below", lambda a, b: b["y_loc"] + b["size"] <= a["y_loc"]),
            ("left of", lambda a, b: a["x_loc"] + a["size"] <= b["x_loc"]),
            ("right of", lambda a, b: b["x_loc"] + b["size"] <= a["x_loc"]),
        ),
    )
    related = [any(before(a, b) for a in kind.among(box) for b in other.among(box) if a is not b) for box in scene]
    statement = f"there is {kind.one(rng)} {word} {other.one(rng)}"
    top = min((item for box in scene for item in box), key=lambda item: item["y_loc"])
    highest = [item for box in scene for item in box if item["y_loc"] == top["y_loc"]]
    if len({item["color"] for item in highest}) == 1 and rng.random() < 0.5:
        return Facts(statement, any(related), "what colour is the highest item?", COLOUR_WORDS[top["color"]])
    question = f"in how many boxes is {kind.one(rng)} {word} {other.one(rng)}?"
    return Facts(statement, any(related), question, str(sum(related)))


def _touches(item: dict[str, Any]) -> tuple[bool, bool]:
    """Whether an object touches an edge of its box, and whether it touches a corner."""
    at = [item[axis] <= 1 or item[axis] + item["size"] >= 99 for axis in ("x_loc", "y_loc")]
    return any(at), all(at)


def _edges(scene: Scene, rng: Random) -> Facts:
    kind = _kind(rng)
    chosen = [item for box in scene for item in kind.among(box)]
    part = pick(rng, ("edge", "wall", "side", "corner"))
    touching = [item for item in chosen if _touches(item)[part == "corner"]]
    negated = rng.random() < 0.25
    true = len(chosen) - len(touching) if negated else len(touching)
    if rng.random() < 0.3:
        statement = f"there is {kind.one(rng)} {'not ' * negated}touching the {part}"
        holds = true >= 1
    elif rng.random() < 0.2:
        statement = f"all {kind.words(rng, True)} are {'not ' * negated}touching the {part}"
        holds = bool(chosen) and true == len(chosen)
    else:
        number = about(rng, min(true, 6))
        words = _amount(rng, number)
        holds = _fits(words, number, true)
        touching_part = f"{pick(rng, ('', '', 'closely '))}touching the {part}"
        noun = kind.words(rng, number != 1)
        statement = f"{_there(number)} {words} {noun} {'not ' * negated}{touching_part}"
    question = f"how many {kind.words(rng, True)} are touching the {part}?"
    return Facts(statement, holds, question, str(len(touching)))


def _tower_facts(scene: Scene, rng: Random) -> Facts:
    heights = [len(tower) for tower in scene]
    colour = pick(rng, COLOURS)
    word = COLOUR_WORDS[colour]
    place = pick(rng, ("top", "base"))
    ends = [tower[-1 if place == "top" else 0]["color"] for tower in scene]
    form = pick(rng, ("height", "end", "colour", "over", "total"))
    amount, at = int(rng.integers(1, 4)), f"at the {place}"
    if form == "height":
        height = int(pick(rng, heights)) if rng.random() < 0.6 else int(rng.integers(1, 5))
        words = _amount(rng, height)
        fits = [_fits(words, height, here) for here in heights]
        statement, holds = f"there is a tower with {words} block{'s' * (height > 1)}", any(fits)
    elif form == "end":
        words = _amount(rng, amount)
        holds = _fits(words, amount, ends.count(colour))
        statement = f"{_there(amount)} {words} tower{'s' * (amount > 1)} with a {word} block {at}"
    elif form == "colour":
        words = _amount(rng, amount)
        fits = [_fits(words, amount, len(Kind(colour, None).among(tower))) for tower in scene]
        statement, holds = f"there is a tower with {words} {word} block{'s' * (amount > 1)}", any(fits)
    elif form == "over":
        below = pick(rng, COLOURS)
        over = [any(a["color"] == below and b["color"] == colour for a, b in pairwise(tower)) for tower in scene]
        statement = f"there is a tower with a {word} block over a {COLOUR_WORDS[below]} block"
        holds = any(over)
    else:
        true = sum(len(Kind(colour, None).among(tower)) for tower in scene)
        number = about(rng, true)
        words = _amount(rng, number)
        holds = _fits(words, number, true)
        statement = f"{_there(number)} {words} {word} block{'s' * (number != 1)}"
    if rng.random() < 0.5:
        question, answer = f"how many towers have a {word} block {at}?", str(ends.count(colour))
    else:
        question, answer = "how many blocks has the highest tower?", str(max(heights))
    return Facts(statement, holds, question, answer)


SCATTERED_TOPICS = {"counting": _counting, "comparing": _comparing, "relations": _relations, "edges": _edges}
TOWER_TOPICS = {"towers": _tower_facts}
