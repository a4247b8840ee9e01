"""What a person sees of a run: one live line on a terminal, plain lines elsewhere. Always on stderr.

    1200/5000 ━━━━━━╺━━━━━━ loss 2.913  lr 0.0081  grad 0.42  31.2k tok/s  64% of peak  812 MB  ETA 1m12s

Off a terminal a line appears at most every ten seconds, so that a log stays readable.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

from headway.cli.output import duration, note, size
from headway.generation.stream import strip_escapes
from headway.launch import Note, Phase, Plan, Started
from headway.training.events import CheckpointEvent, EvalEvent, ResumeEvent, StepEvent, WarningEvent

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from headway.launch import RunEvent

_TOKEN_HEADS = ("causal-lm", "masked-lm", "token-classification")
_EVERY = 10.0  # seconds between plain lines


def shown(value: float | None, form: str = ".4g") -> str:
    """A number, or `n/a`."""
    return "n/a" if value is None else format(value, form)


def step_line(event: StepEvent, unit: str = "tok") -> str:
    """Loss, rate, norm, speed in supervised `unit`s, share of peak, memory and time left of one update."""
    peak = "" if event.share_of_peak is None else f"{event.share_of_peak:.0%} of peak  "
    skipped = "" if event.applied else "  skipped"
    return (
        f"loss {shown(event.loss, '.3f')}  lr {event.lr:.2g}  grad {shown(event.grad_norm, '.2f')}  "
        f"{size(event.tokens_per_second, '')}{unit}/s  {peak}{size(event.memory)}  ETA {duration(event.eta)}{skipped}"
    )


def eval_line(event: EvalEvent) -> str:
    """Loss and bits per byte on held-out text, and the beginning of what the model writes."""
    bits = "" if event.bits_per_byte is None else f", {event.bits_per_byte:.4f} bits per byte"
    best = " (best so far)" if event.best else ""
    line = f"step {event.step}: held-out loss {shown(event.loss)}{bits}{best}"
    if event.rewards:
        right, margin = event.rewards["accuracy"], event.rewards["margin"]
        line += f", chosen ahead in {right:.1%} of pairs, by {margin:.3f} on average"
    if event.sources:
        line += f" ({', '.join(f'{name} {shown(loss)}' for name, loss in event.sources.items())})"
    if event.sample:
        line += f"\n  writes: {' '.join(strip_escapes(event.sample).split())[:160]}"
    return line


class Display:
    """Shows a run's events; a context manager, since a live line must be taken down again."""

    def __init__(self) -> None:
        self._live: Progress | None = None
        self._task: TaskID | None = None
        self._steps, self._unit = 0, "tok"
        self._last = -_EVERY

    def __enter__(self) -> Display:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            columns = (MofNCompleteColumn(), BarColumn(20), TextColumn("{task.description}", markup=False))
            self._live = Progress(*columns, console=Console(stderr=True, highlight=False), refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __call__(self, event: RunEvent) -> None:
        """Show one event."""
        match event:
            case StepEvent():
                self._step(event)
            case Phase():
                self._bar(event.done, event.total, event.name)
            case EvalEvent():
                self.say(eval_line(event))
            case Plan():
                # A class or a number per row is no token, and neither is a pair of completions.
                of_pairs = event.run.objective is not None and event.run.objective.type == "preference"
                unit = " pixels" if event.model.head.type == "masked-patches" else f" {event.material.unit}"
                self._unit = "tok" if event.model.head.type in _TOKEN_HEADS and not of_pairs else unit
                for line in event.lines():
                    self.say(line)
            case Started():
                self._start(event.steps)
            case WarningEvent():
                self.say(f"warning: {event.text}")
            case ResumeEvent():
                self.say(f"resumed at step {event.step} from {event.path}")
            case Note():
                self.say(event.text)
            case CheckpointEvent() if event.seconds > 1:
                self.say(f"step {event.step}: saved in {duration(event.seconds)}")

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._live is None:
            for line in text.split("\n"):
                note(line)
        else:
            self._live.console.print(strip_escapes(text), markup=False, soft_wrap=True)

    def _step(self, event: StepEvent) -> None:
        is_last = event.step >= self._steps
        prefix, line = f"step {event.step}/{self._steps}  ", step_line(event, self._unit)
        self._bar(event.step, self._steps, line, prefix, force=is_last)

    def _bar(self, done: int, total: int, text: str, prefix: str = "", *, force: bool = False) -> None:
        if self._live is not None:
            if self._task is None:
                self._task = self._live.add_task(text, total=max(total, 1))
            self._live.update(self._task, completed=done, total=max(total, 1), description=text)
        elif force or time.monotonic() - self._last >= _EVERY:
            self._last = time.monotonic()
            note(f"{prefix}{text}" if prefix else f"{text}: {done / max(total, 1):.0%}")

    def _start(self, steps: int) -> None:
        self._steps = steps
        if self._live is not None and self._task is not None:
            self._live.remove_task(self._task)
        self._task = None
