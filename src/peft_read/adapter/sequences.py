"""From the tensor that a module puts out to sequences (B, T, d) and back, or an error where that cannot be told."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .scope import Scope

__all__ = ["Notice", "Sequences", "as_sequences"]


class Notice:
    """Says something once, however many layers would say it."""

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
        mask: (B, T), True = a real token; None if all are.
        scope: where segments and earlier states are; None if these sequences have none.
        call: how often the layer has been called before in this pass.
    """

    tensor: torch.Tensor
    restore: Callable[[torch.Tensor], torch.Tensor]
    mask: torch.Tensor | None = None
    scope: Scope | None = None
    call: int = 0

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
) -> Sequences:
    """Find the sequences in a module's output.

    Args:
        output: (B, T, d), (B · T, d) inside a known stack, (T, B, d) with `batch_first=False`, or (N, d): N vectors
            that follow no other.
        layer_input: the module's input, by which cross-attention's other sequence is recognised.
        scope: the stack's, if any.
        path: the module's path, for messages.
        batch_first: the layout of a 3-D output.
        notice: where to say, once, that vectors are taken for sequences of one token.

    Raises:
        ValueError: if the output is not made of the sequences of the scope.
    """
    shape = output.shape
    if scope is None or scope.batch is None or scope.length is None:
        return _without_scope(output, batch_first, notice)
    batch, length = scope.batch, scope.length

    if scope.is_source(layer_input):
        assert scope.source is not None
        source = scope.source.shape[:2]
        return Sequences(output.reshape(*source, shape[-1]), lambda delta: delta.reshape(shape), scope.source_mask)
    if output.dim() == 2 and shape[0] == batch * length:
        tensor, restore = output.unflatten(0, (batch, length)), lambda delta: delta.reshape(shape)
        if not batch_first:
            tensor, restore = (
                output.unflatten(0, (length, batch)).transpose(0, 1),
                lambda delta: delta.transpose(0, 1).reshape(shape),
            )
    elif output.dim() == 3 and not batch_first:
        tensor, restore = output.transpose(0, 1), lambda delta: delta.transpose(0, 1)
    elif output.dim() == 2 and shape[0] == batch and not _in_a_block(path):
        # A pooled vector for each sequence, outside the blocks: it follows nothing.
        return Sequences(output[:, None], lambda delta: delta[:, 0])
    else:
        tensor, restore = output, lambda delta: delta
    if tensor.dim() != 3 or tensor.shape[:2] != (batch, length):
        raise ValueError(
            f"READ layer {path!r} puts out a tensor of shape {tuple(shape)}, but its stack is working on {batch} "
            f"sequences of {length} tokens, so READ cannot tell which rows follow each other. Target the module that "
            "sees (batch, tokens, d), and of a mixture of experts its block, not the experts; use batch_first=False "
            "for (tokens, batch, d); or describe the sequences with `sequence_scope(mask=...)`."
        )
    return Sequences(tensor, restore, scope.mask, scope, scope.call_index(path))


def _without_scope(output: torch.Tensor, batch_first: bool, notice: Notice) -> Sequences:
    """Sequences as their shape shows them: no padding, nothing before them."""
    shape = output.shape
    if output.dim() < 3:
        notice(
            f"READ adapts a module whose output has the shape {tuple(shape)}, and nothing tells which rows are one "
            "sequence. Each row is taken for a sequence of one token, which gives the recurrence nothing to carry. "
            "Target a module that sees (batch, tokens, d), or describe the sequences with `sequence_scope(mask=...)`."
        )
        return Sequences(output.unsqueeze(-2).reshape(-1, 1, shape[-1]), lambda delta: delta.reshape(shape))
    if output.dim() == 3 and not batch_first:
        return Sequences(output.transpose(0, 1), lambda delta: delta.transpose(0, 1))
    return Sequences(output.flatten(0, -3), lambda delta: delta.reshape(shape))


def _in_a_block(path: str) -> bool:
    """Whether a path leads through a list of blocks."""
    return any(part.isdigit() for part in path.split("."))
