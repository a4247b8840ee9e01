"""Speech as text: an encoder-decoder with an audio front end reads 30 seconds at a time (Whisper, arXiv:2212.04356)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from headway.errors import ConfigError, InputError
from headway.generation.session import inference
from headway.nn import Transformer
from headway.text import Tokenizer

MAX_TOKENS = 224  # half of Whisper's context, as its authors decode (arXiv:2212.04356, section 2.3)


def decoder_prefix(tokenizer: Tokenizer, raw: Mapping[str, Any], start: int, language: str | None = None) -> list[int]:
    """The ids an answer begins with: the start, what the model's config forces, or language, task and no timestamps.

    Raises ConfigError for a language that the tokenizer has no token for; InputError for forced ids that are none.
    """
    forced = raw.get("forced_decoder_ids")
    if language is None and forced:
        if not isinstance(forced, list) or not all(_is_forced(pair, tokenizer.vocab_size) for pair in forced):
            found = repr(forced)[:80]
            raise InputError("config.json forced_decoder_ids", found, "pairs of a place and the id of a token")
        ids = {place: token_id for place, token_id in forced if token_id is not None}
        return [start, *(ids[place] for place in sorted(ids))]
    names = [f"<|{language}|>", "<|transcribe|>"] if language is not None else []
    named = [tokenizer.special_id(name) for name in (*names, "<|notimestamps|>")]
    if None in named[: len(names)]:
        raise ConfigError("language", repr(language), "a code that the model knows, such as en")
    return [start, *(token_id for token_id in named if token_id is not None)]


def _is_forced(pair: object, vocab: int) -> bool:
    """[place, token id]; null for an id that the model chooses itself."""
    if not isinstance(pair, list) or len(pair) != 2 or type(pair[0]) is not int:
        return False
    return pair[1] is None or (type(pair[1]) is int and 0 <= pair[1] < vocab)


def named_ids(raw: Mapping[str, Any], name: str) -> list[int]:
    """The token ids that a published config lists under a key, none where it has no such key. Raises InputError."""
    value = raw.get(name) or []
    if not isinstance(value, list) or not all(type(token_id) is int for token_id in value):
        raise InputError(f"config.json {name}", repr(value)[:80], "a list of token ids")
    return value


def transcribe(
    model: Transformer,
    tokenizer: Tokenizer,
    features: Tensor,
    *,
    prefix: Sequence[int],
    banned: Sequence[int] = (),
    banned_first: Sequence[int] = (),
    max_tokens: int = MAX_TOKENS,
) -> list[int]:
    """The most likely token at each place, up to the end token, for one spectrogram (bins, frames).

    Args:
        prefix: ids the decoder is given. banned: ids never written; banned_first: nor as the first.

    Raises ConfigError: a model without an audio front end.
    """
    config = model.config
    if config.embeddings.audio is None:
        raise ConfigError("kind", f"{config.kind} without an audio front end hears nothing", "a Whisper model")
    parameter = next(model.parameters())
    frames = features[None].to(parameter.device, parameter.dtype)
    room = min(max_tokens, config.max_len - len(prefix))
    cache = model.new_cache(1, len(prefix) + room)
    cache.last_only = True
    ends = {config.tokens.eos, *config.tokens.ends}
    never, not_first = ([i for i in some if 0 <= i < tokenizer.vocab_size] for some in (banned, banned_first))
    ids, given = torch.tensor([list(prefix)], device=parameter.device), {"input_features": frames}
    out: list[int] = []
    with inference(model):
        for _ in range(room):
            logits = model(**given, decoder_input_ids=ids, cache=cache).logits[0, -1, : tokenizer.vocab_size].float()
            logits[[*never, *(not_first if not out else ())]] = float("-inf")
            token_id = int(logits.argmax())
            if token_id in ends:
                break
            out.append(token_id)
            ids, given = torch.tensor([[token_id]], device=parameter.device), {}
    return out
