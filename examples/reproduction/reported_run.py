"""The frame around the training of `how2_summarize.py` and `vl_multitask.py`: its output folder and its report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from run_folder import RunFolder, run_arguments, write_json


def claim_folder(script: Any, training: Any, parts: Iterable[str] = ("",)) -> RunFolder | None:
    """Claims the output folder in the main process, before the others go on; None in those."""
    with training.main_process_first(desc="preparing the output folder"):
        if training.process_index == 0:
            return RunFolder(Path(training.output_dir), run_arguments(script, training), parts)
    return None


def execute_and_report(
    folder: RunFolder | None,
    script: Any,
    training: Any,
    *,
    train: Callable[[], dict[str, Any]],
    write_report: Callable[[Path, dict[str, Any]], str],
) -> dict[str, Any]:
    """Trains and writes the report; the folder is released whatever happens.

    Args:
        folder: of the main process, which writes.
        script: the arguments that the report shows.
        training: the Trainer's arguments.
        train: trains and measures; its numbers are the beginning of the result.
        write_report: writes the report into a folder, and returns its text.

    Returns:
        The result as in results.json.
    """
    started = time.time()
    try:
        result = train()
        seconds = time.time() - started if folder is None else folder.seconds
        result |= {"seconds": seconds, "world_size": training.world_size, "arguments": asdict(script)}
        if folder is not None:
            print(write_report(folder.folder, result))
            write_json(folder.folder / "results.json", result)  # the last file: with it, the run is finished
            folder.remove_checkpoints()
        return result
    finally:
        if folder is not None:
            folder.release()
