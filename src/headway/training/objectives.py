"""What a model is trained on: batches of inputs, targets and a loss mask, addressed by number.

An objective is (example -> inputs, targets, loss mask) plus a loss. The loss is the model's own head (nn/heads.py)
and the mask is the label -100; what differs between causal language modelling, masked language modelling,
translation and image classification is therefore only how a batch is made. The loop sees a `BatchSource` and
nothing else, so every kind of model goes through the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headway.data.batches import Batch, Windows, evaluation_batches
from headway.data.mixture import MixedRows
from headway.data.store import TokenStore
from headway.errors import BugError, InputError

IGNORED = -100
POOL = 50
"""Batches among which examples are sorted by length: enough to pad little, few enough to keep an epoch random."""
Example = TypeVar("Example")


@dataclass(frozen=True, slots=True)
class TrainingBatch:
    """One update's worth of rows.

    Attributes:
        inputs: the model's keyword arguments, `labels` among them; every tensor has the rows as its first size,
            and all have the same number of them.
        sample_ids: a number per row by which a bad example can be found again.
        bytes: bytes of text that the supervised labels stand for; None where that has no meaning.
        source: which of several sources all rows are from, where that is to be told apart.
    """

    inputs: Mapping[str, Tensor]
    sample_ids: Sequence[int]
    bytes: int | None = None
    source: str | None = None

    @property
    def tokens(self) -> int:
        """Supervised labels: those that are not -100."""
        return count_supervised(self.inputs)

    def sample(self, row: int) -> int:
        """The number of the example that a row is of; some have two."""
        return self.sample_ids[row * len(self.sample_ids) // len(self.inputs["labels"])]

    def split(self, parts: int) -> list[dict[str, Tensor]]:
        """The inputs in `parts` passes of nearly equal numbers of rows; fewer passes if there are fewer rows."""
        rows = len(self.inputs["labels"])
        if not rows or any(len(tensor) != rows for tensor in self.inputs.values()):
            sizes = {name: len(tensor) for name, tensor in self.inputs.items()}
            raise BugError("batch", f"rows {sizes}", "at least one row, and the same number in every tensor")
        together = rows_together(self.inputs)
        parts = min(parts, rows // together)
        ends = torch.arange(rows // together).tensor_split(parts)
        cut = {
            name: tensor.tensor_split([int(part[0]) * together for part in ends[1:]])
            for name, tensor in self.inputs.items()
        }
        return [dict(zip(cut, pieces, strict=True)) for pieces in zip(*cut.values(), strict=True)]


def rows_together(inputs: Mapping[str, Tensor]) -> int:
    """Rows that no pass may part: the two completions of a preference."""
    return 2 if "reference" in inputs else 1


def count_supervised(inputs: Mapping[str, Tensor]) -> int:
    """How many labels count towards the loss; of preferences, how many pairs."""
    known, together = inputs["labels"] != IGNORED, rows_together(inputs)
    return int(known.sum() if together == 1 else known.view(-1, together * known.shape[1]).any(1).sum())


class BatchSource(Protocol):
    """An endless stream of batches in which every batch is a pure function of its number.

    That makes resuming instant and exact: the stream's whole state is one integer. `identity` names by hash what
    the batches depend on ({"data": ..., "tokenizer": ...}); a run resumes only on the same identity.
    """

    @property
    def identity(self) -> Mapping[str, str]:
        """Hashes of what the batches are made of."""

    def batch(self, cursor: int) -> TrainingBatch:
        """Batch number `cursor` >= 0."""


class CausalLM:
    """Next-token prediction on packed windows of text.

    Args:
        batches: the windows.
        tokenizer_hash: recorded beside the store's hash.
    """

    def __init__(self, batches: Windows, tokenizer_hash: str) -> None:
        self._batches = batches
        self.identity: Mapping[str, str] = {"data": batches.hash, "tokenizer": tokenizer_hash}

    def batch(self, cursor: int) -> TrainingBatch:
        """Batch number `cursor`."""
        return _causal(self._batches.batch(cursor), None)


def causal_evaluation(
    store: TokenStore,
    context: int,
    batch_size: int,
    limit: int | None = None,
    *,
    isolate: bool = True,
    token_bytes: Tensor | None = None,
) -> Iterator[TrainingBatch]:
    """The same windows of a store every time, for evaluation; see data.evaluation_batches.

    `token_bytes` (V,) int64 gives each token's bytes of text, so that the bytes of just these windows are known.
    """
    for batch in evaluation_batches(store, context, batch_size, limit, isolate):
        yield _causal(batch, token_bytes)


def by_source(sources: Mapping[str, Iterable[TrainingBatch]]) -> Iterator[TrainingBatch]:
    """The batches of one source after the other, each with its source's name; of one source alone without."""
    for name, batches in sources.items():
        yield from (replace(batch, source=name) for batch in batches) if len(sources) > 1 else batches


