"""How accelerate wraps a trainer's model for several processes, where a mixin knows better than the Trainer."""

from __future__ import annotations

from typing import Any

__all__ = ["search_for_unused", "wrap_again"]


def search_for_unused(trainer: Any, search: bool) -> None:
    """Says whether DistributedDataParallel looks for parameters that a pass does not use, unless the user has said it.

    The Trainer reads its arguments while it is made, before a mixin knows the model; a search for hyperparameters
    reads them again.
    """
    if trainer.args.ddp_find_unused_parameters is not None:
        return
    trainer.args.ddp_find_unused_parameters = search
    if trainer.accelerator.ddp_handler is not None:
        trainer.accelerator.ddp_handler.find_unused_parameters = search


def wrap_again(trainer: Any) -> None:
    """Lets accelerate wrap the model in `train()` although it has been evaluated before.

    `evaluate()` and `predict()` prepare the bare model and leave a mark on it, and accelerate then skips it in
    `train()`: without a DDP wrapper every process would silently train on its own gradients.
    """
    prepared = getattr(trainer.model, "_is_accelerate_prepared", False)
    if prepared and trainer.accelerator.num_processes > 1 and not trainer.is_fsdp_enabled:
        trainer.model._is_accelerate_prepared = False
