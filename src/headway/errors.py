"""What a user sees when something is wrong: one sentence, one exit code.

Every error that a user can cause or can mend is a `HeadwayError`. It renders as one line,

    error: <file or field>: <found>; expected <what>. Fix: <command or value>

so that the reader learns where, what, and how to go on without a traceback. Anything else that reaches the
command's top level is our own bug (exit code 70).
"""

from __future__ import annotations

from collections.abc import Iterable


class HeadwayError(Exception):
    """A failure with a place, a finding, an expectation and a remedy.

    Args:
        where: the file, field or argument that is wrong.
        found: what was found there.
        expected: what would have been right (may be empty).
        fix: the command or value that mends it (may be empty).
    """

    exit_code = 70

    def __init__(self, where: str, found: str, expected: str = "", fix: str = "") -> None:
        self.where, self.found, self.expected, self.fix = where, found, expected, fix
        super().__init__(str(self))

    def __str__(self) -> str:
        text = f"{self.where}: {self.found}" if self.where else self.found
        if self.expected:
            text += f"; expected {self.expected}"
        if self.fix:
            text += f". Fix: {self.fix}"
        return " ".join(text.split())


class ConfigError(HeadwayError):
    """Wrong usage or a config that cannot be built."""

    exit_code = 2


class InputError(HeadwayError):
    """A file or a piece of data that cannot be used."""

    exit_code = 3


class MachineError(HeadwayError):
    """The environment refuses: disk, memory, lock, port, permissions."""

    exit_code = 4


class DivergedError(HeadwayError):
    """Training diverged or a quality gate failed."""

    exit_code = 5


class WorkerError(HeadwayError):
    """A worker process died or raised."""

    exit_code = 6


class BugError(HeadwayError):
    """A state that only our own mistake can produce."""

    exit_code = 70


class Interrupted(HeadwayError):
    """Stopped by a signal with the state saved: 128 + the signal's number."""

    def __init__(self, signal_number: int, where: str, found: str, fix: str = "") -> None:
        self.exit_code = 128 + signal_number
        super().__init__(where, found, "", fix)


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known word the fewest edits away, or an empty string where none is near."""
    word = word[:80]
    # The same letters in another order are one slip, not two.
    distances = {name: edits(word, name) - (sorted(word) == sorted(name)) for name in known}
    best = min(distances, key=lambda name: distances[name], default="")
    # A third of the letters may be wrong, two of a short word, one of a word of three.
    is_near = best and distances[best] <= max(len(best) // 3, min(len(best) // 2, 2))
    return f"; did you mean {best!r}?" if is_near else ""


def edits(left: str, right: str) -> int:
    """Letters to put in, leave out or replace to make one word of the other (Levenshtein, 1966)."""
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        above, row = row, [i]
        for j, b in enumerate(right, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (a != b)))
    return row[-1]
