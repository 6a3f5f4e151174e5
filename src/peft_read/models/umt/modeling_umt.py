"""UMT: moment retrieval and highlight detection from video, audio and text streams."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput, can_return_tuple

from ..float32_heads import check_mask, in_float32
from ..original_checkpoints import Checkpoint, load_original_weights
from .configuration_umt import UMTConfig
from .loss_umt import boundary_losses, boundary_targets, saliency_loss
from .transformer_umt import (
    BottleneckTransformer,
    CrossModalEncoder,
    LearntPositions,
    Projection,
    QueryDecoder,
    QueryGenerator,
    UniModalEncoder,
)

__all__ = ["UMTForTemporalGrounding", "UMTOutput"]


@dataclass
class UMTOutput(ModelOutput):
    """What `UMTForTemporalGrounding` returns; the fields of absent heads are None.

    Attributes:
        loss: the sum of the terms, where there are labels.
        loss_dict: the terms under the original's names (`d2.saliency_loss` ...), weighted.
        saliency_scores: (B, L) in [0, 1], 0 at padded clips.
        boundaries: (B, K, 3) windows (start, end, score) in seconds by descending score, K = min(`max_moments`, L)
            for each of `pred_layers`.
        video_mask: (B, L) int64, 1 = a clip, 0 = padding. A Trainer that joins batches of different lengths pads it
            with -100, as it pads the scores and the windows.
    """

    loss: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    saliency_scores: Tensor | None = None
    boundaries: Tensor | None = None
    video_mask: Tensor | None = None


class SaliencyHead(nn.Module):
    """A linear layer on every clip.

    Args:
        config: the configuration.
    """

    def __init__(self, config: UMTConfig):
        super().__init__()
        self.saliency_pred = Projection(config.d_model, 1)

    def forward(self, states: Tensor) -> Tensor:
        """Logits (B, L) of states (B, L, d)."""
        return self.saliency_pred(states).squeeze(-1)


class BoundaryHead(nn.Module):
    """Three linear layers on every clip: a window's centre probability, its length, and the offset of its centre.

    Args:
        config: the configuration.
    """

    def __init__(self, config: UMTConfig):
        super().__init__()
        self.config = config
        self.center_pred = Projection(config.d_model, 1)
        self.window_pred = Projection(config.d_model, 1)
        self.offset_pred = Projection(config.d_model, 1)

    def forward(self, states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Centre probabilities (0 at padding), window lengths and offsets in clips, each (B, L)."""
        center, window, offset = (
            head(states).squeeze(-1) for head in (self.center_pred, self.window_pred, self.offset_pred)
        )
        return center.sigmoid() * mask, window, offset

    def decode(self, center: Tensor, window: Tensor, offset: Tensor) -> Tensor:
        """The best windows (B, K, 3) in seconds by descending score.

        Padded clips have score 0, so their rows come last, in no particular order.
        """
        clips = center.shape[1]
        scores, best = center.topk(min(self.config.max_moments, clips))
        middle = best + offset.float().gather(1, best).clamp(min=0)
        half = window.float().gather(1, best).clamp(min=0) / 2
        bounds = torch.stack((middle - half, middle + half), dim=-1).clamp(min=0, max=clips - 1)
        unit = self.config.clip_seconds
        seconds = bounds * unit + bounds.new_tensor([0.0, unit])
        return torch.cat((seconds, scores.float().unsqueeze(-1)), dim=-1)


def _ranked(boundaries: list[Tensor]) -> Tensor:
    """The windows of all layers together, each (B, K, 3) by descending score; equal scores in the order of layers."""
    if len(boundaries) == 1:
        return boundaries[0]
    joined = torch.cat(boundaries, dim=1)
    order = joined[..., 2].sort(dim=1, descending=True, stable=True).indices
    return joined.gather(1, order.unsqueeze(-1).expand_as(joined))


