"""What a generation returns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from headway.errors import DivergedError, HeadwayError

FinishReason = Literal["stop", "length", "error"]


class TokenLogprob(NamedTuple):
    """One token's log-probability in nats, None where it is not finite or the token had nothing before it.

    `top` holds the most likely ids at this place with theirs, best first.
    """

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float | None], ...] = ()


@dataclass(frozen=True)
class Generation:
    """One continuation of one prompt.

    Attributes:
        text: what was generated, stop strings and special tokens left out; with `echo` behind the prompt.
        token_ids: the generated ids, with the one that ended the text.
        prompt_tokens, generated_tokens: counts; `truncated` prompt tokens were dropped on request.
        finish_reason: stop (end token or stop string), length (max_tokens or the context), error (see `error`).
        logprobs: per generated token (with `echo` per prompt token first), None unless asked for.
        seconds: from the start of its batch until it was finished.
        prompt, sample: which prompt of the call, and which of its n continuations.
        seed: gives the same text again with the same options and `sample`; None where nothing was drawn.
        score: of a beam, sum of log-probabilities / length ** length_penalty.
    """

    text: str
    token_ids: list[int]
    prompt_tokens: int
    generated_tokens: int
    finish_reason: FinishReason
    logprobs: list[TokenLogprob] | None
    seconds: float
    prompt: int = 0
    sample: int = 0
    truncated: int = 0
    seed: int | None = None
    score: float | None = None
    error: HeadwayError | None = None


def finite(value: float) -> float | None:
    """The value, or None where strict JSON has no word for it."""
    return value if math.isfinite(value) else None


def nonfinite(prompt: int, token: int) -> DivergedError:
    """The error of a sequence whose logits are NaN or infinite."""
    return DivergedError(
        f"prompt {prompt}",
        f"the model's logits for token {token} are not finite",
        "numbers",
        "check the weights for NaN, or use dtype float32",
    )
