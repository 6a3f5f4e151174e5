"""The modules around READ's layers that know the sequences: the stack, the blocks in it, the tower around it."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from functools import cache
from typing import Any

from torch import nn
from transformers import PreTrainedModel

__all__ = [
    "blocks_around",
    "find_stack",
    "is_batch_first",
    "is_causal",
    "masks_by_positions",
    "parameters_of",
    "sees_batch_first",
    "tower_around",
    "videos_around",
]

MASKS = {"attention_mask", "src_key_padding_mask", "segment_ids"}
# The tokens that a router sends to an expert are not a sequence. Shared experts see all tokens and do not count.
EXPERTS = re.compile(r"(^|\.)(local_)?experts(\.|$)")
# The families whose blocks take (T, B, d).
SEQUENCE_FIRST = {"fsmt", "xlnet"}
MAKES_MASK = re.compile(r"^(?!.*bidirectional).*mask")  # create_causal_mask, or what a stack has chosen to call
RAW_INPUTS = ("input_features", "input_values", "pixel_values", "pixel_values_videos", "pixel_values_images")


def parameters_of(module: nn.Module) -> list[str]:
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
        names = parameters_of(module)
        if "inputs_embeds" in names and not _is_of_another_model(module, below):
            return name, module, True
        if "inputs_embeds" in names:
            break
        if names and names[0] not in RAW_INPUTS and MASKS & set(names):
            takes_mask.append((name, module, len(below) > 1 and below[1].isdigit()))
        if isinstance(module, PreTrainedModel):
            break  # what is around it has another sequence, as a language model has around its image encoder
    owners = [(name, module) for name, module, owns_list in takes_mask if owns_list]
    stack = owners[0] if owners else takes_mask[0][:2] if takes_mask else None
    return None if stack is None else (*stack, False)


def _is_of_another_model(stack: nn.Module, below: list[str]) -> bool:
    """Whether a layer in a list of blocks stands apart from the list that the stack itself owns."""
    in_a_list = any(part.isdigit() for part in below)
    owns = any(isinstance(child, nn.ModuleList) for child in stack.children())
    return in_a_list and owns and not (len(below) > 1 and below[1].isdigit())


def is_causal(model: nn.Module, path: str) -> bool:
    """Whether a layer belongs to a decoder: its stack says so, or the self-attention beside it."""
    path_and_stack = find_stack(model, path)
    stack = path_and_stack[1] if path_and_stack is not None else None
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


def masks_by_positions(stack: nn.Module) -> bool | None:
    """Whether a stack of transformers gives its `position_ids` to the function that makes its causal mask.

    The masks of both directions are made without them, and so are some causal ones (OPT, decoders of BERT). No setting
    tells this, so it is read from the source of the forward; without a source the answer is yes.

    Args:
        stack: the stack.

    Returns:
        None for a stack that is not transformers' own, of whose masks nothing is known.
    """
    kind: Any = type(stack)
    return _masks_by_positions(kind) if kind.__module__.startswith("transformers.") else None


@cache  # every adapted layer of a stack asks
def _masks_by_positions(kind: Any) -> bool:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(kind.forward))))
    except (OSError, TypeError, SyntaxError):
        return True
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    makers = [call for call in calls if MAKES_MASK.search(getattr(call.func, "id", ""))]
    return any(keyword.arg in ("position_ids", None) for call in makers for keyword in call.keywords)  # None: **given


def blocks_around(model: nn.Module, path: str) -> list[nn.Module]:
    """The entries of module lists that contain a layer, from the outside in, without experts.

    Args:
        model: the model that the path starts at.
        path: the layer's path.
    """
    parts = path.split(".")
    blocks: list[nn.Module] = []
    for depth in range(1, len(parts)):
        if not parts[depth - 1].isdigit() or "experts" in parts[:depth]:
            continue
        if isinstance(model.get_submodule(".".join(parts[: depth - 1])), nn.ModuleList):
            block = model.get_submodule(".".join(parts[:depth]))
            if not isinstance(block, (nn.ModuleList, nn.ModuleDict)):
                blocks.append(block)
    return blocks


def _modules_around(model: nn.Module, path: str) -> Iterator[nn.Module]:
    """The modules that a layer lies in, from the inside out."""
    parts = path.split(".")
    return (model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts) - 1, -1, -1))


def tower_around(model: nn.Module, path: str) -> nn.Module | None:
    """The nearest model around a layer, if it is given images, video or sound rather than tokens.

    Args:
        model: the model that the path starts at.
        path: the layer's path.
    """
    for module in _modules_around(model, path):
        names = parameters_of(module)
        if names and (names[0] in RAW_INPUTS or "grid_thw" in names):
            return module
        if "input_ids" in names:
            return None
    return None


def videos_around(model: nn.Module, path: str) -> nn.Module | None:
    """The model around a layer that is given whole videos, if any.

    Args:
        model: the model that the path starts at.
        path: the layer's path.
    """
    around = _modules_around(model, path)
    return next((module for module in around if "pixel_values_videos" in parameters_of(module)), None)


def is_batch_first(stack: nn.Module) -> bool:
    """Whether a stack of torch's own Transformer layers takes (B, T, d); every other stack does."""
    attention = next((module for module in stack.modules() if isinstance(module, nn.MultiheadAttention)), None)
    return attention is None or attention.batch_first


def sees_batch_first(model: nn.Module, path: str) -> bool:
    """Whether the module at a path puts out (B, T, d) rather than (T, B, d), by its model's family and its block.

    Args:
        model: the model that the path starts at.
        path: the module's path.
    """
    if getattr(getattr(model, "config", None), "model_type", None) in SEQUENCE_FIRST:
        return False
    blocks = blocks_around(model, path)
    return is_batch_first(blocks[0] if blocks else model.get_submodule(path.rpartition(".")[0]))
