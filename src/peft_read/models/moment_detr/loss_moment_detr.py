"""The losses of Moment-DETR: Hungarian matching, spans, labels, saliency, contrastive alignment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from ...spans import centre_width_to_start_end, generalized_temporal_iou
from .configuration_moment_detr import MomentDetrConfig

__all__ = ["match_queries", "moment_detr_losses", "weighted_sum"]

FOREGROUND, BACKGROUND = 0, 1  # a comment of the original says the opposite of what it trains

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
        targets: one (n, 2) an example.
        config: the configuration.

    Returns:
        One pair of indices (queries, targets) an example.
    """
    foreground = logits.float().softmax(-1)[..., FOREGROUND]
    pairs = []
    for probability, predicted, target in zip(foreground, spans.float(), targets, strict=True):
        if config.span_loss_type == "l1":
            target = target.to(predicted)
            distance = (predicted.unsqueeze(1) - target).abs().sum(-1)  # (Q, n)
            overlap = generalized_temporal_iou(
                centre_width_to_start_end(predicted).unsqueeze(1), centre_width_to_start_end(target)
            )
            cost = config.span_cost * distance - config.giou_cost * overlap
        else:
            first, last = predicted.view(len(predicted), 2, -1).softmax(-1).unbind(1)
            cost = -config.span_cost * (first[:, target[:, 0]] + last[:, target[:, 1]])
        cost = cost - config.class_cost * probability.unsqueeze(1)
        queries, matched = linear_sum_assignment(cost.cpu().numpy())
        pairs.append((torch.from_numpy(queries).to(logits.device), torch.from_numpy(matched).to(logits.device)))
    return pairs


def moment_detr_losses(
    layers: Sequence[Mapping[str, Tensor]],
    *,
    config: MomentDetrConfig,
    span_labels: Sequence[Tensor] | None,
    saliency_scores: Tensor,
    saliency_pos_labels: Tensor | None,
    saliency_neg_labels: Tensor | None,
    text_mask: Tensor,
) -> dict[str, Tensor]:
    """Every term of the loss, unweighted, under the original's names; earlier layers' terms end in `_0`, `_1` ...

    Args:
        layers: the predictions of the layers that are supervised, the LAST decoder layer first, then the earlier ones
            in order: `pred_logits` (B, Q, 2), `pred_spans`, and for the contrastive loss `proj_queries`,
            `proj_txt_mem`.
        config: the configuration.
        span_labels: one (n, 2) an example; None: no moments are known, and their terms are left out.
        saliency_scores: (B, L).
        saliency_pos_labels: (B, P) indices of salient clips, or None: the term is 0.
        saliency_neg_labels: (B, P) indices of clips that are less so.
        text_mask: (B, T), True = real.

    Raises:
        ValueError: the labels do not fit the batch or the kind of spans.
    """
    losses: dict[str, Tensor] = {}
    if span_labels is not None:
        _check_span_labels(span_labels, layers[0]["pred_logits"], config)
        for index, layer in enumerate(layers):
            suffix = f"_{index - 1}" if index else ""
            terms = _layer_losses(layer, span_labels, config, text_mask)
            losses.update({name + suffix: value for name, value in terms.items()})
    losses["loss_saliency"] = _saliency_loss(saliency_scores, saliency_pos_labels, saliency_neg_labels, config)
    return losses


def weighted_sum(losses: Mapping[str, Tensor], config: MomentDetrConfig) -> Tensor:
    """The total loss: every term times its weight; `class_error` is a figure to watch, not a loss."""
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


def _check_span_labels(span_labels: Sequence[Tensor], logits: Tensor, config: MomentDetrConfig) -> None:
    if len(span_labels) != len(logits):
        raise ValueError(f"span_labels has {len(span_labels)} entries for a batch of {len(logits)}")
    for spans in span_labels:
        if spans.dim() != 2 or spans.shape[1] != 2:
            raise ValueError(f"every entry of span_labels must be (moments, 2), not {tuple(spans.shape)}")
        if config.span_loss_type == "ce":
            if spans.is_floating_point():
                raise ValueError("span_loss_type='ce' needs int64 clip indices (first, last) in span_labels")
            if len(spans) and not 0 <= int(spans.min()) <= int(spans.max()) < config.num_span_bins:
                raise ValueError(f"a clip index in span_labels is not in [0, {config.num_span_bins})")


def _layer_losses(
    layer: Mapping[str, Tensor], span_labels: Sequence[Tensor], config: MomentDetrConfig, text_mask: Tensor
) -> dict[str, Tensor]:
    logits, spans = layer["pred_logits"].float(), layer["pred_spans"].float()
    pairs = match_queries(logits, spans, span_labels, config)
    examples = torch.cat([torch.full_like(queries, i) for i, (queries, _) in enumerate(pairs)])
    queries = torch.cat([queries for queries, _ in pairs])
    targets = torch.cat(
        [labels.to(logits.device)[chosen] for labels, (_, chosen) in zip(span_labels, pairs, strict=True)]
    )
    losses = _span_losses(spans[examples, queries], targets, config)
    losses.update(_label_losses(logits, examples, queries, config))
    if config.contrastive_align:
        losses["loss_contrastive_align"] = _contrastive_loss(layer, examples, queries, config, text_mask)
    return losses


def _mean(values: Tensor) -> Tensor:
    """The mean, and 0 with a gradient of 0 where there is nothing to average."""
    return values.mean() if values.numel() else values.sum()


def _span_losses(predicted: Tensor, target: Tensor, config: MomentDetrConfig) -> dict[str, Tensor]:
    """Of the matched spans: (n, 2) against (n, 2), or (n, 2 bins) against clip indices (n, 2)."""
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
    """Matched queries shall be closer to the text than the others; a query's logit is summed over text positions."""
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
    """Hinge loss over pairs of clips: sum(max(0, margin + s[negative] - s[positive])) / pairs * 2."""
    scores = scores.float()
    if positive is None or negative is None:
        return scores.new_zeros(())
    positive, negative = positive.to(scores.device), negative.to(scores.device)
    margin = config.saliency_margin + scores.gather(1, negative) - scores.gather(1, positive)
    return margin.clamp(min=0).sum() / margin.numel() * 2
