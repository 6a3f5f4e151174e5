"""Moment-DETR: temporal grounding and highlight detection as set prediction over [video; text]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import PreTrainedModel
from transformers.utils import ModelOutput, can_return_tuple

from ..float32_heads import check_mask, in_float32
from ..original_checkpoints import Checkpoint, load_original_weights
from .configuration_moment_detr import MomentDetrConfig
from .loss_moment_detr import moment_detr_losses, weighted_sum
from .transformer_moment_detr import MomentDetrTransformer, SinePositionCode, TextPositionCode

__all__ = ["MomentDetrForTemporalGrounding", "MomentDetrOutput"]


@dataclass
class MomentDetrOutput(ModelOutput):
    """What `MomentDetrForTemporalGrounding` returns.

    Attributes:
        loss: the weighted sum of the terms, where there are labels.
        loss_dict: the terms, unweighted, under the original's names.
        pred_logits: (B, Q, 2), class 0 = foreground, 1 = background.
        pred_spans: (B, Q, 2) centre and width in [0, 1], or with `"ce"` spans (B, Q, 2 bins): logits of the first
            clip, then of the last.
        saliency_scores: (B, L_v), unbounded; undefined at padded clips, see `video_mask`.
        auxiliary_outputs: predictions of the earlier decoder layers, a list of dicts.
        encoder_hidden_states: the projected [video; text], then the raw output of every encoder layer, before any
            final norm; each (B, L_v + L_t, d).
        proj_queries: (B, Q, c), unit rows, where the contrastive loss is on.
        proj_txt_mem: (B, L_t, c), unit rows.
        proj_vid_mem: (B, L_v, c), unit rows.
        video_mask: (B, L_v) int64, 1 = a clip, 0 = padding. A Trainer that joins batches of different lengths pads it
            with -100, as it pads the scores.
    """

    loss: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    pred_logits: Tensor | None = None
    pred_spans: Tensor | None = None
    saliency_scores: Tensor | None = None
    auxiliary_outputs: list[dict[str, Tensor]] | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    proj_queries: Tensor | None = None
    proj_txt_mem: Tensor | None = None
    proj_vid_mem: Tensor | None = None
    video_mask: Tensor | None = None


class InputProjection(nn.Module):
    """LayerNorm, dropout, linear, and ReLU on all blocks but the last.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        dropout: dropout before the linear layer.
        relu: whether ReLU follows.
    """

    def __init__(self, in_features: int, out_features: int, *, dropout: float, relu: bool):
        super().__init__()
        self.LayerNorm = nn.LayerNorm(in_features)
        self.net = nn.Sequential(nn.Dropout(dropout), nn.Linear(in_features, out_features))
        self.relu = relu

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, L, in) to (B, L, out)."""
        projected = self.net(self.LayerNorm(features))
        return torch.relu(projected) if self.relu else projected


class Perceptron(nn.Module):
    """Three linear layers with ReLU between them: the span head.

    Args:
        width: width of input and hidden layers.
        out_features: width of the output.
    """

    def __init__(self, width: int, out_features: int):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, out_features)])

    def forward(self, states: Tensor) -> Tensor:
        """Map (..., width) to (..., out_features)."""
        first, second, last = self.layers
        return last(torch.relu(second(torch.relu(first(states)))))


