"""Configuration of VG-T5."""

from __future__ import annotations

from typing import Any

from transformers import T5Config

from ..vision_guidance_options import VisionGuidanceOptions

__all__ = ["VGT5Config"]


class VGT5Config(VisionGuidanceOptions, T5Config):
    """T5 whose encoder fuses a video into the text after its last layer and final norm; defaults are T5-base.

    Args:
        fusion_layer: whether to fuse. With `fusion_place="final"` 0 or None means a text-only model, and any other
            number means fusion, as in the original; it is not an index. With `fusion_place="layer"` it is the
            index of a block, negative from the end, and only None means a text-only model.
        fusion_place: `"final"`, the original: after the last block and the final norm, so that two norms follow each
            other. `"layer"`: after block `fusion_layer`, as in VG-BART, with one norm there and one at the end.
        cross_attn_type: form of the text-video attention, 0 to 5 (see `VisionGuidance`).
        use_forget_gate: let a sigmoid gate forget attended video features.
        use_img_trans: build the visual transformer.
        apply_img_trans: pass the frames through the visual transformer. False is the original, which builds and
            stores it and never calls it; True makes it part of the model.
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
        **kwargs: fields of `transformers.T5Config`.

    Raises:
        ValueError: a field is not allowed (see `VisionGuidanceOptions.set_vision_guidance`), `fusion_layer` is
            not a block where it must be one, or `apply_img_trans` is set without `use_img_trans`.

    Example:
        >>> VGT5Config(d_model=32, num_layers=2, visual_feature_dim=64, use_forget_gate=True).num_decoder_layers
        2
    """

    model_type = "vg_t5"

    def __init__(
        self,
        fusion_layer: int | None = 5,
        fusion_place: str = "final",
        cross_attn_type: int = 0,
        use_forget_gate: bool = False,
        use_img_trans: bool = False,
        apply_img_trans: bool = False,
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
        if apply_img_trans and not use_img_trans:
            raise ValueError("apply_img_trans=True needs use_img_trans=True, which builds the visual transformer")
        base = {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12, "decoder_start_token_id": 0}
        super().__init__(**{**base, **kwargs})
        if fusion_place not in ("final", "layer"):
            raise ValueError(f"fusion_place must be 'final' or 'layer', not {fusion_place!r}")
        if fusion_place == "layer" and fusion_layer is not None:
            if not -self.num_layers <= fusion_layer < self.num_layers:
                raise ValueError(
                    f"fusion_layer={fusion_layer} is not one of the {self.num_layers} encoder blocks; use -1 for the "
                    "last block, or None for a text-only model"
                )
            fusion_layer %= self.num_layers
        self.fusion_place = fusion_place
        self.apply_img_trans = apply_img_trans
        self.set_vision_guidance(
            text_dim=self.d_model,
            fusion_layer=fusion_layer,
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
