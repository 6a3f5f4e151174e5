"""VL-mini: generated scenes of objects with boxes in three task forms, whose answers can be computed.

A scene is of one of three kinds, in the format of a real set: three boxes of coloured **shapes** (as in NLVR), a
figure of seven **pieces** (as in KiloGram), or **people** with key points (as in COCO). To each scene belong

* `verify`: a statement about it, and whether it is "true" or "false" (half and half);
* `ask`: a question, and its answer in a few words;
* `describe`: nothing but the prompt, and a true statement.

Statements belong to a *topic*: counting, comparing, relations, edges, towers; pieces; people. A backbone can be
pretrained on all topics but one and adapted to that one. Everything is drawn from one seed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from ..values import count
from .scene_tokens import COLOURS, TYPES, SceneTokens, people_tokens, piece_tokens, shape_tokens

__all__ = ["VL_MINI_TASKS", "VL_MINI_TOPICS", "VLMiniExample", "generate_vl_mini"]

VL_MINI_TASKS = ("verify", "ask", "describe")
COLOUR_WORDS = dict(zip(COLOURS, ("yellow", "black", "blue"), strict=True))
SIZE_WORDS = {10: "small", 20: "medium", 30: "big"}
NUMBERS = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
TRIES = 200  # until a scene and a statement agree with the wanted answer; about two are enough

Scene = list[list[dict[str, Any]]]  # of shapes: three boxes of objects
Random = np.random.Generator


@dataclass(frozen=True)
class VLMiniExample:
    """One example: the text of the input without the task's prompt, the target, and the visual tokens."""

    task: str
    topic: str
    text: str
    target: str
    tokens: SceneTokens


@dataclass(frozen=True)
class Facts:
    """What can be said of one scene: a statement that may be true or not, a question with its answer."""

    statement: str
    holds: bool
    question: str
    answer: str


def generate_vl_mini(
    num_examples: int,
    *,
    seed: int,
    tasks: Sequence[str] = VL_MINI_TASKS,
    topics: Sequence[str] | None = None,
) -> list[VLMiniExample]:
    """Draws examples of the given tasks and topics, in equal shares.

    Args:
        num_examples: how many.
        seed: of everything that is drawn.
        tasks: some of `VL_MINI_TASKS`.
        topics: some of `VL_MINI_TOPICS`; all of them if absent.

    Raises:
        ValueError: an unknown task or topic, or none.
    """
    topics = VL_MINI_TOPICS if topics is None else topics
    count(num_examples, "num_examples", low=0)
    count(seed, "seed", low=0)
    for name, given, known in (("tasks", tasks, VL_MINI_TASKS), ("topics", topics, VL_MINI_TOPICS)):
        if not given or set(given) - set(known):
            raise ValueError(f"{name}={list(given)} must be some of {known}")
    rng = np.random.default_rng(seed)
    return [_example(_pick(rng, tasks), _pick(rng, topics), rng) for _ in range(num_examples)]


def _example(task: str, topic: str, rng: Random) -> VLMiniExample:
    wanted = bool(rng.integers(2)) if task == "verify" else True
    for _ in range(TRIES):
        scene, tokens = SCENES[topic](rng)
        facts = TOPICS[topic](scene, rng)
        if task == "ask" or facts.holds == wanted:
            break
    else:
        raise RuntimeError(f"no {wanted} statement of topic {topic!r} in {TRIES} scenes")
    text, target = {
        "verify": (facts.statement, str(facts.holds).lower()),
        "ask": (facts.question, facts.answer),
        "describe": ("", facts.statement),
    }[task]
    return VLMiniExample(task, topic, text, target, tokens)


def _pick(rng: Random, choices: Sequence[Any]) -> Any:
    return choices[int(rng.integers(len(choices)))]


# Scenes of shapes


def _scattered(rng: Random) -> tuple[Scene, SceneTokens]:
    """One to seven objects per box, which do not overlap; a third of them stand at an edge."""
    scene: Scene = []
    for _ in range(3):
        palette = _pick(rng, (COLOURS, COLOURS, COLOURS[:2], COLOURS[1:], COLOURS[:1]))
        objects: list[dict[str, Any]] = []
        for _ in range(int(rng.integers(1, 8))):
            size = int(rng.choice((10, 20, 30), p=(0.3, 0.5, 0.2)))
            place = rng.integers(0, 101 - size, size=2)
            if rng.random() < 0.35:
                place[int(rng.integers(2))] = _pick(rng, (0, 100 - size))
            new = {"x_loc": int(place[0]), "y_loc": int(place[1]), "size": size}
            new |= {"type": _pick(rng, TYPES), "color": _pick(rng, palette)}
            if not any(_overlap(new, other) for other in objects):
                objects.append(new)
        scene.append(objects)
    return scene, shape_tokens(scene)


