"""Forward pre-hooks of the modules around READ's layers: each reads its module's arguments and opens a scope."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from ..checkpointing import scope_checkpoints
from ..peft_methods.stacks import RAW_INPUTS
from .cache import cache_length, given_cache, is_begun
from .masks import as_mask, attended_keys, kept_by_padding_mask
from .packing import Packing, may_be_merged, segments_of_tower, segments_told, streams_of, told_by_user
from .running import current_scope, enter_scope, forget_interrupted, outside_graphs, run_in_scope
from .scope import Scope, Tower

__all__ = ["BlockOpening", "Opening", "StackOpening", "TowerOpening", "VideosOpening"]

PADDING_MASKS = ("src_key_padding_mask", "decoder_padding_mask")  # True = padding: torch's, and FSMT's
DESCRIBE = "Describe them with `sequence_scope(mask=..., segment_ids=...)`, or use cell='none' here (cell_pattern)."
MERGED = (
    "in which several images, videos or clips of the batch may follow each other, and it is unknown where "
    f"each begins: the recurrence would run from one into the next. {DESCRIBE}"
)
PADDED_SOMEWHERE = f"some of them padding by the mask of its stack, and it is unknown which. {DESCRIBE}"
TWO_STREAMS = (
    "and its block is given another sequence of the same length, so that it is unknown which of the two it is. "
    f"{DESCRIBE}"
)
SEGMENTS_ON_A_CACHE = (
    "which continue a KV cache, and are told to be several sequences in a row. The recurrence has one state to "
    "continue from. Give each sequence a row of its own, use use_cache=False, or use cell='none' here (cell_pattern)."
)
# The sequences that a block reads beside its own. The encoder's has its mask from the stack.
OTHER_STATES = re.compile(
    r"(?!encoder_hidden_states$)\w*(cross|kv|key_value|image|vision|global)\w*states$"
    r"|(prompt|text|vision|image)_feat(ure)?s$"
)
# What a block computes beside its own tokens by the same layers, as the global tokens of PEGASUS-X.
SECOND_STREAMS = ("global_hidden_states",)
# The settings of models that pad their sequences to a multiple of a window, at the end.
PADDED_TO_A_MULTIPLE = ("attention_window", "block_size", "local_radius")


class Opening:
    """Forward pre-hook: read the arguments of a module and open a scope.

    Args:
        names: the names of the forward's parameters, in order.
    """

    def __init__(self, names: list[str]) -> None:
        self.names = names

    @outside_graphs
    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Open the scope that the arguments describe, if any."""
        if not torch.compiler.is_compiling():
            forget_interrupted(self)
        given = dict(zip(self.names, args, strict=False))
        given.update(kwargs)
        scope = self.scope_of(module, given, current_scope())
        if scope is not None:
            scope.opened_by = self
            enter_scope(scope)

    def scope_of(self, module: nn.Module, given: dict[str, Any], outer: Scope | None) -> Scope | None:
        """The scope that a module's arguments describe; None if they add nothing to the one around it."""
        raise NotImplementedError


class VideosOpening(Opening):
    """Of a model that is given videos (B, F, C, H, W), which it hands to an encoder of images frame by frame."""

    def scope_of(self, module: nn.Module, given: dict[str, Any], outer: Scope | None) -> Scope | None:
        """The shape of the videos, where the model is given any."""
        _checkpoint_in_scope(module)
        videos = given.get("pixel_values_videos")
        if not isinstance(videos, torch.Tensor) or videos.dim() != 5:
            return None
        frames = (videos.shape[0], videos.shape[1])
        return Scope(owner=module, outer=outer, tower=Tower(frames=frames))


