"""Compares the methods of VL-Adapter, and READ, on several tasks at once: one command, resumable, results as JSON.

    python examples/method_comparison/multitask.py --output_dir outputs/vl_comparison --suite methods \
        --seeds 0 1 2 --select_seeds 1 --jobs 2 -- --data_dir scenes --num_train_samples 1500

Runs `vl_multitask.py` once for every method, learning rate and seed, skips what has a result, chooses each method's
learning rate by the mean validation loss of the tasks, and writes `<suite>.json`, a Markdown table and a picture with
a bar per task and method; every method also as its difference from full fine-tuning. What follows `--` goes to every
run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from comparison import Choice, Comparison, Experiment, build_parser, choose, described, loss_cell, spread
from comparison import markdown as table
from multitask_report import draw_tasks
from significance import compare, holm

SCRIPT = Path(__file__).parents[1] / "vl_multitask.py"
REFERENCE = "full"
FIXED = ("--measure_before", "false")
FULL_RATES, ADAPTER_RATES = (3e-4, 1e-3), (3e-3,)
METHODS = {
    "frozen": Experiment("--method none", (0.0,)),
    "full": Experiment("--method full", FULL_RATES),
    "bitfit": Experiment("--method bitfit", ADAPTER_RATES),
    "prompt": Experiment("--method prompt", ADAPTER_RATES),
    "lora": Experiment("--method lora", ADAPTER_RATES),
    "adapter, single": Experiment("--method adapter", ADAPTER_RATES),
    "adapter, half (down)": Experiment("--method adapter --share half_down", ADAPTER_RATES),
    "adapter, half (up)": Experiment("--method adapter --share half_up", ADAPTER_RATES),
    "adapter, multiple": Experiment("--method adapter --share multiple", ADAPTER_RATES),
    "compacter": Experiment("--method compacter", ADAPTER_RATES),
    "hyperformer": Experiment("--method hyperformer", ADAPTER_RATES),
    "read": Experiment("--method read", ADAPTER_RATES),
    "read + PVLA": Experiment("--method read_pvla", ADAPTER_RATES),
}
SUITES = {
    "methods": METHODS,
    "main": {name: METHODS[name] for name in ("full", "lora", "adapter, single", "read", "read + PVLA")},
    "sharing": {name: row for name, row in METHODS.items() if name.startswith("adapter")},
}


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = build_parser(__doc__, SUITES, SCRIPT)
    comparison = Comparison(parser, parser.parse_args(argv), SUITES, script=SCRIPT, score=score, fixed=FIXED)
    results = comparison.run()
    choices = {
        name: choice
        for name in comparison.rows
        if (choice := choose(name, results, comparison.wanted(name), score, selection=comparison.selection))
    }
    rows = [table_row(name, choice) for name, choice in choices.items()]
    if REFERENCE in choices:
        add_differences(rows, choices)
    if rows:
        means = {row["name"]: {task: mean(values) for task, values in row["scores"].items()} for row in rows}
        draw_tasks(comparison.folder / f"{comparison.options.suite}.png", means, rows[0]["metrics"])
    return comparison.write(rows, markdown(rows))


def score(result: dict[str, Any]) -> float:
    """The last validation losses of the tasks, their mean, negative."""
    last = {name: value for entry in result["log"] for name, value in entry.items() if name.startswith("eval_")}
    losses = [value for name, value in last.items() if name.endswith("_loss") and "pvla" not in name]
    return -mean(losses) if losses else 0.0


def table_row(name: str, choice: Choice) -> dict[str, Any]:
    """The numbers of one method at the learning rate with the smallest mean validation loss."""
    metrics = choice.results[0]["metrics"]
    return described(name, choice) | {
        "validation_loss": 0.0 - mean(map(score, choice.results)),
        "metrics": metrics,
        "scores": {task: [result["after"][task] for result in choice.results] for task in metrics},
    }


def add_differences(rows: list[dict[str, Any]], choices: Mapping[str, Choice]) -> None:
    """Puts into each row how it differs from full fine-tuning on every task: paired by seed and test example.

    The interval and p-value are of a bootstrap over seeds and over what examples have in common (NLVR's sentence, the
    tangram, the image); p-values are adjusted for the number of methods, task by task.
    """
    reference = choices[REFERENCE]
    compared = [row for row in rows if row["name"] != REFERENCE and row["seeds"] == sorted(reference.seeds)]
    for task, units in reference.results[0]["units"].items():
        full = [result["scores"][task] for result in reference.results]
        differences = {
            row["name"]: compare(
                [result["scores"][task] for result in choices[row["name"]].results], full, groups=units
            )
            for row in compared
        }
        adjusted = holm({name: difference.p_both for name, difference in differences.items()})
        for row in compared:
            interval = differences[row["name"]].over_both
            row.setdefault("against_full", {})[task] = {**interval._asdict(), "p": adjusted[row["name"]]}


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table: mean ± standard deviation over the seeds."""
    if not rows:
        return table([], [], lambda row: [])
    metrics = rows[0]["metrics"]

    def cells(row: dict[str, Any]) -> list[str]:
        return [loss_cell(row), *(spread(row["scores"][task]) for task in metrics), f"{row['seconds']:.0f}"]

    head = [f"{task} ({metric})" for task, metric in metrics.items()]
    first = table(["validation loss", *head, "seconds"], rows, cells)
    compared = [row for row in rows if "against_full" in row]
    return "\n".join([first, "", *difference_table(compared, head)]) if compared else first


def difference_table(rows: list[dict[str, Any]], head: list[str]) -> list[str]:
    """The second table: the difference from full fine-tuning, its 95 % interval and the adjusted p-value."""
    lines = ["| minus full | " + " | ".join(head) + " |", "|" + "---|" * (1 + len(head))]
    for row in rows:
        cells = [
            f"{d['mean']:+.1f} [{d['low']:+.1f}, {d['high']:+.1f}], {p_value(d['p'])}"
            for d in row["against_full"].values()
        ]
        lines.append("| " + " | ".join([row["name"], *cells]) + " |")
    return lines


def p_value(p: float) -> str:
    return f"p = {p:.3f}" if p >= 0.001 else "p < 0.001"


if __name__ == "__main__":
    main()
