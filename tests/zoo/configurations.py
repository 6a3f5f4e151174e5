"""Shrinks the default configuration of any family of transformers to one that runs in milliseconds."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

__all__ = ["FEED_FORWARD", "TOKENS", "WIDTH", "WORDS", "tiny_config"]

WIDTH = 32
FEED_FORWARD = 48  # no other width is 48, so a linear layer from 48 to 32 ends a feed-forward block
FEED_FORWARDS = (FEED_FORWARD, 4 * WIDTH)  # the second where a family knows a ratio only
VOCABULARY = 100
WORDS = (40, 95)  # ids of ordinary words; those of special tokens are smaller
TOKENS = {"pad": 0, "bos": 1, "eos": 2, "decoder_start": 1, "cls": 1, "sep": 2, "mask": 3, "unk": 4, "image": 5,
          "video": 6, "audio": 7, "vision_start": 8, "vision_end": 9, "boi": 10, "eoi": 11, "boa": 12, "eoa": 13,
          "audio_start": 12, "audio_end": 13, "image_start": 10, "image_end": 11, "img_context": 5, "image_patch": 5,
          "media": 5}  # fmt: skip

# Name of an integer -> its tiny value; the first that matches counts, and nothing is ever made larger.
SIZES: list[tuple[str, int]] = [
    (r"nextn_predict|mtp|kv_shared_layers", 0),
    (r"type_vocab_size|num_labels|_stride$|kernel|num_channels|in_channels$", 10**9),
    (r"vocab|num_embeddings|codebook_size|bin_size", VOCABULARY),
    (r"tokens_per_image|image_seq_length|image_seq_len", 4),
    (r"first_k_dense|num_dense_layers|moe_layer_start|first_last_k", 1),
    (r"topk_group", 1),
    (r"n_groups?$|num_expert_groups?$", 2),
    (r"experts_per_tok|moe_top_?k|^top_?k|topk$|num_selected_experts|router_top|expert_num_used", 2),
    (r"experts$|routed_experts|num_local_experts|moe_num_experts|n_experts", 4),
    (r"intermediate|ffn|d_ff|mlp_dim|feed_?forward|n_inner|inner_dim|d_inner|expert.*size|mlp_size|mlp_hidden|^d_mlp",
     FEED_FORWARD),
    (r"layers$|^n_layers?$|^layers_?|depth$|num_blocks|_layers_num$|num_layers|num_resnet", 2),
    (r"(kv|key_value|group).*heads|multi_query_group_num|num_kv", 2),
    (r"heads|n_head|nhead", 4),
    (r"rope_head_dim|nope_head_dim|v_head_dim|rotary_dim|head_dim|kv_channels|head_size|d_kv|d_head|attention_key_dim",
     8),
    (r"state_size|d_state|ssm_state|ssm_size", 8),
    (r"_rank", 8),
    (r"hidden|d_model|n_embd|embed|dim$|dims$|width|proj|channels|size_per_head|cross_attention_dim", WIDTH),
    (r"image_size|img_size|input_size|crop_size", 32),
    (r"patch_size|tile_size", 8),
    (r"num_frames|frames", 4),
    (r"sliding_window|window|block_size|chunk_size|chunk_len", 64),
    (r"max_.*(position|length|seq)|n_positions|n_ctx|max_seq|positions|context_length", 256),
    (r"mel_bins|num_mel|feature_size|n_mels", 16),
    (r"queries|num_query|latents|latent_query|num_image_tokens|num_slots", 8),
]  # fmt: skip
CHOSEN_LAYERS = re.compile(
    r"indexes|indices|layer_ids?$|_idxs?$|fullatt|layer_idx|select_layer|feature_layer|global_attn"
)
ZEROED = re.compile(r"dropout|drop_path|layerdrop|drop_rate|_pdrop|jitter|router_z|mask_.*prob|drop_prob")
SPREAD = re.compile(r"initializer_range|init_std|initializer_std")


def tiny_config(model_type: str, overrides: dict[str, Any] | None = None) -> PreTrainedConfig:
    """The shrunk configuration of a family.

    Args:
        model_type: the family.
        overrides: values by name, "text_config.head_dim" for those of an inner configuration, set after shrinking;
            a function gives the value of one that is itself a configuration.
    """
    return _shrink(CONFIG_MAPPING[model_type](), overrides or {})


def _shrink(config: PreTrainedConfig, overrides: dict[str, Any]) -> PreTrainedConfig:
    own = {name: value for name, value in overrides.items() if "." not in name}
    values = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    fields = set(getattr(type(config), "__dataclass_fields__", values)) or set(values)
    values = {name: value for name, value in values.items() if name in fields and name not in own}
    kept = _kept_layers(values)
    tiny: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, PreTrainedConfig):
            inner = {k.removeprefix(f"{name}."): v for k, v in overrides.items() if k.startswith(f"{name}.")}
            tiny[name] = _shrink(value, inner).to_dict()
        elif name not in ("transformers_version", "id2label", "label2id", "torch_dtype", "dtype", "model_type",
                          "architectures"):  # fmt: skip
            tiny[name] = _small(name, value, kept, values)
    tiny.update({name: value() if callable(value) else value for name, value in own.items()})
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(tiny.get(name), dict) and name not in own:
            tiny[name] = _plain_rope(tiny[name], tiny, _mentions_sections(config))
    return type(config)(**tiny)


def _layer_count(values: dict[str, Any]) -> int | None:
    for name in ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth", "encoder_layers"):
        if isinstance(values.get(name), int):
            return values[name]
    return None


def _kept_layers(values: dict[str, Any]) -> list[int] | None:
    """The layers that show every kind there is, where lists tell what each layer is."""
    count = _layer_count(values)
    lists = [value for name, value in values.items() if _is_layer_list(name, value, count)]
    if count is None or not lists:
        return None
    kinds: dict[tuple, int] = {}
    for index, kind in enumerate(zip(*lists, strict=True)):
        kinds.setdefault(tuple(map(str, kind)), index)
    kept = sorted(kinds.values())[:6]
    return kept if len(kept) > 1 else [0, min(1, count - 1)]


def _is_layer_list(name: str, value: Any, count: int | None) -> bool:
    return isinstance(value, list | tuple) and count is not None and count > 3 and len(value) == count


def _small(name: str, value: Any, kept: list[int] | None, values: dict[str, Any]) -> Any:
    layers = 2 if kept is None else len(kept)
    count = _layer_count(values)
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return False if name == "apply_spec_augment" else value
    if re.search(r"token_(id|index|ids)$|_token$|token_id_|_ids?$", name) and isinstance(value, int):
        return _token(name, value)
    if re.search(r"token_(id|index|ids)$", name) and isinstance(value, list):
        return [_token(name, value[0])] if value else value
    if isinstance(value, float):
        if ZEROED.search(name):
            return 0.0
        return 0.15 if SPREAD.search(name) else value
    if isinstance(value, int):
        if ZEROED.search(name):
            return 0
        if CHOSEN_LAYERS.search(name):
            return max(-layers, min(value, layers - 1))
        if kept is not None and name in ("num_hidden_layers", "n_layer", "num_layers", "n_layers"):
            return layers
        if re.search(r"(kv|key_value).*heads|num_kv", name):
            heads = next((values[n] for n in ("num_attention_heads", "n_head", "num_heads") if n in values), value)
            return min(value, 4 if isinstance(heads, int) and value >= heads else 2)
        return _size(name, value)
    if isinstance(value, list | tuple) and value:
        kind = type(value)
        if _is_layer_list(name, value, count):
            return kind(value[index] for index in kept or [0, 1])
        if all(isinstance(item, int) and not isinstance(item, bool) for item in value):
            if CHOSEN_LAYERS.search(name):
                return kind(sorted({max(-layers, min(item, layers - 1)) for item in value}))
            if re.search(r"depth|layers|blocks", name):
                return kind([1] * (len(value) - 1) + [2])
            return kind(_size(name, item) for item in value)
        if all(isinstance(item, float) for item in value) and ZEROED.search(name):
            return kind(0.0 for _ in value)
    return value


def _size(name: str, value: int) -> int:
    for pattern, size in SIZES:
        if re.search(pattern, name):
            return min(value, size) if value > 0 else value
    return value


def _token(name: str, value: int) -> int:
    if value < 0:
        return value
    name = re.sub(r"_?token_(id|index|ids)$|_token$|_ids?$", "", name)
    if name in TOKENS:
        return TOKENS[name]
    for key in ("image", "video", "audio"):
        if name.startswith(key) and not re.search(r"start|end|begin|row|col|new|pad", name):
            return TOKENS[key]
    return 14 + sum(map(ord, name)) % 24


def _mentions_sections(config: PreTrainedConfig) -> bool:
    """Whether the family's code reads `mrope_section`, for which it may have a default for large heads only."""
    module = sys.modules[type(config).__module__]
    path = Path(module.__file__ or "").with_name(Path(module.__file__ or "").name.replace("configuration", "modeling"))
    return path.exists() and "mrope_section" in path.read_text()


