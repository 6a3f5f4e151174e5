"""The alignment loss as the examples' scripts are given it, and the PVLAConfig that it makes."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from script_arguments import check_at_least
from torch import nn

from peft_read import PVLAConfig
from peft_read.alignment import preset_streams

# How the weight goes from the start of the training (0) to its end (1), times `--pvla_weight`.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "decay": lambda progress: max(0.0, 1.0 - progress),
    "grow": lambda progress: min(1.0, progress),
}


@dataclass
class AlignmentArguments:
    """How much is aligned, and which states."""

    pvla_weight: float = 0.1
    pvla_schedule: str = field(default="constant", metadata={"help": f"of the weight: {', '.join(SCHEDULES)}"})
    pvla_mass: float = 0.5
    pvla_reg: float = field(default=0.05, metadata={"help": "the entropic regularisation"})
    pvla_distance: str = "partial_ot"
    pvla_blocks: str = field(default="all", metadata={"help": "all, or comma-separated indices"})
    pvla_modules: str | None = field(
        default=None,
        metadata={"help": "regular expression of modules to align instead of the blocks; of one joint sequence only"},
    )


def check_alignment(script: AlignmentArguments) -> None:
    """What can be wrong before the backbone is loaded."""
    check_at_least(script, {"pvla_weight": 0})
    if script.pvla_schedule not in SCHEDULES:
        raise ValueError(f"--pvla_schedule {script.pvla_schedule!r} is not one of {', '.join(SCHEDULES)}")
    if not re.fullmatch(r"all|-?\d+(,-?\d+)*", script.pvla_blocks):
        raise ValueError(f"--pvla_blocks {script.pvla_blocks!r} is neither 'all' nor comma-separated indices")
    if script.pvla_modules is not None:
        try:
            re.compile(script.pvla_modules)
        except re.error as error:
            raise ValueError(f"--pvla_modules {script.pvla_modules!r} is not a regular expression: {error}") from error
    _config(script)


def alignment(script: AlignmentArguments, model: nn.Module) -> PVLAConfig:
    """The alignment of the backbone's preset streams, or of other modules of the same sequence.

    Args:
        script: the arguments.
        model: the backbone, wrapped or not.

    Raises:
        ValueError: `--pvla_modules` on a backbone whose video and text are different sequences.
    """
    config = _config(script)
    if script.pvla_modules is None:
        return config
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    video, language = preset_streams(base)
    if video.modules != language.modules:
        raise ValueError(
            f"--pvla_modules names modules that see video and text in one sequence; {type(base).__name__} has a "
            "sequence for each: build a PVLAConfig with two Streams instead"
        )
    modules = script.pvla_modules
    return replace(config, video=replace(video, modules=modules), language=replace(language, modules=modules))


def _config(script: AlignmentArguments) -> PVLAConfig:
    blocks: Any = script.pvla_blocks
    if blocks != "all":
        blocks = [int(index) for index in blocks.split(",")]
    weight, schedule = script.pvla_weight, SCHEDULES[script.pvla_schedule]
    return PVLAConfig(
        weight=weight if script.pvla_schedule == "constant" else lambda progress: weight * schedule(progress),
        mass=script.pvla_mass,
        reg=script.pvla_reg,
        distance=script.pvla_distance,
        blocks=blocks,
    )
