"""VL-BART: BART whose encoder reads task prompts, text and visual tokens."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration, BartModel, DynamicCache, EncoderDecoderCache
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import Seq2SeqModelOutput
from transformers.models.bart.modeling_bart import BartEncoder
from transformers.utils import can_return_tuple

from ..generation_cache import NAME, cache_argument
from ..output_capturing import capture_outputs
from ..visual_token_generation import VisualTokenGeneration
from ..visual_tokens import VISUAL_INPUTS, JointOutput, VisualTokens, prompts_of
from .configuration_vl_bart import VLBartConfig

__all__ = ["VLBartEncoder", "VLBartForConditionalGeneration", "VLBartModel"]


class VLBartEncoder(VisualTokens, BartEncoder):
    """BART's encoder over prompts, text and visual tokens.

    Text has positions and the embedding norm, prompts the norm alone, visual tokens neither (`share_embedding_norm`
    gives them the norm).

    Args:
        config: the configuration.
    """

    config_class = VLBartConfig

    def __init__(self, config: VLBartConfig):
        super().__init__(config)
        self.add_visual_tokens()
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        visual_features: Tensor | None = None,
        visual_boxes: Tensor | None = None,
        visual_mask: Tensor | None = None,
        image_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> JointOutput:
        """Encode text (B, S) and visual tokens (B, V), see `VisualTokens.join`.

        Returns:
            The states (B, P + S + V, d) of prompts, text and visual tokens, and their mask.

        Raises:
            ValueError: see `VisualTokens.join`; or the text is longer than the position table.
        """
        joint = self.join(
            input_ids, attention_mask, inputs_embeds, visual_features, visual_boxes, visual_mask, image_ids
        )
        tokens = joint.text.shape[1]
        if tokens > self.max_source_positions:
            raise ValueError(
                f"a text of {tokens} tokens, but the position table has {self.max_source_positions} rows: cut it, or "
                "raise max_position_embeddings"
            )
        states = joint.text + self.embed_positions(joint.text[:, :, -1]).to(joint.text.device)
        if joint.prompts is not None:
            states = torch.cat((joint.prompts, states), dim=1)
        if self.config.share_embedding_norm:
            states = self.layernorm_embedding(torch.cat((states, joint.visual), dim=1))
        else:
            states = torch.cat((self.layernorm_embedding(states), joint.visual), dim=1)
        states = nn.functional.dropout(states, p=self.dropout or 0.0, training=self.training)
        mask = create_bidirectional_mask(self.config, states, joint.mask)
        for layer in self.layers:
            if not (self.training and self.layerdrop and torch.rand([]).item() < self.layerdrop):
                states = layer(states, mask, segment_ids=joint.segment_ids, **kwargs)
        return JointOutput(last_hidden_state=states, attention_mask=joint.mask)


class VLBartModel(BartModel):
    """BART with a `VLBartEncoder`, without the language-modelling head.

    With `decoder_prompt_length` P, the decoder runs once over P learnable vectors, without the encoder's states; the
    tokens follow at the positions from P on and attend to what its self-attention made of these vectors.

    Args:
        config: the configuration.
    """

    config_class = VLBartConfig

    def __init__(self, config: VLBartConfig):
        super().__init__(config)
        self.encoder = VLBartEncoder(config)
        if config.decoder_prompt_length:
            self.decoder_prompts = prompts_of(config, config.decoder_prompt_length)
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
        decoder_inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Seq2SeqModelOutput:
        """`BartModel.forward` with the visual inputs of `VLBartEncoder.forward`.

        Raises:
            ValueError: prompts of the decoder with a cache of fixed size, or with gradient checkpointing.
        """
        cache = cache_argument(cache, past_key_values)[NAME]
        given = cache
        if self.config.decoder_prompt_length:
            tokens = decoder_inputs_embeds if decoder_input_ids is None else decoder_input_ids
            cache = self._after_prompts(cache, len(cast(Tensor, input_ids if tokens is None else tokens)))
            if decoder_attention_mask is not None:
                decoder_attention_mask = nn.functional.pad(
                    decoder_attention_mask, (self.config.decoder_prompt_length, 0), value=1
                )
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **kwargs
            )
            attention_mask = encoder_outputs.attention_mask
        outputs = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            decoder_inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **cache_argument(cache, None),
            **{name: value for name, value in kwargs.items() if name not in VISUAL_INPUTS},
        )
        if cache is not given and use_cache is False:
            outputs[NAME] = None
        return outputs

    def _after_prompts(self, cache: Any, batch: int) -> Any:
        """A cache that holds the decoder's prompts."""
        if self.training and getattr(self.decoder, "gradient_checkpointing", False):
            raise ValueError(
                "decoder_prompt_length: gradient checkpointing drops the cache that holds the decoder's prompts; "
                "switch it off for the decoder"
            )
        if cache is None:
            cache = EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))
        if cache.get_seq_length():
            return cache
        if cache.is_compileable:
            raise ValueError("decoder_prompt_length: the decoder's prompts need a dynamic cache, not a static one")
        prompts = self.decoder_prompts(self.shared.weight.new_empty(batch, 0, 0))
        self.decoder(inputs_embeds=prompts, use_cache=True, **cache_argument(cache, None))
        return cache


class VLBartForConditionalGeneration(VisualTokenGeneration, BartForConditionalGeneration):
    """VL-BART with its language-modelling head (Cho et al., ICML 2021; Sung et al., CVPR 2022).

    A plain BART checkpoint can be loaded: `from_plain_checkpoint`, or `from_pretrained(folder, config=...)` with a
    `VLBartConfig`; only the visual embedding and the prompts are initialised at random. The order of objects is
    embedded by the last `max_objects` rows of the token table, which the original adds: `resize_token_embeddings`
    does so.

    Args:
        config: the configuration.

    Example:
        >>> config = VLBartConfig(vocab_size=20, d_model=8, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=8,
        ...     decoder_ffn_dim=8, encoder_attention_heads=2, decoder_attention_heads=2, visual_feature_dim=6)
        >>> model = VLBartForConditionalGeneration(config)
        >>> tokens = torch.ones(1, 3, dtype=torch.long)
        >>> model(tokens, visual_features=torch.randn(1, 5, 6), labels=tokens).logits.shape
        torch.Size([1, 3, 20])
    """

    config_class = VLBartConfig
    plain_config_class = BartConfig

    def __init__(self, config: VLBartConfig):
        super().__init__(config)
        self.model = VLBartModel(config)
        self.post_init()
