"""Scores, windows and texts that a metric cannot rank are errors by name; arrays and tensors are taken."""

import math

import numpy as np
import pytest
import torch

from peft_read.metrics import content_f1, evaluate_qvhighlights, rouge_scores, tvsum_map, youtube_highlights_map
from peft_read.spans import clips_of, generalized_temporal_iou, seconds_to_clips, temporal_iou, temporal_nms

NAN, INF = math.nan, math.inf
TRUTH = {
    "qid": 1, "duration": 8, "relevant_windows": [[0, 2]], "relevant_clip_ids": [0], "saliency_scores": [[4, 4, 4]],
}  # fmt: skip
SCORES, WINDOWS = (
    {"qid": 1, "pred_saliency_scores": [0.4, 0.1, 0.2, 0.3]},
    {"qid": 1, "pred_relevant_windows": [[0, 2, 1]]},
)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_diverged_model_gets_no_score(bad):
    with pytest.raises(ValueError, match="video 0: the list of scores holds"):
        tvsum_map([[bad] * 5], [[[5], [1], [1], [1], [1]]], top_k=1)
    with pytest.raises(ValueError, match="video 1: the list of scores holds"):
        youtube_highlights_map([[0.5], [bad, 0.1]], [[1], [1, -1]])
    with pytest.raises(ValueError, match="query 1: 'pred_saliency_scores' holds"):
        evaluate_qvhighlights([{"qid": 1, "pred_saliency_scores": [bad] * 4}], [TRUTH])
    with pytest.raises(ValueError, match="query 1: 'pred_relevant_windows' holds"):
        evaluate_qvhighlights([{"qid": 1, "pred_relevant_windows": [[0, 2, bad], [4, 8, 0.9]]}], [TRUTH])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pred_relevant_windows": [[4, 0, 1]]}, "query 1: .* ends before it starts"),
        ({"pred_relevant_windows": [[-4, 2, 1]]}, "query 1: .* starts before the video"),
        ({"pred_relevant_windows": [[0, 2]]}, "query 1: .* rows of 3 numbers"),
        ({"pred_relevant_windows": 5}, "query 1: .* rows of 3 numbers"),
        ({"pred_relevant_windows": [["a", "b", "c"]]}, "query 1: .* rows of 3 numbers"),
        ({"pred_saliency_scores": []}, "query 1: .* is empty"),
        ({"pred_saliency_scores": [[1]]}, "query 1: .* a list of numbers"),
        ({"qid": None}, "predictions, record 0: 'qid' must be an id"),
        ({"qid": [1]}, "predictions, record 0: 'qid' must be an id"),
    ],
)
def test_invalid_predictions_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        evaluate_qvhighlights([{**SCORES, **WINDOWS, **change}], [TRUTH])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"relevant_windows": [[2, 0]]}, "ends before it starts"),
        ({"relevant_windows": [[2, 2]]}, "has no length"),
        ({"relevant_windows": [[0, 99]]}, "ends at 99 s, the video at 8 s"),
        ({"relevant_windows": None}, "has no relevant_windows in the ground truth"),
        ({"relevant_clip_ids": [-1]}, "holds -1"),
        ({"relevant_clip_ids": [4]}, "names clip 4, which begins at 8 s; the video ends at 8 s"),
        ({"relevant_clip_ids": [0, 0], "saliency_scores": [[1] * 3] * 2}, "names a clip twice"),
        ({"relevant_clip_ids": [0, 1]}, "rates 1 clips, and 2 are relevant"),
        ({"saliency_scores": [[9, 9, 9]]}, "holds 9"),
        ({"saliency_scores": [[4, 4]]}, "rows of 3 whole numbers"),
        ({"saliency_scores": None}, "has no saliency_scores"),
        ({"duration": NAN}, "'duration' must be a finite number"),
        ({"duration": None}, "has no duration"),
    ],
)
def test_invalid_ground_truth_is_named(change, message):
    with pytest.raises(ValueError, match=f"query 1.* {message}|query 1:? {message}"):
        evaluate_qvhighlights([{**SCORES, **WINDOWS}], [{**TRUTH, **change}])


