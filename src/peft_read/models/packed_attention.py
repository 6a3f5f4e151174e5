"""Attention with the parameters of `torch.nn.MultiheadAttention`, computed alike in training and inference."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["PackedAttention"]


class PackedAttention(nn.MultiheadAttention):
    """Batch-first multi-head attention with the packed parameters (`in_proj_weight` ...) of the originals.

    PyTorch's own class switches to another kernel when nothing needs a gradient. That changes the last digits between
    training and inference, so that a model with an untrained adapter would not equal the model, and it skips the
    hooks and replacements of `out_proj`.

    Args:
        embed_dim: width.
        num_heads: heads.
        dropout: dropout of the attention weights.
    """

    def __init__(self, embed_dim: int, num_heads: int, *, dropout: float = 0.0):
        super().__init__(embed_dim, num_heads, dropout=dropout, batch_first=True)

    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Attend.

        Args:
            query: (B, Lq, d).
            key: (B, Lk, d).
            value: (B, Lk, d).
            key_padding_mask: (B, Lk), True = padding. A row that is all padding attends to all of it, because a
                softmax over nothing is NaN.
            **kwargs: `need_weights=False`, for callers of PyTorch's class; nothing else.

        Returns:
            The states (B, Lq, d), and None where PyTorch's class may return weights.

        Raises:
            NotImplementedError: weights or another mask are asked for.
        """
        if kwargs.pop("need_weights", False) or any(value is not None for value in kwargs.values()):
            raise NotImplementedError(f"PackedAttention returns no weights and takes no {sorted(kwargs)}")
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            nn.functional.linear(states, weight, bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for states, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        mask = None
        if key_padding_mask is not None:
            mask = (~key_padding_mask | key_padding_mask.all(dim=1, keepdim=True))[:, None, None, :]
        dropout = self.dropout if self.training else 0.0
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return self.out_proj(mixed.transpose(1, 2).flatten(2)), None
