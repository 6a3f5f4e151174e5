"""Recurrent states stored on transformers' key-value cache, which follow its reorder, crop, repeat and copy.

A cache holds one object per layer, and every operation on a batch (reordering beams, repeating prompts, rolling back)
is a loop over these objects. READ's states are stored on one of them: its class is replaced by a subclass, made at
runtime, that applies each operation to the states too. The type, length and layers of the cache do not change;
transformers compares them exactly in places.

The states of all tokens are kept, not only the last: rolling back is then a slice, and exact for every cell.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, EncoderDecoderCache

__all__ = [
    "CACHE_NAMES",
    "States",
    "cache_length",
    "commit_states",
    "given_cache",
    "has_grown",
    "returned_cache",
    "saved_states",
]

ATTRIBUTE = "readapter_states"

# What models call the cache that they are given and return. transformers 5.24 renamed `past_key_values` and
# `cache_params` to `cache`; the kind of cache is decided by the object, not by its name.
CACHE_NAMES = ("cache", "past_key_values", "past_key_value", "cache_params", "layer_past")
# Other states of incremental decoding: XLNet's and Transformer-XL's, Reformer's, RWKV's, paged attention's.
OTHER_STATES = ("mems", "past_buckets_states", "state", "block_table")


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


def given_cache(given: Mapping[str, Any]) -> Cache | None:
    """The cache among the arguments of a stack: the part of it that grows with the tokens of the stack itself.

    Args:
        given: the arguments by name.

    Raises:
        NotImplementedError: for states of incremental decoding that are no `transformers.Cache`.
    """
    for name in OTHER_STATES:
        if given.get(name) is not None:
            raise NotImplementedError(
                f"READ cannot carry its recurrent states through incremental decoding with `{name}`; generate with "
                "use_cache=False."
            )
    caches = [_self_attention_cache(name, given.get(name)) for name in CACHE_NAMES]
    return next((cache for cache in caches if cache is not None), None)  # an empty cache is false


def returned_cache(output: Any) -> Cache | None:
    """The cache that a stack made itself and returned, if any.

    Args:
        output: what the stack returned: a ModelOutput, a tuple, or a tensor.
    """
    if isinstance(output, Mapping):
        named = [(name, value) for name, value in output.items() if name in CACHE_NAMES]
    elif isinstance(output, tuple):
        named = [("output", item) for item in output if isinstance(item, Cache)]
    else:
        named = []
    return next((_self_attention_cache(name, cache) for name, cache in named), None)


def _self_attention_cache(name: str, cache: Any) -> Cache | None:
    if cache is None:
        return None
    if isinstance(cache, EncoderDecoderCache):
        return cache.self_attention_cache
    if isinstance(cache, Cache):
        return cache
    raise NotImplementedError(
        f"READ keeps its recurrent states on a transformers.Cache, but this model passed a {type(cache).__name__} as "
        f"`{name}`; generate with use_cache=False."
    )


def cache_length(cache: Cache) -> int:
    """How many tokens the cache holds.

    A cache of state-space layers alone keeps no count; there it is the number of tokens that READ has seen.

    Raises:
        RuntimeError: if such a cache was begun without READ.
    """
    if any(hasattr(layer, "get_seq_length") for layer in cache.layers) or not cache.layers:
        return int(cache.get_seq_length())
    states = saved_states(cache)
    if not states and any(_holds_a_state(layer) for layer in cache.layers):
        raise RuntimeError(
            f"READ cannot tell how many tokens a {type(cache).__name__} of state-space layers holds, since it was "
            "begun without READ. Recompute the prompt with the adapter active, or use use_cache=False."
        )
    return max((entry.trajectory.shape[1] for entry in states.values()), default=0)


def has_grown(cache: Cache, past: int, length: int) -> bool:
    """Whether a forward pass over `length` tokens has written them to a cache that held `past` before."""
    if any(hasattr(layer, "get_seq_length") for layer in cache.layers):
        return int(cache.get_seq_length()) == past + length
    return any(_holds_a_state(layer) for layer in cache.layers)


def _holds_a_state(layer: Any) -> bool:
    """Whether a state-space layer of a cache has seen any token."""
    seen = getattr(layer, "has_previous_state", False)
    return any(seen.values()) if isinstance(seen, dict) else bool(seen)


def saved_states(cache: Cache) -> dict[Hashable, States]:
    """The states that are stored on a cache, by layer and adapter; empty if there are none."""
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
        counting = [layer for layer in cache.layers if hasattr(layer, "get_seq_length")]
        states = _attach((counting or cache.layers)[0])
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
    if hasattr(self, "get_seq_length"):
        length = int(self.get_seq_length())
        _update(self, lambda states: States(states.trajectory[:, :length], states.rows))
    else:  # a state-space layer, which takes minus the number of tokens
        removed = abs(int(tokens_to_remove))
        _update(self, lambda states: States(states.trajectory[:, : states.trajectory.shape[1] - removed], states.rows))


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
