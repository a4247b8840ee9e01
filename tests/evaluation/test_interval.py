"""Bootstrap intervals: the known answer for a mean, and the promise of 95 % kept on data whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from headway.evaluation import Interval, ratio_interval


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
