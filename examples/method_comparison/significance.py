"""Whether one method is better than another: paired tests over seeds, bootstraps over seeds and queries, Holm.

Runs of two methods are paired: they have the same seeds and the same queries. Seeds and queries are crossed, every
seed answers every query, so that both are drawn anew, each with replacement (Owen, "The pigeonhole bootstrap", 2007).
In simulations with the spreads of this study such a nominal 95 % interval covers the truth in 0.93 to 0.97 of the
studies with eight seeds, and in 0.83 to 0.92 with three: drawn anew, three have too little spread. The t-test over
seeds, which a verdict asks for too, knows how few they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

RESAMPLES = 10_000
CHUNK = 500  # resamples computed at a time


class Interval(NamedTuple):
    """A mean and its interval; NaN bounds where one value has no spread to tell."""

    mean: float
    low: float
    high: float


class Difference(NamedTuple):
    """How much better the first of two methods is, with two intervals and two p-values, both two-sided."""

    mean: float
    over_seeds: Interval
    p_seeds: float
    over_both: Interval  # over seeds and queries
    p_both: float


def paired_over_seeds(first: ArrayLike, second: ArrayLike, *, level: float = 0.95) -> tuple[Interval, float]:
    """Student's paired t-test of the scores by seed, and the interval of their mean difference.

    Args:
        first: (seeds,).
        second: (seeds,), of the same seeds in the same order.
        level: of the interval.

    Returns:
        The interval and the two-sided p-value; 1 for equal scores. A single seed, and differences that are all the
        same, have no spread to test against: bounds and p-value are NaN.

    Raises:
        ValueError: other shapes.
    """
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if a.ndim != 1 or a.shape != b.shape or not len(a):
        raise ValueError(f"scores of the same seeds are needed, got {a.shape} and {b.shape}")
    difference = a - b
    mean = float(difference.mean())
    if len(a) == 1:
        return Interval(mean, np.nan, np.nan), np.nan
    # The t statistic would be a division by zero, or by what rounding leaves of it.
    if np.ptp(difference) <= 1e-12 * max(np.abs(a).max(), np.abs(b).max()):
        return (Interval(0.0, 0.0, 0.0), 1.0) if not difference.any() else (Interval(mean, np.nan, np.nan), np.nan)
    found = stats.ttest_rel(a, b)
    low, high = found.confidence_interval(level)
    return Interval(mean, float(low), float(high)), float(found.pvalue)


def crossed_means(
    values: NDArray, *, resamples: int = RESAMPLES, seed: int = 0, groups: Sequence[object] | None = None
) -> NDArray:
    """Means of a table under resampling of its rows (seeds) and of its columns (queries).

    Args:
        values: (seeds, queries).
        resamples: how many.
        seed: of the draw.
        groups: of each query, what is drawn as a whole, such as the video that it asks about; None = the query.

    Returns:
        (resamples,)
    """
    rows, columns = values.shape
    member = np.arange(columns) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    count = int(member.max()) + 1
    sums = np.zeros((rows, count))
    np.add.at(sums.T, member, values.T)
    sizes = np.bincount(member, minlength=count)
    means = []
    for by_row, by_group in _draws(rows, count, resamples, seed):
        means.append(((by_row @ sums) * by_group).sum(1) / (rows * (by_group @ sizes)))
    return np.concatenate(means)


@lru_cache(maxsize=4)
def _draws(rows: int, groups: int, resamples: int, seed: int) -> list[tuple[NDArray, NDArray]]:
    """How often every row and every group is drawn, a chunk of resamples after the other: the same for all figures."""
    generator = np.random.default_rng(seed)
    sizes = [min(CHUNK, resamples - start) for start in range(0, resamples, CHUNK)]
    return [
        tuple(generator.multinomial(n, np.full(n, 1 / n), size=size).astype(np.int16) for n in (rows, groups))
        for size in sizes
    ]


def crossed_interval(
    values: ArrayLike, *, level: float = 0.95, groups: Sequence[object] | None = None, resamples: int = RESAMPLES
) -> Interval:
    """The mean of a table of seeds and queries, and its interval over both.

    Args:
        values: (seeds, queries).
        level: of the interval.
        groups: see `crossed_means`.
        resamples: how many.
    """
    table = _table(values)
    low, high = np.quantile(crossed_means(table, groups=groups, resamples=resamples), _tails(level))
    return Interval(float(table.mean()), float(low), float(high))


def compare(
    first: ArrayLike,
    second: ArrayLike,
    *,
    level: float = 0.95,
    groups: Sequence[object] | None = None,
    resamples: int = RESAMPLES,
) -> Difference:
    """Two methods, paired by seed and query.

    Args:
        first: (seeds, queries).
        second: (seeds, queries), of the same seeds and queries in the same order.
        level: of the intervals.
        groups: see `crossed_means`.
        resamples: how many.

    Raises:
        ValueError: tables of different shapes.
    """
    a, b = _table(first), _table(second)
    if a.shape != b.shape:
        raise ValueError(f"the same seeds and queries are needed, got tables of {a.shape} and {b.shape}")
    seeds, p_seeds = paired_over_seeds(a.mean(1), b.mean(1), level=level)
    means = crossed_means(a - b, groups=groups, resamples=resamples)
    low, high = np.quantile(means, _tails(level))
    # One more of each: a p-value of resampling is never 0.
    sides = [(1 + np.count_nonzero(means <= 0)), (1 + np.count_nonzero(means >= 0))]
    p_both = min(1.0, 2 * min(sides) / (1 + len(means)))
    return Difference(seeds.mean, seeds, p_seeds, Interval(seeds.mean, float(low), float(high)), p_both)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's adjusted p-values ("A simple sequentially rejective multiple test procedure", 1979).

    The i-th smallest of m is multiplied by m - i + 1, and none may be below an earlier one. What is NaN was not
    tested, and does not count.
    """
    tested = sorted((p, name) for name, p in p_values.items() if not np.isnan(p))
    adjusted, largest = dict(p_values), 0.0
    for place, (p, name) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - place) * p))
        adjusted[name] = largest
    return adjusted


