"""Holes in text: counts, what stays, what is asked for; against transformers' T5 masking and direct reconstruction."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.data.corrupt import (
    TokenFlags,
    corrupt_spans,
    infill,
    mask_tokens,
    padded,
    span_counts,
    text_length,
)
from headway.text import train_tokenizer

V, MASK, END = 50, 49, 48
SENTINELS = np.arange(100, 200)


def flags(begins: np.ndarray | None = None, ends: np.ndarray | None = None) -> TokenFlags:
    control = np.zeros(V, bool)
    control[[MASK, END]] = True
    nothing = np.zeros(V, bool)
    return TokenFlags(control, ~nothing if begins is None else begins, nothing if ends is None else ends)


def windows(seed: int, rows: int = 40, length: int = 64) -> tuple[np.ndarray, np.random.Generator]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, MASK, size=(rows, length)), rng


def test_masking_hides_the_share_and_labels_exactly_the_hidden() -> None:
    ids, rng = windows(0, rows=400)
    inputs, labels = mask_tokens(ids, flags(), MASK, lambda: rng.random(ids.shape), rate=0.15, replace="all")
    hidden = labels != -100
    free = ids != END
    assert hidden.sum() / free.sum() == pytest.approx(0.15, abs=0.01)  # three standard errors of 25,000 draws: 0.007
    assert (inputs[hidden] == MASK).all() and (labels[hidden] == ids[hidden]).all()
    assert (inputs[~hidden] == ids[~hidden]).all() and not hidden[ids == END].any()
    assert hidden.any(1).all(), "every row asks for something"


def test_bert_replaces_eight_in_ten_by_the_mask_and_one_by_any_token() -> None:
    ids, rng = windows(1, rows=2000)
    inputs, labels = mask_tokens(ids, flags(), MASK, lambda: rng.random(ids.shape), rate=0.3)
    hidden = labels != -100
    shares = [(inputs[hidden] == MASK).mean(), (inputs[hidden] == ids[hidden]).mean()]
    # One in ten is another token, which is the same one by chance once in 48.
    assert shares == pytest.approx([0.8, 0.1 + 0.1 / 48], abs=0.01)
    other = hidden & (inputs != MASK) & (inputs != ids)
    assert not np.isin(inputs[other], [MASK, END]).any(), "a control token is never put in"
    assert len(np.unique(inputs[other])) == 48, "every ordinary token is"


def test_a_row_of_control_tokens_asks_for_nothing() -> None:
    ids = np.full((2, 8), END)
    inputs, labels = mask_tokens(ids, flags(), MASK, lambda: np.random.default_rng(0).random(ids.shape))
    assert (labels == -100).all() and (inputs == ids).all()


def test_whole_words_have_one_fate() -> None:
    begins = np.arange(V) % 3 == 0
    ids, rng = windows(2)
    _, labels = mask_tokens(ids, flags(begins), MASK, lambda: rng.random(ids.shape), rate=0.3, whole_words=True)
    _, apart = mask_tokens(ids, flags(begins), MASK, lambda: rng.random(ids.shape), rate=0.3)

    def torn(labels: np.ndarray) -> int:
        """Places where a token's fate differs from that of the token before it in the same word."""
        hidden, inside = labels != -100, ~begins[ids] & (ids != END)
        return int(((hidden[:, 1:] != hidden[:, :-1]) & inside[:, 1:] & (ids[:, :-1] != END)).sum())

    assert torn(labels) == 0 and torn(apart) > 100


