"""The forward pass of VL-BART and VL-T5 for conditional generation, and loading their weights."""

from __future__ import annotations

import re
from typing import Any, cast

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.utils import can_return_tuple

from .generation_cache import cache_argument
from .visual_generation import VisualGeneration
from .visual_tokens import joint_mask

__all__ = ["VISUAL_TOKEN_MODULES", "VisualTokenGeneration"]

VISUAL_TOKEN_MODULES = frozenset({"visual_embedding", "task_prompts", "decoder_prompts"})
# The original's names of adapters and prompts, and a second name of the token table.
_ADDED = re.compile(r"adapter|hyper_?net|task_embed|prompt_modules|lora_|phm_rule|obj_order_embedding")


class VisualTokenGeneration(VisualGeneration):
    """A mixin for the two conditional-generation classes."""

    visual_modules = VISUAL_TOKEN_MODULES

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        visual_features: Tensor | None = None,
        visual_boxes: Tensor | None = None,
        visual_mask: Tensor | None = None,
        image_ids: Tensor | None = None,
        labels: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Any = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        """Predict the next tokens of an answer or a caption.

        Args:
            input_ids: the text (B, S).
            attention_mask: (B, S), 0 = padding; None: from the padding token.
            visual_features: (B, V, visual_feature_dim).
            visual_boxes: (B, V, 4): x1, y1, x2, y2 as fractions of the image; None: zeros, for grid cells and frames.
            visual_mask: (B, V), 0 = padding.
            image_ids: (B, V) which image of the example a token is of, from 0; None: there is one.
            labels: (B, T), -100 = no label.
            decoder_input_ids: (B, T); by default the labels, shifted.
            decoder_attention_mask: (B, T).
            encoder_outputs: what the encoder returned for the same inputs.
            cache: the cache of generation.
            inputs_embeds: (B, S, d) in place of `input_ids`.
            decoder_inputs_embeds: (B, T, d) in place of `decoder_input_ids`.
            use_cache: whether to return a cache.
            past_key_values: the name of `cache` before transformers 5.24.
            num_items_in_batch: see `sequence_cross_entropy`.
            **kwargs: `output_hidden_states`, `output_attentions`, ...

        Returns:
            `Seq2SeqLMOutput`; its encoder states are (B, P + S + V, d): prompts, text, visual tokens.

        Raises:
            ValueError: see `VisualTokens.join`; with `encoder_outputs` that hold no mask, `attention_mask` covers
                neither their states nor the text before the visual tokens.
        """
        model = cast(Any, self)
        decoder_input_ids = self._decoder_inputs(labels, decoder_input_ids, decoder_inputs_embeds)
        if encoder_outputs is None:
            encoder_outputs = model.get_encoder()(
                input_ids=input_ids,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                visual_features=visual_features,
                visual_boxes=visual_boxes,
                visual_mask=visual_mask,
                image_ids=image_ids,
                return_dict=True,
                **kwargs,
            )
        elif not isinstance(encoder_outputs, BaseModelOutput):
            encoder_outputs = BaseModelOutput(last_hidden_state=encoder_outputs[0])
        outputs = cast(Any, super()).forward(
            input_ids=input_ids,
            attention_mask=self._mask_of(encoder_outputs, attention_mask, visual_mask),
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

    def _mask_of(
        self, encoder_outputs: BaseModelOutput, attention_mask: Tensor | None, visual_mask: Tensor | None
    ) -> Tensor | None:
        """The mask of the encoder's states: part of the encoder's output, or rebuilt from the masks."""
        mask: Tensor | None = getattr(encoder_outputs, "attention_mask", None)
        if mask is not None or attention_mask is None:
            return mask
        states, prompts = cast(Tensor, encoder_outputs.last_hidden_state), cast(Any, self).config.prompt_length
        length = states.shape[1]
        if attention_mask.shape[1] == length:
            return attention_mask
        visual_tokens = length - prompts - attention_mask.shape[1]
        if visual_tokens < 1 or (visual_mask is not None and visual_mask.shape[1] != visual_tokens):
            raise ValueError(
                f"attention_mask {tuple(attention_mask.shape)} covers neither the {length} states of encoder_outputs "
                "nor the text before the visual tokens"
            )
        return joint_mask(attention_mask, visual_mask, visual_tokens, prompts=prompts)

    @staticmethod
    def _is_left_out(key: str) -> bool:
        return VisualGeneration._is_left_out(key) or _ADDED.search(key) is not None
