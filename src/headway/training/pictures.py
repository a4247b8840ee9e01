"""Image classification: pixels and labels as batches, moved and mirrored a little in training (arXiv:2010.11929)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from headway.data.images import ImageSet, mirrored, moved
from headway.run_config import ImageClassification
from headway.training.objectives import ShuffledExamples, TrainingBatch


def patch_of(side: int) -> int:
    """A patch size for images of `side` pixels: the divisor that comes nearest to seven patches a side."""
    divisors = [size for size in range(1, side + 1) if side % size == 0]
    return min(divisors, key=lambda size: (abs(side // size - 7), size))


class ImageBatches:
    """Images of one set as a model's arguments: floats from -1 to 1, as ViT's were."""

    def __init__(self, images: ImageSet, objective: ImageClassification) -> None:
        self.images, self._objective = images, objective

    def collate(self, ids: Sequence[int], rng: np.random.Generator | None) -> dict[str, Tensor]:
        """These images; with a generator moved and mirrored by it."""
        pixels = torch.from_numpy(self.images.pixels[np.asarray(ids)]).float()
        if rng is not None and self._objective.shift:
            pixels = moved(pixels, self._objective.shift, rng)
        if rng is not None and self._objective.flip:
            pixels = mirrored(pixels, rng)
        labels = torch.from_numpy(self.images.labels[np.asarray(ids)])
        return {"pixel_values": pixels / 127.5 - 1, "labels": labels}

    def shuffled(self, batch_size: int, seed: int) -> ShuffledExamples[int]:
        """The endless stream for training."""
        numbers = range(len(self.images.labels))
        return ShuffledExamples(numbers, self.collate, batch_size, seed, {"data": self.images.hash})

    def in_order(self, batch_size: int, limit: int) -> Iterator[TrainingBatch]:
        """The same `limit` images every time, spread over all of them, as they are."""
        count = min(limit, len(self.images.labels))
        chosen = [place * len(self.images.labels) // count for place in range(count)]
        for begin in range(0, count, batch_size):
            ids = chosen[begin : begin + batch_size]
            yield TrainingBatch(self.collate(ids, None), ids)
