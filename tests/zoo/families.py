"""The families of transformers: a tiny model of each, and a batch of two examples for it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto

from .configurations import WORDS, inner_configs, tiny_config

__all__ = ["Case", "Family", "all_families", "build_case", "family_named"]

# The heads a family may have; it is tried with the first that it has.
HEADS = {
    "image-text-to-text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "speech-seq2seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "video": "MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES",
    "image": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "ctc": "MODEL_FOR_CTC_MAPPING_NAMES",
    "audio": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    "base": "MODEL_MAPPING_NAMES",
}
GENERATES = {"image-text-to-text", "seq2seq", "speech-seq2seq", "causal"}
LENGTH = 9  # words of a text
DROPPED = 3  # of them, in the shorter example of a padded batch


def inner(name: str, **overrides: Any) -> Callable[[], dict[str, Any]]:
    """A tiny inner configuration where a family's default has none."""
    return lambda: tiny_config(name, overrides).to_dict()


SMALL_WINDOWS = {"depths": [2, 2], "num_heads": [2, 2], "window_size": 4, "patch_size": 4}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
BY_KIND = {"full_attention": PLAIN_ROPE, "sliding_attention": PLAIN_ROPE}

# What the shrinker cannot know: values by name for the families that need some.
OVERRIDES: dict[str, dict[str, Any]] = {
    "whisper": {"max_source_positions": 20},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 4},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 16, "attn_layer_indices": [1]},
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 16, "layer_types": ["mamba", "attention"]},
    "gpt_neo": {
        "attention_types": [[["global", "local"], 1]],
        "num_layers": 2,
        "attention_layers": ["global", "local"],
    },
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "blip-2": {"image_token_index": 5},
    "chameleon": {
        "vq_config.num_embeddings": 10,
        "vocabulary_map": {"<image>": 5, **{f"IMGIMG{letter}Z": 20 + i for i, letter in enumerate("ABCDEFGHIJ")}},
    },
    "cvt": {"embed_dim": [16, 32, 32], "num_heads": [2, 2, 2], "depth": [1, 1, 2]},
    "diffusion_gemma": {
        "text_config.num_experts": 4,
        "text_config.top_k_experts": 2,
        "text_config.moe_intermediate_size": 48,
    },
    "dots1": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 48,
    },
    "emu3": {
        "vq_config.codebook_size": 10,
        "vocabulary_map": {
            "<image>": 5,
            "<|extra_200|>": 19,
            **{f"<|visual token {i:06d}|>": 20 + i for i in range(10)},
        },
    },
    "deepseek_ocr2": {
        "text_config.num_experts_per_tok": 2,
        "text_config.n_group": 1,
        "text_config.topk_group": 1,
        "text_config.mlp_layer_types": ["dense", "sparse"],
    },
    "xmod": {"default_language": "en_XX"},
    "granite4_vision": {"image_grid_pinpoints": [[32, 32]], "deepstack_layer_map": [[-1, 0]]},
    "esm": {"vocab_size": 100, "pad_token_id": 0, "mask_token_id": 3, "position_embedding_type": "rotary"},
    "gemma3n_text": {
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gemma4": {"vision_config": inner("gemma4_vision")},
    "gemma4_unified": {"vision_config": inner("gemma4_unified_vision")},
    "granite_speech5_ctc": {"encoder_config.context_size": 16},
    "instructblip": {"image_token_index": 5},
    "instructblipvideo": {"video_token_index": 6},
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "kosmos-2": {"latent_query_num": 4},
    "kosmos-2.5": {"vision_config.patch_embed_hidden_size": 192, "latent_query_num": 4},
    "llama4": {"vision_config.intermediate_size": 128},
    "mllama": {"vision_config.vision_output_dim": 64},
    "mistral4": {"text_config.qk_rope_head_dim": 4},
    "hunyuan_vl": {"text_config.head_dim": 8},
    "glm5_next": {"text_config.index_topk": 16},
    "pix2struct": {"vision_config.patch_embed_hidden_size": 192},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 8, "audio_start_token_id": 12},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 8, "audio_start_token_id": 12},
    "speech_to_text": {"input_feat_per_channel": 16},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2},
    "ministral3": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 256,
        }
    },
    "cohere_compass_text": {"rope_parameters": BY_KIND},
    "cohere_compass": {"text_config.rope_parameters": BY_KIND},
    "longcat_flash": {"head_dim": 8, "qk_head_dim": 16},
    "led": {"attention_window": [4, 4]},
    "longformer": {"attention_window": [4, 4]},
    "llava_next": {"image_grid_pinpoints": [[32, 32]]},
    "llava_next_video": {"image_grid_pinpoints": [[32, 32]]},
    "llava_onevision": {"image_grid_pinpoints": [[32, 32]]},
    "zamba": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "bit": {"num_groups": 4},
    "donut-swin": SMALL_WINDOWS,
    "swinv2": SMALL_WINDOWS,
    "swin": SMALL_WINDOWS,
    "wav2vec2-bert": {"vocab_size": 60},
    "wav2vec2-conformer": {"vocab_size": 60},
}
UNTRIED = {"encoder-decoder", "vision-encoder-decoder", "speech-encoder-decoder", "vision-text-dual-encoder"}


