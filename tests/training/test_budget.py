"""Batches under a budget of padded tokens: never over it, nothing lost, each a function of its number."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import InputError
from headway.training.budget import BudgetedExamples, cuts, rounded


def stream(sizes: np.ndarray, budget: int, seed: int = 0) -> BudgetedExamples[int]:
    def collate(ids: list[int], rng: np.random.Generator) -> dict[str, torch.Tensor]:
        return {"labels": torch.tensor(ids), "noise": torch.from_numpy(rng.random(len(ids)))}

    return BudgetedExamples(range(len(sizes)), collate, sizes, budget, seed, {})


def padded(sizes: np.ndarray, ids: list[int]) -> int:
    """The definition: rows times the longest in each table."""
    return len(ids) * sum(max(int(sizes[one][table]) for one in ids) for table in range(sizes.shape[1]))


SIZES = st.integers(1, 2).flatmap(
    lambda tables: st.lists(st.lists(st.integers(1, 60), min_size=tables, max_size=tables), min_size=1, max_size=80)
)


@settings(max_examples=100, deadline=None)
@given(SIZES, st.integers(0, 60), st.integers(0, 9))
def test_within_the_budget_and_every_example_once_per_epoch(rows: list[list[int]], more: int, seed: int) -> None:
    sizes = np.array(rows)
    budget = int(sizes.sum(1).max()) + more
    source = stream(sizes, budget, seed)
    for epoch in range(3):
        seen = []
        for place in range(source.batches):
            ids = list(source.batch(epoch * source.batches + place).sample_ids)
            assert padded(sizes, ids) <= budget
            seen += ids
        assert sorted(seen) == list(range(len(sizes)))


@given(SIZES, st.integers(1, 200))
def test_cuts_are_as_few_as_going_in_order_allows(rows: list[list[int]], budget: int) -> None:
    sizes = np.array(rows)
    ends = cuts(sizes, budget)
    assert ends[-1] == len(sizes) and sorted(set(ends)) == ends
    for begin, end in zip([0, *ends[:-1]], ends, strict=True):
        assert end == begin + 1 or padded(sizes, list(range(begin, end))) <= budget
        if end < len(sizes):
            assert padded(sizes, list(range(begin, end + 1))) > budget  # one more would be too many


@given(SIZES, st.integers(120, 200))
def test_classes_are_at_most_an_eighth_wide(rows: list[list[int]], budget: int) -> None:
    sizes = np.array(rows)
    classes = rounded(sizes, budget)
    assert (classes >= sizes).all() and (classes - sizes <= sizes / 8).all()
    assert (classes.sum(1) <= np.maximum(budget, sizes.sum(1))).all()


def test_little_is_padded_and_company_changes() -> None:
    sizes = np.minimum(np.random.default_rng(0).geometric(0.03, 3000), 400)[:, None]
    source = stream(sizes, 2000)
    batches = [source.batch(cursor).sample_ids for cursor in range(2 * source.batches)]
    filled = sizes.sum() / (source.batches * 2000)
    assert filled > 0.85  # in plain order, 50 rows of up to 160 would fill a third of the table
    first, second = ({frozenset(ids) for ids in batches[i * source.batches :][: source.batches]} for i in (0, 1))
    assert len(first & second) <= 0.1 * len(first)  # the few longest stay alone
    means = [sizes[list(ids)].mean() for ids in batches]
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.3


def test_a_batch_is_a_function_of_its_number() -> None:
    sizes = np.arange(1, 200)[:, None] % 50 + 1
    first, second = stream(sizes, 300, 3), stream(sizes, 300, 3)
    ahead = {cursor: second.batch(cursor) for cursor in (400, 3, 170)}
    for cursor in range(401):
        batch = first.batch(cursor)
        if cursor in ahead:
            assert batch.sample_ids == ahead[cursor].sample_ids
            assert torch.equal(batch.inputs["noise"], ahead[cursor].inputs["noise"])
    assert stream(sizes, 300, 4).batch(0).sample_ids != first.batch(0).sample_ids


def test_a_longer_example_is_named() -> None:
    sizes = np.array([[5, 3], [9, 4], [2, 2], [8, 6]])
    with pytest.raises(InputError, match=r"2 of 4 examples are longer, number 1 has 13 tokens.*batch_tokens=14"):
        stream(sizes, 12)
    assert stream(sizes, 14).batches >= 2
