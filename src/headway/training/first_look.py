"""A look at the first batches before the first step: a run that would learn nothing, or nonsense, does not begin.

Each check has a sentence of its own. They look at what the model will be given, not at how it was made, so that a
source written by hand is checked like any other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from headway.config import ModelConfig
from headway.errors import InputError
from headway.training.objectives import IGNORED, BatchSource, TrainingBatch, count_supervised

LOOKED_AT = 4
"""Batches."""


class Look(NamedTuple):
    """What a check sees: the first batches, the model they are for, and the id that begins a text."""

    batches: list[TrainingBatch]
    config: ModelConfig
    bos: int | None


def look(source: BatchSource, config: ModelConfig, bos: int | None = None) -> None:
    """Check the first batches of a source. Raises InputError naming the rows' numbers."""
    seen = Look([source.batch(cursor) for cursor in range(LOOKED_AT)], config, bos)
    for check in CHECKS:
        check(seen)


def _supervised(seen: Look) -> None:
    if not sum(count_supervised(batch.inputs) for batch in seen.batches):
        rows = sum(len(batch.inputs["labels"]) for batch in seen.batches)
        found = f"0 supervised labels in the first {rows} rows: every label is -100"
        raise InputError(
            "data", found, "labels to learn", "a longer data.context if targets are cut away, or other data"
        )


def _known_ids(seen: Look) -> None:
    for batch in seen.batches:
        for name in ("input_ids", "decoder_input_ids"):
            if name in batch.inputs:
                _below(batch, name, batch.inputs[name], seen.config.vocab_size, "model.vocab_size")


def _known_labels(seen: Look) -> None:
    head = seen.config.head
    limit = seen.config.vocab_size if head.type in ("causal-lm", "masked-lm") else getattr(head, "labels", None)
    if limit is None or getattr(head, "problem", "single") != "single":
        return
    for batch in seen.batches:
        _below(batch, "labels", batch.inputs["labels"], limit, "the head's labels")


def _below(batch: TrainingBatch, name: str, ids: Tensor, limit: int, what: str) -> None:
    wrong = (ids >= limit) | ((ids < 0) & (ids != IGNORED))
    if bool(wrong.any()):
        row = int(wrong.flatten(1).any(1).nonzero()[0]) if wrong.ndim > 1 else int(wrong.nonzero()[0])
        found = f"row {batch.sample(row)}: {name} holds {int(ids[wrong][0])}"
        raise InputError("data", found, f"0 to {limit - 1}, below {what}", "the tokenizer and labels of this model")


def _one_beginning(seen: Look) -> None:
    if seen.bos is None:
        return
    for batch in seen.batches:
        ids = batch.inputs.get("input_ids")
        if ids is not None and ids.shape[1] > 1:
            twice = (ids[:, 0] == seen.bos) & (ids[:, 1] == seen.bos)
            if bool(twice.any()):
                row = batch.sample(int(twice.nonzero()[0]))
                found = f"row {row} begins with the token {seen.bos} twice"
                raise InputError("data", found, "one", "leave it out of the text: the template adds it")


def _shifted(seen: Look) -> None:
    """A decoder's label is the next token, not the one that it reads."""
    if seen.config.kind != "decoder" or seen.config.head.type != "causal-lm":
        return
    same = after = total = 0
    for batch in seen.batches:
        ids, labels = batch.inputs["input_ids"], batch.inputs["labels"]
        known = labels[:, :-1] != IGNORED
        total += int(known.sum())
        same += int(((labels == ids)[:, :-1] & known).sum())
        after += int(((labels[:, :-1] == ids[:, 1:]) & known).sum())
    if total >= 16 and same > 0.9 * total and after < 0.9 * total:
        found = f"{same / total:.0%} of the labels are the token that stands there, {after / total:.0%} the next one"
        raise InputError("data", found, "labels[t] = input_ids[t + 1]", "shift the labels by one")


def _finite(seen: Look) -> None:
    for batch in seen.batches:
        for name, tensor in batch.inputs.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                found = f"rows {list(batch.sample_ids)[:5]}: {name} holds NaN or infinity"
                raise InputError("data", found, "finite numbers")


CHECKS: tuple[Callable[[Look], None], ...] = (
    _supervised,
    _known_ids,
    _known_labels,
    _one_beginning,
    _shifted,
    _finite,
)
