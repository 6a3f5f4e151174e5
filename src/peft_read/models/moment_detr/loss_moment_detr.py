"""The losses of Moment-DETR: Hungarian matching, spans, labels, saliency, contrastive alignment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from ...spans import centre_width_to_start_end, generalized_temporal_iou
from ..float32_heads import values_can_be_checked
from .configuration_moment_detr import MomentDetrConfig

__all__ = ["match_queries", "moment_detr_losses", "weighted_sum"]

FOREGROUND, BACKGROUND = 0, 1  # a comment of the original says the opposite of what it trains
PADDING = -100  # padding rows of span_labels

Matches = tuple[Tensor, Tensor, Tensor]  # example, query and target of every matched pair


@torch.no_grad()
def match_queries(
    logits: Tensor, spans: Tensor, targets: Sequence[Tensor], config: MomentDetrConfig
) -> list[tuple[Tensor, Tensor]]:
    """Match queries and targets of each example at the least total cost (no gradient).

    With `"l1"` spans the cost of a pair is span_cost |difference| - giou_cost gIoU - class_cost p(foreground); with
    `"ce"` spans it is -span_cost (p(first clip) + p(last clip)) - class_cost p(foreground).

    Args:
        logits: (B, Q, 2).
        spans: (B, Q, 2) or (B, Q, 2 bins).
        targets: one (n, 2) per example.
        config: the configuration.

    Returns:
        One pair of indices (queries, targets) per example.
    """
    labels, mask = _padded(targets, None, logits.device)
    ((examples, queries, chosen),) = _match([{"pred_logits": logits, "pred_spans": spans}], labels, mask, config)
    return [(queries[examples == i], chosen[examples == i]) for i in range(len(logits))]


@torch.no_grad()
def _match(
    layers: Sequence[Mapping[str, Tensor]], labels: Tensor, mask: Tensor, config: MomentDetrConfig
) -> list[Matches]:
    """The matches of every layer; the costs of all of them come to the host in one transfer.

    Raises:
        ValueError: labels that are not finite or not in the unit of the configuration, or outputs that are NaN.
    """
    # Padded rows get costs too, which are not read; their labels become the first clip, or the unit interval.
    targets = labels.where(mask.unsqueeze(-1), 0)
    cost = torch.stack([_costs(layer, targets, config) for layer in layers])  # (layers, B, Q, n)
    parts = [cost.flatten(), mask.flatten().float(), labels.flatten().float()]
    packed = torch.cat(parts).cpu().numpy()
    costs, valid, given = np.split(packed, np.cumsum([part.numel() for part in parts])[:-1])
    costs, valid = costs.reshape(cost.shape), valid.reshape(mask.shape) > 0
    _check_values(given.reshape(labels.shape)[valid], config)
    matches, sizes = [], []
    for by_example in costs:
        pairs = []
        for example, (table, keep) in enumerate(zip(by_example, valid, strict=True)):
            columns = np.flatnonzero(keep)
            if not np.isfinite(table[:, columns]).all():
                raise ValueError(f"the model's outputs for example {example} of the batch are not finite: it diverged")
            queries, matched = linear_sum_assignment(table[:, columns])
            pairs.append(np.stack((np.full_like(queries, example), queries, columns[matched])))
        matches.append(np.concatenate(pairs, axis=1))
        sizes.append(matches[-1].shape[1])
    # One copy to the device for all layers.
    joined = torch.from_numpy(np.concatenate(matches, axis=1)).to(labels.device, non_blocking=True)
    return [(part[0], part[1], part[2]) for part in joined.split(sizes, dim=1)]


def _costs(layer: Mapping[str, Tensor], targets: Tensor, config: MomentDetrConfig) -> Tensor:
    """Costs (B, Q, n) of matching every query with every target."""
    foreground = layer["pred_logits"].float().softmax(-1)[..., FOREGROUND]
    spans = layer["pred_spans"].float()
    if config.span_loss_type == "l1":
        target = targets.to(spans)
        distance = (spans.unsqueeze(2) - target.unsqueeze(1)).abs().sum(-1)
        overlap = generalized_temporal_iou(
            centre_width_to_start_end(spans).unsqueeze(2), centre_width_to_start_end(target).unsqueeze(1)
        )
        cost = config.span_cost * distance - config.giou_cost * overlap
    else:
        # An index after the last bin is reported by _check_values, once it is on the host.
        target = targets.clamp(0, config.num_span_bins - 1)
        first, last = spans.unflatten(-1, (2, -1)).softmax(-1).unbind(2)  # (B, Q, bins)
        picked = [
            bins.gather(2, index.unsqueeze(1).expand(-1, bins.shape[1], -1))
            for bins, index in zip((first, last), target.unbind(-1), strict=True)
        ]
        cost = -config.span_cost * (picked[0] + picked[1])
    return cost - config.class_cost * foreground.unsqueeze(2)


def moment_detr_losses(
    layers: Sequence[Mapping[str, Tensor]],
    *,
    config: MomentDetrConfig,
    span_labels: Sequence[Tensor] | Tensor | None,
    saliency_scores: Tensor,
    saliency_pos_labels: Tensor | None,
    saliency_neg_labels: Tensor | None,
    text_mask: Tensor,
    span_mask: Tensor | None = None,
) -> dict[str, Tensor]:
    """Every term of the loss, unweighted, under the original's names; earlier layers' terms end in `_0`, `_1` ...

    Computed in float32 for layers of any dtype.

    Args:
        layers: the predictions of the layers that are supervised, the LAST decoder layer first, then the earlier ones
            in order: `pred_logits` (B, Q, 2), `pred_spans`, and for the contrastive loss `proj_queries`,
            `proj_txt_mem`.
        config: the configuration.
        span_labels: (B, n, 2), or one (n, 2) per example; None: no moments are known, and their terms are left out.
        saliency_scores: (B, L).
        saliency_pos_labels: (B, P) indices of salient clips, or None: the term is 0. Negative = no pair.
        saliency_neg_labels: (B, P) indices of less salient clips.
        text_mask: (B, T), False = padding.
        span_mask: (B, n), positive = a moment; None: the rows of `span_labels` that are not negative.

    Raises:
        ValueError: the labels do not fit the batch or the kind of spans.
    """
    losses: dict[str, Tensor] = {}
    with torch.autocast(saliency_scores.device.type, enabled=False):
        if span_labels is not None:
            _check_span_labels(span_labels, layers[0]["pred_logits"], config)
            labels, mask = _padded(span_labels, span_mask, saliency_scores.device)
            for index, (layer, pairs) in enumerate(zip(layers, _match(layers, labels, mask, config), strict=True)):
                suffix = f"_{index - 1}" if index else ""
                terms = _layer_losses(layer, labels, pairs, config, text_mask)
                losses.update({name + suffix: value for name, value in terms.items()})
        losses["loss_saliency"] = _saliency_loss(saliency_scores, saliency_pos_labels, saliency_neg_labels, config)
    return losses


def _padded(labels: Sequence[Tensor] | Tensor, mask: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Moments (B, n, 2) on the device, and where there is one (B, n)."""
    if not isinstance(labels, Tensor):
        labels = nn.utils.rnn.pad_sequence(list(labels), batch_first=True, padding_value=PADDING)
    labels = labels.to(device)
    if mask is None:
        return labels, labels.ge(0).all(-1)
    if mask.shape != labels.shape[:2]:
        raise ValueError(f"span_mask must be {tuple(labels.shape[:2])}, not {tuple(mask.shape)}")
    return labels, mask.to(device).gt(0)


