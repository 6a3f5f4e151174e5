"""Which modules READ adapts: its default targets, what "all-linear" means to it, and where there is no order."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from ..peft_methods.default_targets import default_targets, names_of
from ..peft_methods.endings import (
    NO_SEQUENCE,
    PARTS,
    block_of,
    block_width,
    feed_forward_endings,
    in_and_out,
    is_inside_an_adapter,
)
from ..peft_methods.stacks import EXPERTS

__all__ = [
    "PARTS",
    "block_width",
    "default_targets",
    "feed_forward_endings",
    "in_and_out",
    "linear_targets",
    "sets_in",
]

# Their projections see (T, B, d), global tokens or tokens padded once more, in a block that sees (B, T, d).
OWN_LAYOUT = re.compile(r"(Longformer|LEDEncoder)SelfAttention$|GlobalLocalAttention$|MLCDAttention$")


def linear_targets(model: nn.Module) -> tuple[set[str] | str, list[str]] | None:
    """What "all-linear" means to READ: the linear layers of the blocks, which see the tokens of a sequence.

    Pooling and language-modelling heads, classifiers and embeddings of patches see one vector per example, or the
    tokens that a caller asks for; routers, projections of positions and of step sizes see no states of the tokens.

    Args:
        model: the model.

    Returns:
        `target_modules`, and the layers left out; None if the model has no blocks.
    """
    chosen: list[str] = []
    left_out: list[str] = []
    for name, module in model.named_modules():
        if in_and_out(module) is None or is_inside_an_adapter(model, name):
            continue
        block = block_of(model, name)
        seen = block is not None and not NO_SEQUENCE.search(name) and not EXPERTS.search(name)
        parent = model.get_submodule(name.rpartition(".")[0])
        seen = seen and not OWN_LAYOUT.search(type(parent).__name__)
        # DeBERTa's projections of keys and queries, where they project relative positions too.
        seen = seen and not (getattr(parent, "share_att_key", False) and re.search(r"(key|query)_proj$", name))
        (chosen if seen else left_out).append(name)
    if not chosen:
        return None
    return names_of(chosen, [name for name, _ in model.named_modules()], as_list=False), left_out


def sets_in(model: nn.Module) -> str | None:
    """A pattern of the blocks whose states are object queries, a set without an order; None if there are none.

    These are the decoders of models that look for a fixed number of objects in an image or a video (DETR and its
    relatives).

    Args:
        model: the model.
    """
    config: Any = getattr(model, "config", None)
    counts = ("num_queries", "num_object_queries", "num_detection_tokens")
    # A projector's learned queries have a number too, but then the model reads text.
    reads_images = getattr(model, "main_input_name", None) == "pixel_values"
    if not reads_images or not any(isinstance(getattr(config, name, None), int) for name in counts):
        return None
    inside = {name for name, module in model.named_modules() if in_and_out(module) and "decoder" in name.split(".")}
    return r".*decoder\..*" if inside else None
