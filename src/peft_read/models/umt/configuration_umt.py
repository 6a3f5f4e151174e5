"""Configuration of UMT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PretrainedConfig

__all__ = ["UMTConfig"]


class UMTConfig(PretrainedConfig):
    """UMT (Liu et al., CVPR 2022); the defaults are UMT-S as used on TVSum. UMT-B has three decoder layers.

    Args:
        video_feature_dim: width of a clip's video features.
        audio_feature_dim: width of a clip's audio (or optical flow) features. None: no audio and no cross-modal
            encoder, video only.
        text_feature_dim: width of a query token's features. None: no text, the clips are the decoder's queries
            (YouTube Highlights).
        d_model: width of the transformer.
        num_attention_heads: heads of every attention.
        ffn_ratio: width of the feed-forward blocks over `d_model`.
        encoder_layers: layers of the video and of the audio encoder.
        cross_layers: layers of the bottleneck transformer between video and audio.
        decoder_layers: layers of the query decoder.
        bottleneck_tokens: tokens that video and audio exchange information through.
        fusion_type: how video and audio are joined: `"sum"`, `"mean"` or `"concat"`.
        max_positions: rows of every learnt position table.
        dropout: dropout inside the transformers and on positions.
        input_dropout: dropout on video and audio features.
        text_dropout: dropout on text features.
        heads: the prediction heads in order, `"saliency"`, `"boundary"` or both.
        saliency_loss_weight: weight of the saliency loss (3.0 in the joint QVHighlights model).
        center_loss_weight: weight of the loss of window centres.
        window_loss_weight: weight of the loss of window lengths (0.05 on Charades).
        offset_loss_weight: weight of the loss of centre offsets (0.5 on Charades).
        clip_seconds: length of a clip, the unit of boundaries (1/6 on Charades).
        radius_factor: radius of a centre's heat map over the window's length.
        sigma_factor: its standard deviation over the radius plus one.
        max_moments: most windows to return of a layer that predicts.
        pred_layers: decoder layers that predict; saliencies are averaged, boundaries joined and ranked.
        loss_layers: decoder layers that are supervised; None: those that predict.
        mask_decoder: keep padded clips out of the decoder's attention. False is the original.
        saliency_over_padding: divide the saliency loss by all clips, padded ones included. True is the original, in
            which the loss depends on how far a batch is padded.
        **kwargs: fields of `transformers.PretrainedConfig`.

    Raises:
        ValueError: a field is not allowed.

    Example:
        >>> UMTConfig(text_feature_dim=None).hidden_size
        256
    """

    model_type = "umt"
    attribute_map = {"hidden_size": "d_model"}
    keys_to_ignore_at_inference = ["loss", "loss_dict"]

    def __init__(
        self,
        video_feature_dim: int = 2048,
        audio_feature_dim: int | None = 2048,
        text_feature_dim: int | None = 512,
        d_model: int = 256,
        num_attention_heads: int = 8,
        ffn_ratio: float = 4,
        encoder_layers: int = 1,
        cross_layers: int = 1,
        decoder_layers: int = 1,
        bottleneck_tokens: int = 4,
        fusion_type: str = "sum",
        max_positions: int = 5000,
        dropout: float = 0.1,
        input_dropout: float = 0.5,
        text_dropout: float = 0.3,
        heads: Sequence[str] = ("saliency",),
        saliency_loss_weight: float = 1.0,
        center_loss_weight: float = 1.0,
        window_loss_weight: float = 0.1,
        offset_loss_weight: float = 1.0,
        clip_seconds: float = 2.0,
        radius_factor: float = 0.2,
        sigma_factor: float = 0.2,
        max_moments: int = 100,
        pred_layers: Sequence[int] = (-1,),
        loss_layers: Sequence[int] | None = None,
        mask_decoder: bool = False,
        saliency_over_padding: bool = True,
        **kwargs: Any,
    ):
        if d_model % num_attention_heads:
            raise ValueError(f"d_model ({d_model}) must be a multiple of num_attention_heads ({num_attention_heads})")
        if fusion_type not in ("sum", "mean", "concat"):
            raise ValueError(f"fusion_type must be 'sum', 'mean' or 'concat', not {fusion_type!r}")
        if not heads or set(heads) - {"saliency", "boundary"} or len(set(heads)) < len(heads):
            raise ValueError(f"heads must be 'saliency', 'boundary' or both, not {list(heads)!r}")
        for name, layers in (("pred_layers", pred_layers), ("loss_layers", loss_layers or ())):
            if any(not -decoder_layers <= layer < decoder_layers for layer in layers):
                raise ValueError(f"{name}={list(layers)} names a layer that is not one of {decoder_layers}")
        self.video_feature_dim = video_feature_dim
        self.audio_feature_dim = audio_feature_dim
        self.text_feature_dim = text_feature_dim
        self.d_model = d_model
        self.num_attention_heads = num_attention_heads
        self.ffn_ratio = ffn_ratio
        self.encoder_layers = encoder_layers
        self.cross_layers = cross_layers
        self.decoder_layers = decoder_layers
        self.bottleneck_tokens = bottleneck_tokens
        self.fusion_type = fusion_type
        self.max_positions = max_positions
        self.dropout = dropout
        self.input_dropout = input_dropout
        self.text_dropout = text_dropout
        self.heads = list(heads)
        self.saliency_loss_weight = saliency_loss_weight
        self.center_loss_weight = center_loss_weight
        self.window_loss_weight = window_loss_weight
        self.offset_loss_weight = offset_loss_weight
        self.clip_seconds = clip_seconds
        self.radius_factor = radius_factor
        self.sigma_factor = sigma_factor
        self.max_moments = max_moments
        self.pred_layers = list(pred_layers)
        self.loss_layers = None if loss_layers is None else list(loss_layers)
        self.mask_decoder = mask_decoder
        self.saliency_over_padding = saliency_over_padding
        super().__init__(**kwargs)

    @classmethod
    def from_original_options(cls, options: Mapping[str, Any]) -> UMTConfig:
        """Build the configuration from the original's nested model configuration (nncore 0.3.6).

        Args:
            options: the `model` dict: `video_enc`, `audio_enc`, `cross_enc`, `query_gen`, `query_dec`, `pred_head`.

        Raises:
            ValueError: the dict describes a model that this class cannot.
        """
        video, audio, cross = (options.get(name) for name in ("video_enc", "audio_enc", "cross_enc"))
        query, decoder = options.get("query_gen"), options.get("query_dec")
        if video is None or query is None or decoder is None or (audio is None) != (cross is None):
            raise ValueError(
                "UMT needs video_enc, query_gen and query_dec, and both or neither of audio_enc and cross_enc"
            )
        fields: dict[str, Any] = {"audio_feature_dim": None, "text_feature_dim": None}
        fields["video_feature_dim"], fields["d_model"] = _two(video, "video_enc")
        layers, count = _layers(video["enc_cfg"])
        fields["encoder_layers"] = count
        fields["input_dropout"] = video.get("p", 0.5)
        kinds = [("video_enc", layers)]
        tables = [video.get("pos_cfg"), decoder.get("pos_cfg")]
        if audio is not None and cross is not None:
            fields["audio_feature_dim"], _ = _two(audio, "audio_enc")
            kinds += [("audio_enc", _layers(audio["enc_cfg"])[0]), ("cross_enc", cross["enc_cfg"])]
            tables += [audio.get("pos_cfg"), cross.get("pos_cfg")]
            fields["cross_layers"] = cross["enc_cfg"].get("num_layers", 1)
            fields["bottleneck_tokens"] = cross["enc_cfg"].get("num_tokens", 4)
            fields["fusion_type"] = cross.get("fusion_type", "sum")
        fields["text_dropout"] = query.get("p", 0.3)
        if query.get("dims") is not None:
            fields["text_feature_dim"], _ = _two(query, "query_gen")
        layers, fields["decoder_layers"] = _layers(decoder["dec_cfg"])
        kinds.append(("query_dec", layers))
        for field, key, default in (
            ("num_attention_heads", "heads", 8),
            ("ffn_ratio", "ratio", 4),
            ("dropout", "p", 0.1),
        ):
            fields[field] = _agreed(key, {name: layer.get(key, default) for name, layer in kinds})
        sizes = {str(i): (table or {}).get("max_len", 5000) for i, table in enumerate(tables)}
        fields["max_positions"] = _agreed("max_len", sizes)
        heads = options["pred_head"]
        fields.update(_head_fields([heads] if isinstance(heads, Mapping) else heads))
        return cls(**fields)


def _two(module: Mapping[str, Any], name: str) -> tuple[int, int]:
    dims = module["dims"]
    if isinstance(dims, int) or len(dims) != 2:
        raise ValueError(f"{name}: dims must be [features, width], not {dims!r}")
    return dims[0], dims[1]


def _layers(config: Any) -> tuple[Mapping[str, Any], int]:
    """One layer's configuration and the number of equal layers: a dict, `_repeat_` in it, or a list of dicts."""
    if isinstance(config, Mapping):
        return config, config.get("_repeat_", 1)
    if any(layer != config[0] for layer in config):
        raise ValueError(f"the layers of a stack must be equal: {config!r}")
    return config[0], len(config)