def _overlap(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(a[axis] < b[axis] + b["size"] and b[axis] < a[axis] + a["size"] for axis in ("x_loc", "y_loc"))


def _towers(rng: Random) -> tuple[Scene, SceneTokens]:
    """A tower of one to four blocks in each box; the first block is the base."""
    scene = [
        [
            {"x_loc": 40, "y_loc": 80 - 21 * level, "size": 20, "type": "square", "color": _pick(rng, COLOURS)}
            for level in range(int(rng.integers(1, 5)))
        ]
        for _ in range(3)
    ]
    return scene, shape_tokens(scene)


@dataclass(frozen=True)
class Kind:
    """A sort of object: None matches every colour, type or size."""

    colour: str | None
    type: str | None
    size: int | None = None

    def matches(self, item: dict[str, Any]) -> bool:
        """Whether an object is of this sort."""
        wanted = {"color": self.colour, "type": self.type, "size": self.size}
        return all(value is None or item[key] == value for key, value in wanted.items())

    def among(self, objects: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The objects of this sort."""
        return [item for item in objects if self.matches(item)]

    def words(self, rng: Random, plural: bool = False) -> str:
        """Such as "small black circle"; what has no type is an item, an object or a shape."""
        noun = self.type or _pick(rng, ("item", "object", "item"))
        parts = [SIZE_WORDS.get(self.size or 0, ""), COLOUR_WORDS.get(self.colour or "", ""), noun + "s" * plural]
        return " ".join(filter(None, parts))

    def one(self, rng: Random) -> str:
        """The same with its article."""
        words = self.words(rng)
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _kind(rng: Random) -> Kind:
    colour = _pick(rng, COLOURS) if rng.random() < 0.75 else None
    type_ = _pick(rng, TYPES) if rng.random() < (0.45 if colour else 0.8) else None
    return Kind(colour, type_, _pick(rng, (10, 20, 30)) if rng.random() < 0.1 else None)


def _about(rng: Random, true_number: int) -> int:
    """A number near the true one."""
    return max(0, true_number + int(rng.choice((-1, 0, 0, 0, 1, 2))))


def _amount(rng: Random, number: int) -> str:
    """Words for "this many"."""
    if number == 0:
        return "no"
    word = _pick(rng, (NUMBERS[number], str(number)))
    return f"{_pick(rng, ('exactly', 'at least', 'at most', 'only', ''))} {word}".strip()


def _fits(words: str, number: int, true_number: int) -> bool:
    """Whether the words of `_amount` hold of a true number; a bare number means "at least"."""
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
        number = _about(rng, min(true, 8))
        words = _amount(rng, number)
        holds = _fits(words, number, true)
        statement = f"{_there(number)} {words} {kind.words(rng, number != 1)}"
    else:
        number = _about(rng, min(int(_pick(rng, per_box)), 6))
        words = _amount(rng, number)
        fits_here = [_fits(words, number, here) for here in per_box]
        noun = kind.words(rng, number != 1)
        form = _pick(rng, ("there is a box with", "each box contains", "every grey box has", "boxes"))
        if form == "boxes":
            boxes = _about(rng, min(sum(fits_here), 2)) or 1
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
    form = _pick(rng, ("more", "same", "all", "different"))
    if form == "more":
        statement, holds = f"there are more {COLOUR_WORDS[a]} items than {COLOUR_WORDS[b]} items{where}", n_a > n_b
    elif form == "same":
        statement = "there is a box with all items of the same colour"
        holds = any(len({item["color"] for item in box}) == 1 for box in scene)
    elif form == "all":
        kind = Kind(None, _pick(rng, TYPES))
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
    word, before = _pick(
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
    part = _pick(rng, ("edge", "wall", "side", "corner"))
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
        number = _about(rng, min(true, 6))
        words = _amount(rng, number)
        holds = _fits(words, number, true)
        touching_part = f"{_pick(rng, ('', '', 'closely '))}touching the {part}"
        noun = kind.words(rng, number != 1)
        statement = f"{_there(number)} {words} {noun} {'not ' * negated}{touching_part}"
    question = f"how many {kind.words(rng, True)} are touching the {part}?"
    return Facts(statement, holds, question, str(len(touching)))


def _tower_facts(scene: Scene, rng: Random) -> Facts:
    heights = [len(tower) for tower in scene]
    colour = _pick(rng, COLOURS)
    word = COLOUR_WORDS[colour]
    place = _pick(rng, ("top", "base"))
    ends = [tower[-1 if place == "top" else 0]["color"] for tower in scene]
    form = _pick(rng, ("height", "end", "colour", "over", "total"))
    amount, at = int(rng.integers(1, 4)), f"at the {place}"
    if form == "height":
        height = int(_pick(rng, heights)) if rng.random() < 0.6 else int(rng.integers(1, 5))
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
        below = _pick(rng, COLOURS)
        over = [any(a["color"] == below and b["color"] == colour for a, b in pairwise(tower)) for tower in scene]
        statement = f"there is a tower with a {word} block over a {COLOUR_WORDS[below]} block"
        holds = any(over)
    else:
        true = sum(len(Kind(colour, None).among(tower)) for tower in scene)
        number = _about(rng, true)
        words = _amount(rng, number)
        holds = _fits(words, number, true)
        statement = f"{_there(number)} {words} {word} block{'s' * (number != 1)}"
    if rng.random() < 0.5:
        question, answer = f"how many towers have a {word} block {at}?", str(ends.count(colour))
    else:
        question, answer = "how many blocks has the highest tower?", str(max(heights))
    return Facts(statement, holds, question, answer)


# Figures of seven pieces

PIECES = {"1": "square", "2": "parallelogram", "3": "big triangle", "4": "big triangle"}
PIECES |= {"5": "middle triangle", "6": "small triangle", "7": "small triangle"}
_TRIANGLE = np.array(((0, 0), (2, 0), (0, 2)), dtype=float)
OUTLINES = {
    "1": np.array(((0, 0), (1, 0), (1, 1), (0, 1)), dtype=float),
    "2": np.array(((0, 0), (1, 0), (2, 1), (1, 1)), dtype=float),
    **{name: _TRIANGLE * scale for name, scale in zip("34567", (1, 1, 0.7071, 0.5, 0.5), strict=True)},
}
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "middle", "right")


def _figure(rng: Random) -> tuple[Any, SceneTokens]:
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


def _pieces(scene: Any, rng: Random) -> Facts:
    kinds, centres = scene["kinds"], scene["centres"]
    number, other = (str(value + 1) for value in rng.permutation(7)[:2])
    where = _where(centres[number], scene["extent"])
    shape = "wide" if scene["extent"][1] < 0.8 else "tall" if scene["extent"][0] < 0.8 else "square"
    form = _pick(rng, ("is", "where", "end", "whole"))
    if form == "is":
        said = _pick(rng, (kinds[number], _pick(rng, sorted(set(kinds.values())))))
        statement, holds = f"piece {number} is a {said}", said == kinds[number]
    elif form == "where":
        said = _pick(rng, (where, _pick(rng, ("top", "bottom", "top left", "bottom right", "left", "middle"))))
        statement, holds = f"piece {number} is at the {said}", said == where
    elif form == "end":
        highest = min(centres, key=lambda name: centres[name][1])
        said = _pick(rng, (kinds[highest], _pick(rng, sorted(set(kinds.values())))))
        statement, holds = f"a figure with a {said} at the top", said == kinds[highest]
    else:
        lowest = max(centres, key=lambda name: centres[name][1])
        said = _pick(rng, (shape, _pick(rng, ("wide", "tall", "square"))))
        statement, holds = f"a {said} figure standing on a {kinds[lowest]}", said == shape
    if rng.random() < 0.7:
        return Facts(statement, holds, f"what is piece {number}?", f"{kinds[number]} at the {where}")
    question = f"which is higher, piece {number} or piece {other}?"
    return Facts(statement, holds, question, min((number, other), key=lambda name: centres[name][1]))


# People

LIMBS = (58, 52, 42, 52, 58, 75, 42, 75, 58, 97, 42, 97)  # x, y of hips, knees, ankles
STANDING = np.array(
    (50, 8, 52, 6, 48, 6, 55, 8, 45, 8, 63, 20, 37, 20, 68, 35, 32, 35, 70, 49, 30, 49, *LIMBS), dtype=float
).reshape(-1, 2)
ARMS = {"raised": ((66, 8), (34, 8), (64, -6), (36, -6)), "wide": ((82, 20), (18, 20), (98, 20), (2, 20))}
POSES = ("standing", "sitting", "lying", "with raised arms", "with arms spread wide", "running")


def _person(rng: Random) -> tuple[dict[str, Any], str]:
    pose = str(_pick(rng, POSES))
    points = STANDING.copy()
    if "arms" in pose:
        points[7:11] = ARMS["raised" if "raised" in pose else "wide"]
    if pose == "sitting":
        points[13:15, 1], points[15:17, 1] = 56, 78
        points[13:17, 0] += _pick(rng, (-14, 14))
    if pose == "running":
        points[[13, 15], 0] += (14, 4)
        points[[14, 16], 0] -= (6, 26)
        points[16, 1] -= 16
        points[7:11] = ((74, 32), (26, 32), (84, 26), (38, 44))
    if pose == "lying":
        points = points[:, ::-1].copy()
    points += rng.normal(scale=1.5, size=points.shape)
    seen = np.ones(len(points))
    if rng.random() < 0.3:  # the legs are outside the picture or behind something
        seen[13:17] = 0
    size = float(rng.uniform(0.15, 0.8))
    low, high = points[seen > 0].min(0), points[seen > 0].max(0)
    extent = (high - low) / (high - low).max() * size
    centre = rng.uniform(extent / 2, 1 - extent / 2)
    placed = (points - low) / (high - low) * extent + centre - extent / 2
    key_points = np.concatenate((placed * seen[:, None], (2 * seen)[:, None]), axis=1)
    return {"box_cxcywh": (*centre, *extent), "keypoints": key_points.tolist()}, pose


def _group(rng: Random) -> tuple[Any, SceneTokens]:
    drawn = [_person(rng) for _ in range(int(rng.choice((1, 2, 3, 4, 5, 6), p=(0.3, 0.25, 0.15, 0.1, 0.1, 0.1))))]
    return drawn, people_tokens([person for person, _ in drawn])


def _crowd(number: int) -> str:
    return "a person" if number == 1 else f"{NUMBERS[number]} people" if number < 5 else "a group of people"


def _people(scene: Any, rng: Random) -> Facts:
    poses = [pose for _, pose in scene]
    by_place = sorted(scene, key=lambda drawn: drawn[0]["box_cxcywh"][0])
    side, chosen = _pick(rng, (("left", by_place[0]), ("right", by_place[-1])))
    form = _pick(rng, ("number", "pose", "all", "side"))
    said = str(_pick(rng, (_pick(rng, poses), _pick(rng, POSES))))
    if form == "number":
        number = max(1, _about(rng, len(scene)))
        statement, holds = f"{_crowd(number)} in a picture", _crowd(number) == _crowd(len(scene))
    elif form == "pose":
        number = max(1, _about(rng, poses.count(said)))
        statement = f"{_crowd(number)} {said}"
        holds = _crowd(number) == _crowd(poses.count(said)) if said in poses else False
    elif form == "all":
        statement = f"{_crowd(len(scene))} , all {said}" if len(scene) > 1 else f"a person alone , {said}"
        holds = set(poses) == {said}
    else:
        statement, holds = f"the person on the {side} is {said}", said == chosen[1]
    if rng.random() < 0.5:
        return Facts(statement, holds, "how many people are there?", str(len(scene)))
    return Facts(statement, holds, f"what is the person on the {side} doing?", chosen[1])


TOPICS: dict[str, Callable[[Any, Random], Facts]] = {
    "counting": _counting,
    "comparing": _comparing,
    "relations": _relations,
    "edges": _edges,
    "towers": _tower_facts,
    "pieces": _pieces,
    "people": _people,
}
SCENES: dict[str, Callable[[Random], tuple[Any, SceneTokens]]] = {
    **dict.fromkeys(("counting", "comparing", "relations", "edges"), _scattered),
    "towers": _towers,
    "pieces": _figure,
    "people": _group,
}
VL_MINI_TOPICS = tuple(TOPICS)
