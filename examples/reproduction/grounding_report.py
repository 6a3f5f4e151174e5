"""Pictures and texts of what a grounding model found: true and predicted moments, highlight scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

SHOWN_WINDOWS = 3


def draw(path: Path, rows: Sequence[dict[str, Any]], records: Sequence[dict[str, Any]]) -> Path:
    """One panel per query: true moments above, the best predicted ones below them, highlight scores as a curve."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(rows), figsize=(9, 1.9 * len(rows)), squeeze=False, constrained_layout=True)
    for axis, row, record in zip(axes[:, 0], rows, records, strict=True):
        for start, end in row.get("relevant_windows") or ():
            axis.axvspan(start, end, ymin=0.86, ymax=1.0, color="tab:green")
        windows = record.get("pred_relevant_windows", [])[:SHOWN_WINDOWS]
        for rank, (start, end, score) in enumerate(windows):
            top = 0.82 - 0.11 * rank
            axis.axvspan(start, end, ymin=top - 0.09, ymax=top, color="tab:blue", alpha=max(0.15, min(1.0, score)))
        scores = record["pred_saliency_scores"]
        step = row["duration"] / len(scores)
        middle = [(index + 0.5) * step for index in range(len(scores))]
        low, high = min(scores), max(scores)
        axis.plot(middle, [0.45 * (value - low) / ((high - low) or 1) for value in scores], color="tab:orange")
        if row.get("clip_scores"):
            truth = row["clip_scores"][: len(scores)]
            axis.fill_between(middle[: len(truth)], [0.45 * value for value in truth], color="tab:green", alpha=0.25)
        axis.set(xlim=(0, row["duration"]), ylim=(0, 1), yticks=[])
        axis.set_title(f"{row['query'] or row['vid']}  ({row['vid']})", fontsize=8, loc="left")
    axes[-1, 0].set_xlabel("seconds; green: people, blue: the model's best windows, orange: its highlight scores")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def describe(record: dict[str, Any], clip_seconds: float) -> str:
    """The best windows and the most salient clip, in words."""
    lines = [f"{record['query']!r} in {record['vid']}"]
    for start, end, score in record.get("pred_relevant_windows", [])[:SHOWN_WINDOWS]:
        lines.append(f"  {start:6.1f} s to {end:6.1f} s   score {score:.3f}")
    scores = record["pred_saliency_scores"]
    best = max(range(len(scores)), key=scores.__getitem__)
    lines.append(f"  highlight: clip {best} ({clip_seconds * best:g} s to {clip_seconds * (best + 1):g} s)")
    return "\n".join(lines)