class MomentDetrForTemporalGrounding(PreTrainedModel):
    """Moment-DETR (Lei et al., "QVHighlights: Detecting Moments and Highlights in Videos via Natural Language
    Queries", NeurIPS 2021, section 4): a transformer encoder over [video; text] and a decoder whose learnt queries
    become moments; a linear layer on the encoded clips gives highlight scores.

    Args:
        config: the configuration.

    Example:
        >>> sizes = {"video_feature_dim": 6, "text_feature_dim": 4, "d_model": 8, "num_attention_heads": 2}
        >>> model = MomentDetrForTemporalGrounding(MomentDetrConfig(**sizes))
        >>> output = model(torch.randn(1, 7, 6), text_features=torch.randn(1, 3, 4))
        >>> output.pred_spans.shape, output.saliency_scores.shape
        (torch.Size([1, 10, 2]), torch.Size([1, 7]))
    """

    config: MomentDetrConfig
    config_class = MomentDetrConfig
    main_input_name = "video_features"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MomentDetrEncoderLayer", "MomentDetrDecoderLayer"]
    # The terms are means over the batch or over its moments; there is no count of items to scale them by.
    accepts_loss_kwargs = False

    def __init__(self, config: MomentDetrConfig):
        super().__init__(config)
        width = config.d_model
        self.transformer = MomentDetrTransformer(config)
        self.position_embed = SinePositionCode(width)
        self.txt_position_embed = TextPositionCode(config)
        self.span_embed = Perceptron(width, 2 if config.span_loss_type == "l1" else 2 * config.num_span_bins)
        self.class_embed = nn.Linear(width, 2)
        self.query_embed = nn.Embedding(config.num_queries, width)
        self.input_txt_proj = _input_projections(config.text_feature_dim, config)
        self.input_vid_proj = _input_projections(config.video_feature_dim, config)
        if config.contrastive_align:
            self.contrastive_align_projection_query = nn.Linear(width, config.contrastive_dim)
            self.contrastive_align_projection_txt = nn.Linear(width, config.contrastive_dim)
            self.contrastive_align_projection_vid = nn.Linear(width, config.contrastive_dim)
        self.saliency_proj = nn.Linear(width, 1)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Xavier-uniform matrices in the transformer, PyTorch's defaults elsewhere."""
        if isinstance(module, nn.Linear | nn.LayerNorm | nn.Embedding):
            module.reset_parameters()
            if isinstance(module, nn.Linear) and any(module is inner for inner in self.transformer.modules()):
                nn.init.xavier_uniform_(module.weight)
        elif isinstance(module, nn.MultiheadAttention):
            module._reset_parameters()
        if isinstance(module, NonDynamicallyQuantizableLinear):  # the output projection of PyTorch's attention
            nn.init.zeros_(module.bias)

    @can_return_tuple
    def forward(
        self,
        video_features: Tensor,
        video_mask: Tensor | None = None,
        text_features: Tensor | None = None,
        text_mask: Tensor | None = None,
        span_labels: Sequence[Tensor] | Tensor | None = None,
        saliency_pos_labels: Tensor | None = None,
        saliency_neg_labels: Tensor | None = None,
        span_mask: Tensor | None = None,
    ) -> MomentDetrOutput:
        """Predict moments and highlight scores.

        Args:
            video_features: (B, L_v, video_feature_dim).
            video_mask: (B, L_v), 0 = padding; None: no padding.
            text_features: (B, L_t, text_feature_dim).
            text_mask: (B, L_t), 0 = padding; None: no padding.
            span_labels: the moments, (B, n, 2) padded with negative rows (the Trainer's -100), or a list of (n, 2),
                one per example: centre and width as fractions of the video, or with `"ce"` spans the int64 indices of
                the first and last clip.
            saliency_pos_labels: (B, P) indices of salient clips; -1 = no pair.
            saliency_neg_labels: (B, P) indices of clips that should score lower than their partners.
            span_mask: (B, n), positive = a moment; None: the rows of `span_labels` that are not negative.

        Raises:
            ValueError: the text is missing, or shapes do not fit.
        """
        if text_features is None:
            raise ValueError("Moment-DETR grounds a text query: pass text_features (batch, tokens, text_feature_dim)")
        video, video_mask = self._checked("video", video_features, video_mask)
        text, text_mask = self._checked("text", text_features, text_mask)
        clips, words = video.shape[1], text.shape[1]
        video, text = self.input_vid_proj(video), self.input_txt_proj(text)
        positions = [
            self.position_embed(video_mask).to(video.dtype),
            self.txt_position_embed(text) if self.config.use_text_positions else torch.zeros_like(text),
        ]
        segments = torch.arange(clips + words, device=video.device).ge(clips).long().expand(len(video), -1)
        hidden_states = [torch.cat((video, text), dim=1)]  # then every layer's output; (B, L_v + L_t, d)
        states, memory = self.transformer(
            hidden_states[0],
            attention_mask=torch.cat((video_mask, text_mask), dim=1),
            segment_ids=segments,
            position_embeddings=torch.cat(positions, dim=1),
            queries=self.query_embed.weight,
            layer_outputs=hidden_states,
        )
        layers = self._predictions(states, memory[:, clips:])
        supervised = [layers[-1], *layers[:-1]] if self.config.auxiliary_loss else layers[-1:]
        saliency_scores = in_float32(self.saliency_proj, memory[:, :clips]).squeeze(-1)

        loss_dict = None
        if any(labels is not None for labels in (span_labels, saliency_pos_labels, saliency_neg_labels)):
            loss_dict = moment_detr_losses(
                supervised,
                config=self.config,
                span_labels=span_labels,
                saliency_scores=saliency_scores,
                saliency_pos_labels=saliency_pos_labels,
                saliency_neg_labels=saliency_neg_labels,
                text_mask=text_mask,
                span_mask=span_mask,
            )
        video_memory = None
        if self.config.contrastive_align:
            video_memory = _unit(self.contrastive_align_projection_vid(memory[:, :clips]))
        return MomentDetrOutput(
            loss=None if loss_dict is None else weighted_sum(loss_dict, self.config),
            loss_dict=loss_dict,
            saliency_scores=saliency_scores,
            auxiliary_outputs=layers[:-1] if self.config.auxiliary_loss else None,
            encoder_hidden_states=tuple(hidden_states),
            proj_vid_mem=video_memory,
            video_mask=video_mask.long(),
            **layers[-1],
        )

    def _checked(self, kind: str, features: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Features in the model's dtype, mask as booleans; both fit the configuration."""
        width = getattr(self.config, f"{kind}_feature_dim")
        if features.dim() != 3 or features.shape[-1] != width:
            raise ValueError(
                f"{kind}_features must be (batch, length, {kind}_feature_dim={width}), not {tuple(features.shape)}"
            )
        if mask is None:
            mask = features.new_ones(features.shape[:2])
        if mask.shape != features.shape[:2]:
            raise ValueError(f"{kind}_mask must be {tuple(features.shape[:2])}, not {tuple(mask.shape)}")
        check_mask(f"{kind}_mask", mask)
        return features.to(self.dtype), mask.to(features.device).ne(0)

    def _predictions(self, states: Tensor, text_memory: Tensor) -> list[dict[str, Tensor]]:
        """One dict per decoder layer, from the normalised states (layers, B, Q, d)."""
        spans = in_float32(self.span_embed, states)
        predictions = {
            "pred_logits": in_float32(self.class_embed, states),
            "pred_spans": spans.sigmoid() if self.config.span_loss_type == "l1" else spans,
        }
        shared = {}
        if self.config.contrastive_align:
            predictions["proj_queries"] = _unit(self.contrastive_align_projection_query(states))
            shared["proj_txt_mem"] = _unit(self.contrastive_align_projection_txt(text_memory))
        return [
            {**{name: value[layer] for name, value in predictions.items()}, **shared} for layer in range(len(states))
        ]

    @classmethod
    def from_original_checkpoint(
        cls, checkpoint: Checkpoint, config: MomentDetrConfig
    ) -> MomentDetrForTemporalGrounding:
        """Load weights of the original implementation, in evaluation mode.

        Args:
            checkpoint: path or state dict, bare or as the original saves it (`{"model": ..., "opt": ...}`).
            config: the configuration, see `MomentDetrConfig.from_original_options`.

        Raises:
            ValueError: the keys do not fit the configuration.
        """
        model = cls(config)
        load_original_weights(model, checkpoint, ignored=lambda key: key.endswith("empty_weight"))
        return model.eval()


def _input_projections(in_features: int, config: MomentDetrConfig) -> nn.Sequential:
    count: int = config.num_input_projections
    widths = [in_features] + [config.d_model] * count
    kinds: dict[str, Any] = {"dropout": config.input_dropout}
    return nn.Sequential(*[InputProjection(*widths[i : i + 2], relu=i < count - 1, **kinds) for i in range(count)])


def _unit(vectors: Tensor) -> Tensor:
    return nn.functional.normalize(vectors, dim=-1)
