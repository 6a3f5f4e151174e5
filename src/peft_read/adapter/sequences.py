"""Reshapes a module's output to sequences (B, T, d) and back; an error if the sequences are unknown."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .packing import IN_A_GRAPH
from .scope import Scope

__all__ = ["Notice", "Sequences", "as_sequences", "padding_of"]


class Notice:
    """Warns once for all layers."""

    def __init__(self) -> None:
        self.said = False

    def __call__(self, message: str) -> None:
        """Warn, the first time."""
        if not self.said and not torch.compiler.is_compiling():
            self.said = True
            warnings.warn(message, stacklevel=2)


@dataclass
class Sequences:
    """A batch of sequences and what is known about them.

    Args:
        tensor: (B, T, d).
        restore: turns a (B, T, d) into the shape that the module had put out.
        mask: (B, T), False = padding; None if all are.
        scope: where segments and earlier states are; None if these sequences have none.
        call: how often the layer has been called before in this pass.
    """

    tensor: torch.Tensor
    restore: Callable[[torch.Tensor], torch.Tensor]
    mask: torch.Tensor | None = None
    scope: Scope | None = None
    call: int = 0

    @property
    def longest(self) -> int:
        """The number of tokens in the longest sequence, padding included."""
        segments = None if self.scope is None else self.scope.segments
        return self.tensor.shape[-2] if segments is None else segments.longest

    @property
    def keeps_states(self) -> bool:
        """Whether the states of the tokens may be wanted later, on a cache."""
        return self.scope is not None and self.scope.keeps_states


def as_sequences(
    output: torch.Tensor,
    layer_input: torch.Tensor,
    scope: Scope | None,
    *,
    path: str,
    batch_first: bool,
    notice: Notice,
    chunked: bool = False,
) -> Sequences:
    """Find the sequences in a module's output.

    Args:
        output: (B, T, d); (B, H, W, d), whose rows of pixels follow each other; (B · T, d) inside a known stack;
            (T, B, d) with `batch_first=False`; (B, T', d), sequences of their own; or (N, d), N vectors that follow no
            other.
        layer_input: the module's input, by which cross-attention's other sequence is recognised.
        scope: that of the block or the stack, if any.
        path: the module's path, for messages.
        batch_first: the layout of a 3-D output.
        notice: warns once that vectors are taken for sequences of one token.
        chunked: whether the block calls its feed-forward part with pieces of the sequences.

    Raises:
        ValueError: if it is unknown which rows of the output follow each other.
    """
    seen = None if scope is None else (scope.batch, scope.length)
    for around in () if scope is None else scope.around():
        # One of the same shape has joined the scope of the stack already.
        if around.explicit and (around is scope or (around.batch, around.length) != seen):
            sequences = _in_scope(output, around, path, batch_first)
            if sequences is not None:
                return sequences
    while scope is not None and scope.batch is None and scope.outer is not None:
        scope = scope.outer
    if scope is None or scope.batch is None or scope.length is None:
        return _of_frames(_without_scope(output, batch_first, notice), scope)
    source = scope.source_of(layer_input, batch_first=batch_first)
    outer, rows = scope.outer, (scope.batch, scope.length)
    if source is None and outer is not None and (layer_input.shape[:2] != rows or (outer.batch, outer.length) == rows):
        # Where attention is the module that takes the mask, its block knows what else there is.
        source = outer.source_of(layer_input, batch_first=batch_first)
    if source is not None:
        shape_of_source, source_mask = source
        source_mask = scope.on(output.device, source_mask)
        return _of_source(output, shape_of_source, source_mask, batch_first=batch_first)
    sequences = _in_scope(output, scope, path, batch_first)
    if sequences is not None:
        if scope.unclear is not None:
            raise ValueError(f"READ layer {path!r} sees {scope.batch} rows of {scope.length} tokens, {scope.unclear}")
        if scope.unless is not None:  # asked once a pass, and only where something recurs
            torch._assert_async(~scope.unless, IN_A_GRAPH)
            scope.unless = None
        return _of_frames(sequences, scope)
    if output.dim() == 2 and not scope.explicit and (output.shape[0] == scope.batch or not _in_a_block(path)):
        # Pooled vectors, or the rows of a projector, which follow nothing.
        return Sequences(output[:, None], lambda delta: delta[:, 0])
    why = _why_not_its_own(output, scope, path, chunked)
    if why:
        raise ValueError(
            f"READ layer {path!r} puts out a tensor of shape {tuple(output.shape)}, but {why}, so READ cannot tell "
            "which rows follow each other. Target the module that sees (batch, tokens, d), and of a mixture of "
            "experts its block, not the experts; use batch_first=False for (tokens, batch, d); or describe the "
            "sequences with `sequence_scope(mask=...)`."
        )
    shape = output.shape
    if output.dim() == 4 and any((s.batch, s.length) == (shape[0], shape[2]) for s in scope.around()):
        # Several streams over the tokens of the stack, (B, n, T, d), each a sequence.
        return Sequences(output.flatten(0, 1), lambda delta: delta.reshape(shape))
    return _of_frames(_without_scope(output, batch_first, notice), scope)


def _of_source(
    output: torch.Tensor, rows: tuple[int, int], mask: torch.Tensor | None, *, batch_first: bool
) -> Sequences:
    """The sequences of another sequence than the stack's own, which begin with this pass."""
    shape = output.shape
    if output.dim() == 3 and not batch_first and shape[:2] == rows[::-1]:
        return Sequences(output.transpose(0, 1), lambda delta: delta.transpose(0, 1), mask)
    return Sequences(output.reshape(*rows, shape[-1]), lambda delta: delta.reshape(shape), mask)


def _why_not_its_own(output: torch.Tensor, scope: Scope, path: str, chunked: bool) -> str | None:
    """Why the rows of an output cannot be taken for sequences apart from those of the scope; None if they can."""
    shape, batch, length = tuple(output.shape), scope.batch or 0, scope.length or 0
    stack = f"its stack is working on {batch} sequences of {length} tokens"
    if chunked:
        return "its block calls it with pieces of the sequences (`chunk_size_feed_forward`; set it to 0)"
    if output.dim() < 3 or scope.explicit or (shape[:2] == (length, batch) and length != batch):
        return stack
    if shape[0] == 1 and batch > 1 and scope.tower is not None:
        return stack
    if not _in_a_block(path):
        # A head that is given the last token alone would forget those before it.
        return f"{stack}, and their cache carries on" if shape[1] == 1 < length and scope.keeps_states else None
    if shape[0] == batch and scope.tower is None and scope.has_padding:
        return f"{stack}, some of them padded, and it is unknown which of these rows are padding"
    return None


def _in_scope(output: torch.Tensor, scope: Scope, path: str, batch_first: bool) -> Sequences | None:
    """The sequences of a scope in a module's output; None if the output is made of others."""
    shape, (batch, length) = output.shape, (scope.batch, scope.length)
    if batch is None or length is None or output.dim() < 2 or shape[:-1].numel() != batch * length:
        return None
    if output.dim() == 3 and not batch_first and (length, batch) == shape[:2]:
        tensor, restore = output.transpose(0, 1), lambda delta: delta.transpose(0, 1)
    elif output.dim() == 2 and not batch_first:
        tensor = output.unflatten(0, (length, batch)).transpose(0, 1)
        restore = lambda delta: delta.transpose(0, 1).reshape(shape)  # noqa: E731
    elif output.dim() == 3 and batch_first and shape[0] == batch:
        tensor, restore = output, lambda delta: delta  # the usual case, where a view costs the host as much as a sum
    elif output.dim() == 2 or (shape[0] == batch and output.dim() > 3):
        tensor, restore = output.reshape(batch, length, shape[-1]), lambda delta: delta.reshape(shape)
    else:
        return None
    return Sequences(tensor, restore, scope.on(output.device, scope.mask), scope, scope.call_index(path))


def _of_frames(sequences: Sequences, scope: Scope | None) -> Sequences:
    """The frames of each video in one sequence, where an encoder of images was given them as rows of the batch."""
    tower = None if scope is None else scope.tower
    rows, length = sequences.tensor.shape[:2]
    if tower is None or tower.frames is None or tower.frames[0] * tower.frames[1] != rows:
        return sequences
    videos, frames = tower.frames
    known = sequences.scope
    if known is not None and (known.segment_ids is not None or known.has_padding):
        return sequences
    return Sequences(
        sequences.tensor.reshape(videos, frames * length, sequences.tensor.shape[-1]),
        lambda delta: sequences.restore(delta.reshape(rows, length, delta.shape[-1])),
    )


def padding_of(output: torch.Tensor, scope: Scope | None, *, batch_first: bool) -> torch.Tensor | None:
    """Which rows of a module's output are not padding, in the shape of the output without its last dimension.

    Args:
        output: (..., d).
        scope: that of the block or the stack, if any.
        batch_first: the layout of a 3-D output.

    Returns:
        False = padding; None if all are, or if nothing is known of these rows.
    """
    for around in () if scope is None else scope.around():
        sequences = None if around.mask is None else _in_scope(output, around, "", batch_first)
        if sequences is not None:
            valid = around.on(output.device, around.mask)
            assert valid is not None
            return sequences.restore(valid[..., None].expand(*valid.shape, output.shape[-1]))[..., 0]
    return None


def _without_scope(output: torch.Tensor, batch_first: bool, notice: Notice) -> Sequences:
    """Sequences as their shape shows them: no padding, nothing before them."""
    shape = output.shape
    if output.dim() < 3:
        notice(
            f"READ adapts a module whose output has the shape {tuple(shape)}, and it is unknown which rows are one "
            "sequence. Each row is taken for a sequence of one token, which gives the recurrence nothing to carry. "
            "Target a module that sees (batch, tokens, d), or describe the sequences with `sequence_scope(mask=...)`."
        )
        return Sequences(output.unsqueeze(-2).reshape(-1, 1, shape[-1]), lambda delta: delta.reshape(shape))
    if output.dim() == 3 and not batch_first:
        return Sequences(output.transpose(0, 1), lambda delta: delta.transpose(0, 1))
    return Sequences(output.flatten(1, -2), lambda delta: delta.reshape(shape))


def _in_a_block(path: str) -> bool:
    """Whether a path leads through a list of blocks."""
    return any(part.isdigit() for part in path.split("."))
