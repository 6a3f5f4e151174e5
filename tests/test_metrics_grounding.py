"""QVHighlights, TVSum and YouTube Highlights metrics: known answers, the official figures, failures."""

import json
import lzma
import math

import numpy as np
import pytest

from peft_read.metrics import evaluate_qvhighlights, tvsum_map, youtube_highlights_map
from peft_read.metrics.moment_retrieval import _average_precisions
from peft_read.metrics.qvhighlights_ratings import ranking_precisions

TRUTH = [
    {
        "qid": 1,
        "duration": 150,
        "relevant_windows": [[0, 10], [40, 80]],
        "relevant_clip_ids": [0, 1, 20],
        "saliency_scores": [[4, 4, 2], [2, 3, 1], [0, 1, 4]],
    },
    {
        "qid": 2,
        "duration": 150,
        "relevant_windows": [[100, 120]],
        "relevant_clip_ids": [50],
        "saliency_scores": [[3, 3, 3]],
    },
]


def prediction(qid, windows, best_clip):
    scores = [0.0] * 75
    scores[best_clip] = 1.0
    return {"qid": qid, "pred_relevant_windows": windows, "pred_saliency_scores": scores}


def test_perfect_predictions():
    predictions = [
        prediction(1, [[0, 10, 0.9], [40, 80, 0.8]], 0),
        prediction(2, [[100, 120, 0.5]], 50),
    ]
    result = evaluate_qvhighlights(predictions, TRUTH)
    for name in ("full", "long", "middle"):
        assert set(result[name]["MR-R1"].values()) == ({100.0} if name != "long" else {0.0})
    # the long window of query 1 is its second prediction: precision 1/2 at recall 1
    assert result["long"]["MR-mAP"]["average"] == 50.0
    assert result["brief"]["MR-full-mAP"] == 100.0
    assert result["brief"]["HL-min-Good-Hit1"] == 100.0
    assert result["brief"]["HL-min-VeryGood-Hit1"] == 50.0


def test_figures_by_hand():
    predictions = [
        # IoU 5/15 with the first window and 0 with the second; IoU 30/40 = 0.75 with the second
        prediction(1, [[5, 15, 0.3], [40, 70, 0.9]], 20),
        prediction(2, [[104, 120, 0.9], [100, 120, 0.1]], 3),
    ]
    result = evaluate_qvhighlights(predictions, TRUTH)
    # query 1: sorted by score, hit then miss: one of two windows, precision 1 -> 0.5, up to a threshold of 0.75
    # query 2: 16/20 = 0.8 hits first up to 0.8 (AP 1), then only the second window does (AP 0.5)
    assert result["full"]["MR-mAP"]["0.75"] == 75.0
    assert result["full"]["MR-mAP"]["0.8"] == 50.0
    assert result["full"]["MR-mAP"]["0.95"] == 25.0
    assert result["full"]["MR-mAP"]["average"] == pytest.approx((6 * 75 + 50 + 3 * 25) / 10)
    # the first window of the list, whatever its score
    assert result["full"]["MR-R1"]["0.5"] == 50.0
    assert result["full"]["MR-R1"]["0.85"] == 0.0
    assert result["HL-min-VeryGood"]["HL-Hit1"] == 50.0
    assert result["HL-min-Good"]["HL-Hit1"] == 50.0


def test_the_figures_of_every_query_equal_those_of_the_query_alone():
    generator = np.random.default_rng(0)
    truth, predictions = [], []
    for qid in range(40):
        starts = np.sort(generator.choice(70, size=generator.integers(1, 4), replace=False))
        clips = np.sort(generator.choice(75, size=9, replace=False)).tolist()
        windows = [[2.0 * start, 2.0 * start + 2 * generator.integers(1, 5)] for start in starts.tolist()]
        ratings = generator.integers(0, 5, size=(9, 3)).tolist()
        truth.append({"qid": qid, "duration": 150, "relevant_windows": windows, "relevant_clip_ids": clips,
                      "saliency_scores": ratings})  # fmt: skip
        guesses = [[start, start + 5.0, float(generator.random())] for start in generator.uniform(0, 140, size=12)]
        near = [[a + 0.5, b + 0.5, 0.5] for a, b in windows]
        predictions.append({"qid": qid, "pred_relevant_windows": near + guesses if qid else [],
                            "pred_saliency_scores": generator.random(75).tolist()})  # fmt: skip
    result = evaluate_qvhighlights(predictions[::-1], truth, per_query=True)
    each = result.pop("per_query")
    assert json.dumps(result) == json.dumps(evaluate_qvhighlights(predictions[::-1], truth))  # NaN is not NaN
    assert each.pop("qid") == list(range(40))[::-1]
    assert set(each) == set(result["brief"]) - {"MR-long-mAP", "MR-middle-mAP", "MR-short-mAP"}
    for index, (one, wanted) in enumerate(zip(predictions[::-1], truth[::-1], strict=True)):
        alone = evaluate_qvhighlights([one], [wanted])["brief"]
        assert {name: values[index] for name, values in each.items()} == {name: alone[name] for name in each}
    for name, values in each.items():
        answered = values[:-1] if name.startswith("MR-full-mAP") else values
        assert np.mean(answered) == pytest.approx(result["brief"][name], abs=0.01)