class UMTForTemporalGrounding(PreTrainedModel):
    """UMT (Liu et al., "UMT: Unified Multi-modal Transformers for Joint Video Moment Retrieval and Highlight
    Detection", CVPR 2022): video and audio encoders, a bottleneck between them, queries from the text, a decoder over
    clips, and heads for highlights and moments.

    Args:
        config: the configuration.

    Example:
        >>> features = {"video_feature_dim": 6, "audio_feature_dim": 5, "text_feature_dim": None}
        >>> model = UMTForTemporalGrounding(UMTConfig(**features, d_model=8, max_positions=9))
        >>> model(torch.randn(1, 7, 6), torch.randn(1, 7, 5)).saliency_scores.shape
        torch.Size([1, 7])
    """

    config: UMTConfig
    config_class = UMTConfig
    main_input_name = "video_features"
    supports_gradient_checkpointing = True
    _no_split_modules = ["EncoderLayer", "BottleneckLayer", "DecoderLayer"]
    # The terms are means over clips or windows; there is no count of items to scale them by.
    accepts_loss_kwargs = False

    def __init__(self, config: UMTConfig):
        super().__init__(config)
        self.video_enc = UniModalEncoder(config, config.video_feature_dim)
        if config.audio_feature_dim is not None:
            self.audio_enc = UniModalEncoder(config, config.audio_feature_dim)
            self.cross_enc = CrossModalEncoder(config)
        self.query_gen = QueryGenerator(config)
        self.query_dec = QueryDecoder(config)
        heads = {"saliency": SaliencyHead, "boundary": BoundaryHead}
        self.pred_head = nn.ModuleList([heads[name](config) for name in config.heads])
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Xavier-normal linear layers, zero bias; positions and tokens normal with standard deviation 1 / sqrt(d)."""
        if isinstance(module, nn.Linear):
            nn.init.xavier_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(module, LearntPositions):
            nn.init.normal_(module.pe, std=1 / math.sqrt(self.config.d_model))
        elif isinstance(module, BottleneckTransformer):
            nn.init.normal_(module.token, std=1 / math.sqrt(self.config.d_model))

    @can_return_tuple
    def forward(
        self,
        video_features: Tensor,
        audio_features: Tensor | None = None,
        text_features: Tensor | None = None,
        video_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
        saliency_labels: Tensor | None = None,
        boundary_labels: Tensor | None = None,
        boundary_mask: Tensor | None = None,
    ) -> UMTOutput:
        """Predict highlights and moments.

        Args:
            video_features: (B, L, video_feature_dim).
            audio_features: (B, L, audio_feature_dim); for a configuration without audio, None.
            text_features: (B, T, text_feature_dim); ignored by a configuration without text.
            video_mask: (B, L), 0 = padding. None: the clips with a saliency label >= 0, as in the original, and
                without labels all.
            text_mask: (B, T), 0 = padding. None: the tokens whose first channel is finite (the original pads with
                infinity).
            saliency_labels: (B, L) in [0, 1], negative = no label.
            boundary_labels: (B, n, 2) windows in seconds.
            boundary_mask: (B, n), positive = a window. None: the rows that do not start below 0.

        Raises:
            ValueError: a stream is missing, or shapes do not fit. Labels without their head are ignored.
        """
        config = self.config
        video = self._checked("video", video_features, None)
        audio = self._checked("audio", audio_features, video)
        text, text_mask = self._checked_text(text_features, text_mask)
        mask = self._clip_mask(video, video_mask, saliency_labels)

        clips = self.video_enc(video, attention_mask=mask)
        if config.audio_feature_dim is not None:
            clips = self.cross_enc(clips, self.audio_enc(audio, attention_mask=mask), attention_mask=mask)
        layers = self.query_dec(self.query_gen(clips, text, text_mask), clips, attention_mask=mask)

        total = len(layers)
        predicting = [layer % total for layer in config.pred_layers]
        supervised = predicting if config.loss_layers is None else [layer % total for layer in config.loss_layers]
        losses: dict[str, Tensor] = {}
        saliencies: list[Tensor] = []
        boundaries: list[Tensor] = []
        for head in self.pred_head:
            for i in sorted({*predicting, *supervised}):
                if isinstance(head, SaliencyHead):
                    logits = in_float32(head, layers[i])
                    if i in predicting:
                        saliencies.append(logits.sigmoid() * mask)
                    if saliency_labels is not None and i in supervised:
                        losses[f"d{i}.saliency_loss"] = saliency_loss(logits, saliency_labels, mask, config)
                elif isinstance(head, BoundaryHead):
                    center, window, offset = in_float32(head, layers[i], mask)
                    if i in predicting:
                        boundaries.append(head.decode(center, window, offset))
                    if boundary_labels is not None and i in supervised:
                        labels = boundary_labels.to(center.device)
                        targets = boundary_targets(labels, boundary_mask, mask.shape[1], config)
                        terms = boundary_losses(center, window, offset, targets, mask, config)
                        losses.update({f"d{i}.{name}": value for name, value in terms.items()})
        return UMTOutput(
            loss=torch.stack(list(losses.values())).sum() if losses else None,
            loss_dict=losses or None,
            saliency_scores=torch.stack(saliencies).mean(0) if saliencies else None,
            boundaries=_ranked(boundaries) if boundaries else None,
            video_mask=mask.long(),
        )

    def _checked(self, kind: str, features: Tensor | None, clips: Tensor | None) -> Tensor | None:
        """A stream in the model's dtype, of the configured width and, for audio, as long as the video."""
        width = getattr(self.config, f"{kind}_feature_dim")
        if (features is None) != (width is None):
            raise ValueError(
                f"{kind}_features are {'missing' if features is None else 'given'}, and the configuration has "
                f"{kind}_feature_dim={width}"
            )
        if features is None:
            return None
        length = "L" if clips is None else clips.shape[1]
        if features.dim() != 3 or features.shape[-1] != width or (clips is not None and features.shape[1] != length):
            raise ValueError(f"{kind}_features must be (batch, {length}, {width}), not {tuple(features.shape)}")
        return features.to(self.dtype)

    def _checked_text(self, text: Tensor | None, text_mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        width = self.config.text_feature_dim
        if width is None:
            return None, None
        if text is None or text.dim() != 3 or text.shape[-1] != width:
            shape = None if text is None else tuple(text.shape)
            raise ValueError(f"text_features must be (batch, tokens, text_feature_dim={width}), not {shape}")
        finite = text.isfinite()
        text_mask = finite[..., 0] if text_mask is None else text_mask.to(text.device)
        check_mask("text_mask", text_mask)
        if text_mask.shape != text.shape[:2]:
            raise ValueError(f"text_mask must be {tuple(text.shape[:2])}, not {tuple(text_mask.shape)}")
        return text.where(finite, 0).to(self.dtype), text_mask.ne(0)

    @staticmethod
    def _clip_mask(video: Tensor | None, video_mask: Tensor | None, saliency_labels: Tensor | None) -> Tensor:
        assert video is not None  # checked before
        for name, given in (("video_mask", video_mask), ("saliency_labels", saliency_labels)):
            if given is not None and given.shape != video.shape[:2]:
                raise ValueError(f"{name} must be {tuple(video.shape[:2])}, not {tuple(given.shape)}")
        if video_mask is not None:
            check_mask("video_mask", video_mask)
            return video_mask.to(video.device).ne(0)
        if saliency_labels is not None:
            return saliency_labels.to(video.device) >= 0
        return torch.ones(video.shape[:2], dtype=torch.bool, device=video.device)

    @classmethod
    def from_original_checkpoint(cls, checkpoint: Checkpoint, config: UMTConfig) -> UMTForTemporalGrounding:
        """Load weights of the original implementation (nncore 0.3.6), in evaluation mode.

        Args:
            checkpoint: path or state dict, bare or as nncore saves it (`{"state_dict": ..., "meta": ...}`, with or
                without the data-parallel prefix `module.`).
            config: the configuration, see `UMTConfig.from_original_options`.

        Raises:
            ValueError: the keys do not fit the configuration.
        """
        model = cls(config)
        load_original_weights(model, checkpoint)
        return model.eval()
