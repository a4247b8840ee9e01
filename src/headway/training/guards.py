"""What watches a run: losses that leap, numbers that stop being numbers, fp16 that overflows, memory that runs out.

Every guard is a small state machine over plain numbers whose state is part of the checkpoint, so that a resumed
run decides as the uninterrupted one would have.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from headway.config import ModelConfig
from headway.errors import DivergedError, MachineError

WINDOW = 64
WARM = 16
SIGMAS = 6.0
STREAK = 20
_GROW_AFTER = 2000  # steps without overflow before the scale doubles (arXiv:1710.03740, section 3.2)
_TOP_SCALE = 2.0**24


@dataclass
class SpikeWatch:
    """Says when a loss lies more than six standard deviations above its recent mean (R2).

    A spike enters the window cut down to the threshold: one wild value does not blind the watch, and a level that
    has risen for good is accepted after some steps.
    """

    window: list[float] = field(default_factory=list)

    def see(self, loss: float) -> float | None:
        """Take a finite loss; the threshold it exceeded, or None. The first 16 are only looked at."""
        limit = math.inf
        if len(self.window) >= WARM:
            mean = math.fsum(self.window) / len(self.window)
            variance = math.fsum((x - mean) ** 2 for x in self.window) / len(self.window)
            # One in a thousand of the mean stands in for the noise of losses that hardly vary.
            limit = mean + SIGMAS * max(math.sqrt(variance), 1e-3 * abs(mean))
        self.window.append(min(loss, limit))
        del self.window[:-WINDOW]
        return limit if loss > limit else None


@dataclass
class LossScale:
    """The factor on an fp16 loss: halved on overflow, doubled after 2,000 steps without one (arXiv:1710.03740).

    `value` 1 with `fixed` means: no scaling (float32 and bfloat16 have the range).
    """

    value: float = 1.0
    fixed: bool = True
    clean: int = 0

    @classmethod
    def for_dtype(cls, dtype: torch.dtype) -> LossScale:
        """2^16 for float16, else none."""
        return cls(2.0**16, fixed=False) if dtype is torch.float16 else cls()

    def overflowed(self) -> None:
        """An update was thrown away."""
        self.value, self.clean = max(self.value / 2, 1.0), 0

    def held(self) -> None:
        """An update was made."""
        self.clean += 1
        if not self.fixed and self.clean >= _GROW_AFTER:
            self.value, self.clean = min(self.value * 2, _TOP_SCALE), 0


def describe_nonfinite(loss: float, norm: float, sample_ids: Sequence[int]) -> str:
    """`loss nan, gradient norm inf on samples 3, 4, 5`."""
    shown = ", ".join(map(str, sample_ids[:16])) + (", ..." if len(sample_ids) > 16 else "")
    return f"loss {loss:g}, gradient norm {norm:g} on samples {shown}"


def check_finite_weights(model: nn.Module, step: int) -> None:
    """Refuse to save weights that hold NaN or infinity. Raises DivergedError naming the first such tensor."""
    weights = {name: p.detach() for name, p in model.named_parameters() if p.is_floating_point()}
    norms = torch.stack(torch._foreach_norm(list(weights.values()), math.inf)).tolist()
    for name, norm in zip(weights, norms, strict=True):
        if not math.isfinite(norm):
            raise DivergedError(f"step {step}", f"weight {name} is not finite", "finite weights", "lower train.lr")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out; torch says it in three ways."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        sign in str(error) for sign in ("can't allocate memory", "not enough memory", "CUDA out of memory")
    )


def out_of_memory(step: int, estimate: Mapping[str, int], rows: int, accumulation: int) -> MachineError:
    """The error for R3: an estimate by part, and the first thing to change.

    More passes per update come first because they change no mathematics; with one row per pass, the batch cannot
    be cut further and the context must be.
    """
    parts = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in estimate.items())
    found = f"out of memory; the update needs about {sum(estimate.values()) / 1e9:.2f} GB ({parts})"
    if accumulation < rows:
        more = next(n for n in range(accumulation * 2, rows * 2) if n >= rows or rows % n == 0)
        fix = f"train.accumulation={min(more, rows)} (same result), then a smaller train.batch_size or data.context"
    else:
        fix = "a smaller data.context, then a smaller model"
    return MachineError(f"step {step}", found, "memory for one pass", fix)


def estimate_memory(config: ModelConfig, parameters: Sequence[nn.Parameter], rows: int, length: int) -> dict[str, int]:
    """Bytes of an update by part, for `rows` sequences of `length` positions per pass.

    Activations: what a block keeps for its backward pass, about 10 D + 4 F numbers per position (arXiv:2205.05198,
    equation 1, without the scores that fused attention does not keep), and logits with their gradient and softmax.
    """
    weights = sum(p.numel() * p.element_size() for p in parameters)
    depth = config.n_layers + config.n_decoder_layers
    inner = depth * (10 * config.d_model + 4 * config.d_ff) + 3 * config.vocab_size
    return {
        "weights": weights,
        "gradients": weights,
        "optimizer": 2 * weights,
        "activations": rows * length * inner * 4,
    }
