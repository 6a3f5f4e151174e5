"""VG-BART: BART whose encoder fuses a video into the text after one of its layers."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration, BartModel
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqModelOutput
from transformers.models.bart.modeling_bart import BartAttention, BartEncoder
from transformers.utils import can_return_tuple

from ..generation_cache import cache_argument
from ..output_capturing import OutputRecorder, capture_outputs
from ..vision_guidance import ReportedState, VisionGuidance
from ..vision_guided_generation import VisionGuidedGeneration
from .configuration_vg_bart import VGBartConfig

__all__ = ["VGBartEncoder", "VGBartForConditionalGeneration", "VGBartModel"]


class VGBartEncoder(VisionGuidance, BartEncoder):
    """BART's encoder with the fusion after layer `config.fusion_layer`.

    Its layers' outputs are the states BEFORE the fusion; the reported hidden states contain the fused one.

    Args:
        config: the configuration.
    """

    config_class = VGBartConfig
    _can_record_outputs = {
        "hidden_states": OutputRecorder(ReportedState, capture_initial_hidden_state=False),
        "attentions": BartAttention,
    }

    def __init__(self, config: VGBartConfig):
        super().__init__(config)
        self.reported_state = ReportedState()
        # The fusion's norm; the layers have norms of the same name, one level deeper.
        self.final_layer_norm = self.add_vision_guidance(cast(int, config.d_model))
        self.post_init()

    @capture_outputs
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
            **kwargs: what transformers passes to attention, and `output_hidden_states`, `output_attentions`.

        Raises:
            ValueError: not exactly one of `input_ids` and `inputs_embeds` is given, the text is longer than the
                position table, or the video is missing or has another shape.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        _check_length("transcript", inputs_embeds.shape[1], self.config)
        hidden_states = inputs_embeds + self.embed_positions(inputs_embeds[:, :, -1]).to(inputs_embeds.device)
        hidden_states = self._dropout(self.layernorm_embedding(hidden_states))

        video = None
        if self.config.fusion_layer is not None:
            video, frames = self.check_video(video_features, video_mask, inputs_embeds)
            if self.config.use_img_trans:
                video = self.img_transformer(video, attention_mask=frames)
            words = attention_mask.ne(0) if attention_mask is not None and attention_mask.dim() == 2 else None

        mask = create_bidirectional_mask(self.config, inputs_embeds, attention_mask)
        hidden_states = self.reported_state(hidden_states)
        for index, layer in enumerate(self.layers):
            if not (self.training and self.layerdrop and torch.rand([]).item() < self.layerdrop):
                hidden_states = layer(hidden_states, mask, **kwargs)
            if video is not None and index == self.config.fusion_layer:
                update = self.fuse(hidden_states, video, text_mask=words, video_mask=frames, dropout=self._dropout)
                hidden_states = self.final_layer_norm(hidden_states + self._dropout(update))
            hidden_states = self.reported_state(hidden_states)
        return BaseModelOutput(last_hidden_state=hidden_states)

    def _dropout(self, states: Tensor) -> Tensor:
        return nn.functional.dropout(states, p=self.dropout or 0.0, training=self.training)


def _check_length(name: str, tokens: int, config: BartConfig) -> None:
    if tokens > config.max_position_embeddings:
        raise ValueError(
            f"a {name} of {tokens} tokens, but the position table has {config.max_position_embeddings} rows: cut it "
            "(How2Collator's max_source_length, max_target_length), or raise max_position_embeddings"
        )


class VGBartModel(BartModel):
    """BART with a `VGBartEncoder`; the decoder is BART's.

    Args:
        config: the configuration.
    """

    config_class = VGBartConfig

    def __init__(self, config: VGBartConfig):
        super().__init__(config)
        self.encoder = VGBartEncoder(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        video_features: Tensor | None = None,
        video_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Seq2SeqModelOutput:
        """`BartModel.forward` with the two video inputs of `VGBartEncoder.forward`."""
        for target in (decoder_input_ids, decoder_inputs_embeds):
            if target is not None:
                _check_length("summary", target.shape[1], self.config)
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                video_features=video_features,
                video_mask=video_mask,
                return_dict=True,
                **kwargs,
            )
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            decoder_inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **cache_argument(cache, past_key_values),
            **kwargs,
        )


class VGBartForConditionalGeneration(VisionGuidedGeneration, BartForConditionalGeneration):
    """VG-BART with its language-modelling head (Yu et al., EMNLP 2021).

    A plain BART checkpoint can be loaded: `from_plain_checkpoint`, or `from_pretrained(folder, config=...)` with a
    `VGBartConfig`; only the new visual modules are initialised at random. The names in the state dict are BART's
    and the fusion's.

    Args:
        config: the configuration.

    Example:
        >>> config = VGBartConfig(vocab_size=20, d_model=8, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=8,
        ...     decoder_ffn_dim=8, encoder_attention_heads=2, decoder_attention_heads=2, visual_feature_dim=6)
        >>> model = VGBartForConditionalGeneration(config)
        >>> tokens, frames = torch.ones(1, 3, dtype=torch.long), torch.randn(1, 5, 6)
        >>> model(tokens, video_features=frames, labels=tokens).loss.shape
        torch.Size([])
    """

    config_class = VGBartConfig
    plain_config_class = BartConfig

    def __init__(self, config: VGBartConfig):
        super().__init__(config)
        self.model = VGBartModel(config)
        self.post_init()
