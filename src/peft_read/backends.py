"""Which implementation runs the recurrence and the transport: torch, compiled loops (numba) or kernels (Triton).

One policy for both: what is installed is used, from the first call on. Compiled loops are compiled then, once per
machine, by one process while the others wait; kernels likewise. The choice is a function of what is installed, so
that the processes of one job and a run that is resumed agree. What is installed but does not work is said once, and
torch takes its place.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

__all__ = [
    "backend",
    "compiled_loop",
    "compiling",
    "is_forced",
    "passes",
    "refuse",
    "say_once",
    "show_backends",
    "trials",
    "use_backend",
]

logger = logging.getLogger(__name__)

VARIABLE = "PEFT_READ_BACKEND"
NAMES = ("auto", "torch", "numba", "triton")
WAYS_OUT = {
    "numba": "`pip install numba` installs it",
    "triton": "it comes with torch for CUDA",
}

_forced: str | None = None  # by `use_backend`
_settled_for: dict[str, str] = {}  # type of device -> what "auto" means there
trials: dict[tuple[Hashable, ...], bool] = {}  # by key of `passes`: whether a fast path works here, if it was tried
_said: set[Hashable] = set()
_lock = threading.RLock()


class use_backend:
    """Choose the implementation of the recurrence and of the transport, for the process or for a `with` block.

    ```python
    use_backend("torch")            # from here on
    with use_backend("numba"):      # for this block
        ...
    ```

    The environment variable `PEFT_READ_BACKEND` sets the choice that a process starts with.

    Args:
        name: "auto", numba on the CPU and Triton on CUDA where they are installed; "torch", always torch; "numba" or
            "triton", that one. A case that the one named cannot take goes to torch, with one warning that says why.
            With TRITON_INTERPRET=1 in the environment "triton" also takes tensors on the CPU, for tests.

    Raises:
        ValueError: for another name.
        ImportError: for "numba" or "triton" where it is not installed or cannot be imported.
    """

    def __init__(self, name: str) -> None:
        global _forced
        _check(name)
        self._before = _forced
        _forced = name

    def __enter__(self) -> use_backend:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _forced
        _forced = self._before


def backend(device: str = "cpu") -> str:
    """The implementation to ask first for tensors on a type of device: "torch", "numba" or "triton"."""
    forced = _forced
    return _settled(device) if forced is None or forced == "auto" else forced


@torch.compiler.assume_constant_result
def _settled(device: str) -> str:
    """What the environment and what is installed say; for torch.compile a constant."""
    found = _settled_for.get(device)
    if found is None:
        found = _from_environment() if _forced is None else "auto"
        if found == "auto":
            fast = {"cpu": "numba", "cuda": "triton"}.get(device)
            found = fast if fast is not None and not _why_unusable(fast, warn=True) else "torch"
        if _forced is None:
            _settled_for[device] = found
    return found


def is_forced() -> bool:
    """Whether somebody has named one implementation."""
    return (_from_environment() if _forced is None else _forced) != "auto"


def show_backends() -> str:
    """What is installed, what works, and what runs."""
    lines = ["torch: any device, any case"]
    places = {
        "numba": "CPU, float32; the recurrence up to width 64 and the RNN adapter up to width 8; transport",
        "triton": "CUDA; the RNN up to width 64, the RNN adapter up to width 16; transport up to sides of 1024; "
        "checked in Triton's interpreter and on one H200, the RNN in an earlier form",
    }
    for name, place in places.items():
        reason = _why_unusable(name)
        lines.append(f"{name}: {reason or 'usable'}; {place}")
    failed = [_words(key) for key, passed in trials.items() if not passed]
    if failed:
        lines.append(f"failed here and replaced by torch: {', '.join(failed)}")
    chosen = "use_backend" if _forced else VARIABLE if os.environ.get(VARIABLE) else "auto"
    lines.append(f"in use: on the CPU {backend()}, on CUDA {backend('cuda')} (chosen by {chosen})")
    return "\n".join(lines)


def passes(key: tuple[Hashable, ...], trial: Callable[[], str]) -> bool:
    """Whether a fast path works here: its trial is run at the first question, and a failure said once.

    Args:
        key: what is tried: a tuple whose parts are printed in the warning.
        trial: compiles and runs it on a small problem, away from autograd's and dispatch's modes; returns what is
            wrong, or "". It must not draw random numbers.
    """
    passed = trials.get(key)
    if passed is None:
        with _lock:
            if key not in trials:
                try:
                    with _disable_current_modes(), torch.inference_mode(False), torch.enable_grad():
                        wrong = trial()
                except Exception as error:
                    wrong = f"{type(error).__name__}: {error}".splitlines()[0]
                if wrong:
                    say_once(
                        ("trial", wrong),  # one cause may fail every path
                        f"{_words(key)} does not work here ({wrong}); torch takes its place, with the same results "
                        f'but slower. use_backend("torch") or {VARIABLE}=torch silences this.',
                    )
                trials[key] = not wrong
            passed = trials[key]
    return passed


def _words(key: tuple[Hashable, ...]) -> str:
    return " ".join(map(str, key))


def say_once(key: Hashable, message: str) -> None:
    """Warn, once per process and key."""
    if key not in _said:
        _said.add(key)
        warnings.warn(message, RuntimeWarning, stacklevel=3)


def refuse(what: str, name: str, reason: str) -> None:
    """Warn once that a backend that was chosen explicitly cannot run a case; automatic choices do not warn."""
    if name != "torch" and is_forced():
        say_once(
            (what, name, reason),
            f'The backend "{name}" cannot take this {what}: {reason}. Torch takes it; '
            'use_backend("auto") says nothing of such cases.',
        )


def compiled_loop(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Numba's `njit`, with the machine code kept in numba's cache, a user's cache folder, or in memory only."""
    import numba

    def decorate(function: Callable[..., Any]) -> Any:
        settings: dict[str, Any] = {"nogil": True, "error_model": "numpy", **options}
        try:
            return numba.njit(cache=True, **settings)(function)
        except RuntimeError:  # numba found no folder that it may write to
            say_once(
                "numba's cache",
                "numba has no folder to keep machine code in: every process compiles READ's loops anew, for some "
                f"twenty seconds. Set NUMBA_CACHE_DIR to a writable folder, or {VARIABLE}=torch.",
            )
            return numba.njit(**settings)(function)

    return decorate


