"""Video guidance for text encoders: the visual transformer, six forms of text-video attention, and the forget gate.

Yu et al., "Vision Guided Generative Pre-trained Language Models for Multimodal Abstractive Summarization", EMNLP 2021,
section 3; the forms of attention are numbered as in the original implementation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..checkpointing import with_gradient
from .float32_heads import check_mask
from .packed_attention import PackedAttention

__all__ = ["VISUAL_MODULES", "ReportedState", "VisionGuidance", "VisualTransformer", "sine_positions"]

# Names, directly below the encoder, of what video guidance adds; the last two are the closing norms of BART and T5.
VISUAL_MODULES = frozenset(
    {"_linear_1", "_linear_2", "_linear_3", "_linear_4", "_multi_head_attn", "fg", "img_transformer"}
    | {"final_layer_norm", "custom_layer_norm"}
)


def sine_positions(length: int, width: int, *, device: torch.device | None = None) -> Tensor:
    """Sine codes of the positions 0 to length-1: sine on even, cosine on odd channels (Vaswani et al., 2017, 3.5).

    Args:
        length: number of positions.
        width: number of channels.
        device: where to compute.

    Returns:
        A float32 tensor (length, width).
    """
    position = torch.arange(length, dtype=torch.float32, device=device).unsqueeze(1)
    even_channels = torch.arange(0, width, 2, dtype=torch.float32, device=device)
    angle = position * torch.exp(even_channels * (-math.log(10000.0) / width))  # (length, ceil(width / 2))
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)[:, :width]


class ReportedState(nn.Identity):
    """Marks the tensors that an encoder reports as its hidden states.

    transformers records hidden states with hooks on the blocks. The fusion comes after a block, so the blocks' outputs
    (what adapters and alignment see) and the reported states differ, and the latter need a module of their own.
    """


class VisualTransformerLayer(GradientCheckpointingLayer):
    """One post-norm transformer layer over frames, with the parameter names of `torch.nn.TransformerEncoderLayer`.

    It is not that class, because its inference path calls neither the hooks nor the replaced linears of its children.

    Args:
        config: a configuration with the fields of `VisionGuidanceOptions`.
    """

    def __init__(self, config: Any):
        super().__init__()
        width = config.visual_feature_dim
        self.self_attn = PackedAttention(width, config.img_trans_heads, dropout=config.img_trans_dropout)
        self.linear1 = nn.Linear(width, config.img_trans_ffn_dim)
        self.linear2 = nn.Linear(config.img_trans_ffn_dim, width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.dropout = nn.Dropout(config.img_trans_dropout)

    def forward(self, hidden_states: Tensor, padding_mask: Tensor | None) -> Tensor:
        """Map (B, F, D) to (B, F, D); `padding_mask` (B, F) is True at padding, which no frame attends to."""
        attended, _ = self.self_attn(hidden_states, hidden_states, hidden_states, key_padding_mask=padding_mask)
        hidden_states = self.norm1(hidden_states + self.dropout(attended))
        fed_forward = self.linear2(self.dropout(torch.relu(self.linear1(hidden_states))))
        return self.norm2(hidden_states + self.dropout(fed_forward))


class VisualTransformerStack(nn.Module):
    """The layers of the visual transformer.

    Args:
        config: a configuration with the fields of `VisionGuidanceOptions`.
    """

    def __init__(self, config: Any):
        super().__init__()
        self.layers = nn.ModuleList([VisualTransformerLayer(config) for _ in range(config.img_trans_layers)])

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Map (B, F, D) to (B, F, D); `attention_mask` (B, F) is False at padding."""
        padding_mask = None if attention_mask is None else ~attention_mask
        for layer in self.layers:
            hidden_states = layer(with_gradient(layer, hidden_states), padding_mask)
        return hidden_states


