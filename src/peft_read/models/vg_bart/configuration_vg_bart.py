"""Configuration of VG-BART."""

from __future__ import annotations

from typing import Any, cast

from transformers import BartConfig

from ..vision_guidance_options import VisionGuidanceOptions

__all__ = ["VGBartConfig"]


class VGBartConfig(VisionGuidanceOptions, BartConfig):
    """BART whose encoder fuses a video into the text after one of its layers; defaults are BART-base.

    Args:
        fusion_layer: index of the encoder layer after which the video is fused, negative from the end, None for a
            text-only model (the modules exist, unused).
        cross_attn_type: form of the text-video attention, 0 to 5 (see `VisionGuidance`).
        use_forget_gate: let a sigmoid gate forget attended video features.
        use_img_trans: pass the frames through the visual transformer first.
        dim_common: common width of text and video in the types 3 to 5.
        n_attn_heads: heads of the attention in the types 4 and 5.
        visual_feature_dim: width of one frame's features.
        img_trans_layers: layers of the visual transformer.
        img_trans_heads: its attention heads.
        img_trans_ffn_dim: width of its feed-forward blocks.
        img_trans_dropout: its dropout.
        softmax_dim: axis of the softmax in the types 0 to 3. `"text"` is the original; `"video"` is what attention
            usually means.
        mask_fusion: keep text padding and padded frames out of the fusion. False is the original, in which results
            depend on how far a batch is padded.
        **kwargs: fields of `transformers.BartConfig`.

    Raises:
        ValueError: a field is not allowed (see `VisionGuidanceOptions.set_vision_guidance`), or `fusion_layer` is
            not a layer of the encoder.

    Example:
        >>> config = VGBartConfig(encoder_layers=2, decoder_layers=2, visual_feature_dim=64, use_forget_gate=True)
        >>> config.fusion_layer
        1
    """

    model_type = "vg_bart"

    def __init__(
        self,
        fusion_layer: int | None = -1,
        cross_attn_type: int = 0,
        use_forget_gate: bool = False,
        use_img_trans: bool = False,
        dim_common: int = 256,
        n_attn_heads: int = 1,
        visual_feature_dim: int = 2048,
        img_trans_layers: int = 4,
        img_trans_heads: int = 8,
        img_trans_ffn_dim: int = 2048,
        img_trans_dropout: float = 0.1,
        softmax_dim: str = "text",
        mask_fusion: bool = False,
        **kwargs: Any,
    ):
        base = {
            "d_model": 768,
            **{f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in _BASE_STACK.items()},
            "attention_dropout": 0.1,
            "activation_dropout": 0.1,
        }
        super().__init__(**{**base, **kwargs})
        layers = cast(int, self.encoder_layers)
        if fusion_layer is not None and not -layers <= fusion_layer < layers:
            raise ValueError(
                f"fusion_layer={fusion_layer} is not one of the {layers} encoder layers, so no video would be fused; "
                "use -1 for the last layer, or None for a text-only model"
            )
        self.set_vision_guidance(
            text_dim=cast(int, self.d_model),
            fusion_layer=None if fusion_layer is None else fusion_layer % layers,
            cross_attn_type=cross_attn_type,
            use_forget_gate=use_forget_gate,
            use_img_trans=use_img_trans,
            dim_common=dim_common,
            n_attn_heads=n_attn_heads,
            visual_feature_dim=visual_feature_dim,
            img_trans_layers=img_trans_layers,
            img_trans_heads=img_trans_heads,
            img_trans_ffn_dim=img_trans_ffn_dim,
            img_trans_dropout=img_trans_dropout,
            softmax_dim=softmax_dim,
            mask_fusion=mask_fusion,
        )


_BASE_STACK = {"layers": 6, "ffn_dim": 3072, "attention_heads": 12}