def test_every_record_is_evaluated_once_or_none():
    two = [TRUTH, {**TRUTH, "qid": 2}]
    with pytest.raises(ValueError, match="1 of 2 predictions have no 'pred_saliency_scores', the first is qid 2"):
        evaluate_qvhighlights([{**SCORES, **WINDOWS}, {**WINDOWS, "qid": 2}], two)
    with pytest.raises(ValueError, match="1 of 2 predictions have no 'pred_relevant_windows', the first is qid 1"):
        evaluate_qvhighlights([SCORES, {**SCORES, **WINDOWS, "qid": 2}], two)
    with pytest.raises(ValueError, match="predictions: qid 1 appears twice"):
        evaluate_qvhighlights([SCORES, SCORES], [TRUTH])
    with pytest.raises(ValueError, match="ground truth: qid 1 appears twice"):
        evaluate_qvhighlights([SCORES], [TRUTH, TRUTH])
    with pytest.raises(ValueError, match="neither 'pred_relevant_windows' nor"):
        evaluate_qvhighlights([{"qid": 1}], [TRUTH])


def test_clips_of_a_second_and_videos_with_a_remainder():
    truth = {**TRUTH, "relevant_clip_ids": [7], "relevant_windows": [[7, 8]]}
    scores = {"qid": 1, "pred_saliency_scores": [0.1] * 7 + [0.9]}
    assert evaluate_qvhighlights([scores], [truth], clip_seconds=1)["brief"]["HL-min-VeryGood-Hit1"] == 100
    rest = {**TRUTH, "duration": 9, "relevant_clip_ids": [4], "relevant_windows": [[8, 10]]}
    scores = {"qid": 1, "pred_saliency_scores": [0.1] * 4 + [0.9]}
    brief = evaluate_qvhighlights([scores], [rest])["brief"]
    assert (brief["HL-min-VeryGood-mAP"], brief["HL-min-VeryGood-Hit1"]) == (100, 100)
    assert (clips_of(9, 2), clips_of(9, 2, partial=True), clips_of(0.3, 0.1)) == (4, 5, 3)


@pytest.mark.parametrize("convert", [np.array, torch.tensor, lambda x: torch.tensor(x, dtype=torch.bfloat16)])
def test_arrays_and_tensors_are_taken(convert):
    prediction = {**SCORES, **WINDOWS, "qid": torch.tensor(1)}
    expected = evaluate_qvhighlights([prediction], [TRUTH])
    given = {name: value if name == "qid" else convert(value) for name, value in prediction.items()}
    truth = {name: value if name in ("qid", "duration") else convert(value) for name, value in TRUTH.items()}
    result = evaluate_qvhighlights([given], [truth])
    assert result["brief"].items() >= {k: v for k, v in expected["brief"].items() if v == v}.items()
    assert tvsum_map([convert([0.5, 0.25])], [convert([[5], [1]])]) == 1
    assert youtube_highlights_map([convert([0.5, 0.25])], [convert([1, -1])]) == 1


@pytest.mark.parametrize(
    "convert",
    [
        lambda x: torch.tensor(x, dtype=torch.bfloat16),
        lambda x: torch.tensor(x, dtype=torch.float32, requires_grad=True),
    ],
    ids=["bfloat16", "with a gradient"],
)
@pytest.mark.parametrize("depth", [1, 2])
def test_lists_of_tensors_that_numpy_does_not_take_are_taken(convert, depth):
    def parts(value, left):
        return [parts(part, left - 1) for part in value] if left and isinstance(value, list) else convert(value)

    second = {**TRUTH, "qid": 2, "relevant_clip_ids": [1, 3], "saliency_scores": [[4, 3, 2], [1, 0, 4]]}
    predictions = [{**SCORES, **WINDOWS}, {**SCORES, "qid": 2, "pred_relevant_windows": [[2, 4, 0.5], [0, 2, 0.25]]}]
    tables = ("relevant_windows", "relevant_clip_ids", "saliency_scores", "pred_relevant_windows")
    for names in (("pred_saliency_scores",), *((name,) for name in tables), (*tables, "pred_saliency_scores")):
        given, truth = (
            [{name: parts(value, depth) if name in names else value for name, value in r.items()} for r in records]
            for records in (predictions, [TRUTH, second])
        )
        result = evaluate_qvhighlights(given, truth, per_query=True)
        assert str(result) == str(evaluate_qvhighlights(predictions, [TRUTH, second], per_query=True))
    for wrong, message in ((2.0, "query 2: 'relevant_clip_ids' names a clip twice"), (9.0, "names clip 9")):
        bad = {**second, "relevant_clip_ids": [convert(2.0), convert(wrong)]}
        with pytest.raises(ValueError, match=message):
            evaluate_qvhighlights(predictions, [TRUTH, bad])


