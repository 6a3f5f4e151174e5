"""Mixed batches: each row of a batch with its own adapter (`adapter_names=[...]`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

__all__ = ["MixedRows", "copies_in_generate", "mixed_batch", "mixed_rows"]

BASE = "__base__"  # peft's name for "no adapter"


class MixedRows:
    """Which adapter serves which row.

    Args:
        names: an adapter's name for each row of the batch that the user passed; "__base__" for none.
        copies: how many rows `generate` makes of each in the decoder: beams, or sequences to return.
    """

    def __init__(self, names: Sequence[str], copies: int = 1) -> None:
        self.names = list(names)
        self.copies = copies
        self.adapters = [name for name in dict.fromkeys(self.names) if name != BASE]

    def names_of(self, batch: int, *, folded: bool = False) -> list[str]:
        """The adapter of each row of a batch that the model makes of the user's.

        Args:
            batch: its rows.
            folded: whether a row may be one token of several, as where a block sees (B · T, d).

        Raises:
            ValueError: if the batch has neither the rows of the user's batch nor their copies.
        """
        if batch == len(self.names):
            copies = 1
        elif batch == len(self.names) * self.copies:
            copies = self.copies
        elif folded and batch % (len(self.names) * self.copies) == 0:
            copies = batch // len(self.names)
        else:
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(self.names)} and {batch} respectively."
            )
        return [name for name in self.names for _ in range(copies)]

    def rows_of(self, adapter: str, batch: int, device: torch.device, *, folded: bool = False) -> torch.Tensor:
        """The rows (n,) of a batch that an adapter serves; `folded` as in `names_of`."""
        names = self.names_of(batch, folded=folded)
        return torch.tensor([i for i, name in enumerate(names) if name == adapter], dtype=torch.long, device=device)

    def tell_saved_module(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        """Forward pre-hook of a module trained as a whole, which peft lets choose its copy by `adapter_names`."""
        return args, {**kwargs, "adapter_names": self.names_of(len(args[0]))} if args else kwargs


_CURRENT: ContextVar[MixedRows | None] = ContextVar("peft_read_mixed_rows", default=None)


# A ContextVar cannot be traced by torch.compile; the length of a list can be guarded.
_RUNNING: list[MixedRows] = []


def mixed_rows() -> MixedRows | None:
    """The mixed batch that is running, if any.

    Raises:
        NotImplementedError: in a compiled graph, which knows one set of adapters for all rows.
    """
    if torch.compiler.is_compiling():
        if _RUNNING:
            raise NotImplementedError("`adapter_names` does not work under torch.compile; call the model uncompiled.")
        return None
    return _CURRENT.get()


@contextmanager
def mixed_batch(model: nn.Module, names: Sequence[str], *, copies: int = 1) -> Iterator[None]:
    """Serve each row by its own adapter for the time of one call.

    Args:
        model: whose modules trained as a whole (`modules_to_save`) are to follow.
        names: an adapter's name for each row.
        copies: how many rows `generate` makes of each.
    """
    rows = MixedRows(names, copies)
    saved = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    handles = [module.register_forward_pre_hook(rows.tell_saved_module, with_kwargs=True) for module in saved]
    token = _CURRENT.set(rows)
    _RUNNING.append(rows)
    try:
        yield
    finally:
        _RUNNING.remove(rows)
        _CURRENT.reset(token)
        for handle in handles:
            handle.remove()


def copies_in_generate(kwargs: dict[str, Any]) -> int:
    """How many rows `generate` makes of each row, from its arguments."""
    config = kwargs.get("generation_config")

    def setting(name: str) -> int:
        return kwargs.get(name) or getattr(config, name, None) or 1

    return max(setting("num_beams"), setting("num_return_sequences"))
