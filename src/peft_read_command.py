"""The options of the command `peft-read`, read before anything that takes seconds to import is needed.

It stands beside the package and not in it: importing any part of `peft_read` imports torch, transformers and peft, in
order to register READ. `peft_read.command_line` runs the commands.
"""

from __future__ import annotations

import argparse
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["main", "own_version", "parser"]

DESCRIPTION = "Shows what READ, or any other method of peft, adapts in a model and how many parameters it trains."
CELLS = ("rnn", "gru", "lstm", "none")  # peft_read.recurrence has them; a test compares


def main(arguments: list[str] | None = None) -> int:
    """Reads the options, then imports the package and runs the command; help and wrong options need no import.

    Args:
        arguments: those of the command line; the process's own if absent.

    Returns:
        The exit status.
    """
    options = parser().parse_args(arguments)
    from peft_read.command_line import run

    return run(options)


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="peft-read", description=DESCRIPTION, epilog="peft-read COMMAND --help lists the options of a command."
    )
    parser.add_argument("--version", action="version", version=f"peft-read {own_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    inspect = _command(commands, "inspect", "show the modules that a method adapts in a model, as a table and a tree")
    inspect.add_argument(
        "--method", default="read", help="read, bottleneck, lora or any other method of peft (default: read)"
    )
    inspect.add_argument(
        "--adapter", metavar="FOLDER", type=Path, help="take method, settings and base model from a saved adapter"
    )
    inspect.add_argument("--r", type=int, help="width or rank of the adapter; k in READ (default: 4)")
    inspect.add_argument("--cell", help=f"READ's recurrence: {', '.join(CELLS)} (default: rnn)")
    _add_model(inspect, needed=False)

    count = _command(commands, "count", "count the trained parameters of several methods, widths and recurrences")
    count.add_argument("--method", nargs="+", default=["read"], help="methods of peft (default: read)")
    count.add_argument("--r", type=int, nargs="+", help="widths or ranks (default: 4 8 16)")
    count.add_argument("--cell", nargs="+", help="READ's recurrences (default: rnn none)")
    _add_model(count)

    card = _command(commands, "card", "print the model card of a saved adapter")
    card.add_argument("adapter", metavar="FOLDER", type=Path, help="a folder with adapter_config.json")
    card.add_argument("--write", action="store_true", help="write the card to FOLDER/README.md instead")

    demo = _command(
        commands,
        "demo",
        "train READ, and the same adapter without a recurrence, on a toy task: seconds, no download",
    )
    demo.add_argument("--steps", type=int, default=150, help="optimiser steps for each adapter (default: 150)")

    check = _command(commands, "check", "print versions and backends, and check the kernels if there is a GPU")
    check.add_argument(
        "--checkout", metavar="FOLDER", type=Path, default=Path.cwd(),
        help="a checkout of peft_read, for its check of the kernels (default: the current folder)",
    )  # fmt: skip
    return parser


def _command(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=f"{text[0].upper()}{text[1:]}."
    )
    return command


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


def own_version() -> str:
    """The version of the package, or that it is not installed."""
    try:
        return metadata.version("peft-read")
    except metadata.PackageNotFoundError:  # a source tree on the path
        return "of a source tree that is not installed"


if __name__ == "__main__":
    sys.exit(main())
