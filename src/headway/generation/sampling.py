"""From logits to a token: small pure functions over (B, V), composed as a list.

The order and the meaning are those of GenerationOptions; each function is left out of the list where its option is
neutral, so greedy decoding is an argmax and nothing else. Filters set logits to -inf and always keep the most likely
token. Oracles in the tests: transformers' warpers, and the formulas in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from headway.generation.options import GenerationOptions
from headway.nn.precision import wide

NOTHING = float("-inf")
_BLOCK = 128  # uniforms drawn at once per sequence: one call into the generator per 128 tokens


class History:
    """What was said so far, kept only for the options that ask.

    seen: (B, V) bool, tokens of prompt and continuation. counts: (B, V), occurrences in the continuation.
    step: tokens generated.
    """

    def __init__(self, options: GenerationOptions, prompts: Sequence[Sequence[int]], vocab: int, like: Tensor) -> None:
        self.step = 0
        self.seen: Tensor | None = None
        self.counts: Tensor | None = None
        if options.repetition_penalty != 1:
            self.seen = torch.zeros(len(prompts), vocab, dtype=torch.bool, device=like.device)
            for row, prompt in enumerate(prompts):
                self.seen[row, [token for token in prompt if token < vocab]] = True
        if options.presence_penalty or options.frequency_penalty:
            self.counts = torch.zeros(len(prompts), vocab, device=like.device)

    def add(self, ids_B: Tensor) -> None:
        """Append one token per row."""
        self.step += 1
        if self.seen is not None:
            self.seen.scatter_(1, ids_B[:, None], True)
        if self.counts is not None:
            self.counts.scatter_add_(1, ids_B[:, None], torch.ones_like(ids_B[:, None], dtype=self.counts.dtype))

    def reorder(self, rows: Tensor) -> None:
        """Row i becomes a copy of row rows[i]."""
        self.seen = None if self.seen is None else self.seen[rows]
        self.counts = None if self.counts is None else self.counts[rows]


Process = Callable[[Tensor, History], Tensor]
Filter = Callable[[Tensor], Tensor]


# --- adjustments: they change what the model says ------------------------------------------------------------------


def repeat_less(logits: Tensor, history: History, penalty: float) -> Tensor:
    """Divide positive and multiply negative logits of tokens that were seen (arXiv:1909.05858, section 4.1)."""
    assert history.seen is not None
    return torch.where(history.seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def vary(logits: Tensor, history: History, presence: float, frequency: float) -> Tensor:
    """logit - presence * [count > 0] - frequency * count, counts of the continuation (OpenAI's API reference)."""
    assert history.counts is not None
    return logits - presence * (history.counts > 0).to(logits.dtype) - frequency * history.counts.to(logits.dtype)


def add_bias(logits: Tensor, _: History, ids: Tensor, values: Tensor) -> Tensor:
    """Add a value to some ids. ids, values: (k,)."""
    return logits.index_add(1, ids, values.to(logits.dtype).expand(len(logits), -1))


def forbid_until(logits: Tensor, history: History, ids: Tensor, step: int) -> Tensor:
    """Rule out ids until `step` tokens are there."""
    return logits if history.step >= step else logits.index_fill(1, ids, NOTHING)


def adjustments(options: GenerationOptions, end_ids: Iterable[int], like: Tensor) -> list[Process]:
    """The active adjustments, in order."""
    steps: list[Process] = []

    def ids(values: Iterable[int]) -> Tensor:
        return torch.tensor(sorted(values), dtype=torch.long, device=like.device)

    if options.repetition_penalty != 1:
        steps.append(partial(repeat_less, penalty=options.repetition_penalty))
    if options.presence_penalty or options.frequency_penalty:
        steps.append(partial(vary, presence=options.presence_penalty, frequency=options.frequency_penalty))
    if options.logit_bias:
        values = torch.tensor([options.logit_bias[key] for key in sorted(options.logit_bias)], device=like.device)
        steps.append(partial(add_bias, ids=ids(options.logit_bias), values=values))
    ending = set(end_ids)
    if options.min_tokens and ending:
        steps.append(partial(forbid_until, ids=ids(ending), step=options.min_tokens))
    return steps


# --- filters: they take candidates away ----------------------------------------------------------------------------


def temper(logits: Tensor, temperature: float) -> Tensor:
    """logits / temperature: below 1 sharper, above 1 flatter."""
    return logits / temperature


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """The k most likely tokens (and those that tie with the last of them)."""
    if k >= logits.shape[-1]:
        return logits
    return logits.masked_fill(logits < logits.topk(k, -1).values[:, -1:], NOTHING)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """The smallest set of most likely tokens whose probability reaches p (arXiv:1904.09751)."""
    ordered, index = logits.sort(-1, descending=True)
    probabilities = ordered.softmax(-1)
    drop = probabilities.cumsum(-1) - probabilities >= p  # enough was there before this one
    drop[:, 0] = False
    return logits.masked_fill(drop.gather(-1, index.argsort(-1)), NOTHING)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Tokens at least p times as likely as the most likely one (arXiv:2407.01082)."""
    probabilities = logits.softmax(-1)
    return logits.masked_fill(probabilities < p * probabilities.amax(-1, keepdim=True), NOTHING)


def keep_typical(logits: Tensor, mass: float) -> Tensor:
    """The tokens whose surprise is closest to the entropy, until `mass` is reached (arXiv:2202.00666)."""
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    entropy = -(log_p * p).nansum(-1, keepdim=True)
    distance, index = (-log_p - entropy).abs().sort(-1)
    before = (p.gather(-1, index).cumsum(-1) < mass).sum(-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
    return logits.masked_fill((-log_p - entropy).abs() > distance.gather(-1, before), NOTHING)


def filters(options: GenerationOptions) -> list[Filter]:
    """The active filters, in order; none of them changes which token is the most likely."""
    steps: list[Filter] = []
    if options.temperature != 1:
        steps.append(partial(temper, temperature=options.temperature))
    if options.top_k:
        steps.append(partial(keep_top_k, k=options.top_k))
    if options.top_p < 1:
        steps.append(partial(keep_top_p, p=options.top_p))
    if options.min_p > 0:
        steps.append(partial(keep_min_p, p=options.min_p))
    if options.typical_p < 1:
        steps.append(partial(keep_typical, mass=options.typical_p))
    return steps


# --- the choice ----------------------------------------------------------------------------------------------------


def pick(logits: Tensor, uniform_B: Tensor) -> Tensor:
    """The token at which the cumulative probability passes a uniform number. (B, V), (B,) in [0, 1) -> (B,).

    One number per token and row makes a sequence's text independent of its neighbours in the batch. The sum runs in
    float64: over 50,000 float32 terms it would drift by more than a rare token's share.
    """
    cumulative = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    # Kept below the total by 1e-12, so that rounding cannot step over the last candidate.
    target = uniform_B[:, None] * cumulative[:, -1:] * (1 - 1e-12)
    chosen = torch.searchsorted(cumulative, target, right=True)[:, 0]
    return chosen.clamp(max=logits.shape[-1] - 1)  # only a row of NaN reaches the end


def _largest(logits: Tensor) -> tuple[list[float], Tensor]:
    """The largest logit of each row, NaN if there is one, and where it first stands. (B, V) -> B numbers, (B,)."""
    if not logits.is_cpu or logits.dtype != torch.float32:
        values, ids = logits.max(-1)
        return values.tolist(), ids
    numbers = logits.numpy()
    places = numbers.argmax(-1)  # which is vectorised, unlike torch's
    best = [numbers.item(row, place) for row, place in enumerate(places.tolist())]
    return best, torch.from_numpy(places)


class Sampler:
    """Chooses a token per row, step by step.

    Args:
        options: what to do. end_ids: the tokens that end a text. prompts: token ids per row. seeds: (seed, sample) per
            row, the key of its random numbers. vocab: how many logits count. like: a tensor on the right device.
    """

    def __init__(
        self,
        options: GenerationOptions,
        end_ids: Iterable[int],
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[tuple[int, int]],
        vocab: int,
        like: Tensor,
    ) -> None:
        self.history = History(options, prompts, vocab, like)
        self._end_ids = frozenset(end_ids)
        self.adjustments = adjustments(options, self._end_ids, like)
        self._only_forbids = all(isinstance(step, partial) and step.func is forbid_until for step in self.adjustments)
        self.filters = filters(options)
        self.is_greedy = options.is_greedy
        # Philox is a counter keyed by (seed, sample): nearby seeds give unrelated streams, on every device the same.
        self._streams = [np.random.Generator(np.random.Philox(key=list(key))) for key in seeds]
        self._uniforms = torch.empty(0)
        self._device = like.device

    def choose(self, logits: Tensor) -> Tensor:
        """(B, V) -> (B,) token ids, -1 for rows whose logits are not numbers; the history grows by them."""
        best, ids = _largest(logits)
        if not self._is_settled(ids):
            ids = self._process(wide(logits))
        self.history.add(ids)
        is_finite = list(map(math.isfinite, best))  # a NaN or +inf anywhere is the maximum
        return ids if all(is_finite) else torch.where(torch.tensor(is_finite, device=ids.device), ids, -1)

    def _is_settled(self, ids: Tensor) -> bool:
        """Whether the most likely tokens are the choice: nothing but ends is ruled out, and none of them is one."""
        if not self.is_greedy:
            return False
        return not self.adjustments or (self._only_forbids and self._end_ids.isdisjoint(ids.tolist()))

    def _process(self, logits: Tensor) -> Tensor:
        for adjust in self.adjustments:
            logits = adjust(logits, self.history)
        if self.is_greedy:
            return _largest(logits)[1]
        for keep in self.filters:
            logits = keep(logits)
        return pick(logits, self._next_uniforms())

    def _next_uniforms(self) -> Tensor:
        place = self.history.step % _BLOCK
        if place == 0:
            drawn = np.stack([stream.random(_BLOCK) for stream in self._streams])
            self._uniforms = torch.from_numpy(drawn).to(self._device)
        return self._uniforms[:, place]

    def reorder(self, rows: Tensor) -> None:
        """Keep only some rows."""
        self.history.reorder(rows)
        if not self.is_greedy:
            self._streams = [self._streams[row] for row in rows.tolist()]
            self._uniforms = self._uniforms[rows] if len(self._uniforms) else self._uniforms
