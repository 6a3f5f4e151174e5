"""What the runs of one folder share beside their arguments: the text encoder and the contents of the data.

A run's folder is named by its arguments, in which data and encoder are places. `study.json` in the output folder says
what was there, so that runs with other data do not come to stand beside these under the same names.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from run_folder import write_json
from study_runs import Places

RECORD = "study.json"
MADE = ("text_encoder", "text_cache", "moments_by_source")  # places that are no files of the data folder
KINDS = ("tran", "desc")
OF_MOMENTS = [f"{{moments/sum_{part}/{kind}.tok.txt}}" for part in ("train", "val", "test") for kind in KINDS]


def identity(places: Places, arguments: Iterable[str]) -> dict[str, Any]:
    """The encoder, and a digest of every file of the data that the arguments name and that exists.

    A compressed file has the digest of its content. The encoder is its name on the Hub, or, of a folder, a digest of
    its configuration and the names and sizes of its weights: where it lies makes no difference.

    Args:
        places: where everything is.
        arguments: of settings and backbones, with their `{names}`.
    """
    text = " ".join(arguments)
    if "{moments_by_source}" in text:
        text += " ".join(OF_MOMENTS)
    data = {}
    for name in sorted(set(re.findall(r"\{([^}]+)\}", text)) - set(MADE)):
        path = next((p for p in (places.data / name, places.data / f"{name}.xz") if p.is_file()), None)
        if path is not None:  # of a backbone that is there nothing is read
            data[name] = _digest(path)
    return {"text_encoder": _encoder(places.text_encoder), "data": data}


def check_identity(output: Path, now: Mapping[str, Any]) -> dict[str, Any]:
    """What the folder's record becomes: what it says, and the files that it did not know.

    Args:
        output: folder of the runs.
        now: of `identity`.

    Raises:
        ValueError: the runs were made with another encoder or other contents of a file, or the record is damaged.
    """
    path = output / RECORD
    if not path.exists():
        return dict(now)
    try:
        then = json.loads(path.read_text(encoding="utf-8"))
        encoder, data = then["text_encoder"], dict(then["data"])
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); delete it, if encoder and data are the same") from error
    way_out = f"; choose another --output_dir, or delete {path} if it is the same under another name"
    if encoder != now["text_encoder"]:
        raise ValueError(
            f"the runs in {output} were made with the text encoder {encoder!r}, this call has "
            f"{now['text_encoder']!r}{way_out}"
        )
    if changed := sorted(name for name, digest in now["data"].items() if data.get(name, digest) != digest):
        raise ValueError(
            f"the runs in {output} were made with other contents of {', '.join(changed)} than --data_dir has; pass "
            "the data that they were made with, or choose another --output_dir"
        )
    return {"text_encoder": encoder, "data": {**now["data"], **data}}


def write_identity(output: Path, record: Mapping[str, Any]) -> None:
    """Writes `study.json`."""
    write_json(output / RECORD, record)


def _encoder(name: str) -> str:
    folder = Path(name)
    if not folder.is_dir():
        return name
    config = folder / "config.json"
    parts = [f"config.json {_digest(config)}"] if config.is_file() else []
    weights = sorted(path for kind in ("*.safetensors", "*.bin") for path in folder.glob(kind))
    return ", ".join(parts + [f"{path.name} of {path.stat().st_size} bytes" for path in weights])


def _digest(path: Path) -> str:
    """Sixteen letters of the content's SHA-256."""
    try:
        with lzma.open(path) if path.suffix == ".xz" else path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except (EOFError, lzma.LZMAError) as error:
        raise ValueError(f"{path} cannot be decompressed: {error}; get it again") from error
