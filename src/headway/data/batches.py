"""Packed batches: token stores cut into windows, each batch a pure function of its number.

The store is read as one stream of M = N - 1 (input, label) pairs, pair i being (token i, token i + 1). An epoch
lays W = ceil(M / T) windows of T pairs around the stream as on a ring, from a fresh offset, and takes them in a
fresh order; the W*T - M pairs that would come twice are masked in the last window. So every label is seen once
per epoch, no two epochs cut at the same places, and batch number `cursor` needs nothing but its number: resume
is instant. Offset and order come from our own integer hash, as NumPy does not promise its generators' streams
from one version to the next (NEP 19).

    tokens     a b c $ d e $ f g h i $ ...          $ is eos
    input_ids  a b c $ d e                          one row, T = 6
    labels     b c $ x e $                          x = -100: nothing of c $ foretells d
    documents  0 0 0 0 1 1                          attention stays within equal numbers (isolate)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headway.data.store import TokenStore
from headway.errors import InputError

IGNORE = -100
"""The label that no loss counts: torch's own default ignore_index."""
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Batch:
    """B windows of T tokens.

    Attributes:
        input_ids: (B, T) int64.
        labels: (B, T) int64, the next token; -100 where there is nothing to predict.
        documents: (B, T) int64, a document's number within its row, or None if no row holds two.
        tokens: how many labels count.
        sample_ids: B places, in the store, of the rows' first tokens: enough to look a bad sample up.
    """

    input_ids: Tensor
    labels: Tensor
    documents: Tensor | None
    tokens: int
    sample_ids: list[int]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device; from pinned memory the copy does not wait."""
        documents = None if self.documents is None else self.documents.to(device, non_blocking=True)
        inputs, labels = (x.to(device, non_blocking=True) for x in (self.input_ids, self.labels))
        return replace(self, input_ids=inputs, labels=labels, documents=documents)


class Windows(Protocol):
    """An endless stream of batches of windows, each a function of its number."""

    @property
    def seed(self) -> int:
        """Another seed, another stream."""

    @property
    def hash(self) -> str:
        """What the batches are made of."""

    def batch(self, cursor: int) -> Batch:
        """Batch number `cursor` >= 0."""


class PackedBatches:
    """An endless, deterministic stream of training batches, addressed by number.

    Args:
        store: the tokens; context + 1 of them at least.
        context: T, tokens per row.
        batch_size: B, rows per batch.
        seed: 0 <= seed < 2**63; another seed, another order.
        isolate: number the documents of a row and predict no document's first token from the one before it.

    Raises:
        InputError: the store is shorter than one window.
    """

    def __init__(self, store: TokenStore, context: int, batch_size: int, seed: int, isolate: bool = True) -> None:
        if len(store.tokens) < context + 1:
            found = f"{len(store.tokens)} tokens"
            fix = f"data.context={max(len(store.tokens) - 1, 1)} or more text"
            raise InputError("data", found, f"at least {context + 1} (data.context + 1)", fix)
        self.store, self.context, self.batch_size, self.seed, self.isolate = store, context, batch_size, seed, isolate
        self._pairs = len(store.tokens) - 1
        self.windows = -(-self._pairs // context)
        """Rows per epoch."""
        self._epochs: dict[int, tuple[int, NDArray[np.int64]]] = {}

    @property
    def hash(self) -> str:
        """What the batches are made of."""
        return self.store.hash

    @property
    def batches_per_epoch(self) -> float:
        """How many batches see every label once; not whole in general, a batch may span two epochs."""
        return self.windows / self.batch_size

    def batch(self, cursor: int) -> Batch:
        """Batch number `cursor` >= 0: the rows from cursor * batch_size on."""
        return self.rows(cursor * self.batch_size, self.batch_size)

    def rows(self, first: int, count: int) -> Batch:
        """`count` rows of the endless stream from row `first` on: what several ranks share out among them."""
        epochs, slots = np.divmod(np.arange(first, first + count, dtype=np.int64), self.windows)
        window, offset = np.empty_like(slots), np.empty_like(slots)
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            offset[inside], order = self._epoch(int(epoch))
            window[inside] = order[slots[inside]]
        starts = (offset + window * self.context) % self._pairs
        surplus = self.windows * self.context - self._pairs
        lengths = np.where(window == self.windows - 1, self.context - surplus, self.context)
        return _windows(self.store, starts, lengths, self.context, self.isolate)

    def _epoch(self, epoch: int) -> tuple[int, NDArray[np.int64]]:
        """An epoch's offset and the order of its windows: hashes, sorted. 8 bytes a window, two epochs kept."""
        if epoch not in self._epochs:
            self._epochs = dict(list(self._epochs.items())[-1:])
            offset = hash_of(self.seed, epoch, 1) % self._pairs
            self._epochs[epoch] = offset, hashed_order(self.windows, self.seed, epoch, 2)
        return self._epochs[epoch]


