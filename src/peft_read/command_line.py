"""The command `peft-read`: what READ or another peft method adapts in a model; cards, a demonstration, a check."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

from huggingface_hub.utils import logging as hub_logging
from peft import PeftConfig
from transformers.utils import logging as transformers_logging

from . import bottleneck
from .backends import show_backends
from .demonstration import demonstrate
from .inspection import Inspection, aligned_table, inspect_model
from .peft_methods import AdapterConfig
from .peft_methods.card import update_model_card
from .peft_methods.settings import method_config, method_fields, read_settings, saved_config
from .recurrence import CELLS

__all__ = ["main"]

GPU_CHECK = Path("examples", "benchmarks", "gpu_check.py")
DESCRIPTION = "Shows what READ, or any other method of peft, adapts in a model and how many parameters it trains."


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; bad input is one line on the standard error and the exit status 2.

    Args:
        arguments: those of the command line; the process's own if absent.

    Returns:
        The exit status.
    """
    options = _parser().parse_args(arguments)
    transformers_logging.set_verbosity_error()
    hub_logging.set_verbosity_error()  # without a network the Hub's client reports every retry
    try:
        with warnings.catch_warnings():
            # Warnings of peft and transformers about their own settings, which the reader of a table cannot change.
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
            return int(options.run(options))
    except (OSError, ValueError, ImportError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        if "Please specify `target_modules`" in message:
            message += " Here that is --target-modules NAME ..."
        print(f"peft-read {options.command}: {message}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="peft-read", description=DESCRIPTION, epilog="peft-read COMMAND --help lists the options of a command."
    )
    parser.add_argument("--version", action="version", version=f"peft-read {metadata.version('peft-read')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    inspect = _command(
        commands, "inspect", _inspect, "show the modules that a method adapts in a model, as a table and a tree"
    )
    inspect.add_argument(
        "--method", default="read", help="read, bottleneck, lora or any other method of peft (default: read)"
    )
    inspect.add_argument(
        "--adapter", metavar="FOLDER", type=Path, help="take method, settings and base model from a saved adapter"
    )
    inspect.add_argument("--r", type=int, help="width or rank of the adapter; k in READ (default: 4)")
    inspect.add_argument("--cell", help=f"READ's recurrence: {', '.join(CELLS)} (default: rnn)")
    _add_model(inspect, needed=False)

    count = _command(
        commands, "count", _count, "count the trained parameters of several methods, widths and recurrences"
    )
    count.add_argument("--method", nargs="+", default=["read"], help="methods of peft (default: read)")
    count.add_argument("--r", type=int, nargs="+", help="widths or ranks (default: 4 8 16)")
    count.add_argument("--cell", nargs="+", help="READ's recurrences (default: rnn none)")
    _add_model(count)

    card = _command(commands, "card", _card, "print the model card of a saved adapter")
    card.add_argument("adapter", metavar="FOLDER", type=Path, help="a folder with adapter_config.json")
    card.add_argument("--write", action="store_true", help="write the card to FOLDER/README.md instead")

    demo = _command(
        commands,
        "demo",
        _demo,
        "train READ, and the same adapter without a recurrence, on a toy task: seconds, no download",
    )
    demo.add_argument("--steps", type=int, default=150, help="optimiser steps for each adapter (default: 150)")

    check = _command(commands, "check", _check, "print versions and backends, and check the kernels if there is a GPU")
    check.add_argument(
        "--checkout", metavar="FOLDER", type=Path, default=Path.cwd(),
        help="a checkout of peft_read, for its check of the kernels (default: the current folder)",
    )  # fmt: skip
    return parser


def _command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    parser.set_defaults(run=run)
    return parser


def _add_model(parser: argparse.ArgumentParser, *, needed: bool = True) -> None:
    text = "a folder with config.json, or a name on the Hub"
    parser.add_argument("model", metavar="MODEL", nargs=None if needed else "?", help=text)
    parser.add_argument(
        "--target-modules", nargs="+", metavar="NAME",
        help="modules to adapt: names, a regular expression, or language, vision, audio, all or all-linear (default: "
        "the method's own for the model)",
    )  # fmt: skip
    parser.add_argument("--exclude-modules", nargs="+", metavar="NAME", help="modules to leave out")
    parser.add_argument("--no-bias", action="store_true", help="READ without biases")
    parser.add_argument("--bidirectional", action="store_true", help="READ in both directions of time; encoders only")
    parser.add_argument(
        "--set",
        nargs="+",
        metavar="NAME=VALUE",
        default=[],
        help="other settings of the method's configuration, values as in YAML",
    )


def _config_of(options: argparse.Namespace, method: str, r: int | None, cell: str | None) -> PeftConfig:
    """The configuration of one method from the options; options of READ are refused for other methods."""
    given: dict[str, Any] = {"r": r, "exclude_modules": options.exclude_modules}
    given["target_modules"] = _target_modules(options.target_modules, method)
    if method.lower() == "read":
        given |= {"cell": cell, "bidirectional": options.bidirectional or None}
        given["use_bias"] = False if options.no_bias else None
    elif options.no_bias or options.bidirectional or cell is not None:
        raise ValueError(
            f"--cell, --no-bias and --bidirectional are READ's; settings of {method.upper()} go with --set"
        )
    settings = {name: value for name, value in given.items() if value is not None}
    further = read_settings(options.set)
    if twice := sorted(set(settings) & set(further)):
        raise ValueError(f"--set {twice[0]}=... sets what another option sets")
    return method_config(method, settings | further)


def _target_modules(names: list[str] | None, method: str) -> list[str] | str | None:
    """A list of names; a single word of the method ("vision", "all-linear") or an expression by itself."""
    if names is None or len(names) > 1:
        return names
    words = {"language", "vision", "audio", "all", "all-linear"}
    words |= {"feed_forward", "attention"} if method.upper() in bottleneck.NAMES else set()
    return names[0] if names[0] in words or not names[0].replace(".", "").isidentifier() else names


def _inspect(options: argparse.Namespace) -> int:
    if options.adapter is None:
        name, config = options.model, _config_of(options, options.method, options.r, options.cell)
    else:
        name, config = _of_adapter(options)
    if name is None:
        raise ValueError("which model? Name a folder with config.json, or a model on the Hub")
    inspection = inspect_model(name, config)
    print(inspection.summary(), inspection.table(), inspection.tree(), sep="\n\n")
    return 0


def _of_adapter(options: argparse.Namespace) -> tuple[str | None, PeftConfig]:
    """The model and the configuration of a saved adapter; its own base model where the command names none."""
    names = ("r", "cell", "target_modules", "exclude_modules", "no_bias", "bidirectional", "set")
    if options.method != "read" or any(getattr(options, name) not in (None, False, []) for name in names):
        raise ValueError("--adapter brings the method and its settings; leave out the options that set them")
    config = saved_config(options.adapter)
    return options.model or config.base_model_name_or_path, config


def _count(options: argparse.Namespace) -> int:
    reads = [method for method in options.method if method.lower() == "read"]
    ranked = [method for method in options.method if "r" in method_fields(method)]
    for option, given, takers in (("--cell", options.cell, reads), ("--r", options.r, ranked)):
        if given is not None and not takers:
            raise ValueError(f"{option} is not a setting of {', '.join(map(str.upper, options.method))}")
    inspections: list[tuple[str, int | None, Inspection]] = []
    for method in options.method:
        for cell in (options.cell or ["rnn", "none"]) if method in reads else [None]:
            for r in (options.r or [4, 8, 16]) if method in ranked else [None]:
                inspection = inspect_model(options.model, _config_of(options, method, r, cell))
                inspections.append((cell or "", r, inspection))
    only_read = len(reads) == len(options.method)
    head = ["cell", "k"] if only_read else ["method", "cell", "r"]
    rows = [
        [*([] if only_read else [inspection.method]), cell, "" if r is None else str(r), str(len(inspection.modules)),
         f"{inspection.trained:,}", f"{inspection.share:.4f} %"]
        for cell, r, inspection in inspections
    ]  # fmt: skip
    print(f"{inspection.model}, {inspection.base_parameters:,} parameters\n")
    print(aligned_table([*head, "modules", "trained parameters", "share"], rows))
    return 0


def _card(options: argparse.Namespace) -> int:
    folder: Path = options.adapter
    config = saved_config(folder)
    if not isinstance(config, AdapterConfig):
        raise ValueError(f"{folder} holds no adapter of this package; peft writes the cards of its own methods")
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
    print("A small frozen model with random weights learns sequences that repeat two random tokens (guessing: 2.08).")
    demonstrate(options.steps)
    return 0


def _check(options: argparse.Namespace) -> int:
    import torch

    for name in ("peft-read", "torch", "transformers", "peft", "accelerate"):
        print(f"{name} {metadata.version(name)}")
    print(show_backends())
    script = options.checkout / GPU_CHECK
    if not torch.cuda.is_available():
        print(f"no CUDA device, so no kernels to check (with one, this command runs {GPU_CHECK} of a checkout)")
        return 0
    if not script.is_file():
        print(
            f"kernels not checked: {options.checkout} is not a checkout of peft_read, it has no {GPU_CHECK} "
            "(--checkout FOLDER)"
        )
        return 0
    return subprocess.run([sys.executable, str(script)], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
