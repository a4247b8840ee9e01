"""What a run tells whoever listens: the display, `--json`, the metrics file.

The loop makes one event per step and sends it to one listener; it formats nothing. A value that does not exist
(a loss without supervised tokens, bits per byte of an encoder) is None, shown as `n/a`, and never NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path


@dataclass(frozen=True, slots=True)
class StepEvent:
    """One update.

    Attributes:
        step: updates done, this one included.
        loss: mean loss per supervised token, in nats; None if the batch had none.
        lr: rate of this update's AdamW groups.
        grad_norm: global norm before clipping.
        tokens: supervised tokens of this update.
        tokens_per_second: supervised tokens over wall time, smoothed over some seconds.
        share_of_peak: model FLOPs per second over the machine's measured peak; None where either is unknown.
        memory: resident bytes of this process (of the device's allocator on a GPU).
        eta: seconds to the last step at the present rate.
        applied: False when the update was skipped.
    """

    step: int
    loss: float | None
    lr: float
    grad_norm: float | None
    tokens: int
    tokens_per_second: float
    share_of_peak: float | None
    memory: int
    eta: float
    applied: bool = True


@dataclass(frozen=True, slots=True)
class EvalEvent:
    """One evaluation: mean loss per token in nats and bits per byte of text, with a sample where one is made.

    `sources` are the losses of each source of a mixture, `rewards` those of preferences (evaluate.REWARDS), None
    elsewhere.
    """

    step: int
    loss: float | None
    bits_per_byte: float | None
    tokens: int
    best: bool
    sample: str | None = None
    sources: Mapping[str, float | None] | None = None
    rewards: Mapping[str, float] | None = None


@dataclass(frozen=True, slots=True)
class HealthEvent:
    """How the model is inside at an evaluation, by part or block in order (health.py): norms of the last gradient,
    sizes of activations, entropies of attention in nats."""

    step: int
    gradients: Mapping[str, float]
    activations: Mapping[str, float]
    entropy: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class CheckpointEvent:
    """A checkpoint that stands on the disk."""

    step: int
    path: Path
    seconds: float


@dataclass(frozen=True, slots=True)
class ResumeEvent:
    """The run goes on from a checkpoint: what was recorded after `step` is void."""

    step: int
    path: Path


@dataclass(frozen=True, slots=True)
class WarningEvent:
    """Something that a person should know and that does not stop the run; `kind` is one word for programs."""

    step: int
    kind: str
    text: str


Event = StepEvent | EvalEvent | HealthEvent | CheckpointEvent | ResumeEvent | WarningEvent
Listener = Callable[[Event], None]

_NAMES: dict[type[Event], str] = {
    StepEvent: "step",
    EvalEvent: "eval",
    HealthEvent: "health",
    CheckpointEvent: "checkpoint",
    ResumeEvent: "resume",
    WarningEvent: "warning",
}


def number(value: float | None) -> float | None:
    """`value`, or None where it is not finite."""
    return value if value is not None and math.isfinite(value) else None


def record(event: Event) -> dict[str, object]:
    """The event as JSON values, `event` naming its kind; floats that are not finite become null."""
    out: dict[str, object] = {"event": _NAMES[type(event)]}
    for item in fields(event):
        out[item.name] = _plain(getattr(event, item.name))
    return out


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return number(value) if isinstance(value, float) else str(value) if isinstance(value, Path) else value
