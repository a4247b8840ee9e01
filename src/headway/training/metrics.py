"""metrics.jsonl: one strict JSON object per event, appended as the run goes.

A resumed run appends a `resume` event rather than cut the file; `read_metrics` then drops what a killed process
had recorded beyond the checkpoint. Lines wait in memory for up to a second, so that a step of a millisecond does
not pay for opening a file. A log that cannot be written costs one warning, never the run (R17).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from headway import files
from headway.errors import InputError, MachineError
from headway.strict import dump_json, strict_json
from headway.training.events import Event, record

METRICS = "metrics.jsonl"


class MetricsLog:
    """Appends events to a file.

    Args:
        path: the file; it is created when the first lines are written.
        warn: called once, with a sentence, if the file cannot be written or vanishes.
        every: seconds that lines may wait before they are written.

    `then` gets the events that have been written (loggers.py).
    """

    then: Callable[[Sequence[Event]], None] | None = None

    def __init__(self, path: Path, warn: Callable[[str], None], every: float = 1.0) -> None:
        self._path, self._warn, self._every = path, warn, every
        self._waiting: list[Event] = []
        self._flushed = time.monotonic()
        self._written = self._warned = False

    def add(self, event: Event) -> None:
        """Take an event; write if the last writing is long enough ago."""
        self._waiting.append(event)
        if time.monotonic() - self._flushed >= self._every:
            self.flush()

    def flush(self) -> None:
        """Write what waits. Never raises for the disk's sake."""
        waiting, self._waiting = self._waiting, []
        self._flushed = time.monotonic()
        if not waiting:
            return
        try:
            if self._written and not self._path.exists():
                self._complain(f"{self._path}: was removed during the run; it is begun anew")
            files.append_line(self._path, "\n".join(dump_json(record(event)) for event in waiting))
            self._written = True
        except MachineError as error:
            self._complain(f"{error}; training goes on, metrics are lost meanwhile")
        if self.then is not None:
            self.then(waiting)

    def _complain(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            self._warn(text)


def read_metrics(path: Path) -> list[dict[str, object]]:
    """The records of a metrics file in order, without those that a resume made void.

    A line that a crash cut short is left out. Raises InputError if the file is missing or is not UTF-8.
    """
    kept: list[dict[str, object]] = []
    for row in _rows(path):
        if row.get("event") == "resume":
            kept = [old for old in kept if _step(old) <= _step(row)]
        kept.append(row)
    return kept


def last_steps(path: Path) -> dict[str, int]:
    """{kind of event: its last step that was ever recorded}, also what a resume made void; {} without a file."""
    last: dict[str, int] = {}
    for row in _rows(path) if path.exists() else ():
        kind = str(row.get("event"))
        last[kind] = max(last.get(kind, -1), _step(row))
    return last


def _rows(path: Path) -> Iterator[dict[str, object]]:
    """All records of the file, cut lines left out."""
    for line in files.read_bytes(path).split(b"\n"):
        try:
            row = strict_json(line, str(path)) if line.strip() else None
        except InputError:
            continue
        if isinstance(row, dict):
            yield row


def _step(row: dict[str, object]) -> int:
    step = row.get("step")
    return step if isinstance(step, int) else 0
