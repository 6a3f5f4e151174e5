"""Which implementation runs the recurrence: torch, compiled loops on the CPU (extra `fast`), or Triton on CUDA."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
from functools import cache
from pathlib import Path
from types import TracebackType

import torch

__all__ = ["backend", "show_backends", "use_backend", "warm_up"]

VARIABLE = "PEFT_READ_RECURRENCE"
NAMES = ("auto", "torch", "numba", "triton")
SOURCES = ("lanes.py", "compiled.py", "compiled_rnn.py", "compiled_adapter.py")
LARGEST_SCAN_WIDTH = 64
LARGEST_FUSED_WIDTH = 8
MOST_FUSED_THREADS = 4  # the one pass over the tokens is a single thread's; more threads of torch overtake it

_forced: str | None = None  # by `use_backend`
_automatic: str | None = None  # decided once a process, at the first call
_started_with: str | None = None  # the environment's choice, read at the first call


class use_backend:
    """Choose the implementation for the whole process, or for a `with` block.

    ```python
    use_backend("torch")            # from here on
    with use_backend("numba"):      # for this block
        ...
    ```

    The environment variable `PEFT_READ_RECURRENCE` sets the choice that a process starts with.

    Args:
        name: "torch", always the torch path; "numba", the compiled loops wherever they can take the case, compiled at
            the first use if need be; "triton", the kernels wherever they can take the case, on CUDA (and, to test
            them, on the CPU if the environment has TRITON_INTERPRET=1); "auto", on CUDA the kernels if triton is
            installed and they pass a trial on this GPU, on the CPU the compiled loops if `warm_up` has been run on
            this machine.

    Raises:
        ValueError: for another name.
        ImportError: for "numba" or "triton" where it is not installed.
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
    """The implementation in use for tensors on a type of device: "torch", "numba" or "triton".

    What "auto" means is decided at the first call and does not change while the process lives, because the two differ
    in rounding: a run that was resumed must repeat the one that was not. On CUDA the kernels are tried out first.
    """
    global _automatic, _started_with
    if _started_with is None:
        _started_with = _from_environment()
    name = _forced or _started_with
    if name != "auto":
        return name
    if device == "cuda":
        return "triton" if _kernels_work() else "torch"
    if _automatic is None:
        _automatic = "numba" if _is_compiled() else "torch"
    return _automatic


def warm_up() -> None:
    """Compile the loops, store the machine code, and use it from here on and in all later processes on this machine.

    This takes some twenty seconds, once for each version of this package, of numba and of Python; when it is done
    already, less than one. `python -m peft_read.recurrence` does the same. Nothing else ever compiles by itself, so
    that no call is slow, and so that processes which train together (DDP) choose alike.

    Raises:
        ImportError: if numba is not installed.
    """
    global _automatic
    _check("numba")
    from .fast import run_every_scan_once
    from .one_pass import run_the_adapter_once

    run_every_scan_once()
    run_the_adapter_once()
    marker = _marker()
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.touch()
    _is_compiled.cache_clear()
    _automatic = "numba"


def show_backends() -> str:
    """What is installed, what is compiled, and what runs."""
    installed = is_installed("numba")
    compiled = "compiled" if _is_compiled() else "not compiled yet: run peft_read.recurrence.warm_up() once"
    forced = "use_backend" if _forced else f"{VARIABLE}" if os.environ.get(VARIABLE) else "auto"
    return "\n".join(
        (
            "torch: any device, any case",
            f"numba: {compiled if installed else 'not installed (extra `fast`)'}; CPU, float32, width <= "
            f"{LARGEST_SCAN_WIDTH}; the whole RNN adapter in one pass: width <= {LARGEST_FUSED_WIDTH}, at most "
            f"{MOST_FUSED_THREADS} threads of torch (now {torch.get_num_threads()})",
            f"triton: {'installed' if is_installed('triton') else 'not installed (comes with torch for CUDA)'}; CUDA, "
            f"float32, bfloat16 and float16, width <= {LARGEST_SCAN_WIDTH}; the whole RNN adapter in one launch: "
            "width <= 16; checked in Triton's interpreter on the CPU and compiled, but run on no GPU yet",
            f"in use: on the CPU {backend()}, on CUDA {backend('cuda')} (chosen by {forced})",
        )
    )


@cache
def is_installed(package: str) -> bool:
    """Whether a package can be imported."""
    return importlib.util.find_spec(package) is not None


def _from_environment() -> str:
    name = os.environ.get(VARIABLE) or "auto"
    _check(name)
    return name


def _check(name: str) -> None:
    if name not in NAMES:
        raise ValueError(f"Unknown backend {name!r} of the recurrence; choose one of {', '.join(map(repr, NAMES))}.")
    if name == "numba" and not is_installed("numba"):
        raise ImportError(
            'The backend "numba" is not installed (`pip install "peft-read[fast]"`); "torch" needs nothing.'
        )
    if name == "triton" and not is_installed("triton"):
        raise ImportError(
            'The backend "triton" is not installed (it comes with torch for CUDA); "torch" needs nothing.'
        )


def _kernels_work() -> bool:
    """Whether there are kernels, a GPU, and the right answers."""
    if not is_installed("triton") or not torch.cuda.is_available():
        return False
    from .trial import kernels_work

    return kernels_work()


@cache
def _is_compiled() -> bool:
    return is_installed("numba") and _marker().exists()


def _marker() -> Path:
    """The file that says that everything is compiled, for these sources, these versions and this processor.

    It lies beside numba's machine code. Numba's own files do not tell whether all of it is there.
    """
    import llvmlite.binding
    import numba

    from . import compiled_rnn

    folder = Path(__file__).parent
    sources = [(folder / name).stat() for name in SOURCES]
    key = (
        [(status.st_mtime_ns, status.st_size) for status in sources],
        numba.__version__,
        platform.python_version(),
        llvmlite.binding.get_host_cpu_name(),
        llvmlite.binding.get_host_cpu_features().flatten(),
    )
    name = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    return Path(compiled_rnn.rnn_forward.stats.cache_path or folder) / f"recurrence-{name}.compiled"
