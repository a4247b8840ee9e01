"""Prompt lookup: what followed the last few tokens when they stood here before is guessed to follow again.

Reading a few tokens in one pass costs little more than reading one (the weights are read once), so guesses are read
with the token they would follow, and the logits behind a guess count only if the model chose just that guess. The text
is the one without guesses, up to the rounding of sums; what is gained is passes. Where few guesses come true, or a pass
of several takes too long, guessing stops for a while. (Prompt lookup decoding, github.com/apoorvumang; speculative
decoding without a draft model, arXiv:2211.17192.) Left out: several rows, rolling windows, a model that drafts.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

from torch import Tensor

from headway.generation.session import Session

LONGEST, SHORTEST = 3, 2  # tokens that a guess rests on
RESTS = (16, 512)  # passes without guesses after a loss, twice as many each time
SMOOTH, HOPE = 0.8, 3.0  # of the mean of tokens a pass gives, and where it begins


class Lookup:
    """A session of one row that reads guesses ahead.

    Args:
        session: after its prompt was read. said: the ids before the next token, an encoder's among them. width: tokens
            guessed at a time.
    """

    def __init__(self, session: Session, said: Sequence[int], width: int) -> None:
        self._session, self._width, self._said = session, width, list[int]()
        self._places: dict[tuple[int, ...], int] = {}  # of what followed an n-gram when it last stood here
        self._guesses: deque[int] = deque()
        self._logits: deque[Tensor] = deque()
        self._paid = _Balance()
        self.passes, self.accepted = 0, 0
        for token in said:
            self._add(token)

    def next_of(self, ids_B: Tensor) -> Tensor:
        """Append a token, (1,): the logits (1, V) of what follows."""
        token = int(ids_B[0])
        self._add(token)
        if self._guesses and self._guesses[0] == token:
            self._guesses.popleft()
            self._session.keep(token)
            self.accepted += 1
            self._paid.came_true()
            return self._logits.popleft()
        if self._guesses:
            self._session.forget(len(self._guesses))
            self._guesses.clear()
            self._logits.clear()
        guesses = self._guess() if self._paid.is_on and self._session.has_room(self._width + 1) else []
        begin = time.perf_counter()
        logits = self._session.several([token, *guesses])
        self.passes += 1
        self._paid.took(time.perf_counter() - begin, bool(guesses))
        self._guesses.extend(guesses)
        self._logits.extend(logits[place : place + 1] for place in range(1, len(logits)))
        return logits[:1]

    def _add(self, token: int) -> None:
        """The places are those before this token, so that the newest n-gram does not find itself."""
        for size in range(SHORTEST, LONGEST + 1):
            if len(self._said) >= size:
                self._places[tuple(self._said[-size:])] = len(self._said)
        self._said.append(token)

    def _guess(self) -> list[int]:
        """Always `width` tokens, so that all passes are alike: what follows itself goes round."""
        for size in range(LONGEST, SHORTEST - 1, -1):
            place = self._places.get(tuple(self._said[-size:])) if len(self._said) >= size else None
            if place is not None:
                behind = self._said[place:]
                return [behind[number % len(behind)] for number in range(self._width)]
        return []


class _Balance:
    """Whether guesses pay: tokens that a pass with guesses gives, against how much longer than a plain one it takes."""

    def __init__(self) -> None:
        self._seconds: dict[bool, float] = {}
        self._tokens, self._true, self._was_guess = HOPE, 0, False
        self._rest, self._left = RESTS[0], 0

    @property
    def is_on(self) -> bool:
        return self._left == 0

    def came_true(self) -> None:
        self._true += 1

    def took(self, seconds: float, guessed: bool) -> None:
        """A pass is done, and what the one before it gave is known."""
        known = self._seconds.get(guessed)
        # The least there was, forgotten slowly: the first pass of a kind prepares its steps, and others disturb.
        self._seconds[guessed] = seconds if known is None else min(seconds, known * 1.02)
        self._left = max(self._left - 1, 0)
        if self._was_guess and not self._left:
            self._tokens = SMOOTH * self._tokens + (1 - SMOOTH) * (1 + self._true)
            self._judge()
        self._was_guess, self._true = guessed, 0

    def _judge(self) -> None:
        if len(self._seconds) < 2:
            return
        if self._tokens * self._seconds[False] >= self._seconds[True]:
            self._rest = RESTS[0]
        else:
            self._left, self._tokens = self._rest, HOPE
            self._rest = min(2 * self._rest, RESTS[1])