@dataclass(frozen=True)
class Family:
    """A family and the head with which it is tried.

    Args:
        name: its `model_type`.
        head: a key of `HEADS`.
        class_name: the model class.
    """

    name: str
    head: str
    class_name: str


@dataclass
class Case:
    """A tiny model with a batch of two examples, which lie one after the other in the first dimension of each input.

    Args:
        family: the family.
        model: in evaluation mode, random weights.
        inputs: tensors by argument.
        placeholders: how many tokens at the beginning of the text stand for something else (an image).
        rejected: what the model said of the inputs that it did not take.
    """

    family: Family
    model: nn.Module
    inputs: dict[str, Any]
    placeholders: int = 0
    rejected: tuple[str, ...] = ()


def all_families() -> list[Family]:
    """Every family that has a model, with its first head."""
    families: dict[str, Family] = {}
    for head, mapping in HEADS.items():
        for name, classes in getattr(modeling_auto, mapping, {}).items():
            class_name = classes if isinstance(classes, str) else classes[0]
            if name not in UNTRIED:
                families.setdefault(name, Family(name, head, class_name))
    return list(families.values())


def family_named(name: str) -> Family:
    """The family of a `model_type`.

    Raises:
        KeyError: if this transformers has none of that name.
    """
    for family in all_families():
        if family.name == name:
            return family
    raise KeyError(f"transformers {transformers.__version__} has no family {name!r} with a model of its own")