@given(length=st.integers(2, 600), rate=st.floats(0.05, 0.6), mean=st.floats(1, 8), seed=st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_spans_can_be_put_back(length: int, rate: float, mean: float, seed: int) -> None:
    ids, rng = windows(seed, rows=3, length=length)
    hidden, spans = span_counts(length, rate, mean)
    if spans > len(SENTINELS):
        return
    inputs, labels = corrupt_spans(ids, SENTINELS, END, rng, rate=rate, mean_span=mean)
    assert inputs.shape[1] == length - hidden + spans + 1 and labels.shape[1] == hidden + spans + 1
    assert (inputs[:, -1] == END).all() and (labels[:, -1] == END).all()
    for row in range(len(ids)):
        assert put_back(inputs[row, :-1], labels[row, :-1]) == ids[row].tolist()
        assert (
            [x for x in inputs[row] if x >= 100]
            == [x for x in labels[row] if x >= 100]
            == list(range(100, 100 + spans))
        )


def put_back(inputs: np.ndarray, labels: np.ndarray) -> list[int]:
    """The text: each sentinel of the inputs replaced by what stands behind it in the labels."""
    spans: dict[int, list[int]] = {}
    current = -1
    for token in labels.tolist():
        if token >= 100:
            current = token
            spans[current] = []
        else:
            spans[current].append(token)
    assert all(spans.values()), "no span is empty"
    return [token for item in inputs.tolist() for token in (spans[item] if item >= 100 else [item])]


def test_lengths_are_those_of_t5() -> None:
    """512 inputs come from 568 tokens and ask for 114 (T5's random_spans_helper, as its documentation says)."""
    assert text_length(512) == 568
    hidden, spans = span_counts(568)
    assert (568 - hidden + spans + 1, hidden + spans + 1) == (512, 114)


def test_text_length_is_the_longest_that_fits() -> None:
    for inputs in range(8, 300, 7):
        length = text_length(inputs)
        sizes = [n - span_counts(n)[0] + span_counts(n)[1] + 1 for n in (length, length + 1)]
        assert sizes[0] <= inputs < sizes[1]


def test_infilling_hides_the_share_and_keeps_the_order_of_the_rest() -> None:
    ids = np.tile(np.arange(40), (500, 1))
    rows = infill(ids, flags(), MASK, np.random.default_rng(0), shuffle=False)
    kept = [[x for x in row.tolist() if x != MASK] for row in rows]
    assert all(row == sorted(row) and len(set(row)) == len(row) for row in kept)
    hidden = 1 - sum(map(len, kept)) / ids.size
    # Spans that reach past the end hide less: with 40 tokens and spans of three, about a token a row.
    assert 0.25 < hidden < 0.31
    masks = np.mean([(row == MASK).sum() for row in rows])
    assert masks == pytest.approx(0.3 * 40 / 3, rel=0.1)


def test_sentences_change_places_as_wholes() -> None:
    ends = np.zeros(V, bool)
    ends[9::10] = True
    ids = np.tile(np.arange(40), (50, 1))
    rows = infill(ids, flags(ends=ends), MASK, np.random.default_rng(0), rate=1e-9)
    orders = {tuple(row[::10] // 10) for row in rows}
    assert len(orders) > 10
    for row in rows:
        assert sorted(row) == list(range(40)) and (row.reshape(4, 10) % 10 == np.arange(10)).all()


def test_flags_are_read_off_a_vocabulary() -> None:
    text = ["The cat sat. Did it? No! It ran away, quickly." * 40]
    words = train_tokenizer(text, "wordpiece", 120, special_tokens=["[UNK]", "[MASK]"])
    known = TokenFlags.of(words)
    spelled = [words.token(number) or "" for number in range(words.vocab_size)]
    assert known.control[words.mask_id] and not known.control[words.encode("cat")[0]]
    assert all(known.begins[n] != s.startswith("##") for n, s in enumerate(spelled))
    assert known.ends[words.encode(".")[0]] and known.ends[words.encode("?")[0]]
    level = TokenFlags.of(train_tokenizer(text, "bpe", 300, special_tokens=["<|endoftext|>"]))
    assert level.begins.any() and not level.begins.all()
    assert TokenFlags.of(train_tokenizer(text, "byte", 257, special_tokens=["<|endoftext|>"])).begins.all()


def test_padding_says_what_is_real() -> None:
    table, real = padded([np.array([1, 2, 3]), np.array([4])], 9)
    assert table.tolist() == [[1, 2, 3], [4, 9, 9]] and real.tolist() == [[True] * 3, [True, False, False]]
