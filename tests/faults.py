"""Killing a run at its writes: a process dies before, in the middle of, or after the n-th one."""

from __future__ import annotations

import builtins
import errno
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

KILLED = 77
PHASES = ("before", "half", "after")


class Faults:
    """Counts the writes below a folder, and lets one of them fail.

    A write is the opening of a file for writing until it is closed, a call of `torch.save` or of safetensors'
    `save_file`, a renaming, or the removal of a folder.

    Args:
        folder: where writes count.
        at: the number of the write that fails, from 0; None counts only.
        phase: "before" the write, at "half" of its bytes, or "after" it; "full" raises the error of a full disk;
            "read-only" refuses this write and all later ones.
    """

    def __init__(self, folder: Path, at: int | None = None, phase: str = "before") -> None:
        self.folder, self.at, self.phase = folder.resolve(), at, phase
        self.count, self.names = 0, []

    def install(self) -> None:
        """Replaces the functions for good: call it in a process of its own."""
        import peft.peft_model
        import safetensors.torch
        import transformers.modeling_utils

        builtins.open = io.open = self._opener(io.open)
        torch.save = self._writer(torch.save, 1)
        save_file = self._writer(safetensors.torch.save_file, 1)
        safetensors.torch.save_file = peft.peft_model.safe_save_file = save_file
        transformers.modeling_utils.safe_save_file = save_file
        os.replace = self._writer(os.replace, 1, divisible=False)
        shutil.rmtree = self._writer(shutil.rmtree, 0)

    def _number(self, path: Any) -> int | None:
        """The number of a write to this path, None where it does not count."""
        if not isinstance(path, str | os.PathLike):
            return None
        absolute = Path(os.path.abspath(os.fspath(path)))
        if self.folder not in (absolute, *absolute.parents):
            return None
        self.names.append(absolute.relative_to(self.folder).as_posix())
        self.count += 1
        return self.count - 1

    def _before(self, number: int | None) -> None:
        if self.phase == "read-only" and number is not None and self.at is not None and number >= self.at:
            raise OSError(errno.EROFS, "Read-only file system")
        if number is None or number != self.at:
            return
        if self.phase == "full":
            raise OSError(errno.ENOSPC, "No space left on device")
        if self.phase == "before":
            os._exit(KILLED)

    def _after(self, number: int | None, path: Any, divisible: bool = True) -> None:
        if number is None or number != self.at:
            return
        if self.phase == "half" and divisible:
            os.truncate(path, os.path.getsize(path) // 2)
        os._exit(KILLED)

    def _opener(self, plain: Callable) -> Callable:
        def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            number = self._number(file) if set(mode) & set("wxa") else None
            self._before(number)
            handle = plain(file, mode, *args, **kwargs)
            return handle if number is None or number != self.at else _Dying(handle, lambda: self._after(number, file))

        return opened

    def _writer(self, plain: Callable, place: int, divisible: bool = True) -> Callable:
        def written(*args: Any, **kwargs: Any) -> Any:
            path = args[place] if len(args) > place else kwargs.get("filename", kwargs.get("f"))
            existed = plain is not self and os.path.lexists(path) if isinstance(path, str | os.PathLike) else False
            number = self._number(path)
            self._before(number)
            if number is not None and number == self.at and self.phase == "half" and os.path.isdir(path) and existed:
                for file in list(Path(path).rglob("*"))[::2]:  # a folder that is half removed
                    if file.is_file():
                        file.unlink()
                os._exit(KILLED)
            result = plain(*args, **kwargs)
            self._after(number, path, divisible and os.path.isfile(path) if number is not None else False)
            return result

        return written


def at_a_fault(work: Callable[[], Any], faults: Faults) -> Callable[[], Any]:
    """The work with a fault in it, to be done in a process of its own."""

    def done() -> Any:
        faults.install()
        return work()

    return done


class _Dying:
    """A file whose process ends when it is closed."""

    def __init__(self, handle: Any, end: Callable[[], None]) -> None:
        self._handle, self._end = handle, end

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)

    def __enter__(self) -> _Dying:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def __iter__(self) -> Any:
        return iter(self._handle)

    def close(self) -> None:
        self._handle.close()
        self._end()
