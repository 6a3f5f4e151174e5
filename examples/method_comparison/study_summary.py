"""Every table and picture of the study, made from its file of results alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from significance import Difference, Interval, compare, crossed_interval, holm
from study_machine import shown
from study_pictures import draw_curve, draw_points, draw_sizes
from study_results import KINDS, PER_PERCENT, table_of
from study_settings import REFERENCE

from peft_read.files import write_whole

LEVEL = 0.05  # of significance
PAGE = "study.md"


@dataclass(frozen=True)
class Row:
    """The main runs of one method, of the seeds that are complete in every domain."""

    name: str
    runs: list[dict[str, Any]]
    setting: Mapping[str, Any]

    @cached_property
    def seeds(self) -> list[int]:
        """In order."""
        return sorted({run["seed"] for run in self.runs})

    @property
    def is_trained(self) -> bool:
        """Whether it has seeds at all."""
        return self.runs[0]["trainable"] > 0

    def table(self, figure: str, seeds: Sequence[int] | None = None) -> NDArray:
        """Percent, (seeds, queries)."""
        chosen = [run for run in self.runs if seeds is None or run["seed"] in seeds]
        return table_of(chosen, figure, self.setting["items"]["test"]["ids"])

    def scores(self, figure: str) -> list[float]:
        """The official figure by seed, the mean over domains."""
        return [mean(run["test"][figure] for run in self.runs if run["seed"] == seed) for seed in self.seeds]

    @cached_property
    def intervals(self) -> dict[str, Interval]:
        """By figure, the mean of the official figures, with the interval over seeds and queries."""
        sources, found = self.setting["items"]["test"]["sources"], {}
        for figure in self.setting["figures"].values():
            spread = crossed_interval(self.table(figure), groups=sources)
            center = mean(self.scores(figure))  # what the queries' rounded figures differ by is kept out
            found[figure] = Interval(center, center + spread.low - spread.mean, center + spread.high - spread.mean)
        return found


def summarise(results: Mapping[str, Any], folder: Path) -> str:
    """Writes `study.md` and its pictures.

    Args:
        results: of `read_results`.
        folder: where they go.

    Returns:
        The text of the page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = {name: setting for name, setting in results["settings"].items() if setting["main"] or setting["tuning"]}
    parts = [
        "# Methods compared",
        f"Made from the results of the runs alone. Intervals are of 95 %, over seeds and queries. "
        f"{_made_with(results)}.",
    ]
    for name, setting in settings.items():
        rows = complete_rows(setting)
        parts.append(f"## {setting['title']}")
        if rows:
            parts += [*_main(setting, rows), *_pictures(folder, name, setting, rows)]
            parts += _compared(setting, rows)
        else:
            parts.append("No run with a main seed has ended yet: nothing here compares methods.")
        parts += _tuning(setting)
    parts += _curve(folder, settings)
    page = "\n\n".join(parts) + "\n"
    with write_whole(folder / PAGE) as file:
        file.write(page)
    return page


def _made_with(results: Mapping[str, Any]) -> str:
    """Every machine and set of versions, with the number of its runs where there are several."""
    runs = [run["machine"] for s in results["settings"].values() for kind in KINDS for run in s[kind]]
    counted = [(shown(machine), runs.count(place)) for place, machine in enumerate(results["machines"])]
    used = [(text, count) for text, count in counted if count]
    return used[0][0] if len(used) == 1 else ". ".join(f"{count} runs: {text}" for text, count in used)


def complete_rows(setting: Mapping[str, Any]) -> dict[str, Row]:
    """The rows that have at least one seed in every domain."""
    parts = set(setting["parts"]) or {None}
    found: dict[str, Row] = {}
    for name in dict.fromkeys(run["row"] for run in setting["main"]):
        runs = [run for run in setting["main"] if run["row"] == name]
        of_seed = {seed: {run["part"] for run in runs if run["seed"] == seed} for seed in {r["seed"] for r in runs}}
        whole = [run for run in runs if of_seed[run["seed"]] == parts]
        if whole:
            found[name] = Row(name, whole, setting)
    order = [name for name in found if not found[name].is_trained] + [n for n in setting["rows"] if n in found]
    return {name: found[name] for name in order}


def comparisons(setting: Mapping[str, Any], rows: Mapping[str, Row]) -> dict[str, Difference]:
    """The reference less every other trained row, in the first figure, over the seeds that both have."""
    if REFERENCE not in rows:
        return {}
    reference, figure = rows[REFERENCE], next(iter(setting["figures"].values()))
    found = {}
    for name, row in rows.items():
        common = sorted(set(reference.seeds) & set(row.seeds))
        if name != REFERENCE and row.is_trained and len(common) > 1:
            tables = [one.table(figure, common) for one in (reference, row)]
            found[name] = compare(*tables, groups=setting["items"]["test"]["sources"])
    return found


