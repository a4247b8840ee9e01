"""The objectives on running text: windows of it, in which something is to be foretold or filled in.

Each is a pure function of windows (B, T) and a generator, so that a batch's number is all there is to know of it: the
training side draws fresh holes for each batch (or, `static`, the same for each window), the held-out side has the same
ones every time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import count

import numpy as np
import torch
from torch import Tensor

from headway import run_config as rc
from headway.config import ModelConfig
from headway.data.batches import Batch, Windows, evaluation_batches, hashed_uniform
from headway.data.corrupt import TokenFlags, corrupt_spans, infill, mask_tokens, padded, span_counts, text_length
from headway.data.store import TokenStore
from headway.errors import ConfigError
from headway.text.tokenizer import Tokenizer
from headway.training.objectives import TrainingBatch

Corrupt = Callable[[Batch, np.random.Generator], Mapping[str, Tensor]]
SENTINELS = tuple(f"<extra_id_{number}>" for number in range(100))
NEEDED: Mapping[str, tuple[str, ...]] = {
    "masked-lm": ("<mask>",),
    "span-corruption": SENTINELS,
    "denoising": ("<mask>",),
}
"""Special tokens that a new tokenizer gets for an objective."""


def needs_mask(tokenizer: Tokenizer, objective: str) -> int:
    """The mask token's id. Raises ConfigError for a tokenizer without one."""
    if tokenizer.mask_id is None:
        fix = 'a tokenizer with a mask token; a new one gets it by tokenizer.special_tokens=["<|endoftext|>","<mask>"]'
        raise ConfigError("objective and tokenizer", f"{objective} with a tokenizer without a mask token", "one", fix)
    return tokenizer.mask_id


def sentinels(tokenizer: Tokenizer) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The ids of `<extra_id_0>` onwards, as far as they go. Raises ConfigError if there are none."""
    found = [tokenizer.special_id(name) for name in SENTINELS]
    known = [number for number in found if number is not None]
    if not known:
        found_here = "span-corruption with a tokenizer without <extra_id_0>"
        raise ConfigError("objective and tokenizer", found_here, "T5's sentinels among the special tokens")
    return np.array(known, dtype=np.int64)


def window_of(objective: rc.Objective, context: int) -> int:
    """Tokens of text in a window whose corrupted form has at most `context` positions."""
    if isinstance(objective, rc.SpanCorruption):
        return text_length(context, objective.rate, objective.mean_span)
    return context - 1 if isinstance(objective, rc.Denoising) else context  # the target is the text and an end token


def target_of(objective: rc.Objective, context: int) -> int:
    """Positions of the longest target: what an encoder-decoder's decoder must hold."""
    if isinstance(objective, rc.SpanCorruption):
        return sum(span_counts(window_of(objective, context), objective.rate, objective.mean_span)) + 1
    return context


def corruption(objective: rc.Objective, tokenizer: Tokenizer) -> Corrupt | None:
    """How a window becomes inputs and labels; None where the window itself is the example.

    Raises ConfigError where the tokenizer lacks what the objective needs.
    """
    match objective:
        case rc.MaskedLM():
            mask = needs_mask(tokenizer, objective.type)
            return partial(_masked, objective, TokenFlags.of(tokenizer), mask)
        case rc.SpanCorruption():
            return partial(_spans, objective, sentinels(tokenizer), _end(tokenizer))
        case rc.Denoising():
            mask = needs_mask(tokenizer, objective.type)
            return partial(_infilled, objective, TokenFlags.of(tokenizer), mask, _end(tokenizer))
    return None


def _end(tokenizer: Tokenizer) -> int:
    if tokenizer.eos_id is None:
        raise ConfigError("objective and tokenizer", "a tokenizer without an end token", "one that closes a target")
    return tokenizer.eos_id


def _masked(
    objective: rc.MaskedLM, flags: TokenFlags, mask: int, batch: Batch, rng: np.random.Generator
) -> Mapping[str, Tensor]:
    text = batch.input_ids.numpy()
    places = np.array(batch.sample_ids)[:, None] + np.arange(text.shape[1])
    uses = count()
    inputs, labels = mask_tokens(
        text,
        flags,
        mask,
        (lambda: hashed_uniform(places, next(uses))) if objective.static else (lambda: rng.random(text.shape)),
        rate=objective.rate,
        whole_words=objective.whole_words,
        replace=objective.replace,
    )
    found = {"input_ids": torch.from_numpy(inputs), "labels": torch.from_numpy(labels)}
    return found if batch.documents is None else {**found, "documents": batch.documents}


