"""Guesses of the next few tokens, read in one pass with the token they would follow.

That costs little more than reading one (the weights are read once), and the logits behind a guess count only if the
model chose just that guess: the text is the one without guesses, sampled or not, up to the rounding of sums. What is
gained is passes. Where few guesses come true, or they take too long, guessing stops for a while.

Two guess: `Lookup` says what followed the last tokens when they stood here before (prompt lookup decoding,
github.com/apoorvumang), `Draft` asks a smaller model (speculative decoding, arXiv:2211.17192; its greedy tokens, so
that nothing has to be drawn twice). Left out: several rows, rolling windows, trees of guesses.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from headway.errors import ConfigError
from headway.generation.prompts import Prompt
from headway.generation.session import Session, beginning
from headway.nn.model import Transformer

LONGEST, SHORTEST = 3, 2  # tokens that a guess rests on
RESTS = (16, 512)  # passes without guesses after a loss, twice as many each time
FIRST, AGAIN = 2, 64  # passes without guesses at the beginning, and one after so many: what they take is to be known
SMOOTH, HOPE = 0.8, 3.0  # of the mean of tokens a pass gives, and where it begins


class Guesser(Protocol):
    """Somebody who is told each token that is said, and asked what may follow."""

    def add(self, token: int) -> None:
        """This token is said."""

    def guess(self, count: int) -> Sequence[int]:
        """So many tokens that may follow, or none."""


class Guessing:
    """A session of one row that reads guesses ahead.

    Args:
        session: after its prompt was read. guesser: who knows that prompt. width: tokens guessed at a time.
    """

    def __init__(self, session: Session, guesser: Guesser, width: int) -> None:
        self._session, self._guesser, self._width = session, guesser, width
        self._guesses: deque[int] = deque()
        self._logits: deque[Tensor] = deque()
        self._paid = _Balance()
        self.passes, self.accepted = 0, 0

    def next_of(self, ids_B: Tensor) -> Tensor:
        """Append a token, (1,): the logits (1, V) of what follows."""
        token = int(ids_B[0])
        self._guesser.add(token)
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
        begin = time.perf_counter()
        may = self._paid.is_on and self._session.has_room(self._width + 1)
        guesses = self._guesser.guess(self._width) if may else []
        logits = self._session.several([token, *guesses])
        self.passes += 1
        self._paid.took(time.perf_counter() - begin, bool(guesses))
        self._guesses.extend(guesses)
        self._logits.extend(logits[place : place + 1] for place in range(1, len(logits)))
        return logits[:1]


class Lookup:
    """What followed the last few tokens when they stood here before.

    Args:
        said: the ids before the next token, an encoder's among them.
    """

    def __init__(self, said: Sequence[int]) -> None:
        self._said = list[int]()
        self._places: dict[tuple[int, ...], int] = {}  # of what followed an n-gram when it last stood here
        for token in said:
            self.add(token)

    def add(self, token: int) -> None:
        """The places are those before this token, so that the newest n-gram does not find itself."""
        for size in range(SHORTEST, LONGEST + 1):
            if len(self._said) >= size:
                self._places[tuple(self._said[-size:])] = len(self._said)
        self._said.append(token)

    def guess(self, count: int) -> Sequence[int]:
        """Always `count` tokens, so that all passes are alike: what follows itself goes round."""
        for size in range(LONGEST, SHORTEST - 1, -1):
            place = self._places.get(tuple(self._said[-size:])) if len(self._said) >= size else None
            if place is not None:
                behind = self._said[place:]
                return [behind[number % len(behind)] for number in range(count)]
        return []


class Draft:
    """What a smaller model takes for most likely.

    Args:
        model: a decoder whose ids mean the same. prompt: of the model it drafts for. vocab: ids that count.

    Raises ConfigError: a model of another kind, or with fewer ids.
    """

    CATCH_UP = 32  # tokens read at a time, for whose logits nobody asks

    def __init__(self, model: Transformer, prompt: Prompt, vocab: int) -> None:
        config = model.config
        if config.kind != "decoder" or config.vocab_size < vocab:
            found = f"a model of kind {config.kind} with {config.vocab_size} ids"
            raise ConfigError("draft", found, f"a decoder with the {vocab} ids of the model it drafts for")
        self._said = list(prompt.ids)
        self._read, self._ahead = 0, list[int]()  # how many said tokens it has read, and its own guesses behind them
        room = min(len(prompt.ids) + prompt.room, config.max_len)
        self._session = None
        if room > len(prompt.ids):
            self._session = Session(model, [Prompt(prompt.ids, "", room - len(prompt.ids))], vocab)

    def add(self, token: int) -> None:
        """It is read when the next guess needs it."""
        self._said.append(token)

    def guess(self, count: int) -> Sequence[int]:
        """Nothing where the text has outgrown it, or it cannot take back what did not come true."""
        session = self._session
        if session is None:
            return []
        if not self._read:
            session.prefill()
            self._read = session.cache.length or 0
        true = beginning(self._ahead, self._said[self._read :])
        news = self._said[self._read + true :]
        if not session.can_forget or not session.has_room(len(news) + count):
            return []
        session.forget(len(self._ahead) - true)
        for begin in range(0, len(news), self.CATCH_UP):
            logits = session.several(news[begin : begin + self.CATCH_UP])
        guesses = [int(logits[-1].argmax())]
        while len(guesses) < count:
            guesses.append(int(session.several(guesses[-1:])[-1].argmax()))
        self._read, self._ahead = len(self._said), guesses[:-1]
        return guesses


class _Balance:
    """Whether guesses pay: tokens that a pass with guesses gives, against how much longer than a plain one it takes."""

    def __init__(self) -> None:
        self._seconds: dict[bool, float] = {}
        self._tokens, self._true, self._was_guess = HOPE, 0, False
        self._rest, self._left, self._since = RESTS[0], FIRST, 0

    @property
    def is_on(self) -> bool:
        return self._left == 0 and self._since < AGAIN

    def came_true(self) -> None:
        self._true += 1

    def took(self, seconds: float, guessed: bool) -> None:
        """A pass is done, and what the one before it gave is known."""
        known = self._seconds.get(guessed)
        # The least there was, forgotten slowly: the first pass of a kind prepares its steps, and others disturb.
        self._seconds[guessed] = seconds if known is None else min(seconds, known * 1.02)
        self._left, self._since = max(self._left - 1, 0), self._since + 1 if guessed else 0
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
