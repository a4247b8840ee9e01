"""What an encoder reads into the gaps of a text: the likeliest tokens at each mask."""

from __future__ import annotations

from typing import NamedTuple

import torch

from headway.config import MaskedLM, ModelConfig
from headway.errors import ConfigError, InputError
from headway.generation.session import inference
from headway.nn import Transformer
from headway.nn.precision import wide
from headway.text import Tokenizer


class Guess(NamedTuple):
    """One candidate for one gap: its id, its text, its probability, and the text with it in place, other gaps open."""

    token_id: int
    token: str
    probability: float
    text: str


def fill_mask(model: Transformer, tokenizer: Tokenizer, text: str, *, top: int = 5) -> list[list[Guess]]:
    """The `top` likeliest tokens at each mask of `text`, most likely first; one list per mask, from left to right.

    The mask is the tokenizer's own, such as `[MASK]` or `<mask>`; every other special token's name is plain text.

    Raises:
        ConfigError: a model without a masked-lm head, or a tokenizer without a mask. InputError: no mask in the text,
        or a text longer than the model's context.
    """
    check_can_fill(model.config)
    if top < 1:
        raise ConfigError("top", repr(top)[:80], "1 candidate or more")
    if tokenizer.mask_id is None:
        raise ConfigError("tokenizer", "no mask token", "a tokenizer with one")
    mask = str(tokenizer.token(tokenizer.mask_id))
    parts = text.split(mask)
    if len(parts) == 1:
        raise InputError("text", "no mask in it", f"{mask} where a word is missing")
    segments: list[tuple[str, bool]] = []
    for part in parts[:-1]:
        kept = part.rstrip()  # what RoBERTa's mask swallows (lstrip in its file) must stand beside it
        segments += [(kept, False), (part[len(kept) :] + mask, True)]
    segments.append((parts[-1], False))
    ids = [*tokenizer.prefix_ids, *tokenizer.encode_segments(segments), *tokenizer.suffix_ids]
    if len(ids) > model.config.max_len:
        raise InputError("text", f"{len(ids)} tokens", f"at most {model.config.max_len}, the model's context")
    row = torch.tensor([ids], device=next(model.parameters()).device)
    with inference(model):
        logits = model(row).logits[0, :, : tokenizer.vocab_size]
    places = [place for place, token_id in enumerate(ids) if token_id == tokenizer.mask_id]
    begin, end = len(tokenizer.prefix_ids), len(ids) - len(tokenizer.suffix_ids)
    out = []
    for place in places:
        values, found = wide(logits[place]).softmax(-1).topk(min(top, logits.shape[-1]))
        best = zip(found.tolist(), values.tolist(), strict=True)
        whole = [(token_id, p, [*ids[begin:place], token_id, *ids[place + 1 : end]]) for token_id, p in best]
        shown = [(i, p, tokenizer.decode(row, skip_special=False)) for i, p, row in whole]
        out.append([Guess(i, str(tokenizer.token(i) or ""), p, text) for i, p, text in shown])
    return out


def check_can_fill(config: ModelConfig) -> None:
    """Refuse models without a masked-lm head. Raises ConfigError."""
    if not isinstance(config.head, MaskedLM):
        raise ConfigError("head", f"{config.head.type} fills no gaps", "an encoder with head masked-lm")
