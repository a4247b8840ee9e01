"""Packed batches: exact coverage, purity in the cursor, document isolation, evaluation windows."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headway.data import IGNORE, PackedBatches, TokenStore, evaluation_batches
from headway.errors import InputError


def store_of(lengths):
    """Documents whose tokens are all different, so that a token tells its place."""
    numbers = iter(range(10**6))
    return TokenStore.of([[next(numbers) for _ in range(length)] for length in lengths])


LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=12).filter(lambda lengths: sum(lengths) > 1)


def same(a, b):
    return (
        torch.equal(a.input_ids, b.input_ids)
        and torch.equal(a.labels, b.labels)
        and (a.documents is b.documents is None or torch.equal(a.documents, b.documents))
        and (a.tokens, a.sample_ids) == (b.tokens, b.sample_ids)
    )


def check_rows(batch, store, isolate):
    """Labels, document numbers and counts against a definition written token by token."""
    ends = set(store.ends.tolist())
    document_of = np.searchsorted(store.ends, np.arange(len(store.tokens)), side="right")
    documents = batch.documents if batch.documents is not None else torch.zeros_like(batch.input_ids)
    for inputs, labels, numbers in zip(
        batch.input_ids.tolist(), batch.labels.tolist(), documents.tolist(), strict=True
    ):
        for column, (token, label) in enumerate(zip(inputs, labels, strict=True)):
            if label != IGNORE:
                assert label == token + 1
                assert not (isolate and token + 1 in ends)
            elif column + 1 < len(inputs) and labels[column + 1] != IGNORE:
                assert isolate and token + 1 in ends  # a hole in a row is the end of a document
        counted = [column for column, label in enumerate(labels) if label != IGNORE]
        for a, b in pairwise(counted):
            together = document_of[inputs[a]] == document_of[inputs[b]] and inputs[b] > inputs[a]
            if isolate:
                assert (numbers[a] == numbers[b]) == together
    assert batch.tokens == int((batch.labels != IGNORE).sum())
    assert batch.sample_ids == batch.input_ids[:, 0].tolist()
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64


@given(LENGTHS, st.integers(1, 20), st.integers(0, 2**63 - 1), st.booleans())
def test_every_token_is_a_label_once_per_epoch(lengths, context, seed, isolate):
    store = store_of(lengths)
    context = min(context, len(store.tokens) - 1)
    batches = PackedBatches(store, context, 1, seed, isolate)
    starts = {0, *store.ends.tolist()} if isolate else {0}
    expected = sorted(set(range(len(store.tokens))) - starts)
    for epoch in range(3):
        rows = batches.rows(epoch * batches.windows, batches.windows)
        check_rows(rows, store, isolate)
        assert sorted(rows.labels[rows.labels != IGNORE].tolist()) == expected


@given(LENGTHS, st.integers(1, 8), st.integers(1, 9), st.integers(0, 99), st.integers(0, 10**9))
def test_a_batch_depends_on_its_number_only(lengths, context, size, seed, cursor):
    """R7's data cursor: any batch, from a fresh object, in any order, cut into any ranks, is the same."""
    store = store_of(lengths)
    context = min(context, len(store.tokens) - 1)
    used = PackedBatches(store, context, size, seed)
    straight = [used.batch(number) for number in range(cursor, cursor + 3)]
    resumed = PackedBatches(store, context, size, seed)
    for number in reversed(range(3)):
        assert same(resumed.batch(cursor + number), straight[number])
    row = PackedBatches(store, context, size, seed).rows(cursor * size + size - 1, 1)
    assert torch.equal(row.input_ids[0], straight[0].input_ids[-1])
    assert torch.equal(row.labels[0], straight[0].labels[-1])


@pytest.mark.fault("R14")
def test_same_seed_same_bytes_other_seed_other_bytes():
    store = store_of([500, 300, 200])
    first = [PackedBatches(store, 16, 4, seed).batch(0).input_ids.tolist() for seed in range(20)]
    again = [PackedBatches(store, 16, 4, seed).batch(0).input_ids.tolist() for seed in range(20)]
    assert first == again
    assert len({str(rows) for rows in first}) == 20


