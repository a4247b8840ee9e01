"""Small models and tokenizers that the tests of generation share."""

from __future__ import annotations

import functools
from typing import Any

import torch

from headway.config import ModelConfig
from headway.nn import Transformer
from headway.text import Tokenizer, train_tokenizer


@functools.cache
def byte_tokenizer() -> Tokenizer:
    """256 bytes and <|endoftext|>, which is id 256 and ends a text."""
    return train_tokenizer(["any text"], "byte", 257)


def toy_config(**fields: Any) -> ModelConfig:
    base: dict[str, Any] = {
        "d_model": 16,
        "n_layers": 2,
        "n_heads": 2,
        "vocab_size": 257,
        "max_len": 64,
        # Wider than a trained start, so that the distributions are far from uniform and differ from place to place.
        "init": {"std": 0.4},
    }
    return ModelConfig(**{**base, **fields})


def toy_model(seed: int = 0, **fields: Any) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(toy_config(**fields)).double().eval()


class Scripted(Transformer):
    """A decoder that says a fixed text whatever it reads: place i of the answer is script[i].

    `start` is the length of the prompt. After the script it says its last token.
    """

    def __init__(self, script: list[int], start: int, vocab_size: int = 257) -> None:
        super().__init__(toy_config(vocab_size=vocab_size, max_len=512))
        self.script, self.start = script, start

    def forward(self, *args: Any, **fields: Any) -> Any:
        cache = fields["cache"]
        out = super().forward(*args, **fields)
        T = out.logits.shape[1]
        logits = torch.zeros_like(out.logits)
        for place in range(T):
            said = int(cache.lengths[0]) - T + place + 1 - self.start
            logits[:, place, self.script[min(max(said, 0), len(self.script) - 1)]] = 20.0
        return out._replace(logits=logits)
