"""The one-page report of `how2_summarize.py`: numbers, a picture of the learning curves, summaries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from peft_read.files import write_whole

NAMES = {
    "rouge_score": "rouge-score 0.1.2 conventions: lower-case alphanumeric tokens, no stemming",
    "easy_rouge": "easy-rouge conventions: white-space tokens",
}


def write_report(folder: Path, result: dict[str, Any]) -> str:
    """Writes `report.md` and `learning_curve.png`; returns a short version for the terminal."""
    lines = [f"# {result['method']} on {result['arguments']['data_dir']}", "", *_trained(result), ""]
    lines += ["## ROUGE on the test split", "", *_rouge_table(result), ""]
    if result.get("log"):
        _draw(folder / "learning_curve.png", result["log"])
        lines += ["## Learning", "", _losses(result["log"]), "", "![learning curve](learning_curve.png)", ""]
    lines += ["## Summaries", ""]
    for example in result["examples"]:
        lines += [f"- reference: {example['reference']}"]
        lines += [f"  - before: {example['before']}", f"  - after: {example['after']}"]
    with write_whole(folder / "report.md") as file:
        file.write("\n".join(lines) + "\n")

    short = ["", *_trained(result), *_rouge_table(result)]
    if result.get("log"):
        short.append(_losses(result["log"]))
    short.append(f"report: {folder / 'report.md'} ({result['seconds']:.0f} s in all)")
    return "\n".join(short)


def _trained(result: dict[str, Any]) -> list[str]:
    share = 100 * result["trainable"] / result["parameters"]
    lines = [
        f"- method: {result['method']}; {result['sizes']['train']} training, {result['sizes']['validation']}"
        f" validation, {result['sizes']['test']} test items; {result['world_size']} process(es)",
        f"- trainable parameters: {result['trainable']:,} of {result['parameters']:,} ({share:.2f} %)",
    ]
    if result["new_modules"]:
        lines.append(f"- new visual modules, trained and saved with the adapter: {', '.join(result['new_modules'])}")
    elif result["method"] != "full":
        lines.append("- visual modules: pretrained, frozen")
    if "adapter_bytes" in result:
        same = "the same" if result["reloaded_is_identical"] else "DIFFERENT"
        lines.append(f"- adapter: {result['adapter']} ({result['adapter_bytes'] / 1e6:.3f} MB)")
        lines.append(f"- reloaded into a fresh backbone: {same} summaries on {result['reloaded']} test items")
    elif "adapter" in result:
        lines.append(f"- model: {result['adapter']}")
    return lines


def _rouge_table(result: dict[str, Any]) -> list[str]:
    rows = [("frozen backbone", result.get("rouge_before"))]
    if result.get("log"):
        rows.append((f"adapted: {result['method']}", result["rouge_after"]))
    rows.append(("the same adapter, video zeroed at test time", result.get("rouge_zeroed_at_test")))
    rows.append(("adapted without video", result.get("without_video", {}).get("rouge_after")))
    lines = []
    for variant, name in NAMES.items():
        lines += [f"{name}", "", "| | ROUGE-1 | ROUGE-2 | ROUGE-L |", "|---|---|---|---|"]
        for label, scores in rows:
            if scores:
                values = " | ".join(f"{scores[variant][key]:.2f}" for key in ("rouge1", "rouge2", "rougeL"))
                lines.append(f"| {label} | {values} |")
        lines.append("")
    return lines


def _losses(log: list[dict[str, float]]) -> str:
    training = [entry for entry in log if "loss" in entry]
    parts = []
    for key, name in (("task_loss", "task loss"), ("pvla_loss", "PVLA loss"), ("loss", "total loss")):
        if training and key in training[0]:
            parts.append(f"{name} {training[0][key]:.4f} -> {training[-1][key]:.4f}")
    lines = ["- training: " + ", ".join(parts)]
    if training and "pvla_loss" in training[0]:
        lines.append("- PVLA loss: partial transport distance between video and text states; lower = better aligned")
    return "\n".join(lines)


def _draw(path: Path, log: list[dict[str, float]]) -> None:
    figure, left = plt.subplots(figsize=(7, 4), layout="constrained")
    right = left.twinx()
    for axis, key, label, style in (
        (left, "task_loss", "task loss", "C0-"),
        (left, "eval_loss", "validation task loss", "C0o--"),
        (right, "pvla_loss", "PVLA loss", "C1-"),
        (right, "eval_pvla_loss", "validation PVLA loss", "C1o--"),
    ):
        entries = [entry for entry in log if key in entry and (key != "task_loss" or "loss" in entry)]
        if entries:
            axis.plot([e["step"] for e in entries], [e[key] for e in entries], style, label=label, markersize=4)
    left.set_xlabel("optimiser step")
    left.set_ylabel("cross-entropy per token")
    right.set_ylabel("alignment distance")
    handles = [axis.get_legend_handles_labels() for axis in (left, right)]
    left.legend(handles[0][0] + handles[1][0], handles[0][1] + handles[1][1], loc="center right")
    with write_whole(path, "wb") as file:
        figure.savefig(file, dpi=120, format="png")
    plt.close(figure)
