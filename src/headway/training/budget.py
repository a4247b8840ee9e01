"""Batches of at most so many padded tokens, for examples of very different lengths.

Lengths are rounded up to eighths of a power of two, and examples of one rounded length are a class. Laid out longest
class first, the epoch is cut into batches wherever the next row would go over the budget. The rounded lengths are the
same in every epoch, so the cuts are too: an epoch always has the same number of batches, and batch c is number c mod M
of epoch c // M. What changes is the company: each epoch shuffles every class within itself, and the batches.

    class     48 48 48 | 40 40 ...        budget 100: two rows of 48 (padded to their longest, at most 48), two of 40
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from headway.errors import InputError
from headway.training.objectives import TrainingBatch, stream

Example = TypeVar("Example")
_GRAIN = 3  # bits of a length behind its first: classes are at most an eighth wide
Sizes = NDArray[np.int64]


def cuts(sizes: Sizes, budget: int) -> list[int]:
    """Where batches of consecutive rows end: as many rows each as stay within `budget`, and at least one.

    (N, K) lengths of each row in K tables of its own; a batch of R rows has R times the sum of the K longest.
    """
    ends, begin, longest = [], 0, np.zeros(sizes.shape[1], dtype=np.int64)
    for row, size in enumerate(sizes):
        wider = np.maximum(longest, size)
        if row > begin and (row + 1 - begin) * int(wider.sum()) > budget:
            ends.append(row)
            begin, wider = row, size
        longest = wider
    return [*ends, len(sizes)]


def rounded(sizes: Sizes, budget: int) -> Sizes:
    """Each length up to the next of its class; a row that would thereby not fit into `budget` keeps its own."""
    steps = 1 << np.maximum(np.log2(np.maximum(sizes, 1)).astype(np.int64) - _GRAIN, 0)
    classes = -(-sizes // steps) * steps
    return np.where(classes.sum(1, keepdims=True) > budget, sizes, classes)


class BudgetedExamples(Generic[Example]):
    """An endless stream of batches, each a function of its number; every example once per epoch.

    Args:
        examples, collate, seed, identity: see objectives.ShuffledExamples.
        sizes: (N, K) padded lengths of each example, see `cuts`. budget: most padded tokens of a batch.

    Raises InputError for no examples, and for one that is longer than the budget.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        collate: Callable[[list[Example], np.random.Generator], Mapping[str, Tensor]],
        sizes: Sizes,
        budget: int,
        seed: int,
        identity: Mapping[str, str],
    ) -> None:
        if not len(examples):
            raise InputError("data", "0 examples", "at least one")
        totals = sizes.sum(1)
        over = np.flatnonzero(totals > budget)
        if len(over):
            first, most = int(over[0]), int(totals.max())
            found = f"{len(over)} of {len(totals)} examples are longer, number {first} has {int(totals[first])} tokens"
            fix = f"train.batch_tokens={most}, or a smaller data.context, which cuts them"
            raise InputError("train.batch_tokens", found, f"at most {budget}, input and target together", fix)
        self._examples, self._collate, self._seed, self.identity = examples, collate, seed, identity
        classes = rounded(sizes, budget)
        # Classes by their numbers, the longest first.
        found_classes, numbers = np.unique(-classes, axis=0, return_inverse=True)
        self._class = numbers.reshape(-1)
        self._cuts = np.array([0, *cuts(-found_classes[np.sort(self._class)], budget)])
        self._epochs: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    @property
    def batches(self) -> int:
        """Of an epoch."""
        return len(self._cuts) - 1

    def batch(self, cursor: int) -> TrainingBatch:
        """Batch number `cursor` >= 0."""
        epoch, place = divmod(cursor, self.batches)
        order, batches = self._epoch(epoch)
        begin, end = self._cuts[batches[place] : batches[place] + 2]
        ids = order[begin:end].tolist()
        return TrainingBatch(self._collate([self._examples[one] for one in ids], stream(self._seed, 1, cursor)), ids)

    def _epoch(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(examples by class, shuffled in each; batches in their order)."""
        if number not in self._epochs:
            rng = stream(self._seed, 0, number)
            mixed = rng.permutation(len(self._class))
            order = mixed[np.argsort(self._class[mixed], kind="stable")]
            self._epochs = {number: (order, rng.permutation(self.batches))}
        return self._epochs[number]
