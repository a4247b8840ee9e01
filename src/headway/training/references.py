"""What the reference of a preference says: the log-likelihoods of both completions, once for all examples."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from headway.data.examples import Column, Examples
from headway.nn import Transformer
from headway.nn.packed import exact
from headway.training.evaluate import resting, to_device
from headway.training.tasks import REFERENCE, ExampleBatches, Task

ROWS = 16
"""Pairs at a time."""


def referenced(
    examples: Examples, task: Task, pad: int, model: Transformer | None, progress: Callable[[int], None]
) -> Examples:
    """The examples with one column more, zeros without a model.

    Weights in codes answer as they do in training, where a gradient has to pass through them.
    """
    found = torch.zeros(len(examples), 2)
    if model is not None:
        with exact():
            found = log_likelihoods(model, ExampleBatches(examples, task, pad), ROWS, progress)
    return Examples.of({**examples.columns, REFERENCE: Column.of(found.tolist())})


def log_likelihoods(model: Transformer, batches: ExampleBatches, rows: int, progress: Callable[[int], None]) -> Tensor:
    """log p of both completions of every example, (N, 2) on the CPU; so many pairs at a time."""
    count, done = len(batches.examples), 0
    found, device = torch.zeros(count, 2), next(iter([*model.parameters(), *model.buffers()])).device
    with resting(model, device):
        for batch in batches.in_order(rows, count):
            said = model.log_likelihoods(**to_device(batch.inputs, device))
            found[list(batch.sample_ids)] = said.float().cpu().view(-1, 2)
            done += len(batch.sample_ids)
            progress(done)
    return found