def _plain_rope(rope: dict[str, Any], values: dict[str, Any], sections: bool) -> dict[str, Any]:
    """Rotary embeddings without stretching, with sections that fit the small heads."""
    if not rope:
        return rope
    if any(isinstance(value, dict) for value in rope.values()):
        return {
            kind: _plain_rope(value, values, sections) if isinstance(value, dict) else value
            for kind, value in rope.items()
            if kind not in ("rope_type", "rope_theta", "mrope_section")
        }
    plain = {name: value for name, value in rope.items() if name in ("rope_theta", "partial_rotary_factor")}
    plain |= {"rope_type": "default"}
    plain.setdefault("rope_theta", 10000.0)
    for name in ("mrope_section", "mrope_interleaved", "xdrope_section", "alpha"):
        if name in rope and name != "alpha":
            plain[name] = rope[name]
    section = rope.get("mrope_section", [1, 1, 1] if sections else None)
    if section:
        heads = values.get("num_attention_heads") or 4
        width = values.get("head_dim") or (values.get("hidden_size") or WIDTH) // heads
        half = int(width * rope.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0))) // 2
        sizes = [half // len(section)] * len(section)
        sizes[0] += half - sum(sizes)
        plain["mrope_section"] = sizes
    return plain


def inner_configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A configuration and those inside it."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from inner_configs(value)
