"""Where a model's feed-forward and attention blocks end, found by its structure."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .stacks import EXPERTS, blocks_around

__all__ = [
    "PARTS",
    "Ending",
    "attention_endings",
    "block_of",
    "block_width",
    "config_around",
    "device_of",
    "feed_forward_endings",
    "in_and_out",
    "is_inside_an_adapter",
    "kind_of",
    "part_of",
    "skips_its_last_layer",
]

PARTS = ("language", "vision", "audio", "all")

# Below a block, modules that mix tokens are not feed-forward blocks; connectors between two models belong to neither.
ATTENTION = re.compile(
    r"att(n|ention)|mamba|ssm|rwkv_att|router|(^|\.)gate(\.|$)|lora|conv_module|adapter|bottleneck|norm(\.|$)",
    re.IGNORECASE,
)
ATTENTION_BLOCK = re.compile(r"(^|\.)(self_)?att(n|entions?)\.\d+$")
MIXERS = re.compile(
    r"Att(n|ention)(?!DecoderLayer)|Mixer|Mamba|ShortConv|DeltaNet|RecurrentBlock|ConvolutionModule|Router|TimeMix"
)
CONNECTORS = re.compile(
    r"merger|projector|connector|resampler|q_?former|pooler|pooling|adapter|prompts_generator|bridge|compressor",
    re.IGNORECASE,
)
NO_SEQUENCE = re.compile(
    r"merger|router|(^|\.)gate(\.|$)|(^|\.)dt_proj|linear_pos|pos_?proj|rel(ative)?_(pos|k_|position)|pos_(key|query)"
    r"|(^|\.)r_net|pooler|pooling_head|o_a_proj|message_(fc|attn)|prompts_generator|position_bias_mlp|proj_delayed"
    r"|(^|\.)indexer(\.|$)|(^|\.)audio_mlp\.",
    re.IGNORECASE,
)
# Vectors per layer that are added to the states, layers before the last that have the widths of a last one, and
# layers that see the tokens of one kind alone.
NO_ENDING = re.compile(r"(^|\.)per_layer|laurel|(^|\.)intermediate(_query)?(\.|$)|(^|\.)audio_mlp\.")
SOUND_ENCODER = re.compile(r"(speech|audio).*encoder")
NAMED_PARTS = (
    ("vision", re.compile(r"vision|visual|image|video|pixel|(^|[._])sam([._]|$)|vit(_|\.|$)", re.IGNORECASE)),
    ("audio", re.compile(r"audio|speech_(?!model|to)|acoustic|sound", re.IGNORECASE)),
    ("other", re.compile(r"protein|timestamp", re.IGNORECASE)),
)
ATTENTION_CLASS = re.compile(r"Att(n|ention)(?!.*(Encoder|Decoder)Layer)")
ATTENTION_NAME = re.compile(r"att(n|ention)", re.IGNORECASE)
CROSS = re.compile(r"cross|encoder_?att|enc_?dec|multihead_attn", re.IGNORECASE)
INTO_ATTENTION = re.compile(
    r"(^|[._])(q|k|v|qkv|kv|wq|wk|wv|wqkv|query|key|value|query_key_value|c_attn|q_attn|in_proj|gate|g)(_?(proj|head|lin|layer))?$",
    re.IGNORECASE,
)
INPUTS = {
    "pixel_values": "vision",
    "pixel_values_videos": "vision",
    "input_features": "audio",
    "input_values": "audio",
}


@dataclass(frozen=True)
class Ending:
    """The module whose output is that of a feed-forward or attention block.

    Args:
        path: its path in the model.
        width: the width d of its output.
        part: "language", "vision", "audio", "other", or "connector" for what joins two of them.
        kind: "feed_forward", "self_attention" or "cross_attention".
    """

    path: str
    width: int
    part: str
    kind: str = "feed_forward"


def in_and_out(module: nn.Module) -> tuple[int, int] | None:
    """The widths of a linear-like module's input and output, quantised ones included; None for other modules."""
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.nf
    weight = getattr(module, "weight", None)
    if isinstance(weight, nn.Parameter) and weight.dim() == 3:
        return None  # the experts of a mixture, side by side
    for inputs, outputs in (
        ("in_features", "out_features"),
        ("infeatures", "outfeatures"),
        ("input_size", "output_size"),
    ):
        widths = getattr(module, inputs, None), getattr(module, outputs, None)
        if isinstance(widths[0], int) and isinstance(widths[1], int):
            return widths[0], widths[1]
    return None


def device_of(module: nn.Module) -> torch.device | None:
    """Where a module's first parameter is, of a mixture of experts for example; None without parameters."""
    first = next(module.parameters(), None)
    return None if first is None else first.device


