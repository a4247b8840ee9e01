"""The decoding loop: batches of unequal prompts, one token per row and step, finished rows dropped.

What a sequence becomes depends on its prompt, the options, the seed and its sample number, and on nothing else in the
batch: positions and masks are per row, and every sequence draws from its own stream of random numbers. Beam search
has its own loop (beam.py). Left out: joining new requests to a running batch, which is the server's engine.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from headway.errors import ConfigError, HeadwayError, InputError
from headway.generation.beam import search
from headway.generation.guessing import Draft, Guesser, Guessing, Lookup
from headway.generation.options import GenerationOptions
from headway.generation.prompts import Prompt, PromptLike, check_can_generate, end_ids, prepare, shifted
from headway.generation.result import FinishReason, Generation, TokenLogprob, finite, nonfinite
from headway.generation.sampling import Sampler
from headway.generation.session import Memory, Session, inference
from headway.generation.stream import TextStream
from headway.nn.model import Transformer
from headway.nn.precision import wide
from headway.text.tokenizer import Tokenizer

OnText = Callable[[int, str], None]
"""Called with the place of a sequence in the result and the text that it grew by."""


def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: str | Sequence[PromptLike],
    options: GenerationOptions | None = None,
    on_text: OnText | None = None,
    *,
    on_error: Literal["raise", "return"] = "raise",
    memory: Memory | None = None,
    draft: Transformer | None = None,
) -> list[Generation]:
    """Continue prompts.

    Args:
        model: a decoder or an encoder-decoder; its mode and gradients are left as they were.
        tokenizer: the model's own.
        prompts: texts or lists of token ids; a single text is one prompt. User text can spell no control token.
        options: see GenerationOptions.
        on_text: receives whole characters as soon as they are certain; the pieces of a sequence joined are its text.
        on_error: a sequence whose logits are not numbers fails alone; "raise" raises its error when the others are
            done, "return" leaves it in the result with finish_reason "error".
        memory: of the same model; what the prompt has in common with the last one is not read again. For one prompt
            with one continuation: no beams, no echo.
        draft: a smaller decoder of the same tokenizer, which guesses `options.draft_tokens` at a time for a text of its
            own; it changes the speed and, but for rounding, nothing else.

    Returns:
        `options.n` results per prompt, in order.

    Raises:
        ConfigError: the model writes no text; a prompt does not fit the context. InputError: a prompt that is not
            text or valid ids. DivergedError: the model gave logits that are not numbers.
    """
    options = options or GenerationOptions()
    check_can_generate(model.config)
    vocab = min(model.config.vocab_size, tokenizer.vocab_size)
    ends = end_ids(model.config, tokenizer, options)
    options.check_vocabulary(vocab, ends)
    ready = _prepare_all(prompts, model, tokenizer, options)
    is_plain = len(ready) == options.n == options.beams == 1 and not (options.echo or options.context_shift)
    if memory is not None and not is_plain:
        found = "several sequences, an echo, or a context that shifts"
        raise ConfigError("memory", found, "one prompt, n=1, beams=1, echo=false, context_shift=false")
    if options.context_shift and model.is_pair:
        raise ConfigError("context_shift", "an encoder-decoder, whose answers end with its context", "a decoder")
    results: list[Generation] = []
    with inference(model):
        if options.beams > 1:
            results = _searched(model, tokenizer, ready, options, ends, on_text)
        else:
            numbered = list(enumerate(ready))
            size = max(options.batch_size // options.n, 1)
            for start in range(0, len(ready), size):
                group = numbered[start : start + size]
                results += _Batch(model, tokenizer, group, options, ends, on_text, memory, draft).run()
    if on_error == "raise":
        raise_failed(results)
    return results


def _searched(
    model: Transformer,
    tokenizer: Tokenizer,
    ready: Sequence[Prompt],
    options: GenerationOptions,
    ends: frozenset[int],
    on_text: OnText | None,
) -> list[Generation]:
    """The best beams of each prompt."""
    results: list[Generation] = []
    vocab = min(model.config.vocab_size, tokenizer.vocab_size)
    for number, prompt in enumerate(ready):
        session = Session(model, [prompt], vocab, kv_dtype=options.kv_dtype)
        results += search(session, tokenizer, prompt, number, options, ends)
    for place, result in enumerate(results):
        if on_text is not None and result.text:
            on_text(place, result.text)
    return results


def raise_failed(results: Sequence[Generation]) -> None:
    """Raise the first error among the results."""
    for result in results:
        if result.error is not None:
            raise result.error


def _prepare_all(prompts: object, model: Transformer, tokenizer: Tokenizer, options: GenerationOptions) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prepare(prompts, "prompt", model.config, tokenizer, options)]
    if not isinstance(prompts, Sequence) or not prompts:
        found = "null" if prompts is None else f"{prompts!r:.60}"
        raise InputError("prompts", found, "at least one text or list of token ids")
    return [
        prepare(prompt, f"prompts[{number}]", model.config, tokenizer, options) for number, prompt in enumerate(prompts)
    ]


class _Sequence:
    """One continuation while it grows."""

    def __init__(self, number: int, sample: int, prompt: Prompt, seed: int, stream: TextStream) -> None:
        self.number, self.sample, self.prompt, self.seed = number, sample, prompt, seed
        self.stream, self.ids = stream, list[int]()
        self.read = (prompt, 0)  # what the cache began with, and how many of the ids are in that
        self.logprobs: list[TokenLogprob] = []
        self.reason: FinishReason | None = None
        self.error: HeadwayError | None = None
        self.seconds = 0.0

    @property
    def said(self) -> list[int]:
        """The ids behind what the cache began with."""
        return self.ids[self.read[1] :]

    @property
    def length(self) -> int:
        """Tokens of the context that it fills."""
        return len(self.read[0].ids) + len(self.ids) - self.read[1]

    def take(self, token_id: int, ends: frozenset[int], min_tokens: int) -> str:
        """Append a token; returns the text that is now certain."""
        if token_id < 0:
            self.reason = "error"
            self.error = nonfinite(self.number, len(self.ids) + 1)
            return ""
        self.ids.append(token_id)
        if token_id in ends:
            self.reason = "stop"
            return self.stream.finish(cut=False)
        text = self.stream.feed(token_id, search=len(self.ids) > min_tokens)
        if self.stream.stopped:
            self.reason = "stop"
        elif len(self.ids) == self.prompt.room:
            self.reason = "length"
            text += self.stream.finish(cut=True)
        return text


class _Batch:
    """A group of prompts, n sequences of each, decoded together.

    Args:
        group: (number, prompt) pairs. ends: the tokens that end a text.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        group: Sequence[tuple[int, Prompt]],
        options: GenerationOptions,
        ends: frozenset[int],
        on_text: OnText | None,
        memory: Memory | None,
        draft: Transformer | None,
    ) -> None:
        self.started = time.perf_counter()
        self.options, self.ends, self.on_text, self.is_pair = options, ends, on_text, model.is_pair
        self.context = model.config.max_len
        vocab = min(model.config.vocab_size, tokenizer.vocab_size)
        self.prompts = [prompt for _, prompt in group]
        self.session, self.draft = Session(model, self.prompts, vocab, memory, options.kv_dtype), draft
        self.sequences = [
            _Sequence(
                number, sample, prompt, self._seed(), TextStream(tokenizer, options.stop, at_start=prompt.at_start)
            )
            for number, prompt in group
            for sample in range(options.n)
        ]
        seeds = [(sequence.seed, sequence.sample) for sequence in self.sequences]
        begin = [model.config.tokens.decoder_start or 0] if self.is_pair else None
        said = [begin or sequence.prompt.ids for sequence in self.sequences]
        self.sampler = Sampler(options, ends, said, seeds, vocab, next(model.parameters()))

    def _seed(self) -> int:
        return self.options.seed if self.options.seed is not None else secrets.randbits(63)

    def run(self) -> list[Generation]:
        """Decode until every row is finished."""
        logits_BTV = self.session.prefill(everywhere=self.options.echo and self.options.logprobs is not None)
        logits = self.session.last(logits_BTV)
        if self.options.echo:
            self._echo(logits_BTV)
        del logits_BTV
        if self.options.n > 1:
            rows = torch.arange(len(self.prompts), device=logits.device).repeat_interleave(self.options.n)
            self.session.reorder(rows)
            logits = logits[rows]
        active, read = self.sequences, self._reader()
        while True:
            ids = self.sampler.choose(logits)
            chosen = ids.tolist()
            if self.options.logprobs is not None:
                for sequence, row in zip(active, describe(logits, ids, self.options.logprobs), strict=True):
                    if row.token_id >= 0:
                        sequence.logprobs.append(row)
            kept = [place for place, sequence in enumerate(active) if self._advance(sequence, chosen[place])]
            if not kept:
                return [self._result(sequence) for sequence in self.sequences]
            if len(kept) < len(active):
                rows = torch.tensor(kept, device=ids.device)
                self.session.reorder(rows)
                self.sampler.reorder(rows)
                active, ids = [active[place] for place in kept], ids[rows]
            if self.options.context_shift and any(sequence.length >= self.context for sequence in active):
                logits = self._shift(active)
                read = self._reader()
            else:
                logits = read(ids)

    def _reader(self) -> Callable[[Tensor], Tensor]:
        """What reads the next tokens: the session, or somebody who guesses ahead in it."""
        guesser = self._guesser()
        if guesser is None:
            return self.session.next
        width = self.options.lookup if self.draft is None else self.options.draft_tokens
        return Guessing(self.session, guesser, width).next_of

    def _shift(self, active: Sequence[_Sequence]) -> Tensor:
        """Begin anew with what is left of each text: the logits behind it."""
        model, vocab = self.session.model, self.session.vocab
        self.prompts = [
            shifted(sequence.read[0], sequence.said, self.context, self.options.sinks) for sequence in active
        ]
        for sequence, prompt in zip(active, self.prompts, strict=True):
            sequence.read = (prompt, len(sequence.ids))
        self.session = Session(model, self.prompts, vocab, kv_dtype=self.options.kv_dtype)
        return self.session.last(self.session.prefill())

    def _guesser(self) -> Guesser | None:
        """Who guesses what this text goes on with."""
        if not self.session.can_forget:
            return None
        if self.draft is not None and not self.is_pair:
            return Draft(self.draft, self.prompts[0], self.session.vocab)
        return Lookup([*self.prompts[0].ids, *([0] if self.is_pair else [])]) if self.options.lookup else None

    def _advance(self, sequence: _Sequence, token_id: int) -> bool:
        """Give a sequence its token; False when that finished it."""
        text = sequence.take(token_id, self.ends, self.options.min_tokens)
        if text and self.on_text is not None:
            self.on_text(self._place(sequence), text)
        if sequence.reason is None:
            return True
        sequence.seconds = time.perf_counter() - self.started
        return False

    def _place(self, sequence: _Sequence) -> int:
        return sequence.number * self.options.n + sequence.sample

    def _echo(self, logits_BTV: Tensor) -> None:
        """Show the prompts, and describe their tokens when log-probabilities are wanted."""
        for sequence in self.sequences:
            if self.on_text is not None and sequence.prompt.text:
                self.on_text(self._place(sequence), sequence.prompt.text)
        if self.options.logprobs is None or self.is_pair:
            return
        for row, prompt in enumerate(self.prompts):
            ids = torch.tensor(prompt.ids[1:], device=logits_BTV.device)
            known = describe(logits_BTV[row, : len(ids)], ids, self.options.logprobs)
            for sequence in self.sequences[row * self.options.n : (row + 1) * self.options.n]:
                sequence.logprobs += [TokenLogprob(prompt.ids[0], None), *known]

    def _result(self, sequence: _Sequence) -> Generation:
        assert sequence.reason is not None
        prompt = sequence.prompt
        return Generation(
            text=(prompt.text if self.options.echo else "") + sequence.stream.text,
            token_ids=sequence.ids,
            prompt_tokens=len(prompt.ids),
            generated_tokens=len(sequence.ids),
            finish_reason=sequence.reason,
            logprobs=None if self.options.logprobs is None else sequence.logprobs,
            seconds=sequence.seconds,
            prompt=sequence.number,
            sample=sequence.sample,
            truncated=prompt.truncated,
            seed=None if self.options.is_greedy else sequence.seed,
            error=sequence.error,
        )


def describe(logits: Tensor, ids: Tensor, best: int) -> Iterator[TokenLogprob]:
    """The log-probability of each row's token and of the `best` most likely ones, of the model's own distribution.

    (N, V), (N,) -> N rows; a row without a token (-1) is described like token 0 with its id -1.
    """
    log_p = wide(logits).log_softmax(-1)
    own = log_p.gather(1, ids.clamp(min=0)[:, None])[:, 0].tolist()
    values, places = log_p.topk(min(best, log_p.shape[-1]), -1)
    for token_id, value, row, row_ids in zip(ids.tolist(), own, values.tolist(), places.tolist(), strict=True):
        top = tuple(zip(row_ids, map(finite, row), strict=True))
        yield TokenLogprob(token_id, finite(value), top)
