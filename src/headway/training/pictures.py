"""Objectives on images: their class (arXiv:2010.11929), or the pixels of patches that are hidden (arXiv:2111.09886).

Both see training images moved and mirrored a little, and held-out ones as they are. Which patches of a held-out image
are hidden depends on its number alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headway.data.batches import IGNORE, hashed_uniform
from headway.data.images import ImageSet, mirrored, moved
from headway.nn.embeddings import cut
from headway.run_config import ImageClassification, MaskedPatches
from headway.training.objectives import ShuffledExamples, TrainingBatch


def patch_of(side: int) -> int:
    """A patch size for images of `side` pixels: the divisor that comes nearest to seven patches a side."""
    divisors = [size for size in range(1, side + 1) if side % size == 0]
    return min(divisors, key=lambda size: (abs(side // size - 7), size))


class SignalBatches(ABC):
    """Labelled signals of one size, images or recordings, as batches."""

    def __init__(self, labels: NDArray[np.int64], made_of: str) -> None:
        self._labels, self._hash = labels, made_of

    def __len__(self) -> int:
        return len(self._labels)

    @abstractmethod
    def collate(self, ids: Sequence[int], rng: np.random.Generator | None) -> dict[str, Tensor]:
        """These signals and their labels as a model's arguments; with a generator augmented by it."""

    def numbers(self, ids: Sequence[int]) -> Tensor:
        """The classes of these signals, (B,) int64."""
        return torch.from_numpy(self._labels[np.asarray(ids)])

    def shuffled(self, batch_size: int, seed: int) -> ShuffledExamples[int]:
        """The endless stream for training."""
        return ShuffledExamples(range(len(self._labels)), self.collate, batch_size, seed, {"data": self._hash})

    def in_order(self, batch_size: int, limit: int) -> Iterator[TrainingBatch]:
        """The same `limit` signals every time, spread over all of them, as they are."""
        count = min(limit, len(self._labels))
        chosen = [place * len(self._labels) // count for place in range(count)]
        for begin in range(0, count, batch_size):
            ids = chosen[begin : begin + batch_size]
            yield TrainingBatch(self.collate(ids, None), ids)


class ImageBatches(SignalBatches):
    """Images of one set as a model's arguments: floats from -1 to 1, as ViT's were.

    Args:
        images: of one size. objective: what is learned of them. patch: pixels a side of the model's patches.
    """

    def __init__(self, images: ImageSet, objective: ImageClassification | MaskedPatches, patch: int) -> None:
        super().__init__(images.labels, images.hash)
        self._pixels, self._objective, self._patch = images.pixels, objective, patch

    def collate(self, ids: Sequence[int], rng: np.random.Generator | None) -> dict[str, Tensor]:
        """These images; with a generator moved, mirrored and hidden by it."""
        numbers = np.asarray(ids)
        pixels = torch.from_numpy(self._pixels[numbers]).float()
        if rng is not None and self._objective.shift:
            pixels = moved(pixels, self._objective.shift, rng)
        if rng is not None and self._objective.flip:
            pixels = mirrored(pixels, rng)
        pixels = pixels / 127.5 - 1
        if isinstance(self._objective, ImageClassification):
            return {"pixel_values": pixels, "labels": self.numbers(ids)}
        patches_BPC = cut(pixels, self._patch)
        places = numbers[:, None] * patches_BPC.shape[1] + np.arange(patches_BPC.shape[1])
        drawn = hashed_uniform(places, 0) if rng is None else rng.random(places.shape)
        hidden = torch.from_numpy(hide(drawn, self._objective.rate))
        return {"pixel_values": pixels, "labels": patches_BPC.where(hidden[..., None], float(IGNORE))}


def hide(drawn_BP: np.ndarray[tuple[int, ...], np.dtype[np.float64]], rate: float) -> np.ndarray:
    """True for `rate` of each image's patches, one at least: those with the smallest numbers. (B, P) -> (B, P) bool."""
    count = max(round(rate * drawn_BP.shape[1]), 1)
    return drawn_BP.argsort(1, kind="stable").argsort(1, kind="stable") < count
