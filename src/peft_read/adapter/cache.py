"""Recurrent states stored on transformers' key-value cache, which follow its reorder, crop, repeat and copy.

A cache holds one object per layer, and every operation on a batch (reordering beams, repeating prompts, rolling back)
is a loop over these objects. READ's states are stored on one of them: its class is replaced by a subclass, made at
runtime, that applies each operation to the states too. The type, length and layers of the cache do not change;
transformers compares them exactly in places.

The states of all tokens are kept, not only the last: rolling back is then a slice, and exact for every cell. On a
cache of fixed size they have a fixed size too and are written in place, so that a compiled step of decoding reads and
writes them without knowing how many tokens there are.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import Cache, EncoderDecoderCache

__all__ = [
    "CACHE_NAMES",
    "WAY_OUT",
    "FixedStates",
    "States",
    "cache_length",
    "commit_states",
    "given_cache",
    "has_grown",
    "is_begun",
    "returned_cache",
    "saved_states",
]

ATTRIBUTE = "readapter_states"
WAY_OUT = "Recompute the prompt with the adapter active, or use use_cache=False."

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

    @property
    def length(self) -> int:
        """How many tokens have been seen."""
        return self.trajectory.shape[1]

    def before(self, past: int | torch.Tensor) -> torch.Tensor:
        """The state (B, S) after `past` tokens, at least one."""
        return self.trajectory[:, past - 1]

    def followed_by(self, new: States, past: int | torch.Tensor) -> States:
        """The states of `past` tokens and those of new ones."""
        kept = self.trajectory[:, :past].to(new.trajectory.dtype)
        return States(torch.cat((kept, new.trajectory), dim=1), _both(self.rows, new.rows))

    def map_rows(self, function: Callable[[torch.Tensor], torch.Tensor]) -> States:
        """Apply an operation on the batch dimension to everything that has one."""
        return States(function(self.trajectory), None if self.rows is None else function(self.rows))

    def cropped(self, length: int) -> States:
        """The states of the first tokens."""
        return States(self.trajectory[:, :length], self.rows)


@dataclass
class FixedStates(States):
    """States on a cache of fixed size, in tensors that stay where they are.

    Args:
        trajectory: (B, L + 1, S) on a cache of at most L tokens; the state after p tokens is at p modulo L + 1. A
            sliding window, which lets go of tokens, never needs an older one than that.
        rows: as above.
        count: how many tokens have been seen, a whole number.
    """

    count: torch.Tensor = field(kw_only=True)

    @staticmethod
    def of(new: States, slots: int) -> FixedStates:
        """Those of the first tokens, in a place for `slots` states."""
        batch, _, width = new.trajectory.shape
        count = torch.zeros((), dtype=torch.long, device=new.trajectory.device)
        made = FixedStates(new.trajectory.new_zeros(batch, slots, width), count=count)
        for tensor in (made.trajectory, count):
            torch._dynamo.mark_static_address(tensor)  # as transformers does with keys and values, for CUDA graphs
        return made.followed_by(new, 0)

    @property
    def length(self) -> int:
        """How many tokens have been seen; a compiled graph cannot ask."""
        return int(self.count)

    def before(self, past: int | torch.Tensor) -> torch.Tensor:
        """The state (B, S) after `past` tokens."""
        if isinstance(past, torch.Tensor):
            # The only check that a compiled graph can make; in eager mode the error says which adapter it is.
            torch._assert_async(self.count >= past, f"READ has no recurrent states for all cached tokens. {WAY_OUT}")
        return self.trajectory.index_select(1, self._slots(past, 0, 1))[:, 0]

    def followed_by(self, new: States, past: int | torch.Tensor) -> FixedStates:
        """The same, with the states of new tokens written behind those of `past` tokens."""
        length = new.trajectory.shape[1]
        first = max(length - self.trajectory.shape[1] + 1, 0)  # what a window will not ask for again is left out
        latest = new.trajectory[:, first:].to(self.trajectory.dtype)
        self.trajectory.index_copy_(1, self._slots(past, first + 1, length + 1), latest)
        self.count.copy_(torch.zeros_like(self.count) + past + length)
        self.rows = _both(self.rows, new.rows) if is_begun(past) else new.rows
        return self

    def _slots(self, past: int | torch.Tensor, first: int, last: int) -> torch.Tensor:
        """Where the states after `past` + `first` to `last` - 1 tokens are."""
        return (torch.arange(first, last, device=self.count.device) + past) % self.trajectory.shape[1]

    def map_rows(self, function: Callable[[torch.Tensor], torch.Tensor]) -> FixedStates:
        """Apply an operation on the batch dimension, in place where the number of rows stays."""
        trajectory = function(self.trajectory)
        if trajectory.shape == self.trajectory.shape:
            trajectory = self.trajectory.copy_(trajectory)
        return FixedStates(trajectory, None if self.rows is None else function(self.rows), count=self.count)

    def cropped(self, length: int) -> FixedStates:
        """The same, as if only the first tokens had been seen."""
        self.count.clamp_(max=length)
        return self

    def clear(self) -> None:
        """As if no token had been seen."""
        self.trajectory.zero_()
        self.count.zero_()


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


def is_begun(past: int | torch.Tensor) -> bool:
    """Whether a cache that holds `past` tokens may hold any: a compiled graph does not know how many there are."""
    return isinstance(past, torch.Tensor) or past > 0


def cache_length(cache: Cache) -> int | torch.Tensor:
    """How many tokens the cache holds; in a compiled graph, on a cache of fixed size, a tensor with that number.

    A cache of state-space layers alone keeps no count; there it is the number of tokens that READ has seen.

    Raises:
        RuntimeError: if such a cache was begun without READ.
    """
    if any(hasattr(layer, "get_seq_length") for layer in cache.layers) or not cache.layers:
        length: Any = cache.get_seq_length()
        if torch.compiler.is_compiling() and isinstance(length, torch.Tensor) and _are_fixed(saved_states(cache)):
            return length.clone()  # the cache will count on in place
        return int(length)
    states = saved_states(cache)
    if not states and any(_holds_a_state(layer) for layer in cache.layers):
        raise RuntimeError(
            f"READ cannot tell how many tokens a {type(cache).__name__} of state-space layers holds, since it was "
            "begun without READ. Recompute the prompt with the adapter active, or use use_cache=False."
        )
    return max((entry.length for entry in states.values()), default=0)


def _are_fixed(states: dict[Hashable, States]) -> bool:
    # Not bool(states), which torch.compile of torch 2.11 cannot trace.
    return len(states) > 0 and all(isinstance(entry, FixedStates) for entry in states.values())


def _slots_of(cache: Cache) -> int:
    """How many states to keep on a cache of fixed size, with the one before the first token; 0 on others."""
    longest = max((getattr(layer, "max_cache_len", 0) for layer in cache.layers), default=0)
    return longest + 1 if longest and cache.is_compileable else 0


def has_grown(cache: Cache, past: int | torch.Tensor, length: int) -> bool:
    """Whether a forward pass over `length` tokens has written them to a cache that held `past` before.

    A compiled graph cannot ask, and need not: states that nobody wrote keys for are written over by the next pass.
    """
    if isinstance(past, torch.Tensor):
        return True
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
        states = getattr(layer, ATTRIBUTE, None)
        if states is not None:
            return states
    return {}


def commit_states(cache: Cache, pending: dict[Hashable, States], past: int | torch.Tensor) -> None:
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
        if isinstance(old, FixedStates):  # in a compiled graph the dictionary stays as it is
            old.followed_by(new, past)
        elif old is not None and is_begun(past):
            states[key] = old.followed_by(new, past)
        else:
            slots = _slots_of(cache)
            states[key] = FixedStates.of(new, slots) if slots else new


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
        _update(self, lambda states: states.cropped(length))
    else:  # a state-space layer, which takes minus the number of tokens
        removed = abs(int(tokens_to_remove))
        _update(self, lambda states: states.cropped(states.length - removed))


def _reset(self: Any) -> None:
    _base_of(self).reset(self)
    states = getattr(self, ATTRIBUTE)
    for key, value in list(states.items()):
        if isinstance(value, FixedStates):
            value.clear()
        else:
            del states[key]


_METHODS: dict[str, Any] = {
    "reorder_cache": _reorder_cache,
    "batch_repeat_interleave": _batch_repeat_interleave,
    "batch_select_indices": _batch_select_indices,
    "crop": _crop,
    "reset": _reset,
}