def evaluation_batches(
    store: TokenStore, context: int, batch_size: int, limit: int | None = None, isolate: bool = True
) -> Iterator[Batch]:
    """Windows one after another without overlap, for evaluation: the same ones every time.

    Args:
        store: the tokens; a store shorter than a window gives one window, padded.
        context: T, tokens per row; the last window is padded with label -100, in a document of its own.
        batch_size: rows per batch; the last batch may have fewer.
        limit: at most so many windows, spread evenly over the store; None takes all, so that the labels cover
            every token but the first (with `isolate`: but each document's first).
        isolate: as in PackedBatches.

    Yields:
        Nothing if the store has fewer than 2 tokens.
    """
    pairs = len(store.tokens) - 1
    windows = max(-(-pairs // context), 0)
    count = windows if limit is None else min(limit, windows)
    chosen = np.arange(count, dtype=np.int64) * windows // max(count, 1)
    for first in range(0, count, batch_size):
        starts = chosen[first : first + batch_size] * context
        yield _windows(store, starts, np.minimum(context, pairs - starts), context, isolate)


def _windows(
    store: TokenStore, starts: NDArray[np.int64], lengths: NDArray[np.int64], context: int, isolate: bool
) -> Batch:
    """Gather the rows that begin at pairs `starts` (B) and count for `lengths` (B) pairs, around the ring."""
    pairs = len(store.tokens) - 1
    index_BT = starts[:, None] + np.arange(context)
    index_BT %= pairs
    input_BT = store.tokens[index_BT].astype(np.int64)
    index_BT += 1
    label_BT = store.tokens[index_BT].astype(np.int64)
    short = np.flatnonzero(lengths < context)
    for row in short:
        label_BT[row, lengths[row] :] = IGNORE
    documents = None
    if isolate:
        crossing, columns = _crossings(store.ends, starts, context, pairs)
        label_BT[crossing, columns] = IGNORE
        changes_BT = np.zeros((len(starts), context + 1), dtype=np.int64)
        changes_BT[crossing, columns + 1] = 1
        seams = np.flatnonzero(starts + context > pairs)
        changes_BT[seams, pairs - starts[seams]] = 1
        changes_BT[short, lengths[short]] = 1
        if changes_BT[:, 1:context].any():
            documents = torch.from_numpy(changes_BT[:, :context].cumsum(axis=1))
    tokens = int(np.count_nonzero(label_BT != IGNORE))
    inputs, labels = torch.from_numpy(input_BT), torch.from_numpy(label_BT)
    return Batch(inputs, labels, documents, tokens, [int(start) for start in starts])


def _crossings(
    ends: NDArray[np.int64], starts: NDArray[np.int64], context: int, pairs: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(row, column) of every input that is the last token of its document, so that its label belongs to another.

    The search is in the documents' ends, so its cost is that of rows and boundaries, not of tokens.
    """
    rows = np.arange(len(starts))
    over = starts + context - pairs  # pairs of the row beyond the seam, which lie at the beginning of the store
    wraps = np.flatnonzero(over > 0)
    begin = np.concatenate([starts, np.zeros(len(wraps), dtype=np.int64)])
    length = np.concatenate([np.minimum(context, pairs - starts), np.minimum(over[wraps], pairs)])
    row = np.concatenate([rows, wraps])
    column = np.concatenate([np.zeros(len(rows), dtype=np.int64), context - over[wraps]])
    low = np.searchsorted(ends, begin, side="right")
    counts = np.searchsorted(ends, begin + length, side="right") - low
    which = np.repeat(np.arange(len(row)), counts)
    skipped = np.cumsum(counts) - counts
    end = ends[np.repeat(low - skipped, counts) + np.arange(len(which))]
    return row[which], column[which] + end - 1 - begin[which]


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finalizer (Steele, Lea, Flood 2014): one 64-bit hash per value, modulo 2**64."""
    values = values * np.uint64(_GOLDEN)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def hashed_order(count: int, *parts: int) -> NDArray[np.int64]:
    """The numbers below `count` in an order that some integers name, (count,) int64."""
    keys = np.arange(count, dtype=np.uint64) + np.uint64(hash_of(*parts))
    return np.argsort(_mix(keys), kind="stable")


def hashed_uniform(places: NDArray[np.int64], use: int) -> NDArray[np.float64]:
    """A number in [0, 1) for each place, the same whenever it is asked for; another `use`, other numbers."""
    keys = places.astype(np.uint64) + np.uint64(hash_of(use))
    return (_mix(keys) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def hash_of(*parts: int) -> int:
    """One 64-bit hash of a few integers, the same on every machine."""
    state = np.zeros(1, dtype=np.uint64)
    for part in parts:
        state = _mix(state + np.array([(part + 1) & _MASK], dtype=np.uint64))
    return int(state[0])
