"""Streams of examples: every example once per epoch, similar lengths together, each batch a function of its number."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.training.objectives import POOL, ShuffledExamples


def stream(n: int, size: int, seed: int = 0, lengths: np.ndarray | None = None) -> ShuffledExamples[int]:
    def collate(ids: list[int], rng: np.random.Generator) -> dict[str, torch.Tensor]:
        return {
            "input_ids": torch.tensor(ids)[:, None],
            "labels": torch.tensor(ids),
            "noise": torch.from_numpy(rng.random(len(ids))),
        }

    return ShuffledExamples(range(n), collate, size, seed, {}, lengths)


def ids_of(source: ShuffledExamples[int], batches: int) -> list[int]:
    return [number for cursor in range(batches) for number in source.batch(cursor).sample_ids]


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 200), size=st.integers(1, 20), seed=st.integers(0, 5), bucketed=st.booleans())
def test_every_example_once_per_epoch(n: int, size: int, seed: int, bucketed: bool) -> None:
    lengths = np.random.default_rng(seed).integers(1, 100, n) if bucketed else None
    source = stream(n, size, seed, lengths)
    seen = ids_of(source, -(-3 * n // size))
    for epoch in range(3):
        assert sorted(seen[epoch * n : (epoch + 1) * n]) == list(range(n))


@pytest.mark.parametrize("n", [1000, 1003])
def test_buckets_pad_little_and_stay_random(n: int) -> None:
    """Of what rows in plain order pad, buckets leave less than a sixth; and epochs differ."""
    lengths = np.random.default_rng(0).geometric(0.03, n)
    size = 8

    def padding(source: ShuffledExamples[int]) -> float:
        groups = [lengths[source.batch(cursor).sample_ids] for cursor in range(2 * n // size)]
        return sum(float(group.max() * len(group) - group.sum()) for group in groups) / sum(map(np.sum, groups))

    plain, bucketed = stream(n, size), stream(n, size, lengths=lengths)
    assert padding(bucketed) < padding(plain) / 6
    orders = [tuple(ids_of(bucketed, n // size)), tuple(ids_of(stream(n, size, 1, lengths), n // size))]
    assert orders[0] != orders[1]
    means = [lengths[bucketed.batch(cursor).sample_ids].mean() for cursor in range(n // size)]
    # Short and long batches follow each other at random: neighbours are not alike.
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.3
    assert POOL * size < n


def test_a_batch_is_a_function_of_its_number() -> None:
    lengths = np.arange(50) % 7
    first, second = stream(50, 8, 3, lengths), stream(50, 8, 3, lengths)
    ahead = {cursor: second.batch(cursor) for cursor in (40, 3, 17)}
    for cursor in range(41):
        batch = first.batch(cursor)
        if cursor in ahead:
            assert batch.sample_ids == ahead[cursor].sample_ids
            assert torch.equal(batch.inputs["noise"], ahead[cursor].inputs["noise"])
