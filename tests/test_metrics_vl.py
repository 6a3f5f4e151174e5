"""VQA, GQA, NLVR2, multiple choice and captions: the stored results of the original, known answers, failures."""

import json

import numpy as np
import pytest
import torch

from peft_read.metrics import (
    caption_scores,
    cider_score,
    cider_scores,
    evaluate_metric,
    gqa_accuracy,
    label_score,
    multiple_choice_accuracy,
    nlvr_accuracy,
    normalize_vqa_answer,
    vqa_accuracy,
)


@pytest.fixture(scope="module")
def original(reference_data):
    return json.loads(reference_data("golden/vl_adapter/data/evaluators.json").read_text())


def test_vqa_is_the_original_evaluation(original):
    for case in original["vqa_accuracy"]:
        assert vqa_accuracy([case["prediction"]], [case["gt_answers"]])["overall"] == case["accuracy_percent"], case
    for answer, normalised in original["vqa_normalize_answer"].items():
        assert normalize_vqa_answer(answer) == normalised
    overall, answers = original["vqa_overall"], []
    for case in original["vqa_accuracy"]:
        if case["gt_answers"] not in answers:
            answers.append(case["gt_answers"])
    for name, kept in (("result", None), ("result_topk_optimal", True), ("result_not_topk_optimal", False)):
        keys = [k for k in overall["predictions"] if kept is None or overall["is_topk_optimal"][k] == kept]
        actual = vqa_accuracy(
            {key: overall["predictions"][key] for key in keys},
            {key: [{"answer": answer} for answer in answers[int(key) - 1]] for key in keys},
            question_types={key: overall["meta"][key]["question_type"] for key in keys},
            answer_types={key: overall["meta"][key]["answer_type"] for key in keys},
        )
        assert actual == overall[name]


def test_the_other_accuracies_are_the_original_ones(original):
    case = original["vqa_label_score"]
    assert label_score(case["predictions"], dict.fromkeys(case["predictions"], case["labels"])) == case["score"]
    case = original["gqa"]
    assert gqa_accuracy(case["predictions"], dict.fromkeys(case["predictions"], "pipe")) == case["score"]
    case = original["nlvr"]
    assert nlvr_accuracy(case["predictions"], case["examples"]) == case["result"]
    in_order = [case["predictions"][one["uid"]] for one in case["examples"]]
    assert nlvr_accuracy(in_order, case["examples"]) == case["result"]
    case = original["tvqa"]
    assert multiple_choice_accuracy(case["predictions"], case["truth"], types=case["types"]) == case["result"]


def test_vqa_by_hand():
    # two of ten agree: each of them leaves one other, the eight others two
    assert vqa_accuracy(["x"], [["x"] * 2 + [str(i) for i in range(8)]])["overall"] == round(
        100 * (2 * 1 / 3 + 8 * 2 / 3) / 10, 2
    )
    assert vqa_accuracy(["Yes"], [["Yes"] * 10])["overall"] == 0.0  # equal answers are not lower-cased, as officially
    # nor do they lose their punctuation
    assert vqa_accuracy(["hot-dog"], [["hot-dog"] * 10])["overall"] == 0.0
    assert vqa_accuracy(["hot-dog"], [["hot-dog"] * 9 + ["dog"]])["overall"] == 100.0
    assert normalize_vqa_answer("it's the y'allll") == "it's y'all'll"
    assert normalize_vqa_answer("a. b. c." * 20).count(".") == 28  # 32 of 60 full stops, as officially


def test_nlvr_takes_text_truth_values_and_tensors_and_groups_by_sentence():
    labels = {"1-0": "true", "1-1": False, "2-0": 1}
    assert nlvr_accuracy(["True ", "false", "maybe"], labels) == {"accuracy": 2 / 3, "consistency": 0.5}
    assert nlvr_accuracy([torch.tensor(1), np.bool_(False), True], labels) == {"accuracy": 1.0, "consistency": 1.0}


def test_captions_with_several_references():
    pytest.importorskip("pycocoevalcap")
    said, true = (
        ["a dog runs home", "two red cars wait"],
        [["a dog runs home", "the dog is fast"], ["two red cars wait"]],
    )
    scores = caption_scores(said, true)
    assert scores["ROUGE_L"] == pytest.approx(1.0)
    assert scores["Bleu_4"] == pytest.approx(1.0)
    assert scores["CIDEr"] == pytest.approx(cider_score(said, true))
    assert scores["CIDEr"] == pytest.approx(sum(cider_scores(said, true)) / 2)
    assert cider_scores(["a dog runs home", "no"], true)[1] == 0
    assert (
        caption_scores(
            ["A dog runs home.", "two red cars wait"], true, tokenizer=lambda t: t.lower().strip(".").split()
        )
        == scores
    )


def test_through_evaluate():
    pytest.importorskip("evaluate")
    vqa = evaluate_metric("vqa").compute(predictions=["2"], references=[["2", "2", "2", "two"]])
    assert vqa == vqa_accuracy(["2"], [["2", "2", "2", "two"]])
    assert evaluate_metric("gqa").compute(predictions=["a", "b"], references=["a", "c"]) == {"accuracy": 0.5}
    nlvr = [{"identifier": "dev-0-0-0", "label": "true"}, {"identifier": "dev-0-1-0", "label": "false"}]
    actual = evaluate_metric("nlvr2").compute(predictions=["true", "true"], references=nlvr)
    assert actual == {"accuracy": 0.5, "consistency": 0.0}
    choices = evaluate_metric("multiple_choice").compute(predictions=["a1"], references=["a1"])
    assert choices == multiple_choice_accuracy(["a1"], ["a1"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: vqa_accuracy({"1": "a"}, {"2": ["a"]}), r"without prediction \[2\], without answers \[1\]"),
        (lambda: vqa_accuracy({"1": "a"}, [["a"]]), "must both be mappings by id, or both lists"),
        (lambda: vqa_accuracy([], []), "predictions must be a mapping by id or a list, and not empty"),
        (lambda: vqa_accuracy("a", ["a"]), "predictions must be a mapping"),
        (lambda: vqa_accuracy(["a"], ["a"]), "the answers of '0' must be a list of strings, not 'a'"),
        (lambda: vqa_accuracy([1], [["a"]]), "'0': a string was expected, not 1"),
        (lambda: vqa_accuracy({1: "a", "1": "b"}, {1: ["a"], "1": ["b"]}), "two ids of the predictions"),
        (lambda: normalize_vqa_answer(None), "an answer must be a string, not None"),
        (lambda: gqa_accuracy(["a"], [1]), "the label of '0' must be a string or {answer: score}, not 1"),
        (lambda: label_score(["a"], [{"a": 1.5}]), "a score in the label of '0' must be a number from 0 to 1"),
        (lambda: nlvr_accuracy(["true"], {"dev-0": 1, "1-2-3": 0}), "'1-2-3' is neither split-set-pair-sentence"),
        (lambda: nlvr_accuracy(["true"], {"1-0": "yes"}), "the label of '1-0' must be true or false, not 'yes'"),
        (lambda: nlvr_accuracy(["true"], [{"label": 1}]), "example 0 must have an 'identifier'"),
        (lambda: multiple_choice_accuracy(["a1"], ["a1"], types=["x", "y"]), r"without prediction \[1\]"),
        (lambda: cider_score(["a"], [[]]), "reference 0 must be a string or several"),
    ],
)
def test_failures(call, message):
    with pytest.raises(ValueError, match=message):
        call()
