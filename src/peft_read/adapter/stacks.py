"""The stacks of blocks around READ's layers: finding them, and hooks that read what they are told."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from .cache import cache_length, commit_states, given_cache, has_grown, returned_cache
from .masks import as_mask, kept_by_padding_mask, packed_segments, segments_of_lengths
from .scope import Scope, current_scope, enter_scope, leave_scope, run_in_scope

__all__ = ["find_stack", "install_scope", "is_causal", "keep_slow_path", "remove_scopes"]

MASKS = {"attention_mask", "src_key_padding_mask", "segment_ids"}
RAW_INPUTS = ("input_features", "input_values", "pixel_values")


class _Opening:
    """Forward pre-hook of a stack: read its arguments and open the scope."""

    def __init__(self, names: list[str], *, batch_first: bool, is_stack: bool) -> None:
        self.names = names
        self.batch_first = batch_first
        self.is_stack = is_stack

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = dict(zip(self.names, args, strict=False))
        given.update(kwargs)
        _checkpoint_in_scope(module)
        enter_scope(self.scope_of(module, given))

    def scope_of(self, module: nn.Module, given: dict[str, Any]) -> Scope:
        """The scope that a stack's arguments describe.

        Args:
            module: the stack.
            given: its arguments by name.
        """
        batch, length, device = self._shape(given)
        cache = given_cache(given)
        if cache is not None and not self.is_stack:
            raise NotImplementedError(
                f"READ cannot tell how many tokens the cache held before {type(module).__name__}, because the stack "
                "around it takes no `inputs_embeds`; generate with use_cache=False."
            )
        past = cache_length(cache) if cache is not None else 0
        mask = self._mask(given, batch, length, past, cache, device)
        segment_ids = given.get("segment_ids")
        if segment_ids is None and given.get("cu_seq_lens_q") is not None and length is not None:
            segment_ids = segments_of_lengths(given["cu_seq_lens_q"], batch, length)
        elif segment_ids is None and given.get("attention_mask") is None and past == 0:
            segment_ids = packed_segments(given.get("position_ids"), batch, length)
        if given.get("segment_ids") is not None and past:
            raise NotImplementedError("READ does not continue a KV cache when `segment_ids` are given.")

        outer = current_scope()
        if outer is not None and outer.explicit and (outer.batch, outer.length) == (batch, length):
            mask = outer.mask if mask is None else mask
            segment_ids = outer.segment_ids if segment_ids is None else segment_ids
        use_cache = given.get("use_cache")
        if use_cache is None and "use_cache" in self.names and not module.training:
            use_cache = getattr(getattr(module, "config", None), "use_cache", False)
        source = given.get("encoder_hidden_states")
        source_mask = None
        if isinstance(source, torch.Tensor) and source.dim() == 3:
            source_mask = as_mask(given.get("encoder_attention_mask"), source.shape[0], source.shape[1])
        else:
            source = None
        return Scope(
            batch=batch,
            length=length,
            mask=mask,
            segment_ids=segment_ids,
            cache=cache,
            past=past,
            keeps_states=cache is not None or bool(use_cache),
            source=source,
            source_mask=source_mask,
            owner=module,
        )

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

    @staticmethod
    def _mask(
        given: dict[str, Any],
        batch: int | None,
        length: int | None,
        past: int,
        cache: Cache | None,
        device: torch.device | None,
    ) -> torch.Tensor | None:
        padding = given.get("src_key_padding_mask")
        if isinstance(padding, torch.Tensor):
            return kept_by_padding_mask(padding)
        mask = as_mask(given.get("attention_mask"), batch, length, past=past, cache=cache)
        return mask if mask is None or device is None else mask.to(device)


class _Closing:
    """Forward hook of a stack: close the scope and give the states of the new tokens to the cache."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        scope = current_scope()
        if scope is None or scope.owner is not module:  # the pre-hook itself raised
            return
        leave_scope(scope)
        if output is None or not scope.pending:  # None: the forward raised, and so does whoever called it
            return
        cache = scope.cache if scope.cache is not None else returned_cache(output)
        if cache is not None and has_grown(cache, scope.past, scope.length or 0):
            commit_states(cache, scope.pending, scope.past)


