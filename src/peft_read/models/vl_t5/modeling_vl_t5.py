"""VL-T5: T5 whose encoder reads task prompts, text and visual tokens."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.t5.modeling_t5 import T5LayerNorm, T5Stack

from ..new_modules import reset_new_module
from ..output_capturing import capture_outputs
from ..visual_token_generation import VISUAL_TOKEN_MODULES, VisualTokenGeneration
from ..visual_tokens import JointOutput, VisualTokens
from .configuration_vl_t5 import VLT5Config

__all__ = ["VLT5Encoder", "VLT5ForConditionalGeneration"]


class VLT5Encoder(VisualTokens, T5Stack):
    """T5's encoder over prompts, text and visual tokens.

    The relative position bias is that of prompts and text; to, from and between visual tokens it is zero.

    Args:
        config: the configuration of the encoder.
    """

    config_class = VLT5Config

    def __init__(self, config: VLT5Config):
        super().__init__(config)
        self.add_visual_tokens(partial(T5LayerNorm, eps=config.layer_norm_epsilon))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """T5's initialisation for T5's modules, PyTorch's own for the visual embedding and the prompts."""
        if not reset_new_module(self, module, VISUAL_TOKEN_MODULES):
            super()._init_weights(module)

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
            ValueError: see `VisualTokens.join`.
        """
        joint = self.join(
            input_ids, attention_mask, inputs_embeds, visual_features, visual_boxes, visual_mask, image_ids
        )
        parts = (joint.text, joint.visual) if joint.prompts is None else (joint.prompts, joint.text, joint.visual)
        states = self.dropout(torch.cat(parts, dim=1))
        mask = create_bidirectional_mask(self.config, states, joint.mask)
        position_bias = self._position_bias(joint.leading, joint.visual.shape[1], states)
        for block in self.block:
            # by position, as T5 passes them, for gradient checkpointing
            states, position_bias, _ = block(
                states, mask, position_bias, None, None, None, segment_ids=joint.segment_ids, **kwargs
            )
        states = self.dropout(self.final_layer_norm(states))
        return JointOutput(last_hidden_state=states, attention_mask=joint.mask)

    def _position_bias(self, leading: int, visual: int, states: Tensor) -> Tensor:
        """(1, heads, L, L) of L = `leading` + `visual` tokens, zero outside the leading ones."""
        attention = cast(Any, self.block[0]).layer[0].SelfAttention
        bias: Tensor = attention.compute_bias(leading, leading, device=states.device)
        return nn.functional.pad(bias, (0, visual, 0, visual))


class VLT5ForConditionalGeneration(VisualTokenGeneration, T5ForConditionalGeneration):
    """VL-T5 with its language-modelling head (Cho et al., ICML 2021; Sung et al., CVPR 2022).

    A plain T5 or flan-T5 checkpoint can be loaded: `from_plain_checkpoint`, or `from_pretrained(folder,
    config=...)` with a `VLT5Config`; only the visual embedding and the prompts are initialised at random. The order of
    objects is embedded by the last `max_objects` rows of the token table, which the original adds:
    `resize_token_embeddings` does so.

    Args:
        config: the configuration.

    Example:
        >>> config = VLT5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2,
        ...     visual_feature_dim=6)
        >>> model = VLT5ForConditionalGeneration(config)
        >>> tokens = torch.ones(1, 3, dtype=torch.long)
        >>> model(tokens, visual_features=torch.randn(1, 5, 6), labels=tokens).logits.shape
        torch.Size([1, 3, 20])
    """

    config_class = VLT5Config
    plain_config_class = T5Config

    def __init__(self, config: VLT5Config):
        super().__init__(config)
        self.encoder = VLT5Encoder(cast(VLT5Config, self.encoder.config))
        self.post_init()
