"""VQA, GQA, NLVR2 and multiple-choice accuracy, as in the official evaluations and in VL-Adapter's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from ..values import id_of, is_given, listed, number, shown

__all__ = [
    "gqa_accuracy",
    "label_score",
    "multiple_choice_accuracy",
    "nlvr_accuracy",
    "normalize_vqa_answer",
    "vqa_accuracy",
]

ByKey = Mapping[Any, Any] | Sequence[Any]

COUNTED = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0", **{word: str(value) for value, word in enumerate(COUNTED)}}
ARTICLES = frozenset({"a", "an", "the"})
# Each is also recognised with one of its apostrophes left out.
CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't
    must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've
    somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd
    something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're
    they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've
    who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll
    y'all'd've you'd you'd've you'll you're you've
""".split()  # noqa: SIM905
CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word for word in CONTRACTED for i, letter in enumerate(word) if letter == "'"
}
CONTRACTIONS["somebody'd"] = "somebodyd"  # the official table has this one the wrong way round
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
THOUSANDS = re.compile(r"\d,\d")
PERIOD = re.compile(r"\.(?!\d)")
PERIODS = 32  # the official program passes a flag in the place of the count, and so strips no more than this
AGREEING = 3  # an answer is right if so many annotators gave it
TINY = 1e-10  # which VALUE's evaluator adds to its divisors


def normalize_vqa_answer(answer: str) -> str:
    """Normalises an answer as VQA's evaluation does: no punctuation or articles, digits for number words, apostrophes.

    Source: the official VQA evaluation (Antol et al., ICCV 2015), and VL-T5's removal of the remaining commas.

    Raises:
        ValueError: it is not a string.

    Example:
        >>> normalize_vqa_answer("The two dogs."), normalize_vqa_answer("dont")
        ('2 dogs', "don't")
    """
    if not isinstance(answer, str):
        raise ValueError(f"an answer must be a string, not {shown(answer)}")
    return _normalized(answer).replace(",", "")


def vqa_accuracy(
    predictions: ByKey,
    answers: ByKey,
    *,
    question_types: ByKey | None = None,
    answer_types: ByKey | None = None,
) -> dict[str, Any]:
    """VQA's soft accuracy: an answer is right if three annotators gave it, averaged over leaving out one annotator.

        acc = mean over annotators i of min(1, (others than i who gave the answer) / 3)

    The prediction is normalised (`normalize_vqa_answer`); the annotators' answers lose their punctuation, and only
    where they differ from each other, as in the official evaluation.

    Source: Antol et al., "VQA", ICCV 2015, and Goyal et al., CVPR 2017.

    Args:
        predictions: a text by question, or a list of texts.
        answers: by question, or in the same order: the annotators' texts, or the official {"answer": text}.
        question_types: a text by question, for the accuracy of each.
        answer_types: the same.

    Returns:
        `overall`, `perQuestionType` and `perAnswerType`, percentages with two decimals; the last two are empty where
        no types are given.

    Raises:
        ValueError: questions without prediction or the other way round, an entry that is not a string, no annotators.

    Example:
        >>> vqa_accuracy({"1": "two"}, {"1": ["2"] * 4 + ["3"] * 6})["overall"]
        100.0
    """
    said, true = _matched(predictions, answers, "answers")
    scores = {key: _soft_accuracy(_text(said[key], key), true[key], key) for key in said}
    result: dict[str, Any] = {"overall": _percent(list(scores.values()))}
    for name, types in (("perQuestionType", question_types), ("perAnswerType", answer_types)):
        result[name] = {kind: _percent(part) for kind, part in _grouped(scores, types, name).items()}
    return result


