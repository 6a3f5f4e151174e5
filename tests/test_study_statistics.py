"""The statistics of the comparison of methods on made-up results with known answers."""

import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "method_comparison"))
from significance import compare, correlation, crossed_interval, crossed_means, holm, paired_over_seeds


def test_the_paired_test_is_students_by_hand():
    first, second = [5.0, 7.0, 6.0, 8.0], [4.0, 5.0, 5.0, 4.0]  # differences 1, 2, 1, 4
    interval, p = paired_over_seeds(first, second)
    error = np.sqrt(2.0) / 2  # the deviation of 1, 2, 1, 4 is the root of 2; four seeds
    assert interval.mean == 2
    assert (interval.low, interval.high) == pytest.approx((2 - 3.182446 * error, 2 + 3.182446 * error), abs=1e-5)
    assert p == pytest.approx(2 * stats.t.sf(2 / error, df=3))
    assert p == pytest.approx(0.066276, abs=1e-5)


def test_the_paired_test_at_its_edges():
    assert paired_over_seeds([1, 2], [1, 2])[1] == 1
    # Two equal differences are no proof: without spread there is nothing to test against.
    for first, second in (([2, 3], [1, 2]), ([0.1 + 0.2, 0.3 + 0.1], [0.2, 0.3])):
        interval, p = paired_over_seeds(first, second)
        assert interval.mean == pytest.approx(first[0] - second[0])
        assert np.isnan([interval.low, interval.high, p]).all()
    interval, p = paired_over_seeds([3], [1])
    assert interval.mean == 2 and np.isnan([interval.low, interval.high, p]).all()
    with pytest.raises(ValueError, match="same seeds"):
        paired_over_seeds([1, 2], [1, 2, 3])


def test_holm_by_hand():
    # 0.01 * 4, 0.02 * 3, 0.03 * 2 -> not below 0.06, 0.2
    found = holm({"c": 0.03, "a": 0.01, "d": 0.2, "b": 0.02, "not tested": float("nan")})
    assert [found[name] for name in "abcd"] == pytest.approx([0.04, 0.06, 0.06, 0.2])
    assert np.isnan(found["not tested"])
    assert list(holm({"x": 0.9, "y": 0.7}).values()) == [1.0, 1.0]


def test_resampled_means_have_the_spread_that_theory_gives():
    """Without an interaction the variance is that of the seeds' means over S and that of the queries' over Q."""
    generator = np.random.default_rng(1)
    seeds, queries = generator.normal(size=(6, 1)), generator.normal(size=(1, 40))
    expected = seeds.var() / 6 + queries.var() / 40
    means = crossed_means(50 + seeds + queries, resamples=20_000)
    assert means.var() == pytest.approx(expected, rel=0.05)
    assert means.mean() == pytest.approx(50 + seeds.mean() + queries.mean(), abs=0.02)
    # Two queries of a video are drawn together: as if there were half as many.
    doubled = np.repeat(50 + seeds + queries, 2, axis=1)
    grouped = crossed_means(doubled, resamples=20_000, groups=np.repeat(np.arange(40), 2).tolist())
    assert grouped.var() == pytest.approx(expected, rel=0.05)
    alone = seeds.var() / 6 + queries.var() / 80
    assert crossed_means(doubled, resamples=20_000).var() == pytest.approx(alone, rel=0.05)


def test_the_bootstrap_covers_the_true_difference():
    """8 seeds and 60 queries, true difference 1: the 95 % interval must hold it in nearly all of 200 experiments."""
    generator, covered, found = np.random.default_rng(0), 0, 0
    for _ in range(200):
        query = generator.normal(scale=20, size=(1, 60))  # what makes a query hard is shared by the methods
        a, b = (
            50 + gain + query + generator.normal(scale=0.5, size=(8, 1)) + generator.normal(scale=4, size=(8, 60))
            for gain in (1.0, 0.0)
        )
        difference = compare(a, b, resamples=500)
        covered += difference.over_both.low <= 1 <= difference.over_both.high
        found += difference.p_both < 0.05
    assert covered >= 0.93 * 200
    assert 0.3 * 200 < found < 200


def test_equal_methods_are_seldom_told_apart():
    generator = np.random.default_rng(2)
    tables = [generator.normal(size=(2, 8, 40)) for _ in range(200)]
    wrong = [
        np.array([difference.p_seeds, difference.p_both]) < 0.05
        for a, b in tables
        for difference in [compare(a, b, resamples=500)]
    ]
    assert np.mean(wrong, axis=0)[0] < 0.1 and np.mean(wrong, axis=0)[1] < 0.1


def test_a_difference_is_signed_and_its_tests_agree_on_what_is_plain():
    generator = np.random.default_rng(3)
    base = generator.normal(size=(8, 100))
    better = base + 1 + 0.1 * generator.normal(size=base.shape)
    up, down = compare(better, base), compare(base, better)
    assert up.mean == pytest.approx(1, abs=0.05) and down.mean == -up.mean
    assert up.over_both.low > 0.9 and up.over_seeds.low > 0.9
    assert up.p_seeds < 1e-6 and up.p_both == pytest.approx(2 / 10_001)
    interval = crossed_interval(base)
    assert interval.low < base.mean() < interval.high
    with pytest.raises(ValueError, match="same seeds and queries"):
        compare(base, base[:, :50])
    with pytest.raises(ValueError, match="finite numbers"):
        crossed_interval([[1.0, float("nan")]])


def test_a_correlation_of_ranks():
    x = np.arange(30.0)
    interval, p = correlation(x, -(x**3))
    assert interval.mean == pytest.approx(-1) and interval.high == pytest.approx(-1) and p < 1e-10
    generator = np.random.default_rng(4)
    noise, p = correlation(generator.normal(size=200), generator.normal(size=200))
    assert noise.low < 0 < noise.high and p > 0.05
    assert np.isnan([*correlation(x, np.ones(30))[0], correlation(np.ones(30), x)[1]]).all()


def test_pairs_of_one_source_count_once():
    """Forty sources with ten equal pairs each tell as much as forty pairs."""
    generator = np.random.default_rng(5)
    x = generator.normal(size=40)
    y = x + generator.normal(size=40)
    once = correlation(x, y)[0]
    groups = np.repeat(np.arange(40), 10)
    grouped = correlation(x[groups], y[groups], groups=groups.tolist())[0]
    alone = correlation(x[groups], y[groups])[0]
    assert grouped.mean == pytest.approx(once.mean)
    assert grouped.high - grouped.low == pytest.approx(once.high - once.low, rel=0.05)
    assert alone.high - alone.low < 0.5 * (once.high - once.low)


def test_with_three_seeds_the_bootstrap_is_too_narrow_and_the_t_test_is_not():
    """Seeds differ as much as queries leave open, true difference 1: the bootstrap covers it in 0.8 to 0.93 of 300."""
    generator, by_both, by_seeds = np.random.default_rng(6), 0, 0
    for _ in range(300):
        gains = 1 + generator.normal(scale=1, size=(3, 1)) + generator.normal(scale=4, size=(1, 100))
        first = gains + generator.normal(scale=4, size=(3, 100))
        difference = compare(first, np.zeros((3, 100)), resamples=500)
        by_both += difference.over_both.low <= 1 <= difference.over_both.high
        by_seeds += difference.over_seeds.low <= 1 <= difference.over_seeds.high
    assert 0.8 * 300 < by_both < 0.93 * 300
    assert by_seeds > 0.9 * 300
