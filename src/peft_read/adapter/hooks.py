"""The hooks on the modules around READ's layers: put on, taken off, and the closing of what the pre-hooks open."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..checkpointing import unscope_checkpoints
from ..peft_methods.stacks import (
    blocks_around,
    find_stack,
    is_batch_first,
    masks_by_positions,
    parameters_of,
    tower_around,
    videos_around,
)
from .cache import commit_states, has_grown, returned_cache
from .openings import BlockOpening, Opening, StackOpening, TowerOpening, VideosOpening
from .running import current_scope, leave_scope, outside_graphs

__all__ = ["install_scopes", "remove_scopes"]


class _Closing:
    """Forward hook: close the scope that was opened, and give the states of a stack's new tokens to the cache.

    Args:
        opening: the hook that opened it.
    """

    def __init__(self, opening: Opening) -> None:
        self.opening = opening

    @outside_graphs
    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        scope = current_scope()
        if scope is None or scope.opened_by is not self.opening:  # nothing was opened, or the pre-hook raised
            return
        leave_scope(scope)
        if output is None or not scope.pending:  # None: the forward raised, and so does whoever called it
            return
        if not isinstance(self.opening, StackOpening):
            return  # the states go to the cache when the stack has finished
        cache = scope.cache if scope.cache is not None else returned_cache(output)
        if cache is not None and has_grown(cache, scope.past, scope.written or 0):
            commit_states(cache, scope.pending, scope.past)


def install_scopes(model: nn.Module, path: str, *, batch_first: bool = True) -> None:
    """Put hooks on the modules around a layer that know its sequences, where they are not there yet.

    Args:
        model: the model that the path starts at.
        path: the layer's path.
        batch_first: the layout of what the blocks around it are given.
    """
    videos, tower = videos_around(model, path), tower_around(model, path)
    if tower is not None:
        if videos is not None and videos is not tower:
            _hook(videos, VideosOpening(parameters_of(videos)))
        _hook(tower, TowerOpening(parameters_of(tower)))
    nearest = find_stack(model, path)
    if nearest is not None:
        _, stack, embeds = nearest
        names, by_positions = parameters_of(stack), masks_by_positions(stack)
        opening = StackOpening(names, batch_first=is_batch_first(stack), embeds=embeds, by_positions=by_positions)
        _hook(stack, opening)
    for block in blocks_around(model, path):
        names = parameters_of(block)
        # A block that is its own stack may still be given rows (N, d), which tell no batch.
        if names and (nearest is None or block is not nearest[1] or not nearest[2]):
            _hook(block, BlockOpening(names, batch_first=batch_first))


def _hook(module: nn.Module, opening: Opening) -> None:
    if any(type(hook) is type(opening) for hook in module._forward_pre_hooks.values()):
        return
    module.register_forward_pre_hook(opening, with_kwargs=True)
    # What was opened last is closed first, also where one module has several hooks.
    module.register_forward_hook(_Closing(opening), with_kwargs=True, always_call=True, prepend=True)


def remove_scopes(model: nn.Module) -> None:
    """Take all of READ's hooks off a model.

    They are found by looking, not by stored handles: a copied or unpickled model has hooks but no handles to them.
    """
    for module in model.modules():
        for hooks, kind in ((module._forward_pre_hooks, Opening), (module._forward_hooks, _Closing)):
            for number in [number for number, hook in hooks.items() if isinstance(hook, kind)]:
                del hooks[number]
                for flags in ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs"):
                    getattr(module, flags).pop(number, None)
                module._forward_hooks_always_called.pop(number, None)
    unscope_checkpoints(model, "READ")
