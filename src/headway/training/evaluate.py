"""Mean loss and bits per byte of a model on held-out batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from headway.training.objectives import TrainingBatch
from headway.training.parallel import Parallel


class Evaluation(NamedTuple):
    """loss: nats per supervised token; bits_per_byte: of the text; each None where it does not exist (R18).

    sources: the loss of each source, where there are several. rewards: of preferences, see REWARDS.
    """

    loss: float | None
    bits_per_byte: float | None
    tokens: int
    sources: Mapping[str, float] | None = None
    rewards: Mapping[str, float] | None = None


REWARDS = ("chosen", "rejected", "margin", "accuracy")
"""Of pairs of completions: the mean reward of each, their difference, and how often the chosen one's is higher."""
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


@contextmanager
def watched(modules: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """`see` the name and the output of each of these modules whenever one has run inside; children before parents."""

    def hook(name: str) -> Callable[[nn.Module, object, object], None]:
        return lambda module, args, output: see(name, output) if isinstance(output, Tensor) else None

    hooks = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


def to_device(inputs: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The tensors on `device`; those that are there already are not copied."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()}


def evaluate(
    parallel: Parallel,
    batches: Iterable[TrainingBatch],
    device: torch.device,
    precision: Callable[[], AbstractContextManager[object]],
    interrupted: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """The mean over all supervised tokens of `batches`; None if `interrupted` came true meanwhile.

    Processes that train together share out the rows.

    Bits per byte are total nats / ln 2 / total bytes of text, so they compare across tokenizers; they exist only
    if every batch knows its bytes. No supervised token at all gives None for both, never NaN.
    """
    world = parallel.world
    tokens, size, is_text, is_judged = 0, 0, True, False
    sums = [0.0] * len(REWARDS)
    parts: dict[str, list[float]] = {}  # by source: this process's nats, tokens of all
    with resting(parallel.model, device):
        for batch in batches:
            if interrupted():
                parallel.settle()
                return None
            count, own = world.share(batch.split(world.data_size))
            if not count:
                continue
            part = parts.setdefault(batch.source or "", [0.0, 0])
            for inputs, weight in own:
                with precision():
                    loss, rewards = _judged(parallel, to_device(inputs, device))
                part[0] += float(loss) * weight * count
                sums = [a + b * weight * count for a, b in zip(sums, rewards, strict=True)]
            part[1] += count
            tokens += count
            is_judged |= "reference" in batch.inputs
            is_text &= batch.bytes is not None
            size += batch.bytes or 0
        parallel.settle()
    nats = (
        dict(zip(parts, world.sums(*(own / world.tensor for own, _ in parts.values())), strict=True)) if parts else {}
    )
    total = sum(nats.values())
    judged = (
        dict(zip(REWARDS, (x / tokens for x in world.sums(*(one / world.tensor for one in sums))), strict=True))
        if is_judged
        else None
    )
    bits = total / math.log(2) / size if is_text and size else None
    sources = {name: nats[name] / part[1] for name, part in parts.items() if name}
    return Evaluation(total / tokens if tokens else None, bits, tokens, sources or None, judged)


def _judged(parallel: Parallel, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Sequence[float]]:
    """The loss, and of preferences the means that REWARDS names."""
    if "reference" not in inputs:
        return parallel.loss(inputs), (0.0,) * len(REWARDS)
    found = parallel.rewards(inputs)
    chosen, rejected = found.unbind(1)
    means = (chosen, rejected, chosen - rejected, (chosen > rejected).to(found))
    return parallel.model.preferences.loss(found), [float(one.mean()) for one in means]