def correlation(
    x: ArrayLike,
    y: ArrayLike,
    *,
    level: float = 0.95,
    groups: Sequence[object] | None = None,
    resamples: int = 2_000,
) -> tuple[Interval, float]:
    """Spearman's rank correlation, its bootstrap interval, and the two-sided p-value.

    NaN where one side does not vary. The p-value takes pairs for independent, also where there are groups.

    Args:
        x: (pairs,).
        y: (pairs,).
        level: of the interval.
        groups: of each pair, what is drawn as a whole, such as the source video; None = the pair.
        resamples: of the bootstrap.
    """
    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if not np.ptp(a) or not np.ptp(b):
        return Interval(np.nan, np.nan, np.nan), np.nan
    found = stats.spearmanr(a, b)
    member = np.arange(len(a)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    members = [np.flatnonzero(member == group) for group in range(int(member.max()) + 1)]

    def redrawn(drawn: NDArray) -> float:
        place = np.concatenate([members[group] for group in drawn])
        return float(stats.spearmanr(a[place], b[place]).statistic)

    spread = stats.bootstrap(
        (np.arange(len(members)),),
        redrawn,
        vectorized=False,
        n_resamples=resamples,
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Interval(float(found.statistic), float(spread.low), float(spread.high)), float(found.pvalue)


def _table(values: ArrayLike) -> NDArray:
    table = np.asarray(values, dtype=float)
    if table.ndim != 2 or not table.size or not np.isfinite(table).all():
        raise ValueError(f"a table (seeds, queries) of finite numbers is needed, got {table.shape}")
    return table


def _tails(level: float) -> tuple[float, float]:
    return (1 - level) / 2, (1 + level) / 2
