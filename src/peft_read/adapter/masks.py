"""Padding and sequence boundaries, read from the many forms of masks, positions and lengths that models take."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from .cache import is_begun

__all__ = [
    "as_mask",
    "attended_keys",
    "block_diagonal_segments",
    "kept_by_padding_mask",
    "packed_segments",
    "segments_of_lengths",
    "segments_told",
]


CUMULATIVE_LENGTHS = ("cu_seq_lens_q", "cu_seqlens")
NUMBERS_OF_SEQUENCES = "seq_idx"  # (B, T), of the state-space and convolution layers of hybrid models
# What models add to a masked score: -1e4 in some, the smallest number of the type in most.
FORBIDDING = -1e3
PACKED_IN_A_GRAPH = (
    "READ's compiled graph was given a 4-D attention mask that keeps several sequences of a row apart, and a graph "
    "cannot know how long they are. Call the model uncompiled, or inside `sequence_scope(segment_ids=...)`, for which "
    "READ leaves the graph."
)


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
    attention_mask = _of_full_attention(attention_mask)
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


def _of_full_attention(attention_mask: Any) -> Any:
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
    offset = past
    if cache is not None:
        offset = offset - int(cache.get_mask_sizes(length, _first_full_layer(cache))[1])
    # A cache of fixed size has a column for every token it will ever hold.
    if not isinstance(offset, torch.Tensor) and mask.shape[-1] < offset + length:
        offset = mask.shape[-1] - length  # a window that keeps only the latest columns
    columns = torch.arange(length, device=mask.device) + offset
    rows = torch.zeros_like(columns) if mask.shape[1] == 1 else torch.arange(length, device=mask.device)
    return mask[:, rows, columns]  # (B, T)


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


def block_diagonal_segments(attention_mask: Any, batch: int | None, length: int | None) -> torch.Tensor | None:
    """The sequences that are packed into each row, from a mask under which neighbours do not attend to each other.

    Args:
        attention_mask: (B or 1, 1, T, T), bool, 0 and 1, or additive; anything else is ignored.
        batch: B.
        length: T.

    Returns:
        (B, T) ids that count the sequences of a row; None if each row is one sequence.

    Raises:
        RuntimeError: in a compiled graph, when it runs with a mask of several sequences in a row.
    """
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 4 or batch is None or length is None:
        return None
    if attention_mask.shape[-2:] != (length, length) or length < 2:
        return None
    allowed = _allowed(attention_mask[:, 0])  # (B, T, T)
    valid = allowed.diagonal(dim1=1, dim2=2)
    neighbours = allowed.diagonal(offset=-1, dim1=1, dim2=2) | allowed.diagonal(offset=1, dim1=1, dim2=2)
    breaks = valid[:, 1:] & valid[:, :-1] & ~neighbours
    if torch.compiler.is_compiling():
        # Most masks are of one sequence per row, and asking which this is would break the graph of every encoder.
        torch._assert_async(~breaks.any(), PACKED_IN_A_GRAPH)
        return None
    # On CUDA this waits for the device once, and splitting rows into segments would wait several times.
    if not bool(breaks.any()):
        return None
    return torch.nn.functional.pad(breaks, (1, 0)).cumsum(-1).expand(batch, length)


def packed_segments(position_ids: Any, batch: int | None, length: int | None, *, axes: int = 3) -> torch.Tensor | None:
    """The sequences that are packed into each row, from positions that do not increase by one.

    This is the rule by which transformers builds its block-diagonal masks. In a compiled graph the question breaks it.

    Args:
        position_ids: (B or 1, T); or (1 + axes, B or 1, T) or (1, B or 1, T), as multimodal rotary embeddings take
            them, whose first row has the positions in the text. Other forms, such as the axes alone, do not tell.
        batch: B.
        length: T.
        axes: how many axes multimodal positions have: time, height and width.

    Returns:
        (B, T) ids that count the sequences of a row; None if each row is one sequence.
    """
    if not isinstance(position_ids, torch.Tensor) or batch is None or length is None or length < 2:
        return None
    if position_ids.dim() == 3 and position_ids.shape[0] in (1, 1 + axes):
        position_ids = position_ids[0]
    if position_ids.dim() != 2 or position_ids.shape[1] != length:
        return None
    breaks = (position_ids.diff(dim=-1, prepend=position_ids[:, :1] - 1) != 1).cumsum(-1)
    if not bool(breaks.any()):
        return None
    return breaks.expand(batch, length)


def segments_of_lengths(cumulative: torch.Tensor, batch: int | None, length: int) -> torch.Tensor:
    """The sequences packed into one row, from their cumulative lengths (0, l_1, l_1 + l_2, ...).

    Raises:
        ValueError: if there is more than one row.
    """
    if batch != 1:
        raise ValueError(f"`cu_seq_lens_q` describes one row of packed sequences, but the batch has {batch}.")
    positions = torch.arange(length, device=cumulative.device)
    return torch.searchsorted(cumulative[1:].contiguous(), positions, right=True)[None]


def segments_told(
    module: nn.Module, given: dict[str, Any], batch: int | None, length: int | None, past: int | torch.Tensor
) -> torch.Tensor | None:
    """The sequences that are packed into each row, by what a module is told about them."""
    if given.get("segment_ids") is not None:
        return given["segment_ids"]
    for name in CUMULATIVE_LENGTHS:
        cumulative = given.get(name)
        if isinstance(cumulative, torch.Tensor) and cumulative.dim() == 1 and length is not None:
            return segments_of_lengths(cumulative, batch, length)
    if is_begun(past):
        return None
    numbers = given.get(NUMBERS_OF_SEQUENCES)
    if (
        isinstance(numbers, torch.Tensor)
        and batch is not None
        and tuple(numbers.shape) in ((batch, length), (1, length))
    ):
        return numbers.expand(batch, -1)
    attention_mask = given.get("attention_mask")
    if attention_mask is None:
        sections = getattr(getattr(module, "rotary_emb", None), "mrope_section", None)
        return packed_segments(given.get("position_ids"), batch, length, axes=len(sections) if sections else 3)
    return block_diagonal_segments(_of_full_attention(attention_mask), batch, length)
