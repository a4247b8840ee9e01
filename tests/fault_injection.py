"""Fail or kill at the k-th file primitive, for every k: shared by all tests of saving (rows S1, S2, S11)."""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from headway import files
from headway.errors import HeadwayError

KILLED = 137


@contextlib.contextmanager
def hooked(hook: Callable[[str, Path], None]) -> Iterator[None]:
    """Install a file hook for the duration of a block."""
    before, files.hook = files.hook, hook
    try:
        yield
    finally:
        files.hook = before


def at_call(k: int, act: Callable[[], None]) -> Callable[[str, Path], None]:
    """A hook that acts at the k-th primitive (from 1) and lets the others pass."""
    seen = 0

    def hook(name: str, path: Path) -> None:
        nonlocal seen
        seen += 1
        if seen == k:
            act()

    return hook


def failing(k: int, code: int) -> Callable[[str, Path], None]:
    """A hook that raises OSError(code) at the k-th primitive."""

    def act() -> None:
        raise OSError(code, os.strerror(code))

    return at_call(k, act)


def count_primitives(action: Callable[[], object]) -> int:
    """How many primitives `action` uses."""
    calls: list[str] = []
    with hooked(lambda name, path: calls.append(name)):
        action()
    return len(calls)


def in_child(action: Callable[[], object]) -> int:
    """Run `action` in a forked child; 0, a HeadwayError's exit code, 99 for another error, or -signal."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            action()
            code = 0
        except HeadwayError as error:
            code = error.exit_code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_at(k: int, action: Callable[[], object]) -> bool:
    """Run `action` in a child that vanishes at its k-th primitive; False if it ended before that."""

    def run() -> None:
        with hooked(at_call(k, lambda: os._exit(KILLED))):
            action()

    code = in_child(run)
    assert code in (0, KILLED), code
    return code == KILLED