def test_the_stream_is_frozen():
    """A run must resume into the same batches after an upgrade: these numbers may never change."""
    store = store_of([40, 60])
    batches = PackedBatches(store, 10, 4, seed=7)
    assert [batches.batch(cursor).sample_ids for cursor in (0, 1, 10**12)] == [
        [79, 59, 10, 39],
        [89, 69, 29, 49],
        [77, 27, 67, 37],
    ]


def test_epochs_differ_in_order_and_phase():
    store = store_of([1000])
    batches = PackedBatches(store, 50, 1, 0)
    epochs = [[batches.batch(epoch * 20 + slot).sample_ids[0] for slot in range(20)] for epoch in range(6)]
    assert len({tuple(sorted(starts)) for starts in epochs}) == 6
    assert len({tuple(np.argsort(starts)) for starts in epochs}) == 6
    assert batches.batches_per_epoch == 20


def test_documents_are_isolated_and_the_first_token_is_not_predicted():
    store = TokenStore.of([[1, 2, 3, 0], [4, 5, 0], [6, 7, 8, 9, 0]])
    batch = next(evaluation_batches(store, 6, 1))
    assert batch.input_ids.tolist() == [[1, 2, 3, 0, 4, 5]]
    assert batch.labels.tolist() == [[2, 3, 0, IGNORE, 5, 0]]
    assert batch.documents.tolist() == [[0, 0, 0, 0, 1, 1]]
    assert batch.tokens == 5
    plain = next(evaluation_batches(store, 6, 1, isolate=False))
    assert plain.labels.tolist() == [[2, 3, 0, 4, 5, 0]] and plain.documents is None


def test_no_documents_where_each_row_holds_one():
    batches = PackedBatches(store_of([10_000]), 16, 2, 0)
    kinds = [batches.batch(cursor).documents is None for cursor in range(400)]
    assert kinds.count(False) <= 4  # only the rows that reach around the end of the ring
    wrapped = batches.batch(kinds.index(False)) if False in kinds else None
    assert wrapped is None or set(wrapped.documents.flatten().tolist()) == {0, 1}


def test_a_store_shorter_than_a_window_is_refused():
    with pytest.raises(InputError, match=r"10 tokens; expected at least 11.*data\.context=9"):
        PackedBatches(store_of([10]), 10, 1, 0)
    assert PackedBatches(store_of([10]), 9, 1, 0).windows == 1


@given(LENGTHS, st.integers(1, 40), st.integers(1, 5), st.booleans())
def test_evaluation_covers_all_labels_in_order(lengths, context, size, isolate):
    store = store_of(lengths)
    rows = list(evaluation_batches(store, context, size, isolate=isolate))
    for batch in rows:
        check_rows(batch, store, isolate)
    seen = [label for batch in rows for label in batch.labels[batch.labels != IGNORE].tolist()]
    starts = {0, *store.ends.tolist()} if isolate else {0}
    assert seen == [place for place in range(len(store.tokens)) if place not in starts]
    assert sum(batch.tokens for batch in rows) == len(seen)
    again = evaluation_batches(store, context, size, isolate=isolate)
    assert all(same(a, b) for a, b in zip(rows, again, strict=True))


@given(st.integers(2, 500), st.integers(1, 30), st.integers(1, 20))
def test_limited_evaluation_windows_are_spread_evenly(tokens, context, limit):
    store = store_of([tokens])
    windows = -(-(tokens - 1) // context)
    starts = [start for batch in evaluation_batches(store, context, 3, limit) for start in batch.sample_ids]
    assert len(starts) == min(limit, windows) == len(set(starts))
    gaps = np.diff([*starts, windows * context])
    assert starts[0] == 0 and max(gaps) - min(gaps) <= context


@pytest.mark.fault("R18")
def test_nothing_to_evaluate_yields_nothing():
    assert list(evaluation_batches(TokenStore.of([[1]]), 4, 2)) == []
    (batch,) = evaluation_batches(TokenStore.of([[1], [2]]), 4, 2)
    assert batch.tokens == 0


def test_batches_move_between_devices():
    batch = PackedBatches(store_of([5, 6, 7]), 8, 2, 0).batch(0)
    moved = batch.to("meta")
    assert moved.input_ids.is_meta and moved.documents.is_meta and moved.tokens == batch.tokens
