"""`headway train --nproc N`: N processes of this machine train one model.

torch.distributed.elastic starts and watches them. They find each other through a file and talk over the loopback
interface, so that no port is open to anybody else. When one of them dies the others are stopped; what it said last, or
the signal that killed it, is the error. A signal to this process goes on to all of them: they save once, and end.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headway.cli.output import note
from headway.errors import ConfigError, DivergedError, InputError, Interrupted, MachineError, WorkerError

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.api import PContext
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

_WATCHED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_EVERY = 0.1  # seconds between looks at the processes
_MEANT = {error.exit_code for error in (ConfigError, InputError, MachineError, DivergedError)}


def is_worker() -> bool:
    """Whether this process is one of several that train together, started by us or by torchrun."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_first() -> bool:
    """Whether this process speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def start(arguments: Sequence[str], count: int) -> int:
    """Run `headway ARGUMENTS` in `count` processes that train together; the exit code of what went wrong, or 0.

    Raises ConfigError for a count below one, WorkerError (X6) where a process was killed, Interrupted after a signal.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std, start_processes

    from headway.training.world import LAUNCHER, STORE

    if count < 1:
        raise ConfigError("--nproc", str(count), "at least 1 process", "--nproc 2")
    logging.getLogger("torch.distributed.elastic.multiprocessing").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="headway-") as place:
        shared = {
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            STORE: str(Path(place) / "store"),
            LAUNCHER: str(os.getpid()),
            "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),  # torch's advice on how we call it
            "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
        }
        context = start_processes(
            "headway",
            sys.executable,
            dict.fromkeys(range(count), ("-m", "headway", *arguments)),
            {rank: {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)},
            DefaultLogsSpecs(log_dir=place, redirects=dict.fromkeys(range(1, count), Std.ALL)),
        )
        with _forwarding(context) as caught:
            result = context.wait(period=_EVERY)
        assert result is not None
        if caught and result.is_failed():
            if result.failures[0].exitcode == 128 + caught[0]:
                return 128 + caught[0]  # the first process has said where it stopped
            raise Interrupted(caught[0], f"signal {caught[0]}", f"stopped {count} processes", "--resume goes on")
        return _judge(result.failures, result.stderrs) if result.is_failed() else 0


@contextlib.contextmanager
def _forwarding(context: PContext) -> Iterator[list[int]]:
    """Pass signals on to the processes; those that came."""
    caught: list[int] = []

    def forward(number: int, frame: Any) -> None:
        caught.append(number)
        for pid in context.pids().values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    before = {number: signal.signal(number, forward) for number in _WATCHED}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _judge(failures: Mapping[int, ProcessFailure], logs: Mapping[int, str]) -> int:
    """Say what went wrong first; its exit code. What is only a consequence comes last: lost the others, terminated."""

    def order(rank: int) -> tuple[int, int]:
        code = failures[rank].exitcode
        return (2 if code == -signal.SIGTERM else 1 if code == WorkerError.exit_code else 0), rank

    rank = min(failures, key=order)
    code = failures[rank].exitcode
    lines = Path(logs[rank]).read_text(errors="replace").splitlines() if rank else []
    said = ([line for line in lines if line.startswith("error: ")] or [f"ended with code {code}"])[-1]
    if code in _MEANT:
        if rank:
            note(f"rank {rank}: {said}")
        return code
    found = f"killed by {signal.Signals(-code).name}" if code < 0 else said.removeprefix("error: ")
    raise WorkerError(f"rank {rank}", found, "all ranks alive", "--resume goes on from the last checkpoint")
