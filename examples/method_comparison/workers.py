"""Processes that import a script once and work through a queue of its runs.

    with Workers(2) as workers:
        failed = workers.run(jobs)

A worker reads one job a line from its standard input and answers with a line; a run that fails is reported and the
worker goes on, a worker that dies is replaced. When the parent ends, its pipes close, and the workers end at once.
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPRODUCTION = Path(__file__).parents[1] / "reproduction"


@dataclass(frozen=True)
class Job:
    """One run.

    Args:
        name: for messages.
        script: the module in ../reproduction whose `main` is called.
        arguments: of its command line.
        log: what it prints goes here.
    """

    name: str
    script: str
    arguments: tuple[str, ...]
    log: Path


class Workers:
    """So many processes with one thread each.

    Args:
        number: of processes.
        ends: a time of `time.monotonic` after which no run is started; None = never.
        say: is given a line about every run that has ended.
    """

    def __init__(self, number: int, *, ends: float | None = None, say: Callable[[str], None] = print) -> None:
        self.number, self.ends, self.say = number, ends, say
        self.free: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for _ in range(number):
            self.free.put(_Worker())

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *exception: Any) -> None:
        for _ in range(self.number):
            self.free.get().end()

    @property
    def time_is_over(self) -> bool:
        """Whether no run will be started any more."""
        return self.ends is not None and time.monotonic() >= self.ends

    def run(self, jobs: Iterable[Job]) -> list[str]:
        """Runs them; messages of those that failed."""
        with ThreadPoolExecutor(self.number) as pool:
            return [message for message in pool.map(self._run_one, jobs) if message]

    def _run_one(self, job: Job) -> str | None:
        if self.time_is_over:
            return None
        worker, started = self.free.get(), time.monotonic()
        try:
            processor_seconds = worker.do(job)
        finally:
            self.free.put(worker)
        seconds = time.monotonic() - started
        if processor_seconds is None:
            self.say(f"{job.name}: FAILED in {seconds:.0f} s")
            return f"{job.name} failed{_last_line(job.log)}; see {job.log}"
        self.say(f"{job.name}: done in {seconds:.0f} s, {processor_seconds:.0f} s of processor time")
        return None


def _last_line(log: Path) -> str:
    """Of what a run has printed, which is its exception where it has raised one."""
    try:
        lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    except OSError:
        return ""
    last = next((line for line in reversed(lines) if line), "")
    return f": {last[:300]}" if last else ""


class _Worker:
    """A process that is started when it is needed first."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def do(self, job: Job) -> float | None:
        """Seconds of processor time, which say more on a busy machine; None where the run has failed."""
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={"OMP_NUM_THREADS": "1", **os.environ},
                text=True,
            )
        assert self.process.stdin is not None and self.process.stdout is not None
        line = {"script": job.script, "arguments": list(job.arguments), "log": str(job.log)}
        try:
            self.process.stdin.write(json.dumps(line) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return None
        answer = self.process.stdout.readline().split()
        if not answer:
            self.process.wait()  # it has ended; the next run gets another
        return float(answer[1]) if answer[:1] == ["done"] else None

    def end(self) -> None:
        if self.process is not None:
            self.process.kill()  # nothing is running
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                if pipe is not None:
                    pipe.close()


def main() -> None:
    """The worker's side."""
    sys.path.insert(0, str(REPRODUCTION))
    answers = os.fdopen(os.dup(1), "w")
    jobs: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(jobs,), daemon=True).start()
    while True:
        job = json.loads(jobs.get())
        with open(job["log"], "ab") as log:
            for stream in (1, 2):
                os.dup2(log.fileno(), stream)
        before = time.process_time()
        done = _run(job["script"], job["arguments"])
        answers.write(f"done {time.process_time() - before:.1f}\n" if done else "failed\n")
        answers.flush()


def _listen(jobs: queue.SimpleQueue[str]) -> None:
    """Ends the process, in the middle of a run too, when the parent has closed the pipe."""
    for line in sys.stdin:
        jobs.put(line)
    os._exit(1)


def _run(script: str, arguments: list[str]) -> bool:
    try:
        module = importlib.import_module(script)
        if "transformers" in sys.modules:  # of the script; without it nothing is to be made quiet
            from progress import be_quiet

            be_quiet()
        module.main(arguments)
        return True
    except (Exception, SystemExit):
        traceback.print_exc()
        return False
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


if __name__ == "__main__":
    main()
