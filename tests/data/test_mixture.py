"""Mixtures: exact shares, every row found by its number alone, every source's own stream inside."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headway.data import PackedBatches, TokenStore
from headway.data.mixture import MAX_CYCLE, MixedBatches, MixedRows, Mixture, largest_remainders
from headway.errors import ConfigError

WEIGHTS = st.lists(st.integers(1, 12), min_size=1, max_size=5).map(
    lambda found: {str(place): float(weight) for place, weight in enumerate(found)}
)


@given(WEIGHTS, st.integers(0, 99), st.integers(0, 300), st.integers(1, 60))
def test_rows_are_those_of_counting_from_the_start(
    weights: dict[str, float], seed: int, first: int, count: int
) -> None:
    """The oracle counts: row by row from row 0, each row's number is how many of its source came before."""
    mixture = Mixture(weights, seed)
    source, number = mixture.rows(0, first + count)
    before: Counter[int] = Counter()
    for one, place in zip(source.tolist(), number.tolist(), strict=True):
        assert place == before[one]
        before[one] += 1
    again = Mixture(weights, seed).rows(first, count)
    assert np.array_equal(again[0], source[first:]) and np.array_equal(again[1], number[first:])


@given(WEIGHTS, st.integers(0, 10**12))
def test_shares_are_exact_in_every_cycle(weights: dict[str, float], cycle: int) -> None:
    mixture = Mixture(weights, 1)
    source, _ = mixture.rows(cycle * mixture.cycle, mixture.cycle)
    counts = np.bincount(source, minlength=len(weights))
    total = sum(weights.values())
    assert [Fraction(int(n), mixture.cycle) for n in counts] == [
        Fraction(w) / Fraction(total) for w in weights.values()
    ]


def test_weights_are_what_is_written() -> None:
    assert Mixture({"a": 0.1, "b": 0.3}).counts == (1, 3)  # as binary fractions the two have no short cycle
    assert Mixture({"a": 1e-3, "b": 3e-3}).counts == (1, 3)
    odd = Mixture({"a": 1.0, "b": 3.14159265})
    assert odd.cycle == sum(odd.counts) == MAX_CYCLE
    assert abs(odd.counts[0] / MAX_CYCLE - 1 / 4.14159265) < 1 / MAX_CYCLE
    with pytest.raises(ConfigError, match=r"data\.mixture\.tiny: a share of 1e-06.*at least 1/4096"):
        Mixture({"tiny": 1e-6, "b": 1.0})


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.integers(0, 200))
def test_largest_remainders(weights: list[int], total: int) -> None:
    shares = [Fraction(weight, sum(weights)) for weight in weights]
    counts = largest_remainders(shares, total)
    assert sum(counts) == total and all(abs(n - share * total) < 1 for n, share in zip(counts, shares, strict=True))


def test_the_order_of_a_mixture_is_frozen_and_differs_by_cycle_and_seed() -> None:
    """A run must resume into the same rows after an upgrade: these numbers may never change."""
    mixture = Mixture({"a": 2, "b": 1}, 7)
    assert mixture.rows(0, 9)[0].tolist() == [0, 0, 1, 0, 0, 1, 0, 0, 1]
    assert mixture.rows(3 * 10**15, 3)[1].max() == 2 * 10**15 + 1
    orders = {tuple(Mixture({"a": 2, "b": 1}, seed).rows(0, 30)[0].tolist()) for seed in range(5)}
    assert len(orders) == 5


def store(begin: int, size: int) -> TokenStore:
    return TokenStore.of([list(range(begin, begin + size))])


def test_a_mixed_batch_holds_each_sources_own_rows() -> None:
    stores, size = [store(0, 101), store(1000, 41), store(2000, 999)], 7
    parts = [PackedBatches(one, 10, size, 5) for one in stores]
    mixture = Mixture({"a": 3, "b": 2, "c": 1}, 5)
    mixed = MixedBatches(parts, mixture)
    seen = [0, 0, 0]
    for cursor in range(40):
        batch = mixed.batch(cursor)
        assert batch.input_ids.shape == (size, 10) and batch.tokens == int((batch.labels != -100).sum())
        source, _ = mixture.rows(cursor * size, size)
        for row, one in enumerate(source.tolist()):
            own = parts[one].rows(seen[one], 1)
            assert torch.equal(batch.input_ids[row], own.input_ids[0]) and torch.equal(batch.labels[row], own.labels[0])
            assert batch.sample_ids[row] == own.sample_ids[0] + [0, 101, 142][one]
            if own.documents is not None:
                assert torch.equal(batch.documents[row], own.documents[0])
            seen[one] += 1
    ahead = MixedBatches(parts, mixture).batch(39)
    assert torch.equal(ahead.input_ids, batch.input_ids) and ahead.sample_ids == batch.sample_ids


def test_another_share_or_another_text_is_another_stream() -> None:
    parts = [PackedBatches(store(0, 50), 10, 2, 0), PackedBatches(store(9, 50), 10, 2, 0)]

    def sign(**weights: float) -> str:
        return MixedBatches(parts, Mixture(weights)).hash

    assert sign(a=1, b=3) == sign(x=2, y=6)  # names and units do not count
    assert len({sign(a=1, b=3), sign(a=3, b=1), MixedBatches(parts[::-1], Mixture({"a": 1, "b": 3})).hash}) == 3


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 9))
def test_every_example_of_a_source_comes_once_in_each_of_its_passes(first: int, second: int, seed: int) -> None:
    rows = MixedRows(Mixture({"a": 3, "b": 1}, seed), [first, second])
    assert rows.rows % 4 == 0 and 0 <= rows.rows - first - second < 4
    seen = np.concatenate([rows.epoch(number) for number in range(6)])
    for begin, size, weight in ((0, first, 3), (first, second, 1)):
        mine = seen[(seen >= begin) & (seen < begin + size)] - begin
        assert len(mine) == 6 * rows.rows * weight // 4
        for one in range(len(mine) // size):
            assert sorted(mine[one * size : (one + 1) * size]) == list(range(size))
    assert np.array_equal(MixedRows(rows.mixture, [first, second]).epoch(5), rows.epoch(5))


def test_a_tokenizer_sees_the_sources_in_their_shares() -> None:
    large, small = [f"large {n:04d}" for n in range(1000)], [f"small {n:04d}" for n in range(100)]
    mixture = Mixture({"large": 1, "small": 1})
    found = list(mixture.texts([lambda: iter(large), lambda: iter(small)], [10_000, 1_000]))
    counts = Counter(text[:5] for text in found)
    assert abs(counts["large"] - 550) <= 1 and abs(counts["small"] - 550) <= 1
    assert {text for text in found if text.startswith("small")} == set(small)
    kept = [int(text[6:]) for text in found if text.startswith("large")]
    assert max(np.diff(kept)) <= 3 and kept[-1] >= 998  # spread over all of it, not its beginning
    alone = Mixture({"a": 5.0})
    assert list(alone.texts([lambda: iter(large)], [10_000])) == large
