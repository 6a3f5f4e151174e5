"""The mean of the weights at the last checkpoints of a training, which needs no choice of an epoch.

Source: Vaswani et al., "Attention is all you need" (2017), section 6.1, average the last checkpoints; Izmailov et al.,
"Averaging weights leads to wider optima" (2018), say why it helps under a constant learning rate. The checkpoints are
files, so that a training that was interrupted has the mean of an uninterrupted one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_model
from torch import nn


@dataclass
class AveragingArguments:
    """Which weights are measured and saved."""

    average_checkpoints: int = field(
        default=0, metadata={"help": "measure the mean of the weights at the last N checkpoints; 0: no mean"}
    )


def check_averaging(script: AveragingArguments, training: Any) -> None:
    """Whether the training will write as many checkpoints; it is made to keep them.

    Raises:
        ValueError: it will not, or the best of them is to be chosen.
    """
    wanted = script.average_checkpoints
    if not wanted:
        return
    if wanted < 0:
        raise ValueError(f"--average_checkpoints {wanted} must not be negative")
    if training.load_best_model_at_end:
        raise ValueError("--average_checkpoints takes the mean, --load_best_model_at_end the best: choose one")
    kind, steps, each = training.save_strategy, training.max_steps, training.save_steps
    if kind == "steps" and steps > 0 and each >= 1 and steps % each == 0:
        written = steps / each
    elif kind == "epoch" and steps < 0:
        written = training.num_train_epochs
    else:
        raise ValueError(
            "--average_checkpoints needs checkpoints at equal distances up to the last step: --save_strategy epoch, "
            "or --save_strategy steps with --max_steps a multiple of --save_steps"
        )
    if written < wanted:
        raise ValueError(f"--average_checkpoints {wanted}, but the training writes {written:g}")
    if training.save_total_limit is not None:
        training.save_total_limit = max(training.save_total_limit, wanted)


@torch.no_grad()
def average_checkpoints(model: nn.Module, folder: str | Path, count: int) -> list[int]:
    """Gives every trained parameter its mean over the last checkpoints.

    Args:
        model: the trained model, without wrappers other than peft's.
        folder: of the `checkpoint-<step>` folders.
        count: how many.

    Returns:
        The steps of the checkpoints.

    Raises:
        ValueError: there are fewer.
    """
    found = {
        int(match.group(1)): path
        for path in Path(folder).glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }
    steps = sorted(found)[-count:]
    if len(steps) < count:
        raise ValueError(f"{folder} has the checkpoints {steps}, and {count} are to be averaged")
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    sums = {name: torch.zeros_like(parameter, dtype=torch.float64) for name, parameter in trained.items()}
    for step in steps:
        _load(model, found[step])
        for name, parameter in trained.items():
            sums[name] += parameter
    for name, parameter in trained.items():
        parameter.copy_(sums[name] / count)
    return steps


def _load(model: nn.Module, checkpoint: Path) -> None:
    if isinstance(model, PeftModel):
        set_peft_model_state_dict(model, load_peft_weights(str(checkpoint), device="cpu"))
    else:
        load_model(model, checkpoint / "model.safetensors")