def weighted_sum(losses: Mapping[str, Tensor], config: MomentDetrConfig) -> Tensor:
    """The total loss: every term times its weight; `class_error` is a metric, not a loss."""
    weights = {
        "loss_span": config.span_loss_weight,
        "loss_giou": config.giou_loss_weight,
        "loss_label": config.label_loss_weight,
        "loss_saliency": config.saliency_loss_weight,
        "loss_contrastive_align": config.contrastive_loss_weight,
    }
    terms = [
        value * weights[base] for name, value in losses.items() if (base := name.rstrip("_0123456789")) in weights
    ]
    return torch.stack(terms).sum()


def _check_span_labels(span_labels: Sequence[Tensor] | Tensor, logits: Tensor, config: MomentDetrConfig) -> None:
    if len(span_labels) != len(logits):
        raise ValueError(f"span_labels has {len(span_labels)} entries for a batch of {len(logits)}")
    for spans in span_labels:
        if spans.dim() != 2 or spans.shape[1] != 2:
            raise ValueError(f"every entry of span_labels must be (moments, 2), not {tuple(spans.shape)}")
        if config.span_loss_type == "ce" and spans.is_floating_point():
            raise ValueError("span_loss_type='ce' needs int64 clip indices (first, last) in span_labels")


def _check_values(moments: np.ndarray, config: MomentDetrConfig) -> None:
    """Checks the values of span_labels without padding (moments, 2)."""
    if config.span_loss_type == "ce":
        if moments.size and not 0 <= moments.min() <= moments.max() < config.num_span_bins:
            raise ValueError(f"a clip index in span_labels is not in [0, {config.num_span_bins})")
    elif moments.size and not (moments.min() >= 0 and moments.max() <= 1):
        raise ValueError(
            f"span_labels holds {moments.min():g} to {moments.max():g}: a moment is (centre, width) in fractions of "
            "the video, from 0 to 1"
        )


