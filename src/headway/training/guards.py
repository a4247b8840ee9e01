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

from headway.config import CausalLM, MaskedLM, ModelConfig
from headway.errors import DivergedError, MachineError
from headway.nn.heads import LOGIT_BYTES
from headway.run_config import Train
from headway.training.parts import local

WINDOW = 64
WARM = 16
SIGMAS = 6.0
STREAK = 20
_GROW_AFTER = 2000  # steps without overflow before the scale doubles (arXiv:1710.03740, section 3.2)
_TOP_SCALE = 2.0**24
# What an optimizer keeps over the weights, at most: Muon's tables are AdamW's.
_KEPT = {"adamw": 2.0, "muon": 2.0, "lion": 1.0, "adafactor": 0.02}


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
    held = ((name, local(p.detach())) for name, p in model.named_parameters() if p.is_floating_point())
    weights = {name: tensor for name, tensor in held if tensor.numel()}
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


def out_of_memory(step: int, estimate: Mapping[str, int], train: Train) -> MachineError:
    """The error for R3: an estimate by part, and the first thing to change.

    More passes per update come first because they change no mathematics and hardly the time, recomputed activations
    next because they cost only time; with one row per pass, the batch cannot be cut further and the context must be.
    """
    rows, passes = train.batch_size or 1, train.accumulation
    parts = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in estimate.items())
    found = f"out of memory; the update needs about {sum(estimate.values()) / 1e9:.2f} GB ({parts})"
    if passes < rows:
        more = next(n for n in range(passes * 2, rows * 2) if n >= rows or rows % n == 0)
        size = "train.batch_size" if train.batch_tokens is None else "train.batch_tokens"
        fix = f"train.accumulation={min(more, rows)} (same result), then a smaller {size} or data.context"
    elif not train.checkpoint_activations:
        fix = "train.checkpoint_activations=true (same result, a third slower), then a smaller data.context"
    else:
        fix = "a smaller data.context, then a smaller model"
    return MachineError(f"step {step}", found, "memory for one pass", fix)


def estimate_memory(
    config: ModelConfig, train: Train, parameters: Sequence[nn.Parameter], length: int
) -> dict[str, int]:
    """Bytes of an update by part, for sequences of `length` positions; a pass has its share of the batch's rows.

    Activations: what a block keeps for its backward pass, about 10 D + 4 F numbers per position (arXiv:2205.05198,
    equation 1, without the scores that fused attention does not keep); where they are recomputed, those of one block
    and D of each other. A vocabulary's loss holds two pieces of logits and the gradient of its table if it learns.
    """
    rows = -(-(train.batch_size or 1) // train.accumulation)
    weights = sum(p.numel() * p.element_size() for p in parameters)
    depth, block = config.n_layers + config.n_decoder_layers, 10 * config.d_model + 4 * config.d_ff
    kept = depth * config.d_model + block if train.checkpoint_activations else depth * block
    parts = {"weights": weights, "gradients": weights, "optimizer": int(_KEPT[train.optimizer] * weights)}
    if train.ema is not None:
        parts["average"] = weights
    parts["activations"] = rows * length * kept * 4
    if isinstance(config.head, CausalLM | MaskedLM):
        logits = min(rows * length * config.vocab_size * 4, LOGIT_BYTES)
        parts["loss"] = 2 * logits + min(4 * config.vocab_size * config.d_model, weights)
    return parts
