"""Files that are written whole or not at all, and file names made of text that comes from data."""

import contextlib
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

__all__ = ["safe_name", "write_whole"]

# What every file system takes as it is; the first character may not be a dot (hidden files, "." and "..").
_HARMLESS = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
# Windows opens a device for these, whatever follows the first dot.
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)
# File systems end at 255 bytes; the rest is room for the suffixes and prefixes of the caller.
_LONGEST = 120
_DIGEST = 16  # hexadecimal digits, 64 bits: no two ids of one data set meet


@contextlib.contextmanager
def write_whole(path: str | os.PathLike, mode: str = "w", encoding: str = "utf-8") -> Iterator[IO[Any]]:
    """Open a file for writing so that `path` holds either what it held before or all of what was written.

    The content goes to a temporary file in the same folder, which takes the place of `path` when the block ends
    without an error; after an error it is removed and `path` is as before. A process that is killed in between may
    leave the temporary file behind (its name begins with a dot and ends in ".part"), never half of `path`.
    A symbolic link stays one: the file it points to is replaced.

    Args:
        path: the file. Its folder must exist.
        mode: "w" for text, "wb" for bytes.
        encoding: of the text; without meaning for bytes.

    Raises:
        ValueError: another mode.
        OSError: the folder is absent or read-only, the disk is full, `path` is a folder or no regular file.

    Example:
        >>> with write_whole("results.json") as file:  # doctest: +SKIP
        ...     json.dump(results, file)
    """
    if mode not in ("w", "wb"):
        raise ValueError(f"mode must be 'w' or 'wb', got {mode!r}")
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(f"{path} is a folder, not a file")
    if target.exists() and not target.is_file():
        raise OSError(f"{path} is not a regular file, so that it cannot be replaced")
    part = target.with_name(f".{target.name[:_LONGEST]}.{secrets.token_hex(6)}.part")
    try:
        with part.open(mode.replace("w", "x"), encoding=None if mode == "wb" else encoding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, part)
        part.replace(target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def safe_name(text: str) -> str:
    """A file name for text that comes from data, such as the id of a video; different texts get different names.

    Text of at most 120 ASCII letters, digits, ".", "_" and "-" that begins with no dot, ends in none and is no device
    name of Windows stays as it is. Of all other text the harmless characters are kept and "~" with a hash of the whole
    text is added: separators, drive letters and ".." cannot lead out of a folder. Texts that differ in the case of
    letters only get names that differ in it only.

    Args:
        text: any string, the empty one included.

    Raises:
        TypeError: no string.

    Example:
        >>> safe_name("-esJrBWj2d8"), safe_name("../x")
        ('-esJrBWj2d8', '_x~d6b96a97d147daaa')
    """
    if not isinstance(text, str):
        raise TypeError(f"a file name is made of a string, got {text!r}")
    harmless = _HARMLESS.fullmatch(text) and not text.endswith(".") and not _RESERVED.fullmatch(text)
    if harmless and len(text) <= _LONGEST:
        return text
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:_DIGEST]
    kept = re.sub(r"[^A-Za-z0-9._-]+", "_", text).lstrip(".").rstrip(".")[: _LONGEST - _DIGEST - 1]
    if _RESERVED.fullmatch(kept):
        kept = f"_{kept}"
    return f"{kept}~{digest}"
