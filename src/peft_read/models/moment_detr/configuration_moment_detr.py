"""Configuration of Moment-DETR."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

__all__ = ["MomentDetrConfig"]

# From the option names of the original implementation to the fields of this class.
_ORIGINAL_NAMES = {
    "hidden_dim": "d_model",
    "nheads": "num_attention_heads",
    "dim_feedforward": "ffn_dim",
    "enc_layers": "encoder_layers",
    "dec_layers": "decoder_layers",
    "dropout": "dropout",
    "input_dropout": "input_dropout",
    "pre_norm": "pre_norm",
    "t_feat_dim": "text_feature_dim",
    "v_feat_dim": "video_feature_dim",
    "max_q_l": "max_text_positions",
    "use_txt_pos": "use_text_positions",
    "n_input_proj": "num_input_projections",
    "num_queries": "num_queries",
    "span_loss_type": "span_loss_type",
    "aux_loss": "auxiliary_loss",
    "contrastive_align_loss": "contrastive_align",
    "contrastive_hdim": "contrastive_dim",
    "set_cost_span": "span_cost",
    "set_cost_giou": "giou_cost",
    "set_cost_class": "class_cost",
    "span_loss_coef": "span_loss_weight",
    "giou_loss_coef": "giou_loss_weight",
    "label_loss_coef": "label_loss_weight",
    "lw_saliency": "saliency_loss_weight",
    "contrastive_align_loss_coef": "contrastive_loss_weight",
    "eos_coef": "background_weight",
    "temperature": "contrastive_temperature",
    "saliency_margin": "saliency_margin",
}


class MomentDetrConfig(PretrainedConfig):
    """Moment-DETR (Lei et al., "QVHighlights", NeurIPS 2021); the defaults are the published model's.

    Args:
        video_feature_dim: width of a clip's features (SlowFast 2304, CLIP 512, two temporal endpoints).
        text_feature_dim: width of a query token's features.
        d_model: width of the transformer.
        num_attention_heads: heads of every attention.
        ffn_dim: width of the feed-forward blocks.
        encoder_layers: layers of the encoder over [video; text].
        decoder_layers: layers of the decoder over the moment queries.
        num_queries: moment queries, the most moments a video can get.
        dropout: dropout inside the transformer.
        input_dropout: dropout before the linear layer of every input projection.
        num_input_projections: blocks of LayerNorm, dropout and linear layer that map the features to `d_model`, 1 to
            3; ReLU between them.
        pre_norm: normalise before each block instead of after it, and once more after the encoder.
        use_text_positions: give the text the original's position code, which contains the text features themselves.
            By default words have no position.
        max_text_positions: rows of the table of text positions, which exists in either case.
        span_loss_type: `"l1"`: spans are (centre, width) by regression; `"ce"`: first and last clip by classification.
        num_span_bins: clips that `"ce"` can name. The original always has 75.
        auxiliary_loss: losses after every decoder layer, not only the last.
        contrastive_align: add projections and the loss that aligns matched queries with the text.
        contrastive_dim: width of those projections.
        mask_contrastive_text: keep text padding out of that loss. False is the original.
        span_cost: weight of the span distance in the matching.
        giou_cost: weight of the generalised IoU in the matching.
        class_cost: weight of the foreground probability in the matching.
        span_loss_weight: weight of `loss_span`.
        giou_loss_weight: weight of `loss_giou`.
        label_loss_weight: weight of `loss_label`.
        saliency_loss_weight: weight of `loss_saliency`.
        contrastive_loss_weight: weight of `loss_contrastive_align` (0.02 in the published option file).
        background_weight: weight of the background class in `loss_label`.
        contrastive_temperature: divides the logits of the contrastive loss.
        saliency_margin: by which the scores of salient clips should exceed others.
        **kwargs: fields of `transformers.PretrainedConfig`.

    Raises:
        ValueError: a field is not allowed.

    Example:
        >>> MomentDetrConfig(d_model=128, num_attention_heads=4, video_feature_dim=162).hidden_size
        128
    """

    model_type = "moment_detr"
    attribute_map = {"hidden_size": "d_model", "num_hidden_layers": "encoder_layers"}
    # A Trainer that collects predictions can concatenate only what is one tensor per batch.
    keys_to_ignore_at_inference = [
        "loss",
        "loss_dict",
        "auxiliary_outputs",
        "encoder_hidden_states",
        "proj_queries",
        "proj_txt_mem",
        "proj_vid_mem",
    ]

    def __init__(
        self,
        video_feature_dim: int = 2818,
        text_feature_dim: int = 512,
        d_model: int = 256,
        num_attention_heads: int = 8,
        ffn_dim: int = 1024,
        encoder_layers: int = 2,
        decoder_layers: int = 2,
        num_queries: int = 10,
        dropout: float = 0.1,
        input_dropout: float = 0.5,
        num_input_projections: int = 2,
        pre_norm: bool = False,
        use_text_positions: bool = False,
        max_text_positions: int = 32,
        span_loss_type: str = "l1",
        num_span_bins: int = 75,
        auxiliary_loss: bool = True,
        contrastive_align: bool = False,
        contrastive_dim: int = 64,
        mask_contrastive_text: bool = False,
        span_cost: float = 10.0,
        giou_cost: float = 1.0,
        class_cost: float = 4.0,
        span_loss_weight: float = 10.0,
        giou_loss_weight: float = 1.0,
        label_loss_weight: float = 4.0,
        saliency_loss_weight: float = 1.0,
        contrastive_loss_weight: float = 0.0,
        background_weight: float = 0.1,
        contrastive_temperature: float = 0.07,
        saliency_margin: float = 0.2,
        **kwargs: Any,
    ):
        if span_loss_type not in ("l1", "ce"):
            raise ValueError(f"span_loss_type must be 'l1' or 'ce', not {span_loss_type!r}")
        if num_input_projections not in (1, 2, 3):
            raise ValueError(f"num_input_projections must be 1, 2 or 3, not {num_input_projections!r}")
        if d_model % num_attention_heads or d_model % 2:
            raise ValueError(
                f"d_model ({d_model}) must be even and a multiple of num_attention_heads ({num_attention_heads})"
            )
        self.video_feature_dim = video_feature_dim
        self.text_feature_dim = text_feature_dim
        self.d_model = d_model
        self.num_attention_heads = num_attention_heads
        self.ffn_dim = ffn_dim
        self.encoder_layers = encoder_layers
        self.decoder_layers = decoder_layers
        self.num_queries = num_queries
        self.dropout = dropout
        self.input_dropout = input_dropout
        self.num_input_projections = num_input_projections
        self.pre_norm = pre_norm
        self.use_text_positions = use_text_positions
        self.max_text_positions = max_text_positions
        self.span_loss_type = span_loss_type
        self.num_span_bins = num_span_bins
        self.auxiliary_loss = auxiliary_loss
        self.contrastive_align = contrastive_align
        self.contrastive_dim = contrastive_dim
        self.mask_contrastive_text = mask_contrastive_text
        self.span_cost = span_cost
        self.giou_cost = giou_cost
        self.class_cost = class_cost
        self.span_loss_weight = span_loss_weight
        self.giou_loss_weight = giou_loss_weight
        self.label_loss_weight = label_loss_weight
        self.saliency_loss_weight = saliency_loss_weight
        self.contrastive_loss_weight = contrastive_loss_weight
        self.background_weight = background_weight
        self.contrastive_temperature = contrastive_temperature
        self.saliency_margin = saliency_margin
        super().__init__(**kwargs)

    @classmethod
    def from_original_options(cls, options: Mapping[str, Any]) -> MomentDetrConfig:
        """Build the configuration from the option names of the original implementation.

        Args:
            options: the original's options; those about training, data and devices are ignored, and so is
                `max_v_l`, which the original never passes to the model.

        Raises:
            ValueError: the options ask for another position code than the sine code.
        """
        if options.get("position_embedding", "sine") not in ("sine", "v2"):
            raise ValueError(
                f"position_embedding={options['position_embedding']!r}: only 'sine' exists, in the original too"
            )
        fields = {ours: options[theirs] for theirs, ours in _ORIGINAL_NAMES.items() if theirs in options}
        if "v_feat_dim" in options and "use_tef" not in options and "tef" in options.get("ctx_mode", ""):
            fields["video_feature_dim"] += 2  # the original writes opt.json before it adds the endpoints' channels
        return cls(**fields)
