"""Converts the outputs of Moment-DETR and UMT to the official submission format of QVHighlights."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..files import write_whole
from ..spans import temporal_nms
from .moment_detr import highlight_scores, ranked_windows

__all__ = ["grounding_records", "write_submission"]

MAX_WINDOWS = 10


def grounding_records(
    outputs: Sequence[np.ndarray],
    rows: Sequence[dict],
    config: Any,
    *,
    clip_seconds: float = 2.0,
    nms_threshold: float | None = None,
) -> list[dict[str, Any]]:
    """The predictions of a grounding model as records of the official submission format of QVHighlights.

    Args:
        outputs: of Moment-DETR `pred_logits`, `pred_spans`, `saliency_scores`, `video_mask`; of UMT `saliency_scores`,
            `boundaries` where it predicts any, `video_mask`; each with B examples.
        rows: B rows of the dataset, in the same order, with `query`, `vid`, `duration` and optionally `qid`.
        config: of the model.
        clip_seconds: length of a clip.
        nms_threshold: drop windows that overlap a better one by more; None: keep all.

    Returns:
        B records of `qid`, `query`, `vid`, `pred_saliency_scores`, and `pred_relevant_windows` where the model
        predicts moments, each window [start seconds, end seconds, score].
    """
    durations = [row["duration"] for row in rows]
    windows: list[list[list[float]]] | None = None
    if config.model_type == "moment_detr":
        logits, spans, saliency, mask = map(torch.as_tensor, outputs)
        windows = ranked_windows(
            logits,
            spans,
            durations,
            config=config,
            clip_seconds=clip_seconds,
            longest_seconds=max(durations),  # one end for all, as the original has it
            nms_threshold=nms_threshold,
        )
    else:
        saliency, *boundaries, mask = map(torch.as_tensor, outputs)
        if boundaries:
            windows = [
                _umt_windows(boundary.numpy(), seconds, nms_threshold)
                for boundary, seconds in zip(boundaries[0], durations, strict=True)
            ]
    # Moment-DETR's original writes float16, UMT's does not.
    scores = highlight_scores(saliency, mask, half_precision=config.model_type == "moment_detr")
    records = []
    for index, row in enumerate(rows):
        record = {"qid": row.get("qid", row["vid"]), "query": row["query"], "vid": row["vid"]}
        if windows is not None:
            record["pred_relevant_windows"] = windows[index]
        records.append({**record, "pred_saliency_scores": scores[index]})
    return records


def _umt_windows(boundaries: np.ndarray, seconds: float, nms_threshold: float | None) -> list[list[float]]:
    """UMT's windows without those on padding or after the end, clipped to the video, with 4 decimals."""
    moments = boundaries[(boundaries[:, 2] > 0) & (boundaries[:, 0] < seconds)]
    rounded = [
        [round(min(float(start), seconds), 4), round(min(float(end), seconds), 4), round(float(score), 4)]
        for start, end, score in moments
    ]
    return rounded[:MAX_WINDOWS] if nms_threshold is None else temporal_nms(rounded, nms_threshold)


def write_submission(path: str | Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Writes the official format atomically, one JSON record per line.

    Raises:
        ValueError: a number that is NaN or infinite, which JSON does not have.
    """
    with write_whole(Path(path)) as file:
        file.writelines(json.dumps(record, allow_nan=False) + "\n" for record in records)
