"""The fine-tuning methods of the paper, applied to any of the backbones: one table for all scripts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from peft import LoraConfig, get_peft_model
from script_arguments import check_at_least
from torch import nn

from peft_read import BottleneckConfig, READConfig
from peft_read.baselines import add_prompts, train_only

PEFT_METHODS = ("read", "adapter", "bottleneck", "lora")
METHODS = (*PEFT_METHODS, "prompt", "full", "bias", "partial", "proj", "none")
POSITIONS = ("both", "feed_forward", "attention")


@dataclass
class MethodArguments:
    """The method and its sizes."""

    method: str = field(default="read", metadata={"help": f"one of {', '.join(METHODS)}"})
    r: int = field(default=16, metadata={"help": "width k of READ, Adapter and Bottleneck, rank of LoRA"})
    cell: str = field(default="rnn", metadata={"help": "READ's recurrence: rnn, gru, lstm"})
    bidirectional: bool = field(default=False, metadata={"help": "READ in both directions of time; encoders only"})
    target_modules: str | None = field(
        default=None, metadata={"help": "regular expression of the modules to adapt; default: the method's own"}
    )
    adapter_after: str = field(default="both", metadata={"help": f"of Bottleneck: {', '.join(POSITIONS)}"})
    prompt_length: int = field(default=10, metadata={"help": "vectors before each of the two sequences"})


def check_method(script: MethodArguments) -> None:
    """What can be wrong before the backbone is loaded."""
    if script.method not in METHODS:
        raise ValueError(f"--method {script.method!r} is not one of {', '.join(METHODS)}")
    check_at_least(script, {"r": 1, "prompt_length": 1})
    if script.bidirectional and script.method != "read":
        raise ValueError(f"--bidirectional is READ's; --method {script.method} has no direction")
    READConfig(r=script.r, cell=script.cell, bidirectional=script.bidirectional)
    if script.adapter_after not in POSITIONS:
        raise ValueError(f"--adapter_after {script.adapter_after!r} is not one of {', '.join(POSITIONS)}")
    if script.target_modules is None:
        return
    if script.method not in PEFT_METHODS:
        raise ValueError(f"--target_modules has no meaning with --method {script.method}")
    try:
        re.compile(script.target_modules)
    except re.error as error:
        raise ValueError(f"--target_modules {script.target_modules!r} is not a regular expression: {error}") from error


def apply_method(
    model: nn.Module,
    script: MethodArguments,
    *,
    also: Sequence[str],
    lora_targets: str | Sequence[str],
    bottleneck_targets: Mapping[str, str | None],
    lora_alpha: int = 8,
    task_type: str | None = None,
) -> nn.Module:
    """Wraps or freezes the backbone.

    Args:
        model: the backbone.
        script: the method.
        also: names of modules, or ends of names, that are trained with every method and saved with every adapter.
        lora_targets: of LoRA, where `target_modules` is absent.
        bottleneck_targets: of Bottleneck, by position, where `target_modules` is absent.
        lora_alpha: of LoRA.
        task_type: of peft.
    """
    own = {"modules_to_save": list(also) or None, "task_type": task_type}
    if script.method in ("read", "adapter"):
        cell = script.cell if script.method == "read" else "none"
        return get_peft_model(
            model,
            READConfig(
                r=script.r,
                cell=cell,
                bidirectional=script.bidirectional,
                target_modules=script.target_modules,
                **own,
            ),
        )
    if script.method == "bottleneck":
        targets = script.target_modules or bottleneck_targets[script.adapter_after]
        return get_peft_model(model, BottleneckConfig(r=script.r, target_modules=targets, **own))
    if script.method == "lora":
        targets = script.target_modules or lora_targets
        targets = targets if isinstance(targets, str) else list(targets)
        return get_peft_model(model, LoraConfig(r=script.r, lora_alpha=lora_alpha, target_modules=targets, **own))
    if script.method == "prompt":
        return add_prompts(model, length=script.prompt_length, also=also)
    return train_only(model, script.method, also=[] if script.method == "none" else also)