class VisualTransformer(nn.Module):
    """The visual transformer of VG-GPLMs: scaled frame features, sine positions, post-norm layers.

    Padded frames are not attended to, but they are transformed like the others, so their states are not zero.

    Args:
        config: a configuration with the fields of `VisionGuidanceOptions`.
    """

    def __init__(self, config: Any):
        super().__init__()
        self.encoder = VisualTransformerStack(config)
        self.dropout = nn.Dropout(config.img_trans_dropout)

    def forward(self, video_features: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Map frame features (B, F, D) to states (B, F, D); `attention_mask` (B, F) is False at padding."""
        frames, width = video_features.shape[1:]
        positions = sine_positions(frames, width, device=video_features.device).to(video_features.dtype)
        return self.encoder(self.dropout(video_features * math.sqrt(width) + positions), attention_mask=attention_mask)


class VisionGuidance:
    """Mixin that adds the fusion modules and `fuse` to a text encoder, which holds them in the original too.

    With text states h (B, S, d), frames v (B, F, D) and the linears L1 ... L4 (`_linear_1` ...), the attended video
    features a and the update o are

    * type 0: a = softmax(h L1(v)^T) v, o = L2([h; a])
    * type 1: a = softmax(h L1(v)^T) L1(v), o = L2([h; a])
    * type 2: a as in type 1, o = a
    * type 3: a = softmax(L1(h) L2(v)^T) v, o = L3([h; a])
    * type 4: a = MultiHead(query L3(h), key L1(v), value L2(v)), o = L4([h; a])
    * type 5: a as in type 4, o = a

    The softmax of the types 0 to 3 runs over the TEXT axis in the original, and so in every published checkpoint:
    a frame divides its attention among the words. `softmax_dim="video"` lets a word divide its attention among the
    frames. With the forget gate, a <- dropout(sigmoid(fg([a; h]))) * a. The fused state is LN(h + dropout(o)).
    """

    config: Any
    dtype: torch.dtype

    def add_vision_guidance(self, text_dim: int) -> nn.LayerNorm:
        """Create the fusion modules on this encoder and return the closing norm, whose name differs by backbone.

        Args:
            text_dim: width of the text states.
        """
        config = self.config
        video_dim, common_dim, kind = config.visual_feature_dim, config.dim_common, config.cross_attn_type
        if config.use_img_trans:
            self.img_transformer = VisualTransformer(config)
        if kind == 3:
            self._linear_1 = nn.Linear(text_dim, common_dim)
            self._linear_2 = nn.Linear(video_dim, common_dim)
            self._linear_3 = nn.Linear(text_dim + video_dim, text_dim)
        elif kind in (4, 5):
            self._linear_1 = nn.Linear(video_dim, common_dim)  # keys
            self._linear_2 = nn.Linear(video_dim, common_dim)  # values
            self._linear_3 = nn.Linear(text_dim, common_dim)  # queries
            self._multi_head_attn = PackedAttention(common_dim, config.n_attn_heads)
            if kind == 4:
                self._linear_4 = nn.Linear(text_dim + common_dim, text_dim)
        else:
            self._linear_1 = nn.Linear(video_dim, text_dim)
            if kind != 2:
                self._linear_2 = nn.Linear(text_dim + (video_dim if kind == 0 else text_dim), text_dim)
        if config.use_forget_gate:
            attended_dim = {0: video_dim, 1: text_dim, 2: text_dim, 3: video_dim, 4: common_dim, 5: common_dim}[kind]
            self.fg = nn.Linear(attended_dim + text_dim, attended_dim)
        return nn.LayerNorm(text_dim)

    def check_video(
        self, video_features: Tensor | None, video_mask: Tensor | None, text: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The frames in the encoder's dtype and their mask as booleans.

        Args:
            video_features: (B, F, D).
            video_mask: (B, F), 0 = padding; None: no padding.
            text: the text embeddings (B, S, d), for the batch size.

        Raises:
            ValueError: the video is missing, a shape does not fit, or the mask is one to be added.
        """
        config = self.config
        if video_features is None:
            raise ValueError(
                f"{type(self).__name__} fuses video into the text (fusion_layer={config.fusion_layer}): pass "
                "video_features, or use a configuration with fusion_layer=None for a text-only model"
            )
        expected = (text.shape[0], config.visual_feature_dim)
        if video_features.dim() != 3 or (video_features.shape[0], video_features.shape[2]) != expected:
            raise ValueError(
                f"video_features must be (batch, frames, visual_feature_dim) = ({expected[0]}, F, {expected[1]}), "
                f"not {tuple(video_features.shape)}"
            )
        if video_mask is None:
            video_mask = video_features.new_ones(video_features.shape[:2])
        if video_mask.shape != video_features.shape[:2]:
            raise ValueError(
                f"video_mask must be (batch, frames) = {tuple(video_features.shape[:2])}, "
                f"not {tuple(video_mask.shape)}"
            )
        check_mask("video_mask", video_mask)
        return video_features.to(text.dtype), video_mask.to(video_features.device).ne(0)

    def fuse(
        self, text: Tensor, video: Tensor, *, text_mask: Tensor | None, video_mask: Tensor, dropout: Callable
    ) -> Tensor:
        """The update o of the text states, before dropout, residual and norm (see the class).

        Args:
            text: h (B, S, d).
            video: v (B, F, D), raw features or the visual transformer's output.
            text_mask: (B, S), False = padding; only used with `mask_fusion`. None: no padding.
            video_mask: (B, F), False = padding; only used with `mask_fusion`.
            dropout: applied to the forget gate.

        Returns:
            (B, S, d).
        """
        kind = self.config.cross_attn_type
        if kind in (4, 5):
            attended = self._attend_by_heads(text, video, video_mask)
        else:
            query = self._linear_1(text) if kind == 3 else text
            key = self._linear_2(video) if kind == 3 else self._linear_1(video)  # (B, F, d or common)
            value = key if kind in (1, 2) else video
            scores = torch.matmul(query, key.transpose(1, 2))  # (B, S, F)
            attended = torch.matmul(self._normalise(scores, text_mask, video_mask), value)
        if self.config.use_forget_gate:
            attended = dropout(torch.sigmoid(self.fg(torch.cat((attended, text), dim=-1)))) * attended
        if kind in (2, 5):
            return attended
        combine = {0: "_linear_2", 1: "_linear_2", 3: "_linear_3", 4: "_linear_4"}[kind]
        return getattr(self, combine)(torch.cat((text, attended), dim=-1))

    def _attend_by_heads(self, text: Tensor, video: Tensor, video_mask: Tensor) -> Tensor:
        padding_mask = ~video_mask if self.config.mask_fusion else None
        attended, _ = self._multi_head_attn(
            self._linear_3(text), self._linear_1(video), self._linear_2(video), key_padding_mask=padding_mask
        )
        # an example without frames has nothing to attend to
        return attended * video_mask.any(dim=1)[:, None, None] if self.config.mask_fusion else attended

    def _normalise(self, scores: Tensor, text_mask: Tensor | None, video_mask: Tensor) -> Tensor:
        """Softmax of the scores (B, S, F) over the configured axis, without padding if the configuration says so."""
        axis = 1 if self.config.softmax_dim == "text" else 2
        if not self.config.mask_fusion:
            return torch.softmax(scores, dim=axis, dtype=torch.float32).to(scores.dtype)
        valid = video_mask.unsqueeze(1)  # (B, 1, F)
        if text_mask is not None:
            valid = valid & text_mask.unsqueeze(2)
        scores = scores.float()
        weights = torch.softmax(scores.masked_fill(~valid, torch.finfo(scores.dtype).min), dim=axis)
        return (weights * valid).to(video_mask.device, self.dtype)
