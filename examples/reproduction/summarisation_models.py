"""The backbones of `how2_summarize.py`, and the fine-tuning methods applied to them."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from methods import MethodArguments, apply_method
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, GenerationConfig

from peft_read.baselines import add_prompts
from peft_read.models import VGBartForConditionalGeneration, VGT5ForConditionalGeneration
from peft_read.models.vision_guidance import VISUAL_MODULES

# New visual modules on a plain checkpoint: the best published variant, with padding kept out of the fusion. VG-T5
# builds a visual transformer and never calls it; here it is part of the model.
NEW_MODULES = {"use_forget_gate": True, "use_img_trans": True, "mask_fusion": True}


@dataclass(frozen=True)
class Backbone:
    """What the script must know about one kind of summariser."""

    model: Any
    plain: str  # model type of the text-only checkpoints that can become one
    lora_targets: tuple[str, ...]
    norms_of_text: frozenset[str]  # norms that the plain encoder has under a name of VISUAL_MODULES
    new_modules: dict[str, Any] = field(default_factory=dict)


BACKBONES = {
    "vg_bart": Backbone(VGBartForConditionalGeneration, "bart", ("q_proj", "v_proj"), frozenset(), NEW_MODULES),
    "vg_t5": Backbone(
        VGT5ForConditionalGeneration,
        "t5",
        ("q", "v"),
        frozenset({"final_layer_norm"}),
        {**NEW_MODULES, "apply_img_trans": True},
    ),
}


@dataclass
class ModelArguments(MethodArguments):
    """The model and the method."""

    model_name_or_path: str = field(
        default=str(Path(__file__).parents[1] / "how2_mini_backbone"),
        metadata={"help": "a VG-BART or VG-T5, or a plain BART, T5 or flan-T5, which gets new visual modules"},
    )
    backbone: str | None = field(
        default=None, metadata={"help": f"{' or '.join(BACKBONES)}; the checkpoint says so itself, this must agree"}
    )
    new_visual_modules: str = field(
        default="{}", metadata={"help": 'JSON: options of new visual modules, such as {"mask_fusion": false}'}
    )
    dropout: float | None = field(default=None, metadata={"help": "overrides every dropout of the backbone"})


def check_backbone(script: ModelArguments, width: int) -> None:
    """Whether the script can adapt this model to features of this width."""
    config, path = AutoConfig.from_pretrained(script.model_name_or_path), script.model_name_or_path
    kind = kind_of(config)
    if kind is None:
        known = ", ".join(f"{name} and {backbone.plain}" for name, backbone in BACKBONES.items())
        raise ValueError(f"{path} is a {config.model_type!r}; this script takes {known}")
    if script.backbone not in (None, kind):
        raise ValueError(f"--backbone {script.backbone}, but {path} is a {config.model_type!r}, which gives {kind}")
    expected = getattr(config, "visual_feature_dim", width)
    if expected != width:
        raise ValueError(f"the video features are {width} wide, but {path} takes {expected}")
    if options_of_new_modules(script, kind) and config.model_type == kind:
        raise ValueError(f"--new_visual_modules is for plain checkpoints; {path} is a {kind} with its own")


def check_weights(path: str) -> None:
    """Whether the weights of a local checkpoint can be opened to their end."""
    for file in sorted(Path(path).glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{file} holds no whole weights: {error}") from error


def options_of_new_modules(script: ModelArguments, kind: str) -> dict[str, Any]:
    """`--new_visual_modules`, checked."""
    try:
        options = json.loads(script.new_visual_modules)
    except json.JSONDecodeError as error:
        raise ValueError(f"--new_visual_modules {script.new_visual_modules!r} is not valid JSON: {error}") from error
    known = set(inspect.signature(BACKBONES[kind].model.config_class).parameters) - {"kwargs", "visual_feature_dim"}
    if not isinstance(options, dict) or set(options) - known:
        raise ValueError(f"--new_visual_modules {script.new_visual_modules} must be options among {sorted(known)}")
    return options


def kind_of(config: Any) -> str | None:
    """The kind of summariser that a checkpoint with this configuration is, or can become."""
    return next((name for name, b in BACKBONES.items() if config.model_type in (name, b.plain)), None)


def load_backbone(script: ModelArguments, width: int) -> tuple[nn.Module, list[str]]:
    """The backbone, and the names of its modules that are new (not pretrained) and must therefore be trained."""
    config = AutoConfig.from_pretrained(script.model_name_or_path)
    kind = str(kind_of(config))
    backbone = BACKBONES[kind]
    new: list[str] = []
    if config.model_type == backbone.plain:
        options = {**backbone.new_modules, **options_of_new_modules(script, kind)}
        model = backbone.model.from_plain_checkpoint(script.model_name_or_path, visual_feature_dim=width, **options)
        names = VISUAL_MODULES - backbone.norms_of_text
        children = model.get_encoder().named_children()
        new = [
            f"encoder.{name}" for name, module in children if name in names and any(True for _ in module.parameters())
        ]
    else:
        model = backbone.model.from_pretrained(script.model_name_or_path)
    if script.dropout is not None:
        set_dropout(model, script.dropout)
    return model, new


def set_dropout(model: nn.Module, probability: float) -> None:
    """Sets every dropout, the modules and the numbers that functions are given."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
            continue
        for name in ("dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, probability)


def generation_config(model: nn.Module, *, num_beams: int, max_length: int) -> GenerationConfig:
    """The original's settings: beams, no repeated 3-gram, early stopping; BART alone ends at the length limit."""
    config: Any = model.config
    return GenerationConfig(
        num_beams=num_beams,
        max_length=max_length,
        early_stopping=num_beams > 1,
        no_repeat_ngram_size=3,
        decoder_start_token_id=config.decoder_start_token_id,
        bos_token_id=getattr(config, "bos_token_id", None),
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        forced_eos_token_id=config.eos_token_id if config.model_type == "vg_bart" else None,
    )


def adapted(model: nn.Module, new_modules: list[str], script: ModelArguments) -> nn.Module:
    """The backbone with the method of the arguments."""
    targets = BACKBONES[model.config.model_type].lora_targets
    return apply_method(
        model,
        script,
        also=new_modules,
        lora_targets=targets,
        bottleneck_targets={"both": None, "attention": "attention", "feed_forward": "feed_forward"},
        task_type="SEQ_2_SEQ_LM",
    )


def save_prompts(model: nn.Module, folder: Path) -> None:
    """The prompts and the new modules, without the frozen backbone."""
    folder.mkdir(parents=True, exist_ok=True)
    trained = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    save_file(trained, folder / "prompts.safetensors")


def load_prompts(model: nn.Module, folder: Path) -> nn.Module:
    """A fresh backbone with the prompts of `save_prompts`."""
    weights = load_file(folder / "prompts.safetensors")
    model = add_prompts(model, length=len(weights["prompts.text"]))
    with torch.no_grad():
        own = dict(model.named_parameters())
        for name, weight in weights.items():
            own[name].copy_(weight)
    return model