def feed_forward_endings(model: nn.Module) -> list[Ending]:
    """The last module of every feed-forward block of a model, in the model's order.

    It is the linear layer d_ff -> d beside which, in the same block, a linear layer d -> d_ff (or 2 d_ff, where a gate
    is fused with it) stands; of a mixture of experts, which has no last layer, the mixture itself.

    Args:
        model: any model whose blocks stand in module lists.
    """
    modules = {name: module for name, module in model.named_modules() if not is_inside_an_adapter(model, name)}
    mixtures = [name for name, module in modules.items() if _is_mixture(module, name)]
    endings = {}
    for name in mixtures:
        width = block_width(model, name)
        if width is not None and not any(name.startswith(f"{other}.") for other in mixtures):
            endings[name] = Ending(name, width, part_of(model, name))
    linear: dict[str, tuple[int, int]] = {}
    for name, module in modules.items():
        widths = in_and_out(module)
        if widths is not None and not any(name.startswith(f"{mixture}.") for mixture in mixtures):
            linear[name] = widths
    for name, (inputs, outputs) in linear.items():
        block = block_of(model, name)
        if block is None or EXPERTS.search(name) or NO_ENDING.search(name) or _mixes_tokens(model, name, block):
            continue
        width = block_width(model, name)
        if width is None or inputs == outputs:  # the widths do not tell the last layer: it is the one that stands last
            width = outputs if any(_fits(other, (inputs, outputs)) for other in _before(name, block, linear)) else 0
            if inputs == outputs and _stands_before_another(name, linear):
                continue
        if outputs == width and any(_fits(other, (inputs, outputs)) for other in _nearest(name, block, linear)):
            endings[name] = Ending(name, outputs, part_of(model, name))
    order = {name: place for place, name in enumerate(modules)}
    return sorted(endings.values(), key=lambda ending: order[ending.path])


def skips_its_last_layer(attention: nn.Module) -> bool:
    """Whether an attention reads the weights of its last layer without calling it, as torch's own does.

    A class of the same parameters with a forward pass of its own, such as that of the project's grounding models, is
    taken to call it.
    """
    return isinstance(attention, nn.MultiheadAttention) and type(attention).forward is nn.MultiheadAttention.forward


def attention_endings(model: nn.Module) -> list[Ending]:
    """The last linear layer of every attention block of a model, in the model's order.

    It is the linear layer of the block's width d that stands last among those of the attention, projections of
    queries, keys, values and positions left out. `torch.nn.MultiheadAttention` has none: it reads the weights of its
    last layer without calling it.

    Args:
        model: any model whose blocks stand in module lists.
    """
    within: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if in_and_out(module) is None or is_inside_an_adapter(model, name):
            continue
        around = _attention_around(model, name)
        if around is not None and not EXPERTS.search(name) and not NO_SEQUENCE.search(name):
            within.setdefault(around, []).append(name)
    endings = []
    for names in within.values():
        width = block_width(model, names[-1])
        last = [name for name in names if not INTO_ATTENTION.search(name) and _puts_out(model, name, width)]
        if last:
            widths = in_and_out(model.get_submodule(last[-1]))
            assert widths is not None
            endings.append(Ending(last[-1], widths[1], part_of(model, last[-1]), kind_of(model, last[-1])))
    return endings


def _puts_out(model: nn.Module, path: str, width: int | None) -> bool:
    widths = in_and_out(model.get_submodule(path))
    return widths is not None and width in (None, widths[1])


def _attention_around(model: nn.Module, path: str) -> str | None:
    """The path of the attention block that a layer belongs to; None if it belongs to none that calls its layers."""
    block = block_of(model, path)
    if block is None:
        return None
    parts = path.split(".")
    attention = None
    for depth in range(block.count(".") + 1, len(parts)):
        module = model.get_submodule(".".join(parts[:depth]))
        if skips_its_last_layer(module):
            return None
        named = depth > block.count(".") + 1 and ATTENTION_NAME.search(parts[depth - 1])
        if attention is None and (named or ATTENTION_CLASS.search(type(module).__name__)):
            attention = ".".join(parts[:depth])
    return attention


def kind_of(model: nn.Module, path: str) -> str:
    """Which kind of block a module belongs to, by `Ending`'s names."""
    around = _attention_around(model, path)
    if around is None:
        return "feed_forward"
    names = (around.rpartition(".")[2], path[len(around) :], type(model.get_submodule(around)).__name__)
    return "cross_attention" if any(CROSS.search(name) for name in names) else "self_attention"


def _fits(first: tuple[int, int], last: tuple[int, int]) -> bool:
    """Whether a layer (d, d_ff) or (d, 2 d_ff) begins the feed-forward block that a layer (d_ff, d) ends."""
    inputs, outputs = last
    return first[0] == outputs and first[1] in (inputs, 2 * inputs)


def _before(name: str, block: str, linear: dict[str, tuple[int, int]]) -> list[tuple[int, int]]:
    """The widths of the linear layers of a block that stand before a layer, attention's left out."""
    names = list(linear)
    return [
        linear[other]
        for other in names[: names.index(name)]
        if other.startswith(f"{block}.") and not ATTENTION.search(other[len(block) :])
    ]


