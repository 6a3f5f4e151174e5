"""Pairwise costs between two token sequences: one matrix per example, safe on padding and on zero vectors."""

import math

import torch
from torch import Tensor

from .masks import real_entries

__all__ = ["cosine_cost", "squared_euclidean_cost"]


def cosine_cost(
    video: Tensor, language: Tensor, video_mask: Tensor | None = None, language_mask: Tensor | None = None
) -> Tensor:
    """One minus the cosine of every pair of tokens, C_ij = 1 - <v_i, l_j> / (|v_i| |l_j|), in [0, 2].

    The cost of the paper's equation (9). A zero vector has no direction: its cosine is taken as 0 (cost 1), and so is
    its gradient. Padding is treated as a zero vector whatever it contains, NaN included.

    Args:
        video: (..., N, D) features.
        language: (..., M, D) features.
        video_mask: (..., N), 0 = padding; any dtype.
        language_mask: (..., M), 0 = padding; any dtype.

    Returns:
        (..., N, M) costs, in float32 or, if an input is float64, in float64; also under autocast.

    Example:
        >>> import torch
        >>> cosine_cost(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 0.0]]))
        tensor([[0.],
                [1.]])
    """
    video, language = _prepared(video, language, video_mask, language_mask)
    with torch.autocast(video.device.type, enabled=False):
        return 1 - _directions(video) @ _directions(language).mT


def squared_euclidean_cost(
    video: Tensor, language: Tensor, video_mask: Tensor | None = None, language_mask: Tensor | None = None
) -> Tensor:
    """The squared Euclidean distance of every pair of tokens, C_ij = |v_i - l_j|², never below 0.

    Args:
        video: (..., N, D) features.
        language: (..., M, D) features.
        video_mask: (..., N), 0 = padding; any dtype. Padding counts as a zero vector.
        language_mask: (..., M), 0 = padding; any dtype.

    Returns:
        (..., N, M) costs, in float32 or, if an input is float64, in float64; also under autocast.

    Example:
        >>> import torch
        >>> squared_euclidean_cost(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 0.0]]))
        tensor([[ 4.],
                [13.]])
    """
    video, language = _prepared(video, language, video_mask, language_mask)
    with torch.autocast(video.device.type, enabled=False):
        squares = video.square().sum(-1)[..., :, None] + language.square().sum(-1)[..., None, :]
        # The expanded square may round to a little below zero where two tokens coincide.
        return (squares - 2 * video @ language.mT).clamp_min(0)


def _prepared(
    video: Tensor, language: Tensor, video_mask: Tensor | None, language_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Both sequences in one dtype of at least float32, padding replaced by zeros."""
    for name, features in (("video", video), ("language", language)):
        if not isinstance(features, Tensor) or features.dim() < 2 or not features.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor (..., N, D), got {_described(features)}.")
    if video.shape[-1] != language.shape[-1] or not video.shape[-1]:
        raise ValueError(
            f"video and language must have the same width, at least 1, got {video.shape[-1]} and "
            f"{language.shape[-1]}: project one of them first."
        )
    dtype = torch.promote_types(torch.promote_types(video.dtype, language.dtype), torch.float32)
    return (
        _without_padding(video, video_mask, "video_mask").to(dtype),
        _without_padding(language, language_mask, "language_mask").to(dtype),
    )


def _without_padding(features: Tensor, mask: Tensor | None, name: str) -> Tensor:
    if mask is None:
        return features
    valid, wrong = real_entries(name, mask, tuple(features.shape[:-1]))
    if wrong is not None:  # reading values would wait for the device; the cost is NaN there
        features = torch.where(wrong.unsqueeze(-1), math.nan, features)
    # Filled, not multiplied: padding may hold NaN, and NaN * 0 is NaN in both directions.
    return features.masked_fill(~valid.unsqueeze(-1), 0)


def _directions(features: Tensor) -> Tensor:
    """Vectors of length 1; zero vectors stay zero and pass no gradient back."""
    largest = torch.linalg.vector_norm(features.detach(), math.inf, -1, keepdim=True)
    # Scaling by the largest entry first keeps the squares from overflowing or vanishing; the length is then 1 or more.
    scaled = features / largest.masked_fill(largest < torch.finfo(features.dtype).tiny, math.inf)
    # Not by a norm, whose second derivative at 0 is none.
    return scaled / scaled.square().sum(-1, keepdim=True).clamp_min(0.25).sqrt()


def _described(value: object) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
