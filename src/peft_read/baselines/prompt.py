"""The Prompt baseline: learnable vectors before both input sequences of a frozen video-language model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["InputPrompts", "rows_of"]


class InputPrompts(nn.Module):
    """Vectors that a model's hooks put before the projected video and the projected text, and take away again.

    Moment-DETR: before both parts of [video; text]; encoder and decoder see them, the model's outputs do not. UMT:
    before the clips in the video encoder, and before the words that the query generator attends to; the audio, where
    there is one, gets none. Prompts have no position code.

    Args:
        model_type: `"moment_detr"` or `"umt"`.
        length: vectors per sequence (P).
        width: d.
        has_text: False for a model without queries.
        video_width: of the vectors before the video, where it is not d.
        std: of the initial values.
    """

    def __init__(
        self,
        model_type: str,
        length: int,
        width: int,
        *,
        has_text: bool = True,
        video_width: int | None = None,
        std: float = 0.02,
    ) -> None:
        super().__init__()
        self.model_type, self.length, self.std = model_type, length, std
        self.video = nn.Parameter(torch.empty(length, width if video_width is None else video_width))
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
        states = torch.cat((rows_of(self.video, states), video, rows_of(self.text, states), text), dim=1)
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
        prompts = rows_of(self.video, states)
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
        prompts = rows_of(self.text, key)
        if mask is not None:
            mask = torch.cat((self._filled(mask, 1), mask), dim=1)
        return query, torch.cat((prompts, key), dim=1), torch.cat((prompts, value), dim=1), mask

    def _filled(self, like: Tensor, value: int) -> Tensor:
        """(B, P, ...) of one value, in the kind of `like` (B, L, ...)."""
        return like.new_full((len(like), self.length, *like.shape[2:]), value)


def _count_clips(kwargs: Mapping[str, Any]) -> int:
    """Tokens of the video in Moment-DETR's joint sequence."""
    return int(kwargs["segment_ids"][0].eq(0).sum())


def rows_of(prompt: Tensor, states: Tensor) -> Tensor:
    """The vectors (P, d) once for every example of the states (B, L, d)."""
    return prompt.to(states.dtype).unsqueeze(0).expand(len(states), -1, -1)
