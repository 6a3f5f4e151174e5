"""Checkpoints of VL-Adapter's implementation as models of this project: the backbone and what was added to it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from ..bottleneck import BottleneckConfig, CompacterConfig, HyperformerConfig
from ..models import VLBartConfig, VLBartForConditionalGeneration, VLT5Config, VLT5ForConditionalGeneration
from ..models.original_checkpoints import Checkpoint, load_original_weights, original_state_dict

__all__ = ["load_original"]

BACKBONES: dict[str, tuple[Any, Any]] = {
    "bart": (VLBartConfig, VLBartForConditionalGeneration),
    "t5": (VLT5Config, VLT5ForConditionalGeneration),
}
# The module whose output each of the original's adapters adapts, by the last part of its name.
POSITIONS = {
    "bart": {
        "attn_adapter": "self_attn.out_proj",
        "self_attn_adapter": "self_attn.out_proj",
        "enc_attn_adapter": "encoder_attn.out_proj",
        "ff_adapter": "fc2",
    },
    "t5": {
        "attn_adapter": "SelfAttention.o",
        "enc_attn_adapter": "EncDecAttention.o",
        "ff_adapter": "DenseReluDense.wo",
    },
}
LORA_TARGETS = {"bart": ["q_proj", "v_proj"], "t5": ["q", "v"]}
LORA_ALPHA, LORA_DROPOUT = 32, 0.1  # of the original, where its settings do not tell
NORMS = {
    "bart": ["self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm", "layernorm_embedding"],
    # The original's switch looks for another class of norm than its T5 has, and finds none.
    "t5": [],
}
PROMPT_MODULES = {"encoder": "task_prompts", "decoder": "decoder_prompts"}
PROMPTS_OF = {"0": "embedding", "1": "inner", "3": "outer"}  # by their places in the original's nn.Sequential
SAMPLERS = (
    (r"\.W_left$", ".left"),
    (r"\.W_right$", ".right"),
    (r"\.W$", ".weight"),
    (r"\.b$", ".bias"),
    (r"\.phm_rule$", ".rule.weight"),
)
HYPERNETWORKS = (
    (r"^layer_id_embeddings\.", "layer_embedding."),
    (r"^adapters_block_type\.", "kind_embedding."),
    (r"^task_hypernet\.task_embeding_generator\.", "mlp."),
    (r"^LayerNorm\.", "norm."),
    (r"^(down|up)_sampler_hyper_net\.(\w+)\.0\.", r"generators.shared.\1_sampler.\2."),
    (r"^(\w+)_(down|up)_sampler_hyper_net\.(\w+)\.0\.", r"generators.\1.\2_sampler.\3."),
    (r"^pre_layernorm_hypernet\.", "generators.shared.norm_before."),
    (r"^post_layernorm_hypernet\.", "generators.shared.norm_after."),
    (r"^(\w+)_pre_layernorm_hypernet\.", r"generators.\1.norm_before."),
    (r"^(\w+)_post_layernorm_hypernet\.", r"generators.\1.norm_after."),
)
CLASSES = ("AdapterConfig", "LRAdapterConfig", "CompactorConfig", "MetaAdapterConfig")  # of the original's adapters
SHARED = "shared_over_layers"  # where the bottleneck family keeps what its layers share
NAME = "default"  # of the adapter


@dataclass(frozen=True)
class _Settings:
    """What the original's settings say, besides the backbone's configuration.

    Args:
        backbone: "bart" or "t5".
        flags: the command line, without the dashes; True for a flag without a value.
        tasks: their names.
        adapter: the settings of the adapters; None if there are none.
        lora: those of LoRA.
        prompts: those of the prompts, of the encoder or the decoder or both.
    """

    backbone: str
    flags: Mapping[str, Any]
    tasks: list[str]
    adapter: Mapping[str, Any] | None
    lora: Mapping[str, Any] | None
    prompts: Mapping[str, Mapping[str, Any]]


def load_original(checkpoint: Checkpoint, options: Mapping[str, Any]) -> Any:
    """A model of VL-Adapter's implementation, with everything that was added to its backbone, in evaluation mode.

    Adapters of every kind and LoRA become peft adapters of one model, prompts the model's own; `set_task` chooses the
    task. Trained are the parameters that the original trains: the visual embedding, what was added, and with
    `--unfreeze_layer_norms` the norms (BART's only: on T5 that switch does nothing), with LoRA BART's biases. In a
    peft model the visual embedding, the norms and the prompts are among its `modules_to_save`, so that
    `save_pretrained` writes all that is trained.

    Args:
        checkpoint: a path or a state dict, with or without the prefix of a data-parallel wrapper.
        options: `"backbone"`, "bart" or "t5"; `"config"`, the backbone's configuration by its original names;
            `"options"`, the settings of what was added, `adapter_config` with its `class`, `lora_config`,
            `encoder_prompt_config`, `decoder_prompt_config`; `"tasks"`, their names; `"original_flags"`, the command
            line as a list.

    Returns:
        A `PeftModel`, or the backbone itself where it has no adapter.

    Raises:
        ValueError: the settings ask for something else, or the weights do not fit them.
    """
    weights = original_state_dict(checkpoint)
    settings = _read(options, weights)
    config_class, model_class = BACKBONES[settings.backbone]
    config = config_class.from_original_options(options, **_prompt_fields(settings))
    base = model_class.from_original_checkpoint(_with_prompts(weights, settings), config)
    base.requires_grad_(False)
    model = _add(base, settings, weights)
    _unfreeze(base, settings)
    return model.eval()


def _read(options: Mapping[str, Any], weights: Mapping[str, Tensor]) -> _Settings:
    backbone = options.get("backbone") or ("t5" if "shared.weight" in weights else "bart")
    if backbone not in BACKBONES:
        raise ValueError(f"backbone={backbone!r} is not one of {sorted(BACKBONES)}")
    flags: dict[str, Any] = {}
    name = ""
    for part in options.get("original_flags") or ():
        if part.startswith("--"):
            name = part.removeprefix("--")
            flags[name] = True
        else:
            flags[name] = part
    added: Mapping[str, Any] = options.get("options") or {}
    if flags.get("use_lm_head_adapter"):
        raise ValueError("--use_lm_head_adapter: an adapter beside the output layer is not part of these models")
    named = options.get("tasks") or re.split("[, ]+", flags.get("tasks") or "")
    tasks = [str(task) for task in named if task]
    adapter = added.get("adapter_config")
    prompts = {side: settings for side in ("encoder", "decoder") if (settings := added.get(f"{side}_prompt_config"))}
    if "decoder" in prompts and backbone == "t5":
        raise ValueError("decoder_prompt_config: the original's VL-T5 has no prompts of the decoder")
    if (adapter or prompts) and not tasks:
        raise ValueError("the settings name no tasks: give them as options['tasks']")
    if adapter and adapter.get("class") not in CLASSES:
        raise ValueError(f"adapter_config: class {adapter.get('class')!r} is unknown")
    for unknown in ("shared_W_phm", "factorized_phm_rule", "train_task_embeddings"):
        if adapter and adapter.get(unknown):
            raise ValueError(f"adapter_config: {unknown}=True is not part of this project")
    has_lora = any(".lora_As." in key for key in weights)
    lora = added.get("lora_config") or {}
    return _Settings(backbone, flags, tasks, adapter or None, lora if has_lora else None, prompts)


def _prompt_fields(settings: _Settings) -> dict[str, Any]:
    """The fields of the configuration that the prompts' settings ask for."""
    if not settings.prompts:
        return {}
    lengths = {side: prompts["prompt_len"] for side, prompts in settings.prompts.items()}
    any_side = next(iter(settings.prompts.values()))
    fields = {
        "prompt_length": lengths.get("encoder", 0),
        "prompt_width": any_side["mid_dim"],
        "prompt_tasks": None if any_side.get("use_single_prompt") else settings.tasks,
    }
    return {**fields, "decoder_prompt_length": lengths["decoder"]} if "decoder" in lengths else fields


def _with_prompts(weights: Mapping[str, Tensor], settings: _Settings) -> dict[str, Tensor]:
    """The weights, those of the prompts under their names here."""

    def renamed(match: re.Match) -> str:
        stack, task, place = match.groups()
        single = settings.prompts["encoder" if stack else "decoder"].get("use_single_prompt")
        module = "encoder.task_prompts" if stack else "decoder_prompts"
        return f"{module}.{'' if single else f'prompts.{task}.'}{PROMPTS_OF[place]}."

    if not settings.prompts:
        return dict(weights)
    pattern = r"(encoder\.)?prompt_modules\.prompts\.(\w+)\.prefix_embedding\.(\d)\."
    return _renamed(weights, lambda key: re.sub(pattern, renamed, key))


def _renamed(weights: Mapping[str, Tensor], rename: Any) -> dict[str, Tensor]:
    """The weights under new names; tied weights may come to share one.

    Raises:
        ValueError: two weights with different values come to share a name.
    """
    renamed: dict[str, Tensor] = {}
    for key, value in weights.items():
        name = rename(key)
        if name in renamed and not torch.equal(renamed[name], value):
            raise ValueError(f"{key} should be shared by the tasks, and differs from another task's")
        renamed[name] = value
    return renamed


def _add(base: Any, settings: _Settings, weights: Mapping[str, Tensor]) -> Any:
    """Put the adapters of the settings into the backbone, with their weights."""
    saved = ["visual_embedding", *(PROMPT_MODULES[side] for side in settings.prompts)]
    if settings.flags.get("unfreeze_layer_norms"):
        saved += NORMS[settings.backbone]
    if settings.lora is not None:
        return _add_lora(base, settings, settings.lora, weights, saved)
    if settings.adapter is None:
        return base
    config = _adapter_config(settings, settings.adapter, base.config.d_model, saved)
    model = get_peft_model(base, config)
    inner = model.get_base_model()
    prefix: str = model.base_model.prefix  # type: ignore[assignment]
    original = {
        key: value for key, value in weights.items() if re.search(r"_adapter\.|hyper_net\.|task_embed\.|phm_rule", key)
    }
    if isinstance(config, HyperformerConfig):
        original = _keep_unused(inner, original)
        translated = _renamed(original, lambda key: _name_in_hypernetworks(key, prefix))
    else:
        translated = _renamed(original, lambda key: _name_in_bottleneck(key, prefix, config, settings))
    load_original_weights(inner, translated, expected=lambda key: prefix in key)
    return model


def _adapter_config(
    settings: _Settings, adapter: Mapping[str, Any], width: int, saved: Sequence[str]
) -> BottleneckConfig:
    positions = dict(POSITIONS[settings.backbone])
    if settings.flags.get("add_adapter_cross_attn", "True") in ("False", "false", "0", False):
        del positions["enc_attn_adapter"]
    fields: dict[str, Any] = {
        "r": width // adapter["reduction_factor"],
        "activation": adapter["non_linearity"].lower(),
        "target_modules": sorted(set(positions.values())),
        "modules_to_save": list(saved),
        "norm_before": adapter["add_layer_norm_before_adapter"],
        "norm_after": adapter["add_layer_norm_after_adapter"],
        "init_weights": "original",
        "tasks": settings.tasks,
    }
    if adapter["class"] == "MetaAdapterConfig":
        return HyperformerConfig(
            **fields,
            task_embedding_dim=adapter["task_embedding_dim"],
            hidden_dim=adapter["task_hidden_dim"],
            projected_dim=adapter["projected_task_embedding_dim"],
            shared_generator=adapter["efficient_unique_hyper_net"],
        )
    halves = [half for half in ("down", "up") if adapter.get(f"share_{half}_sampler")]
    share = "all" if adapter["use_single_adapter"] or len(halves) == 2 else halves[0] if halves else None
    if adapter["class"] == "LRAdapterConfig":
        return BottleneckConfig(**fields, share=share, low_rank=adapter["low_rank_rank"])
    if adapter["class"] == "AdapterConfig":
        return BottleneckConfig(**fields, share=share)
    over_tasks = adapter.get("shared_phm_rule_over_tasks") and not adapter["use_single_adapter"]
    rule = "model" if adapter["shared_phm_rule"] else "tasks" if over_tasks else None
    return CompacterConfig(
        **fields,
        share=share,
        phm_dim=adapter["hypercomplex_division"],
        shared_rule=rule,
        factorized_rank=adapter["phm_rank"] if adapter["factorized_phm"] else None,
    )


def _name_in_bottleneck(key: str, prefix: str, config: BottleneckConfig, settings: _Settings) -> str:
    """The name of a weight of the original's adapters in ours."""
    parts = f"{prefix}parts.{NAME}"
    shared_rule = getattr(config, "shared_rule", None)
    if shared_rule == "model" and key.endswith("phm_rule"):
        return f"{SHARED}.{parts}.rule.weight"
    match = re.fullmatch(r"(.*)\.(\w+_adapter)\.(.*)", key)
    assert match is not None
    block, kind, rest = match.groups()
    rest = rest.replace("pre_layer_norm.", "norm_before.").replace("post_layer_norm.", "norm_after.")
    sampler = re.fullmatch(r"adapters\.(\w+)\.(down|up)_sampler\.(.*)", rest)
    if sampler is not None:
        task, half, weight = sampler.groups()
        if shared_rule == "tasks" and weight == "phm_rule":
            rest = f"{half}_rule.weight"
        else:
            apart = f"task_{task}." if config.tasks_apart(half) else ""
            rest = f"{half}_sampler.{apart}{weight}"
            for old, new in SAMPLERS:
                rest = re.sub(old, new, rest)
    return f"{block}.{POSITIONS[settings.backbone][kind]}.{parts}.{rest}"


def _name_in_hypernetworks(key: str, prefix: str) -> str:
    """The name of a weight of the original's hypernetworks in ours."""
    parts = f"{SHARED}.{prefix}parts.{NAME}"
    task = re.search(r"task_embed\.task_to_embeddings\.(\w+)$", key)
    if task is not None:  # the stacks' embeddings of tasks are the shared ones under further names
        return f"{parts}.task_embeddings.task_{task[1]}"
    match = re.fullmatch(r"(?:model\.)?(encoder|decoder)\.adapter_layers_hyper_net\.(.*)", key)
    assert match is not None
    stack, rest = match.groups()
    for old, new in HYPERNETWORKS:
        rest = re.sub(old, new, rest)
    return f"{parts}.stacks.{stack}.{rest}"


def _keep_unused(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights without generators of norms after a cross-attention that the encoder does not have.

    The original makes, trains and never uses them. They stay with the model, so that it trains what the original
    trains, and are in no adapter checkpoint.
    """
    unused = {
        key: value for key, value in weights.items() if re.search(r"encoder\..*cross_attention_.*layernorm", key)
    }
    if unused:
        kept = {
            key.rpartition("hyper_net.")[2].replace(".", "_"): nn.Parameter(value) for key, value in unused.items()
        }
        model.add_module("unused_generators", nn.ParameterDict(kept))
    return {key: value for key, value in weights.items() if key not in unused}


def _add_lora(
    base: Any, settings: _Settings, lora: Mapping[str, Any], weights: Mapping[str, Tensor], saved: Sequence[str]
) -> Any:
    """LoRA through peft: one adapter for all tasks, or one per task, named after it.

    What the tasks share, the visual embedding and the biases, belongs to the first adapter; `set_task` leaves it on.
    """
    factors = {key: value for key, value in weights.items() if ".lora_As." in key or ".lora_Bs." in key}
    single = bool(lora.get("use_single_lora") or settings.flags.get("use_single_lora"))
    tasks = sorted({key.rpartition(".")[2] for key in factors}, key=settings.tasks.index)
    names = [NAME] if single else tasks
    model: Any = base
    for name in names:
        first = name == names[0]
        config = LoraConfig(
            r=next(len(value) for key, value in factors.items() if ".lora_As." in key),
            lora_alpha=_whole(float(lora.get("lora_alpha") or settings.flags.get("lora_alpha") or LORA_ALPHA)),
            lora_dropout=float(lora.get("lora_dropout", LORA_DROPOUT)),
            target_modules=LORA_TARGETS[settings.backbone],
            bias="all" if first and settings.backbone == "bart" else "none",
            modules_to_save=list(saved) if first else None,
        )
        if first:
            model = get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    model.base_model.set_requires_grad(names)

    def rename(key: str) -> str:
        place, factor, task = re.fullmatch(r"(.*)\.lora_([AB])s\.(\w+)", key).groups()  # type: ignore[union-attr]
        return f"{place}.lora_{factor}.{NAME if single else task}.weight"

    load_original_weights(
        model.get_base_model(), _renamed(factors, rename), expected=lambda key: ".lora_A." in key or ".lora_B." in key
    )
    return model


def _whole(number: float) -> Any:
    return int(number) if number.is_integer() else number


def _unfreeze(base: nn.Module, settings: _Settings) -> None:
    """Let the backbone's own parameters be trained as the original's switches say."""
    flags, norms = settings.flags, set(NORMS[settings.backbone])
    for name, parameter in base.named_parameters():
        parts = set(name.split("."))
        trained = (
            flags.get("unfreeze_language_model")
            or parts & {"visual_embedding", *PROMPT_MODULES.values()}
            or (flags.get("unfreeze_layer_norms") and parts & norms)
            or (flags.get("unfreeze_lm_head") and parts & {"lm_head", "shared"})
            # The original's VL-T5 has no LoRA, and its switch frees what is called a bias.
            or (flags.get("use_lora") and settings.lora is None and "bias" in name)
        )
        if trained and "original_module" not in parts:
            parameter.requires_grad_(True)
