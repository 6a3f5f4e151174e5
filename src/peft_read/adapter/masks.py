"""Padding, read from the many forms of masks that models take."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache

from .cache import is_begun

__all__ = [
    "allowed_pairs",
    "as_mask",
    "attended_keys",
    "kept_by_padding_mask",
    "of_full_attention",
]


# What models add to a masked score: -1e4 in some, the smallest number of the type in most.
FORBIDDING = -1e3


def as_mask(
    attention_mask: Any,
    batch: int | None,
    length: int | None,
    *,
    past: int | torch.Tensor = 0,
    cache: Cache | None = None,
) -> torch.Tensor | None:
    """Which of the new tokens are not padding, from the attention mask of a stack.

    Args:
        attention_mask: (B, T) or (B, past + T) or wider, 0 = padding, or additive with 0 = token; (B, 1, T or 1,
            columns) or (B, T, columns), bool, 0 and 1, or additive, whose diagonal marks the padding; or a dict of
            such masks with "full_attention".
        batch: B.
        length: T, the number of new tokens.
        past: how many tokens came before; a tensor where a compiled graph cannot know.
        cache: the cache, whose first kept column a 4-D mask starts at.

    Returns:
        (B, T), False = padding; None if no padding is known. A mask over pairs with tokens of another
        sequence, as cross-attention is given, is ignored.

    Raises:
        NotImplementedError: for masks that are not tensors.
        ValueError: if the width fits neither the new tokens nor all of them.
    """
    attention_mask = of_full_attention(attention_mask)
    if attention_mask is None or batch is None or length is None:
        return None
    if not isinstance(attention_mask, torch.Tensor):
        raise NotImplementedError(
            f"READ cannot read the padding from a {type(attention_mask).__name__}; pass a 2-D attention mask, or use "
            "attn_implementation='sdpa' or 'eager'."
        )
    if attention_mask.dim() not in (2, 3, 4):
        raise ValueError(f"READ reads attention masks of 2 to 4 dimensions, got {tuple(attention_mask.shape)}.")
    if attention_mask.shape[0] not in (1, batch):
        raise ValueError(
            f"READ reads attention masks of {batch} sequences here, got {tuple(attention_mask.shape)}, which says "
            "nothing about each of them."
        )
    allowed = _allowed(attention_mask)
    if allowed.dim() == 2:
        mask = _columns(allowed, length, past)
    elif attention_mask.shape[-1] < length or (
        cache is None and not is_begun(past) and attention_mask.shape[-1] > length
    ):
        return None  # of cross-attention: its columns are the tokens of another sequence
    else:
        mask = _own_entries(allowed if allowed.dim() == 4 else allowed[:, None], length, past, cache)
    if mask.shape[0] != batch:
        mask = mask.expand(batch, length)
    return _none_without_padding(mask)


def of_full_attention(attention_mask: Any) -> Any:
    """Of one mask for each kind of attention that of full attention; what is no dictionary as it is.

    A token's own entry is the same in all of them, and so are those of its neighbours for windows of two and more.
    """
    if isinstance(attention_mask, dict):
        return attention_mask.get("full_attention", next(iter(attention_mask.values()), None))
    return attention_mask


def _allowed(mask: torch.Tensor) -> torch.Tensor:
    """A mask as bool, True = may be attended to, from bool, from 0 and 1, and from 0 and large negative numbers.

    An additive mask has no positive entry; one of zeros alone forbids nothing if it has a row for every token, as
    attention is given it, and is all padding if it has one entry per token, as a tokenizer writes it.
    """
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        return mask != 0
    additive = (mask <= 0).all() if mask.dim() > 2 else (mask < 0).any()
    return torch.where(additive, mask > FORBIDDING, mask > 0)


def attended_keys(mask: torch.Tensor, batch: int) -> torch.Tensor | None:
    """Which tokens of the sequence that cross-attention reads are not padding.

    Args:
        mask: (B or 1, heads or 1, T or 1, S), bool, 0 and 1, or additive.
        batch: B.

    Returns:
        (B, S), True = any query may attend to it; None if all are.
    """
    return _none_without_padding(_allowed(mask).any(dim=2).any(dim=1).expand(batch, -1))


def _columns(mask: torch.Tensor, length: int, past: int | torch.Tensor) -> torch.Tensor:
    """The columns of the new tokens in a 2-D mask over them alone or over everything so far."""
    width = mask.shape[1]
    if width == length:
        return mask
    if isinstance(past, torch.Tensor):
        return mask.index_select(1, torch.arange(length, device=mask.device) + past)
    if width >= past + length:
        return mask[:, past : past + length]
    raise ValueError(
        f"An attention mask of width {width} fits neither the {length} new tokens nor the {past + length} tokens so "
        "far, so READ cannot tell which tokens are padding."
    )


def _own_entries(mask: torch.Tensor, length: int, past: int | torch.Tensor, cache: Cache | None) -> torch.Tensor:
    """Whether each new token may attend to itself, which a padding token may not."""
    mask = mask[:, 0]  # heads share the padding
    columns = _own_columns(mask, length, past, cache)
    rows = torch.zeros_like(columns) if mask.shape[1] == 1 else torch.arange(length, device=mask.device)
    return mask[:, rows, columns]  # (B, T)


def _own_columns(mask: torch.Tensor, length: int, past: int | torch.Tensor, cache: Cache | None) -> torch.Tensor:
    """The columns (T,) of the new tokens in a mask (B, T or 1, columns)."""
    offset = past
    if cache is not None:
        offset = offset - int(cache.get_mask_sizes(length, _first_full_layer(cache))[1])
    # A cache of fixed size has a column for every token it will ever hold.
    if not isinstance(offset, torch.Tensor) and mask.shape[-1] < offset + length:
        offset = mask.shape[-1] - length  # a window that keeps only the latest columns
    return torch.arange(length, device=mask.device) + offset


def allowed_pairs(
    attention_mask: Any, length: int | None, past: int | torch.Tensor, cache: Cache | None
) -> torch.Tensor | None:
    """Which of the new tokens may attend to which of them.

    Args:
        attention_mask: (B or 1, heads or 1, T, columns), bool, 0 and 1, or additive; anything else is ignored.
        length: T.
        past: how many tokens came before; a tensor where a compiled graph cannot know.
        cache: the cache, whose first kept column the mask starts at.

    Returns:
        (B or 1, T, T), True = the row's token may attend to the column's; None if the mask does not tell.
    """
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 4 or length is None or length < 2:
        return None
    rows, width = attention_mask.shape[-2:]
    if rows != length or width < length or (width > length and cache is None):
        return None
    allowed = _allowed(attention_mask[:, 0])  # heads share the sequences
    if width == length:
        return allowed
    return allowed.index_select(2, _own_columns(allowed, length, past, cache))


def _first_full_layer(cache: Cache) -> int:
    """The layer whose mask a stack with one mask was given."""
    sliding = list(getattr(cache, "is_sliding", []))
    return sliding.index(False) if False in sliding else 0


def kept_by_padding_mask(padding: torch.Tensor) -> torch.Tensor | None:
    """The tokens that torch's `src_key_padding_mask` (B, T) does not mark (True, or -inf, is padding there)."""
    mask = ~padding if padding.dtype == torch.bool else padding == 0
    return _none_without_padding(mask)


def _none_without_padding(mask: torch.Tensor) -> torch.Tensor | None:
    # Reading a value synchronises with the device and breaks a compiled graph; there the general path is cheaper.
    if torch.compiler.is_compiling() or mask.is_cuda:
        return mask
    return None if bool(mask.all()) else mask
