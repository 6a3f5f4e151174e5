"""VL-BART: BART whose encoder reads task prompts, text and visual tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration, BartModel
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.bart.modeling_bart import BartEncoder
from transformers.utils.output_capturing import capture_outputs

from ..visual_token_generation import VisualTokenGeneration
from ..visual_tokens import JointOutput, VisualTokens
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

    Args:
        config: the configuration.
    """

    config_class = VLBartConfig

    def __init__(self, config: VLBartConfig):
        super().__init__(config)
        self.encoder = VLBartEncoder(config)
        self.post_init()


class VLBartForConditionalGeneration(VisualTokenGeneration, BartForConditionalGeneration):
    """VL-BART with its language-modelling head (Cho et al., ICML 2021; Sung et al., CVPR 2022).

    A plain BART checkpoint is a valid start: `from_plain_checkpoint`, or `from_pretrained(folder, config=...)` with a
    `VLBartConfig`; only the visual embedding and the prompts are drawn at random. The order of objects is embedded by
    the last `max_objects` rows of the token table, which the original adds: `resize_token_embeddings` does so.

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
