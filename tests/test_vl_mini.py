"""VL-mini and the visual tokens of scenes: known answers, then properties, then failure cases."""

import numpy as np
import pytest

from peft_read.data import (
    SCENE_FEATURE_DIM,
    VL_MINI_TASKS,
    VL_MINI_TOPICS,
    generate_vl_mini,
    people_tokens,
    piece_tokens,
    shape_tokens,
)


def shape(kind="square", colour="Black", x=0, y=0, size=20):
    return {"type": kind, "color": colour, "x_loc": x, "y_loc": y, "size": size}


def test_tokens_of_shapes_by_hand():
    features, boxes, pictures = shape_tokens([[shape()], [], [shape("circle", "Yellow", 95, 40, 10)]])
    assert features.shape == (2, SCENE_FEATURE_DIM) == (2, 71)
    assert np.flatnonzero(features[0]).tolist() == [0, 5, 7, 9]  # kind, square, black, size
    assert features[0, 9] == pytest.approx(2 / 3)
    assert boxes.tolist() == [[0, 0, pytest.approx(0.2), pytest.approx(0.2)], pytest.approx([0.95, 0.4, 1, 0.5])]
    assert pictures.tolist() == [0, 2]


def test_tokens_of_pieces_by_hand():
    square = [[10, 10], [30, 10], [30, 30], [10, 30]]
    triangle = [[50, 50], [90, 50], [50, 90]]
    features, boxes, _ = piece_tokens({"2": triangle, "1": square}, (0, 0, 100, 50))
    assert np.allclose(boxes[0], (0.1, 0.1, 0.3, 0.3))  # by number: the square is first
    assert np.allclose(features[0, 10:18], (-0.4, -0.4, 0.4, -0.4, 0.4, 0.4, -0.4, 0.4))
    assert features[0, 18] == pytest.approx(4 * 0.2)
    assert features[1, 18] == pytest.approx(4 * np.sqrt(0.08))
    assert features[1, 19] == pytest.approx(0.75)  # the longest side falls to the left


def test_tokens_of_people_by_hand():
    points = [[0.0, 0.0, 0]] * 16 + [[0.6, 0.4, 2]]
    features, boxes, _ = people_tokens([{"box_cxcywh": (0.5, 0.5, 0.4, 0.2), "keypoints": points}])
    assert np.allclose(boxes, (0.3, 0.4, 0.7, 0.6))
    assert np.flatnonzero(features[0]).tolist() == [2, *range(20 + 3 * 16, 71)]
    assert np.allclose(features[0, 68:70], (0.5, -1.0))


def test_the_same_seed_draws_the_same_examples_and_answers_are_balanced():
    drawn, again = (generate_vl_mini(700, seed=3) for _ in range(2))
    assert [(e.task, e.text, e.target) for e in drawn] == [(e.task, e.text, e.target) for e in again]
    assert all(np.array_equal(a.tokens.features, b.tokens.features) for a, b in zip(drawn, again, strict=True))
    assert {e.task for e in drawn} == set(VL_MINI_TASKS)
    assert {e.topic for e in drawn} == set(VL_MINI_TOPICS)
    verified = [e.target for e in drawn if e.task == "verify"]
    assert set(verified) == {"true", "false"}
    assert 0.4 < verified.count("true") / len(verified) < 0.6
    assert all(e.tokens.boxes.min() >= 0 and e.tokens.boxes.max() <= 1 for e in drawn)
    assert all(e.target for e in drawn)


def test_computed_answers_agree_with_the_tokens():
    """Numbers of people and of the most common colour, counted again from what the model sees."""
    for example in generate_vl_mini(150, seed=1, tasks=["ask"], topics=["people", "comparing"]):
        features = example.tokens.features
        if example.text == "how many people are there?":
            assert example.target == str(len(features))
        if example.text == "which colour is the most common?":
            counts = features[:, 6:9].sum(0)
            best = [name for name, n in zip(("yellow", "black", "blue"), counts, strict=True) if n == counts.max()]
            assert example.target == " and ".join(sorted(best))
        if example.text.startswith("what is the difference"):
            counts = dict(zip(("yellow", "black", "blue"), features[:, 6:9].sum(0), strict=True))
            a, b = (word for word in example.text.replace("?", "").split() if word in counts)
            assert example.target == str(int(abs(counts[a] - counts[b])))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: generate_vl_mini(1, seed=0, tasks=["guess"]), r"tasks=\['guess'\] must be some of"),
        (lambda: generate_vl_mini(1, seed=0, topics=[]), r"topics=\[\] must be some of"),
        (lambda: generate_vl_mini(-1, seed=0), "num_examples must be a whole number from 0 on"),
        (lambda: shape_tokens([[shape("star")]]), "type 'star' of an object is not one of"),
        (lambda: shape_tokens([[], [], []]), "a scene without objects has no visual tokens"),
        (lambda: piece_tokens({"1": [[0, 0], [1, 1]]}, (0, 0, 1, 1)), "piece '1' has 2 corners"),
        (lambda: people_tokens([{"box_cxcywh": (0, 0, 1, 1), "keypoints": [[0, 0, 0]]}]), r"shape \(1, 3\)"),
    ],
)
def test_invalid_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