def _main(setting: Mapping[str, Any], rows: Mapping[str, Row]) -> list[str]:
    figures = setting["figures"]
    head = ["method", "trained", "share", "seeds", "validation", *figures, "minutes a run"]
    lines = []
    for row in rows.values():
        run = row.runs[0]
        validation = [run["validation"] for run in row.runs if "validation" in run]
        # A run that was interrupted counts its last start alone.
        minutes = median(sum(r["seconds"] for r in row.runs if r["seed"] == seed) for seed in row.seeds) / 60
        lines.append(
            [
                row.name,
                f"{run['trainable']:,}",
                f"{100 * run['trainable'] / run['parameters']:.2f} %",
                str(len(row.seeds)) if row.is_trained else "–",
                f"{mean(validation):.1f}" if validation else "–",
                *(_shown(row.intervals[figure]) for figure in figures.values()),
                f"{minutes:.1f}",
            ]
        )
    missing = [name for name in setting["rows"] if name not in rows]
    short = [row.name for row in rows.values() if row.is_trained and len(row.seeds) < setting["planned_seeds"]]
    notes = [f"No complete seed yet: {', '.join(missing)}."] if missing else []
    notes += [f"Fewer than the {setting['planned_seeds']} planned seeds: {', '.join(short)}."] if short else []
    return [markdown(head, lines), *notes, _chosen(setting)]


def _chosen(setting: Mapping[str, Any]) -> str:
    lines = [f"- {row}: `{arguments or '(nothing to choose)'}`" for row, arguments in setting["choices"].items()]
    return "\n".join(["Configurations:", "", *lines])


def _compared(setting: Mapping[str, Any], rows: Mapping[str, Row]) -> list[str]:
    found = comparisons(setting, rows)
    if not found:
        return [f"{REFERENCE} and another method have no two seeds in common yet, so that nothing is tested."]
    by_seeds = holm({name: difference.p_seeds for name, difference in found.items()})
    by_both = holm({name: difference.p_both for name, difference in found.items()})
    figure = next(iter(setting["figures"]))
    head = [f"{REFERENCE} less", figure, "over seeds", "p", "Holm", "over seeds and queries", "p", "Holm"]
    lines = [
        [
            name,
            f"{d.mean:+.2f}",
            "–" if np.isnan(d.over_seeds.low) else f"{d.over_seeds.low:+.2f} to {d.over_seeds.high:+.2f}",
            _p(d.p_seeds),
            _p(by_seeds[name]),
            f"{d.over_both.low:+.2f} to {d.over_both.high:+.2f}",
            _p(d.p_both),
            _p(by_both[name]),
        ]
        for name, d in found.items()
    ]
    return [markdown(head, lines), verdict(setting, rows)]


def verdict(setting: Mapping[str, Any], rows: Mapping[str, Row]) -> str:
    """What can be concluded, in a few sentences: a difference counts where both corrected tests find it.

    Ranks are those of the means over the seeds that all trained rows have. While a row or a planned seed is missing
    the verdict is called provisional.
    """
    found = comparisons(setting, rows)
    figure, key = next(iter(setting["figures"].items()))
    trained = {name: row for name, row in rows.items() if row.is_trained}
    common = set.intersection(*(set(row.seeds) for row in trained.values()))
    means = {
        name: mean(score for seed, score in zip(row.seeds, row.scores(key), strict=True) if seed in common)
        for name, row in (trained.items() if common else ())
    }
    ranking = sorted(means, key=lambda name: -means[name])
    adjusted = [holm({n: getattr(d, p) for n, d in found.items()}) for p in ("p_seeds", "p_both")]
    untested = [n for n in trained if n != REFERENCE and (n not in found or any(np.isnan(p[n]) for p in adjusted))]
    certain = [name for name in found if all(p[name] < LEVEL for p in adjusted)]
    ahead, behind = ([n for n in certain if (found[n].mean > 0) == wanted] for wanted in (True, False))
    if not ranking:
        first = f"the {len(trained)} methods have no seed in common, so that they are not ranked"
    else:
        place = 1 + ranking.index(REFERENCE)
        first = f"{REFERENCE} is first" if place == 1 else f"{REFERENCE} is number {place}, {ranking[0]} first"
        first += f" of {len(ranking)} methods"
    lacks = [name for name in setting["rows"] if name not in rows]
    short = any(len(row.seeds) < setting["planned_seeds"] for row in trained.values())
    sentences = [f"**In {figure} {first}.**"]
    if ranking and len({tuple(row.seeds) for row in trained.values()}) > 1:
        sentences.append(f"Ranked over the {len(common)} seeds that all of them have.")
    sentences.append(
        f"Significantly (p < {LEVEL} in both tests, after Holm's correction) it is ahead of "
        f"{', '.join(ahead) or 'none'} and behind {', '.join(behind) or 'none'}; of the others these runs cannot tell "
        "it apart."
    )
    if untested:
        sentences.append(f"Not tested: {', '.join(untested)}.")
    if lacks or short:
        sentences.append("**Provisional: methods or planned seeds are missing.**")
    return " ".join(sentences)


