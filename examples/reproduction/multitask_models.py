"""VL-BART and VL-T5 with the methods of VL-Adapter and READ, shared over tasks or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from peft_read import BottleneckConfig, CompacterConfig, HyperformerConfig, READConfig
from peft_read.baselines import train_only

METHODS = ("full", "bitfit", "prompt", "lora", "adapter", "compacter", "hyperformer", "read", "read_pvla", "none")
SHARES = ("single", "half_down", "half_up", "multiple")
SHARE_OF_CONFIG = {"single": "all", "half_down": "down", "half_up": "up", "multiple": None}
LORA_TARGETS = {"vl_bart": ["q_proj", "v_proj"], "vl_t5": ["q", "v"]}
VISUAL, PROMPTS = "visual_embedding", "task_prompts"
BESIDE = "beside_adapter.safetensors"  # what was trained outside the adapter


@dataclass
class ModelArguments:
    """The backbone and the method."""

    model_name_or_path: str = field(
        default=str(Path(__file__).parents[1] / "vl_mini_backbone"), metadata={"help": "a VL-BART or VL-T5"}
    )
    method: str = field(default="adapter", metadata={"help": f"one of {', '.join(METHODS)}"})
    share: str = field(default="single", metadata={"help": f"what the tasks share: one of {', '.join(SHARES)}"})
    prompts: bool = field(default=False, metadata={"help": "task prompts beside the method"})
    prompt_length: int = field(default=10, metadata={"help": "vectors before the text"})
    prompt_width: int = field(default=96, metadata={"help": "of the perceptron that makes them"})
    reduction_factor: int = field(default=8, metadata={"help": "of adapters: the bottleneck is d over this"})
    r: int = field(default=16, metadata={"help": "rank of LoRA, width k of READ"})
    lora_alpha: int = 16
    phm_dim: int = field(default=2, metadata={"help": "Compacter's Kronecker products"})
    cell: str = field(default="rnn", metadata={"help": "READ's recurrence: rnn, gru, lstm"})
    train_norms: bool = field(default=True, metadata={"help": "with adapters; --no_train_norms freezes them"})


def check_model_arguments(script: ModelArguments) -> None:
    """What can be wrong before the backbone is loaded."""
    for name, known in (("method", METHODS), ("share", SHARES)):
        if getattr(script, name) not in known:
            raise ValueError(f"--{name} {getattr(script, name)!r} is not one of {', '.join(known)}")
    if script.share.startswith("half") and script.method not in ("adapter", "compacter"):
        raise ValueError(
            f"--share {script.share} shares the down or the up half of adapters; --method {script.method} has none, "
            "use single or multiple"
        )
    if script.share != "single" and script.method in ("full", "bitfit", "none"):
        raise ValueError(f"--share {script.share}: --method {script.method} has one set of weights for all tasks")
    if script.share != "single" and script.method == "hyperformer":
        raise ValueError("--share: Hyperformer's tasks share its generators, and nothing else can be chosen")
    if script.method == "prompt" and script.prompts:
        raise ValueError("--prompts: they are the method already")


def load_backbone(script: ModelArguments, tasks: Sequence[str]) -> nn.Module:
    """A fresh copy, with prompts where they are asked for."""
    config = AutoConfig.from_pretrained(script.model_name_or_path)
    if config.model_type not in LORA_TARGETS:
        raise ValueError(
            f"{script.model_name_or_path} is a {config.model_type!r}; this script takes {' and '.join(LORA_TARGETS)}"
        )
    if script.method == "prompt" or script.prompts:
        config.prompt_length, config.prompt_width = script.prompt_length, script.prompt_width
        config.prompt_tasks = None if script.method == "prompt" and script.share == "single" else list(tasks)
    return AutoModelForSeq2SeqLM.from_pretrained(script.model_name_or_path, config=config)


def adapted(model: nn.Module, script: ModelArguments, tasks: Sequence[str]) -> nn.Module:
    """The backbone with the method of the arguments.

    As in VL-Adapter the visual embedding is trained with every method, the norms with adapters, the biases with LoRA.
    """
    method, tasks = script.method, list(tasks)
    if method == "none":
        return train_only(model, "none")
    also = [VISUAL, *([PROMPTS] if hasattr(model.get_encoder(), PROMPTS) else [])]
    if method in ("full", "bitfit", "prompt"):
        return train_only(model, {"full": "full", "bitfit": "bias", "prompt": "none"}[method], also=also)
    if method in ("adapter", "compacter", "hyperformer"):
        save = also + (text_norms(model) if script.train_norms else [])
        options: dict[str, Any] = {
            "reduction_factor": script.reduction_factor,
            "tasks": tasks,
            "modules_to_save": save,
            "task_type": "SEQ_2_SEQ_LM",
        }
        if method == "hyperformer":
            return get_peft_model(model, HyperformerConfig(**options))
        options["share"] = SHARE_OF_CONFIG[script.share]
        if method == "adapter":
            return get_peft_model(model, BottleneckConfig(**options))
        compact = {"phm_dim": script.phm_dim, "shared_rule": None, "factorized_rank": None}
        return get_peft_model(model, CompacterConfig(**compact, **options))
    config: Any = READConfig(r=script.r, cell=script.cell, task_type="SEQ_2_SEQ_LM")
    if method == "lora":
        targets = LORA_TARGETS[model.config.model_type]
        config = LoraConfig(
            r=script.r,
            lora_alpha=script.lora_alpha,
            target_modules=targets,
            lora_dropout=0.1,
            task_type="SEQ_2_SEQ_LM",
        )
    names = tasks if script.share == "multiple" else ["default"]
    wrapped = get_peft_model(model, config, adapter_name=names[0])
    for name in names[1:]:
        wrapped.add_adapter(name, config)
    wrapped.base_model.set_requires_grad(names)
    # Shared by the adapters of all tasks, so in none of their checkpoints: see `save_trained`.
    for name, parameter in wrapped.named_parameters():
        if any(f".{part}." in name for part in also) or (method == "lora" and name.endswith(".bias")):
            parameter.requires_grad_(True)
    return wrapped


def text_norms(model: nn.Module) -> list[str]:
    """Paths of the norms outside the visual embedding."""
    return [
        name
        for name, module in model.named_modules()
        if ("LayerNorm" in type(module).__name__ or "RMSNorm" in type(module).__name__) and VISUAL not in name
    ]


def save_trained(model: nn.Module, folder: Path) -> None:
    """The adapter, and beside it what else was trained."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PeftModel):
        model.save_pretrained(str(folder))
    save_beside(model, folder)


