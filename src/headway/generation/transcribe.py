"""Speech as text: an encoder-decoder with an audio front end reads 30 seconds at a time (Whisper, arXiv:2212.04356)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from headway.errors import ConfigError
from headway.generation.session import inference
from headway.nn import Transformer
from headway.text import Tokenizer

MAX_TOKENS = 224  # half of Whisper's context, as its authors decode (arXiv:2212.04356, section 2.3)


def decoder_prefix(tokenizer: Tokenizer, raw: Mapping[str, Any], start: int, language: str | None = None) -> list[int]:
    """The ids an answer begins with: the start, what the model's config forces, or language, task and no timestamps.

    Raises ConfigError for a language that the tokenizer has no token for.
    """
    forced = raw.get("forced_decoder_ids")
    if language is None and forced:
        return [start, *(token_id for _, token_id in sorted(forced) if token_id is not None)]
    names = [f"<|{language}|>", "<|transcribe|>"] if language is not None else []
    ids = [tokenizer.special_id(name) for name in (*names, "<|notimestamps|>")]
    if None in ids[: len(names)]:
        raise ConfigError("language", repr(language), "a code that the model knows, such as en")
    return [start, *(token_id for token_id in ids if token_id is not None)]


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
    ids, given = torch.tensor([list(prefix)], device=parameter.device), {"input_features": frames}
    out: list[int] = []
    with inference(model):
        for _ in range(room):
            logits = model(**given, decoder_input_ids=ids, cache=cache).logits[0, -1, : tokenizer.vocab_size].float()
            logits[[*banned, *(banned_first if not out else ())]] = float("-inf")
            token_id = int(logits.argmax())
            if token_id in ends:
                break
            out.append(token_id)
            ids, given = torch.tensor([[token_id]], device=parameter.device), {}
    return out
