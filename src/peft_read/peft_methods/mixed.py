"""Mixed batches: each row of a batch with its own adapter (`adapter_names=[...]`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from .stacks import EXPERTS, blocks_around, parameters_of, tower_around

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
        # What the block around a layer was given last, by layer, and layers whose rows tell nothing about the user's.
        self.given: dict[nn.Module, torch.Size] = {}
        self.packed: set[nn.Module] = set()

    def names_of(self, batch: int) -> list[str]:
        """The adapter of each row of a batch that the model makes of the user's.

        Args:
            batch: its rows.

        Raises:
            ValueError: if the batch has neither the rows of the user's batch nor their copies.
        """
        if batch == len(self.names):
            copies = 1
        elif batch == len(self.names) * self.copies:
            copies = self.copies
        else:
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(self.names)} and {batch} respectively."
            )
        return [name for name in self.names for _ in range(copies)]

    def rows_of(self, adapter: str, batch: int, device: torch.device) -> torch.Tensor:
        """The rows (n,) of a batch that an adapter serves."""
        return _places(adapter, self.names_of(batch), device)

    def places_of(
        self, adapter: str, output: torch.Tensor, layer: nn.Module, *, path: str, batch_first: bool
    ) -> tuple[int, torch.Tensor]:
        """Where a layer's output belongs to the rows that an adapter serves.

        Args:
            adapter: the adapter.
            output: (B, ..., d); (T, B, d) with `batch_first=False`; (B · T, d) in a block that is given (B, T, d).
            layer: the layer.
            path: its path.
            batch_first: the layout of a 3-D output.

        Returns:
            A dimension of the output, and the places (n,) along it.

        Raises:
            ValueError: if it is unknown which rows of a 2-D output belong to which of the user's.
        """
        if output.dim() == 2:
            return 0, _places(adapter, self._names_of_vectors(output, layer, path, batch_first), output.device)
        dim = 1 if output.dim() == 3 and not batch_first else 0
        return dim, _places(adapter, self.names_of(output.shape[dim]), output.device)

    def _names_of_vectors(self, output: torch.Tensor, layer: nn.Module, path: str, batch_first: bool) -> list[str]:
        """The adapter of each vector of (N, d)."""
        count, given = len(output), self.given.get(layer, ())
        if layer in self.packed:
            why = "the tokens of all images stand there one after the other"
        elif EXPERTS.search(path):
            why = "a router chose the tokens of an expert"
        elif len(given) == 3 and batch_first and given[0] * given[1] == count:
            return [name for name in self.names_of(given[0]) for _ in range(given[1])]
        elif count in (len(self.names), len(self.names) * self.copies):
            return self.names_of(count)
        else:
            why = f"the block around it was given {tuple(given)}" if given else "no block around it tells the rows"
        raise ValueError(
            f"{path!r} puts out a tensor of shape {tuple(output.shape)} for a batch of {len(self.names)} rows with "
            f"`adapter_names`, and {why}: it is unknown which of these vectors belong to which row. Pass the rows of "
            "one adapter at a time (set_adapter), or leave this module out when the adapters are made "
            "(exclude_modules)."
        )

    def tell_saved_module(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        """Forward pre-hook of a module trained as a whole, which peft lets choose its copy by `adapter_names`.

        peft takes the rows from the first positional argument, so an input that is named is handed over in that way.
        """
        original: Any = getattr(module, "original_module", module)
        names = parameters_of(original)
        if not args and names and names[0] in kwargs:
            args = (kwargs[names[0]],)
            kwargs = {name: value for name, value in kwargs.items() if name != names[0]}
        if not args:
            raise ValueError(
                f"a {type(original).__name__} that is trained as a whole (modules_to_save) was called without its "
                f"input {names[:1]}, so `adapter_names` cannot choose its copies. Pass the rows of one adapter at a "
                "time (set_adapter)."
            )
        return args, {**kwargs, "adapter_names": self.names_of(len(args[0]))}


def _places(adapter: str, names: list[str], device: torch.device) -> torch.Tensor:
    return torch.tensor([i for i, name in enumerate(names) if name == adapter], dtype=torch.long, device=device)


class _NoteInput:
    """Forward pre-hook of a block: note the shape that it is given, for the layers in it.

    Args:
        block: the block.
    """

    def __init__(self, block: nn.Module) -> None:
        self.layers: list[nn.Module] = []
        self.names = parameters_of(block)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        rows = _CURRENT.get()
        given = args[0] if args else kwargs.get(self.names[0]) if self.names else None
        if rows is not None and isinstance(given, torch.Tensor):
            rows.given.update(dict.fromkeys(self.layers, given.shape))


def _note_inputs(model: nn.Module, rows: MixedRows) -> list[Any]:
    """Let the blocks around the layers tell what they are given; the handles of the hooks."""
    notes: dict[nn.Module, _NoteInput] = {}
    layers: list[tuple[str, Any]] = [pair for pair in model.named_modules() if isinstance(pair[1], BaseTunerLayer)]
    for path, layer in layers:
        tower = tower_around(model, path)
        if tower is not None and "grid_thw" in parameters_of(tower):
            rows.packed.add(layer)
        for block in blocks_around(model, path)[-1:]:
            notes.setdefault(block, _NoteInput(block)).layers.append(layer)
    return [block.register_forward_pre_hook(note, with_kwargs=True) for block, note in notes.items()]


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
    handles += _note_inputs(model, rows)
    token = _CURRENT.set(rows)
    _RUNNING.append(rows)
    try:
        yield
    finally:
        _RUNNING.remove(rows)
        _CURRENT.reset(token)
        for handle in handles:
            handle.remove()


def copies_in_generate(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> int:
    """How many rows `generate` makes of each row, from its arguments or the model's own generation configuration.

    Args:
        model: the model that generates.
        args: of `generate`, or of a forward pass.
        kwargs: likewise.
    """
    configs = [kwargs.get("generation_config")]
    # A forward pass makes no copies; it either shows no input here, or one that has all of its rows.
    if any(isinstance(t, torch.Tensor) and t.dim() and len(t) == len(kwargs["adapter_names"])
           for t in (*args, *kwargs.values())):  # fmt: skip
        configs.append(getattr(model, "generation_config", None))

    def setting(name: str) -> int:
        return kwargs.get(name) or next((v for config in configs if (v := getattr(config, name, None))), 1)

    return max(setting("num_beams"), setting("num_return_sequences"))
