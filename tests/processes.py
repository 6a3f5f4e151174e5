"""Processes that are copies of this one: what a test has imported, they need not import again."""

from __future__ import annotations

import io
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def start(work: Callable[[], Any], log: Path | None = None) -> int:
    """Starts `work` in a fork of this process; its number. What it raises is written to the log."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        if log is not None:
            with io.open(log, "w") as file:  # noqa: UP020 - the plain one may be replaced
                traceback.print_exc(file=file)
    finally:
        os._exit(code)


def end_of(child: int) -> int:
    """Waits for a process: its exit code, 0 for success, 1 for an exception, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def in_a_process(work: Callable[[], Any], log: Path | None = None) -> int:
    """Runs `work` in a fork of this process: its exit code."""
    return end_of(start(work, log))


def in_two_processes(work: Callable[[], Any], folder: Path) -> None:
    """Runs `work` in two forks that find each other as those of torchrun do.

    Args:
        work: what both do; the variables of the environment tell them apart.
        folder: where what they raise is written.

    Raises:
        AssertionError: one of them failed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}

    def process(rank: int) -> None:
        from accelerate.state import AcceleratorState, GradientState

        os.environ |= {**rendezvous, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        AcceleratorState._reset_state(reset_partial_state=True)  # this process was alone before
        GradientState._reset_state()
        work()

    logs = [folder / f"process{rank}.txt" for rank in range(2)]
    children = [start(lambda rank=rank: process(rank), log) for rank, log in enumerate(logs)]
    codes = [end_of(child) for child in children]
    assert codes == [0, 0], (codes, [log.read_text()[-3000:] for log in logs if log.exists()])
