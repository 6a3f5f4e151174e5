"""The building blocks of UMT: learnt positions, pre-norm layers, the bottleneck between video and audio."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ...checkpointing import with_gradient
from .configuration_umt import UMTConfig

__all__ = ["BottleneckTransformer", "CrossModalEncoder", "QueryDecoder", "QueryGenerator", "UniModalEncoder"]


class Projection(nn.Module):
    """A linear layer under the parameter names of the original, which are one level deeper.

    Args:
        in_features: width of the input.
        out_features: width of the output.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.linear = nn.Linear(in_features, out_features)

    def forward(self, states: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        return self.linear(states)


class LearntPositions(nn.Module):
    """A table of position codes, added to queries and keys, never to values.

    Args:
        config: the configuration.
    """

    def __init__(self, config: UMTConfig):
        super().__init__()
        self.pe = nn.Parameter(torch.empty(1, config.max_positions, config.d_model))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, states: Tensor) -> Tensor:
        """The codes (B, L, d) for states (B, L, d).

        Raises:
            ValueError: the sequence is longer than the table.
        """
        batch, length = states.shape[:2]
        if length > self.pe.shape[1]:
            raise ValueError(
                f"{length} clips, but the position table has {self.pe.shape[1]} rows: raise max_positions"
            )
        return self.dropout(self.pe[:, :length].expand(batch, -1, -1))


class Attention(nn.Module):
    """Multi-head attention with the original's parameter names q, k, v and m (the output projection).

    Args:
        config: the configuration.
    """

    def __init__(self, config: UMTConfig):
        super().__init__()
        width = config.d_model
        self.heads, self.dropout = config.num_attention_heads, config.dropout
        self.q, self.k, self.v, self.m = (nn.Linear(width, width) for _ in range(4))
        self.output_dropout = nn.Dropout(config.dropout)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            query: (B, Lq, d).
            key: (B, Lk, d).
            value: (B, Lk, d).
            attention_mask: (B, Lk), False = padding.

        Returns:
            (B, Lq, d).
        """
        q, k, v = (
            linear(states).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear, states in ((self.q, query), (self.k, key), (self.v, value))
        )
        if attention_mask is not None:
            # A softmax over nothing is NaN: a row that is all padding attends to its padding; nothing uses the output.
            attention_mask = attention_mask | ~attention_mask.any(dim=1, keepdim=True)
            attention_mask = attention_mask[:, None, None, :]
        dropout = self.dropout if self.training else 0.0
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask, dropout_p=dropout)
        return self.output_dropout(self.m(mixed.transpose(1, 2).flatten(2)))


class FeedForward(nn.Module):
    """Linear, ReLU, dropout, linear, dropout.

    Args:
        config: the configuration.
    """

    def __init__(self, config: UMTConfig):
        super().__init__()
        hidden = int(config.d_model * config.ffn_ratio)
        self.mapping = nn.Sequential(
            nn.Linear(config.d_model, hidden),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(hidden, config.d_model),
            nn.Dropout(config.dropout),
        )

    def forward(self, states: Tensor) -> Tensor:
        """Map (B, L, d) to (B, L, d)."""
        return self.mapping(states)


class EncoderLayer(GradientCheckpointingLayer):
    """Pre-norm self-attention and feed-forward block.

    Args:
        config: the configuration.
    """

    def __init__(self, config: UMTConfig):
        super().__init__()
        self.att = Attention(config)
        self.ffn = FeedForward(config)
        self.norm1 = nn.LayerNorm(config.d_model)
        self.norm2 = nn.LayerNorm(config.d_model)

    def forward(self, hidden_states: Tensor, positions: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Map (B, L, d) to (B, L, d); `attention_mask` (B, L) is False at padding."""
        x = hidden_states
        value = self.norm1(x)
        x = x + self.att(value + positions, value + positions, value, attention_mask)
        return x + self.ffn(self.norm2(x))


