"""A prompt as the user gives it becomes token ids that fit the model, or one sentence that says why not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headway.config import CausalLM, ModelConfig
from headway.errors import ConfigError, InputError
from headway.generation.options import GenerationOptions
from headway.text.tokenizer import Tokenizer

PromptLike = str | Sequence[int]


@dataclass(frozen=True)
class Prompt:
    """ids: what the model reads. text: what `echo` shows. room: new tokens that fit. truncated: tokens dropped.

    at_start: no token of text stands before the first generated one.
    """

    ids: list[int]
    text: str
    room: int
    truncated: int = 0
    at_start: bool = False


def shifted(prompt: Prompt, said: list[int], context: int, sinks: int) -> Prompt:
    """What is read again where a text has filled its context: its first tokens, on which attention rests
    (arXiv:2309.17453), and its end, half of the context in all. A text that has room is read as it is."""
    ids, half = [*prompt.ids, *said], max(context // 2, 1)
    if len(ids) >= context:
        first = min(sinks, half - 1)
        ids = ids[:first] + ids[len(ids) - half + first :]
    return Prompt(ids, "", prompt.room - len(said))


def check_can_generate(config: ModelConfig) -> None:
    """Raise ConfigError for a model that does not write text, saying what it is for."""
    if config.kind in ("encoder", "vision"):
        use = {"encoder": "headway embed, or headway generate --fill-mask 5", "vision": "its class logits"}[config.kind]
        raise ConfigError(
            "kind", f"{config.kind}: encoder-only, it writes no text", "a decoder or an encoder-decoder", f"use {use}"
        )
    if not isinstance(config.head, CausalLM):
        raise ConfigError("head", f"{config.head.type} gives no next token", "a model with head causal-lm")
    if config.kind == "encoder-decoder" and config.tokens.decoder_start is None:
        raise ConfigError(
            "kind and tokens.decoder_start",
            "an encoder-decoder without the token that begins its answers",
            "its id",
            "tokens.decoder_start=0",
        )


def end_ids(config: ModelConfig, tokenizer: Tokenizer, options: GenerationOptions) -> frozenset[int]:
    """The tokens that end a text: the model's end token (else the tokenizer's) and the user's stop_ids."""
    eos = config.tokens.eos if config.tokens.eos is not None else tokenizer.eos_id
    # A tokenizer's end token beyond the model's table can never be said.
    own = () if options.ignore_eos or eos is None or eos >= config.vocab_size else (eos, *config.tokens.ends)
    return frozenset((*own, *options.stop_ids))


def prepare(
    prompt: object, where: str, config: ModelConfig, tokenizer: Tokenizer, options: GenerationOptions
) -> Prompt:
    """Encode and check one prompt, a text or token ids.

    An empty prompt starts from the begin token; without one from the end token, which in training stands between
    documents and so is followed by a beginning.

    Raises:
        InputError: not a text or ids, ids out of range. ConfigError: longer than the context.
    """
    begin = next((i for i in (config.tokens.bos, tokenizer.bos_id) if i is not None), None)
    ids = _encode(prompt, where, min(config.vocab_size, tokenizer.vocab_size), tokenizer)
    text = prompt if isinstance(prompt, str) else tokenizer.decode(ids)
    # An end token is what precedes a text in training: the text after it is at a beginning too.
    at_start = all(i in tokenizer.special_ids for i in ids)
    if options.add_bos:
        if begin is None:
            raise ConfigError("add_bos", "neither model nor tokenizer has a begin token", "", "add_bos=false")
        ids = [begin, *ids]
    if not ids:
        start = next((i for i in (begin, config.tokens.eos, tokenizer.eos_id) if i is not None), None)
        if start is None:
            raise InputError(where, "empty, and the model has no begin or end token to start from", "some text")
        ids = [start]
    return _fit(Prompt(ids, text, 0, at_start=at_start), where, config, options)


def _encode(prompt: object, where: str, vocab: int, tokenizer: Tokenizer) -> list[int]:
    if isinstance(prompt, str):
        ids = tokenizer.encode(prompt)
        for token_id in ids:
            if token_id >= vocab:
                found = f"token id {token_id} of the tokenizer"
                raise InputError(where, found, f"ids below the model's vocab_size {vocab}", "the model's own tokenizer")
        return ids
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray):
        shown = "null" if prompt is None else f"{prompt!r:.60} ({type(prompt).__name__})"
        raise InputError(where, shown, "text or a list of token ids")
    for place, token_id in enumerate(prompt):
        # type() and not isinstance(): True is an int.
        if type(token_id) is not int or not 0 <= token_id < vocab:
            found = f"{token_id!r:.60} ({type(token_id).__name__})"
            raise InputError(f"{where}[{place}]", found, f"a token id from 0 to {vocab - 1}")
    return list(prompt)


def _fit(prompt: Prompt, where: str, config: ModelConfig, options: GenerationOptions) -> Prompt:
    """Check against the context, or cut on request. Prompt and continuation share a decoder's context."""
    is_pair = config.kind == "encoder-decoder"
    context = config.max_len
    longest = context if is_pair else context - 1  # one place must remain for an answer
    ids, dropped = prompt.ids, 0
    if len(ids) > longest:
        if options.truncate == "error":
            raise ConfigError(
                where,
                f"{len(ids)} tokens in a context of {context}",
                f"at most {longest}",
                "a shorter prompt, or truncate=left (--truncate left) to drop its beginning",
            )
        # The answer gets its max_tokens as long as half of the context stays with the prompt.
        kept = longest if is_pair else max(context - options.max_tokens, context // 2, 1)
        head = ids[:1] if options.add_bos and kept > 1 else []
        dropped = len(ids) - kept
        ids = head + ids[len(ids) - kept + len(head) :]
    left = context if is_pair else context - len(ids)
    room = options.max_tokens if options.context_shift else min(options.max_tokens, left)
    return Prompt(ids, prompt.text, room, dropped, prompt.at_start)
