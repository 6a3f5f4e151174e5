"""Compares the methods of VL-Adapter, and READ, on several tasks at once: one command, resumable, results as JSON.

    python examples/method_comparison/multitask.py --output_dir outputs/vl_comparison --suite methods \
        --seeds 0 1 2 --select_seeds 1 --jobs 2 -- --data_dir scenes --num_train_samples 1500

Runs `vl_multitask.py` once for every method, learning rate and seed, skips what has a result, chooses each method's
learning rate by the mean validation loss of the tasks, and writes `<suite>.json`, a Markdown table and a picture with
a bar per task and method. What follows `--` goes to every run.
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

from comparison import Comparison, Experiment, Results, build_parser, choose, described, loss_cell, spread
from comparison import markdown as table
from multitask_report import draw_tasks

SCRIPT = Path(__file__).parents[1] / "vl_multitask.py"
FIXED = ("--measure_before", "false")
FULL_RATES, ADAPTER_RATES = (3e-4, 1e-3), (1e-3, 3e-3)
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
    rows = [row for name in comparison.rows if (row := table_row(name, results, comparison))]
    if rows:
        means = {row["name"]: {task: mean(values) for task, values in row["scores"].items()} for row in rows}
        draw_tasks(comparison.folder / f"{comparison.options.suite}.png", means, rows[0]["metrics"])
    return comparison.write(rows, markdown(rows))


def score(result: dict[str, Any]) -> float:
    """The last validation losses of the tasks, their mean, negative."""
    last = {name: value for entry in result["log"] for name, value in entry.items() if name.startswith("eval_")}
    losses = [value for name, value in last.items() if name.endswith("_loss") and "pvla" not in name]
    return -mean(losses) if losses else 0.0


def table_row(name: str, results: Results, comparison: Comparison) -> dict[str, Any] | None:
    """The numbers of one method at the learning rate with the smallest mean validation loss."""
    chosen = choose(name, results, comparison.wanted(name), score, selection=comparison.selection)
    if chosen is None:
        return None
    metrics = chosen.results[0]["metrics"]
    return described(name, chosen) | {
        "validation_loss": 0.0 - mean(map(score, chosen.results)),
        "metrics": metrics,
        "scores": {task: [result["after"][task] for result in chosen.results] for task in metrics},
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table: mean ± standard deviation over the seeds."""
    if not rows:
        return table([], [], lambda row: [])
    metrics = rows[0]["metrics"]

    def cells(row: dict[str, Any]) -> list[str]:
        return [loss_cell(row), *(spread(row["scores"][task]) for task in metrics), f"{row['seconds']:.0f}"]

    return table(
        ["validation loss", *(f"{task} ({metric})" for task, metric in metrics.items()), "seconds"], rows, cells
    )


if __name__ == "__main__":
    main()
