"""Tokens to text as they come: whole characters only, stop strings held back, terminal escapes taken out.

A token may hold half of a character and a stop string may begin in one token and end in another. What has been shown
cannot be taken back, so a text is released only as far as it is certain.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence

from headway.text.tokenizer import Tokenizer


class TextStream:
    """The text of one sequence, token by token; the pieces joined together are the whole text.

    A character cut in two by the end of the generation is dropped; U+FFFD appears only for bytes that no further
    token could have completed. A stop string ends the text where the first one to be complete begins, as if
    characters came one by one, so the cut does not depend on how the text is split into tokens.

    Args:
        tokenizer: gives the bytes of tokens; special tokens have none.
        stop: strings that end the text.
        at_start: nothing stands before the first token (some tokenizers drop its leading space).
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, at_start: bool = False) -> None:
        self._tokenizer, self._stop, self._at_start = tokenizer, tuple(stop), at_start
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self._parts: list[str] = []
        self.stopped = False

    @property
    def text(self) -> str:
        """Everything released so far."""
        return "".join(self._parts)

    def feed(self, token_id: int, *, search: bool = True) -> str:
        """The text that this token makes certain; sets `stopped` when a stop string is complete.

        With `search` off (before min_tokens) stop strings are ordinary text.
        """
        if token_id in self._tokenizer.special_ids:
            return ""
        if self._at_start:
            self._at_start = False
            raw = self._tokenizer.decode_bytes([token_id])
        else:
            raw = self._tokenizer.token_bytes(token_id)
        return self._take(self._utf8.decode(raw), search)

    def finish(self, *, cut: bool) -> str:
        """The text still held back, once no token follows.

        cut: the generation ended by its length, so an unfinished character is nobody's mistake and is dropped.
        """
        if self.stopped:
            return ""
        rest = "" if cut else self._utf8.decode(b"", final=True)
        out, self._held = self._held + rest, ""
        return self._release(out)

    def _take(self, new: str, search: bool) -> str:
        if not self._stop or not search:
            out, self._held = self._held + new, ""
            return self._release(out)
        self._held += new
        found = [(place + len(stop), place) for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            cut = min(found)[1]
            out, self._held = self._held[:cut], ""
            return self._release(out)
        sure = len(self._held) - self._beginning()
        out, self._held = self._held[:sure], self._held[sure:]
        return self._release(out)

    def _beginning(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = min(len(self._held), max(map(len, self._stop)) - 1)
        sizes = (n for n in range(longest, 0, -1) if any(stop.startswith(self._held[-n:]) for stop in self._stop))
        return next(sizes, 0)

    def _release(self, text: str) -> str:
        if text:
            self._parts.append(text)
        return text


# Control sequences (ESC [ ... letter), strings (ESC ] or P or X or ^ or _ ... BEL or ESC \), two-character escapes, and
# their single-byte forms: ECMA-48, sections 5.4 and 8.3.
_ESCAPE = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
    r"|(?:\x1b[\]PX^_]|[\x9d\x90\x98\x9e\x9f])[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)"
    r"|\x1b[ -/]*[0-OQ-WYZ\\`-~]"
)
_OPEN = re.compile(
    r"(?:(?:\x1b\[|\x9b)[0-?]*[ -/]*|(?:\x1b[\]PX^_]|[\x9d\x90\x98\x9e\x9f])[^\x07\x1b\x9c]*\x1b?|\x1b[ -/]*)\Z"
)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_LONGEST_OPEN = 4096


def strip_escapes(text: str) -> str:
    """The text without terminal escape sequences and control characters; tab and newline stay.

    A model or a file name may otherwise retitle the window, move the cursor or write to the clipboard.
    """
    return _CONTROL.sub("", _ESCAPE.sub("", text))


class EscapeFilter:
    """`strip_escapes` for a text that comes in pieces: a sequence cut by a border is held until it is whole."""

    def __init__(self) -> None:
        self._held = ""

    def feed(self, text: str) -> str:
        """The safe text so far."""
        text = self._held + text
        opened = _OPEN.search(_ESCAPE.sub(lambda match: "\0" * len(match.group()), text))
        # An endless string would hide everything after it: beyond a length its characters are shown bare.
        cut = opened.start() if opened and len(text) - opened.start() <= _LONGEST_OPEN else len(text)
        self._held = text[cut:]
        return strip_escapes(text[:cut])

    def finish(self) -> str:
        """What was held, without its control characters."""
        out, self._held = strip_escapes(self._held), ""
        return out