def _tuning(setting: Mapping[str, Any]) -> list[str]:
    """Which choices helped: every configuration against the first of its row, on the same validation queries."""
    if not setting["tuning"]:
        return []
    first_seed = setting["tuning"][0]["seed"]
    items, lines = setting["items"]["validation" if "validation" in setting["items"] else "test"], []
    for name in setting["rows"]:
        runs = [run for run in setting["tuning"] if run["row"] == name]
        first = [run for run in runs if run["seed"] == first_seed]
        for run in first:
            again = [r["validation"] for r in runs if r["seed"] != first_seed and r["arguments"] == run["arguments"]]
            lines.append(
                [
                    name,
                    f"`{run['arguments']}`",
                    f"{run['validation']:.2f}",
                    "–" if run is first[0] else _against(run, first[0], setting["validation"], items),
                    f"{again[0]:.2f}" if again else "–",
                    "chosen" if setting["choices"].get(name) == run["arguments"] else "",
                ]
            )
    head = ["method", "configuration", "validation", "less the first", "second seed", ""]
    return [
        f"### Tuning: {setting['title']}",
        *_budget(setting),
        f"{len(items['ids'])} validation queries of sources that no training query has; intervals over these queries "
        "alone, one seed: a difference whose interval contains zero may be chance.",
        markdown(head, lines),
    ]


def _budget(setting: Mapping[str, Any]) -> list[str]:
    """What was chosen from, where more is recorded: a larger budget is under way, or was given up."""
    number = setting["configurations"]
    tried = {row: {run["arguments"] for run in setting["tuning"] if run["row"] == row} for row in setting["rows"]}
    if number is None or all(len(arguments) <= number for arguments in tried.values()):
        return []
    return [f"Chosen from the first {number} configurations of each method; the others are here for completeness."]


def _against(run: Mapping[str, Any], base: Mapping[str, Any], figure: str, items: Mapping[str, Any]) -> str:
    tables = [np.array([one["each"][figure]]) / PER_PERCENT for one in (run, base)]
    difference = compare(*tables, groups=items["sources"], resamples=2_000)
    return f"{difference.mean:+.2f} ({difference.over_both.low:+.2f} to {difference.over_both.high:+.2f})"


def _pictures(folder: Path, name: str, setting: Mapping[str, Any], rows: Mapping[str, Row]) -> list[str]:
    figure, key = next(iter(setting["figures"].items()))
    intervals = {row.name: row.intervals[key] for row in rows.values()}
    scores = {row.name: row.scores(key) for row in rows.values()}
    draw_points(folder / f"{name}_points.png", intervals, scores, figure=figure, title=setting["title"])
    sizes = {row.name: row.runs[0]["trainable"] for row in rows.values() if row.is_trained}
    draw_sizes(folder / f"{name}_sizes.png", intervals, sizes, figure=figure, title=setting["title"])
    return [
        f"![Means of all methods with intervals]({name}_points.png)",
        f"![{figure} against trained parameters]({name}_sizes.png)",
    ]


def _curve(folder: Path, settings: Mapping[str, Any]) -> list[str]:
    """The low-resource curve, of the settings that differ in the number of labelled queries."""
    labelled = sorted((s for s in settings.values() if s["labelled"]), key=lambda setting: setting["labelled"])
    sizes = [setting["labelled"] for setting in labelled]
    # A setting that takes others' choices has its labelled queries from the same pool as they.
    if len(set(sizes)) < 2:
        return []
    rows = [complete_rows(setting) for setting in labelled]
    names = [name for name in rows[0] if all(name in found and found[name].is_trained for found in rows)]
    if not names:
        return []
    figure, key = next(iter(labelled[0]["figures"].items()))
    points = {name: [found[name].intervals[key] for found in rows] for name in names}
    draw_curve(folder / "low_resource.png", points, sizes, figure=figure)
    lines = [[name, *(_shown(interval) for interval in intervals)] for name, intervals in points.items()]
    return [
        "## Fewer labelled queries",
        f"{figure} with the configurations that were chosen with the most queries, and as many steps.",
        markdown(["method", *(f"{size} queries" for size in sizes)], lines),
        "![The figure against the number of labelled queries](low_resource.png)",
    ]


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table; the bar of a regular expression is no border."""
    rows = [[cell.replace("|", "\\|") for cell in line] for line in (head, *lines)]
    texts = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([texts[0], "|" + "---|" * len(head), *texts[1:]])


def _shown(interval: Interval) -> str:
    return f"{interval.mean:.1f} ({interval.low:.1f} to {interval.high:.1f})"


def _p(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.4f}" if value >= 0.0001 else "< 0.0001"