def test_an_empty_range_is_nan_and_parts_may_be_missing():
    truth = [TRUTH[1]]
    result = evaluate_qvhighlights([prediction(2, [[100, 120, 1.0]], 50)], truth)
    assert math.isnan(result["short"]["MR-mAP"]["average"])
    assert math.isnan(result["brief"]["MR-long-mAP"])
    assert math.isnan(result["long"]["MR-R1"]["0.5"])
    only_windows = evaluate_qvhighlights([{"qid": 2, "pred_relevant_windows": [[100, 120, 1.0]]}], truth)
    assert set(only_windows) == {"brief", "full", "long", "middle", "short"}
    no_windows = evaluate_qvhighlights([{"qid": 2, "pred_relevant_windows": []}], truth)
    assert no_windows["full"]["MR-R1"]["0.5"] == 0.0


def test_the_official_result_of_the_official_sample_to_the_last_digit(reference_data):
    def records(name):
        lines = lzma.decompress(reference_data(f"data/qvhighlights/{name}.xz").read_bytes()).decode().splitlines()
        return [json.loads(line) for line in lines]

    predictions, truth = records("reference_sample_val_preds.jsonl"), records("highlight_val_release.jsonl")
    official = reference_data("data/qvhighlights/reference_sample_val_preds_metrics_raw.json").read_text()
    result = evaluate_qvhighlights(predictions, truth)
    assert json.dumps(result) == json.dumps(json.loads(official))


def test_primitives_equal_the_official_ones(reference_data):
    golden = json.loads(reference_data("golden/metrics/qvhighlights_primitives.json").read_text())
    for case in golden["get_ap"]:
        labels = np.array(case["y_true"])[:, None] > 0
        assert ranking_precisions(np.array(case["y_predict"]), labels)[0] == pytest.approx(case["ap"], abs=1e-12)
    for case in golden["detection_ap"]:
        assert _average_precisions(case["pred"], case["gt"]) == pytest.approx(case["ap"], abs=1e-12)


def test_qvhighlights_failures():
    predictions = [prediction(1, [[0, 10, 1.0]], 0), prediction(3, [[0, 10, 1.0]], 0)]
    with pytest.raises(ValueError, match=r"1 not predicted \[2\], 1 unknown \[3\]"):
        evaluate_qvhighlights(predictions, TRUTH)
    common = evaluate_qvhighlights(predictions, TRUTH, match_number=False)
    assert common["full"]["MR-R1"]["0.95"] == 100.0
    with pytest.raises(ValueError, match="no query to evaluate"):
        evaluate_qvhighlights([], [])
    with pytest.raises(ValueError, match="query 2 has no relevant_windows"):
        evaluate_qvhighlights([prediction(2, [[0, 2, 1.0]], 0)], [{**TRUTH[1], "relevant_windows": []}])


def test_youtube_highlights_by_hand(reference_data):
    # ranked labels 1, 0, 1: trapezoids 1/2 (1 + 1)/2 and 1/2 (1/2 + 2/3)/2
    expected = 0.5 + 0.5 * (1 / 2 + 2 / 3) / 2
    assert youtube_highlights_map([[0.9, 0.1, 0.5]], [[1, 1, -1]]) == round(expected, 5)
    assert youtube_highlights_map([[0.9, 0.1, 0.5], [0.3]], [[1, 1, -1], [0]]) == round(expected / 2, 5)
    golden = json.loads(reference_data("golden/metrics/youtube_highlights.json").read_text())
    matches = list(golden["match"].values())
    assert youtube_highlights_map(golden["scores"], matches) == golden["metrics"]["mAP"]
    for scores, match, expected in zip(golden["scores"], matches, golden["per_video_mAP_rounded"], strict=True):
        assert youtube_highlights_map([scores], [match]) == expected


def test_tvsum_by_hand():
    # lower medians: 2 of [1, 2, 3, 4] and 1 of [1, 1, 1, 5]
    annotations = [[[4, 1], [3, 1], [2, 1], [1, 5]]]
    scores = [[0.1, 0.9, 0.8, 0.7]]
    # top 2 are clips 1 and 2: labels (1, 0) for the first annotator, none for the second
    assert tvsum_map(scores, annotations, top_k=2) == 0.5
    # top 3 adds clip 3: the second annotator's only positive, at rank 3: (0 + 1/3) / 2
    assert tvsum_map(scores, annotations, top_k=3) == round((1 + 1 / 6) / 2, 5)
    # scores of fewer clips than were annotated: the median is still that of all
    assert tvsum_map([[0.1, 0.9]], annotations, top_k=2) == 0.5


def test_highlight_failures():
    with pytest.raises(ValueError, match="1 videos have scores and 2 have matches"):
        youtube_highlights_map([[1.0]], [[1], [1]])
    with pytest.raises(ValueError, match=r"of 1 annotated clips have the shape \(2,\)"):
        youtube_highlights_map([[1.0, 2.0]], [[1]])
    with pytest.raises(ValueError, match=r"must be \(clips, annotators\), not \(2,\)"):
        tvsum_map([[1.0, 2.0]], [[1, 2]])
    with pytest.raises(ValueError, match=r"the same number of annotators, not \[1, 2\]"):
        tvsum_map([[1.0], [1.0]], [[[1]], [[1, 2]]])
