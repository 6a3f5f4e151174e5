"""The command `peft-read`: what READ would adapt, how much it trains, model cards, a demonstration, a check."""

from __future__ import annotations

import argparse
import runpy
import shutil
import sys
import tempfile
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from .adapter import READConfig
from .backends import show_backends
from .demonstration import demonstrate
from .inspection import aligned_table, inspect_model
from .peft_methods import AdapterConfig
from .peft_methods.card import update_model_card
from .recurrence import CELLS

__all__ = ["main"]

GPU_CHECK = Path("examples", "benchmarks", "gpu_check.py")


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; bad input is one line on the standard error and the exit status 2.

    Args:
        arguments: those of the command line; the process's own if absent.

    Returns:
        The exit status.
    """
    options = _parser().parse_args(arguments)
    transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            # peft asks transformers for names that are going away, which the reader of a table cannot change.
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            return int(options.run(options))
    except (OSError, ValueError, ImportError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"peft-read {options.command}: {message}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="peft-read", description=__doc__)
    parser.add_argument("--version", action="version", version=f"peft-read {metadata.version('peft-read')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    inspect = _command(commands, "inspect", _inspect, "what READ would adapt in a model: a table and a tree")
    inspect.add_argument("--r", type=int, default=4, help="the width k (4)")
    inspect.add_argument("--cell", default="rnn", help=f"the recurrence: {', '.join(CELLS)} (rnn)")
    _add_model(inspect)

    count = _command(commands, "count", _count, "how many parameters READ trains, for several widths and recurrences")
    count.add_argument("--r", type=int, nargs="+", default=[4, 8, 16], help="the widths k (4 8 16)")
    count.add_argument("--cell", nargs="+", default=["rnn", "none"], help="the recurrences (rnn none)")
    _add_model(count)

    card = _command(commands, "card", _card, "the model card of a saved adapter, made from its files")
    card.add_argument("adapter", metavar="FOLDER", type=Path, help="the folder with adapter_config.json")
    card.add_argument("--write", action="store_true", help="write it into FOLDER/README.md instead of printing it")

    demo = _command(commands, "demo", _demo, "READ at work in some seconds, without a download")
    demo.add_argument("--steps", type=int, default=150, help="optimiser steps for each adapter (150)")

    check = _command(commands, "check", _check, "versions, backends and, where there is a GPU, its kernels")
    check.add_argument("--checkout", type=Path, default=Path.cwd(), help="the checkout with examples/ (here)")
    return parser


def _command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    parser.set_defaults(run=run)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a folder with config.json, or a name on the Hub")
    parser.add_argument("--target-modules", nargs="+", metavar="NAME", help="READ's default for the model if absent")
    parser.add_argument("--exclude-modules", nargs="+", metavar="NAME")
    parser.add_argument("--no-bias", action="store_true", help="without biases")
    parser.add_argument("--bidirectional", action="store_true", help="both directions of time; encoders only")


def _read_config(options: argparse.Namespace, r: int, cell: str) -> READConfig:
    targets = options.target_modules
    if targets is not None and len(targets) == 1:
        targets = targets[0] if _is_word_or_pattern(targets[0]) else targets
    return READConfig(
        r=r,
        cell=cell,
        target_modules=targets,
        exclude_modules=options.exclude_modules,
        use_bias=not options.no_bias,
        bidirectional=options.bidirectional,
    )


def _is_word_or_pattern(target: str) -> bool:
    """Whether a single target is a word of READ's ("vision", "all-linear") or an expression, not a module's name."""
    return target in ("language", "vision", "audio", "all", "all-linear") or not target.replace(".", "").isidentifier()


def _inspect(options: argparse.Namespace) -> int:
    inspection = inspect_model(options.model, _read_config(options, options.r, options.cell))
    print(inspection.summary(), inspection.table(), inspection.tree(), sep="\n\n")
    return 0


def _count(options: argparse.Namespace) -> int:
    rows = []
    for cell in options.cell:
        for r in options.r:
            inspection = inspect_model(options.model, _read_config(options, r, cell))
            rows.append([cell, str(r), str(len(inspection.modules)), f"{inspection.trained:,}"])
            rows[-1].append(f"{inspection.share:.4f} %")
    print(f"{inspection.model}, {inspection.base_parameters:,} parameters\n")
    print(aligned_table(["cell", "k", "modules", "trained parameters", "share"], rows))
    return 0


def _card(options: argparse.Namespace) -> int:
    folder: Path = options.adapter
    if not (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} holds no adapter: there is no adapter_config.json in it")
    config = AdapterConfig.from_pretrained(str(folder))
    if not isinstance(config, AdapterConfig):
        raise ValueError(f"{folder} holds an adapter of another method, {config.peft_type.value}")
    mapping = config.auto_mapping if isinstance(config.auto_mapping, dict) else None
    with tempfile.TemporaryDirectory() as scratch:
        place = folder if options.write else Path(scratch)
        if not options.write:
            for path in folder.glob("*"):
                if path.name in ("README.md", "adapter_model.safetensors", "adapter_model.bin"):
                    shutil.copy(path, place)
        update_model_card(place, config, mapping)
        if not (place / "README.md").is_file():
            raise ValueError(f"{folder} holds no adapter weights (adapter_model.safetensors or .bin)")
        if options.write:
            print(f"wrote {folder / 'README.md'}")
        else:
            print((place / "README.md").read_text(encoding="utf-8"))
    return 0


def _demo(options: argparse.Namespace) -> int:
    if options.steps < 1:
        raise ValueError(f"--steps should be a positive number, got {options.steps}")
    print("A small frozen model with random weights, and sequences that repeat two random tokens (chance: 2.08).")
    demonstrate(options.steps)
    return 0


def _check(options: argparse.Namespace) -> int:
    import torch

    for name in ("peft-read", "torch", "transformers", "peft", "accelerate"):
        print(f"{name} {metadata.version(name)}")
    print(show_backends())
    script = options.checkout / GPU_CHECK
    if not torch.cuda.is_available():
        print("no CUDA device: nothing more to check; on one, examples/benchmarks/gpu_check.py checks the kernels")
        return 0
    if not script.is_file():
        print(
            f"the check of the kernels is {GPU_CHECK} of a checkout; {options.checkout} has none (--checkout FOLDER)"
        )
        return 0
    return int(runpy.run_path(str(script))["main"]([]) or 0)


if __name__ == "__main__":
    sys.exit(main())
