"""Where a model's feed-forward blocks end, found from its structure: READ's default targets."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .stacks import EXPERTS, blocks_around, is_causal

__all__ = [
    "PARTS",
    "Ending",
    "block_width",
    "default_targets",
    "feed_forward_endings",
    "in_and_out",
    "linear_targets",
    "sets_in",
]

PARTS = ("language", "vision", "audio", "all")

# Below a block, what mixes tokens is no feed-forward block; between two models, what joins them is neither's block.
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
# Their projections see (T, B, d), global tokens or tokens padded once more, in a block that sees (B, T, d).
OWN_LAYOUT = re.compile(r"(Longformer|LEDEncoder)SelfAttention$|GlobalLocalAttention$|MLCDAttention$")
# Vectors per layer that are added to the states, layers before the last that have the widths of a last one, and
# layers that see the tokens of one kind alone.
NO_ENDING = re.compile(r"(^|\.)per_layer|laurel|(^|\.)intermediate(_query)?(\.|$)|(^|\.)audio_mlp\.")
SOUND_ENCODER = re.compile(r"(speech|audio).*encoder")
NAMED_PARTS = (
    ("vision", re.compile(r"vision|visual|image|video|pixel|(^|[._])sam([._]|$)|vit(_|\.|$)", re.IGNORECASE)),
    ("audio", re.compile(r"audio|speech_(?!model|to)|acoustic|sound", re.IGNORECASE)),
    ("other", re.compile(r"protein|timestamp", re.IGNORECASE)),
)
INPUTS = {
    "pixel_values": "vision",
    "pixel_values_videos": "vision",
    "input_features": "audio",
    "input_values": "audio",
}


@dataclass(frozen=True)
class Ending:
    """The module that puts out what a feed-forward block computes.

    Args:
        path: its path in the model.
        width: the width d of its output.
        part: "language", "vision", "audio", "other", or "connector" for what joins two of them.
    """

    path: str
    width: int
    part: str


def in_and_out(module: nn.Module) -> tuple[int, int] | None:
    """The widths of a linear-like module's input and output, quantised ones included; None if it is none."""
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
        found = getattr(module, inputs, None), getattr(module, outputs, None)
        if isinstance(found[0], int) and isinstance(found[1], int):
            return found[0], found[1]
    return None


def feed_forward_endings(model: nn.Module) -> list[Ending]:
    """The last module of every feed-forward block of a model, in the model's order.

    It is the linear layer d_ff -> d beside which, in the same block, a linear layer d -> d_ff (or 2 d_ff, where a gate
    is fused with it) stands; of a mixture of experts, which has no last layer, the mixture itself.

    Args:
        model: any model whose blocks stand in module lists.
    """
    modules = {name: module for name, module in model.named_modules() if not _is_inside_an_adapter(model, name)}
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
        block = _block_of(model, name)
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
        found = [
            widths
            for other, widths in linear.items()
            if other != name and other.startswith(f"{around}.") and not ATTENTION.search(other[len(block) :])
        ]
        if found:
            return found
    return []


def _block_of(model: nn.Module, path: str) -> str | None:
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


def _is_inside_an_adapter(model: nn.Module, path: str) -> bool:
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
    config = _config_around(model, path)
    width = getattr(config.get_text_config() if config is not None else None, "hidden_size", None)
    return width if isinstance(width, int) else None


def _config_around(model: nn.Module, path: str) -> Any:
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
    config = _config_around(model, path)
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


def default_targets(model: nn.Module, part: str | None = None, *, as_list: bool = False) -> set[str] | str:
    """The names of the modules that READ adapts unless it is told which.

    Args:
        model: the model.
        part: "language", "vision" or "audio": the feed-forward blocks of that part; "all": every one. If absent, those
            of the language model of a model that generates text, every one but connectors of other models.
        as_list: whether a list of names is needed, which `layers_to_transform` goes with.

    Returns:
        `target_modules`: names, or a regular expression where no names select these modules alone.

    Raises:
        ValueError: if no such block is found, with the names of the linear layers that there are.
    """
    endings = feed_forward_endings(model)
    parts = {ending.part for ending in endings}
    if part in ("language", "vision", "audio"):
        chosen = [ending for ending in endings if ending.part == part]
    elif part == "all":
        chosen = endings
    else:
        chosen = [ending for ending in endings if ending.part != "connector"]
        language = [ending for ending in chosen if ending.part == "language"]
        if len(parts) > 1 and language and _writes_text(model, language):
            chosen = [ending for ending in chosen if ending in language or _is_no_model_of_its_own(model, ending.path)]
    if not chosen:
        raise ValueError(_nothing_found(model, part, parts))
    paths = [ending.path for ending in chosen]
    return _names_of(paths, [name for name, _ in model.named_modules()], as_list=as_list)


