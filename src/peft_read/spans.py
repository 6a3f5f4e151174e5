"""Temporal spans: centre and width, start and end, clips and seconds, overlap, non-maximum suppression."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .values import number, shown, table

__all__ = [
    "ROUNDING",
    "begins_inside",
    "centre_width_to_start_end",
    "check_windows",
    "clips_of",
    "clips_to_seconds",
    "generalized_temporal_iou",
    "seconds_to_clips",
    "start_end_to_centre_width",
    "temporal_iou",
    "temporal_nms",
]

# What float32 may add to a time or take from it, relative: 1.4 s are 7 clips of 0.2 s, though 1.4 / 0.2 is below 7.
ROUNDING = 2.0**-23


def centre_width_to_start_end(spans: Tensor) -> Tensor:
    """(centre, width) to (start, end), on the last axis of (..., 2)."""
    centre, width = spans.unbind(-1)
    return torch.stack((centre - 0.5 * width, centre + 0.5 * width), dim=-1)


def start_end_to_centre_width(spans: Tensor) -> Tensor:
    """(start, end) to (centre, width), on the last axis of (..., 2)."""
    start, end = spans.unbind(-1)
    return torch.stack(((start + end) * 0.5, end - start), dim=-1)


def clips_of(duration_seconds: float, clip_seconds: float, *, partial: bool = False) -> int:
    """How many clips a video has: int(duration / clip), with `partial` also the incomplete clip at the end."""
    clips = duration_seconds / clip_seconds
    return math.ceil(clips - 1e-9) if partial else int(clips + 1e-9)


def begins_inside(start: NDArray, end: float) -> NDArray[np.bool_]:
    """Whether windows begin before `end`, in seconds; those that do so by rounding alone begin at it.

    Args:
        start: of the windows, of any shape.
        end: such as a number of clips times their length.
    """
    return np.less(start, end * (1 - ROUNDING))


def check_windows(windows: NDArray, where: str, *, end: float = math.inf, allow_empty: bool = False) -> None:
    """Windows of a video in seconds: no NaN, none reversed, none before its start or after its end.

    Args:
        windows: (n, 2) start and end.
        where: the beginning of the error message.
        end: seconds at which the video ends.
        allow_empty: whether a window may have the length 0.

    Raises:
        ValueError: names the first invalid window.
    """
    for start, stop in np.asarray(windows, dtype=np.float64).tolist():
        if not (math.isfinite(start) and math.isfinite(stop)):
            problem = "is not finite"
        elif start < 0:
            problem = "starts before the video"
        elif stop < start:
            problem = "ends before it starts"
        elif stop == start and not allow_empty:
            problem = "has no length"
        elif stop > end:
            problem = f"ends after the video, which ends at {end:g} s"
        else:
            continue
        raise ValueError(f"{where}: the window [{start:g}, {stop:g}] {problem}")


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
    A time that is less than the rounding of float32 before a clip counts as its beginning.

    Args:
        spans: (..., 2) seconds.
        clip_seconds: length of a clip.
        number_of_clips: clips of the video.

    Returns:
        (..., 2) int64.

    Raises:
        ValueError: the clip length or the number of clips is not positive, or a span is negative, reversed or not
            finite.
    """
    number(clip_seconds, "clip_seconds", above=0)
    if number_of_clips < 1:
        raise ValueError(f"number_of_clips={number_of_clips} must be positive")
    _check_spans(spans, non_negative=True)
    start, end = (spans.double() / clip_seconds * (1 + ROUNDING)).long().unbind(-1)
    first = start.clamp(max=number_of_clips - 1)
    return torch.stack((first, torch.maximum(end.clamp(max=number_of_clips) - 1, first)), dim=-1)


def temporal_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of spans (start, end), element by element with broadcasting.

    Args:
        a: (..., 2).
        b: (..., 2); `a.unsqueeze(-2)` against `b` gives all pairs.

    Returns:
        (...); 0 where both spans are empty, NaN where a span holds NaN.

    Raises:
        ValueError: spans without a last axis of 2, or (on the CPU) one that ends before it starts.
    """
    _check_spans(a, b)
    intersection, union, _ = _overlap(a, b)
    return _ratio(intersection, union)


def generalized_temporal_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU - (hull - union) / hull, from -1 (far apart) to 1 (equal) (Rezatofighi et al., 2019, in one dimension).

    Args:
        a: (..., 2).
        b: (..., 2), broadcast against `a`.

    Returns:
        (...); NaN where a span holds NaN.

    Raises:
        ValueError: spans without a last axis of 2, or (on the CPU) one that ends before it starts.
    """
    _check_spans(a, b)
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
    return torch.where(whole == 0, 0, part / torch.where(whole == 0, 1, whole))


@torch.no_grad()
def _check_spans(*spans: Tensor, non_negative: bool = False) -> None:
    """What can be told without waiting for a device: shapes everywhere, values on the CPU."""
    for values in spans:
        if not values.dim() or values.shape[-1] != 2:
            raise ValueError(f"spans must be (..., 2), not {tuple(values.shape)}")
        if values.device.type != "cpu" or torch.compiler.is_compiling():
            continue
        if (values[..., 1] < values[..., 0]).any():
            raise ValueError(
                f"a span ends before it starts: {shown(values[values[..., 1] < values[..., 0]].tolist())}"
            )
        if non_negative and not (values.isfinite() & (values >= 0)).all():
            raise ValueError(f"spans in seconds must be finite and not negative: {shown(values.tolist())}")


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

    Raises:
        ValueError: a threshold outside [0, 1], a negative limit, rows of another length, a window that is reversed,
            NaN or infinite.
    """
    number(threshold, "the threshold of temporal_nms", low=0, high=1)
    for name, limit in (("max_before", max_before), ("max_after", max_after)):
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 0):
            raise ValueError(f"{name} of temporal_nms must be a whole number from 0 on, not {limit!r}")
    checked = table(windows, "windows of temporal_nms", columns=3)
    if (reversed_ones := checked[checked[:, 1] < checked[:, 0]]).size:
        raise ValueError(f"a window of temporal_nms ends before it starts: {shown(reversed_ones[0].tolist())}")
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
