"""Groups of people with key points, as in COCO, with statements and questions about them."""

from __future__ import annotations

from typing import Any

import numpy as np

from .scene_facts import NUMBERS, Facts, Random, about, pick
from .scene_tokens import SceneTokens, people_tokens

__all__ = ["group", "people_facts"]

LIMBS = (58, 52, 42, 52, 58, 75, 42, 75, 58, 97, 42, 97)  # x, y of hips, knees, ankles
STANDING = np.array(
    (50, 8, 52, 6, 48, 6, 55, 8, 45, 8, 63, 20, 37, 20, 68, 35, 32, 35, 70, 49, 30, 49, *LIMBS), dtype=float
).reshape(-1, 2)
ARMS = {"raised": ((66, 8), (34, 8), (64, -6), (36, -6)), "wide": ((82, 20), (18, 20), (98, 20), (2, 20))}
POSES = ("standing", "sitting", "lying", "with raised arms", "with arms spread wide", "running")


def _person(rng: Random) -> tuple[dict[str, Any], str]:
    pose = str(pick(rng, POSES))
    points = STANDING.copy()
    if "arms" in pose:
        points[7:11] = ARMS["raised" if "raised" in pose else "wide"]
    if pose == "sitting":
        points[13:15, 1], points[15:17, 1] = 56, 78
        points[13:17, 0] += pick(rng, (-14, 14))
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


def group(rng: Random) -> tuple[Any, SceneTokens]:
    """One to six people with their poses."""
    drawn = [_person(rng) for _ in range(int(rng.choice((1, 2, 3, 4, 5, 6), p=(0.3, 0.25, 0.15, 0.1, 0.1, 0.1))))]
    return drawn, people_tokens([person for person, _ in drawn])


def _crowd(number: int) -> str:
    return "a person" if number == 1 else f"{NUMBERS[number]} people" if number < 5 else "a group of people"


def people_facts(scene: Any, rng: Random) -> Facts:
    """Facts about the number of people and their poses."""
    poses = [pose for _, pose in scene]
    by_place = sorted(scene, key=lambda drawn: drawn[0]["box_cxcywh"][0])
    side, chosen = pick(rng, (("left", by_place[0]), ("right", by_place[-1])))
    form = pick(rng, ("number", "pose", "all", "side"))
    said = str(pick(rng, (pick(rng, poses), pick(rng, POSES))))
    if form == "number":
        number = max(1, about(rng, len(scene)))
        statement, holds = f"{_crowd(number)} in a picture", _crowd(number) == _crowd(len(scene))
    elif form == "pose":
        number = max(1, about(rng, poses.count(said)))
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
