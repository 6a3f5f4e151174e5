"""Evaluation metrics as plain functions."""

from .as_evaluate import evaluate_metric
from .captioning import bleu_score, caption_scores, cider_score, cider_scores, meteor_score
from .highlight_detection import tvsum_map, youtube_highlights_map
from .moment_retrieval import evaluate_qvhighlights
from .question_answering import (
    gqa_accuracy,
    label_score,
    multiple_choice_accuracy,
    nlvr_accuracy,
    normalize_vqa_answer,
    vqa_accuracy,
)
from .summarization import content_f1, rouge_scores

__all__ = [
    "bleu_score",
    "caption_scores",
    "cider_score",
    "cider_scores",
    "content_f1",
    "evaluate_metric",
    "evaluate_qvhighlights",
    "gqa_accuracy",
    "label_score",
    "meteor_score",
    "multiple_choice_accuracy",
    "nlvr_accuracy",
    "normalize_vqa_answer",
    "rouge_scores",
    "tvsum_map",
    "vqa_accuracy",
    "youtube_highlights_map",
]
