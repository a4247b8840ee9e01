"""Bootstrap intervals: the known answer for a mean, and the promise of 95 % kept on data whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from headway.errors import InputError
from headway.evaluation import Interval, bootstrap, interval, ratio_interval


def test_a_mean_has_the_interval_of_the_normal_law():
    """For the mean of many units the bootstrap tends to mean +- 1.96 s / sqrt(n)."""
    x = np.random.default_rng(0).normal(3.0, 2.0, 2000)
    found = ratio_interval(x.tolist(), [1.0] * len(x))
    half = 1.96 * x.std() / math.sqrt(len(x))
    assert found.value == pytest.approx(x.mean()) and found.n == 2000
    # 1,000 resamples know a bound to about 5 % of the half width.
    assert found.low == pytest.approx(x.mean() - half, abs=0.2 * half)
    assert found.high == pytest.approx(x.mean() + half, abs=0.2 * half)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """Ratios of 40 documents of uneven length, 300 times: 95 % +- four standard errors, less the bootstrap's own
    bias on few units (Efron and Tibshirani 1993, section 14.3)."""
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(300):
        tokens = rng.integers(20, 400, 40)
        nats = tokens * rng.normal(2.0, 0.3, 40)
        found = ratio_interval(nats.tolist(), tokens.tolist())
        covered += found.low <= 2.0 <= found.high
    assert 0.88 <= covered / 300 <= 0.99


def test_documents_are_resampled_whole():
    """Ten documents that agree inside and differ between each other: cutting each in a hundred pieces that are taken
    for independent narrows the interval tenfold, and falsely."""
    losses = np.linspace(1, 3, 10)
    whole = ratio_interval((losses * 100).tolist(), [100.0] * 10)
    pieces = ratio_interval(np.repeat(losses, 100).tolist(), [1.0] * 1000)
    assert (whole.high - whole.low) > 5 * (pieces.high - pieces.low)


def test_it_repeats_and_the_seed_counts():
    x, ones = [1.0, 2.0, 5.0, 9.0], [1.0] * 4
    assert ratio_interval(x, ones) == ratio_interval(x, ones)
    many = [math.sqrt(i) for i in range(50)]
    assert ratio_interval(many, [1.0] * 50, seed=1) != ratio_interval(many, [1.0] * 50)


def test_one_unit_has_no_interval():
    assert ratio_interval([6.0], [2.0]) == Interval(3.0, None, None, 1)
    assert Interval(0.0, None, 1.0, 2).map(math.exp) == (1.0, None, math.e, 2)


def test_many_units_take_bounded_memory():
    found = ratio_interval([1.0] * 100_000, [2.0] * 100_000)
    assert found.value == found.low == found.high == 0.5


def test_units_of_a_kind_are_drawn_as_units_are():
    """70 of 100 right, as 100 units and as two kinds: other random numbers, one law."""
    right = np.repeat([1.0, 0.0], [70, 30])
    apart = bootstrap(np.ones(100, int), lambda counts: counts @ right / 100)
    together = bootstrap([70, 30], lambda counts: counts[:, 0] / counts.sum(1))
    assert (apart.value, apart.n) == (together.value, together.n) == (0.7, 100)
    half = 1.96 * math.sqrt(0.7 * 0.3 / 100)
    for found in (apart, together):
        assert found.low == pytest.approx(0.7 - half, abs=0.2 * half)
        assert found.high == pytest.approx(0.7 + half, abs=0.2 * half)


@pytest.mark.parametrize("kinds", [3, 1000, 300_000])
def test_every_resample_has_as_many_units_and_memory_is_bounded(monkeypatch, kinds):
    monkeypatch.setattr(interval, "RESAMPLES", 100)
    seen = []

    def statistic(counts):
        seen.append(counts.shape)
        assert (counts.sum(1) == 2 * kinds).all() and counts.dtype == np.float64
        return counts[:, 0]

    bootstrap(np.full(kinds, 2), statistic)
    assert seen[0] == (1, kinds) and sum(rows for rows, _ in seen[1:]) == 100
    assert all(rows * kinds <= interval._BLOCK for rows, _ in seen)
    assert len(seen) == (2 if kinds <= 1000 else 9)


def test_resamples_that_leave_the_figure_undefined_are_left_out():
    """A ratio whose bottom is one unit of three: 30 % of resamples lack it, the others all give 2."""
    assert ratio_interval([0.0, 0.0, 2.0], [0.0, 0.0, 1.0]) == (2.0, 2.0, 2.0, 3)
    # Without the rule they would count as 0, and the lower bound with them.
    tops, bottoms = np.array([0.0, 0.0, 2.0]), np.array([0.0, 0.0, 1.0])
    as_zero = bootstrap([1, 1, 1], lambda counts: interval.ratio(counts @ tops, counts @ bottoms, 0.0))
    assert as_zero == (2.0, 0.0, 2.0, 3)
    # Where no resample defines it there are no bounds.
    nowhere = bootstrap([1] * 9, lambda counts: np.where(len(counts) == 1, 1.0, np.full(len(counts), np.nan)))
    assert nowhere == (1.0, None, None, 9)


def test_no_units_and_undefined_figures_are_refused():
    with pytest.raises(InputError, match="data: 0 units; expected one or more"):
        ratio_interval([], [])
    with pytest.raises(InputError, match="data: nan is what comes out of 2 units"):
        ratio_interval([1.0, 2.0], [0.0, 0.0])
    with pytest.raises(InputError, match="inf is what comes out"):
        ratio_interval([math.inf, 2.0], [1.0, 1.0])
