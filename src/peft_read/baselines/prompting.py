"""Freezes any of the project's backbones and adds prompts to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from .freezing import modules_asked_for
from .prompt import InputPrompts
from .prompt_summariser import SummariserPrompts

__all__ = ["add_prompts"]

GROUNDING, SUMMARISERS = ("moment_detr", "umt"), ("vg_bart", "vg_t5")


def add_prompts(model: nn.Module, *, length: int = 10, also: Sequence[str] = ()) -> nn.Module:
    """Freezes a model and puts learnable vectors before both of its input sequences.

    Source: READ-PVLA section 4.1, baseline "Prompt": learnable vectors are put before the input sequences, the rest
    is frozen. The vectors become `model.prompts` and part of its state dict: length · (d + width of the video's
    states) numbers.

    Args:
        model: a Moment-DETR, UMT, VG-BART or VG-T5, without an adapter.
        length: vectors per sequence.
        also: suffixes of module names that are trained beside the prompts (modules that are new, not pretrained).

    Returns:
        The model.

    Raises:
        ValueError: another model, one that fuses no video, a length below one, or a model that has prompts already; a
            suffix of `also` that is that of no module with parameters.
    """
    config: Any = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type not in GROUNDING + SUMMARISERS or hasattr(model, "peft_config"):
        raise ValueError(
            f"prompts go before the inputs of a bare {' or '.join(GROUNDING + SUMMARISERS)}, not of "
            f"{type(model).__name__} ({model_type!r}); for language models see peft's PromptTuningConfig and "
            "PrefixTuningConfig"
        )
    if length < 1:
        raise ValueError(f"length={length} must be positive")
    if hasattr(model, "prompts"):
        raise ValueError("the model has prompts already")
    if model_type in SUMMARISERS and _fuses_nothing(config):
        raise ValueError(
            f"fusion_layer={config.fusion_layer}: this {model_type} sees no video, so that prompts before "
            "it would never be trained; for the text alone see peft's PromptTuningConfig"
        )
    modules = modules_asked_for(model, also)
    model.requires_grad_(False)
    reference = next(model.parameters())
    if model_type in SUMMARISERS:
        prompts: InputPrompts = SummariserPrompts(
            model_type, length, config.d_model, video_width=config.visual_feature_dim
        )
    else:
        has_text = model_type == "moment_detr" or config.text_feature_dim is not None
        prompts = InputPrompts(model_type, length, config.d_model, has_text=has_text)
    model.prompts = prompts.to(device=reference.device, dtype=reference.dtype)
    prompts.attach(model)
    for module in modules:
        module.requires_grad_(True)
    return model


def _fuses_nothing(config: Any) -> bool:
    at_the_end = getattr(config, "fusion_place", "layer") == "final"  # there the number is a switch
    return not config.fusion_layer if at_the_end else config.fusion_layer is None