def _stands_before_another(name: str, linear: dict[str, tuple[int, int]]) -> bool:
    """Whether another linear layer follows in the same module, or in one beside it."""
    names = list(linear)
    parent = name.rpartition(".")[0]
    after = names[names.index(name) + 1 :]
    return any(other.startswith(f"{parent}.") for other in after)


def _nearest(name: str, block: str, linear: dict[str, tuple[int, int]]) -> list[tuple[int, int]]:
    """The widths of the other linear layers below the nearest module around a layer that has any, within its block."""
    around = name
    while len(around) > len(block):
        around = around.rpartition(".")[0]
        nearest = [
            widths
            for other, widths in linear.items()
            if other != name and other.startswith(f"{around}.") and not ATTENTION.search(other[len(block) :])
        ]
        if nearest:
            return nearest
    return []


def block_of(model: nn.Module, path: str) -> str | None:
    """The path of the innermost entry of a module list around a layer."""
    blocks = blocks_around(model, path)
    if not blocks:
        return None
    parts = path.split(".")
    for depth in range(len(parts) - 1, 0, -1):
        if model.get_submodule(".".join(parts[:depth])) is blocks[-1]:
            return ".".join(parts[:depth])
    return None


def _mixes_tokens(model: nn.Module, path: str, block: str) -> bool:
    """Whether a layer belongs to the part of its block that mixes tokens, by the names of what it lies in."""
    if ATTENTION.search(path[len(block) :]) or ATTENTION_BLOCK.search(block):
        return True
    parts, start = path.split("."), block.count(".") + 2
    inside = (model.get_submodule(".".join(parts[:depth])) for depth in range(start, len(parts)))
    return any(MIXERS.search(type(module).__name__) for module in inside)


def is_inside_an_adapter(model: nn.Module, path: str) -> bool:
    """Whether a module belongs to an adapter, or is what an adapter wraps."""
    parts = path.split(".")
    return any(isinstance(model.get_submodule(".".join(parts[:i])), BaseTunerLayer) for i in range(1, len(parts)))


def _is_mixture(module: nn.Module, path: str) -> bool:
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    parts = path.split(".")
    numbers = [depth for depth, part in enumerate(parts) if part.isdigit()]
    if not numbers or ATTENTION.search(".".join(parts[numbers[-1] :])):
        return False
    return isinstance(getattr(module, "experts", None), nn.Module) or _has_router_and_experts(module)


def _has_router_and_experts(module: nn.Module) -> bool:
    """Whether a module holds its experts' weights side by side, without a module for them (JetMoE)."""
    weights = [getattr(child, "weight", None) for child in module.children()]
    return isinstance(getattr(module, "router", None), nn.Module) and any(
        isinstance(weight, nn.Parameter) and weight.dim() == 3 for weight in weights
    )


def block_width(model: nn.Module, path: str) -> int | None:
    """The width d of the states in the block around a module, told by the block's norms; None if it has none.

    Of a mixture of experts it is that of the model's configuration if the norms do not tell it.
    """
    blocks = blocks_around(model, path)
    if not blocks:
        return None
    weights = [
        getattr(child, "weight", None) for child in blocks[-1].children() if "norm" in type(child).__name__.lower()
    ]
    widths = Counter(len(w) for w in weights if isinstance(w, nn.Parameter) and w.dim() == 1)
    if widths:
        return widths.most_common(1)[0][0]
    return _hidden_size(model, path) if _is_mixture(model.get_submodule(path), path) else None


def _hidden_size(model: nn.Module, path: str) -> int | None:
    config = config_around(model, path)
    width = getattr(config.get_text_config() if config is not None else None, "hidden_size", None)
    return width if isinstance(width, int) else None


def config_around(model: nn.Module, path: str) -> Any:
    """The configuration of the nearest model around a module; None if there is none."""
    parts = path.split(".")
    around = (model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts) - 1, -1, -1))
    return next((module.config for module in around if isinstance(module, PreTrainedModel)), None)


def part_of(model: nn.Module, path: str) -> str:
    """Which part of a multimodal model a module belongs to, by `Ending`'s names."""
    if CONNECTORS.search(path):
        return "connector"
    for part, pattern in NAMED_PARTS:
        if pattern.search(path):
            return part
    config = config_around(model, path)
    if config is not getattr(model, "config", None) and SOUND_ENCODER.search(getattr(config, "model_type", "")):
        return "audio"
    parts = path.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        around = model.get_submodule(".".join(parts[:depth]))
        name = getattr(around, "main_input_name", None)
        if name is not None:
            several = len(getattr(around, "input_modalities", None) or ()) > 1 and depth == 0
            return "language" if several else INPUTS.get(name, "language")
    return "language"