def _spans(
    objective: rc.SpanCorruption,
    ids: np.ndarray[tuple[int], np.dtype[np.int64]],
    end: int,
    batch: Batch,
    rng: np.random.Generator,
) -> Mapping[str, Tensor]:
    needed = span_counts(batch.input_ids.shape[1], objective.rate, objective.mean_span)[1]
    if needed > len(ids):
        fix = f"data.context={batch.input_ids.shape[1] * len(ids) // needed}, or longer spans"
        raise ConfigError("objective and data.context", f"{needed} spans a window", f"{len(ids)} sentinels", fix)
    how = {"rate": objective.rate, "mean_span": objective.mean_span}
    inputs, labels = corrupt_spans(batch.input_ids.numpy(), ids, end, rng, **how)
    return {"input_ids": torch.from_numpy(inputs), "labels": torch.from_numpy(labels)}


def _infilled(
    objective: rc.Denoising, flags: TokenFlags, mask: int, end: int, batch: Batch, rng: np.random.Generator
) -> Mapping[str, Tensor]:
    text = batch.input_ids.numpy()
    how = {"rate": objective.rate, "mean_span": objective.mean_span, "shuffle": objective.shuffle}
    rows = [row[: text.shape[1]] for row in infill(text, flags, mask, rng, **how)]  # type: ignore[arg-type]  # a dict
    table, real = padded(rows, end)
    labels = np.concatenate([text, np.full((len(text), 1), end)], 1)
    return {
        "input_ids": torch.from_numpy(table),
        "attention_mask": torch.from_numpy(real),
        "labels": torch.from_numpy(labels),
    }


class CorruptedWindows:
    """Batches of windows, each corrupted by a generator that its number names."""

    def __init__(self, batches: Windows, corrupt: Corrupt, tokenizer_hash: str) -> None:
        self._batches, self._corrupt = batches, corrupt
        self.identity: Mapping[str, str] = {"data": batches.hash, "tokenizer": tokenizer_hash}

    def batch(self, cursor: int) -> TrainingBatch:
        """Batch number `cursor`."""
        rows = self._batches.batch(cursor)
        # Philox is counter-based: every key is a stream of its own.
        rng = np.random.Generator(np.random.Philox(key=[self._batches.seed, cursor]))
        return TrainingBatch(self._corrupt(rows, rng), rows.sample_ids)


def corrupted_evaluation(
    store: TokenStore, window: int, batch_size: int, limit: int, isolate: bool, corrupt: Corrupt
) -> Iterator[TrainingBatch]:
    """The same windows with the same holes every time; the text's last, incomplete window is left out."""
    size = (len(store.tokens) - 1) // window * window + 1
    whole = replace(store, tokens=store.tokens[:size], ends=np.append(store.ends[store.ends < size], size))
    for number, batch in enumerate(evaluation_batches(whole, window, batch_size, limit, isolate)):
        yield TrainingBatch(corrupt(batch, np.random.Generator(np.random.Philox(key=number))), batch.sample_ids)


def special_tokens_for(objective: rc.Objective, given: tuple[str, ...]) -> tuple[str, ...]:
    """What a new tokenizer must hold: the user's special tokens and the objective's."""
    return (*given, *(name for name in NEEDED.get(objective.type, ()) if name not in given))


def head_for(objective: rc.Objective) -> str:
    """The head of a new model for running text."""
    return "masked-lm" if isinstance(objective, rc.MaskedLM) else "causal-lm"


def check_objective(objective: rc.Objective, config: ModelConfig) -> None:
    """Objective, kind and head go together. Raises ConfigError."""
    kinds = {"causal-lm": "decoder", "masked-lm": "encoder"}
    wanted = kinds.get(objective.type, "encoder-decoder")
    if config.kind != wanted or config.head.type != head_for(objective):
        found = f"{objective.type} with kind {config.kind} and head {config.head.type}"
        raise ConfigError("objective and model.kind", found, f"kind {wanted} with head {head_for(objective)}")
