"""The transformer of Moment-DETR: an encoder over [video; text], a decoder over moment queries."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ...checkpointing import with_gradient
from ..packed_attention import PackedAttention
from .configuration_moment_detr import MomentDetrConfig

__all__ = ["MomentDetrTransformer", "SinePositionCode", "TextPositionCode"]


class SinePositionCode(nn.Module):
    """Sine code of a clip's relative position: with c the count of valid clips, p = 2 pi c / (c_last + 1e-6).

    Channel j holds the sine (j even) or cosine (j odd) of p / 10000^(2 floor(j / 2) / d). Padded clips share the
    code of the last valid clip.

    Args:
        width: d, even.
    """

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, mask: Tensor) -> Tensor:
        """Map a mask (B, L), False = padding, to codes (B, L, d) in float32."""
        count = mask.cumsum(1, dtype=torch.float32)
        position = count / (count[:, -1:] + 1e-6) * (2 * math.pi)
        channel = torch.arange(self.width, dtype=torch.float32, device=mask.device)
        angle = position.unsqueeze(-1) / 10000 ** (2 * (channel // 2) / self.width)  # (B, L, d)
        return torch.stack((angle[..., 0::2].sin(), angle[..., 1::2].cos()), dim=-1).flatten(2)


class TextPositionCode(nn.Module):
    """LayerNorm(projected text + learnt position): the original's code contains the text features themselves.

    Args:
        config: the configuration.
    """

    def __init__(self, config: MomentDetrConfig):
        super().__init__()
        self.position_embeddings = nn.Embedding(config.max_text_positions, config.d_model)
        self.LayerNorm = nn.LayerNorm(config.d_model)
        self.dropout = nn.Dropout(config.input_dropout)

    def forward(self, text: Tensor) -> Tensor:
        """Map projected text (B, L, d) to codes (B, L, d)."""
        rows = self.position_embeddings.weight
        if text.shape[1] > len(rows):
            raise ValueError(
                f"{text.shape[1]} text tokens, but the table of text positions has {len(rows)} rows: cut the text, or "
                "raise max_text_positions"
            )
        return self.dropout(self.LayerNorm(text + rows[: text.shape[1]]))


class _Layer(GradientCheckpointingLayer):
    """What encoder and decoder layers share: sub-blocks with residual, dropout and norm before or after."""

    def __init__(self, config: MomentDetrConfig):
        super().__init__()
        self.self_attn = PackedAttention(config.d_model, config.num_attention_heads, dropout=config.dropout)
        self.linear1 = nn.Linear(config.d_model, config.ffn_dim)
        self.linear2 = nn.Linear(config.ffn_dim, config.d_model)
        self.norm1 = nn.LayerNorm(config.d_model)
        self.norm2 = nn.LayerNorm(config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.pre_norm = config.pre_norm

    def feed_forward(self, states: Tensor) -> Tensor:
        return self.linear2(self.dropout(torch.relu(self.linear1(states))))


class MomentDetrEncoderLayer(_Layer):
    """Self-attention and feed-forward block over [video; text]; positions are added to queries and keys only.

    Args:
        config: the configuration.
    """

    def forward(self, hidden_states: Tensor, padding_mask: Tensor, position_embeddings: Tensor) -> Tensor:
        """Map (B, L, d) to (B, L, d); `padding_mask` (B, L) is True at padding; position codes are (B, L, d)."""
        x = hidden_states
        if self.pre_norm:
            y = self.norm1(x)
            key = y + position_embeddings
            x = x + self.dropout(self.self_attn(key, key, y, padding_mask)[0])
            return x + self.dropout(self.feed_forward(self.norm2(x)))
        key = x + position_embeddings
        x = self.norm1(x + self.dropout(self.self_attn(key, key, x, padding_mask)[0]))
        return self.norm2(x + self.dropout(self.feed_forward(x)))


class MomentDetrDecoderLayer(_Layer):
    """Self-attention among moment queries, attention to the encoder's memory, feed-forward block.

    Args:
        config: the configuration.
    """

    def __init__(self, config: MomentDetrConfig):
        super().__init__(config)
        self.norm3 = nn.LayerNorm(config.d_model)
        self.multihead_attn = PackedAttention(config.d_model, config.num_attention_heads, dropout=config.dropout)

    def forward(
        self,
        hidden_states: Tensor,
        query_positions: Tensor,
        memory: Tensor,
        memory_padding_mask: Tensor,
        memory_positions: Tensor,
    ) -> Tensor:
        """Map query states (B, Q, d) to (B, Q, d).

        Args:
            hidden_states: (B, Q, d).
            query_positions: (B, Q, d), the learnt queries.
            memory: (B, L, d).
            memory_padding_mask: (B, L), True = padding.
            memory_positions: (B, L, d).
        """
        x, memory_key = hidden_states, memory + memory_positions
        if self.pre_norm:
            y = self.norm1(x)
            x = x + self.dropout(self.self_attn(y + query_positions, y + query_positions, y)[0])
            y = self.norm2(x) + query_positions
            x = x + self.dropout(self.multihead_attn(y, memory_key, memory, memory_padding_mask)[0])
            return x + self.dropout(self.feed_forward(self.norm3(x)))
        x = self.norm1(x + self.dropout(self.self_attn(x + query_positions, x + query_positions, x)[0]))
        attended, _ = self.multihead_attn(x + query_positions, memory_key, memory, memory_padding_mask)
        x = self.norm2(x + self.dropout(attended))
        return self.norm3(x + self.dropout(self.feed_forward(x)))


class MomentDetrEncoder(nn.Module):
    """The encoder's layers, and a final norm in pre-norm mode.

    Args:
        config: the configuration.
    """

    def __init__(self, config: MomentDetrConfig):
        super().__init__()
        self.layers = nn.ModuleList([MomentDetrEncoderLayer(config) for _ in range(config.encoder_layers)])
        self.norm = nn.LayerNorm(config.d_model) if config.pre_norm else None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        segment_ids: Tensor,
        position_embeddings: Tensor,
        layer_outputs: list[Tensor] | None = None,
    ) -> Tensor:
        """Encode [video; text].

        Args:
            hidden_states: (B, L, d).
            attention_mask: (B, L), False = padding.
            segment_ids: (B, L) int64, 0 = video, 1 = text. Attention crosses the segments; a recurrent adapter
                treats them as two sequences.
            position_embeddings: (B, L, d).
            layer_outputs: a list that receives every layer's output.

        Returns:
            The memory (B, L, d). Padded positions are transformed like the others.
        """
        padding_mask = ~attention_mask
        for layer in self.layers:
            hidden_states = layer(with_gradient(layer, hidden_states), padding_mask, position_embeddings)
            if layer_outputs is not None:
                layer_outputs.append(hidden_states)
        return hidden_states if self.norm is None else self.norm(hidden_states)


class MomentDetrDecoder(nn.Module):
    """The decoder's layers, and one norm for every layer's output; the next layer gets the un-normalised state.

    Its queries are an unordered set.

    Args:
        config: the configuration.
    """

    def __init__(self, config: MomentDetrConfig):
        super().__init__()
        self.layers = nn.ModuleList([MomentDetrDecoderLayer(config) for _ in range(config.decoder_layers)])
        self.norm = nn.LayerNorm(config.d_model)

    def forward(
        self, query_positions: Tensor, memory: Tensor, memory_padding_mask: Tensor, memory_positions: Tensor
    ) -> Tensor:
        """Decode moments.

        Args:
            query_positions: (B, Q, d), the learnt queries.
            memory: (B, L, d).
            memory_padding_mask: (B, L), True = padding.
            memory_positions: (B, L, d).

        Returns:
            The normalised output of every layer, (layers, B, Q, d).
        """
        hidden_states, normalised = torch.zeros_like(query_positions), []
        for layer in self.layers:
            states = with_gradient(layer, hidden_states)
            hidden_states = layer(states, query_positions, memory, memory_padding_mask, memory_positions)
            normalised.append(self.norm(hidden_states))
        return torch.stack(normalised)


class MomentDetrTransformer(nn.Module):
    """Encoder and decoder.

    Args:
        config: the configuration.
    """

    def __init__(self, config: MomentDetrConfig):
        super().__init__()
        self.encoder = MomentDetrEncoder(config)
        self.decoder = MomentDetrDecoder(config)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        segment_ids: Tensor,
        position_embeddings: Tensor,
        queries: Tensor,
        layer_outputs: list[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Encode [video; text] and decode moments.

        Args:
            hidden_states: (B, L, d).
            attention_mask: (B, L), False = padding.
            segment_ids: (B, L), see `MomentDetrEncoder.forward`.
            position_embeddings: (B, L, d).
            queries: the learnt queries (Q, d).
            layer_outputs: a list that receives every encoder layer's output.

        Returns:
            The normalised decoder states (layers, B, Q, d) and the memory (B, L, d).
        """
        memory = self.encoder(
            hidden_states,
            attention_mask=attention_mask,
            segment_ids=segment_ids,
            position_embeddings=position_embeddings,
            layer_outputs=layer_outputs,
        )
        states = self.decoder(
            queries.unsqueeze(0).expand(len(memory), -1, -1),
            memory,
            ~attention_mask,
            position_embeddings,
        )
        return states, memory