def label_score(predictions: ByKey, labels: ByKey) -> float:
    """The mean score of the predictions, each looked up in its label without normalisation.

    Args:
        predictions: a text by question, or a list of texts.
        labels: {answer: score} by question, or in the same order; a text stands for {text: 1}.

    Returns:
        From 0 to 1.

    Raises:
        ValueError: questions without prediction or the other way round, labels of another shape, invalid scores.

    Example:
        >>> label_score(["net", "Net"], [{"net": 1.0, "mesh": 0.3}, {"net": 1.0}])
        0.5
    """
    said, true = _matched(predictions, labels, "labels")
    total = 0.0
    for key, text in said.items():
        label = {true[key]: 1.0} if isinstance(true[key], str) else true[key]
        if not isinstance(label, Mapping):
            raise ValueError(f"the label of {key!r} must be a string or {{answer: score}}, not {shown(label)}")
        total += number(label.get(_text(text, key), 0.0), f"a score in the label of {key!r}", low=0, high=1)
    return total / len(said)


def gqa_accuracy(predictions: ByKey, answers: ByKey) -> float:
    """Fraction of the questions with exactly the right answer; as `label_score`.

    Source: Hudson and Manning, "GQA", CVPR 2019.

    Args:
        predictions: a text by question, or a list of texts.
        answers: a text by question, or in the same order; or {answer: score}.

    Returns:
        From 0 to 1.

    Raises:
        ValueError: as `label_score`.
    """
    return label_score(predictions, answers)


def nlvr_accuracy(predictions: ByKey, examples: Sequence[Mapping[str, Any]] | Mapping[str, Any]) -> dict[str, float]:
    """Accuracy, and consistency: the fraction of sentences that are judged right for all their pairs of images.

    Source: Suhr et al., "A Corpus for Reasoning about Natural Language Grounded in Photographs", ACL 2019.

    Args:
        predictions: by `uid`, or `identifier` where there is none, or in the order of the examples: true or false, as
            text, truth value, 1 or 0. A text that is neither is wrong.
        examples: with `identifier`, `label` and perhaps `uid`; or labels by identifier. An identifier is split-set-
            pair-sentence in NLVR2, whose third part is left out for the consistency, and n-m in NLVR, where n stands
            for the sentence.

    Returns:
        `accuracy` and `consistency`, from 0 to 1.

    Raises:
        ValueError: examples without prediction or the other way round, labels that are neither true nor
            false, identifiers of another form.

    Example:
        >>> nlvr_accuracy(["true", "false"], {"dev-0-0-0": 1, "dev-0-1-0": 1})
        {'accuracy': 0.5, 'consistency': 0.0}
    """
    if isinstance(examples, Mapping):
        examples = [{"identifier": key, "label": label} for key, label in examples.items()]
    truth, sentences = {}, {}
    for position, example in enumerate(examples):
        if not isinstance(example, Mapping) or not isinstance(example.get("identifier"), str):
            raise ValueError(f"example {position} must have an 'identifier', not {shown(example)}")
        key = id_of(example.get("uid", example["identifier"]), f"the uid of example {position}")
        if key in truth:
            raise ValueError(f"the example {key!r} appears twice")
        label = _truth(example.get("label"))
        if label is None:
            raise ValueError(f"the label of {key!r} must be true or false, not {shown(example.get('label'))}")
        truth[key], sentences[key] = label, _sentence(example["identifier"])
    said, truth = _matched(predictions, truth if isinstance(predictions, Mapping) else list(truth.values()), "labels")
    right = {key: _truth(said[key]) == truth[key] for key in said}
    names = sentences if isinstance(predictions, Mapping) else dict(zip(right, sentences.values(), strict=True))
    together: dict[str, bool] = {}
    for key, is_right in right.items():
        together[names[key]] = together.get(names[key], True) and is_right
    return {"accuracy": sum(right.values()) / len(right), "consistency": sum(together.values()) / len(together)}


def multiple_choice_accuracy(predictions: ByKey, answers: ByKey, *, types: ByKey | None = None) -> dict[str, float]:
    """Fraction of the questions with exactly the right choice, for each type and for all.

    As VALUE's evaluator (TVQA, How2QA) it divides by the number of questions plus 1e-10.

    Args:
        predictions: such as "a3", by question or as a list.
        answers: the same.
        types: a text by question, such as TVQA's show.

    Returns:
        The accuracy of each type, and `all_type_accuracy`, from 0 to 1.

    Raises:
        ValueError: questions without prediction or the other way round, an entry that is not a string.
    """
    said, true = _matched(predictions, answers, "answers")
    right = {key: float(_text(said[key], key) == _text(true[key], key)) for key in said}
    result = {kind: sum(part) / (len(part) + TINY) for kind, part in _grouped(right, types, "types").items()}
    return {**result, "all_type_accuracy": sum(right.values()) / (len(right) + TINY)}