def _layer_losses(
    layer: Mapping[str, Tensor], labels: Tensor, pairs: Matches, config: MomentDetrConfig, text_mask: Tensor
) -> dict[str, Tensor]:
    logits, spans = layer["pred_logits"].float(), layer["pred_spans"].float()
    examples, queries, chosen = pairs
    losses = _span_losses(spans[examples, queries], labels[examples, chosen], config)
    losses.update(_label_losses(logits, examples, queries, config))
    if config.contrastive_align:
        losses["loss_contrastive_align"] = _contrastive_loss(layer, examples, queries, config, text_mask)
    return losses


def _mean(values: Tensor) -> Tensor:
    """The mean, and 0 with a gradient of 0 where there is nothing to average."""
    return values.mean() if values.numel() else values.sum()


def _span_losses(predicted: Tensor, target: Tensor, config: MomentDetrConfig) -> dict[str, Tensor]:
    """The losses of the matched spans: (n, 2) against (n, 2), or (n, 2 bins) against clip indices (n, 2)."""
    if config.span_loss_type == "l1":
        target = target.to(predicted)
        overlap = generalized_temporal_iou(centre_width_to_start_end(predicted), centre_width_to_start_end(target))
        return {"loss_span": _mean((predicted - target).abs()), "loss_giou": _mean(1 - overlap)}
    bins = predicted.view(len(predicted), 2, config.num_span_bins).transpose(1, 2)
    return {
        "loss_span": _mean(nn.functional.cross_entropy(bins, target, reduction="none")),
        "loss_giou": predicted.new_zeros(()),
    }


def _label_losses(logits: Tensor, examples: Tensor, queries: Tensor, config: MomentDetrConfig) -> dict[str, Tensor]:
    """Cross-entropy, matched queries = foreground; class weights multiply but do not divide the mean over (B, Q)."""
    classes = torch.full(logits.shape[:2], BACKGROUND, device=logits.device)
    classes[examples, queries] = FOREGROUND
    weights = logits.new_tensor([1.0, config.background_weight])
    entropy = nn.functional.cross_entropy(logits.transpose(1, 2), classes, weights, reduction="none")
    correct = (logits[examples, queries].argmax(-1) == FOREGROUND).float()
    return {"loss_label": entropy.mean(), "class_error": 100 - 100 * _mean(correct)}


def _contrastive_loss(
    layer: Mapping[str, Tensor], examples: Tensor, queries: Tensor, config: MomentDetrConfig, text_mask: Tensor
) -> Tensor:
    """Moves matched queries closer to the text than the others; a query's logit is summed over text positions."""
    similarity = torch.einsum("bqd,btd->bqt", layer["proj_queries"].float(), layer["proj_txt_mem"].float())
    if config.mask_contrastive_text:
        similarity = similarity * text_mask.unsqueeze(1)
    logits = similarity.sum(-1) / config.contrastive_temperature  # (B, Q)
    matched = torch.zeros_like(logits, dtype=torch.bool)
    matched[examples, queries] = True
    positive = (logits * matched).sum(1) / matched.sum(1).clamp(min=1)
    return (logits.logsumexp(1) - positive).mean()


def _saliency_loss(
    scores: Tensor, positive: Tensor | None, negative: Tensor | None, config: MomentDetrConfig
) -> Tensor:
    """Hinge loss over pairs of clips: sum(max(0, margin + s[negative] - s[positive])) / pairs * 2.

    A negative index stands for no pair: it adds nothing, but counts in the number of pairs.
    """
    scores = scores.float()
    if positive is None and negative is None:
        return scores.new_zeros(())
    if positive is None or negative is None or positive.shape != negative.shape or len(positive) != len(scores):
        shapes = [None if labels is None else tuple(labels.shape) for labels in (positive, negative)]
        raise ValueError(
            f"saliency_pos_labels and saliency_neg_labels must both be ({len(scores)}, pairs), not {shapes[0]} and "
            f"{shapes[1]}"
        )
    for labels in (positive, negative):
        if values_can_be_checked(labels) and labels.numel() and int(labels.max()) >= scores.shape[1]:
            raise ValueError(f"a saliency label names clip {int(labels.max())} of {scores.shape[1]} clips")
    positive, negative = positive.to(scores.device), negative.to(scores.device)
    margin = config.saliency_margin + scores.gather(1, negative.clamp(min=0)) - scores.gather(1, positive.clamp(min=0))
    valid = (positive >= 0) & (negative >= 0)
    return (margin.clamp(min=0) * valid).sum() / max(margin.numel(), 1) * 2
