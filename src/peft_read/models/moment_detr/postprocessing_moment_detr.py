"""Converts Moment-DETR's outputs to ranked windows in seconds and highlight scores, as its evaluation does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...spans import centre_width_to_start_end, clips_to_seconds, temporal_nms
from ...values import number
from .configuration_moment_detr import MomentDetrConfig

__all__ = ["highlight_scores", "ranked_windows"]

ORIGINAL_LONGEST = 150.0  # seconds at which the original cuts every window of every video


@torch.no_grad()
def ranked_windows(
    pred_logits: Tensor,
    pred_spans: Tensor,
    duration_seconds: Sequence[float],
    *,
    config: MomentDetrConfig,
    clip_seconds: float | None = 2.0,
    longest_seconds: float | None = None,
    nms_threshold: float | None = None,
) -> list[list[list[float]]]:
    """Windows (start, end, score) of every video by descending score, in the numbers of the official submission.

    The score of a regressed span is its foreground probability; that of a classified span (`"ce"`) is the product of
    the probabilities of its first and last clip, the likeliest pair that is in order. Every number is rounded to 4
    decimals, windows are then clamped to [0, longest_seconds] and rounded to whole clips (half to even), all in
    float32 as in the original. A window that begins after the end is left out.

    Args:
        pred_logits: (B, Q, 2).
        pred_spans: (B, Q, 2) or (B, Q, 2 bins).
        duration_seconds: length of each video; not used with `"ce"` spans, whose unit is the clip.
        config: the model's configuration.
        clip_seconds: length of a clip; None leaves windows of regressed spans as they are, not rounded to clips.
        longest_seconds: upper end of every window; None: 150 s as in the original, and of a longer video its duration.
        nms_threshold: drop windows that overlap a better one by more (see `temporal_nms`); None: keep all.

    Returns:
        A list of rows [start, end, score] per video.

    Raises:
        ValueError: there is not one duration per video, or `"ce"` spans come without a clip length.
    """
    if len(duration_seconds) != len(pred_logits):
        raise ValueError(f"{len(duration_seconds)} durations for {len(pred_logits)} videos")
    durations = [number(seconds, f"the duration of video {i}", above=0) for i, seconds in enumerate(duration_seconds)]
    if clip_seconds is not None:
        number(clip_seconds, "clip_seconds", above=0)
    if longest_seconds is not None and number(longest_seconds, "longest_seconds", above=0) < max(durations, default=0):
        raise ValueError(
            f"longest_seconds={longest_seconds:g} would cut the windows of a video of {max(durations):g} s"
        )
    if not (pred_logits.isfinite().all() and pred_spans.isfinite().all()):
        raise ValueError("the predictions hold NaN or infinite numbers: they cannot be ranked")
    pred_logits, pred_spans = pred_logits.float().cpu(), pred_spans.float().cpu()
    if config.span_loss_type == "l1":
        scores = pred_logits.softmax(-1)[..., 0]
        windows = centre_width_to_start_end(pred_spans) * torch.tensor(durations, dtype=torch.float32)[:, None, None]
    else:
        if clip_seconds is None:
            raise ValueError("span_loss_type='ce' names clips: pass clip_seconds")
        first, last = pred_spans.unflatten(-1, (2, -1)).softmax(-1).unbind(2)  # (B, Q, bins)
        likeliest, where = first.cummax(-1)  # of the first clips that do not lie after a last one
        scores, end = (likeliest * last).max(-1)
        clips = torch.stack((where.gather(-1, end.unsqueeze(-1)).squeeze(-1), end), dim=-1)
        windows = clips_to_seconds(clips, clip_seconds)
    results = []
    for rows, seconds in zip(torch.cat((windows, scores.unsqueeze(-1)), dim=-1).tolist(), durations, strict=True):
        limit = max(ORIGINAL_LONGEST, seconds) if longest_seconds is None else longest_seconds
        ranked = sorted((row for row in rows if row[0] < limit), key=lambda row: row[2], reverse=True)
        table = torch.tensor([[_four_decimals(value) for value in row] for row in ranked], dtype=torch.float32)
        table = table.reshape(-1, 3)
        bounds = table[:, :2].clamp(0, limit)
        if clip_seconds is not None:
            bounds = torch.round(bounds / clip_seconds) * clip_seconds
        final = [
            [*bound, _four_decimals(score)] for bound, score in zip(bounds.tolist(), table[:, 2].tolist(), strict=True)
        ]
        results.append(final if nms_threshold is None else temporal_nms(final, nms_threshold))
    return results


@torch.no_grad()
def highlight_scores(saliency_scores: Tensor, video_mask: Tensor, *, half_precision: bool = True) -> list[list[float]]:
    """The highlight scores of every video without its padding.

    Args:
        saliency_scores: (B, L).
        video_mask: (B, L), positive at clips, which come first; such as the model's output `video_mask`, also joined
            and padded with -100 by a Trainer.
        half_precision: round to float16 first, as the original does before it writes a submission.

    Raises:
        ValueError: the shapes differ, or the score of a clip is NaN, infinite, or too large for float16.
    """
    if saliency_scores.shape != video_mask.shape:
        raise ValueError(f"scores {tuple(saliency_scores.shape)} and mask {tuple(video_mask.shape)} differ in shape")
    scores = saliency_scores.half() if half_precision else saliency_scores
    valid = video_mask.gt(0)
    if bad := (valid & ~scores.isfinite()).any(1).nonzero().flatten().tolist():
        raise ValueError(
            f"the highlight scores of video {bad[0]} of the batch are not finite{' in float16' * half_precision}"
        )
    return [row[:length].tolist() for row, length in zip(scores.cpu(), valid.sum(1).tolist(), strict=True)]


def _four_decimals(value: float) -> float:
    return float(f"{value:.4f}")
