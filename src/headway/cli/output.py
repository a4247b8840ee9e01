"""Where words go: results on stdout, everything else on stderr; under `--json` stdout carries one object only."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Sequence
from typing import TextIO


def one_line(text: str) -> str:
    """`text` with every character that is not printable replaced, for a line about files of any name."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


class Printer:
    """One command's output.

    Args:
        json: stdout carries the final object only; the words go to stderr.
        raw: do not strip control characters on a terminal.
    """

    def __init__(self, *, json: bool = False, raw: bool = False) -> None:
        self.json, self.raw = json, raw

    @property
    def words(self) -> TextIO:
        """Where text for people goes."""
        return sys.stderr if self.json else sys.stdout

    def say(self, text: str = "", *, end: str = "\n") -> None:
        """Print text for people; made harmless when it goes to a terminal."""
        print(self.safe(text), end=end, file=self.words, flush=True)

    def safe(self, text: str) -> str:
        """Text of a model or a file as it may be shown here: without escape sequences on a terminal."""
        if self.raw or text.isprintable() or not self.words.isatty():
            return text
        from headway.generation.stream import strip_escapes

        return strip_escapes(text)

    def table(self, rows: Iterable[Sequence[object]], *, header: Sequence[str] = (), right: bool = False) -> None:
        """Aligned columns, all but the first to the right if `right`."""
        cells = [[str(cell) for cell in row] for row in ([header] if header else []) + [list(row) for row in rows]]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for row in cells:
            pairs = list(enumerate(zip(row, widths, strict=True)))
            padded = [c.rjust(w) if right and i else c.ljust(w) for i, (c, w) in pairs]
            self.say("  ".join(padded).rstrip())

    def result(self, value: dict[str, object]) -> None:
        """The one JSON object of a verb under `--json`; nothing otherwise."""
        if self.json:
            from headway.strict import dump_json

            print(dump_json(value), flush=True)


def note(text: str) -> None:
    """A line on stderr; a closed stderr is no reason to stop."""
    with contextlib.suppress(OSError, ValueError):
        print(one_line(text), file=sys.stderr, flush=True)


def size(count: float, unit: str = "B") -> str:
    """`3.2 GB`: three digits and a decimal prefix."""
    prefixes = ["", "k", "M", "G", "T"]
    while abs(count) >= 999.5 and len(prefixes) > 1:
        count /= 1000
        del prefixes[0]
    return f"{count:.3g} {prefixes[0]}{unit}".rstrip()


def duration(seconds: float) -> str:
    """`2m05s`, `1h02m`, `8.1s`."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"