class TowerOpening(Opening):
    """Of an encoder of images, video or sound: how many of them it is given, and how many tokens each has."""

    def scope_of(self, module: nn.Module, given: dict[str, Any], outer: Scope | None) -> Scope | None:
        """How many rows the tower is given, and the tokens of each where the arguments tell."""
        _checkpoint_in_scope(module)
        raw = next((given[name] for name in (*RAW_INPUTS, self.names[0]) if name in given), None)
        grid = given.get("grid_thw")
        if isinstance(grid, torch.Tensor):  # (n, 3): frames, rows and columns of patches, one visual after the other
            tower = Tower(rows=len(grid), lengths=grid.prod(-1))
        elif isinstance(raw, torch.Tensor):
            frames = outer.tower.frames if outer is not None and outer.tower is not None else None
            matches = frames is not None and raw.dim() == 4 and frames[0] * frames[1] == raw.shape[0]
            tower = Tower(rows=raw.shape[0], frames=frames if matches else None)
        else:
            tower = Tower(rows=len(raw) if isinstance(raw, (list, tuple)) else None)
        return Scope(owner=module, outer=outer, tower=tower)


class StackOpening(Opening):
    """Of a stack of blocks.

    Args:
        names: the names of the forward's parameters, in order.
        batch_first: whether the stack takes (B, T, d).
        embeds: whether it takes token ids or their embeddings.
        by_positions: what `masks_by_positions` says of it.
    """

    def __init__(self, names: list[str], *, batch_first: bool, embeds: bool, by_positions: bool | None) -> None:
        super().__init__(names)
        self.by_positions = by_positions
        self.batch_first = batch_first
        self.embeds = embeds

    def scope_of(self, module: nn.Module, given: dict[str, Any], outer: Scope | None) -> Scope:
        """The scope that a stack's arguments describe.

        Args:
            module: the stack.
            given: its arguments by name.
            outer: the scope around it.
        """
        _checkpoint_in_scope(module)
        batch, length, device = self._shape(given)
        cache = given_cache(given)
        past = cache_length(cache) if cache is not None else 0
        if is_begun(past) and not self.embeds:
            raise NotImplementedError(
                f"READ cannot tell how many tokens the cache held before {type(module).__name__}, because the stack "
                "around it takes no `inputs_embeds`; generate with use_cache=False."
            )
        told = told_by_user(outer, batch, length)
        mask = told.mask if told is not None else None
        use_cache = given.get("use_cache")
        makes_cache = self._makes_cache(module, use_cache)
        packing = Packing(told.segment_ids if told is not None else None)
        if mask is None:
            mask = self._mask(given, batch, length, past, cache, device)
        if packing.segment_ids is None:
            positions = self._positions_tell(module, batch, cached=makes_cache or cache is not None)
            packing = segments_told(module, given, batch, length, past=past, cache=cache, positions=positions)
        source = given.get("encoder_hidden_states")
        source_mask = None
        if isinstance(source, torch.Tensor) and source.dim() == 3:
            told_mask = given.get("encoder_attention_mask", given.get("encoder_padding_mask"))
            source_mask = _mask_or_none(told_mask, source.shape[0], source.shape[1])
        else:
            source = None
        tower = outer.tower if outer is not None and "input_ids" not in self.names else None
        if packing.segment_ids is None and batch == 1 and length is not None:
            packing = packing._replace(segment_ids=segments_of_tower(tower, length))
        if packing.segment_ids is None and may_be_merged(tower, batch, length):
            packing = packing._replace(unclear=MERGED)
        if packing.segment_ids is not None and is_begun(past):
            packing = Packing(unclear=SEGMENTS_ON_A_CACHE)
        scope = Scope(
            batch=batch,
            length=length,
            mask=mask,
            cache=cache,
            past=past,
            keeps_states=cache is not None or (makes_cache and (use_cache is not None or not module.training)),
            source=source,
            source_mask=source_mask,
            owner=module,
            outer=outer,
            tower=tower,
        )
        scope.segment_ids, scope.unclear, scope.unless = packing
        return scope

    def _makes_cache(self, module: nn.Module, use_cache: bool | None) -> bool:
        """Whether the stack makes a cache where it is given none: as it is told, or by its configuration."""
        if use_cache is None and "use_cache" in self.names:
            use_cache = getattr(getattr(module, "config", None), "use_cache", False)
        checkpointed = module.training and torch.is_grad_enabled() and getattr(module, "gradient_checkpointing", False)
        return bool(use_cache) and not checkpointed

    def _positions_tell(self, module: nn.Module, batch: int | None, *, cached: bool) -> bool:
        """Whether positions that restart, without a mask, keep the tokens of a row apart in the stack's attention.

        transformers cuts its causal masks there unless there is a cache; flash attention cuts batches of one row.
        """
        if self.by_positions is None:
            return True
        config = getattr(module, "config", None)
        flash = "flash" in str(getattr(config, "_attn_implementation", ""))
        return self.by_positions and getattr(config, "is_causal", True) and (batch == 1 if flash else not cached)

    def _shape(self, given: dict[str, Any]) -> tuple[int | None, int | None, torch.device | None]:
        """(B, T) and the device, as far as the arguments tell."""
        for name in ("inputs_embeds", "input_ids", self.names[0] if self.names else "input_ids"):
            tensor = given.get(name)
            if not isinstance(tensor, torch.Tensor) or tensor.is_nested:
                continue
            if not tensor.is_floating_point():
                return tensor.numel() // max(tensor.shape[-1], 1), tensor.shape[-1], tensor.device
            if tensor.dim() == 3:
                batch, length = tensor.shape[:2] if self.batch_first else (tensor.shape[1], tensor.shape[0])
                return batch, length, tensor.device
        return None, None, None

    def _mask(
        self,
        given: dict[str, Any],
        batch: int | None,
        length: int | None,
        past: int | torch.Tensor,
        cache: Cache | None,
        device: torch.device | None,
    ) -> torch.Tensor | None:
        if self.names[:2] == ["query", "key"] and given.get("key") is not given.get("query"):
            return None  # of cross-attention, whose mask is the key's
        for name in PADDING_MASKS:
            padding = given.get(name)
            if isinstance(padding, torch.Tensor) and tuple(padding.shape) == (batch, length):
                return kept_by_padding_mask(padding)
        attention_mask = given.get("attention_mask")
        wider = isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2 and cache is None
        if wider and length is not None and attention_mask is not None and attention_mask.shape[1] > length:
            return None  # the model adds tokens of its own, and tells its blocks about them
        if not self.embeds:  # a stack of images, whose mask may be one of windows
            mask = _mask_or_none(attention_mask, batch, length)
        else:
            mask = as_mask(attention_mask, batch, length, past=past, cache=cache)
        return mask if mask is None or device is None else mask.to(device)


