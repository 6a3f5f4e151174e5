"""What the benchmark scripts share: arguments, the name of the processor, the files they write and the picture."""

import argparse
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


def build_parser(
    description: str | None, *, quick: str, repeats: str, default_repeats: int | None = None, picture: bool = True
) -> argparse.ArgumentParser:
    """The options that every benchmark takes.

    Args:
        description: the script's docstring.
        quick: help of `--quick`.
        repeats: help of `--repeats`.
        default_repeats: default of `--repeats`; None where the script chooses.
        picture: whether `--output` writes one.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--repeats", type=int, default=default_repeats, help=repeats)
    files = "OUTPUT.json, OUTPUT.md and OUTPUT.png" if picture else "OUTPUT.json and OUTPUT.md"
    parser.add_argument("--output", type=Path, help=f"write {files}")
    return parser


def write_report(output: Path | None, report: str, content: Any, draw: Callable[[Path], None] | None = None) -> None:
    """Writes the report as Markdown, its numbers as JSON, and a picture.

    Args:
        output: the files without their endings; None writes nothing.
        report: Markdown.
        content: what JSON can hold.
        draw: draws the picture into a file; None for no picture.
    """
    if output is None:
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    output.with_suffix(".md").write_text(report + "\n")
    if draw is not None:
        draw(output.with_suffix(".png"))


def processor() -> str:
    """The processor's name and its number of cores."""
    try:
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        return f"{names[0].split(':')[1].strip()} ({len(names)} cores)"
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def draw_times(
    path: Path, rows: Mapping[str, Mapping[str, float]], methods: Sequence[str], *, xlabel: str, legend: str = ""
) -> None:
    """Draws time against method on a logarithmic axis, a line for each row of the table.

    Args:
        path: the picture.
        rows: milliseconds by row and method; a row may lack methods.
        methods: from the bottom to the top of the picture.
        xlabel: label of the axis of time.
        legend: title of the legend.
    """
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed: no picture")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    for row, times in rows.items():
        measured = [method for method in methods if method in times]
        axes.plot([times[method] for method in measured], measured, marker="o", label=row, linewidth=1)
    axes.set_xscale("log")
    axes.set_xlabel(xlabel)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=7, title=legend, title_fontsize=7)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
