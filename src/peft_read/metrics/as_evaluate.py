"""The metrics as local modules of the `evaluate` library, without a download."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .highlight_detection import tvsum_map, youtube_highlights_map
from .moment_retrieval import evaluate_qvhighlights
from .question_answering import gqa_accuracy, multiple_choice_accuracy, nlvr_accuracy, vqa_accuracy
from .summarization import rouge_scores

__all__ = ["evaluate_metric"]

_NUMBERS, _TABLE = ["float64"], [["float64"]]
# The fields a metric reads, in the notation of `_features`, and the function behind it.
_METRICS: dict[str, tuple[Any, Any, Callable[..., Any]]] = {
    "qvhighlights": (
        {"qid": "int64", "pred_relevant_windows": _TABLE, "pred_saliency_scores": _NUMBERS},
        {
            "qid": "int64",
            "duration": "float64",
            "relevant_windows": _TABLE,
            "relevant_clip_ids": ["int64"],
            "saliency_scores": _TABLE,
        },
        lambda predictions, references, **options: evaluate_qvhighlights(
            _given(predictions), _given(references), **options
        ),
    ),
    "tvsum": (_NUMBERS, _TABLE, lambda predictions, references, **k: {"mAP": tvsum_map(predictions, references, **k)}),
    "youtube_highlights": (
        _NUMBERS,
        _NUMBERS,
        lambda predictions, references: {"mAP": youtube_highlights_map(predictions, references)},
    ),
    "rouge": ("string", "string", rouge_scores),
    "vqa": ("string", ["string"], vqa_accuracy),
    "gqa": ("string", "string", lambda predictions, references: {"accuracy": gqa_accuracy(predictions, references)}),
    "nlvr2": ("string", {"identifier": "string", "label": "string"}, nlvr_accuracy),
    "multiple_choice": ("string", "string", multiple_choice_accuracy),
}


def evaluate_metric(name: str) -> Any:
    """One of the project's metrics as an `evaluate.Metric`, with `compute`, `add` and `add_batch`.

    Args:
        name: `"qvhighlights"`, `"tvsum"`, `"youtube_highlights"`, `"rouge"`, `"vqa"`, `"gqa"`, `"nlvr2"` or
            `"multiple_choice"`. Predictions and references are those of the plain function, in lists; of
            QVHighlights' records only the fields that the metric reads are kept. `compute` takes the plain function's
            options: `variant` and `tokenizer`, `top_k`, `match_number` and `clip_seconds`.

    Raises:
        ValueError: there is no such metric.
        ImportError: the package evaluate is not installed.

    Example:
        >>> metric = evaluate_metric("rouge")
        >>> metric.compute(predictions=["a b"], references=["a c"], variant="easy_rouge")["rouge1"]
        50.0
    """
    if name not in _METRICS:
        raise ValueError(f"no metric {name!r}; there are {sorted(_METRICS)}")
    try:
        import datasets
        import evaluate
    except ImportError as error:
        raise ImportError("evaluate metrics need the package evaluate: pip install evaluate datasets") from error
    prediction, reference, function = _METRICS[name]

    class LocalMetric(evaluate.Metric):
        """A plain function with the interface of `evaluate`."""

        kinds = prediction, reference

        def _info(self) -> Any:
            return evaluate.MetricInfo(
                description=function.__doc__ or f"{name}, see peft_read.metrics",
                citation="",
                inputs_description="see peft_read.metrics",
                features=datasets.Features({"predictions": _features(prediction), "references": _features(reference)}),
            )

        def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
            """Add a batch of predictions and references."""
            # `evaluate` copies this function without its closure, so it must not refer to anything around it
            prediction, reference = self.kinds
            inputs = {"predictions": _only(predictions, prediction), "references": _only(references, reference)}
            super(type(self), self).add_batch(**inputs, **kwargs)

        def _compute(self, predictions: Any = None, references: Any = None, **kwargs: Any) -> Any:
            return function(predictions, references, **kwargs)

    return LocalMetric(config_name=name, keep_in_memory=True)


def _features(kind: Any) -> Any:
    """A type name, a list of one kind, or a dict of kinds, as `datasets` writes it."""
    import datasets

    if isinstance(kind, str):
        return datasets.Value(kind)
    if isinstance(kind, list):
        return datasets.Sequence(_features(kind[0]))
    return {field: _features(inner) for field, inner in kind.items()}


def _only(records: Any, kind: Any) -> Any:
    """Records without the fields that the metric does not read; absent fields become None."""
    if not isinstance(kind, dict) or records is None:
        return records
    return [{field: record.get(field) for field in kind} for record in records]


def _given(records: Any) -> list[dict[str, Any]]:
    return [{field: value for field, value in record.items() if value is not None} for record in records]
