"""The metrics through the `evaluate` library give what the plain functions give, offline."""

import sys

import pytest
from test_metrics_grounding import TRUTH, prediction

from peft_read.metrics import evaluate_metric, evaluate_qvhighlights, rouge_scores, tvsum_map, youtube_highlights_map

pytest.importorskip("evaluate")


def test_qvhighlights_with_all_fields_of_the_official_records():
    predictions = [prediction(1, [[5, 15, 0.3], [40, 70, 0.9]], 20), prediction(2, [[104, 120, 0.9]], 3)]
    predictions = [{**record, "query": "a query", "vid": "a video"} for record in predictions]
    metric = evaluate_metric("qvhighlights")
    assert metric.compute(predictions=predictions, references=TRUTH) == evaluate_qvhighlights(predictions, TRUTH)
    for record, truth in zip(predictions, TRUTH, strict=True):
        metric.add_batch(predictions=[record], references=[truth])
    assert metric.compute() == evaluate_qvhighlights(predictions, TRUTH)


def test_a_submission_without_highlights():
    windows = [{"qid": 2, "pred_relevant_windows": [[100.0, 120.0, 1.0]]}]
    result = evaluate_metric("qvhighlights").compute(predictions=windows, references=[TRUTH[1]])
    assert result["brief"]["MR-full-R1@0.7"] == 100.0
    assert "HL-min-Good" not in result


def test_the_other_metrics():
    scores, matches = [[0.9, 0.1, 0.5], [0.3]], [[1, 1, -1], [0]]
    result = evaluate_metric("youtube_highlights").compute(predictions=scores, references=matches)
    assert result == {"mAP": youtube_highlights_map(scores, matches)}
    annotations = [[[4, 1], [3, 1], [2, 1]], [[1, 2]]]
    result = evaluate_metric("tvsum").compute(predictions=scores, references=annotations)
    assert result == {"mAP": tvsum_map(scores, annotations)}
    texts = {"predictions": ["learn to play", "x"], "references": ["learn to sing", "y"]}
    metric = evaluate_metric("rouge")
    assert metric.compute(**texts, variant="easy_rouge") == rouge_scores(**texts, variant="easy_rouge")
    assert metric.compute(**texts) == rouge_scores(**texts)


def test_failures(monkeypatch):
    with pytest.raises(ValueError, match="no metric 'bleu'; there are"):
        evaluate_metric("bleu")
    monkeypatch.setitem(sys.modules, "evaluate", None)
    with pytest.raises(ImportError, match="pip install evaluate datasets"):
        evaluate_metric("rouge")
