"""The Prompt baseline for VG-BART and VG-T5: learnable vectors before the transcript and before the video."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .prompt import InputPrompts, rows_of

__all__ = ["SummariserPrompts"]

ENCODER_INPUTS = ("input_ids", "attention_mask", "inputs_embeds", "video_features", "video_mask")


class SummariserPrompts(InputPrompts):
    """Vectors that the encoder's hooks put before the word embeddings and the frames.

    The encoder sees them in its attention and in the fusion, and its outputs are without them, so that the decoder,
    its cross-attention mask and every mode of `generate()` are those of the bare model.

    The paper says only "before the input sequences"; the rest is our choice. The positions of words and frames do not
    change: BART's prompts come in after the norm of the embeddings, without a position; T5's have the
    relative distances of words before the first one; the visual transformer scales them as it does frames, without
    a position code.

    Args:
        model_type: `"vg_bart"` or `"vg_t5"`.
        length: vectors per sequence (P).
        width: of the word embeddings.
        video_width: of a frame.
        std: of the initial values.
    """

    text: nn.Parameter

    def __init__(self, model_type: str, length: int, width: int, *, video_width: int, std: float = 0.02) -> None:
        super().__init__(model_type, length, width, video_width=video_width, std=std)

    def attach(self, model: nn.Module) -> None:
        """Registers the hooks. They are methods of this module, so that a deep copy of the model gets its own."""
        encoder = model.get_submodule("model.encoder" if self.model_type == "vg_bart" else "encoder")
        encoder.register_forward_pre_hook(self._before_encoder, with_kwargs=True)
        encoder.register_forward_hook(self._after_encoder)
        if self.model_type == "vg_bart":
            positions = encoder.get_submodule("embed_positions")
            positions.register_forward_pre_hook(self._before_positions)
            positions.register_forward_hook(self._after_positions)
            encoder.get_submodule("layernorm_embedding").register_forward_hook(self._after_embeddings)
        if hasattr(encoder, "img_transformer"):
            frames = encoder.get_submodule("img_transformer")
            frames.register_forward_pre_hook(self._before_frame_positions, with_kwargs=True)
            frames.get_submodule("encoder").register_forward_pre_hook(self._before_frame_layers, with_kwargs=True)

    def _before_encoder(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        """Both sequences and both masks become P longer."""
        given = {**dict(zip(ENCODER_INPUTS, args, strict=False)), **kwargs}
        tokens = given.pop("input_ids", None)
        if tokens is not None:
            given["inputs_embeds"] = module.get_submodule("embed_tokens")(tokens)
        for name, prompt in (("inputs_embeds", self.text), ("video_features", self.video)):
            if given.get(name) is not None:
                given[name] = torch.cat((rows_of(prompt, given[name]), given[name]), dim=1)
        for name in ("attention_mask", "video_mask"):
            if given.get(name) is not None:
                given[name] = torch.cat((self._filled(given[name], 1), given[name]), dim=1)
        return (), given

    def _after_encoder(self, module: nn.Module, args: tuple, output: Any) -> Any:
        for name, value in output.items():
            output[name] = self._without_prompts(value)
        return output

    def _without_prompts(self, value: Any) -> Any:
        """States (B, P + S, d) and attention maps (B, heads, P + S, P + S) without the prompts."""
        if isinstance(value, tuple):
            return tuple(map(self._without_prompts, value))
        if not isinstance(value, Tensor):
            return value
        return value[:, self.length :] if value.dim() == 3 else value[..., self.length :, self.length :]

    def _before_positions(self, module: nn.Module, args: tuple) -> tuple:
        return (args[0][:, self.length :], *args[1:])

    def _after_positions(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return torch.cat((self._filled(output, 0), output), dim=1)

    def _after_embeddings(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return torch.cat((rows_of(self.text, output), output[:, self.length :]), dim=1)

    def _before_frame_positions(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        return (args[0][:, self.length :],), _with_mask(kwargs, lambda mask: mask[:, self.length :])

    def _before_frame_layers(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        states = args[0]
        prompts = rows_of(self.video, states) * math.sqrt(states.shape[-1])
        mask = _with_mask(kwargs, lambda mask: torch.cat((self._filled(mask, 1), mask), dim=1))
        return (torch.cat((prompts, states), dim=1),), mask


def _with_mask(kwargs: dict[str, Any], change: Any) -> dict[str, Any]:
    mask = kwargs.get("attention_mask")
    return kwargs if mask is None else {**kwargs, "attention_mask": change(mask)}
