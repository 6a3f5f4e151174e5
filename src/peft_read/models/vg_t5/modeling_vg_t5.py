"""VG-T5: T5 whose encoder fuses a video into its final states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.t5.modeling_t5 import T5Stack
from transformers.utils import can_return_tuple

from ..new_modules import reset_new_module
from ..output_capturing import capture_outputs
from ..vision_guidance import VISUAL_MODULES, VisionGuidance
from ..vision_guided_generation import VisionGuidedGeneration
from .configuration_vg_t5 import VGT5Config

__all__ = ["VGT5Encoder", "VGT5ForConditionalGeneration"]


class VGT5Encoder(VisionGuidance, T5Stack):
    """T5's encoder with the fusion after its final norm, so that two norms follow each other (RMS, then LayerNorm), or
    after one of its blocks.

    Args:
        config: the configuration of the encoder.
    """

    config_class = VGT5Config

    def __init__(self, config: VGT5Config):
        super().__init__(config)
        self.custom_layer_norm = self.add_vision_guidance(config.d_model)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """T5's initialisation for T5's modules, PyTorch's own for the linear layers of the video guidance."""
        if not reset_new_module(self, module, VISUAL_MODULES):
            super()._init_weights(module)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        video_features: Tensor | None = None,
        video_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """Encode text (B, S) with a video.

        Args:
            input_ids: (B, S), or `inputs_embeds` (B, S, d) in their place.
            attention_mask: (B, S), 0 = padding.
            inputs_embeds: see `input_ids`.
            video_features: (B, F, visual_feature_dim).
            video_mask: (B, F), 0 = padding.
            **kwargs: `output_hidden_states`, `output_attentions`, ...

        Returns:
            The output of T5's encoder; the last state is the fused one, also in `hidden_states`.

        Raises:
            ValueError: the video is missing or has another shape.
        """
        if self.config.fusion_place == "layer" and self.config.fusion_layer is not None:
            if (input_ids is None) == (inputs_embeds is None):
                raise ValueError("pass exactly one of input_ids and inputs_embeds")
            embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            return self._forward_with_fusion_inside(embeds, attention_mask, video_features, video_mask, **kwargs)
        output = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        states, hidden_states = output.last_hidden_state, output.hidden_states
        if self.config.fusion_layer:
            states = self._fused(states, attention_mask, video_features, video_mask)
            if hidden_states and hidden_states[-1] is not None:
                hidden_states = (*hidden_states[:-1], states)
        # T5Stack returns a decoder's output class, which T5's model reads by position if it is passed to it.
        return BaseModelOutput(last_hidden_state=states, hidden_states=hidden_states, attentions=output.attentions)

    def _forward_with_fusion_inside(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        video_features: Tensor | None,
        video_mask: Tensor | None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """T5's encoder with the fusion after block `fusion_layer`, before the next block or the final norm."""
        fused: list[Tensor] = []

        def fuse(states: Tensor) -> Tensor:
            fused.append(self._fused(states, attention_mask, video_features, video_mask))
            return fused[0]

        output = self._run_blocks(inputs_embeds, attention_mask, fuse, return_dict=True, **kwargs)
        # The recorded state is the block's output; the reported one is the fused state.
        states, place = output.hidden_states, self.config.fusion_layer + 1
        if states and place < len(states) - 1 and states[place] is not None:
            output.hidden_states = (*states[:place], fused[0], *states[place + 1 :])
        return output

    @capture_outputs
    def _run_blocks(
        self, inputs_embeds: Tensor, attention_mask: Tensor | None, fuse: Callable[[Tensor], Tensor], **kwargs: Any
    ) -> BaseModelOutput:
        mask = create_bidirectional_mask(self.config, inputs_embeds, attention_mask)
        states, position_bias = self.dropout(inputs_embeds), None
        for index, block in enumerate(self.block):
            # by position, as T5 passes them, for gradient checkpointing
            states, position_bias, _ = block(states, mask, position_bias, None, None, None, **kwargs)
            if index == self.config.fusion_layer:
                states = fuse(states)
        return BaseModelOutput(last_hidden_state=self.dropout(self.final_layer_norm(states)))

    def _fused(
        self, states: Tensor, attention_mask: Tensor | None, video_features: Tensor | None, video_mask: Tensor | None
    ) -> Tensor:
        video, frames = self.check_video(video_features, video_mask, states)
        if self.config.apply_img_trans:
            video = self.img_transformer(video, attention_mask=frames)
        words = attention_mask.ne(0) if attention_mask is not None and attention_mask.dim() == 2 else None
        update = self.fuse(states, video, text_mask=words, video_mask=frames, dropout=self.dropout)
        return self.custom_layer_norm(states + self.dropout(update))


class VGT5ForConditionalGeneration(VisionGuidedGeneration, T5ForConditionalGeneration):
    """VG-T5 with its language-modelling head (Yu et al., EMNLP 2021).

    A plain T5 or flan-T5 checkpoint can be loaded: `from_plain_checkpoint`, or `from_pretrained(folder,
    config=...)` with a `VGT5Config`; only the new visual modules are initialised at random. The names in the state
    dict are T5's and the fusion's.

    Args:
        config: the configuration.

    Example:
        >>> config = VGT5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2,
        ...     visual_feature_dim=6)
        >>> model = VGT5ForConditionalGeneration(config)
        >>> tokens, frames = torch.ones(1, 3, dtype=torch.long), torch.randn(1, 5, 6)
        >>> model(tokens, video_features=frames, labels=tokens).loss.shape
        torch.Size([])
    """

    config_class = VGT5Config
    plain_config_class = T5Config

    def __init__(self, config: VGT5Config):
        super().__init__(config)
        self.encoder = VGT5Encoder(cast(VGT5Config, self.encoder.config))
        self.post_init()
