"""The forward pass of VG-BART and VG-T5 for conditional generation."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor
from transformers.modeling_outputs import Seq2SeqLMOutput
from transformers.utils import can_return_tuple

from .generation_cache import cache_argument
from .visual_generation import VisualGeneration

__all__ = ["VisionGuidedGeneration"]


class VisionGuidedGeneration(VisualGeneration):
    """A mixin for the two conditional-generation classes."""

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
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        video_features: Tensor | None = None,
        video_mask: Tensor | None = None,
        past_key_values: Any = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        """Predict the next tokens of a summary.

        Args:
            input_ids: the transcript (B, S).
            attention_mask: (B, S), 0 = padding.
            decoder_input_ids: (B, T); by default the labels, shifted.
            decoder_attention_mask: (B, T).
            encoder_outputs: what the encoder returned for the same inputs.
            cache: the cache of generation.
            inputs_embeds: (B, S, d) in place of `input_ids`.
            decoder_inputs_embeds: (B, T, d) in place of `decoder_input_ids`.
            labels: (B, T), -100 = no label.
            use_cache: whether to return a cache.
            video_features: the frames (B, F, visual_feature_dim).
            video_mask: (B, F), 0 = padding.
            past_key_values: the name of `cache` before transformers 5.24.
            num_items_in_batch: see `sequence_cross_entropy`.
            **kwargs: `output_hidden_states`, `output_attentions`, ...

        Returns:
            `Seq2SeqLMOutput`. Its `encoder_hidden_states` hold the fused state at `fusion_layer + 1`, or at the end
            where VG-T5 fuses there; the others are the blocks' outputs.
        """
        decoder_input_ids = self._decoder_inputs(labels, decoder_input_ids, decoder_inputs_embeds)
        if encoder_outputs is None:
            encoder_outputs = cast(Any, self).get_encoder()(
                input_ids=input_ids,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                video_features=video_features,
                video_mask=video_mask,
                return_dict=True,
                **kwargs,
            )
        outputs = cast(Any, super()).forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            decoder_inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache if labels is None else False,
            return_dict=True,
            **cache_argument(cache, past_key_values),
            **kwargs,
        )
        return self._with_loss(outputs, labels, num_items_in_batch)
