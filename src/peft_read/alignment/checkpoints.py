"""Which checkpoints of a Trainer are complete: each finished one is sealed with the sizes and hashes of its files."""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..files import write_whole

__all__ = ["SEAL", "last_whole_checkpoint", "seal_checkpoint"]

SEAL = "peft_read_files.json"
STATE = "trainer_state.json"


def seal_checkpoint(checkpoint: str | Path) -> None:
    """Writes down the size and the SHA-256 of every file of a finished checkpoint, in the checkpoint.

    Args:
        checkpoint: the folder, to which nothing is being written.
    """
    folder = Path(checkpoint)
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != SEAL and not path.name.endswith(".part")
    }
    with write_whole(folder / SEAL) as file:
        json.dump({"files": files}, file, indent=2)


def last_whole_checkpoint(folder: str | Path) -> str | None:
    """The newest `checkpoint-<step>` in a folder that is complete and intact, None if there is none.

    A process that is killed while it saves leaves a folder without its last file, the trainer's state, or with half
    of it; transformers' own `get_last_checkpoint` would return that folder. A checkpoint that `PVLALossMixin` has
    sealed must have every file with the size and the content that it had; one without a seal must have a readable
    trainer state, and weights and optimizer files that can be opened to their end.
    """
    checkpoints = [
        (int(match.group(1)), path)
        for path in Path(folder).glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and path.is_dir()
    ]
    return next((str(path) for _, path in sorted(checkpoints, reverse=True) if _is_whole(path)), None)


def _is_whole(checkpoint: Path) -> bool:
    try:
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        if not isinstance(state, dict):
            return False
        if (checkpoint / SEAL).exists():
            sealed = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))["files"]
            return STATE in sealed and all(_holds(checkpoint / name, entry) for name, entry in sealed.items())
        return all(_can_be_opened(path) for path in checkpoint.rglob("*") if path.is_file())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _holds(path: Path, entry: dict) -> bool:
    return path.is_file() and path.stat().st_size == entry["size"] and _sha256(path) == entry["sha256"]


def _can_be_opened(path: Path) -> bool:
    """Whether a file of weights or of the optimizer is complete, as far as the file itself can tell."""
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt"):
                return True
        except SafetensorError:
            return False
    if path.suffix in (".pt", ".pth", ".bin"):
        try:
            with zipfile.ZipFile(path) as archive:
                return archive.testzip() is None
        except zipfile.BadZipFile:
            return _is_legacy_pickle(path)
    return True


def _is_legacy_pickle(path: Path) -> bool:
    """Files of torch before 1.6, and `training_args.bin` of other libraries, are pickles, which end with a dot."""
    content = path.read_bytes()
    return content[:1] == b"\x80" and content[-1:] == b"."


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
