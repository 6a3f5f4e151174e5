"""Which rows of a batch an evaluation counts: in several processes the last batch is filled up with repetitions."""

from __future__ import annotations

from typing import Any

__all__ = ["counted_rows"]


def counted_rows(trainer: Any, rows: int) -> int:
    """How many rows of this process's batch are not repetitions; they are its first.

    accelerate fills the last batch up to `processes x rows` with examples from the beginning, and says how many of
    them are the data's. Of a dataset without length it does not know, and all rows are counted.

    Args:
        trainer: of transformers, while it evaluates.
        rows: of the batch.
    """
    accelerator = trainer.accelerator
    state = accelerator.gradient_state
    evaluates = state.active_dataloader is trainer.callback_handler.eval_dataloader is not None
    if not (evaluates and accelerator.even_batches and state.end_of_dataloader and state.remainder > 0):
        return rows
    return min(max(state.remainder - accelerator.process_index * rows, 0), rows)