class UniModalEncoder(nn.Module):
    """Dropout, a linear layer, learnt positions, encoder layers; no final norm.

    Args:
        config: the configuration.
        in_features: width of the stream's features.
    """

    def __init__(self, config: UMTConfig, in_features: int):
        super().__init__()
        self.dropout = nn.Dropout(config.input_dropout)
        self.mapping = Projection(in_features, config.d_model)
        self.pos_enc = LearntPositions(config)
        layers = [EncoderLayer(config) for _ in range(config.encoder_layers)]
        # The original gives a single layer no index in the names of its parameters.
        self.encoder = layers[0] if len(layers) == 1 else nn.ModuleList(layers)

    def forward(self, features: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Map features (B, L, in) to states (B, L, d); `attention_mask` (B, L) is False at padding."""
        states = self.mapping(self.dropout(features))
        positions = self.pos_enc(states)
        for layer in self.encoder if isinstance(self.encoder, nn.ModuleList) else [self.encoder]:
            states = layer(with_gradient(layer, states), positions, attention_mask=attention_mask)
        return states


class BottleneckLayer(GradientCheckpointingLayer):
    """Video a and audio b write to a few tokens t and read from them (paper: equations of the cross-modal encoder).

    With da, db, dt the norms: t += att1(dt, da) + att2(dt, db); dt = norm(t); a += att3(da, dt), b += att4(db, dt);
    a += ffn1(norm(a)), b += ffn2(norm(b)).

    Args:
        config: the configuration.
    """

    def __init__(self, config: UMTConfig):
        super().__init__()
        self.att1, self.att2, self.att3, self.att4 = (Attention(config) for _ in range(4))
        self.ffn1, self.ffn2 = FeedForward(config), FeedForward(config)
        self.norm1, self.norm2, self.norm3, self.norm4, self.norm5, self.norm6 = (
            nn.LayerNorm(config.d_model) for _ in range(6)
        )

    def forward(
        self, video: Tensor, audio: Tensor, tokens: Tensor, positions: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One exchange.

        Args:
            video: a (B, L, d).
            audio: b (B, L, d).
            tokens: t (B, T, d).
            positions: (B, L, d), for both streams.
            attention_mask: (B, L), False = padding.

        Returns:
            a, b and t.
        """
        a, b, t = video, audio, tokens
        da, db, dt = self.norm1(a), self.norm2(b), self.norm3(t)
        t = t + self.att1(dt, da + positions, da, attention_mask) + self.att2(dt, db + positions, db, attention_mask)
        dt = self.norm4(t)
        a = a + self.att3(da + positions, dt, dt)
        b = b + self.att4(db + positions, dt, dt)
        return a + self.ffn1(self.norm5(a)), b + self.ffn2(self.norm6(b)), t


class BottleneckTransformer(nn.Module):
    """Bottleneck layers with learnt initial tokens.

    Args:
        config: the configuration.
    """

    def __init__(self, config: UMTConfig):
        super().__init__()
        self.token = nn.Parameter(torch.empty(config.bottleneck_tokens, config.d_model))
        self.encoder = nn.ModuleList([BottleneckLayer(config) for _ in range(config.cross_layers)])

    def forward(
        self, video: Tensor, audio: Tensor, positions: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Map video and audio (B, L, d) to video and audio (B, L, d); `attention_mask` (B, L) is False at padding."""
        tokens = self.token.expand(len(video), -1, -1)
        for layer in self.encoder:
            video = with_gradient(layer, video)
            video, audio, tokens = layer(video, audio, tokens, positions, attention_mask=attention_mask)
        return video, audio


class CrossModalEncoder(nn.Module):
    """The bottleneck transformer, fusion of the two streams, then LayerNorm.

    Args:
        config: the configuration.
    """

    def __init__(self, config: UMTConfig):
        super().__init__()
        self.fusion_type = config.fusion_type
        self.pos_enc = LearntPositions(config)
        self.encoder = BottleneckTransformer(config)
        if config.fusion_type == "concat":
            self.mapping = Projection(2 * config.d_model, config.d_model)
        self.norm = nn.LayerNorm(config.d_model)

    def forward(self, video: Tensor, audio: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Join video and audio, each (B, L, d), to (B, L, d); `attention_mask` (B, L) is False at padding."""
        a, b = self.encoder(video, audio, self.pos_enc(video), attention_mask=attention_mask)
        if self.fusion_type == "concat":
            joint = self.mapping(torch.cat((a, b), dim=-1))
        else:
            joint = (a + b) / 2 if self.fusion_type == "mean" else a + b
        return self.norm(joint)


class TextMapping(nn.Module):
    """A linear layer without bias, then LayerNorm: the text states that clips attend to.

    Args:
        in_features: width of the text features.
        width: width of the states.
    """

    def __init__(self, in_features: int, width: int):
        super().__init__()
        self.linear = nn.Linear(in_features, width, bias=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, text_features: Tensor) -> Tensor:
        """Map (B, T, in) to (B, T, d)."""
        return self.norm(self.linear(text_features))


class QueryGenerator(nn.Module):
    """Each clip attends to the text, without positions, residual or norm. Without text, the identity.

    Args:
        config: the configuration.
    """

    def __init__(self, config: UMTConfig):
        super().__init__()
        self.has_text = config.text_feature_dim is not None
        if config.text_feature_dim is not None:
            self.dropout = nn.Dropout(config.text_dropout)
            self.mapping = TextMapping(config.text_feature_dim, config.d_model)
            self.encoder = Attention(config)

    def forward(self, clips: Tensor, text: Tensor | None = None, text_mask: Tensor | None = None) -> Tensor:
        """Map clips (B, L, d), text (B, T, in) and its mask (B, T) to queries (B, L, d)."""
        if not self.has_text:
            return clips
        states = self.mapping(self.dropout(text))
        return self.encoder(clips, states, states, text_mask)


class DecoderLayer(GradientCheckpointingLayer):
    """Pre-norm self-attention, attention to the clips, feed-forward block; the memory is not normalised.

    Args:
        config: the configuration.
    """

    def __init__(self, config: UMTConfig):
        super().__init__()
        self.att1, self.att2 = Attention(config), Attention(config)
        self.ffn = FeedForward(config)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(config.d_model) for _ in range(3))

    def forward(
        self,
        hidden_states: Tensor,
        memory: Tensor,
        query_positions: Tensor,
        key_positions: Tensor,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Map query states (B, L, d) to (B, L, d).

        Args:
            hidden_states: (B, L, d).
            memory: (B, L, d).
            query_positions: (B, L, d).
            key_positions: (B, L, d).
            attention_mask: (B, L), False = padding; None, as in the original: padded clips are attended to.
        """
        x = hidden_states
        value = self.norm1(x)
        query = value + query_positions
        x = x + self.att1(query, query, value, attention_mask)
        x = x + self.att2(self.norm2(x) + query_positions, memory + key_positions, memory, attention_mask)
        return x + self.ffn(self.norm3(x))


class QueryDecoder(nn.Module):
    """Decoder layers with a norm for every layer's output; the next layer gets the un-normalised state.

    Args:
        config: the configuration.
    """

    def __init__(self, config: UMTConfig):
        super().__init__()
        self.mask_attention = config.mask_decoder
        self.q_pos_enc, self.k_pos_enc = LearntPositions(config), LearntPositions(config)
        self.decoder = nn.ModuleList([DecoderLayer(config) for _ in range(config.decoder_layers)])
        self.norm = nn.LayerNorm(config.d_model)

    def forward(self, queries: Tensor, memory: Tensor, attention_mask: Tensor | None = None) -> list[Tensor]:
        """Decode.

        Args:
            queries: (B, L, d).
            memory: the clips (B, L, d).
            attention_mask: (B, L), False = padding. The queries are a sequence of clips, and a recurrent adapter reads
                here which are padding; attention uses the mask only with `mask_decoder`.

        Returns:
            The normalised output of every layer, each (B, L, d).
        """
        positions = self.q_pos_enc(queries), self.k_pos_enc(queries)
        mask = attention_mask if self.mask_attention else None
        states, normalised = queries, []
        for layer in self.decoder:
            states = layer(with_gradient(layer, states), memory, *positions, attention_mask=mask)
            normalised.append(self.norm(states))
        return normalised