def _causal(batch: Batch, token_bytes: Tensor | None) -> TrainingBatch:
    inputs = {"input_ids": batch.input_ids, "labels": batch.labels}
    if batch.documents is not None:
        inputs["documents"] = batch.documents
    size = None
    if token_bytes is not None:
        size = int(token_bytes[batch.labels[batch.labels != IGNORED]].sum())
    return TrainingBatch(inputs, batch.sample_ids, size)


def stream(seed: int, use: int, number: int) -> np.random.Generator:
    """Philox is counter-based: a key of (seed, use and number) gives an independent stream each; `use` is 0 or 1."""
    return np.random.Generator(np.random.Philox(key=[seed, (number << 1) | use]))


class ShuffledExamples(Generic[Example]):
    """Batches of any examples: each epoch in a fresh order, every example once per epoch (or in a mixture's shares).

    With `lengths` batches hold examples of similar length, so that little is padded: an epoch's order is cut into pools
    of POOL batches, each pool sorted by length and cut into batches, and the batches shuffled.

    Args:
        examples: the data, in memory or mapped.
        collate: makes the model's keyword arguments of a list of examples; its generator is the only randomness
            it may use (masking, augmentation), and is the same whenever the same batch is made again.
        batch_size: rows per batch.
        seed: another seed, another order.
        identity: hashes of the examples, for resuming.
        lengths: of each example, for padding less; None: batches in the plain order.
        mixed: the rows of several sources in their shares, which an epoch then is.

    Raises InputError if there are no examples.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        collate: Callable[[list[Example], np.random.Generator], Mapping[str, Tensor]],
        batch_size: int,
        seed: int,
        identity: Mapping[str, str],
        lengths: NDArray[np.int64] | None = None,
        mixed: MixedRows | None = None,
    ) -> None:
        if not len(examples):
            raise InputError("data", "0 examples", "at least one")
        self._examples, self._collate, self._size, self._seed = examples, collate, batch_size, seed
        self.identity, self._lengths, self._mixed = identity, lengths, mixed
        self._rows = len(examples) if mixed is None else mixed.rows
        self._orders: dict[int, list[int]] = {}

    def batch(self, cursor: int) -> TrainingBatch:
        """Batch number `cursor`; it may span two epochs."""
        places = range(cursor * self._size, (cursor + 1) * self._size)
        ids = [self._order(place // self._rows)[place % self._rows] for place in places]
        inputs = self._collate([self._examples[number] for number in ids], stream(self._seed, 1, cursor))
        return TrainingBatch(inputs, ids)

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            rng = stream(self._seed, 0, epoch)
            order = rng.permutation(self._rows) if self._mixed is None else self._mixed.epoch(epoch)
            if self._lengths is not None:
                order = self._bucketed(order, -epoch * len(order) % self._size, self._lengths, rng)
            self._orders = {**dict(list(self._orders.items())[-1:]), epoch: order.tolist()}
        return self._orders[epoch]

    def _bucketed(
        self, order: NDArray[np.int64], first: int, lengths: NDArray[np.int64], rng: np.random.Generator
    ) -> NDArray[np.int64]:
        """The order with similar lengths side by side; `first` examples complete the batch begun in the last epoch."""
        pools = np.split(order, range(first, len(order), POOL * self._size))
        ranked = np.concatenate([pool[np.argsort(lengths[pool], kind="stable")] for pool in pools])
        batches = np.split(ranked, range(first, len(order), self._size))
        whole = [number for number, batch in enumerate(batches) if len(batch) == self._size and number]
        moved = dict(zip(whole, rng.permutation(whole).tolist(), strict=True)) if whole else {}
        return np.concatenate([batches[moved.get(number, number)] for number in range(len(batches))])


def token_byte_lengths(pieces: Iterable[bytes]) -> Tensor:
    """(V,) int64 from the bytes of each token in the order of ids; pass b"" for special tokens."""
    return torch.tensor([len(piece) for piece in pieces], dtype=torch.int64)
