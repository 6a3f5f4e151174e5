"""Recurrent states that live on transformers' key-value cache and follow it through reorder, crop, repeat and copy.

A cache holds one object a layer, and every operation on a batch (reordering beams, repeating prompts, rolling back)
is a loop over these objects. READ's states ride on one of them: its class is replaced by a subclass of itself, made
on the fly, that applies each operation to the states too. The cache keeps its own type, length and layers, which
transformers compares exactly in places.

The states of all tokens are kept, not only the last: rolling back is then a slice, and exact for every cell.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, EncoderDecoderCache

__all__ = ["States", "cache_length", "commit_states", "saved_states", "self_attention_cache"]

ATTRIBUTE = "readapter_states"


@dataclass
class States:
    """The states of one recurrence after each cached token.

    Args:
        trajectory: (B, L, S).
        rows: (B,), True = this row was computed; every row if None. Mixed batches leave rows to other adapters.
    """

    trajectory: torch.Tensor
    rows: torch.Tensor | None = None

    def map_rows(self, function: Callable[[torch.Tensor], torch.Tensor]) -> States:
        """Apply an operation on the batch dimension to everything that has one."""
        return States(function(self.trajectory), None if self.rows is None else function(self.rows))


def self_attention_cache(cache: Any) -> Cache | None:
    """The part of a cache that grows with the tokens of the stack itself.

    Raises:
        NotImplementedError: for caches that are no `transformers.Cache` (tuples of older models).
    """
    if cache is None:
        return None
    if isinstance(cache, EncoderDecoderCache):
        return cache.self_attention_cache
    if isinstance(cache, Cache):
        return cache
    raise NotImplementedError(
        f"READ keeps its recurrent states on a transformers.Cache, but this model passed a {type(cache).__name__} as "
        "its cache; generate with use_cache=False."
    )


def cache_length(cache: Cache) -> int:
    """How many tokens the cache holds."""
    return int(cache.get_seq_length())


def saved_states(cache: Cache) -> dict[Hashable, States]:
    """The states that ride on a cache, by layer and adapter; empty if there are none."""
    for layer in cache.layers:
        states = layer.__dict__.get(ATTRIBUTE)
        if states is not None:
            return states
    return {}


def commit_states(cache: Cache, pending: dict[Hashable, States], past: int) -> None:
    """Append the states of the tokens that a forward pass has just added to a cache.

    Args:
        cache: the cache, already grown.
        pending: the states (B, T, S) of the new tokens.
        past: how many tokens the cache held before.
    """
    states = saved_states(cache)
    if not states:
        layer = next(layer for layer in cache.layers if hasattr(layer, "get_seq_length"))
        states = _attach(layer)
    for key, new in pending.items():
        old = states.get(key)
        if past and old is not None:
            kept = old.trajectory[:, :past].to(new.trajectory.dtype)
            new = States(torch.cat((kept, new.trajectory), dim=1), _both(old.rows, new.rows))
        states[key] = new


def _both(first: torch.Tensor | None, second: torch.Tensor | None) -> torch.Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first & second


def _attach(layer: Any) -> dict[Hashable, States]:
    """Give a cache layer a place for states and the subclass that looks after them."""
    layer.__class__ = _carrier_of(type(layer))
    states: dict[Hashable, States] = {}
    setattr(layer, ATTRIBUTE, states)
    return states


_CARRIERS: dict[type, type] = {}


def _carrier_of(base: type) -> type:
    """The subclass of a cache layer's class that carries states, made once for each class."""
    if base not in _CARRIERS:
        # A second base class would change the layout of the object and forbid the assignment to __class__; the
        # _layer_type of None keeps transformers from registering the subclass in its own table.
        methods: dict[str, Any] = {name: method for name, method in _METHODS.items() if hasattr(base, name)}
        methods |= {"_layer_type": None, "__module__": base.__module__, "__qualname__": base.__qualname__}
        methods["__reduce_ex__"] = lambda self, protocol: (_rebuild, (base,), dict(self.__dict__))
        _CARRIERS[base] = type(base.__name__, (base,), methods)
    return _CARRIERS[base]


def _rebuild(base: type) -> Any:
    """An empty layer of the carrying class, to be filled by copy or pickle."""
    layer: Any = object.__new__(base)
    layer.__class__ = _carrier_of(base)
    return layer


def _base_of(layer: Any) -> Any:
    return type(layer).__mro__[1]


def _update(layer: Any, function: Callable[[States], States]) -> None:
    states = getattr(layer, ATTRIBUTE)
    for key, value in states.items():
        states[key] = function(value)


def _reorder_cache(self: Any, beam_idx: torch.Tensor) -> None:
    _base_of(self).reorder_cache(self, beam_idx)
    _update(self, lambda states: states.map_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device))))


def _batch_repeat_interleave(self: Any, repeats: int) -> None:
    _base_of(self).batch_repeat_interleave(self, repeats)
    _update(self, lambda states: states.map_rows(lambda rows: rows.repeat_interleave(repeats, dim=0)))


def _batch_select_indices(self: Any, indices: torch.Tensor) -> None:
    _base_of(self).batch_select_indices(self, indices)
    _update(self, lambda states: states.map_rows(lambda rows: rows[torch.as_tensor(indices, device=rows.device)]))


def _crop(self: Any, tokens_to_remove: int) -> None:
    _base_of(self).crop(self, tokens_to_remove)
    length = int(self.get_seq_length())
    _update(self, lambda states: States(states.trajectory[:, :length], states.rows))


def _reset(self: Any) -> None:
    _base_of(self).reset(self)
    getattr(self, ATTRIBUTE).clear()


_METHODS: dict[str, Any] = {
    "reorder_cache": _reorder_cache,
    "batch_repeat_interleave": _batch_repeat_interleave,
    "batch_select_indices": _batch_select_indices,
    "crop": _crop,
    "reset": _reset,
}
