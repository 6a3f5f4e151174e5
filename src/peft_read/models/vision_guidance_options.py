"""The configuration fields that turn a text encoder-decoder into a video-guided one, shared by VG-BART and VG-T5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .text_configuration import FIELDS_OF_THE_CLASS, FromTextConfig

__all__ = ["VisionGuidanceOptions"]

# Settings of the originals that describe nothing here: sine positions are computed for the length at hand.
_ORIGINAL_OPTIONS_WITHOUT_A_FIELD = frozenset({"img_trans_max_len"})


class VisionGuidanceOptions(FromTextConfig):
    """Fields added to a text configuration; a mixin for `VGBartConfig` and `VGT5Config`.

    The names and the default values are those of the original implementation (Yu et al., "Vision Guided Generative
    Pre-trained Language Models for Multimodal Abstractive Summarization", EMNLP 2021). Fields marked with (*) do not
    exist there; their defaults reproduce its behaviour.
    """

    def set_vision_guidance(
        self,
        *,
        text_dim: int,
        fusion_layer: int | None,
        cross_attn_type: int,
        use_forget_gate: bool,
        use_img_trans: bool,
        dim_common: int,
        n_attn_heads: int,
        visual_feature_dim: int,
        img_trans_layers: int,
        img_trans_heads: int,
        img_trans_ffn_dim: int,
        img_trans_dropout: float,
        softmax_dim: str,
        mask_fusion: bool,
    ) -> None:
        """Check the fields against each other and store them.

        Args:
            text_dim: width of the text encoder.
            fusion_layer: see the configuration classes.
            cross_attn_type: 0 to 5, the form of the text-video attention.
            use_forget_gate: whether a sigmoid gate may forget attended video features.
            use_img_trans: whether the visual transformer exists.
            dim_common: width shared by text and video in the types 3 to 5.
            n_attn_heads: heads of the attention in the types 4 and 5.
            visual_feature_dim: width of one frame's features.
            img_trans_layers: layers of the visual transformer.
            img_trans_heads: its attention heads.
            img_trans_ffn_dim: width of its feed-forward blocks.
            img_trans_dropout: its dropout (*).
            softmax_dim: `"text"` or `"video"` (*), the axis that the attention of the types 0 to 3 is normalised over.
            mask_fusion: whether padding is kept out of the fusion (*).

        Raises:
            ValueError: a value is not allowed, or two values contradict each other.
        """
        if isinstance(cross_attn_type, bool) or cross_attn_type not in range(6):
            raise ValueError(f"cross_attn_type must be an integer from 0 to 5, not {cross_attn_type!r}")
        if cross_attn_type == 5 and dim_common != text_dim:
            raise ValueError(
                f"cross_attn_type=5 adds the attended video features to the text states, so dim_common ({dim_common}) "
                f"must equal the width of the text encoder ({text_dim})"
            )
        if cross_attn_type in (4, 5) and dim_common % n_attn_heads:
            raise ValueError(f"dim_common ({dim_common}) must be a multiple of n_attn_heads ({n_attn_heads})")
        if use_img_trans and visual_feature_dim % img_trans_heads:
            raise ValueError(
                f"visual_feature_dim ({visual_feature_dim}) must be a multiple of img_trans_heads ({img_trans_heads})"
            )
        if softmax_dim not in ("text", "video"):
            raise ValueError(f"softmax_dim must be 'text' or 'video', not {softmax_dim!r}")
        self.fusion_layer = fusion_layer
        self.cross_attn_type = cross_attn_type
        self.use_forget_gate = use_forget_gate
        self.use_img_trans = use_img_trans
        self.dim_common = dim_common
        self.n_attn_heads = n_attn_heads
        self.visual_feature_dim = visual_feature_dim
        self.img_trans_layers = img_trans_layers
        self.img_trans_heads = img_trans_heads
        self.img_trans_ffn_dim = img_trans_ffn_dim
        self.img_trans_dropout = img_trans_dropout
        self.softmax_dim = softmax_dim
        self.mask_fusion = mask_fusion

    @classmethod
    def from_original_options(cls, options: Mapping[str, Mapping[str, Any]]) -> Any:
        """Build the configuration from the options of the original implementation.

        Args:
            options: `{"config": ..., "fusion": ..., "visual": ...}`: the text model's configuration, the fusion
                arguments, and the sizes that the original hard-codes. `"visual"` may be left out.

        Raises:
            ValueError: a group of options has a name that this project does not know.
        """
        unknown = set(options) - {"config", "fusion", "visual"}
        if unknown:
            raise ValueError(f"unknown groups of original options {sorted(unknown)}; known: config, fusion, visual")
        fields: dict[str, Any] = {}
        for group in options.values():
            fields.update({name: value for name, value in group.items() if name not in FIELDS_OF_THE_CLASS})
        return cls(**{name: value for name, value in fields.items() if name not in _ORIGINAL_OPTIONS_WITHOUT_A_FIELD})
