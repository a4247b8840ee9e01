"""Mean loss and bits per byte of a model on held-out batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from headway.nn import Transformer
from headway.training.objectives import TrainingBatch


class Evaluation(NamedTuple):
    """loss: nats per supervised token; bits_per_byte: of the text; each None where it does not exist (R18).

    sources: the loss of each source, where there are several.
    """

    loss: float | None
    bits_per_byte: float | None
    tokens: int
    sources: Mapping[str, float] | None = None


DTYPES = {"auto": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def precision(dtype: str, device: torch.device) -> AbstractContextManager[object]:
    """Where products run in `dtype`; weights and sums stay float32 (arXiv:1710.03740)."""
    wanted = DTYPES[dtype]
    return nullcontext() if wanted is torch.float32 else torch.autocast(device.type, dtype=wanted)


@contextmanager
def resting(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode without gradients; training goes on afterwards as if nothing had been drawn meanwhile."""
    devices = [] if device.type == "cpu" else [device]
    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            yield
    finally:
        model.train(was_training)


def to_device(inputs: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The tensors on `device`; those that are there already are not copied."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()}


def evaluate(
    model: Transformer,
    batches: Iterable[TrainingBatch],
    device: torch.device,
    precision: Callable[[], AbstractContextManager[object]],
    interrupted: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """The mean over all supervised tokens of `batches`; None if `interrupted` came true meanwhile.

    Bits per byte are total nats / ln 2 / total bytes of text, so they compare across tokenizers; they exist only
    if every batch knows its bytes. No supervised token at all gives None for both, never NaN.
    """
    nats, tokens, size, is_text = 0.0, 0, 0, True
    parts: dict[str, list[float]] = {}
    with resting(model, device):
        for batch in batches:
            if interrupted():
                return None
            count = batch.tokens
            if not count:
                continue
            with precision():
                loss = model.loss(**to_device(batch.inputs, device))
            nats += float(loss) * count
            tokens += count
            if batch.source is not None:
                parts.setdefault(batch.source, []).extend([float(loss) * count, count])
            is_text &= batch.bytes is not None
            size += batch.bytes or 0
    bits = nats / math.log(2) / size if is_text and size else None
    sources = {name: sum(found[::2]) / sum(found[1::2]) for name, found in parts.items()}
    return Evaluation(nats / tokens if tokens else None, bits, tokens, sources or None)