def save_beside(model: nn.Module, folder: Path) -> None:
    """What was trained outside the adapter, if anything."""
    beside = _beside(model)
    if beside:
        save_file({name: p.detach().cpu().contiguous() for name, p in beside.items()}, folder / BESIDE)


def load_beside(model: nn.Module, folder: Path) -> None:
    """Sets it to what `save_beside` has written into a folder."""
    if (folder / BESIDE).exists():
        own = dict(model.named_parameters())
        with torch.no_grad():
            for name, weight in load_file(folder / BESIDE).items():
                own[name].copy_(weight)


def load_trained(model: nn.Module, script: ModelArguments, tasks: Sequence[str], folder: Path) -> nn.Module:
    """A fresh backbone with what `save_trained` has written."""
    if not (folder / "adapter_config.json").exists() and not any(folder.glob("*/adapter_config.json")):
        model = adapted(model, script, tasks)
    elif (folder / "adapter_config.json").exists():
        model = PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    else:
        first, *others = tasks
        model = PeftModel.from_pretrained(model, str(folder / first), adapter_name=first, is_trainable=True)
        for name in others:
            model.load_adapter(str(folder / name), adapter_name=name, is_trainable=True)
    load_beside(model, folder)
    return model


def _beside(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trained parameters that no adapter's checkpoint holds."""
    inside = ("modules_to_save",)
    if isinstance(model, PeftModel):
        inside += (model.base_model.prefix,)
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not any(part in name for part in inside)
    }
