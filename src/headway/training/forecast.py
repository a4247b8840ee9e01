"""What a run will take, before it begins: memory by part, time, the largest pass that fits, how long to train.

Memory of a step on the CPU rises to the larger of two peaks: activations and the loss's own at the end of the forward
pass, gradients and the optimizer's scratch at its end; what one leaves free the other uses. What blocks keep for their
backward pass is not estimated but counted, by running passes of few rows under autograd's own hooks. Time and peak are
those of a few real steps where they can be taken; what these took beyond the estimate is what the allocator keeps.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from headway.config import CausalLM, MaskedLM, ModelConfig
from headway.nn import Transformer
from headway.run_config import Train
from headway.training.evaluate import DTYPES, precision
from headway.training.guards import estimate_memory
from headway.training.loop import configure
from headway.training.recipe import TOKENS_PER_PARAMETER, Maker, Trial

_SCRATCH = {"muon": 0.5, "adafactor": 0.5}
"""Copies of the weights that an update takes for a moment, where not none: Muon's stacked matrices and products."""
_HEADROOM = 0.9  # of the memory that is free: the rest is for evaluation, samples and checkpoints


@dataclass(frozen=True)
class Forecast:
    """What is foretold of a run.

    Attributes:
        memory: bytes by part. peak: of the whole process. available: bytes that are free for it.
        seconds_per_step, seconds: of training alone. tokens_per_second: positions through the model.
        largest: most rows of one pass that fit. advice: sentences, the first the most urgent.
    """

    memory: Mapping[str, int]
    peak: int
    available: int
    seconds_per_step: float
    seconds: float
    tokens_per_second: float
    largest: int
    advice: list[str]


class Probe(NamedTuple):
    """What a few real steps took.

    seconds: of a step, a teacher's part in it included. resident: bytes of the process before, a teacher's weights and
    a frozen base's among them: they keep nothing for a backward pass. peak: bytes meanwhile, 0 if that is not known.
    """

    seconds: float
    resident: int
    peak: int = 0


def kept_for_backward(model: Transformer, inputs: Mapping[str, Tensor], dtype: str = "float32") -> int:
    """Bytes that one forward pass keeps for its backward pass, weights not counted."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # a storage that was freed could come back at the same address and be missed

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and storage.data_ptr() not in kept:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    device = next(model.parameters()).device
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with torch.random.fork_rng([]), hooks, precision(dtype, device):
        model.loss(**{name: tensor.to(device) for name, tensor in inputs.items()})
    return sum(kept.values())


def available_memory(device: torch.device) -> int:
    """Bytes that a new process can have; on a system without /proc/meminfo half of what is built in."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":") for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


class Meter:
    """The memory of a step of some rows: what four and eight rows keep, and a straight line through them."""

    def __init__(
        self, config: ModelConfig, train: Train, trial: Trial, context: int, resident: int, make: Maker = Transformer
    ) -> None:
        self._config, self._train, self._resident = config, train, resident
        with torch.random.fork_rng([]):
            model = make(config).train()
            configure(model, train)
            few = [trial(config, rows, context) for rows in (4, 8)]
            kept = [kept_for_backward(model, inputs, train.dtype) for inputs in few]
            self._positions = [_positions(config, inputs) for inputs in few]
            self._per_position = max((kept[1] - kept[0]) / max(self._positions[1] - self._positions[0], 1), 0.0)
            self._fixed = max(kept[0] - self._per_position * self._positions[0], 0.0)
            self._per_row = sum(self._positions) / 12
            self._parameters = [p for p in model.parameters() if p.requires_grad]

    def parts(self, rows: int) -> dict[str, int]:
        """Bytes by part for passes of `rows` rows."""
        train = self._train.model_copy(update={"batch_size": rows, "accumulation": 1})
        found = estimate_memory(self._config, train, self._parameters, round(self._per_row))
        found["activations"] = kept = int(self._fixed + self._per_position * self._per_row * rows)
        # The backward pass of a block makes as much anew as the block kept.
        found["one block backward"] = kept // max(self._config.n_layers + self._config.n_decoder_layers, 1)
        scratch = int(_SCRATCH.get(self._train.optimizer, 0.0) * found["weights"])
        return {"program and data": self._resident, **found, "update": scratch}

    def peak(self, rows: int) -> int:
        """The whole process's, at the worst moment of a step."""
        parts = self.parts(rows)
        forward = parts["activations"] + parts["one block backward"] + parts.get("loss", 0)
        backward = parts["gradients"] + parts["update"]
        steady = sum(parts[name] for name in ("program and data", "weights", "optimizer"))
        return steady + parts.get("average", 0) + max(forward, backward)

    def largest(self, room: int) -> int:
        """Most rows whose peak fits into `room` bytes; 0 if not even one does."""
        low, high = 0, 1
        while high < 1 << 20 and self.peak(high) <= room:
            low, high = high, high * 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.peak(middle) <= room else (low, middle)
        return low


