"""An output folder belongs to one run: it goes on from its own checkpoints, and refuses another run's."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft_read.alignment import last_whole_checkpoint

RUN_ARGUMENTS = ("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "seed", "optim")


def prepare_output(folder: Path, script: Any, training: Any) -> None:
    """Checkpoints in the output folder mean an interrupted run: only the same run may go on from them."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.json"
    now = {**asdict(script), **{k: v for k, v in training.to_dict().items() if k in RUN_ARGUMENTS}}
    if path.exists() and last_whole_checkpoint(folder):
        then = json.loads(path.read_text(encoding="utf-8"))
        if changed := sorted(k for k in now if now[k] != then.get(k)):
            raise ValueError(
                f"{folder} holds checkpoints of an interrupted run with other arguments: "
                f"{', '.join(f'{k} was {then.get(k)!r}, is {now[k]!r}' for k in changed)}. Start it with the same "
                "arguments to go on, or choose another --output_dir, or delete its checkpoint-* folders"
            )
    path.write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8")


def remove_checkpoints(folder: Path) -> None:
    """What is left is the adapter; a finished run that is started again starts anew."""
    for checkpoint in folder.rglob("checkpoint-*"):
        if checkpoint.is_dir():
            shutil.rmtree(checkpoint)
