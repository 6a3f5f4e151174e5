"""Evaluation metrics as plain functions."""

from .summarization import content_f1, rouge_scores

__all__ = ["content_f1", "rouge_scores"]
