"""An output folder belongs to one run: it resumes from its own checkpoints, and touches no others.

`run.json` holds the arguments of the run and the names of the checkpoints that it has written. A lock keeps a second
run out while the first is alive.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from progress import be_quiet
from script_arguments import one_line_errors
from transformers import TrainerCallback

from peft_read.alignment import last_whole_checkpoint
from peft_read.files import write_whole
from peft_read_command import own_version

LOCK_SECONDS = 10  # the children of a killed parent need a moment to notice
ENDS_WITH_STDIN = "PEFT_READ_ENDS_WITH_STDIN"
# Arguments that change nothing in what a run computes; a run may go on with others. All other arguments are compared.
FREE_ARGUMENTS = frozenset(
    {
        *("output_dir", "logging_dir", "run_name", "report_to", "project", "trackio_space_id", "disable_tqdm"),
        *("log_level", "log_level_replica", "log_on_each_node", "save_total_limit", "save_on_each_node"),
        *("resume_from_checkpoint", "restore_callback_states_from_checkpoint", "require_world_size", "local_rank"),
        *("push_to_hub", "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo", "hub_always_push"),
        *("hub_revision", "ddp_backend", "ddp_timeout", "skip_memory_metrics", "do_train", "do_eval", "do_predict"),
        *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
        "dataloader_prefetch_factor",
    }
)
WRITTEN = (
    *("run.json", "results.json", "report.md", "learning_curve.png", "command.json"),
    *("each_test.json", "each_validation.json"),
)
# What peft, transformers and these scripts save of a model; everything else in its folder is the user's.
OF_A_MODEL = re.compile(
    r".*\.(safetensors|bin|jinja|model)|.*config\.json|.*\.index\.json|README\.md"
    r"|(tokenizer|vocab|added_tokens|special_tokens_map)\.json|(merges|vocab)\.txt"
)
TIMES = re.compile(r".*(_runtime|_per_second|_preparation_time)")  # entries of the log that differ from run to run


class RunFolder:
    """The output folder of one run, locked until `release`.

    Args:
        folder: made where it does not exist.
        arguments: of the run, as JSON values; see `run_arguments`.
        parts: folders below it in which Trainers save checkpoints, "" for the folder itself.

    Raises:
        ValueError: another run is alive in the folder, or has left checkpoints of other arguments, or somebody else's
            checkpoints lie in it.
    """

    def __init__(self, folder: Path, arguments: dict[str, Any], parts: Iterable[str] = ("",)) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.path, self.parts = folder, folder / "run.json", tuple(parts)
        self.lock = lock_folder(folder)
        self.started = time.time()
        try:
            _remove_parts(folder)
            then = self._earlier_run()
            present = self._present_checkpoints()
            if foreign := sorted(present - set(then["checkpoints"])):
                raise ValueError(
                    f"{folder} holds {', '.join(foreign)}, which the run of its run.json has not written; choose "
                    "another --output_dir, or move them away"
                )
            if present:
                self._compare(arguments, then)
            self.checkpoints = sorted(present)
            self.seconds_before = float(then["seconds"]) if present else 0.0
            self.arguments = arguments
            self.write()
        except BaseException:
            self.release()
            raise

    def write(self) -> None:
        """Writes `run.json`."""
        content = {
            "arguments": self.arguments,
            "versions": versions(),
            "checkpoints": self.checkpoints,
            "seconds": self.seconds,
        }
        write_json(self.path, content)

    @property
    def seconds(self) -> float:
        """How long the run has taken, up to the last checkpoint of earlier starts and in this one."""
        return self.seconds_before + time.time() - self.started

    def note_checkpoint(self, step: int, part: str = "") -> None:
        """Claims `checkpoint-<step>` before it is written."""
        name = "/".join(filter(None, (part, f"checkpoint-{step}")))
        if name not in self.checkpoints:
            self.checkpoints.append(name)
        self.write()

    def remove_checkpoints(self) -> None:
        """What is left is the adapter; a finished run that is started again starts anew."""
        for name in self.checkpoints:
            path = self.folder / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
        self.checkpoints = []
        self.write()

    def release(self) -> None:
        """Releases the lock."""
        self.lock.release()

    def _earlier_run(self) -> dict[str, Any]:
        nothing: dict[str, Any] = {"arguments": {}, "versions": {}, "checkpoints": [], "seconds": 0.0}
        try:
            then = json.loads(self.path.read_text(encoding="utf-8"))
            then = {name: then[name] for name in nothing}
            if not all(isinstance(then[name], type(value)) for name, value in nothing.items()):
                raise TypeError("a value of another kind")
        except FileNotFoundError:
            return nothing
        except (ValueError, KeyError, TypeError) as error:
            if self._present_checkpoints():
                raise ValueError(
                    f"{self.path} cannot be read ({type(error).__name__}), so that the checkpoints beside it belong "
                    "to an unknown run; choose another --output_dir, or move them away"
                ) from error
            return nothing
        return then

    def _present_checkpoints(self) -> set[str]:
        """Folders that Trainer's own rotation would take for the run's, links included."""
        return {
            path.relative_to(self.folder).as_posix()
            for part in self.parts
            for path in (self.folder / part).glob("checkpoint-*")
            if re.match(r"checkpoint-\d+", path.name)
        }

    def _compare(self, now: dict[str, Any], then: dict[str, Any]) -> None:
        if not any(last_whole_checkpoint(self.folder / part) for part in self.parts):
            return  # nothing to go on from
        before = then["arguments"]
        if changed := sorted(name for name in {**now, **before} if now.get(name) != before.get(name)):
            raise ValueError(
                f"{self.folder} holds checkpoints of an interrupted run with other arguments: "
                f"{', '.join(f'{name} was {before.get(name)!r}, is {now.get(name)!r}' for name in changed)}. Start it "
                "with the same arguments to go on, or choose another --output_dir, or delete its checkpoint-* folders"
            )
        if then["versions"] != versions():
            warnings.warn(
                f"{self.folder} was begun with {then['versions']} and goes on with {versions()}: the numbers may "
                "differ from those of an uninterrupted run",
                stacklevel=2,
            )


def _remove_parts(folder: Path) -> None:
    """What `write_whole` leaves of the run's own files when it is killed."""
    for name in WRITTEN:
        for part in folder.glob(f".{name}.*.part"):
            if re.fullmatch(rf"\.{re.escape(name)}\.[0-9a-f]{{12}}\.part", part.name):
                part.unlink()


