"""The running average of the weights, which answers better than the weights of any one step.

    update t, from 0:   d_t = min(decay, (1 + t) / (10 + t));   average += (1 - d_t) (weights - average)

The first averages forget quickly what was there before training: d_t rises from 0.1, and reaches 0.999 after 9,000
updates. Training itself never sees the average. What reads a model rather than trains it does: evaluation, samples,
and the checkpoint, whose model.safetensors holds the average while the weights of the last step go to the optimizer's
file (arXiv:1806.04498 for what the average is good for).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from headway.errors import ConfigError
from headway.training.parts import exported, is_shared_out, local, part


class Average:
    """An exponential moving average of a model's trainable weights, each in the precision of the weight.

    Args:
        model: its trainable parameters are followed, beginning with their present values. decay: in (0, 1), the share
            of the average that an update keeps once warm.

    Raises ConfigError for weights narrower than float32, in which a small share of a change is lost to rounding.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for name, p in self.parameters.items():
            if p.element_size() < 4:
                found = f"weights of {str(p.dtype).removeprefix('torch.')} ({name})"
                fix = "float32 weights (train.dtype=bfloat16 keeps them so), or leave out train.ema"
                raise ConfigError("train.ema", found, "weights in float32", fix)
        self.values = {name: local(p).detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are after an update."""
        kept = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(tuple(self.values.values()), [local(p) for p in self.parameters.values()], 1 - kept)
        self.updates += 1

    @contextmanager
    def shown(self) -> Iterator[None]:
        """The model holds the average inside, its own weights afterwards; nothing is copied.

        The state dict taken inside stays that of the average until the next update. Where processes share the weights
        out they are exchanged by value, since torch keeps views of that memory, and so the state dict is a copy.
        """
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, p in self.parameters.items():
            if is_shared_out(p):
                own, other = local(p), self.values[name]
                kept = own.clone()
                own.copy_(other)
                other.copy_(kept)
            else:
                p.data, self.values[name] = self.values[name], p.data

    def state(self) -> dict[str, Any]:
        """The number of updates, and the weights of the last step by name; the average is what `shown` shows."""
        return {
            "updates": self.updates,
            "weights": {name: exported(local(p).detach(), p) for name, p in self.parameters.items()},
        }

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned, bit for bit; the average itself is loaded into the model while `shown`."""
        self.updates = state["updates"]
        for name, p in self.parameters.items():
            local(p).copy_(part(state["weights"][name], p))


def shown(average: Average | None) -> AbstractContextManager[None]:
    """`average.shown()`, or nothing where no average is kept."""
    return nullcontext() if average is None else average.shown()
