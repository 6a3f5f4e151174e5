"""Presets: the streams of the models whose structure is known, so that `PVLAConfig()` needs no names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .streams import Batch, Stream

__all__ = ["PRESETS", "preset_streams"]

# The configuration's fields for the tokens that stand for images and videos in the text, or mark where they begin.
VISUAL = re.compile(r"(video|image)_token_(id|index)")
OTHER_MEDIA = re.compile(r"(boi|eoi|boa|eoa|\w*(video|image|vision|visual|audio|speech|sound)\w*)_token_(id|index)")


def _frames(batch: Batch, length: int) -> slice:
    return slice(0, batch["video_features"].shape[1])


def _words_after_frames(batch: Batch, length: int) -> slice:
    return slice(batch["video_features"].shape[1], None)


def _moment_detr(config: Any) -> tuple[Stream, Stream]:
    layers = r"(.*\.)?transformer\.encoder\.layers\.\d+"
    return (
        Stream(layers, tokens=_frames, mask="video_mask"),
        Stream(layers, tokens=_words_after_frames, mask="text_mask"),
    )


def _umt(config: Any) -> tuple[Stream, Stream]:
    """States of the clips against the projected text; without text, video against audio."""
    if config.text_feature_dim is not None:
        clips = Stream(r"video_enc|cross_enc|query_dec\.decoder\.\d+", mask=_clip_mask)
        return clips, Stream(["query_gen.mapping"], mask=_text_mask)
    if config.audio_feature_dim is None:
        raise ValueError("this UMT has neither a text nor an audio stream: there is nothing to align its video with")
    return Stream(["video_enc"], mask=_clip_mask), Stream(["audio_enc"], mask=_clip_mask)


def _clip_mask(batch: Batch) -> Tensor | None:
    """As UMT does: the mask, or the clips that have a label."""
    mask: Tensor | None = batch.get("video_mask")
    if mask is not None:
        return mask
    labels = batch.get("saliency_labels")
    return None if labels is None else labels >= 0


def _text_mask(batch: Batch) -> Tensor:
    mask: Tensor | None = batch.get("text_mask")
    if mask is not None:
        return mask
    features: Tensor = batch["text_features"]
    return features[..., 0].isfinite()


def _vision_guided(config: Any, layers: str, prefix: str) -> tuple[Stream, Stream]:
    """Frames after the projection to the text width, against the text states of every encoder block."""
    kind = getattr(config, "cross_attn_type", 0)
    text = Stream(layers, mask="attention_mask")
    if kind == 3:  # both sides are projected to the common width
        text = Stream(rf"{prefix}_linear_1", mask="attention_mask")
        return Stream(rf"{prefix}_linear_2", mask="video_mask"), text
    if kind in (4, 5):
        text = Stream(rf"{prefix}_linear_3", mask="attention_mask")
    return Stream(rf"{prefix}_linear_1", mask="video_mask"), text


def _visual_tokens(config: Any, layers: str) -> tuple[Stream, Stream]:
    """The visual tokens after the text against the text, in every encoder block; prompts are left out."""
    pooled = config.pooled_tokens if config.visual_pooling else None

    def images(batch: Batch) -> int:
        return 1 if batch.get("image_ids") is None else len(batch["image_ids"][0].unique())

    def visual(batch: Batch, length: int) -> slice:
        tokens = batch["visual_features"].shape[1] if pooled is None else images(batch) * pooled
        return slice(length - tokens, length)

    def text(batch: Batch, length: int) -> slice:
        end, words = visual(batch, length).start, batch.get("input_ids")
        return slice(end - (batch["inputs_embeds"] if words is None else words).shape[1], end)

    def visual_mask(batch: Batch) -> Tensor | None:
        mask = batch.get("visual_mask")
        if mask is None or pooled is None:
            return mask
        return mask.unflatten(1, (images(batch), -1))[:, :, :pooled].flatten(1)  # pooled like the tokens

    def text_mask(batch: Batch) -> Tensor | None:
        mask, words = batch.get("attention_mask"), batch.get("input_ids")
        return words != config.pad_token_id if mask is None and words is not None else mask

    return Stream(layers, tokens=visual, mask=visual_mask), Stream(layers, tokens=text, mask=text_mask)


PRESETS: dict[str, Callable[[Any], tuple[Stream, Stream]]] = {
    "moment_detr": _moment_detr,
    "umt": _umt,
    "vg_bart": lambda config: _vision_guided(config, r"model\.encoder\.layers\.\d+", r"model\.encoder\."),
    "vg_t5": lambda config: _vision_guided(config, r"encoder\.block\.\d+", r"encoder\."),
    "vl_bart": lambda config: _visual_tokens(config, r"model\.encoder\.layers\.\d+"),
    "vl_t5": lambda config: _visual_tokens(config, r"encoder\.block\.\d+"),
}


def _placeholder_streams(model: nn.Module) -> tuple[Stream, Stream] | str:
    """The visual tokens against the text, in every block of a language model that reads both in one sequence.

    These are the models of transformers that put the features of images and videos at placeholder tokens of the text,
    whose ids are in their configuration. Frames may come as a video or as images: both are visual tokens.

    Returns:
        The streams; for a model of another kind, what it lacks.
    """
    owners = [module for module in model.modules() if hasattr(module, "get_placeholder_mask")]
    if not owners:
        return "it does not put the features of images or videos among the tokens of its text"
    if len(owners) > 1:
        return "several of its parts put features of images or videos among the tokens of a text"
    config: Any = getattr(owners[0], "config", None)
    fields = config.to_dict() if hasattr(config, "to_dict") else {}
    ids = {name: value for name, value in fields.items() if isinstance(value, int) and not isinstance(value, bool)}
    visual = {value for name, value in ids.items() if VISUAL.fullmatch(name)}
    media = {value for name, value in ids.items() if OTHER_MEDIA.fullmatch(name)}
    blocks = _decoder_blocks(owners[0], model)
    if not visual:
        return "its configuration has no video_token_id or image_token_id, which tells the frames from the words"
    if not blocks:
        return "its language model has no numbered list of blocks that reads frames and words in one sequence"

    def visual_mask(batch: Batch) -> Tensor:
        return _is_one_of(_token_ids(batch), visual)

    def text_mask(batch: Batch) -> Tensor:
        words = ~_is_one_of(_token_ids(batch), media)
        mask = batch.get("attention_mask")
        return words if mask is None else words & (mask != 0)

    return Stream(blocks, mask=visual_mask), Stream(blocks, mask=text_mask)


def _token_ids(batch: Batch) -> Tensor:
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor):
        raise ValueError(
            "the preset of this model tells visual tokens from words by the batch's input_ids, and it has none; say "
            "which tokens are which with PVLAConfig(video=Stream(..., mask=...), language=Stream(..., mask=...))"
        )
    return ids


def _is_one_of(ids: Tensor, tokens: set[int]) -> Tensor:
    return torch.stack([ids == token for token in sorted(tokens)]).any(0)


def _decoder_blocks(owner: Any, model: nn.Module) -> list[str]:
    """The names in a model of the blocks of its decoder; none if their names are not numbered."""
    if getattr(owner.config, "is_encoder_decoder", False) or not hasattr(owner, "get_decoder"):
        return []
    decoder = owner.get_decoder()
    while hasattr(decoder, "get_decoder") and decoder.get_decoder() is not decoder:
        decoder = decoder.get_decoder()
    count = getattr(getattr(decoder, "config", None), "num_hidden_layers", None)
    lists = [
        child
        for child in decoder.children()
        if isinstance(child, nn.ModuleList) and len(child) == count and any(True for _ in child[0].children())
    ]
    if decoder is owner or len(lists) != 1:
        return []
    blocks = set(lists[0])
    return [name for name, module in model.named_modules() if module in blocks]


def preset_streams(model: nn.Module) -> tuple[Stream, Stream]:
    """The (video, language) streams of a model.

    It is one of the project's backbones, by `model.config.model_type`, or one of transformers that reads images and
    videos at placeholder tokens of its text.

    Args:
        model: unwrapped.

    Raises:
        ValueError: another model; the message says how to name its streams.
    """
    config = getattr(model, "config", None)
    named = config.get("model_type") if isinstance(config, Mapping) else getattr(config, "model_type", None)
    model_type = named if isinstance(named, str) else None
    if model_type in PRESETS:
        return PRESETS[model_type](config)
    streams = _placeholder_streams(model)
    if isinstance(streams, str):
        raise ValueError(_unknown_streams(model, model_type, streams))
    return streams


def _unknown_streams(model: nn.Module, model_type: str | None, lacks: str) -> str:
    lists = {name: len(part) for name, part in model.named_modules() if isinstance(part, nn.ModuleList)}
    outermost = {name: length for name, length in lists.items() if not re.search(r"(^|\.)\d+\.", name)}
    stack = max(outermost, key=outermost.__getitem__, default="encoder.layers")
    blocks = rf'r"{re.escape(stack)}\.\d+"'
    words = 'tokens=slice(16, None), mask=lambda b: b["attention_mask"][:, 16:]'
    return (
        f"PVLAConfig() does not know where {type(model).__name__} (model_type={model_type!r}) has the states of its "
        f"video and those of its text: it is none of this package's backbones ({', '.join(PRESETS)}), and {lacks}. "
        "Name them: modules with outputs (batch, tokens, width), which of their tokens, and the padding. Where both "
        "sides go through the same blocks and the first 16 tokens are frames, this is\n"
        f"    PVLAConfig(video=Stream({blocks}, tokens=slice(0, 16)),\n"
        f"               language=Stream({blocks}, {words}))\n"
        "`print(model)` shows the modules. PVLAConfig(extractor=...) takes a function that returns the states itself"
    )
