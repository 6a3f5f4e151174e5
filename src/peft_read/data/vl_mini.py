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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..values import count
from .figure_scenes import figure, piece_facts
from .people_scenes import group, people_facts
from .scene_facts import Facts, Random, pick
from .scene_tokens import SceneTokens
from .shape_scenes import SCATTERED_TOPICS, TOWER_TOPICS, scattered, towers

__all__ = ["VL_MINI_TASKS", "VL_MINI_TOPICS", "VLMiniExample", "generate_vl_mini"]

VL_MINI_TASKS = ("verify", "ask", "describe")
TRIES = 200  # until a scene and a statement agree with the wanted answer; about two are enough
TOPICS: dict[str, Callable[[Any, Random], Facts]] = {
    **SCATTERED_TOPICS,
    **TOWER_TOPICS,
    "pieces": piece_facts,
    "people": people_facts,
}
SCENES: dict[str, Callable[[Random], tuple[Any, SceneTokens]]] = {
    **dict.fromkeys(SCATTERED_TOPICS, scattered),
    **dict.fromkeys(TOWER_TOPICS, towers),
    "pieces": figure,
    "people": group,
}
VL_MINI_TOPICS = tuple(TOPICS)


@dataclass(frozen=True)
class VLMiniExample:
    """One example: the text of the input without the task's prompt, the target, and the visual tokens."""

    task: str
    topic: str
    text: str
    target: str
    tokens: SceneTokens


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
    return [_example(pick(rng, tasks), pick(rng, topics), rng) for _ in range(num_examples)]


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