def test_invalid_annotations_are_named():
    for given, message in [([[9]], "holds 9"), ([[NAN]], "holds nan"), ([["a"]], "rows of"), ([[]], "no annotations")]:
        with pytest.raises(ValueError, match=f"video 0.*{message}"):
            tvsum_map([[1.0]], [given])
    for given in ([2], [0.5], [NAN], ["1"]):
        with pytest.raises(ValueError, match="video 0: the list of matches"):
            youtube_highlights_map([[1.0]], [given])
    for top_k in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="top_k must be a whole number from 1 on"):
            tvsum_map([[1.0]], [[[1]]], top_k=top_k)
    for given in (None, 5, "ab"):
        with pytest.raises(ValueError, match="must be lists with one entry per video"):
            youtube_highlights_map(given, given)


def by_loops(predictions, truth):
    """MR-mAP at every threshold and HL-mAP of one level, a query at a time, as the official program defines them."""
    tables, highlights = [], []
    for record, true in zip(predictions, truth, strict=True):
        ranked = sorted(record["pred_relevant_windows"], key=lambda window: -window[2])
        row = []
        for threshold in np.arange(10) * 0.05 + 0.5:
            taken, hits = set(), []
            for a in ranked:
                overlaps = []
                for j, b in enumerate(true["relevant_windows"]):
                    inner = max(0, min(a[1], b[1]) - max(a[0], b[0]))
                    overlaps.append((inner / (a[1] - a[0] + b[1] - b[0] - inner), j))
                free = [(iou, j) for iou, j in overlaps if j not in taken and iou >= round(threshold, 2)]
                hits.append(bool(free))
                taken |= {max(free)[1]} if free else set()
            hits_so_far = np.cumsum(hits)
            precision = hits_so_far / np.arange(1, len(hits) + 1)
            best = np.maximum.accumulate(precision[::-1])[::-1]
            row.append(sum(p for p, hit in zip(best, hits, strict=True) if hit) / len(true["relevant_windows"]))
        tables.append(row)
        rated = np.zeros((75, 3))
        rated[true["relevant_clip_ids"]] = true["saliency_scores"]
        for column in (rated >= 3).T:
            scores = np.array(record["pred_saliency_scores"])
            if not column.any():
                highlights.append(0.0)
                continue
            levels = sorted(set(scores.tolist()))  # from the lowest threshold up
            precision = np.maximum.accumulate([column[scores >= level].mean() for level in levels])
            recall = [np.float32(column[scores >= level].sum() / column.sum()) for level in levels] + [np.float32(0)]
            highlights.append(np.mean([p for p, a, b in zip(precision, recall, recall[1:], strict=False) if a != b]))
    return 100 * np.mean(tables, axis=0), 100 * np.mean(highlights)