def build_model(family: Family) -> nn.Module:
    """A tiny random model, always the same, in which every part has an effect that can be seen."""
    torch.manual_seed(0)
    model = getattr(transformers, family.class_name)(tiny_config(family.name, OVERRIDES.get(family.name)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point():
                continue
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            if not bool(parameter.isfinite().all()):
                parameter.copy_(0.1 * noise)
            elif parameter.dim() >= 2 and float(parameter.std()) < 0.1:
                parameter.copy_(0.15 * noise)
            elif parameter.dim() == 1:
                parameter.add_(0.05 * noise)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        if getattr(model.generation_config, "decoder_start_token_id", 1) is None:
            model.generation_config.decoder_start_token_id = 1
        model.generation_config.forced_eos_token_id = None
    return model.float().eval()


def build_case(family: Family) -> Case:
    """The family's model with the first of the candidate batches that it takes.

    Raises:
        RuntimeError: if it takes none; the message is that of the last.
    """
    model = build_model(family)
    messages: list[str] = []
    for inputs, placeholders in candidates(family, model):
        try:
            with torch.no_grad():
                output = model(**{name: copied(value) for name, value in inputs.items()})
            if not tensors_of(output):
                raise RuntimeError("the output holds no tensor with two examples")
        except Exception as error:
            messages.append(f"{type(error).__name__}: {error}")
            continue
        return Case(family, model, inputs, placeholders, tuple(dict.fromkeys(messages)))
    raise RuntimeError("takes none of the inputs tried: " + " | ".join(dict.fromkeys(messages)))


def copied(value: Any) -> Any:
    """A copy of an input, since some models write into theirs."""
    return value.clone() if isinstance(value, torch.Tensor) else value


SKIPPED_OUTPUTS = re.compile(
    r"loss|cache|past|hidden_states$|attentions|mems|logits_per|states$|similarity|rope_deltas"
    r"|text_model_output|vision_model_output|_output$|logit_scale|router"
)


def tensors_of(output: Any, *, examples: int = 2) -> dict[str, torch.Tensor]:
    """The tensors of an output whose first dimension holds the examples one after the other."""
    items = (
        output.items() if isinstance(output, dict) else enumerate(output if isinstance(output, tuple) else [output])
    )
    return {
        str(name): value
        for name, value in items
        if isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and value.dim() >= 2
        and value.shape[0] % examples == 0
        and not SKIPPED_OUTPUTS.search(str(name))
    }


def arguments_of(module: nn.Module) -> list[str]:
    """The names of a model's inputs."""
    return [name for name in inspect.signature(module.forward).parameters if name != "self"]


def _words(length: int, seed: int = 3) -> torch.Tensor:
    return torch.randint(*WORDS, (2, length), generator=torch.Generator().manual_seed(seed))


def _noise(*shape: int, seed: int = 4) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def candidates(family: Family, model: nn.Module) -> Iterator[tuple[dict[str, Any], int]]:
    """Batches that the family may take, with the number of placeholders in the text, most likely first."""
    names = arguments_of(model)
    if "input_ids" not in names:
        for media in _media(names, model):
            yield _with_decoder(media, names), 0
        return
    if family.head != "image-text-to-text" and not {"pixel_values", "input_features", "input_values"} & set(names):
        for extra in ({}, {"bbox": torch.randint(0, 20, (2, LENGTH, 4)).sort(-1).values}):
            if set(extra) <= set(names):
                yield _with_text({}, names, 0, LENGTH) | extra, 0
        return
    for media in _media(names, model):
        for marker, count in _placeholders(model, media):
            text = _with_text(media, names, count, LENGTH)
            if count:
                text["input_ids"][:, :count] = marker
                for types, value in (("mm_token_type_ids", 1), ("token_type_ids", 1)):
                    if types in text:
                        text[types][:, :count] = value
            yield text, count
    yield _with_text({}, names, 0, LENGTH), 0


def _with_text(media: dict[str, Any], names: list[str], placeholders: int, length: int) -> dict[str, Any]:
    ids = _words(length + placeholders)
    inputs = {"input_ids": ids, **media}
    if "attention_mask" in names:
        inputs["attention_mask"] = torch.ones_like(ids)
    for types in ("mm_token_type_ids", "token_type_ids", "moe_mm_token_type_ids"):
        if types in names and placeholders:
            inputs[types] = torch.zeros_like(ids)
    if "qformer_input_ids" in names:
        inputs["qformer_input_ids"] = _words(5, seed=6)
        inputs["qformer_attention_mask"] = torch.ones_like(inputs["qformer_input_ids"])
    if "protein_input_ids" in names:
        inputs["protein_input_ids"] = torch.randint(4, 20, (2, 7), generator=torch.Generator().manual_seed(7))
        inputs["protein_attention_mask"] = torch.ones(2, 7, dtype=torch.long)
    if "bbox" in names:
        inputs["bbox"] = torch.randint(0, 20, (2, length + placeholders, 4)).sort(-1).values
    return _with_decoder(inputs, names)


def _with_decoder(inputs: dict[str, Any], names: list[str]) -> dict[str, Any]:
    if "decoder_input_ids" in names:
        inputs["decoder_input_ids"] = _words(6, seed=5)
    return inputs


def _sizes(model: nn.Module) -> dict[str, Any]:
    """Sizes of images and sounds, as the inner configurations name them."""
    sizes: dict[str, Any] = {}
    for config in inner_configs(model.config):
        for name in ("image_size", "patch_size", "num_channels", "in_channels", "temporal_patch_size", "num_frames",
                     "num_mel_bins", "max_source_positions", "feature_size", "frames_per_clip", "crop_size",
                     "max_length", "feature_projection_input_dim", "image_grid", "spatial_merge_size", "input_dim",
                     "max_num_tiles"):  # fmt: skip
            value = getattr(config, name, None)
            if value is not None:
                sizes.setdefault(name, value)
    return sizes


def _side(value: Any, default: int) -> int:
    if isinstance(value, list | tuple):
        value = value[0]
    return value if isinstance(value, int) else default


def _media(names: list[str], model: nn.Module) -> Iterator[dict[str, Any]]:
    """Images, videos and sounds for two examples in the forms that models take them."""
    known = _sizes(model)
    size, patch = _side(known.get("image_size", known.get("crop_size")), 32), _side(known.get("patch_size"), 8)
    channels = _side(known.get("num_channels", known.get("in_channels")), 3)
    has = set(names)
    if "pixel_values" in has or "image_patches" in has:
        flat = {"image_grid_thw", "grid_thw", "image_grid_hw"} & has
        if flat:
            steps = _side(known.get("temporal_patch_size"), 1)
            for temporal in dict.fromkeys((steps, 1, 2)):
                pixels = _noise(32, channels * temporal * patch * patch)
                grid = torch.tensor([[1, 4, 4]] * 2)
                for name in flat:
                    yield {"pixel_values": pixels, name: grid if name.endswith("thw") else grid[:, 1:]} | (
                        {"image_merge_sizes": torch.tensor([2, 2])} if "image_merge_sizes" in has else {}
                    )
            for name in flat:
                grid = torch.tensor([[1, 4, 4]] * 2)
                yield {"pixel_values": _noise(32, channels, patch, patch),
                       name: grid if name.endswith("thw") else grid[:, 1:]}  # fmt: skip
        if "spatial_shapes" in has:
            side = 4
            yield {"pixel_values": _noise(2, side * side, channels * patch * patch),
                   "spatial_shapes": torch.tensor([[side, side]] * 2),
                   "pixel_attention_mask": torch.ones(2, side * side, dtype=torch.long)}  # fmt: skip
        if "target_sizes" in has:
            yield {"pixel_values": _noise(1, channels, patch, 32 * patch), "target_sizes": torch.tensor([[4, 4]] * 2)}
        if "image_position_ids" in has:
            places = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), -1).reshape(1, 16, 2)
            for width in (3 * patch * patch, 3 * patch * patch * 9):
                yield {"pixel_values": _noise(2, 16, width), "image_position_ids": places.repeat(2, 1, 1)}
        if "pixel_mask" in has:
            yield {"pixel_values": _noise(2, channels, size, size),
                   "pixel_mask": torch.ones(2, size, size, dtype=torch.long)}  # fmt: skip
        if "aspect_ratio_ids" in has:
            tiles = _side(known.get("max_num_tiles"), 4)
            yield {"pixel_values": _noise(2, 1, tiles, channels, size, size),
                   "aspect_ratio_ids": torch.ones(2, 1, dtype=torch.long),
                   "aspect_ratio_mask": torch.ones(2, 1, tiles, dtype=torch.long),
                   "cross_attention_mask": torch.ones(2, LENGTH, 1, tiles, dtype=torch.long)}  # fmt: skip
        if "high_res_pixel_values" in has:
            yield {
                "pixel_values": _noise(2, channels, size, size),
                "high_res_pixel_values": _noise(2, channels, 32, 32),
            }
        if "image_patches" in has:
            yield {"pixel_values": _noise(2, 16, 3 * patch * patch)}
        if "image_sizes" in has:
            pixels = torch.tensor([[size, size]] * 2)
            yield {"pixel_values": _noise(2, 2, channels, size, size), "image_sizes": pixels}
            yield {"pixel_values": _noise(2, channels, size, size), "image_sizes": pixels}
        if "pixel_attention_mask" in has:
            yield {"pixel_values": _noise(2, 1, channels, size, size),
                   "pixel_attention_mask": torch.ones(2, 1, size, size, dtype=torch.bool)}  # fmt: skip
        if "image_attention_mask" in has:
            yield {"pixel_values": _noise(2, 1, channels, size, size),
                   "image_attention_mask": torch.ones(2, LENGTH, 1, dtype=torch.long)}  # fmt: skip
        if "pixel_values_local" in has:
            yield {"pixel_values": _noise(2, channels, size, size), "num_local_patches": torch.tensor([0, 0])}
        if "image_embeds_position_mask" in has:
            marks = torch.zeros(2, LENGTH, dtype=torch.long)
            marks[:, 1:5] = 1
            yield {"pixel_values": _noise(2, channels, size, size), "image_embeds_position_mask": marks}
        frames = _side(known.get("num_frames", known.get("frames_per_clip")), 4)
        stills = {"pixel_values": _noise(2, channels, size, size)}
        clips = {"pixel_values": _noise(2, frames, channels, size, size)}
        first_clips = "num_frames" in known and "image_size" in known and "input_ids" not in has
        yield from (clips, stills) if first_clips else (stills, clips)
        yield {"pixel_values": _noise(2, channels, 64, 64)}
        yield {"pixel_values": _noise(2, channels, 128, 128)}
        yield {"pixel_values": _noise(2, 1, channels, size, size)}
    if "pixel_values_videos" in has:
        frames = _side(known.get("num_frames", known.get("frames_per_clip")), 4)
        yield {"pixel_values_videos": _noise(2, frames, channels, size, size)}
    if "flattened_patches" in has:
        places = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"), -1).reshape(1, 16, 2) + 1
        for side in (patch, 16):
            yield {
                "flattened_patches": torch.cat((places.repeat(2, 1, 1).float(), _noise(2, 16, 3 * side * side)), -1)
            }
    mels = _side(known.get("num_mel_bins", known.get("feature_size", known.get("feature_projection_input_dim"))), 16)
    steps = _side(known.get("max_source_positions"), 20)
    if "input_features" in has:
        masks = {name for name in ("input_features_mask", "feature_attention_mask") if name in has}
        for shape in (
            (2, mels, 2 * steps),
            (2, 40, mels),
            (2, mels, 64),
            (2, 128, 128),
            (2, 128, mels),
            (2, mels, 400),
        ):
            length = shape[-1] if shape[1] == mels else shape[1]
            extra = {name: torch.ones(2, length, dtype=torch.long) for name in masks}
            if masks:
                yield {"input_features": _noise(*shape), **extra}
            yield {"input_features": _noise(*shape)}
    if "input_values" in has:
        for shape in ((2, 2000), (2, 1, 2000), (2, _side(known.get("max_length"), 64), mels), (2, 8000)):
            yield {"input_values": _noise(*shape)}


