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
table. What follows `--` goes to every run; `--select_seeds 1` chooses the rates with the first seed only. The
low-resource subset is the same for every seed (`--subset_seed`): the seed is that of the training.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from comparison import Choice, Comparison, Experiment, Results, build_parser, choose, described, spread
from comparison import markdown as table
from paper_rows import distances, nine_methods

from peft_read.data import TVSUM_DOMAINS

SCRIPT = Path(__file__).parents[1] / "reproduction" / "ground_moments.py"
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


ADAPTER_RATES, FULL_RATES = (1e-3, 3e-3), (1e-4, 4e-4)
METHODS = nine_methods(
    ADAPTER_RATES, dict.fromkeys(("full", "partial"), FULL_RATES), frozen="no adaptation", aligned="--pvla"
)
SUITES = {
    "methods": METHODS,
    "main": {name: METHODS[name] for name in ("no adaptation", "full", "lora", "adapter", "read", "read_pvla")},
    # One learning rate each: four runs per domain and held-out video are many, and there is nothing to select on.
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
    "distance": distances(METHODS["read_pvla"]),
}


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = build_parser(__doc__, SUITES, SCRIPT)
    parser.add_argument("--domains", nargs="*", help="of TVSum or YouTube Highlights; all = TVSum's ten")
    options = parser.parse_args(argv)
    domains: Sequence[str | None] = TVSUM_DOMAINS if options.domains == ["all"] else options.domains or [None]
    comparison = Comparison(parser, options, SUITES, script=SCRIPT, score=score, domains=domains)
    results = comparison.run()
    wanted = {name: comparison.wanted(name) for name in comparison.rows}
    rows = [table_row(name, results, wanted[name], comparison.selection) for name in wanted]
    found = [row for row in rows if row]
    return comparison.write(found, markdown(found))


def score(result: dict[str, Any]) -> float | None:
    """Validation mAP, None where there is no validation split."""
    return result["validation"][SELECTION] if result.get("validation") else None


def table_row(
    name: str, results: Results, wanted: int, selection: Sequence[int] | None = None
) -> dict[str, Any] | None:
    """The numbers of one method at the learning rate with the best mean validation mAP.

    Domains are averaged within a seed; the spread is that of the seeds.
    """
    chosen = choose(name, results, wanted, score, selection=selection)
    if chosen is None:
        return None
    first = chosen.results[0]
    keys = SHOWN[first["arguments"]["dataset"]]
    return described(name, chosen) | {
        "dataset": first["arguments"]["dataset"],
        "runs": wanted,
        "validation": average(chosen, "validation", SELECTION) if first.get("validation") else None,
        "test": {shown: average(chosen, "test", key) for shown, key in keys.items()},
    }


def average(chosen: Choice, when: str, key: str) -> list[float]:
    """One figure a seed: the mean over the domains."""
    return [mean(result[when][key] for result in found) for found in chosen.seeds.values()]


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table: mean ± standard deviation over the seeds."""
    figures = list(rows[0]["test"]) if rows else []

    def cells(row: dict[str, Any]) -> list[str]:
        validation = spread(row["validation"]) if row["validation"] else "–"
        return [validation, *(spread(row["test"][figure]) for figure in figures), f"{row['seconds']:.0f}"]

    return table(["validation mAP", *figures, "seconds per run"], rows, cells)


if __name__ == "__main__":
    main()
