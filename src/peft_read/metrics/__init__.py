"""Evaluation metrics as plain functions."""

from .as_evaluate import evaluate_metric
from .captioning import bleu_score, cider_score, meteor_score
from .highlight_detection import tvsum_map, youtube_highlights_map
from .moment_retrieval import evaluate_qvhighlights
from .summarization import content_f1, rouge_scores

__all__ = [
    "bleu_score",
    "cider_score",
    "content_f1",
    "evaluate_metric",
    "evaluate_qvhighlights",
    "meteor_score",
    "rouge_scores",
    "tvsum_map",
    "youtube_highlights_map",
]