def _placeholders(model: nn.Module, media: dict[str, Any]) -> Iterator[tuple[int, int]]:
    """The token that stands for an image (or video, or sound) and how many of them a text needs."""
    config = model.config
    kinds = {"pixel_values_videos": "video", "pixel_values": "image", "input_features": "audio",
             "input_values": "audio"}  # fmt: skip
    kind = next((kinds[name] for name in kinds if name in media), None)
    marker = None
    for name in (f"{kind}_token_id", f"{kind}_token_index", f"{kind}_token", "image_token_id", "image_token_index"):
        marker = getattr(config, name, None) if marker is None else marker
    if kind is None or not isinstance(marker, int):
        yield 0, 0
        return
    counted = _count_features(model, kind, media)
    if counted:
        yield marker, counted
    for count in (16, 4, 17, 1, 8, 64, 9, 32, 20):
        if count != counted:
            yield marker, count
    yield 0, 0


def _count_features(model: nn.Module, kind: str, media: dict[str, Any]) -> int | None:
    """How many tokens one of the two media becomes, asked from the model itself."""
    for owner in (model, getattr(model, "model", None)):
        features_of = getattr(owner, f"get_{kind}_features", None)
        if features_of is None:
            continue
        known = inspect.signature(features_of).parameters
        try:
            with torch.no_grad():
                features = features_of(**{name: copied(value) for name, value in media.items() if name in known})
        except Exception:
            continue
        features = getattr(features, "pooler_output", features)
        parts = list(features) if isinstance(features, list | tuple) else [features]
        if all(isinstance(part, torch.Tensor) for part in parts):
            return sum(part.numel() // part.shape[-1] for part in parts) // 2
    return None
