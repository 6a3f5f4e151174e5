"""Whether rows of a batch hold several packed samples, which an alignment of rows would mix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["packed_message", "packed_rows"]

CUMULATIVE_LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens")
NUMBERS_OF_SEQUENCES = ("segment_ids", "seq_idx")  # (B, T)
FORBIDDING = -1e3  # what is added to a masked score is below this


def packed_rows(batch: Mapping[str, Any]) -> tuple[str, bool | Tensor] | None:
    """Whether some row of a batch holds several samples, by what the batch says of sequences, and which entry says it.

    The entries are those by which READ keeps packed sequences apart: lengths, numbers of sequences, 4-D masks under
    which neighbours do not see each other, and without a mask positions that do not go up by one.

    Args:
        batch: what the model is given.

    Returns:
        The name and the answer, a bool where it needs no look at values, else a scalar tensor on the device; None: no
        entry tells anything.
    """
    for name in CUMULATIVE_LENGTHS:
        lengths = batch.get(name)
        if isinstance(lengths, Tensor) and lengths.dim() == 1:
            return name, len(lengths) > 2  # 0 and the length of one
    for name in NUMBERS_OF_SEQUENCES:
        numbers = batch.get(name)
        if isinstance(numbers, Tensor) and numbers.dim() == 2:
            return name, (numbers[:, 1:] != numbers[:, :-1]).any()
    mask = batch.get("attention_mask")
    if mask is None:
        positions = _positions_in_text(batch)
        return None if positions is None else ("position_ids", (positions.diff(dim=-1) != 1).any())
    if isinstance(mask, Mapping):  # one mask for each kind of attention
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[-1] != mask.shape[-2]:
        return None
    return "attention_mask", _separates_neighbours(mask[:, 0])


def _positions_in_text(batch: Mapping[str, Any]) -> Tensor | None:
    """(B, T); those of multimodal rotary embeddings have them before the three axes of time, height and width."""
    positions = batch.get("position_ids")
    tokens = batch.get("input_ids")
    tokens = batch.get("inputs_embeds") if tokens is None else tokens
    if not isinstance(positions, Tensor) or not isinstance(tokens, Tensor):
        return None
    if positions.dim() == 3 and len(positions) in (1, 4):
        positions = positions[0]
    return positions if positions.dim() == 2 and positions.shape[1] == tokens.shape[1] else None


def _separates_neighbours(mask: Tensor) -> Tensor:
    """Whether two real tokens side by side do not see each other in a mask (B, T, T), bool, 0 and 1, or additive."""
    if mask.dtype == torch.bool:
        allowed = mask
    elif mask.is_floating_point():
        allowed = torch.where((mask <= 0).all(), mask > FORBIDDING, mask > 0)
    else:
        allowed = mask != 0
    real = allowed.diagonal(dim1=1, dim2=2)
    neighbours = allowed.diagonal(offset=-1, dim1=1, dim2=2) | allowed.diagonal(offset=1, dim1=1, dim2=2)
    return (real[:, 1:] & real[:, :-1] & ~neighbours).any()


def packed_message(name: str) -> str:
    """What is wrong with packed rows, and the way out."""
    return (
        f"rows of the batch hold several packed samples (by its {name!r}), and the alignment, which takes each row "
        "for one sample, would compare the frames of one with the words of another. Give each sample a row of its "
        "own: a collator that pads, without packing, padding_free or DataCollatorWithFlattening. Where the parts of a "
        "row are those of one sample, return them by PVLAConfig(extractor=...), which is not asked this"
    )