def clear_finished(folder: Path) -> None:
    """Removes half-written files and claimed checkpoints, where a run was killed after its results and before that."""
    _remove_parts(folder)
    path = folder / "run.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        claimed = [name for name in content["checkpoints"] if re.fullmatch(r"([\w-]+/)?checkpoint-\d+", name)]
    except (OSError, ValueError, KeyError, TypeError):
        return
    for name in claimed:
        if (folder / name).is_dir() and not (folder / name).is_symlink():
            shutil.rmtree(folder / name)
    if claimed:
        write_json(path, {**content, "checkpoints": []})


def write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    """Writes a JSON file whole or not at all."""
    with write_whole(path) as file:
        file.write(json.dumps(content, indent=indent) + "\n")


def lock_folder(folder: Path, name: str = ".lock") -> FileLock:
    """The folder's lock, which ends with the process that holds it.

    Raises:
        ValueError: somebody else holds it.
    """
    lock = FileLock(folder / name)
    try:
        lock.acquire(timeout=LOCK_SECONDS)
    except Timeout as error:
        raise ValueError(f"another run is at work in {folder}; wait for it, or choose another --output_dir") from error
    return lock


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Makes the folder, and keeps other runs out of it until the block ends.

    Raises:
        ValueError: another run is in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(folder)
    try:
        yield
    finally:
        lock.release()


def versions() -> dict[str, str]:
    """Of what computes the numbers."""
    return {name: version(name) for name in ("torch", "transformers", "peft")} | {"peft-read": own_version()}


