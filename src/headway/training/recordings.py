"""Audio classification: spectrograms and labels as batches, moved a little in time in training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from headway.data.recordings import RecordingSet, shifted
from headway.run_config import AudioClassification
from headway.training.pictures import SignalBatches


class RecordingBatches(SignalBatches):
    """Recordings of one set as a model's arguments."""

    def __init__(self, recordings: RecordingSet, objective: AudioClassification) -> None:
        super().__init__(recordings.labels, recordings.hash)
        self._features, self._objective = recordings.features, objective

    def collate(self, ids: Sequence[int], rng: np.random.Generator | None) -> dict[str, Tensor]:
        """These recordings; with a generator moved in time by it."""
        features = torch.from_numpy(self._features[np.asarray(ids)])
        if rng is not None and self._objective.shift:
            features = shifted(features, self._objective.shift, rng)
        return {"input_features": features, "labels": self.numbers(ids)}