def test_many_queries_at_once_equal_one_at_a_time():
    generator = np.random.default_rng(0)

    def windows(count):
        starts = generator.integers(0, 70, size=count)
        return [[2 * int(s), 2 * int(s + generator.integers(1, 6))] for s in starts]

    predictions, truth = [], []
    for qid in range(60):
        clips = sorted(generator.choice(75, size=generator.integers(1, 9), replace=False).tolist())
        ratings = generator.integers(0, 5, size=(len(clips), 3)).tolist()
        scored = [[*window, round(float(generator.random()), 1)] for window in windows(generator.integers(1, 11))]
        predictions.append(
            {"qid": qid, "pred_relevant_windows": scored,
             "pred_saliency_scores": np.round(generator.random(75), 1).tolist()}
        )  # fmt: skip
        truth.append(
            {"qid": qid, "duration": 150, "relevant_windows": windows(generator.integers(1, 7)),
             "relevant_clip_ids": clips, "saliency_scores": ratings}
        )  # fmt: skip
    result = evaluate_qvhighlights(predictions, truth)
    moments, highlights = by_loops(predictions, truth)
    actual = [value for name, value in result["full"]["MR-mAP"].items() if name != "average"]
    assert actual == pytest.approx(moments, abs=0.0051)
    assert result["HL-min-Good"]["HL-mAP"] == pytest.approx(highlights, abs=0.0051)


HINDI, CHINESE = "गिटार बजाना सीखें", "学习弹吉他"


def test_texts_in_other_scripts_need_a_tokenizer_and_give_a_warning():
    with pytest.warns(UserWarning, match="4 of 6 texts have no word of ASCII letters or digits"):
        lost = rouge_scores([HINDI, CHINESE, "play é"], [HINDI, CHINESE, "play é"])
    assert lost["rouge1"] == pytest.approx(100 / 3)
    for variant in ("rouge_score", "easy_rouge"):
        assert rouge_scores([HINDI], [HINDI], variant, tokenizer=str.split)["rougeL"] == 100
        assert rouge_scores([CHINESE], ["学习唱歌"], variant, tokenizer=list)["rouge1"] == pytest.approx(400 / 9)
    with pytest.raises(ValueError, match="the tokenizer must give a list of words"):
        rouge_scores([HINDI], [HINDI], tokenizer=str.upper)


def test_entries_that_are_not_strings_are_named_by_index():
    for variant in ("rouge_score", "easy_rouge"):
        with pytest.raises(ValueError, match="reference 1 must be a string, not None"):
            rouge_scores(["a", "b"], ["a", None], variant)
        with pytest.raises(ValueError, match="predictions must be a list of strings, not 'ab'"):
            rouge_scores("ab", ["a", "b"], variant)
    for row in ("1", "9:1 1:1", "1:1 9:1", "a:b c:d", "1:0 1:1"):
        with pytest.raises(ValueError, match=r"item 0 of the alignment text: .* is not a row"):
            content_f1(f"title\na dog\na dog\nheader\n{row}\n\n")
    with pytest.raises(ValueError, match="takes the content"):
        content_f1(None)


def test_invalid_spans_are_refused_and_nan_stays_nan():
    good = torch.tensor([[0.0, 4.0]])
    for overlap in (temporal_iou, generalized_temporal_iou):
        assert overlap(torch.tensor([[NAN, 1.0]]), good).isnan().all()
        with pytest.raises(ValueError, match="a span ends before it starts"):
            overlap(torch.tensor([[4.0, 0.0]]), good)
        with pytest.raises(ValueError, match=r"must be \(..., 2\)"):
            overlap(torch.zeros(2, 3), good)
    for spans in ([[-2.0, 4.0]], [[NAN, 4.0]], [[0.0, INF], [NAN, NAN]]):
        with pytest.raises(ValueError, match="finite and not negative"):
            seconds_to_clips(torch.tensor(spans), 2.0, 5)
    for seconds, clips in ((0, 5), (NAN, 5), (2.0, 0)):
        with pytest.raises(ValueError, match=r"clip_seconds|number_of_clips"):
            seconds_to_clips(good, seconds, clips)
    for options in ({"threshold": 2}, {"threshold": NAN}, {"threshold": 0.5, "max_after": -1}):
        with pytest.raises(ValueError, match="of temporal_nms"):
            temporal_nms([[0, 1, 0.5]], **options)
    for windows in ([[0, 1]], [[1, 0, 0.5]], [[0, 1, NAN]]):
        with pytest.raises(ValueError, match="of temporal_nms"):
            temporal_nms(windows, 0.5)
