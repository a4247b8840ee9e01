"""How fast a model writes: the prompt's tokens a second, the new ones, and how near that is to the memory's limit."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from headway.config import ModelConfig
from headway.errors import ConfigError
from headway.generation.decode import generate
from headway.generation.options import GenerationOptions
from headway.nn.model import Transformer
from headway.text.tokenizer import Tokenizer


class Speed(NamedTuple):
    """Medians over rounds.

    Attributes:
        first_token_seconds: from the prompt to its first new token.
        prefill_tokens_per_second: prompt tokens over that time. decode_tokens_per_second: new tokens after the first,
            of all rows of the batch together.
        bytes_per_step: weights, keys and values that one step reads, at the mean length.
        spread: lowest and highest decode_tokens_per_second.
    """

    first_token_seconds: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    bytes_per_step: float
    spread: tuple[float, float]


def measure(
    model: Transformer,
    tokenizer: Tokenizer,
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 128,
    batch: int = 1,
    rounds: int = 5,
    progress: Callable[[int], None] | None = None,
) -> Speed:
    """Write greedily after random prompts, `rounds` times after a warm one.

    Args:
        model: a decoder or an encoder-decoder. tokenizer: its own. prompt_tokens, new_tokens: of each row.
        batch: rows. progress: told the number of rounds done.

    Raises ConfigError: lengths that do not fit the model.
    """
    if new_tokens < 2:
        raise ConfigError("--new-tokens", str(new_tokens), "at least 2")
    check_lengths(model.config, prompt_tokens, new_tokens)
    prompts = drawn(model, tokenizer, batch, prompt_tokens)

    def seconds(tokens: int) -> float:
        options = GenerationOptions(max_tokens=tokens, min_tokens=tokens, temperature=0.0, batch_size=batch)
        begin = time.perf_counter()
        generate(model, tokenizer, prompts, options)
        return time.perf_counter() - begin

    first, rates = [], []
    for done in range(rounds + 1):
        short, long = seconds(1), seconds(new_tokens)
        if done:
            first.append(short)
            rates.append(batch * (new_tokens - 1) / max(long - short, 1e-9))
        if progress is not None:
            progress(done)
    latency = statistics.median(first)
    length = prompt_tokens + new_tokens / 2
    return Speed(
        latency,
        batch * prompt_tokens / latency,
        statistics.median(rates),
        weight_bytes(model) + batch * length * _bytes_a_token(model),
        (min(rates), max(rates)),
    )


def check_lengths(config: ModelConfig, prompt_tokens: int, new_tokens: int) -> None:
    """Raise ConfigError for lengths that do not fit the model."""
    if min(prompt_tokens, new_tokens) < 1 or prompt_tokens + new_tokens > config.max_len:
        found = f"{prompt_tokens} and {new_tokens}"
        raise ConfigError("--prompt-tokens and --new-tokens", found, f"at least 1, together at most {config.max_len}")


def drawn(model: Transformer, tokenizer: Tokenizer, rows: int, length: int) -> list[list[int]]:
    """Random prompts, always the same."""
    known = min(model.config.vocab_size, tokenizer.vocab_size)  # a table may have more rows than there are tokens
    found: list[list[int]] = torch.randint(known, (rows, length), generator=torch.Generator().manual_seed(0)).tolist()
    return found


def weight_bytes(model: Transformer) -> int:
    """What one step reads of the weights: all but the tables of which it takes a row."""
    stack = [model.decoder or model.encoder, model.head]
    read = {t.data_ptr(): t.nbytes for part in stack if part is not None for t in [*part.parameters(), *part.buffers()]}
    return sum(read.values())


def _bytes_a_token(model: Transformer) -> int:
    """Keys and values of one token through all layers."""
    cache = model.new_cache(1, 2)
    return sum(tensor[:, :, :, 0].nbytes for slots in cache.groups.values() for tensor in slots.tensors)