def _positions(config: ModelConfig, inputs: Mapping[str, Tensor]) -> int:
    """Positions that a batch puts through the model, padding among them."""
    front = config.embeddings.patch or config.embeddings.audio
    if front is not None and "input_ids" not in inputs:
        return len(inputs["labels"]) * front.count
    count = inputs["input_ids"].numel()
    return count + inputs["labels"].numel() if config.kind == "encoder-decoder" else count


def forecast(
    config: ModelConfig,
    train: Train,
    context: int,
    trial: Trial,
    probe: Probe,
    tokens: int,
    make: Maker = Transformer,
) -> Forecast:
    """Foretell a resolved run.

    Args:
        config, train, context: of the run, nothing open. trial: batches as the run will see them.
        probe: of a few steps. tokens: positions of one pass over the data. make: the model as it will be trained.
    """
    assert train.steps is not None and train.batch_size is not None
    device = torch.device("cpu" if train.device == "auto" and not torch.cuda.is_available() else train.device)
    rows = train.batch_size // train.accumulation
    meter = Meter(config, train, trial, context, probe.resident, make)
    parts, estimate, available = meter.parts(rows), meter.peak(rows), available_memory(device)
    peak = probe.peak or estimate
    parts["kept by the allocator"] = held = max(peak - estimate, 0)
    largest = meter.largest(int(_HEADROOM * (available + probe.resident)) - held)
    positions = _positions(config, trial(config, rows, context)) * train.accumulation
    return Forecast(
        parts,
        peak,
        available,
        probe.seconds,
        probe.seconds * train.steps,
        positions / probe.seconds,
        largest,
        _advice(config, train, tokens, positions, rows, largest),
    )


def _advice(config: ModelConfig, train: Train, tokens: int, positions: int, rows: int, largest: int) -> list[str]:
    said = []
    if largest < rows:
        more = max(train.accumulation + 1, -(-(train.batch_size or 1) // max(largest, 1)))
        said.append(f"does not fit: train.accumulation={more} gives the same result in passes that do")
    from headway.cost import parameters

    count = sum(parameters(config).values())
    seen = (train.steps or 0) * positions
    if isinstance(config.head, CausalLM | MaskedLM):
        ratio = seen / count
        best = "" if ratio < 20 else ", as long as large models train (20, arXiv:2203.15556)"
        said.append(f"{seen:,} tokens for {count:,} parameters, {ratio:.1f} each{best}")
        if ratio < TOKENS_PER_PARAMETER:
            said.append(f"below {TOKENS_PER_PARAMETER:g} a smaller model is better in the same time: model.depth")
    if seen > 10 * tokens:
        said.append(f"{seen / tokens:.0f} passes over the data: watch the held-out loss, or train.early_stop=3")
    if DTYPES[train.dtype] is torch.float32:
        return said
    return [*said, f"{train.dtype} products: chosen because whole steps were faster with it"]
