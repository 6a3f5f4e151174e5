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
from peft.utils import CONFIG_NAME
from transformers.utils import logging as transformers_logging

from peft_read_command import own_version, parser

from . import bottleneck
from .backends import show_backends
from .demonstration import demonstrate
from .inspection import Inspection, aligned_table, inspect_model
from .peft_methods import AdapterConfig
from .peft_methods.card import saved_parameters, update_model_card
from .peft_methods.settings import method_config, method_fields, read_settings, saved_config

__all__ = ["main", "run"]

GPU_CHECK = Path("examples", "benchmarks", "gpu_check.py")


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; bad input is one line on the standard error and the exit status 2.

    Args:
        arguments: those of the command line; the process's own if absent.

    Returns:
        The exit status.
    """
    return run(parser().parse_args(arguments))


def run(options: argparse.Namespace) -> int:
    """Runs the command that the options of `peft_read_command` name; see `main`."""
    transformers_logging.set_verbosity_error()
    hub_logging.set_verbosity_error()  # without a network the Hub's client reports every retry
    try:
        with warnings.catch_warnings():
            # Warnings of peft and transformers about their own settings, which the reader of a table cannot change.
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
            return COMMANDS[options.command](options)
    except (OSError, ValueError, ImportError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        if "`target_modules`" in message:
            message = message.removesuffix(".") + ". Here that is --target-modules NAME ..."
        print(f"peft-read {options.command}: {message}", file=sys.stderr)
        return 2


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
    if not name:
        nameless = "" if options.adapter is None else f" {options.adapter} does not name its base model."
        raise ValueError(f"which model?{nameless} Name a folder with config.json, or a model on the Hub")
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
    saved_parameters(folder)  # damaged weights are those of the folder, not of a copy
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
    if not config.base_model_name_or_path:
        print(
            f"peft-read card: {folder / CONFIG_NAME} does not name the base model, so the card names none; with "
            "base_model_name_or_path in that file it does",
            file=sys.stderr,
        )
    return 0


def _demo(options: argparse.Namespace) -> int:
    if options.steps < 1:
        raise ValueError(f"--steps should be a positive number, got {options.steps}")
    print("A small frozen model with random weights learns sequences that repeat two random tokens (guessing: 2.08).")
    demonstrate(options.steps)
    return 0


def _check(options: argparse.Namespace) -> int:
    import torch

    print(f"peft-read {own_version()}")
    for name in ("torch", "transformers", "peft", "accelerate"):
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


COMMANDS = {"inspect": _inspect, "count": _count, "card": _card, "demo": _demo, "check": _check}

if __name__ == "__main__":
    sys.exit(main())