def _normalized(answer: str) -> str:
    text = _without_punctuation(answer.replace("\n", " ").replace("\t", " ").strip())
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _without_punctuation(text: str) -> str:
    """Removes punctuation next to spaces, or all of it if there is a comma between digits; the rest becomes spaces."""
    beside_space = {sign for pair in pairwise(text) if " " in pair for sign in pair}
    drop_all = THOUSANDS.search(text) is not None
    for sign in PUNCTUATION:
        text = text.replace(sign, "" if drop_all or sign in beside_space else " ")
    return PERIOD.sub("", text, count=PERIODS)


def _soft_accuracy(prediction: str, given: Any, key: str) -> float:
    if isinstance(given, str) or not isinstance(given, Sequence) or not given:
        raise ValueError(f"the answers of {key!r} must be a list of strings, not {shown(given)}")
    answers = [_text(entry.get("answer") if isinstance(entry, Mapping) else entry, key) for entry in given]
    if len(set(answers)) > 1:
        answers = [_without_punctuation(answer) for answer in answers]
    prediction = _normalized(prediction)
    matches = [answer == prediction for answer in answers]
    return sum(min(1.0, (sum(matches) - match) / AGREEING) for match in matches) / len(matches)


def _grouped(scores: Mapping[str, float], types: ByKey | None, name: str) -> dict[str, list[float]]:
    groups: dict[str, list[float]] = {}
    if types is not None:
        _, kinds = _matched(scores if isinstance(types, Mapping) else list(scores.values()), types, name)
        for score, kind in zip(scores.values(), (kinds[key] for key in kinds), strict=True):
            groups.setdefault(_text(kind, name), []).append(score)
    return groups


def _percent(scores: Sequence[float]) -> float:
    return round(100 * sum(scores) / len(scores), 2)


def _matched(predictions: ByKey, references: ByKey, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Predictions and references by id, in the order of the predictions."""
    for what, given in (("predictions", predictions), (name, references)):
        if isinstance(given, str) or not isinstance(given, Mapping | Sequence) or not is_given(given):
            raise ValueError(f"{what} must be a mapping by id or a list, and not empty, not {shown(given)}")
    if isinstance(predictions, Mapping) != isinstance(references, Mapping):
        raise ValueError(f"predictions and {name} must both be mappings by id, or both lists")
    said, true = _by_id(predictions, "predictions"), _by_id(references, name)
    if said.keys() != true.keys():
        lacking, unknown = sorted(true.keys() - said.keys()), sorted(said.keys() - true.keys())
        raise ValueError(
            f"predictions and {name} are of different questions: without prediction [{listed(lacking)}], "
            f"without {name} [{listed(unknown)}]"
        )
    return said, {key: true[key] for key in said}


def _by_id(given: ByKey, name: str) -> dict[str, Any]:
    pairs = given.items() if isinstance(given, Mapping) else enumerate(given)
    by_id = {id_of(key, f"an id of the {name}"): value for key, value in pairs}
    if len(by_id) < len(given):
        raise ValueError(f"two ids of the {name} are the same string")
    return by_id


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{key!r}: a string was expected, not {shown(value)}")
    return value


def _truth(value: Any) -> bool | None:
    known = {"true": True, "false": False, "1": True, "0": False}
    scalar = value.item() if getattr(value, "shape", None) == () else value
    return known.get(str(scalar).strip().lower()) if isinstance(scalar, bool | int | str) else None


def _sentence(identifier: str) -> str:
    parts = identifier.split("-")
    if len(parts) == 4:
        return "-".join((*parts[:2], "", parts[3]))
    if len(parts) == 2:
        return parts[0]
    raise ValueError(f"the identifier {identifier!r} is neither split-set-pair-sentence (NLVR2) nor n-m (NLVR)")
