"""The adapters of several tasks in a Trainer's checkpoint, of which the Trainer alone trains or reads one only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from torch import nn

__all__ = ["adapter_folders", "trained_as_before"]


@contextmanager
def trained_as_before(model: nn.Module) -> Iterator[None]:
    """What is trained when it begins is trained when it ends, and nothing else."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)


def adapter_folders(model: PeftModel, checkpoint: str | Path) -> dict[str, Path]:
    """Where a checkpoint holds each of a model's adapters.

    Args:
        model: its adapters are named as in the checkpoint.
        checkpoint: a folder, with "default" in it and a folder for each other adapter.

    Raises:
        ValueError: other adapters than the model has.
    """
    root = Path(checkpoint)
    folders = {"default": root, **{path.name: path for path in root.iterdir() if path.is_dir()}}
    files = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
    held = {name: folder for name, folder in folders.items() if any((folder / file).is_file() for file in files)}
    if set(held) != set(model.peft_config):
        raise ValueError(
            f"the checkpoint {root} has the adapters {sorted(held)}, and the model {sorted(model.peft_config)}: "
            "give the model the same adapters before it goes on"
        )
    return {name: held[name] for name in model.peft_config}
