"""What a run shows while it is at work: a line per epoch, a bar on a terminal, only warnings of use to a user."""

from __future__ import annotations

import ast
import re
import sys
import warnings
from logging import Filter, LogRecord
from typing import Any

import datasets
from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.utils import logging


def be_quiet() -> None:
    """Hides progress bars of loading and saving, and warnings about the internals of libraries."""
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    # peft reads an attribute that transformers deprecates; nothing here depends on it.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)


def show_progress(trainer: Trainer) -> None:
    """Replaces the Trainer's bars and dictionaries by a `Progress`, and hides what it says of tied weights."""
    TIED.keys = frozenset(getattr(trainer.model, "all_tied_weights_keys", None) or ())
    logging.get_logger("transformers.trainer").addFilter(TIED)
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(Progress())


class TiedWeights(Filter):
    """Hides the Trainer's report that a checkpoint lacks tied weights: it holds each under one of its names.

    Attributes:
        keys: the other names of the tied weights of the model in training.
    """

    keys: frozenset[str] = frozenset()

    def filter(self, record: LogRecord) -> bool:
        listed = re.search(r"missing keys in the checkpoint model loaded: (\[.*\])", record.getMessage())
        return listed is None or not self.keys.issuperset(ast.literal_eval(listed[1]))


TIED = TiedWeights()


class Progress(TrainerCallback):
    """A line per epoch with the losses, and a bar of optimiser steps where standard error is a terminal."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.ended = ""  # the epoch that has ended
        self.training: dict[str, float] = {}  # the last of every training loss since the last line
        self.validation: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and sys.stderr.isatty() and not args.disable_tqdm:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", leave=False)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._say()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            steps = f"step {state.global_step} of {state.max_steps}"
            self.ended = f"epoch {state.epoch:.3g} of {args.num_train_epochs:g} ({steps})"

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" in logs:
            self.training.update(logs)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        self.validation.update(metrics)  # several datasets are evaluated one after the other

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._say()
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _say(self) -> None:
        if self.ended:
            losses = _losses(self.training) + [f"validation {part}" for part in _losses(self.validation, "eval_")]
            tqdm.write(f"{self.ended}: {', '.join(losses)}", file=sys.stdout)
            sys.stdout.flush()
        self.ended, self.training, self.validation = "", {}, {}


def _losses(entry: dict[str, float], prefix: str = "") -> list[str]:
    """Every loss of an entry of the log, as words."""
    return [
        f"{name.removeprefix(prefix).replace('_', ' ')} {value:.4f}"
        for name, value in entry.items()
        if name.endswith("loss") and name.startswith(prefix)
    ]