def _agreed(key: str, values: Mapping[str, Any]) -> Any:
    if len(set(values.values())) > 1:
        raise ValueError(f"{key} must be the same everywhere, not {dict(values)}")
    return next(iter(values.values()))


def _head_fields(heads: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    kinds = {"SaliencyHead": "saliency", "BoundaryHead": "boundary"}
    fields: dict[str, Any] = {"heads": [kinds.get(head["type"], head["type"]) for head in heads]}
    names = {
        "unit": "clip_seconds",
        "radius_factor": "radius_factor",
        "sigma_factor": "sigma_factor",
        "max_num_moments": "max_moments",
    }
    for head in heads:
        fields.update({ours: head[theirs] for theirs, ours in names.items() if theirs in head})
        for loss in ("saliency", "center", "window", "offset"):
            if head.get(f"{loss}_loss"):  # what is given without a weight has nncore's
                fields[f"{loss}_loss_weight"] = head[f"{loss}_loss"].get("loss_weight", 1.0)
    for theirs, ours in (("pred_indices", "pred_layers"), ("loss_indices", "loss_layers")):
        given = {head["type"]: tuple(head.get(theirs) or ()) for head in heads}
        if _agreed(theirs, given):
            fields[ours] = list(next(iter(given.values())))
    return fields
