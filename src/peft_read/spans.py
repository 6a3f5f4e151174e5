"""Temporal spans: centre and width, start and end, clips and seconds, overlap, non-maximum suppression."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "centre_width_to_start_end",
    "clips_to_seconds",
    "generalized_temporal_iou",
    "seconds_to_clips",
    "start_end_to_centre_width",
    "temporal_iou",
    "temporal_nms",
]


def centre_width_to_start_end(spans: Tensor) -> Tensor:
    """(centre, width) to (start, end), on the last axis of (..., 2)."""
    centre, width = spans.unbind(-1)
    return torch.stack((centre - 0.5 * width, centre + 0.5 * width), dim=-1)


def start_end_to_centre_width(spans: Tensor) -> Tensor:
    """(start, end) to (centre, width), on the last axis of (..., 2)."""
    start, end = spans.unbind(-1)
    return torch.stack(((start + end) * 0.5, end - start), dim=-1)


def clips_to_seconds(spans: Tensor, clip_seconds: float) -> Tensor:
    """(first clip, last clip) to (start, end) in seconds: clip i covers [i, i + 1) clip lengths.

    Args:
        spans: (..., 2) indices; the last clip is part of the span.
        clip_seconds: length of a clip.
    """
    first, last = spans.unbind(-1)
    return torch.stack((first, last + 1), dim=-1) * clip_seconds


def seconds_to_clips(spans: Tensor, clip_seconds: float, number_of_clips: int) -> Tensor:
    """(start, end) in seconds to (first clip, last clip), as Moment-DETR labels clip-index spans.

    The first clip is int(start / clip), the last min(int(end / clip), number of clips) - 1, but not before the first.

    Args:
        spans: (..., 2) seconds.
        clip_seconds: length of a clip.
        number_of_clips: clips of the video.

    Returns:
        (..., 2) int64.
    """
    start, end = (spans.double() / clip_seconds).long().unbind(-1)
    first = start.clamp(max=number_of_clips - 1)
    return torch.stack((first, torch.maximum(end.clamp(max=number_of_clips) - 1, first)), dim=-1)


def temporal_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of spans (start, end), element by element with broadcasting.

    Args:
        a: (..., 2).
        b: (..., 2); `a.unsqueeze(-2)` against `b` gives all pairs.

    Returns:
        (...); 0 where both spans are empty.
    """
    intersection, union, _ = _overlap(a, b)
    return _ratio(intersection, union)


def generalized_temporal_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU - (hull - union) / hull, from -1 (far apart) to 1 (equal) (Rezatofighi et al., 2019, in one dimension).

    Args:
        a: (..., 2).
        b: (..., 2), broadcast against `a`.

    Returns:
        (...).
    """
    intersection, union, hull = _overlap(a, b)
    return _ratio(intersection, union) - _ratio(hull - union, hull)


def _overlap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lengths of the intersection, the union and the smallest span around both."""
    intersection = (torch.minimum(a[..., 1], b[..., 1]) - torch.maximum(a[..., 0], b[..., 0])).clamp(min=0)
    union = (a[..., 1] - a[..., 0]) + (b[..., 1] - b[..., 0]) - intersection
    hull = torch.maximum(a[..., 1], b[..., 1]) - torch.minimum(a[..., 0], b[..., 0])
    return intersection, union, hull


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    # The denominator is made harmless first: a NaN that `where` discards would still reach the gradient.
    return torch.where(whole > 0, part / torch.where(whole > 0, whole, 1), 0)


def temporal_nms(
    windows: Sequence[Sequence[float]], threshold: float, *, max_before: int | None = 10, max_after: int = 10
) -> list[list[float]]:
    """Greedy non-maximum suppression of scored windows, as Moment-DETR does it.

    The best window is kept and every other one that overlaps it by MORE than `threshold` is dropped, and so on;
    the overlap is intersection over hull, which is the IoU of overlapping windows and 0 of disjoint ones.

    Args:
        windows: rows (start, end, score).
        threshold: overlap from which a window is dropped, not included.
        max_before: number of windows, from the front of the list, that take part; None: all.
        max_after: number of windows to keep at most.

    Returns:
        Rows (start, end, score) by descending score; among equal scores the list's order.
    """
    rest = sorted(([*window] for window in windows[:max_before]), key=lambda window: window[2], reverse=True)
    kept: list[list[float]] = []
    while rest and len(kept) < max_after:
        best, *rest = rest
        kept.append(best)
        rest = [window for window in rest if _overlap_over_hull(best, window) <= threshold]
    return kept


def _overlap_over_hull(a: Sequence[float], b: Sequence[float]) -> float:
    intersection = max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
    hull = max(a[1], b[1]) - min(a[0], b[0])
    return intersection / hull if hull else 0.0
