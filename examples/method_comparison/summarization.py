"""Compares fine-tuning methods on one summarisation set: one command, resumable, results as JSON.

    python examples/method_comparison/summarization.py --output_dir outputs/comparison --suite methods \
        -- --data_dir how2 --model_name_or_path outputs/backbone --num_train_epochs 10

Runs `how2_summarize.py` once for every method, learning rate and seed, skips what has a result, chooses each method's
learning rate by validation loss, and writes `results.json` and a Markdown table. What follows `--` goes to every run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

SCRIPT = Path(__file__).parents[1] / "how2_summarize.py"


@dataclass(frozen=True)
class Experiment:
    """Arguments of one row of the table, and the learning rates to choose from."""

    arguments: str
    learning_rates: tuple[float, ...]


ADAPTER_RATES, FULL_RATES = (1e-2, 3e-2), (3e-4, 1e-3)
METHODS = {
    "frozen": Experiment("--method none", (0.0,)),
    "full": Experiment("--method full --no_pvla", FULL_RATES),
    "bias": Experiment("--method bias --no_pvla", ADAPTER_RATES),
    "partial": Experiment("--method partial --no_pvla", FULL_RATES),
    "proj": Experiment("--method proj --no_pvla", FULL_RATES),
    "lora": Experiment("--method lora --no_pvla", ADAPTER_RATES),
    "adapter": Experiment("--method adapter --no_pvla", ADAPTER_RATES),
    "read": Experiment("--method read --no_pvla", ADAPTER_RATES),
    "read_pvla": Experiment("--method read", ADAPTER_RATES),
}
SUITES = {
    "methods": METHODS,
    "main": {name: METHODS[name] for name in ("frozen", "full", "read", "read_pvla")},
    # Table 6: no alignment, alignment of everything, partial alignment
    "table6": {
        "no VLA": METHODS["read"],
        "VLA": Experiment("--method read --pvla_mass 1.0", ADAPTER_RATES),
        "PVLA": METHODS["read_pvla"],
    },
    # Table 9: the distance that is minimised
    "table9": {
        "POT": METHODS["read_pvla"],
        **{
            name: Experiment(f"--method read --pvla_distance {name}", ADAPTER_RATES)
            for name in ("avg_cosine", "max_cosine", "avg_l2", "max_l2")
        },
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--suite", default="main", choices=sorted(SUITES))
    parser.add_argument("--only", nargs="*", help="rows of the suite to run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--learning_rates", type=float, nargs="*", help="replaces every row's own")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("rest", nargs="*", help="after --: arguments of how2_summarize.py")
    options = parser.parse_args()
    suite = SUITES[options.suite]
    if unknown := set(options.only or ()) - set(suite):
        parser.error(f"--only {sorted(unknown)}: the suite {options.suite!r} has {sorted(suite)}")
    suite = {name: row for name, row in suite.items() if not options.only or name in options.only}
    folder = Path(options.output_dir)
    runs = {
        (name, rate, seed): (run_folder(folder, row, rate, seed), row)
        for name, row in suite.items()
        for rate in (
            options.learning_rates if options.learning_rates and row.learning_rates[0] else row.learning_rates
        )
        for seed in options.seeds
    }
    # Two rows can be the same run (READ + PVLA is in every suite): each folder is run once.
    unique = {path: (row, rate, seed) for (_, rate, seed), (path, row) in runs.items()}
    with ThreadPoolExecutor(options.jobs) as pool:
        for failed in pool.map(lambda job: run(job[0], job[1], options.rest), unique.items()):
            if failed:
                print(failed, file=sys.stderr)
    results = {
        key: json.loads((path / "results.json").read_text())
        for key, (path, _) in runs.items()
        if (path / "results.json").exists()
    }
    rows = [table_row(name, results, options.seeds) for name in suite]
    chosen = [row for row in rows if row]
    (folder / f"{options.suite}.json").write_text(json.dumps(chosen, indent=2) + "\n")
    print(markdown(chosen))


def run_folder(folder: Path, row: Experiment, rate: float, seed: int) -> Path:
    name = "_".join(part.removeprefix("--") for part in row.arguments.split())
    return folder / f"{name}_lr{rate:g}_seed{seed}"


def run(path: Path, job: tuple[Experiment, float, int], rest: list[str]) -> str | None:
    row, rate, seed = job
    if (path / "results.json").exists():
        return None
    arguments = [*row.arguments.split(), "--seed", str(seed), "--output_dir", str(path), "--disable_tqdm", "true"]
    if rate:
        arguments += ["--learning_rate", str(rate)]
    path.mkdir(parents=True, exist_ok=True)
    with (path / "log.txt").open("w") as log:
        done = subprocess.run(
            [
                sys.executable,
                str(SCRIPT),
                *arguments,
                "--compare_zero_video",
                "false",
                "--measure_before",
                "false",
                *rest,
            ],
            env={"OMP_NUM_THREADS": "1", **os.environ},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    return f"{path} failed, see its log.txt" if done.returncode else None


def validation_loss(result: dict[str, Any]) -> float:
    losses = [entry["eval_loss"] for entry in result["log"] if "eval_loss" in entry]
    return losses[-1] if losses else 0.0


def table_row(name: str, results: dict[Any, Any], seeds: list[int]) -> dict[str, Any] | None:
    """The numbers of one method at the learning rate with the smallest mean validation loss."""
    by_rate: dict[float, list[dict[str, Any]]] = {}
    for (row, rate, _), result in results.items():
        if row == name:
            by_rate.setdefault(rate, []).append(result)
    complete = {rate: found for rate, found in by_rate.items() if len(found) == len(seeds)}
    if not complete:
        return None
    rate = min(complete, key=lambda rate: mean(map(validation_loss, complete[rate])))
    found = complete[rate]
    return {
        "name": name,
        "learning_rate": rate,
        "rates_tried": sorted(complete),
        "trainable": found[0]["trainable"],
        "share": found[0]["trainable"] / found[0]["parameters"],
        "validation_loss": mean(map(validation_loss, found)),
        "seconds": mean(result["seconds"] for result in found),
        "seeds": seeds,
        "rouge": {
            variant: {
                key: [result["rouge_after"][variant][key] for result in found]
                for key in ("rouge1", "rouge2", "rougeL")
            }
            for variant in ("rouge_score", "easy_rouge")
        },
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| method | trainable | share | learning rate | validation loss | ROUGE-1 | ROUGE-2 | ROUGE-L | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        scores = " | ".join(spread(row["rouge"]["rouge_score"][key]) for key in ("rouge1", "rouge2", "rougeL"))
        share = f"{100 * row['share']:.2f} %"
        rate = f"{row['learning_rate']:g}" if row["learning_rate"] else "–"
        loss = f"{row['validation_loss']:.3f}" if row["validation_loss"] else "–"
        lines.append(
            f"| {row['name']} | {row['trainable']:,} | {share} | {rate} | {loss} | {scores} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