def run_arguments(script: Any, training: Any) -> dict[str, Any]:
    """All arguments that make a run what it is, as JSON values."""
    given = {**asdict(script), **json.loads(training.to_json_string()), "world_size": training.world_size}
    return {name: value for name, value in given.items() if name not in FREE_ARGUMENTS}


class KeepCheckpoints(TrainerCallback):
    """Claims every checkpoint before it is written, and ends the averages of the log there.

    Trainer averages the loss since the last line of the log. A run that resumes from a checkpoint does not know the
    steps before it, so that a line that spans a checkpoint would differ from that of an uninterrupted run.

    Args:
        run: where this process has claimed it, None in the other processes.
        part: the folder below the run's, where the Trainer saves.
    """

    def __init__(self, run: RunFolder | None, part: str = "") -> None:
        self.run, self.part = run, part

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        return self._before_save(args, state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        return self._before_save(args, state, control)

    def _before_save(self, args: Any, state: Any, control: Any) -> Any:
        if control.should_save or (args.save_strategy == "best" and control.should_evaluate):
            control.should_log = True
            if self.run is not None:
                self.run.note_checkpoint(state.global_step, self.part)
        return control


def log_without_times(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A Trainer's log without timings and without what depends on the number of starts, keys sorted."""
    entries = [entry for entry in log if "train_runtime" not in entry]
    return [{key: entry[key] for key in sorted(entry) if not TIMES.fullmatch(key)} for entry in entries]


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, to be made by the block, which takes its place when all of its files are written.

    Files of an earlier model go, also those that the new one does not have: an adapter that stayed beside a new
    `model.safetensors` would be loaded on top of it. Files that no model consists of stay. After an error `folder` is
    as before; after a kill `where_whole` is. A symbolic link stays one.

    Raises:
        OSError: `folder` is no folder, or the block has written nothing.
    """
    folder = Path(os.path.realpath(folder))
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file, where a folder is to be written; move it away")
    part, before = folder.with_name(f".{folder.name}.part"), _before(folder)
    _end_of_a_kill(folder)
    shutil.rmtree(part, ignore_errors=True)
    try:
        yield part
        if not part.is_dir():
            raise FileNotFoundError(f"nothing was written for {folder}")
        if folder.exists():
            folder.replace(before)
        try:
            part.replace(folder)
        except BaseException:
            if before.exists():
                before.replace(folder)
            raise
        _end_of_a_kill(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def where_whole(folder: Path) -> Path:
    """Where the content of a folder of `written_whole` lies, also after a kill between its two renamings."""
    real = Path(os.path.realpath(folder))
    return _before(real) if not real.exists() and _before(real).is_dir() else folder


def _before(folder: Path) -> Path:
    """Where the earlier content of a folder waits until the new one is in its place."""
    return folder.with_name(f".{folder.name}.before")


def _end_of_a_kill(folder: Path) -> None:
    """Takes the earlier content back where the new one is not in its place, and takes leave of it where it is."""
    before = _before(folder)
    if not before.is_dir():
        return
    if not folder.exists():
        before.replace(folder)
        return
    for path in sorted(before.rglob("*")):
        target = folder / path.relative_to(before)
        if (path.is_symlink() or path.is_file()) and not OF_A_MODEL.fullmatch(path.name) and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
    shutil.rmtree(before, ignore_errors=True)


def end_with_parent() -> None:
    """Ends this process when its standard input ends, where the comparison that has started it asks for it.

    A comparison that is killed leaves no run behind that way.
    """
    if os.environ.pop(ENDS_WITH_STDIN, None):
        threading.Thread(target=_end_with_stdin, daemon=True).start()


def _end_with_stdin() -> None:
    while os.read(0, 1024):
        pass
    os._exit(1)


def run_script(name: str, prepare: Callable[[list[str]], Any]) -> Any:
    """Prepares and executes; bad input is one line, before any training time is spent."""
    end_with_parent()
    be_quiet()
    with one_line_errors(name):
        prepared = prepare(sys.argv[1:])
    return prepared.execute()
