"""The Prompt baseline: learnable vectors before both input sequences of a frozen grounding model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["InputPrompts", "add_prompts"]

MODEL_TYPES = ("moment_detr", "umt")


class InputPrompts(nn.Module):
    """Vectors that a model's hooks put before the projected video and the projected text, and take away again.

    Moment-DETR: before both parts of [video; text]; encoder and decoder see them, the model's outputs do not. UMT:
    before the clips in the video encoder, and before the words that the query generator attends to; the audio, where
    there is one, gets none. Prompts have no position code.

    Args:
        model_type: `"moment_detr"` or `"umt"`.
        length: vectors a sequence (P).
        width: d.
        has_text: False for a model without queries.
        std: of the initial values.
    """

    def __init__(self, model_type: str, length: int, width: int, *, has_text: bool = True, std: float = 0.02) -> None:
        super().__init__()
        self.model_type, self.length, self.std = model_type, length, std
        self.video = nn.Parameter(torch.empty(length, width))
        self.text = nn.Parameter(torch.empty(length, width)) if has_text else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the vectors from a normal distribution."""
        for prompt in self.parameters():
            nn.init.normal_(prompt, std=self.std)

    def attach(self, model: nn.Module) -> None:
        """Registers the hooks. They are methods of this module, so that a deep copy of the model gets its own."""
        if self.model_type == "moment_detr":
            transformer = model.get_submodule("transformer")
            transformer.register_forward_pre_hook(self._before_transformer, with_kwargs=True)
            transformer.register_forward_hook(self._after_transformer, with_kwargs=True)
            return
        encoder = model.get_submodule("video_enc.encoder")
        layers = list(encoder) if isinstance(encoder, nn.ModuleList) else [encoder]
        layers[0].register_forward_pre_hook(self._before_clips, with_kwargs=True)
        for layer in layers[1:]:
            layer.register_forward_pre_hook(self._around_clips, with_kwargs=True)
        layers[-1].register_forward_hook(self._after_clips)
        if self.text is not None:
            model.get_submodule("query_gen.encoder").register_forward_pre_hook(self._before_words)

    def _before_transformer(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        states, kwargs = args[0], dict(kwargs)
        clips = _count_clips(kwargs)
        assert self.text is not None
        for name in ("attention_mask", "segment_ids", "position_embeddings"):
            video, text = kwargs[name][:, :clips], kwargs[name][:, clips:]
            fill = {"attention_mask": 1, "segment_ids": 0, "position_embeddings": 0}[name]
            before_text = 1 if name == "segment_ids" else fill
            kwargs[name] = torch.cat((self._filled(video, fill), video, self._filled(text, before_text), text), dim=1)
        video, text = states[:, :clips], states[:, clips:]
        states = torch.cat((_rows(self.video, states), video, _rows(self.text, states), text), dim=1)
        return (states, *args[1:]), kwargs

    def _after_transformer(
        self, module: nn.Module, args: tuple, kwargs: Mapping[str, Any], outputs: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        clips = _count_clips(kwargs) - self.length  # a hook after the module sees what the hook before it made
        decoded, memory = outputs
        recorded = kwargs.get("layer_outputs")
        if recorded is not None:  # the first one is the input, from before the prompts came in
            recorded[1:] = [self._without(states, clips) for states in recorded[1:]]
        return decoded, self._without(memory, clips)

    def _without(self, states: Tensor, clips: int) -> Tensor:
        """[video; text] of [prompts; video; prompts; text]."""
        first, second = self.length, 2 * self.length
        return torch.cat((states[:, first : first + clips], states[:, second + clips :]), dim=1)

    def _before_clips(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        states, positions = args
        prompts = _rows(self.video, states)
        return self._around_clips(module, (torch.cat((prompts, states), dim=1), positions), kwargs)

    def _around_clips(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        states, positions = args
        mask = kwargs.get("attention_mask")
        if mask is not None:
            mask = torch.cat((self._filled(mask, 1), mask), dim=1)
        positions = torch.cat((self._filled(positions, 0), positions), dim=1)
        return (states, positions), {**kwargs, "attention_mask": mask}

    def _after_clips(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output[:, self.length :]

    def _before_words(self, module: nn.Module, args: tuple) -> tuple:
        query, key, value, mask = args
        assert self.text is not None
        prompts = _rows(self.text, key)
        if mask is not None:
            mask = torch.cat((self._filled(mask, 1), mask), dim=1)
        return query, torch.cat((prompts, key), dim=1), torch.cat((prompts, value), dim=1), mask

    def _filled(self, like: Tensor, value: int) -> Tensor:
        """(B, P, ...) of one value, in the kind of `like` (B, L, ...)."""
        return like.new_full((len(like), self.length, *like.shape[2:]), value)


def add_prompts(model: nn.Module, *, length: int = 10) -> nn.Module:
    """Freezes a grounding model and puts learnable vectors before both of its input sequences.

    Source: READ-PVLA section 4.1, baseline "Prompt": learnable vectors are put before the input sequences, the rest
    is frozen. The vectors become `model.prompts` and part of its state dict (2 · length · d numbers).

    Args:
        model: a Moment-DETR or UMT, without an adapter.
        length: vectors a sequence.

    Returns:
        The model.

    Raises:
        ValueError: another model, a length below one, or a model that has prompts already.
    """
    config: Any = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type not in MODEL_TYPES or hasattr(model, "peft_config"):
        raise ValueError(
            f"prompts go before the inputs of a bare {' or '.join(MODEL_TYPES)}, not of {type(model).__name__} "
            f"({model_type!r}); for language models see peft's PromptTuningConfig and PrefixTuningConfig"
        )
    if length < 1:
        raise ValueError(f"length={length} must be positive")
    if hasattr(model, "prompts"):
        raise ValueError("the model has prompts already")
    has_text = model_type == "moment_detr" or config.text_feature_dim is not None
    model.requires_grad_(False)
    reference = next(model.parameters())
    prompts = InputPrompts(model_type, length, config.d_model, has_text=has_text)
    model.prompts = prompts.to(device=reference.device, dtype=reference.dtype)
    prompts.attach(model)
    return model


def _count_clips(kwargs: Mapping[str, Any]) -> int:
    """Tokens of the video in Moment-DETR's joint sequence."""
    return int(kwargs["segment_ids"][0].eq(0).sum())


def _rows(prompt: Tensor, states: Tensor) -> Tensor:
    return prompt.to(states.dtype).unsqueeze(0).expand(len(states), -1, -1)
