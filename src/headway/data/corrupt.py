"""Text with holes, and what belongs in them: the inputs and labels of the denoising objectives.

    text             the quick brown fox jumps over the lazy dog
    mask             the [M] brown fox jumps over [M] lazy dog    what was there, at the holes (arXiv:1810.04805)
    span corruption  the <0> fox jumps <1> dog                    <0> quick brown <1> over the lazy (arXiv:1910.10683)
    infilling        the [M] fox jumps [M] dog                    the whole text (arXiv:1910.13461)

Functions of windows (B, T) of ids and a generator; the same generator, the same holes. The tables say of each id
whether it is a control token, begins a word or ends a sentence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from headway.data.batches import IGNORE
from headway.text.tokenizer import Tokenizer

Ids = NDArray[np.int64]
Flags = NDArray[np.bool_]
_SENTENCE_ENDS = (b".", b"!", b"?", "。".encode(), "！".encode(), "？".encode())


@dataclass(frozen=True)
class TokenFlags:
    """What is known of each id, (V,) booleans.

    Attributes:
        control: never hidden, never put in at random.
        begins: begins a word (or is no piece of one); in a WordPiece vocabulary what lacks the mark of continuation.
        ends: ends a sentence.
    """

    control: Flags
    begins: Flags
    ends: Flags

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> TokenFlags:
        """Read off a vocabulary. Where words have no marks at all (bytes, characters) every token begins one."""
        ids = range(tokenizer.vocab_size)
        control = np.array([number in tokenizer.special_ids or tokenizer.token(number) is None for number in ids])
        pieces = [b"" if control[number] else tokenizer.token_bytes(number) for number in ids]
        spelled = [tokenizer.token(number) or "" for number in ids]
        if tokenizer.kind == "wordpiece":
            begins = np.array([not text.startswith("##") for text in spelled])
        else:
            begins = np.array([piece[:1].isspace() or not piece[:1].isalnum() for piece in pieces])
        if tokenizer.kind in ("byte", "char"):
            begins[:] = True
        ends = np.array([piece.rstrip().endswith(_SENTENCE_ENDS) for piece in pieces])
        return cls(control, begins | control, ends)


def mask_tokens(
    ids: Ids,
    flags: TokenFlags,
    mask_id: int,
    uniform: Callable[[], NDArray[np.float64]],
    *,
    rate: float = 0.15,
    whole_words: bool = False,
    replace: Literal["bert", "all"] = "bert",
) -> tuple[Ids, Ids]:
    """Hide `rate` of the tokens; `bert`: of those 80 % become the mask, 10 % any token, 10 % stay.

    (B, T) -> inputs (B, T) and labels (B, T), -100 where nothing is asked. With `whole_words` a word is hidden with all
    its tokens or not at all. At least one token of a row that has any is hidden. `uniform` gives (B, T) numbers of
    [0, 1).
    """
    free = ~flags.control[ids]
    draws = uniform()
    if whole_words:
        begins = flags.begins[ids]
        first = np.maximum.accumulate(np.where(begins, np.arange(ids.shape[1]), 0), 1)
        draws = np.take_along_axis(draws, first, 1)  # a word has one fate, that of its first token
    draws = np.where(free, draws, 2.0)
    hidden = draws < np.maximum(rate, draws.min(1, keepdims=True) * (1 + 1e-12))
    hidden &= free
    labels = np.where(hidden, ids, IGNORE)
    inputs = np.where(hidden, mask_id, ids)
    if replace == "bert":
        choice, words = uniform(), np.flatnonzero(~flags.control)
        other = words[(uniform() * len(words)).astype(np.int64)]
        inputs = np.where(hidden & (choice >= 0.8), np.where(choice < 0.9, other, ids), inputs)
    return inputs, labels


def span_counts(length: int, rate: float = 0.15, mean_span: float = 3.0) -> tuple[int, int]:
    """(hidden tokens, spans) of a text of `length` tokens, as T5 rounds them."""
    hidden = min(max(round(length * rate), 1), length - 1)
    return hidden, min(max(round(hidden / mean_span), 1), hidden, length - hidden)


def text_length(inputs: int, rate: float = 0.15, mean_span: float = 3.0) -> int:
    """The most tokens of text that become at most `inputs` tokens, the end token among them."""
    length = max(inputs // 2, 2)  # too short at any rate up to a half, whatever the spans
    while _input_length(length + 1, rate, mean_span) <= inputs:
        length += 1
    return length


def _input_length(length: int, rate: float, mean_span: float) -> int:
    hidden, spans = span_counts(length, rate, mean_span)
    return length - hidden + spans + 1


def _segments(total: int, parts: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """`total` cut at random into `parts` lengths of at least one."""
    cuts = np.sort(rng.permutation(total - 1)[: parts - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


def corrupt_spans(
    ids: Ids,
    sentinels: NDArray[np.int64],
    end: int,
    rng: np.random.Generator,
    *,
    rate: float = 0.15,
    mean_span: float = 3.0,
) -> tuple[Ids, Ids]:
    """Hide spans of `mean_span` tokens; each is a sentinel in the inputs and behind its sentinel in the labels.

    (B, T) -> inputs (B, T - hidden + spans + 1) and labels (B, hidden + spans + 1), both closed by `end`. `sentinels`
    are at least `spans` ids, in the order of their use.
    """
    B, T = ids.shape
    hidden, spans = span_counts(T, rate, mean_span)
    inputs = np.empty((B, T - hidden + spans + 1), np.int64)
    labels = np.empty((B, hidden + spans + 1), np.int64)
    inputs[:, -1] = labels[:, -1] = end
    for row in range(B):
        lengths = np.stack([_segments(T - hidden, spans, rng), _segments(hidden, spans, rng)], 1).ravel()
        stops = lengths.cumsum()
        is_hidden = np.repeat(np.arange(2 * spans) % 2 == 1, lengths)
        starts = stops[::2]  # where each hidden span begins
        first = np.searchsorted(np.flatnonzero(is_hidden), starts)
        labels[row, :-1] = np.insert(ids[row, is_hidden], first, sentinels[:spans])
        text = ids[row].copy()
        text[starts] = sentinels[:spans]
        is_hidden[starts] = False
        inputs[row, :-1] = text[~is_hidden]
    return inputs, labels


def infill(
    ids: Ids,
    flags: TokenFlags,
    mask_id: int,
    rng: np.random.Generator,
    *,
    rate: float = 0.3,
    mean_span: float = 3.0,
    shuffle: bool = True,
) -> list[Ids]:
    """Rows whose sentences changed places and in which spans of Poisson length became one mask each (BART).

    (B, T) -> B rows of their own lengths, the inputs; the labels are the text. A span of length zero puts a mask in.
    """
    return [_infilled(row, flags, mask_id, rng, rate, mean_span, shuffle) for row in ids]


def _infilled(
    row: Ids, flags: TokenFlags, mask_id: int, rng: np.random.Generator, rate: float, mean_span: float, shuffle: bool
) -> Ids:
    if shuffle:
        sentences = np.split(row, np.flatnonzero(flags.ends[row])[:-1] + 1)
        row = np.concatenate([sentences[place] for place in rng.permutation(len(sentences))])
    return np.fromiter(_holes(row, mask_id, rng, rate, mean_span), np.int64)


def _holes(row: Ids, mask_id: int, rng: np.random.Generator, rate: float, mean_span: float) -> Iterator[int]:
    """The row with a mask for each span; spans begin so often that `rate` of the tokens fall into one."""
    # A token that is read is followed by a span with probability p: of 1 + 3p tokens 3p are hidden.
    starts = rng.random(len(row)) < rate / (1 - rate) / mean_span
    lengths = rng.poisson(mean_span, len(row))
    place = 0
    while place < len(row):
        yield int(row[place])
        place += 1
        if starts[place - 1]:
            yield mask_id
            place += int(lengths[place - 1])


def padded(rows: Iterable[Ids], pad: int) -> tuple[Ids, Flags]:
    """Rows as a table (B, longest) and which places are real."""
    kept = list(rows)
    longest = max(map(len, kept))
    sizes = np.array([len(row) for row in kept])
    table = np.full((len(kept), longest), pad, np.int64)
    for place, row in enumerate(kept):
        table[place, : len(row)] = row
    return table, np.arange(longest)[None] < sizes[:, None]
