"""Reads checkpoints of the original implementations: files, wrappers and key names."""

from __future__ import annotations

import argparse
import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

__all__ = ["load_original_weights", "original_state_dict"]

Checkpoint = str | os.PathLike | Mapping[str, Any]


def original_state_dict(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The flat state dict inside a checkpoint.

    Accepted are a path or an object in memory; bare state dicts, `{"model": ...}` (Moment-DETR), `{"state_dict": ...}`
    (nncore and Lightning), and the prefix `module.` that data-parallel wrappers leave behind.

    Args:
        checkpoint: path of a `.safetensors` file or of anything `torch.load` reads, or the loaded object.

    Raises:
        ValueError: the file holds objects that cannot be read safely, or no tensors.
    """
    if isinstance(checkpoint, str | os.PathLike):
        checkpoint = _read(Path(checkpoint))
    for wrapper in ("state_dict", "model"):
        inner = checkpoint.get(wrapper)
        if isinstance(inner, Mapping):
            checkpoint = inner
            break
    weights = {key: value for key, value in checkpoint.items() if torch.is_tensor(value)}
    if not weights or len(weights) != len(checkpoint):
        strangers = sorted(set(checkpoint) - set(weights))[:5]
        raise ValueError(f"not a state dict of tensors: {strangers or 'it is empty'}")
    if all(key.startswith("module.") for key in weights):
        weights = {key.removeprefix("module."): value for key, value in weights.items()}
    return weights


def _read(path: Path) -> Mapping[str, Any]:
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        # Moment-DETR stores its command-line options, an argparse.Namespace, beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors, and reading arbitrary objects can run code. If you trust the file, "
            "strip it once: torch.save(torch.load(path, weights_only=False)['state_dict' or 'model'], new_path)"
        ) from error


def load_original_weights(
    model: nn.Module,
    checkpoint: Checkpoint,
    *,
    ignored: Callable[[str], bool] = lambda key: False,
    prefix: str = "",
    expected: Callable[[str], bool] = lambda key: True,
) -> None:
    """Load a checkpoint into a model; every key must match.

    Args:
        model: the model to fill.
        checkpoint: see `original_state_dict`.
        ignored: whether an original key is skipped (tables that are recomputed, loss modules).
        prefix: of a wrapper, removed from keys that are unknown with it.
        expected: whether the checkpoint must hold a key of the model.

    Raises:
        ValueError: keys are missing, left over, or have another shape.
    """
    own = model.state_dict(keep_vars=True)
    weights = {
        key if key in own else key.removeprefix(prefix): value
        for key, value in original_state_dict(checkpoint).items()
        if not ignored(key)
    }
    strangers = sorted(set(weights) - set(own))
    # Tied parameters carry several names, and one of them in the checkpoint is enough.
    given = {id(own[key]) for key in set(weights) & set(own)}
    missing = sorted(
        key for key, value in own.items() if expected(key) and key not in weights and id(value) not in given
    )
    shapes = sorted(key for key in set(weights) & set(own) if weights[key].shape != own[key].shape)
    if strangers or missing or shapes:
        raise ValueError(
            f"the checkpoint does not fit the configuration: {len(missing)} keys missing {missing[:5]}, "
            f"{len(strangers)} left over {strangers[:5]}, {len(shapes)} of another shape {shapes[:5]}"
        )
    model.load_state_dict(weights, strict=False)
