"""Which tokens of a row are one sequence, read from masks, positions, lengths and numbers that models are given."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.cache_utils import Cache

from .cache import is_begun
from .masks import allowed_pairs, of_full_attention
from .scope import Scope, Tower

__all__ = [
    "IN_A_GRAPH",
    "Packing",
    "may_be_merged",
    "packed_segments",
    "segments_of_lengths",
    "segments_of_mask",
    "segments_of_tower",
    "segments_told",
    "streams_of",
    "told_by_user",
]

CUMULATIVE_LENGTHS = ("cu_seq_lens_q", "cu_seqlens")
NUMBERS_OF_SEQUENCES = "seq_idx"  # (B, T), of the state-space and convolution layers of hybrid models
IN_A_GRAPH = (
    "READ's compiled graph was given a 4-D attention mask that keeps several sequences of a row apart, and a graph "
    "cannot know how long they are. Call the model uncompiled, or inside `sequence_scope(segment_ids=...)`, for which "
    "READ leaves the graph."
)
BRANCHES = (
    "and by their attention mask tokens do not attend to their neighbours but to tokens before those, as where "
    "several branches share a beginning. A recurrence follows one chain of tokens. Give each branch a row of its own "
    "with the beginning before it, or use cell='none' here (cell_pattern)."
)
BRANCHES_ON_A_CACHE = (
    "which continue a KV cache, and by their attention mask neighbours among them do not attend to each other, as in "
    "packed sequences and in branches of a tree. The recurrence has one state to continue from. Give each branch a "
    "row of its own, use use_cache=False for packed sequences, or use cell='none' here (cell_pattern)."
)


class Packing(NamedTuple):
    """How the tokens of a batch are packed into its rows.

    Attributes:
        segment_ids: (B, T), tokens of a row with different ids are different sequences; None if a row is one.
        unclear: why a recurrence cannot follow the rows, and the way out; None if it can.
        unless: in a compiled graph, (), True = a recurrence cannot follow the rows; None elsewhere.
    """

    segment_ids: torch.Tensor | None = None
    unclear: str | None = None
    unless: torch.Tensor | None = None


def segments_of_mask(
    attention_mask: Any,
    batch: int | None,
    length: int | None,
    *,
    past: int | torch.Tensor = 0,
    cache: Cache | None = None,
) -> Packing:
    """The sequences that are packed into each row, from a mask under which neighbours do not attend to each other.

    Where all neighbours attend to each other the row is one chain, whatever else the mask forbids: a window, or what
    was evicted from a cache. On a device other than the CPU this waits for it once, and for masks of several sequences
    once more; a mask with one row for all tokens, or one new token, is not looked at.

    Args:
        attention_mask: (B or 1, heads or 1, T, columns), bool, 0 and 1, or additive; anything else is ignored.
        batch: B.
        length: T, the number of new tokens.
        past: how many tokens came before; a tensor where a compiled graph cannot know.
        cache: the cache, whose first kept column the mask starts at.
    """
    allowed = None if batch is None else allowed_pairs(attention_mask, length, past, cache)
    if allowed is None or batch is None or length is None:
        return Packing()
    valid = allowed.diagonal(dim1=1, dim2=2)
    neighbours = allowed.diagonal(offset=-1, dim1=1, dim2=2) | allowed.diagonal(offset=1, dim1=1, dim2=2)
    breaks = valid[:, 1:] & valid[:, :-1] & ~neighbours
    if torch.compiler.is_compiling():
        # Most masks are of one sequence per row, and asking which this is would break the graph of every encoder.
        return Packing(unless=breaks.any())
    if not bool(breaks.any()):
        return Packing()
    if is_begun(past):
        return Packing(unclear=BRANCHES_ON_A_CACHE)
    segment_ids = torch.nn.functional.pad(breaks, (1, 0)).cumsum(-1)
    apart = segment_ids[:, :, None] != segment_ids[:, None]
    crossing = allowed & apart & valid[:, :, None] & valid[:, None]
    if bool(crossing.any()):
        return Packing(unclear=BRANCHES)
    return Packing(segment_ids.expand(batch, length))


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
    module: nn.Module,
    given: dict[str, Any],
    batch: int | None,
    length: int | None,
    *,
    past: int | torch.Tensor = 0,
    cache: Cache | None = None,
    positions: bool = True,
) -> Packing:
    """The sequences that are packed into each row, by what a module is told about them.

    Args:
        module: the stack or block.
        given: its arguments by name.
        batch: B.
        length: T, the number of new tokens.
        past: how many tokens came before; a tensor where a compiled graph cannot know.
        cache: the cache that holds them, if any.
        positions: whether positions that restart tell of several sequences.
    """
    if given.get("segment_ids") is not None:
        return Packing(given["segment_ids"])
    for name in CUMULATIVE_LENGTHS:
        cumulative = given.get(name)
        if isinstance(cumulative, torch.Tensor) and cumulative.dim() == 1 and length is not None:
            return Packing(segments_of_lengths(cumulative, batch, length))
    numbers = given.get(NUMBERS_OF_SEQUENCES)
    if (
        not is_begun(past)
        and isinstance(numbers, torch.Tensor)
        and batch is not None
        and tuple(numbers.shape) in ((batch, length), (1, length))
    ):
        return Packing(numbers.expand(batch, -1))
    attention_mask = given.get("attention_mask")
    if attention_mask is not None:
        return segments_of_mask(of_full_attention(attention_mask), batch, length, past=past, cache=cache)
    if is_begun(past) or not positions:
        return Packing()
    sections = getattr(getattr(module, "rotary_emb", None), "mrope_section", None)
    axes = len(sections) if sections else 3
    return Packing(packed_segments(given.get("position_ids"), batch, length, axes=axes))


def streams_of(outer: Scope | None, batch: int, length: int, device: torch.device) -> torch.Tensor | None:
    """(B, (1 + n) · T) ids of the streams of ProphetNet's decoder, which stand one after the other in each row.

    The first stream reads the text, each of the others predicts it one token further on. As one sequence the others
    would know, from the first, the tokens that they are to predict.

    Raises:
        NotImplementedError: on a cache, which keeps the first stream alone.
    """
    ngram = getattr(getattr(outer.owner, "config", None), "ngram", None) if outer is not None else None
    if outer is None or not isinstance(ngram, int) or not outer.length or length != (1 + ngram) * outer.length:
        return None
    if is_begun(outer.past):
        raise NotImplementedError(
            f"READ does not follow the cache of {type(outer.owner).__name__}, whose blocks compute {1 + ngram} "
            "streams, of which the cache keeps the first; generate with use_cache=False."
        )
    return torch.arange(1 + ngram, device=device).repeat_interleave(outer.length).expand(batch, length)


def told_by_user(outer: Scope | None, batch: int | None, length: int | None) -> Scope | None:
    """The scope that the user opened around a stack, if it describes the stack's sequences."""
    if outer is None:
        return None
    return next((s for s in outer.around() if s.explicit and (s.batch, s.length) == (batch, length)), None)


def segments_of_tower(tower: Tower | None, length: int) -> torch.Tensor | None:
    """(1, T) ids of the images and videos that stand one after the other; a video's frames are one sequence."""
    if tower is None or tower.lengths is None or torch.compiler.is_compiling():
        return None
    ends = tower.lengths.cumsum(0)
    if int(ends[-1]) != length:
        return None
    positions = torch.arange(length, device=ends.device)
    return torch.searchsorted(ends, positions, right=True)[None]


def may_be_merged(tower: Tower | None, batch: int | None, length: int | None) -> bool:
    """Whether one row may hold several of the images, videos or clips that a tower was given."""
    several = tower is not None and tower.rows is not None and tower.rows > 1
    return several and batch == 1 and length is not None and length > 1
