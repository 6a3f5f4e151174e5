"""The command line of a script: its parser, and checks of numbers that no training can use."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import HfArgumentParser


class ScriptParser(HfArgumentParser):
    """Transformers' parser; what is wrong with the command line is a ValueError."""

    def error(self, message: str) -> Any:
        """Raises instead of printing the usage."""
        raise ValueError(message)


@contextmanager
def one_line_errors(script: str) -> Iterator[None]:
    """Ends the process with one line, instead of a traceback, where bad input raises ValueError or OSError."""
    try:
        yield
    except (ValueError, OSError) as error:
        sys.exit(f"{script}: {' '.join(str(error).split())}")


def check_numbers(*groups: Any) -> None:
    """Every number of the arguments must be finite."""
    for arguments in groups:
        for name, value in vars(arguments).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"--{name} {value} is not a finite number")


def check_at_least(arguments: Any, bounds: dict[str, float]) -> None:
    """Arguments that are given must not lie below a bound."""
    for name, bound in bounds.items():
        value = getattr(arguments, name)
        if value is not None and value < bound:
            raise ValueError(f"--{name} {value} must be at least {bound}")


def check_heads(arguments: Any) -> None:
    """The width must be a multiple of the number of attention heads."""
    if arguments.d_model % arguments.heads:
        raise ValueError(f"--d_model {arguments.d_model} is not a multiple of --heads {arguments.heads}")


def check_world_size(required: int | None, training: Any) -> None:
    """As many processes must run as `--require_world_size` asks for."""
    if required not in (None, training.world_size):
        raise ValueError(
            f"--require_world_size {required}, but {training.world_size} process(es) run; "
            f"on a CPU use torchrun --nproc_per_node {required}"
        )


def check_training(training: Any) -> None:
    """What Trainer takes and cannot train with."""
    check_numbers(training)
    check_at_least(
        training,
        {
            "per_device_train_batch_size": 1,
            "per_device_eval_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "learning_rate": 0,
            "weight_decay": 0,
            "warmup_steps": 0,
            "max_grad_norm": 0,
            "seed": 0,
        },
    )
    if training.max_steps == 0 or (training.max_steps < 0 and training.num_train_epochs <= 0):
        raise ValueError(
            f"--num_train_epochs {training.num_train_epochs} with --max_steps {training.max_steps} trains nothing"
        )
