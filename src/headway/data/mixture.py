"""Several sources in fixed shares: which source a row comes from, and which of its rows it is, by arithmetic alone.

Rows go in cycles of C. In each cycle source i has n_i rows, C w_i / sum of w: exactly, where some C up to MAX_CYCLE
makes all of them whole (3 : 1 has C = 4), else by largest remainders in a cycle of MAX_CYCLE. The order within a cycle
is the hash of its number. So row r is found without the rows before it: its cycle is r // C, its source stands at slot
r % C of that cycle's order, and its number inside the source is (r // C) n_i and the slots of i before it.

    books 2, code 1     cycle 0  b c b | cycle 1  b b c | ...
    row 4               cycle 1, slot 1: of the books number 1 * 2 + 1 = 3

A source that is smaller than its share begins again, in another order; a larger one is not read to its end.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headway.data.batches import Batch, PackedBatches, hashed_order
from headway.errors import ConfigError
from headway.strict import dump_json

MAX_CYCLE = 4096
_ORDER, _ROWS = 3, 4  # uses of the hash, beside those of PackedBatches


def largest_remainders(shares: Sequence[Fraction], total: int) -> list[int]:
    """Whole numbers that sum to `total`, each within one of its share of it; ties go to the earlier."""
    exact = [share * total for share in shares]
    counts = [math.floor(value) for value in exact]
    order = sorted(range(len(shares)), key=lambda place: counts[place] - exact[place])
    for place in order[: total - sum(counts)]:
        counts[place] += 1
    return counts


class Mixture:
    """The shares of some sources, and the order of their rows.

    Args:
        weights: name -> weight above 0, in any unit. seed: another seed, another order.

    Attributes:
        names, shares: in the order given; shares sum to one.
        counts: rows of each source in a cycle. cycle: their sum.

    Raises ConfigError for a share that is less than one row of the longest cycle.
    """

    def __init__(self, weights: Mapping[str, float], seed: int = 0) -> None:
        exact = [Fraction(repr(weight)) for weight in weights.values()]  # as written: 0.1 is a tenth
        self.names, self.seed = tuple(weights), seed
        self.shares = tuple(weight / sum(exact) for weight in exact)
        self.cycle = min(math.lcm(*(share.denominator for share in self.shares)), MAX_CYCLE)
        self.counts = tuple(largest_remainders(self.shares, self.cycle))
        for name, share, count in zip(self.names, self.shares, self.counts, strict=True):
            if not count:
                found = f"a share of {float(share):.2g} of all rows"
                raise ConfigError(f"data.mixture.{name}", found, f"at least 1/{MAX_CYCLE}", "leave it out, or raise it")
        self._slots = np.repeat(np.arange(len(self.counts)), self.counts)

    def rows(self, first: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(source, number inside it) of `count` rows from row `first` on, (count,) int64 each.

        Rows of one source have consecutive numbers.
        """
        begin, end = first // self.cycle, -(-(first + count) // self.cycle)
        orders = [hashed_order(self.cycle, self.seed, cycle, _ORDER) for cycle in range(begin, end)]
        source = np.concatenate([self._slots[order] for order in orders])
        number = np.empty_like(source)
        for place, share in enumerate(self.counts):
            mine = np.flatnonzero(source == place)
            number[mine] = np.arange(begin * share, begin * share + len(mine))
        inside = slice(first - begin * self.cycle, first - begin * self.cycle + count)
        return source[inside], number[inside]

    def split(self, total: int) -> list[int]:
        """`total` in the sources' shares, at least one each."""
        return [max(count, 1) for count in largest_remainders(self.shares, total)]

    def sign(self, hashes: Sequence[str]) -> str:
        """One hash of what the sources are made of and of their shares; their names and places do not count."""
        return hashlib.sha256(dump_json([list(hashes), list(self.counts)]).encode()).hexdigest()

    def texts(self, texts: Sequence[Callable[[], Iterable[str]]], sizes: Sequence[int]) -> Iterator[str]:
        """Texts of all sources in their shares, about as much as `sizes` (of each, in any unit) sum to.

        A source that is smaller than its share comes again; of a larger one every so many texts are left out.
        """
        for share, size, every in zip(self.shares, sizes, texts, strict=True):
            wanted = float(share) * sum(sizes) / max(size, 1)
            for _ in range(int(wanted)):
                yield from every()
            yield from _thinned(every(), wanted % 1)


def _thinned(texts: Iterable[str], share: float) -> Iterator[str]:
    """A share of the texts by their length, spread over all of them."""
    seen = taken = 0
    for text in texts if share else ():
        seen += len(text)
        if taken + len(text) <= share * seen or (not taken and len(text) == seen):
            taken += len(text)
            yield text


class MixedBatches:
    """Batches of windows of several stores, in the shares of a mixture; see PackedBatches, whose streams they are.

    `sample_ids` count through the stores in their order.
    """

    def __init__(self, parts: Sequence[PackedBatches], mixture: Mixture) -> None:
        self._parts, self._mixture, self.seed = parts, mixture, mixture.seed
        self.batch_size = parts[0].batch_size
        self.hash = mixture.sign([part.hash for part in parts])
        sizes = [len(part.store.tokens) for part in parts]
        self._begins = [sum(sizes[:place]) for place in range(len(sizes))]

    def batch(self, cursor: int) -> Batch:
        """Batch number `cursor` >= 0: the mixture's rows from cursor * batch_size on."""
        source, number = self._mixture.rows(cursor * self.batch_size, self.batch_size)
        there = np.unique(source)
        found = [
            self._parts[place].rows(int(number[source == place][0]), int((source == place).sum())) for place in there
        ]
        back = torch.from_numpy(np.argsort(np.argsort(source, kind="stable"), kind="stable"))
        ids = [self._begins[place] + one for place, some in zip(there, found, strict=True) for one in some.sample_ids]
        documents = None
        if any(some.documents is not None for some in found):
            documents = torch.cat([_documents(some) for some in found])[back]
        return Batch(
            torch.cat([some.input_ids for some in found])[back],
            torch.cat([some.labels for some in found])[back],
            documents,
            sum(some.tokens for some in found),
            [ids[place] for place in back.tolist()],
        )


def _documents(batch: Batch) -> Tensor:
    return torch.zeros_like(batch.input_ids) if batch.documents is None else batch.documents


class MixedRows:
    """Numbers of examples in the shares of a mixture, in epochs of as many rows as all sources have, in whole cycles.

    Each source goes through its examples, in a fresh order each time, without regard to the epochs of the whole.

    Args:
        mixture: the shares. sizes: examples of each source; they are numbered through the sources in their order.
    """

    def __init__(self, mixture: Mixture, sizes: Sequence[int]) -> None:
        self.mixture, self.sizes = mixture, sizes
        self.rows = -(-sum(sizes) // mixture.cycle) * mixture.cycle
        """Rows of an epoch."""

    def epoch(self, number: int) -> NDArray[np.int64]:
        """The examples of epoch `number` >= 0, (rows,) int64."""
        source, inside = self.mixture.rows(number * self.rows, self.rows)
        ids = np.empty_like(inside)
        begin = 0
        for place, size in enumerate(self.sizes):
            mine = np.flatnonzero(source == place)
            passes, slots = np.divmod(inside[mine], size)
            for one in np.unique(passes):
                now = passes == one
                order = hashed_order(size, self.mixture.seed, int(one), _ROWS + place)
                ids[mine[now]] = begin + order[slots[now]]
            begin += size
        return ids
