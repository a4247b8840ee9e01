"""Loggers: a run's events sent on to TensorBoard and to Weights & Biases, as they stand in metrics.jsonl.

    metrics.jsonl --> {"step/loss": 2.3, "eval/bits_per_byte": 1.9, "health/entropy/decoder.blocks.0": 3.1} at a step

They get what has been written to metrics.jsonl, no sooner, so that a killed run knows on its return what they have. A
value that does not exist (null there) is left out. Each is an extra of its own (`pip install 'headway[tensorboard]'`).
A logger that fails while a run goes on costs one warning and gets nothing more; it never costs the run.
"""

from __future__ import annotations

import contextlib
import importlib
import netrc
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

from headway import files
from headway.errors import ConfigError, HeadwayError, InputError, MachineError
from headway.strict import dump_json, strict_json
from headway.training.events import Event, record

TENSORBOARD, WANDB, WANDB_RUN = "tensorboard", "wandb", "wandb.json"
"""In the run folder: two folders that the packages write, and what says which W&B run this one is."""
_PARTS = {"tensorboard": ("torch.utils.tensorboard", "SummaryWriter"), "wandb": ("wandb", "init")}


@dataclass(frozen=True)
class Begin:
    """Where a run begins, for those who log it.

    Attributes:
        folder: the run folder. config: the whole run as JSON values.
        step: updates done already: what a logger has beyond it is void, or is the same again.
        seen: the last step that metrics.jsonl holds of each kind of event.
    """

    folder: Path
    config: Mapping[str, object]
    step: int = 0
    seen: Mapping[str, int] | None = None


class Logger(Protocol):
    """What takes events."""

    def log(self, events: Sequence[Event]) -> None:
        """Take events in order and put them where a kill of this process does not reach them."""

    def close(self) -> None:
        """The run ends."""


def check_loggers(names: Sequence[str]) -> None:
    """Raises ConfigError where a logger's package is missing or is another one of that name."""
    for name in names:
        _part(name)


def _part(name: str) -> Any:
    """What a logger is made with. A folder `wandb` of an earlier run, where Python starts, would be imported too."""
    if name == "wandb" and _mode() == "offline":
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read at import: else crashes are reported to W&B
    module, attribute = _PARTS[name]
    try:
        return getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        found = f"{name}, which cannot be imported ({error})"
    except AttributeError:
        found = f"{name}, but the {module} that is imported has no {attribute}"
    raise ConfigError("train.loggers", found, "an installed package", f"pip install 'headway[{name}]'") from None


def values(event: Event) -> Iterator[tuple[str, float | str]]:
    """An event's (name, value) pairs, `step/loss`; nothing for what does not exist."""
    row = record(event)
    kind = str(row.pop("event"))
    row.pop("step")
    yield from _leaves(kind, row)


def _leaves(name: str, value: object) -> Iterator[tuple[str, float | str]]:
    if isinstance(value, Mapping):
        for key, below in value.items():
            yield from _leaves(f"{name}/{key}", below)
    elif isinstance(value, str | int | float):
        yield name, value if isinstance(value, str) else float(value)


class TensorBoard:
    """Event files in RUN/tensorboard; `tensorboard --logdir RUN` shows them."""

    def __init__(self, begin: Begin) -> None:
        # The reader drops what an earlier file says of this step and later ones.
        purge = begin.step + 1 if begin.seen is not None else None
        self._writer = _part("tensorboard")(log_dir=str(begin.folder / TENSORBOARD), purge_step=purge)

    def log(self, events: Sequence[Event]) -> None:
        """Scalars and texts."""
        for event in events:
            for name, value in values(event):
                add = self._writer.add_text if isinstance(value, str) else self._writer.add_scalar
                add(name, value, global_step=event.step)
        self._writer.flush()

    def close(self) -> None:
        """Write what waits."""
        self._writer.close()


class WeightsAndBiases:
    """A run of wandb's, the same one after a resume.

    What it holds cannot be taken back, so events up to the last recorded step of their kind are not sent again: a
    resumed run repeats them to the bit. Where it writes and under whose name is wandb's own affair (WANDB_PROJECT,
    WANDB_MODE, ...).
    """

    def __init__(self, begin: Begin) -> None:
        place = begin.folder / WANDB_RUN
        known = _known_run(place) if begin.seen is not None else None
        self._seen = begin.seen if known is not None and begin.seen is not None else {}
        self._last = max(self._seen.values(), default=-1)  # wandb takes no step below the last one
        init = _part("wandb")
        self._run = init(
            project=os.environ.get("WANDB_PROJECT", "headway"),
            name=begin.folder.resolve().name,
            dir=str(begin.folder),
            config=dict(begin.config),
            id=known,
            resume="allow",
            mode=_mode(),
        )
        files.atomic_write(place, dump_json({"id": self._run.id}).encode())

    def log(self, events: Sequence[Event]) -> None:
        """One call for an event."""
        for event in events:
            found = dict(values(event))
            is_new = event.step > self._seen.get(str(record(event)["event"]), -1) and event.step >= self._last
            if found and is_new:
                self._run.log(found, step=event.step)

    def close(self) -> None:
        """Wait until everything is sent or written."""
        self._run.finish()


def _known_run(place: Path) -> str | None:
    """The id of the run that was begun here; None if there is none, or nothing that can be read."""
    with contextlib.suppress(InputError, MachineError):
        row = strict_json(files.read_bytes(place), str(place))
        return str(row["id"]) if isinstance(row, dict) and "id" in row else None
    return None


def _mode() -> str | None:
    """None leaves it to wandb; `offline` where nobody has said how to reach it, since it would ask for a key."""
    if {"WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"} & set(os.environ):
        return None
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    # `wandb login` writes the key there.
    for path in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            if path and host in netrc.netrc(os.path.expanduser(path)).hosts:
                return None
    return "offline"


_MAKE: Mapping[str, Callable[[Begin], Logger]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


class Loggers:
    """The loggers of a run.

    Args:
        names: of `train.loggers`. begin: where the run begins or goes on. warn: called with a sentence when one fails.

    Raises ConfigError for a missing package, MachineError for a logger that cannot begin.
    """

    def __init__(self, names: Sequence[str], begin: Begin, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._open: dict[str, Logger] = {}
        for name in dict.fromkeys(names):
            try:
                self._open[name] = _MAKE[name](begin)
            except HeadwayError:
                raise
            except Exception as error:
                fix = f"leave {name} out of train.loggers" + (", or WANDB_MODE=offline" if name == "wandb" else "")
                found = f"{name} cannot begin: {type(error).__name__}: {error}"
                raise MachineError("train.loggers", found, "a logger that works", fix) from error

    def send(self, events: Sequence[Event]) -> None:
        """Send events to all; one that fails is dropped."""
        for name, logger in [*self._open.items()]:
            with self._dropping(name):
                logger.log(events)

    def close(self) -> None:
        """The run ends, well or not."""
        for name, logger in [*self._open.items()]:
            with self._dropping(name):
                logger.close()
        self._open.clear()

    @contextlib.contextmanager
    def _dropping(self, name: str) -> Iterator[None]:
        try:
            yield
        except HeadwayError:  # a second signal that arrived in the meantime
            raise
        except Exception as error:
            self._open.pop(name, None)
            self._warn(f"{name} failed ({type(error).__name__}: {error}); it gets nothing more, training goes on")