class _ScopedCheckpoint:
    """A checkpointing function that recomputes a block in the scope in which it was first computed."""

    def __init__(self, checkpoint: Any) -> None:
        self.checkpoint = checkpoint

    def __call__(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        scope = current_scope()

        def scoped(*inner: Any, **named: Any) -> Any:
            with run_in_scope(scope):
                return function(*inner, **named)

        return self.checkpoint(scoped, *args, **kwargs)


def _checkpoint_in_scope(stack: nn.Module) -> None:
    """Wrap the checkpointing functions below a stack; backward runs them when the stack's scope is long closed."""
    if not stack.training or torch.compiler.is_compiling():
        return
    for module in stack.modules():
        for name in ("_gradient_checkpointing_func", "checkpoint_fn"):  # transformers; torch's CheckpointWrapper
            function = module.__dict__.get(name)
            if function is not None and not isinstance(function, _ScopedCheckpoint):
                module.__dict__[name] = _ScopedCheckpoint(function)


def _parameters(module: nn.Module) -> list[str]:
    """The names of a forward's parameters, in order, without those that collect the rest."""
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return []
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def find_stack(model: nn.Module, path: str) -> tuple[str, nn.Module, bool] | None:
    """The module around a layer that knows the sequences: its path, itself, and whether it embeds the tokens.

    The nearest one whose forward takes `inputs_embeds` is the stack (BartEncoder, T5Stack, LlamaModel ...), unless
    the layer belongs to another model inside of it, such as a transformer over video frames. Without such a one it is
    the owner of the list of blocks, if it takes a mask, or the nearest module that does.

    Args:
        model: the model that the path starts at.
        path: the layer's path.
    """
    parts = path.split(".")
    takes_mask = []
    for depth in range(len(parts) - 1, -1, -1):
        name, below = ".".join(parts[:depth]), parts[depth:]
        module = model.get_submodule(name)
        names = _parameters(module)
        if "inputs_embeds" in names and not _is_of_another_model(module, below):
            return name, module, True
        if "inputs_embeds" in names:
            break
        if names and names[0] not in RAW_INPUTS and MASKS & set(names):
            takes_mask.append((name, module, len(below) > 1 and below[1].isdigit()))
        if isinstance(module, PreTrainedModel):
            break  # what is around it has another sequence, as a language model has around its image encoder
    owners = [(name, module) for name, module, owns_list in takes_mask if owns_list]
    found = owners[0] if owners else takes_mask[0][:2] if takes_mask else None
    return None if found is None else (*found, False)


def _is_of_another_model(stack: nn.Module, below: list[str]) -> bool:
    """Whether a layer in a list of blocks stands apart from the list that the stack itself owns."""
    in_a_list = any(part.isdigit() for part in below)
    owns = any(isinstance(child, nn.ModuleList) for child in stack.children())
    return in_a_list and owns and not (len(below) > 1 and below[1].isdigit())


def is_causal(model: nn.Module, path: str) -> bool:
    """Whether a layer belongs to a decoder: its stack says so, or the self-attention beside it."""
    found = find_stack(model, path)
    stack = found[1] if found is not None else None
    if getattr(stack, "is_decoder", False) or getattr(getattr(stack, "config", None), "is_decoder", False) is True:
        return True
    # The block around the layer is the part of its path up to the last number.
    parts = path.split(".")
    numbers = [depth for depth, part in enumerate(parts) if part.isdigit()]
    if not numbers:
        return False
    block = model.get_submodule(".".join(parts[: numbers[-1] + 1]))
    return any(
        getattr(module, "is_causal", False) is True
        for name, module in block.named_modules()
        if "cross" not in name and "encoder_attn" not in name
    )


def install_scope(model: nn.Module, path: str) -> None:
    """Put the hooks on the stack around a layer, if it has one and they are not there yet.

    Args:
        model: the model that the path starts at.
        path: the layer's path.
    """
    found = find_stack(model, path)
    if found is None:
        return
    _, stack, is_stack = found
    if any(isinstance(hook, _Opening) for hook in stack._forward_pre_hooks.values()):
        return
    opening = _Opening(
        _parameters(stack),
        batch_first=_is_batch_first(stack),
        is_stack=is_stack,
    )
    stack.register_forward_pre_hook(opening, with_kwargs=True)
    stack.register_forward_hook(_Closing(), with_kwargs=True, always_call=True)


class _SlowPath:
    """A forward pre-hook that does nothing, which is enough."""

    def __call__(self, module: nn.Module, args: tuple) -> None:
        return None


def keep_slow_path(layer: nn.TransformerEncoderLayer) -> None:
    """Keep a layer of torch's own Transformer from its fast path.

    In evaluation it hands the weights of `linear1` and `linear2` to one fused kernel, past the module that READ has
    put in their place. A layer with a forward pre-hook does not do that.
    """
    if not any(isinstance(hook, _SlowPath) for hook in layer._forward_pre_hooks.values()):
        layer.register_forward_pre_hook(_SlowPath())


def _is_batch_first(stack: nn.Module) -> bool:
    """Whether a stack of torch's own Transformer layers takes (B, T, d); every other stack does."""
    attention = next((module for module in stack.modules() if isinstance(module, nn.MultiheadAttention)), None)
    return attention is None or attention.batch_first


def remove_scopes(model: nn.Module) -> None:
    """Take all hooks of this file off a model.

    They are found by looking, not by stored handles: a copied or unpickled model has hooks but no handles to them.
    """
    for module in model.modules():
        for hooks, kind in ((module._forward_pre_hooks, (_Opening, _SlowPath)), (module._forward_hooks, _Closing)):
            for number in [number for number, hook in hooks.items() if isinstance(hook, kind)]:
                del hooks[number]
                for flags in ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs"):
                    getattr(module, flags).pop(number, None)
                module._forward_hooks_always_called.pop(number, None)
        for name in ("_gradient_checkpointing_func", "checkpoint_fn"):
            function = module.__dict__.get(name)
            if isinstance(function, _ScopedCheckpoint):
                module.__dict__[name] = function.checkpoint