class BlockOpening(Opening):
    """Of one block: a scope of its own where its rows are not those that its stack was given.

    Args:
        names: the names of the forward's parameters, in order.
        batch_first: whether the block takes (B, T, d).
    """

    def __init__(self, names: list[str], *, batch_first: bool) -> None:
        super().__init__(names)
        self.batch_first = batch_first

    def scope_of(self, module: nn.Module, given: dict[str, Any], outer: Scope | None) -> Scope | None:
        """The block's own rows; None where they are its stack's, whose scope then notes what the block is given."""
        states = given.get("hidden_states", given.get(self.names[0]))
        if not isinstance(states, torch.Tensor) or states.is_nested or not states.is_floating_point():
            return None
        scope = self._own_scope(module, given, states, outer)
        described = scope if scope is not None else outer
        if described is not None and states.dim() == 3:
            described.others = _others(given, states)
            streams = [tensor for name, (tensor, _) in described.others.items() if name in SECOND_STREAMS]
            same = any(stream.shape[:2] == (described.batch, described.length) for stream in streams)
            if same and (described.segment_ids is not None or described.has_padding):
                described.unclear = TWO_STREAMS
        return scope

    def _own_scope(
        self, module: nn.Module, given: dict[str, Any], states: torch.Tensor, outer: Scope | None
    ) -> Scope | None:
        """A scope of the block's own; None if its rows are those of its stack."""
        around = (0, 0) if outer is None else (outer.batch or 0, outer.length or 0)
        if states.dim() == 3:
            batch, length = states.shape[:2] if self.batch_first else (states.shape[1], states.shape[0])
            if (batch, length) == around or (length, batch) == around:
                return None
        elif states.dim() == 2:
            if around[0] * around[1] == states.shape[0]:
                return None
            batch, length = 1, states.shape[0]
        else:
            return None
        tower = None if outer is None else outer.tower
        packing = segments_told(module, given, batch, length)
        if batch == 1:
            lengths = segments_of_tower(tower, length)
            packing = Packing(lengths) if lengths is not None else packing
        if states.dim() == 2 and packing.segment_ids is None and packing.unclear is None:
            return None  # vectors that follow no other, as far as anything tells
        scope = Scope(outer=None) if outer is None else outer
        scope = scope.within(batch, length, module)
        scope.outer = outer
        told = told_by_user(outer, batch, length)
        if told is not None and told.segment_ids is not None:
            packing = Packing(told.segment_ids)
        streams = streams_of(outer, batch, length, states.device)
        if streams is not None:
            packing = Packing(streams)
        scope.segment_ids, scope.unclear, scope.unless = packing
        scope.mask = _mask_or_none(given.get("attention_mask"), batch, length, past=scope.past)
        if told is not None and told.mask is not None:
            scope.mask = told.mask
        elif outer is not None and outer.mask is not None and batch == outer.batch and "attention_mask" not in given:
            scope.mask = _widened(outer, length)
        if scope.segment_ids is None and may_be_merged(tower, batch, length):
            scope.unclear = MERGED
        elif scope.unclear or scope.mask is not None or ("attention_mask" in given and states.dim() == 3):
            return scope
        elif outer is not None and batch == outer.batch and outer.has_padding:
            scope.unclear = PADDED_SOMEWHERE
        return scope