def linear_targets(model: nn.Module) -> tuple[set[str] | str, list[str]] | None:
    """What "all-linear" means to READ: the linear layers of the blocks, which see the tokens of a sequence.

    Pooling and language-modelling heads, classifiers and embeddings of patches see one vector per example, or the
    tokens that a caller asks for; routers, projections of positions and of step sizes see no states of the tokens.

    Args:
        model: the model.

    Returns:
        `target_modules`, and the layers left out; None if the model has no blocks.
    """
    chosen: list[str] = []
    left_out: list[str] = []
    for name, module in model.named_modules():
        if in_and_out(module) is None or _is_inside_an_adapter(model, name):
            continue
        block = _block_of(model, name)
        seen = block is not None and not NO_SEQUENCE.search(name) and not EXPERTS.search(name)
        parent = model.get_submodule(name.rpartition(".")[0])
        seen = seen and not OWN_LAYOUT.search(type(parent).__name__)
        # DeBERTa's projections of keys and queries, where they project relative positions too.
        seen = seen and not (getattr(parent, "share_att_key", False) and re.search(r"(key|query)_proj$", name))
        (chosen if seen else left_out).append(name)
    if not chosen:
        return None
    return _names_of(chosen, [name for name, _ in model.named_modules()], as_list=False), left_out


def _is_no_model_of_its_own(model: nn.Module, path: str) -> bool:
    """Whether a part has the configuration of the whole, as the encoder of a speech recogniser has."""
    config = _config_around(model, path)
    return config is not None and config is getattr(model, "config", None)


def _writes_text(model: nn.Module, language: list[Ending]) -> bool:
    can_generate = getattr(model, "can_generate", None)
    return bool(can_generate and can_generate()) or any(is_causal(model, ending.path) for ending in language)


def _nothing_found(model: nn.Module, part: str | None, parts: set[str]) -> str:
    family = getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__
    linear = Counter(
        re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name) for name, module in model.named_modules() if in_and_out(module)
    )
    names = ", ".join(f"'{name}'" for name, _ in linear.most_common(12)) or "none"
    if part in ("language", "vision", "audio") and parts:
        found = f"has no feed-forward blocks in a part {part!r}, only in {', '.join(map(repr, sorted(parts)))}"
    else:
        found = "has no feed-forward blocks that READ knows by their structure"
    return (
        f"Please specify `target_modules` in `peft_config`: {family!r} {found}. Its linear layers are {names}; name "
        "those that end a feed-forward block."
    )


def _names_of(paths: list[str], everything: list[str], *, as_list: bool) -> set[str] | str:
    """Paths as `target_modules` takes them.

    Returns:
        The shortest endings of the paths that select these modules and nothing else, by peft's rule for lists; where
        there are none, a regular expression with the same property, or the paths themselves if a list is needed.
    """
    chosen = set(paths)
    by_ending: dict[str, set[str]] = {}
    for name in everything:
        for ending in _endings(name):
            by_ending.setdefault(ending, set()).add(name)
    found = {
        path: next((e for e in _endings(path) if by_ending[e] <= chosen and not _has_number(e)), None)
        for path in paths
    }
    if None not in found.values():
        return set(found.values())  # type: ignore[arg-type]
    if as_list:
        return chosen
    by_pattern: dict[str, set[str]] = {}
    for name in everything:
        for ending in _endings(name):
            by_pattern.setdefault(_any_number(ending), set()).add(name)
    patterns = {
        next((p for p in map(_any_number, _endings(path)) if by_pattern[p] <= chosen), re.escape(path))
        for path in paths
    }
    return rf"(.*\.)?({'|'.join(sorted(patterns))})"


def _endings(name: str) -> list[str]:
    """`a.b.c` -> `c`, `b.c`, `a.b.c`."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]


def _has_number(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


def _any_number(name: str) -> str:
    """A pattern of a path with any number in the place of each number."""
    return r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in name.split("."))


def sets_in(model: nn.Module) -> str | None:
    """A pattern of the blocks whose states are object queries, a set without an order; None if there are none.

    These are the decoders of models that look for a fixed number of objects in an image or a video (DETR and its
    relatives).

    Args:
        model: the model.
    """
    config: Any = getattr(model, "config", None)
    counts = ("num_queries", "num_object_queries", "num_detection_tokens")
    # A projector's learned queries have a number too, but then the model reads text.
    reads_images = getattr(model, "main_input_name", None) == "pixel_values"
    if not reads_images or not any(isinstance(getattr(config, name, None), int) for name in counts):
        return None
    inside = {name for name, module in model.named_modules() if in_and_out(module) and "decoder" in name.split(".")}
    return r".*decoder\..*" if inside else None
