"""The fine-tuning methods of the paper, applied to any of the backbones: one table for all scripts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from peft import LoraConfig, get_peft_model
from script_arguments import check_at_least
from torch import nn

from peft_read import READConfig
from peft_read.baselines import add_prompts, train_only

PEFT_METHODS = ("read", "adapter", "lora")
METHODS = (*PEFT_METHODS, "prompt", "full", "bias", "partial", "proj", "none")


@dataclass
class MethodArguments:
    """The method and its sizes."""

    method: str = field(default="read", metadata={"help": f"one of {', '.join(METHODS)}"})
    r: int = field(default=16, metadata={"help": "width k of READ and Adapter, rank of LoRA"})
    cell: str = field(default="rnn", metadata={"help": "READ's recurrence: rnn, gru, lstm"})
    prompt_length: int = field(default=10, metadata={"help": "vectors before each of the two sequences"})


def check_method(script: MethodArguments) -> None:
    """What can be wrong before the backbone is loaded."""
    if script.method not in METHODS:
        raise ValueError(f"--method {script.method!r} is not one of {', '.join(METHODS)}")
    check_at_least(script, {"r": 1, "prompt_length": 1})
    READConfig(r=script.r, cell=script.cell)


def apply_method(
    model: nn.Module,
    script: MethodArguments,
    *,
    also: Sequence[str],
    lora_targets: str | Sequence[str],
    lora_alpha: int = 8,
    target_modules: str | None = None,
    task_type: str | None = None,
) -> nn.Module:
    """Wraps or freezes the backbone.

    Args:
        model: the backbone.
        script: the method.
        also: names of modules, or ends of names, that are trained with every method and saved with every adapter.
        lora_targets: of LoRA, where `target_modules` is absent.
        lora_alpha: of LoRA.
        target_modules: a regular expression of the modules to adapt; each method's own if absent.
        task_type: of peft.
    """
    save = list(also) or None
    if script.method in ("read", "adapter"):
        cell = script.cell if script.method == "read" else "none"
        return get_peft_model(
            model,
            READConfig(
                r=script.r, cell=cell, target_modules=target_modules, modules_to_save=save, task_type=task_type
            ),
        )
    if script.method == "lora":
        targets = target_modules or (lora_targets if isinstance(lora_targets, str) else list(lora_targets))
        config = LoraConfig(
            r=script.r, lora_alpha=lora_alpha, target_modules=targets, modules_to_save=save, task_type=task_type
        )
        return get_peft_model(model, config)
    if script.method == "prompt":
        return add_prompts(model, length=script.prompt_length, also=also)
    return train_only(model, script.method, also=[] if script.method == "none" else also)