@contextmanager
def compiling(what: str, loop: Any) -> Iterator[None]:
    """Around the first call of compiled loops: one process of a machine compiles, the others wait and load.

    Args:
        what: what is compiled, for the log.
        loop: one of the loops, made by `compiled_loop`.
    """
    folder = loop.stats.cache_path
    if not folder:
        yield
        return
    import filelock

    lock = filelock.FileLock(Path(folder) / "peft_read.lock")
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError:  # a file system without locks: every process compiles for itself
        pass
    try:
        if not _is_stored(loop, Path(folder)):
            logger.warning("compiling %s, once for this installation (some twenty seconds)", what)
        yield
    finally:
        lock.release()


def _is_stored(loop: Any, folder: Path) -> bool:
    """Whether numba's index says that machine code of this source is there."""
    code = loop.py_func.__code__
    source = Path(code.co_filename)
    pattern = f"{source.stem}.{loop.py_func.__qualname__}-{code.co_firstlineno}.*.nbi"
    return any(index.stat().st_mtime >= source.stat().st_mtime for index in folder.glob(pattern))


def _from_environment() -> str:
    if os.environ.get("PEFT_READ_RECURRENCE"):
        raise ValueError(f"PEFT_READ_RECURRENCE is now {VARIABLE}, which steers the transport too: set that one.")
    name = os.environ.get(VARIABLE) or "auto"
    _check(name)
    return name


def _check(name: str) -> None:
    if name not in NAMES:
        raise ValueError(f"Unknown backend {name!r}; choose one of {', '.join(map(repr, NAMES))}.")
    reason = _why_unusable(name) if name in WAYS_OUT else ""
    if reason:
        raise ImportError(f'The backend "{name}" is {reason} ({WAYS_OUT[name]}); "torch" needs nothing.')


def _why_unusable(package: str, *, warn: bool = False) -> str:
    """Why a package cannot be used, or ""; a package that is simply not there is no reason to warn."""
    if not is_installed(package):
        return "not installed"
    reason = _broken(package)
    if reason and warn:
        say_once(
            package,
            f"{package} is {reason}: READ and the transport run on torch, slower. Repair or uninstall it, or set "
            f"{VARIABLE}=torch.",
        )
    return reason


@cache
def is_installed(package: str) -> bool:
    """Whether a package is there, usable or not."""
    return importlib.util.find_spec(package) is not None


@cache
def _broken(package: str) -> str:
    try:
        module = importlib.import_module(package)
    except Exception as error:
        return f"installed but cannot be imported ({type(error).__name__}: {error})".splitlines()[0]
    if package == "numba" and module.config.DISABLE_JIT:
        return "switched off by NUMBA_DISABLE_JIT"
    return ""
