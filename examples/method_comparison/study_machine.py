"""What a run of the study was made with: versions of the libraries, and the processor or GPU."""

from __future__ import annotations

import json
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch
from run_folder import versions, write_json

MACHINE = "machine"  # the file, and the field of a restored result


def hardware() -> str:
    """The name of the GPU, where there is one, or of the processor."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpus = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", cpus.read_text(), re.MULTILINE) if cpus.exists() else []
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} logical processors"


def write_machine(folder: Path) -> None:
    """Notes this machine beside a run that is about to start."""
    write_json(folder / f"{MACHINE}.json", {"versions": versions(), "hardware": hardware()})


def read_machine(folder: Path) -> dict[str, Any] | None:
    """`versions` by library and `hardware` of a run; None where they were not noted."""
    return _fields(folder / f"{MACHINE}.json", ("versions", "hardware"))


def read_versions(folder: Path) -> dict[str, Any] | None:
    """The versions alone, which runs have written down before their machine was; None where there is nothing."""
    return _fields(folder / "run.json", ("versions",))


def _fields(path: Path, names: tuple[str, ...]) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {name: found[name] for name in names}
    except (OSError, ValueError, LookupError, TypeError):
        return None


def shown(machine: dict[str, Any]) -> str:
    """For a page."""
    libraries = ", ".join(f"{name} {number}" for name, number in (machine["versions"] or {}).items())
    parts = [libraries or "versions not recorded", machine["hardware"] or "hardware not recorded"]
    if machine["arguments"]:
        parts.append(f"every run with `{' '.join(machine['arguments'])}`")
    return "; ".join(parts)
