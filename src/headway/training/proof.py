"""Proof that a run repeats itself: steps done again from an earlier checkpoint, against what was recorded of them.

step-00000100 --- 20 steps again ---> losses and norms: those of metrics.jsonl, to the last bit
                                      and at step-00000120 the bytes of weights and optimizer, by its manifest
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from headway import files
from headway.checkpoints.folder import WEIGHTS, Found, Manifest, list_checkpoints, verify
from headway.checkpoints.tensors import write_tensors
from headway.errors import DivergedError, InputError
from headway.training.events import Event, StepEvent
from headway.training.loop import Trainer
from headway.training.metrics import METRICS, read_metrics
from headway.training.resume import OPTIMIZER


@dataclass(frozen=True)
class Proof:
    """Steps `first` to `last` were done again: `compared` of them stand in the metrics; `checkpoint` if one was met."""

    first: int
    last: int
    compared: int
    checkpoint: Path | None


def prove(run: Path, make: Callable[[Path, Callable[[Event], None]], Trainer], steps: int) -> Proof:
    """Do `steps` steps again from the checkpoint before the newest; fewer where the newest is nearer.

    Args:
        run: the run folder, which is only read. make: the run's trainer in another folder, with a listener.

    Raises InputError without two good checkpoints, DivergedError (X5) at the first number or file that differs.
    """
    good: list[tuple[Path, Manifest]] = []
    for _, path in reversed(list_checkpoints(run)):
        try:
            good.append((path, verify(path)))
        except InputError:
            continue
    if len(good) < 2:
        found = f"{len(good)} checkpoint{'s' * (len(good) != 1)} that verify"
        raise InputError(
            str(run), found, "two, one to begin at and one to arrive at", "a smaller train.checkpoint_every"
        )
    (newest, aim), (start, begun) = good[:2]
    for path, manifest in good[:2]:
        if WEIGHTS not in manifest.files:
            raise InputError(str(path), "the shares of several processes", "what one process wrote, to do it again")
    last = min(begun.step + steps, aim.step)
    seen: dict[int, StepEvent] = {}

    def listen(event: Event) -> None:
        if isinstance(event, StepEvent):
            seen[event.step] = event

    with tempfile.TemporaryDirectory(prefix="headway-") as place:
        trainer = make(Path(place), listen)
        tensors = trainer.replay(Found(start, begun, []), last)
    known = {row["step"]: row for row in read_metrics(run / METRICS) if row["event"] == "step"}
    for step, event in sorted(seen.items()):
        row = known.get(step)
        for name in ("loss", "grad_norm"):
            if row is not None and row[name] != getattr(event, name):
                raise _differs(f"step {step}", f"{name} {getattr(event, name)!r}", f"{row[name]!r} of {run / METRICS}")
    if last == aim.step and trainer.world.is_first:  # the random state that is saved is the first process's
        for name in (WEIGHTS, OPTIMIZER):
            digest = hashlib.sha256()
            for chunk in files.chunks(write_tensors(tensors[name])):
                digest.update(chunk)
            if (wanted := aim.files[name]["sha256"]) != digest.hexdigest():
                raise _differs(
                    str(newest / name), f"sha256 {digest.hexdigest()} after {last - begun.step} steps", f"{wanted}"
                )
    return Proof(begun.step + 1, last, len(known.keys() & seen.keys()), newest if last == aim.step else None)


def _differs(where: str, found: str, expected: str) -> DivergedError:
    fix = "the threads, torch and data of the run (its manifest.json names them)"
    return DivergedError(where, f"{found} when done again", expected, fix)
