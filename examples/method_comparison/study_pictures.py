"""The pictures of the study: points with intervals, the figure against trained parameters, the low-resource curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from significance import Interval

from peft_read.files import write_whole


def draw_points(
    path: Path,
    intervals: Mapping[str, Interval],
    scores: Mapping[str, Sequence[float]],
    *,
    figure: str,
    title: str,
) -> None:
    """A line a method: its mean with the interval, and a dot for every seed.

    Args:
        path: of the picture.
        intervals: by method.
        scores: by method and seed.
        figure: what is drawn.
        title: of the picture.
    """
    page, axis = plt.subplots(figsize=(7, 0.42 * len(intervals) + 1.3), layout="constrained")
    names = list(intervals)
    for place, name in enumerate(names):
        _with_interval(axis, name, place, intervals[name], upright=False)
        axis.plot(scores[name], [place + 0.22] * len(scores[name]), "o", markersize=3, color="0.6")
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_xlabel(f"{figure}; bar: 95 % over seeds and queries, grey: single seeds")
    axis.set_title(title, fontsize=10)
    axis.grid(axis="x", alpha=0.3)
    _save(page, path)


def draw_sizes(
    path: Path, intervals: Mapping[str, Interval], sizes: Mapping[str, int], *, figure: str, title: str
) -> None:
    """The figure against trained parameters, as the paper's Figure 2.

    Args:
        path: of the picture.
        intervals: by method; those without a size are drawn as lines (nothing is trained).
        sizes: trained parameters by method.
        figure: what is drawn.
        title: of the picture.
    """
    page, axis = plt.subplots(figsize=(7, 4.4), layout="constrained")
    for place, (name, interval) in enumerate(intervals.items()):
        if name in sizes:
            _with_interval(axis, name, sizes[name], interval, upright=True, color=f"C{place % 10}")
            offset = (6, 6 if place % 2 else -12)
            axis.annotate(name, (sizes[name], interval.mean), xytext=offset, textcoords="offset points", fontsize=8)
        else:
            axis.axhline(interval.mean, color="0.5", linestyle="--", linewidth=1)
            axis.annotate(name, (0.01, interval.mean), xycoords=("axes fraction", "data"), fontsize=8, va="bottom")
    axis.set_xscale("log")
    axis.set_xlabel("trained parameters")
    axis.set_ylabel(figure)
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.3)
    _save(page, path)


def draw_curve(path: Path, points: Mapping[str, Sequence[Interval]], sizes: Sequence[int], *, figure: str) -> None:
    """The figure against the number of labelled queries.

    Args:
        path: of the picture.
        points: by method, one per size.
        sizes: labelled queries.
        figure: what is drawn.
    """
    page, axis = plt.subplots(figsize=(7, 4.4), layout="constrained")
    for place, (name, intervals) in enumerate(points.items()):
        beside = [size * (1 + 0.02 * (place - (len(points) - 1) / 2)) for size in sizes]  # bars that do not cover
        axis.plot(beside, [interval.mean for interval in intervals], color=f"C{place}", label=name)
        for size, interval in zip(beside, intervals, strict=True):
            _with_interval(axis, name, size, interval, upright=True, color=f"C{place}")
    axis.set_xscale("log")
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.minorticks_off()
    axis.set_xlabel("labelled queries; bar: 95 % over seeds and queries")
    axis.set_ylabel(figure)
    axis.legend()
    axis.grid(alpha=0.3)
    _save(page, path)


def _with_interval(
    axis: plt.Axes, name: str, place: float, interval: Interval, *, upright: bool, color: str | None = None
) -> None:
    error = [[interval.mean - interval.low], [interval.high - interval.mean]]
    color = color or ("C3" if name.startswith("READ") else "C0")
    if upright:
        axis.errorbar([place], [interval.mean], yerr=error, fmt="o", capsize=3, color=color)
    else:
        axis.errorbar([interval.mean], [place], xerr=error, fmt="o", capsize=3, color=color)


def _save(page: Figure, path: Path) -> None:
    with write_whole(path, "wb") as file:
        page.savefig(file, dpi=120, format="png")
    plt.close(page)
