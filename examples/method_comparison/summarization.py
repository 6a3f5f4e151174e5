"""Compares fine-tuning methods on one summarisation set: one command, resumable, results as JSON.

    python examples/method_comparison/summarization.py --output_dir outputs/comparison --suite methods \
        --seeds 0 1 2 --select_seeds 1 --jobs 2 \
        -- --data_dir how2 --model_name_or_path outputs/backbone --num_train_epochs 10

Runs `how2_summarize.py` once for every method, learning rate and seed, skips what has a result, chooses each method's
learning rate by validation loss, and writes `<suite>.json` and a Markdown table. What follows `--` goes to every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from comparison import Comparison, Experiment, Results, build_parser, choose, described, loss_cell, spread
from comparison import markdown as table
from paper_rows import distances, nine_methods

SCRIPT = Path(__file__).parents[1] / "how2_summarize.py"
FIXED = ("--compare_zero_video", "false", "--measure_before", "false")
FIGURES = {"ROUGE-1": "rouge1", "ROUGE-2": "rouge2", "ROUGE-L": "rougeL"}
ADAPTER_RATES, LORA_RATES, FULL_RATES = (1e-2, 3e-2), (3e-3, 1e-2), (3e-4, 1e-3)
METHODS = nine_methods(
    ADAPTER_RATES,
    {**dict.fromkeys(("full", "partial", "proj"), FULL_RATES), "lora": LORA_RATES},
    frozen="frozen",
    alone="--no_pvla",
)
SUITES = {
    "methods": METHODS,
    "main": {name: METHODS[name] for name in ("frozen", "full", "lora", "adapter", "read", "read_pvla")},
    # Table 6: no alignment, alignment of everything, partial alignment
    "table6": {
        "no VLA": METHODS["read"],
        "VLA": Experiment("--method read --pvla_mass 1.0", ADAPTER_RATES),
        "PVLA": METHODS["read_pvla"],
    },
    # Table 9: the distance that is minimised
    "table9": distances(METHODS["read_pvla"]),
}


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = build_parser(__doc__, SUITES, SCRIPT)
    comparison = Comparison(parser, parser.parse_args(argv), SUITES, script=SCRIPT, score=score, fixed=FIXED)
    results = comparison.run()
    rows = [table_row(name, results, comparison.wanted(name), comparison.selection) for name in comparison.rows]
    found = [row for row in rows if row]
    return comparison.write(found, markdown(found))


def score(result: dict[str, Any]) -> float:
    """The last validation loss, negative."""
    losses = [entry["eval_loss"] for entry in result["log"] if "eval_loss" in entry]
    return -losses[-1] if losses else 0.0


def table_row(
    name: str, results: Results, wanted: int, selection: Sequence[int] | None = None
) -> dict[str, Any] | None:
    """The numbers of one method at the learning rate with the smallest mean validation loss."""
    chosen = choose(name, results, wanted, score, selection=selection)
    if chosen is None:
        return None
    runs = chosen.results
    return described(name, chosen) | {
        "validation_loss": 0.0 - mean(map(score, runs)),
        "rouge": {
            variant: {key: [result["rouge_after"][variant][key] for result in runs] for key in FIGURES.values()}
            for variant in ("rouge_score", "easy_rouge")
        },
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table: mean ± standard deviation over the seeds."""

    def cells(row: dict[str, Any]) -> list[str]:
        rouge = [spread(row["rouge"]["rouge_score"][key]) for key in FIGURES.values()]
        return [loss_cell(row), *rouge, f"{row['seconds']:.0f}"]

    return table(["validation loss", *FIGURES, "seconds"], rows, cells)


if __name__ == "__main__":
    main()
