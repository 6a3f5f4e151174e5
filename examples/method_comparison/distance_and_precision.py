"""Table 7 over a whole test split: is the alignment distance small where the answer is right?

    python examples/method_comparison/distance_and_precision.py --output_dir outputs/table7 \
        --run outputs/study/qvhighlights/main/READ-PVLA_..._seed0

Takes the folder of a finished run of `ground_moments.py` with `--pvla`. Every test query is asked twice about its own
video: as it is, and replaced by the query of another source (the paper's out-of-distribution query). Both answers are
measured against the same moments, and both have a distance, that of the run's own alignment. Writes `table7.md` with
the rank correlation of distance and average precision and its interval, `table7.png`, a scatter of all pairs, and
`plan.png`, the transport plan of one query, its clips and words by name.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "reproduction"))
import matplotlib
import numpy as np
import torch
from alignment_arguments import alignment
from ground_moments import ScriptArguments, load_trained
from grounding_data import GroundingData
from grounding_measures import figures_of_each
from numpy.typing import NDArray
from significance import Interval, correlation, crossed_interval
from torch import nn
from transformers import AutoTokenizer

from peft_read import Aligner, partial_optimal_transport
from peft_read.data.qvhighlights import source_of
from peft_read.files import write_whole
from peft_read.models import grounding_records
from peft_read.transport import cosine_cost

matplotlib.use("Agg")
from matplotlib import pyplot as plt

FIGURE = "MR-full-mAP"
OUTPUTS = ("pred_logits", "pred_spans", "saliency_scores", "boundaries", "video_mask")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The numbers of the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished run with --pvla")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--query", type=int, help="qid of the plan; default: the best answer of the smallest distance")
    parser.add_argument("--batch_size", type=int, default=32)
    options = parser.parse_args(argv)
    if options.batch_size < 1:
        parser.error(f"--batch_size {options.batch_size} must be at least 1")
    try:
        case = Case(options.run, options.batch_size)
        if options.query is not None and options.query not in case.place:
            raise ValueError(f"--query {options.query} is not a query of the test split")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    right, wrong = case.measure(case.rows), case.measure(mismatched(case.rows))
    options.output_dir.mkdir(parents=True, exist_ok=True)
    numbers = compare(right, wrong, [source_of(row["vid"]) for row in case.rows])
    with write_whole(options.output_dir / "table7.md") as file:
        file.write(page(numbers, len(case.rows)))
    print(page(numbers, len(case.rows)))
    draw_pairs(options.output_dir / "table7.png", right, wrong)
    best = case.place[options.query] if options.query is not None else _clearest(right)
    case.draw_plan(options.output_dir / "plan.png", case.rows[best])
    return numbers


class Case:
    """A trained model with its test queries.

    Args:
        folder: of the run.
        batch_size: queries at a time.

    Raises:
        FileNotFoundError: the run has not ended, or its data is gone.
        ValueError: no run with an alignment, or one without labelled test queries.
    """

    def __init__(self, folder: Path, batch_size: int) -> None:
        path = folder / "results.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: --run must name the folder of a finished run")
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(result, dict) and result.get("restored"):
                raise FileNotFoundError(
                    f"{folder} was restored from a file of results, which holds no weights: delete the folder and "
                    "call study.py again, which makes the run anew"
                )
            self.script = ScriptArguments(**result["arguments"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a result of ground_moments.py: {error!r}") from error
        if not self.script.pvla or self.script.dataset != "qvhighlights":
            raise ValueError(f"{folder} is not a run of QVHighlights with --pvla: it has no distance to measure")
        self.data = GroundingData(self.script)
        [fold] = self.data.folds
        if fold.test is None or any(windows is None for windows in fold.test["relevant_windows"]):
            raise ValueError(f"{folder}: the run had no --test_file with labels")
        self.rows: list[dict[str, Any]] = list(fold.test)
        self.place = {row["qid"]: index for index, row in enumerate(self.rows)}
        self.test, self.batch_size = fold.test, batch_size
        self.model: nn.Module = load_trained(self.script, folder)
        base: Any = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        self.config = base.config
        self.collator = self.data.collator(self.config)
        self.aligner = Aligner(self.model, alignment(self.script, self.model))

    @torch.no_grad()
    def measure(self, rows: Sequence[dict[str, Any]]) -> NDArray:
        """Distance (mean over the aligned blocks) and average precision in percent of every query, (queries, 2)."""
        distances: list[float] = []
        records: list[dict[str, Any]] = []
        seconds, threshold = self.data.clips.clip_seconds, self.script.nms_threshold
        for start in range(0, len(rows), self.batch_size):
            part = rows[start : start + self.batch_size]
            batch = self.collator(part)
            with self.aligner.record() as recording:
                found = self.model(**batch)
            distances += self.aligner.distance(recording, batch, found).over_blocks()[0].tolist()
            outputs = [found[name].float().numpy() for name in OUTPUTS if found.get(name) is not None]
            records += grounding_records(outputs, part, self.config, clip_seconds=seconds, nms_threshold=threshold)
        each = figures_of_each("qvhighlights", records, self.test, seconds)
        return np.array([distances, each["figures"][FIGURE]]).T

    @torch.no_grad()
    def draw_plan(self, path: Path, row: dict[str, Any]) -> None:
        """The plan of the last aligned block: words against clips, which are named by their first second."""
        batch = self.collator([row])
        with self.aligner.record() as recording:
            found = self.model(**batch)
        block = self.aligner.blocks(recording, batch, found)[-1]
        cost = cosine_cost(block.video, block.language, block.video_mask, block.language_mask)
        plan = partial_optimal_transport(cost, mass=self.script.pvla_mass, reg=self.script.pvla_reg).plan[0]
        clips, words = int(batch["video_mask"].sum()), int(batch["text_mask"].sum())
        draw_plan(path, plan[:clips, :words].numpy(), self._words(row, words), row, self.data.clips.clip_seconds)

    def _words(self, row: dict[str, Any], count: int) -> list[str]:
        if self.script.text_encoder is None:
            return [f"token {index}" for index in range(count)]
        tokenizer = AutoTokenizer.from_pretrained(self.script.text_encoder)
        return tokenizer.convert_ids_to_tokens(tokenizer(row["query"])["input_ids"])[:count]


def mismatched(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every row with the query of another source: of the row half the split further on, or of the next that fits."""
    replaced = []
    for index, row in enumerate(rows):
        others = (rows[(index + len(rows) // 2 + step) % len(rows)] for step in range(len(rows)))
        other = next((r for r in others if source_of(r["vid"]) != source_of(row["vid"])), None)
        if other is None:
            raise ValueError("all test queries are of one source: there is no other query to ask")
        replaced.append({**row, "query": other["query"]})
    return replaced


def compare(right: NDArray, wrong: NDArray, sources: Sequence[str]) -> dict[str, Any]:
    """The numbers of the table: means with intervals, and rank correlations of distance and precision.

    Args:
        right: (queries, 2), distance and average precision of the own queries.
        wrong: (queries, 2), of the replaced ones.
        sources: of each query, drawn anew as a whole.
    """
    gaps = wrong - right
    return {
        "right": [_mean(right[:, column], sources) for column in (0, 1)],
        "wrong": [_mean(wrong[:, column], sources) for column in (0, 1)],
        "gap": [_mean(gaps[:, column], sources) for column in (0, 1)],
        "own queries": correlation(*right.T, groups=sources),
        "change of both": correlation(*gaps.T, groups=sources),
        "smaller for the own query": float((gaps[:, 0] > 0).mean()),
    }


def page(numbers: dict[str, Any], count: int) -> str:
    """The table as Markdown."""
    lines = [
        f"{count} test queries, each with its own video, and replaced by the query of another source. Intervals: "
        "95 %, bootstrap over sources. p: as if queries were independent.",
        "",
        "| | POT distance | average precision |",
        "|---|---|---|",
    ]
    for name, label in (("right", "own query"), ("wrong", "query of another source"), ("gap", "difference")):
        distance, precision = numbers[name]
        lines.append(f"| {label} | {_shown(distance, 4)} | {_shown(precision, 1)} |")
    lines += ["", "| Spearman's correlation of distance and average precision | | p |", "|---|---|---|"]
    for name, label in (("own queries", "over the own queries"), ("change of both", "of their changes when replaced")):
        interval, p = numbers[name]
        lines.append(f"| {label} | {_shown(interval, 3)} | {p:.2g} |")
    share = 100 * numbers["smaller for the own query"]
    return "\n".join([*lines, "", f"The distance is smaller for the own query in {share:.1f} % of the cases."]) + "\n"


def draw_pairs(path: Path, right: NDArray, wrong: NDArray) -> None:
    """Every query twice, as a point of distance and average precision."""
    figure, axis = plt.subplots(figsize=(7, 4.4), layout="constrained")
    for values, label, color in ((wrong, "query of another source", "C1"), (right, "own query", "C0")):
        axis.plot(values[:, 0], values[:, 1], "o", markersize=3, alpha=0.35, color=color, label=label)
    axis.set(xlabel="POT distance", ylabel="average precision of the moments, percent")
    axis.legend()
    _save(figure, path)


def draw_plan(path: Path, plan: NDArray, words: Sequence[str], row: dict[str, Any], clip_seconds: float) -> None:
    """A heat map of the plan in units of a clip's weight, the true moments beside it.

    Args:
        path: of the picture.
        plan: (clips, words).
        words: names of the columns.
        row: with the query and its `relevant_windows`.
        clip_seconds: length of a clip.
    """
    clips = len(plan)
    figure, axis = plt.subplots(figsize=(max(5, 0.45 * len(words) + 2), max(4, 0.11 * clips)), layout="constrained")
    image = axis.imshow(plan * clips, aspect="auto", cmap="magma", extent=(-0.5, len(words) - 0.5, clips, 0))
    axis.set_xticks(range(len(words)), words, rotation=60, ha="right", fontsize=8)
    ticks = range(0, clips, max(1, clips // 15))
    axis.set_yticks([tick + 0.5 for tick in ticks], [f"{tick * clip_seconds:g} s" for tick in ticks], fontsize=8)
    axis.set_ylabel(f"clips of {clip_seconds:g} s, by their first second")
    for start, end in row["relevant_windows"]:
        axis.plot([-0.5] * 2, [start / clip_seconds, end / clip_seconds], color="tab:green", linewidth=6)
    axis.set_title(f"{row['query']}\n{row['vid']}; green: the true moments", fontsize=8)
    figure.colorbar(image, label="share of the clip's weight")
    _save(figure, path)


def _clearest(right: NDArray) -> int:
    """Of the queries with the highest precision the one with the smallest distance."""
    return int(np.lexsort((right[:, 0], -right[:, 1]))[0])


def _mean(values: NDArray, sources: Sequence[str]) -> Interval:
    return crossed_interval(values[None], groups=sources)


def _shown(interval: Interval, digits: int) -> str:
    return f"{interval.mean:.{digits}f} ({interval.low:.{digits}f} to {interval.high:.{digits}f})"


def _save(figure: Any, path: Path) -> None:
    with write_whole(path, "wb") as file:
        figure.savefig(file, dpi=120, format="png")
    plt.close(figure)


if __name__ == "__main__":
    main()
