"""The heat-map targets and the losses of UMT."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..float32_heads import values_can_be_checked
from .configuration_umt import UMTConfig

__all__ = ["BoundaryTargets", "boundary_losses", "boundary_targets", "saliency_loss"]

_LOG_FLOOR = 1e-12  # inside the focal loss's logarithms, as in the original


class BoundaryTargets(NamedTuple):
    """Targets of the boundary head, each (B, L) but the last.

    Attributes:
        center: heat map, 1 at a window's centre clip.
        window: length of the window in clips, at its centre clip.
        offset: distance of the exact centre from that clip.
        weight: 1 at centre clips, else 0.
        windows: number of windows in the batch, a scalar.
    """

    center: Tensor
    window: Tensor
    offset: Tensor
    weight: Tensor
    windows: Tensor


@torch.no_grad()
def boundary_targets(
    boundary_labels: Tensor, boundary_mask: Tensor | None, number_of_clips: int, config: UMTConfig
) -> BoundaryTargets:
    """Turn windows into heat maps (Zhou et al., "Objects as points", 2019, in one dimension).

    In clips of u seconds a window [start, end] covers start / u to (end - u) / u; its centre c is cut at L - 0.5, its
    radius is R = int(radius_factor w), its sigma sigma_factor (R + 1). Where two windows share a centre clip, the
    later one wins; heat maps are joined by the maximum. A window that starts after the last clip is left out.

    Args:
        boundary_labels: (B, n, 2) seconds; left as they are (the original subtracts u in place).
        boundary_mask: (B, n), positive = a window; None: rows that do not start below 0.
        number_of_clips: L.
        config: the configuration.

    Raises:
        ValueError: (on the CPU) a window that ends before it starts, or NaN.
    """
    labels = boundary_labels.float()
    valid = labels[..., 0] >= 0 if boundary_mask is None else boundary_mask.to(labels.device).gt(0)
    if values_can_be_checked(labels) and not (labels[..., 1] > labels[..., 0])[valid].all():
        raise ValueError("boundary_labels holds a window that ends before it starts, or NaN; rows are (start, end)")
    unit = config.clip_seconds
    start, end = labels[..., 0] / unit, (labels[..., 1] - unit) / unit
    valid = valid & (start < number_of_clips)  # windows after the last clip are dropped
    center = torch.stack((start, end), dim=-1).mean(-1).clamp(max=number_of_clips - 0.5)  # (B, n)
    window = end - start
    radius = (window * config.radius_factor).int()
    sigma = (radius + 1) * config.sigma_factor
    clip = center.long().clamp(min=0)

    distance = torch.arange(number_of_clips, device=labels.device) - clip.unsqueeze(-1)  # (B, n, L)
    heat = torch.exp(-distance.pow(2) / (2 * sigma.unsqueeze(-1) ** 2))
    heat = heat * (distance.abs() <= radius.unsqueeze(-1)) * valid.unsqueeze(-1)
    targets = labels.new_zeros(3, len(labels), number_of_clips)
    rows = torch.arange(len(labels), device=labels.device)
    for i in range(labels.shape[1]):  # in order, because later windows overwrite
        where = clip[:, i]
        values = torch.stack((window[:, i], center[:, i] - where, torch.ones_like(center[:, i])))
        targets[:, rows, where] = torch.where(valid[:, i], values, targets[:, rows, where])
    heat_map = heat.amax(dim=1) if labels.shape[1] else labels.new_zeros(len(labels), number_of_clips)
    lengths, offsets, weight = targets.unbind(0)
    return BoundaryTargets(heat_map, lengths, offsets, weight, windows=valid.sum())


def boundary_losses(
    center: Tensor, window: Tensor, offset: Tensor, targets: BoundaryTargets, mask: Tensor, config: UMTConfig
) -> dict[str, Tensor]:
    """The three weighted terms of the boundary head, each summed and divided by the number of windows.

    Args:
        center: (B, L) probabilities, 0 at padding.
        window: (B, L) lengths in clips.
        offset: (B, L).
        targets: see `boundary_targets`.
        mask: (B, L), False = padding.
        config: the configuration.
    """
    p, t = center.float(), targets.center
    positive = -torch.log(p + _LOG_FLOOR) * (1 - p) ** 2 * (t == 1)
    negative = -torch.log(1 - p + _LOG_FLOOR) * p**2 * (1 - t) ** 4
    number = targets.windows.clamp(min=1)
    terms = {
        "center_loss": (config.center_loss_weight, (positive + negative) * mask),
        "window_loss": (config.window_loss_weight, (window.float() - targets.window).abs() * targets.weight),
        "offset_loss": (config.offset_loss_weight, (offset.float() - targets.offset).abs() * targets.weight),
    }
    return {name: weight * values.sum() / number for name, (weight, values) in terms.items()}


def saliency_loss(logits: Tensor, labels: Tensor, mask: Tensor, config: UMTConfig) -> Tensor:
    """Weighted binary cross-entropy against soft labels.

    Args:
        logits: (B, L).
        labels: (B, L) in [0, 1]; negative = no label.
        mask: (B, L), False = padding.
        config: the configuration.

    Raises:
        ValueError: (on the CPU) labels above 1, or NaN.
    """
    if values_can_be_checked(labels) and not (labels <= 1).all():
        raise ValueError("saliency_labels holds NaN or more than 1: a label is from 0 to 1, negative = none")
    labels = labels.to(logits.device, torch.float32)
    weight = (mask & (labels >= 0)).float()
    entropy = nn.functional.binary_cross_entropy_with_logits(
        logits.float(), labels.clamp(min=0), weight=weight, reduction="sum"
    )
    number = weight.numel() if config.saliency_over_padding else weight.sum().clamp(min=1)
    return config.saliency_loss_weight * entropy / number
