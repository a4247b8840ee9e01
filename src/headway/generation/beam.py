"""Beam search: keep the most likely hypotheses at each length, return the n best finished ones.

The rules are those of transformers (the oracle in the tests): at each step the candidates are all one-token
extensions of the live hypotheses; one of the `beams` best that ends is finished, the best that do not end live on.
A finished hypothesis scores the sum of its log-probabilities / length ** length_penalty (arXiv:1609.08144 uses a
shifted length; the plain power is what published configs mean), the end token counted in the length.
One prompt at a time: its hypotheses are the batch. Left out: sampled and diverse beams.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from headway.generation.options import GenerationOptions
from headway.generation.prompts import Prompt
from headway.generation.result import FinishReason, Generation, nonfinite
from headway.generation.sampling import History, adjustments
from headway.generation.session import Session
from headway.generation.stream import TextStream
from headway.nn.precision import wide
from headway.text.tokenizer import Tokenizer


class Hypothesis(NamedTuple):
    """A finished sequence: its score, its ids, and whether it ended or was cut."""

    score: float
    ids: list[int]
    reason: FinishReason


class Beams:
    """The live and the finished hypotheses of one prompt.

    Args:
        options: beams, length_penalty, early_stopping. ends: the tokens that end a text. room: the longest length.
    """

    def __init__(self, options: GenerationOptions, ends: frozenset[int], room: int) -> None:
        self.options, self.ends, self.room = options, ends, room
        self.live: list[list[int]] = [[]]
        self.scores: list[float] = [0.0]
        self.finished: list[Hypothesis] = []
        self.length = 0

    def extend(self, log_p_KV: Tensor) -> tuple[list[int], list[int]]:
        """Go on by one token; returns the parent and the token of each hypothesis that lives on, the best first.

        Both are empty when the search is over.
        """
        vocab = log_p_KV.shape[-1]
        so_far = torch.tensor(self.scores, dtype=torch.float64, device=log_p_KV.device)
        totals = (so_far[:, None] + log_p_KV).flatten()
        # Each live hypothesis can end in len(ends) ways: this many candidates always hold `beams` that go on.
        wanted = self.options.beams * (1 + max(len(self.ends), 1))
        best, flat = totals.topk(min(wanted, len(totals)))
        self.length += 1
        parents: list[int] = []
        tokens: list[int] = []
        scores: list[float] = []
        for rank, (score, place) in enumerate(zip(best.tolist(), flat.tolist(), strict=True)):
            parent, token = divmod(place, vocab)
            if not math.isfinite(score):
                break  # banned tokens are no hypotheses
            if token in self.ends or self.length == self.room:
                if rank < self.options.beams:
                    self._finish(score, [*self.live[parent], token], "stop" if token in self.ends else "length")
            elif len(parents) < self.options.beams:
                parents.append(parent)
                tokens.append(token)
                scores.append(score)
        self.live = [[*self.live[parent], token] for parent, token in zip(parents, tokens, strict=True)]
        self.scores = scores
        return ([], []) if self._is_over() else (parents, tokens)

    def _finish(self, score: float, ids: list[int], reason: FinishReason) -> None:
        normal = score / float(self.length) ** self.options.length_penalty
        self.finished.append(Hypothesis(normal, ids, reason))
        # Stable: of equal scores the earlier one stays in front.
        self.finished = sorted(self.finished, key=lambda h: -h.score)[: self.options.beams]

    def _is_over(self) -> bool:
        if not self.live:
            return True
        if len(self.finished) < self.options.beams:
            return False
        if self.options.early_stopping is True:
            return True
        # The best a live hypothesis can become if all that follows is certain: at its present length, or, where
        # length pays and nothing may be missed, at the greatest.
        penalty = self.options.length_penalty
        longest = self.room if self.options.early_stopping == "never" and penalty > 0 else self.length
        possible: float = self.scores[0] / float(longest) ** penalty
        return possible <= self.finished[-1].score


@torch.no_grad()
def search(
    session: Session,
    tokenizer: Tokenizer,
    prompt: Prompt,
    number: int,
    options: GenerationOptions,
    ends: frozenset[int],
) -> list[Generation]:
    """The `options.n` best hypotheses for one prompt (fewer where the vocabulary has fewer), best first.

    Args:
        session: of that prompt alone. number: which prompt of the call it is.
    """
    started = time.perf_counter()
    beams = Beams(options, ends, prompt.room)
    logits = session.last(session.prefill())
    said: Sequence[int] = [session.model.config.tokens.decoder_start or 0] if session.model.is_pair else prompt.ids
    history = History(options, [said], session.vocab, logits)
    adjust = adjustments(options, ends, logits)
    while True:
        if not bool(logits.amax(-1).isfinite().all()):
            error = nonfinite(number, beams.length + 1)
            seconds = time.perf_counter() - started
            return [
                Generation("", [], len(prompt.ids), 0, "error", None, seconds, number, sample, error=error)
                for sample in range(options.n)
            ]
        logits = wide(logits)
        for step in adjust:
            logits = step(logits, history)
        parents, tokens = beams.extend(logits.log_softmax(-1))
        if not parents:
            break
        if parents != list(range(len(logits))):
            rows = torch.tensor(parents, device=logits.device)
            session.reorder(rows)
            history.reorder(rows)
        ids = torch.tensor(tokens, device=logits.device)
        history.add(ids)
        logits = session.next(ids)
    seconds = time.perf_counter() - started
    return [
        _result(hypothesis, sample, tokenizer, prompt, number, seconds, ends, echo=options.echo)
        for sample, hypothesis in enumerate(beams.finished[: options.n])
    ]


def _result(
    hypothesis: Hypothesis,
    sample: int,
    tokenizer: Tokenizer,
    prompt: Prompt,
    number: int,
    seconds: float,
    ends: frozenset[int],
    *,
    echo: bool,
) -> Generation:
    stream = TextStream(tokenizer, at_start=prompt.at_start)
    for token in hypothesis.ids:
        if token not in ends:
            stream.feed(token)
    stream.finish(cut=hypothesis.reason == "length")
    return Generation(
        text=(prompt.text if echo else "") + stream.text,
        token_ids=hypothesis.ids,
        prompt_tokens=len(prompt.ids),
        generated_tokens=len(hypothesis.ids),
        finish_reason=hypothesis.reason,
        logprobs=None,
        seconds=seconds,
        prompt=number,
        sample=sample,
        truncated=prompt.truncated,
        score=hypothesis.score,
    )
