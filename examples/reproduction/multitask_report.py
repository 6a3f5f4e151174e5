"""The one-page report of `vl_multitask.py`: numbers of each task and a picture with a bar per task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from peft_read.files import write_whole


def write_report(folder: Path, result: dict[str, Any]) -> str:
    """Writes `report.md` and `tasks.png`; returns a short version for the terminal."""
    draw_tasks(folder / "tasks.png", {result["method"]: result["after"]} | _before(result), result["metrics"])
    lines = [*_head(result), "", *_table(result)]
    page = [f"# {result['method']} on {result['suite']}", "", *lines, "", "![one bar per task](tasks.png)", ""]
    for task, examples in result["examples"].items():
        page += [f"## {task}", ""]
        for example in examples:
            page += [f"- {example['text']}", f"  - reference: {example['reference']}", f"  - {example['prediction']}"]
        page.append("")
    with write_whole(folder / "report.md") as file:
        file.write("\n".join(page) + "\n")
    return "\n".join(["", *lines, f"report: {folder / 'report.md'} ({result['seconds']:.0f} s in all)"])


def draw_tasks(path: Path, scores: dict[str, dict[str, float]], metrics: dict[str, str]) -> None:
    """A bar per task and method.

    Args:
        path: of the picture.
        scores: by method and task.
        metrics: by task, the name of what is drawn.
    """
    tasks = list(metrics)
    figure, axes = plt.subplots(1, len(tasks), figsize=(2.6 * len(tasks), 3.4), layout="constrained", squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        for place, by_task in enumerate(scores.values()):
            bar = axis.bar(place, by_task[task], color=f"C{place % 10}")
            axis.bar_label(bar, fmt="%.1f", fontsize=8)
            axis.set_xticks(range(len(scores)), list(scores), rotation=60, ha="right", fontsize=8)
        axis.set_title(f"{task}\n({metrics[task]})", fontsize=9)
    with write_whole(path, "wb") as file:
        figure.savefig(file, dpi=120, format="png")
    plt.close(figure)


def _before(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {"frozen backbone": result["before"]} if result.get("before") else {}


def _head(result: dict[str, Any]) -> list[str]:
    share = 100 * result["trainable"] / result["parameters"]
    sizes = "; ".join(
        f"{task} {' / '.join(str(result['sizes'][split][task]) for split in result['sizes'])}"
        for task in result["metrics"]
    )
    lines = [
        f"- method: {result['method']}; {result['world_size']} process(es)",
        f"- examples to train, select and report: {sizes}",
        f"- trainable parameters: {result['trainable']:,} of {result['parameters']:,} ({share:.2f} %)",
    ]
    if "saved_bytes" in result:
        same = "the same" if result["reloaded_is_identical"] else "DIFFERENT"
        lines.append(f"- saved: {result['saved']} ({result['saved_bytes'] / 1e6:.3f} MB); reloaded: {same} answers")
    return lines


def _table(result: dict[str, Any]) -> list[str]:
    tasks = list(result["metrics"])
    lines = [
        "| | " + " | ".join(f"{task} ({result['metrics'][task]})" for task in tasks) + " |",
        "|---|" + "---|" * len(tasks),
    ]
    for label, scores in (("frozen backbone", result.get("before")), (result["method"], result["after"])):
        if scores:
            lines.append(f"| {label} | " + " | ".join(f"{scores[task]:.2f}" for task in tasks) + " |")
    return lines