def _others(given: dict[str, Any], states: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
    """The sequences that a block is given beside its own, with their masks: those of cross-attention, global tokens.

    Args:
        given: the block's arguments by name.
        states: those of its own tokens.
    """
    others: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {}
    for name, other in given.items():
        if other is states or not isinstance(other, torch.Tensor) or other.dim() != 3 or len(other) != len(states):
            continue
        if not OTHER_STATES.match(name) or not other.is_floating_point():
            continue
        rows = (other.shape[0], other.shape[1])
        masks = [v for k, v in given.items() if "mask" in k and isinstance(v, torch.Tensor) and tuple(v.shape) == rows]
        mask = _mask_or_none(masks[0], *rows) if masks else None
        if not masks:
            wide = [
                value
                for key, value in given.items()
                if isinstance(value, torch.Tensor)
                and value.dim() == 4
                and ("cross" in key or ("mask" in key and other.shape[1] != states.shape[1]))
            ]
            fitting = [v for v in wide if v.shape[-1] == other.shape[1] and v.shape[0] in (1, other.shape[0])]
            mask = attended_keys(fitting[0], len(other)) if fitting else None
        others[name] = (other, mask)
    return others


def _mask_or_none(
    attention_mask: Any, batch: int | None, length: int | None, past: int | torch.Tensor = 0
) -> torch.Tensor | None:
    """`as_mask` of a mask that may be one of windows, of other tokens, or of a kind that tells no padding."""
    try:
        return as_mask(attention_mask, batch, length, past=past)
    except (NotImplementedError, ValueError, IndexError):
        return None


def _widened(outer: Scope, length: int) -> torch.Tensor | None:
    """The mask of a stack for blocks that see more tokens than it was given, where it adds padding at the end."""
    config = getattr(outer.owner, "config", None)
    missing = length - (outer.length or 0)
    if outer.mask is None or missing <= 0 or not any(hasattr(config, name) for name in PADDED_TO_A_MULTIPLE):
        return None
    return torch.nn.functional.pad(outer.mask, (0, missing))


def _capture_scope() -> Callable[[bool], AbstractContextManager[None]]:
    """For checkpointing: the scope in which a block is first computed."""
    scope = current_scope()
    return lambda without_graph: run_in_scope(scope)


def _checkpoint_in_scope(stack: nn.Module) -> None:
    """Wrap the checkpointing functions below a stack; backward runs them when the stack's scope is long closed."""
    if stack.training and not torch.compiler.is_compiling():
        scope_checkpoints(stack, _capture_scope, "READ")
