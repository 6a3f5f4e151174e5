"""Compares fine-tuning methods on a grounding dataset: one command, resumable, results as JSON.

    python examples/method_comparison/grounding.py --output_dir outputs/grounding --suite main --seeds 0 1 2 --jobs 2 \
        -- --train_file highlight_val_release.jsonl --num_train_samples 700 \
        --test_file highlight_test_with_gt.jsonl --features val_captions.npz,test_captions.npz \
        --text_encoder sentence-transformers/all-MiniLM-L6-v2 --projection pca.npz --text_cache outputs/text.npz \
        --model_name_or_path outputs/grounding_backbone --num_train_epochs 20
    python examples/method_comparison/grounding.py --output_dir outputs/tvsum --suite tvsum --domains all \
        -- --dataset tvsum --train_file tvsum50.jsonl ...

Runs `ground_moments.py` once for every method, learning rate, seed and domain, skips what has a result, chooses each
method's learning rate by validation mAP (where there is a validation split), and writes `<suite>.json` and a Markdown
table. What follows `--` goes to every run. The low-resource subset is the same for every seed (`--subset_seed`): the
seed is that of the training.
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

from peft_read.data import TVSUM_DOMAINS

SCRIPT = Path(__file__).parents[1] / "ground_moments.py"
SELECTION = "MR-full-mAP"
SHOWN = {
    "qvhighlights": {
        "R1@0.5": "MR-full-R1@0.5",
        "R1@0.7": "MR-full-R1@0.7",
        "mAP": "MR-full-mAP",
        "HL mAP": "HL-min-VeryGood-mAP",
        "Hit@1": "HL-min-VeryGood-Hit1",
    },
    "tvsum": {"top-5 mAP": "top5-mAP"},
    "youtube_highlights": {"mAP": "mAP"},
}


@dataclass(frozen=True)
class Experiment:
    """Arguments of one row of the table, and the learning rates to choose from."""

    arguments: str
    learning_rates: tuple[float, ...]


ADAPTER_RATES, FULL_RATES = (1e-3, 3e-3), (1e-4, 4e-4)
METHODS = {
    "no adaptation": Experiment("--method none", (0.0,)),
    "full": Experiment("--method full", FULL_RATES),
    "bias": Experiment("--method bias", ADAPTER_RATES),
    "partial": Experiment("--method partial", FULL_RATES),
    "proj": Experiment("--method proj", ADAPTER_RATES),
    "lora": Experiment("--method lora", ADAPTER_RATES),
    "prompt": Experiment("--method prompt", ADAPTER_RATES),
    "adapter": Experiment("--method adapter", ADAPTER_RATES),
    "read": Experiment("--method read", ADAPTER_RATES),
    "read_pvla": Experiment("--method read --pvla", ADAPTER_RATES),
}
SUITES = {
    "methods": METHODS,
    "main": {name: METHODS[name] for name in ("no adaptation", "full", "lora", "adapter", "read", "read_pvla")},
    # One learning rate each: four runs a domain and a held-out video are many, and there is nothing to select on.
    "tvsum": {
        name: Experiment(METHODS[name].arguments, (rate,))
        for name, rate in (("full", 4e-4), ("adapter", 3e-3), ("read", 3e-3), ("read_pvla", 3e-3))
    },
    "rank": {
        f"k={rank}": Experiment(f"--method read --pvla --r {rank}", ADAPTER_RATES) for rank in (4, 8, 16, 32, 64)
    },
    "mass": {
        "no alignment": METHODS["read"],
        **{
            f"mass={mass}": Experiment(f"--method read --pvla --pvla_mass {mass}", ADAPTER_RATES)
            for mass in (0.25, 0.75, 1.0)
        },
        "mass=0.5": METHODS["read_pvla"],
    },
    "weight": {
        f"weight={weight}": Experiment(f"--method read --pvla --pvla_weight {weight}", ADAPTER_RATES)
        for weight in (0.01, 0.03, 0.3, 1.0)
    }
    | {"weight=0.1": METHODS["read_pvla"]},
    "blocks": {
        "all blocks": METHODS["read_pvla"],
        "first block aligned": Experiment("--method read --pvla --pvla_blocks 0", ADAPTER_RATES),
        "encoder adapted": Experiment(
            r"--method read --pvla --target_modules transformer\.encoder\..*\.linear2", ADAPTER_RATES
        ),
    },
    # Table 8: the recurrence
    "cells": {
        "none": METHODS["adapter"],
        "rnn": METHODS["read"],
        **{cell: Experiment(f"--method read --cell {cell}", ADAPTER_RATES) for cell in ("gru", "lstm")},
    },
    # Table 9: the distance that is minimised
    "distance": {
        "POT": METHODS["read_pvla"],
        **{
            name: Experiment(f"--method read --pvla --pvla_distance {name}", ADAPTER_RATES)
            for name in ("avg_cosine", "max_cosine", "avg_l2", "max_l2")
        },
    },
}
Job = tuple[Experiment, float, int, "str | None"]  # row, learning rate, seed, domain


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--suite", default="main", choices=sorted(SUITES))
    parser.add_argument("--only", nargs="*", help="rows of the suite to run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--domains", nargs="*", help="of TVSum or YouTube Highlights; all = TVSum's ten")
    parser.add_argument("--learning_rates", type=float, nargs="*", help="replaces every row's own")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("rest", nargs="*", help="after --: arguments of ground_moments.py")
    options = parser.parse_args(argv)
    suite = SUITES[options.suite]
    if unknown := set(options.only or ()) - set(suite):
        parser.error(f"--only {sorted(unknown)}: the rows of {options.suite} are {list(suite)}")
    suite = {name: row for name, row in suite.items() if not options.only or name in options.only}
    domains: list[str | None] = [None]
    if options.domains:
        domains = [*TVSUM_DOMAINS] if options.domains == ["all"] else options.domains
    folder = Path(options.output_dir)
    runs: dict[tuple[str, float, int, str | None], tuple[Path, Job]] = {}
    for name, row in suite.items():
        rates = options.learning_rates if options.learning_rates and row.learning_rates[0] else row.learning_rates
        for rate in rates:
            for seed in options.seeds if rate else options.seeds[:1]:  # what is not trained has no seed
                for domain in domains:
                    job = (row, rate, seed, domain)
                    runs[(name, rate, seed, domain)] = (run_folder(folder, *job), job)
    # Two rows can be the same run (READ + PVLA is in every suite): each folder is run once.
    with ThreadPoolExecutor(options.jobs) as pool:
        for failed in pool.map(lambda job: run(*job, options.rest), dict(runs.values()).items()):
            if failed:
                print(failed, file=sys.stderr)
    results = {
        key: json.loads((path / "results.json").read_text())
        for key, (path, _) in runs.items()
        if (path / "results.json").exists()
    }
    wanted = {name: len({key[2:] for key in runs if key[0] == name}) for name in suite}
    rows = [row for name in suite if (row := table_row(name, results, wanted[name]))]
    (folder / f"{options.suite}.json").write_text(json.dumps(rows, indent=2) + "\n")
    print(markdown(rows))
    return rows


def run_folder(folder: Path, row: Experiment, rate: float, seed: int, domain: str | None) -> Path:
    """One folder a run, named by what makes it different."""
    name = "_".join(part.removeprefix("--") for part in row.arguments.split())
    name = "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in name)
    return folder / f"{name}_lr{rate:g}_seed{seed}{f'_{domain}' if domain else ''}"


def run(path: Path, job: Job, rest: list[str]) -> str | None:
    """Runs the script where there is no result yet; a message where it failed."""
    row, rate, seed, domain = job
    if (path / "results.json").exists():
        return None
    arguments = [*row.arguments.split(), "--seed", str(seed), "--output_dir", str(path), "--disable_tqdm", "true"]
    if rate:
        arguments += ["--learning_rate", str(rate)]
    if domain:
        arguments += ["--domain", domain]
    path.mkdir(parents=True, exist_ok=True)
    with (path / "log.txt").open("w") as log:
        done = subprocess.run(
            [sys.executable, str(SCRIPT), *arguments, *rest],
            env={"OMP_NUM_THREADS": "1", **os.environ},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    return f"{path} failed, see its log.txt" if done.returncode else None


def table_row(name: str, results: dict[Any, Any], wanted: int) -> dict[str, Any] | None:
    """The numbers of one method at the learning rate with the best mean validation mAP.

    Domains are averaged within a seed; the spread is that of the seeds.
    """
    by_rate: dict[float, dict[int, list[dict[str, Any]]]] = {}
    for (row, rate, seed, _), result in results.items():
        if row == name:
            by_rate.setdefault(rate, {}).setdefault(seed, []).append(result)
    complete = {rate: seeds for rate, seeds in by_rate.items() if sum(map(len, seeds.values())) == wanted}
    if not complete:
        return None

    def average(seeds: dict[int, list[dict[str, Any]]], when: str, key: str) -> list[float]:
        return [mean(result[when][key] for result in found) for found in seeds.values()]

    first = next(iter(next(iter(complete.values())).values()))[0]
    validated = bool(first.get("validation"))
    if len(complete) > 1 and not validated:
        raise ValueError(f"{name}: several learning rates, but no validation split to choose by; pass one")
    rate = max(complete, key=lambda rate: mean(average(complete[rate], "validation", SELECTION)) if validated else 0.0)
    seeds = complete[rate]
    keys = SHOWN[first["arguments"]["dataset"]]
    return {
        "name": name,
        "dataset": first["arguments"]["dataset"],
        "learning_rate": rate,
        "rates_tried": sorted(by_rate),
        "trainable": first["trainable"],
        "share": first["trainable"] / first["parameters"],
        "seeds": sorted(seeds),
        "runs": wanted,
        "seconds": mean(result["seconds"] for found in seeds.values() for result in found),
        "validation": average(seeds, "validation", SELECTION) if validated else None,
        "test": {shown: average(seeds, "test", key) for shown, key in keys.items()},
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table: mean ± standard deviation over the seeds."""
    if not rows:
        return "no method has all of its runs"
    figures = list(rows[0]["test"])
    head = ["method", "trainable", "share", "learning rate", "validation mAP", *figures, "seconds a run"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [
            row["name"],
            f"{row['trainable']:,}",
            f"{100 * row['share']:.2f} %",
            f"{row['learning_rate']:g}" if row["learning_rate"] else "–",
            spread(row["validation"]) if row["validation"] else "–",
            *(spread(row["test"][figure]) for figure in figures),
            f"{row['seconds']:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
