"""Perplexity and bits per byte of a decoder on documents.

    document   a b c d e f g h        context 4, stride 2: each token is scored once,
    window 1   a B C D                with context - stride tokens or more before it
    window 2       c d E F            wherever the document has them (capital: scored)
    window 3           e f G H

Perplexity is exp(nats per token) and depends on the tokenizer; bits per byte is nats / ln 2 / bytes of text and does
not. A document's first token has nothing before it and is not scored, unless the model has a begin token to put there;
nor is the end token. Left out: the pseudo-perplexity of encoders, and encoder-decoders, which need a source.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from headway.config import ModelConfig
from headway.errors import ConfigError, InputError
from headway.evaluation.interval import Interval, ratio_interval
from headway.nn import Transformer
from headway.text import Tokenizer

# Fewer documents than this say little about how documents differ; then the windows are what is resampled.
ENOUGH_DOCUMENTS = 8
_LOGITS = 1 << 27  # numbers in the logits of one batch: 512 MB of float32
_TOKENS = 1 << 13  # positions in one batch


class TextTokens(NamedTuple):
    """A document: its token ids, control tokens left out, and the bytes of UTF-8 of each token."""

    ids: Sequence[int]
    sizes: Sequence[int]

    @classmethod
    def of(cls, ids: Sequence[int], tokenizer: Tokenizer) -> TextTokens:
        """The document of these ids."""
        return cls(ids, [len(tokenizer.token_bytes(token_id)) for token_id in ids])


class Perplexity(NamedTuple):
    """What was measured.

    Attributes:
        perplexity: exp of the mean nats per token. bits_per_byte: the same nats per byte of the text scored.
        loss: nats per token. documents, tokens, bytes: what was scored. units: what the intervals resample.
        context, stride: as used.
    """

    perplexity: Interval
    bits_per_byte: Interval
    loss: Interval
    documents: int
    tokens: int
    bytes: int
    units: str
    context: int
    stride: int


class _Window(NamedTuple):
    """Tokens that the model reads, and how many of them at the end it is scored on."""

    document: int
    ids: list[int]
    scored: int
    bytes: int


def perplexity(
    model: Transformer,
    documents: Iterable[TextTokens],
    *,
    context: int | None = None,
    stride: int | None = None,
    bos_id: int | None = None,
    progress: Callable[[int], None] = lambda documents: None,
) -> Perplexity:
    """Score every token of the documents once.

    Args:
        model: a decoder with a causal-lm head, in evaluation mode.
        documents: read once, a few windows at a time.
        context: tokens of a window, at most the model's max_len (default). stride: tokens by which windows advance,
            default half the context; the smaller, the more context each token has, and the longer it takes.
        bos_id: put before every document, so that its first token is scored too.
        progress: called with the number of documents read.

    Raises:
        ConfigError: not a decoder; context or stride out of range. InputError: no token to score.
    """
    context, stride = _ranges(model.config, context, stride)

    def counted() -> Iterator[TextTokens]:
        for number, document in enumerate(documents, 1):
            yield document
            progress(number)

    rows: list[tuple[int, float, int, int]] = []  # document, nats, tokens, bytes of each window
    for batch in _batches(_windows(counted(), context, stride, bos_id), model.config.vocab_size):
        for window, nats in zip(batch, _nats(model, batch), strict=True):
            rows.append((window.document, nats, window.scored, window.bytes))
    if not rows:
        raise InputError("data", "no token to score", "documents of two tokens or more")
    return _measured(rows, context, stride)


def _ranges(config: ModelConfig, context: int | None, stride: int | None) -> tuple[int, int]:
    if config.kind != "decoder" or config.head.type != "causal-lm":
        found = f"{config.kind} with head {config.head.type}"
        raise ConfigError("kind and task", f"{found} has no perplexity", "a decoder with head causal-lm")
    context = config.max_len if context is None else context
    if not 2 <= context <= config.max_len:
        raise ConfigError("context", str(context), f"2 to the model's max_len {config.max_len}")
    stride = max(context // 2, 1) if stride is None else stride
    if not 1 <= stride < context:
        raise ConfigError("stride", str(stride), f"1 to context - 1 = {context - 1}", f"--stride {context // 2}")
    return context, stride


def _windows(documents: Iterable[TextTokens], context: int, stride: int, bos_id: int | None) -> Iterator[_Window]:
    start = [] if bos_id is None else [bos_id]
    for number, document in enumerate(documents):
        ids, sizes = [*start, *document.ids], [0] * len(start) + list(document.sizes)
        done = 1
        while done < len(ids):
            end = min(context if done == 1 else done + stride, len(ids))
            yield _Window(number, ids[max(end - context, 0) : end], end - done, sum(sizes[done:end]))
            done = end


def _batches(windows: Iterable[_Window], vocab: int) -> Iterator[list[_Window]]:
    """Windows in groups of bounded memory; a group is padded to its longest, so it is cut where lengths differ much."""
    held: list[_Window] = []
    for window in windows:
        longest = max([len(window.ids), *(len(other.ids) for other in held)])
        area = longest * (len(held) + 1)
        wasteful = held and 2 * min(len(window.ids), len(held[-1].ids)) < longest
        if held and (area * vocab > _LOGITS or area > _TOKENS or wasteful):
            yield held
            held = []
        held.append(window)
    if held:
        yield held


@torch.no_grad()
def _nats(model: Transformer, batch: list[_Window]) -> list[float]:
    """Negative log-likelihood, in nats, of the scored tokens of each window."""
    device = next(model.parameters()).device
    lengths = torch.tensor([len(window.ids) - 1 for window in batch])
    order = torch.arange(int(lengths.max()))
    real = order < lengths[:, None]
    scored = real & (order >= (lengths - torch.tensor([window.scored for window in batch]))[:, None])
    ids, labels = torch.zeros(2, *real.shape, dtype=torch.long)
    ids[real] = torch.tensor([token for window in batch for token in window.ids[:-1]])
    labels[real] = torch.tensor([token for window in batch for token in window.ids[1:]])
    # A mask makes attention slower, so it is given only where there is padding.
    mask = None if bool(real.all()) else real.to(device)
    logits: Tensor = model(ids.to(device), attention_mask=mask).logits[scored.to(device)].float()
    own = logits.gather(1, labels[scored][:, None].to(device))[:, 0]
    nats = (logits.logsumexp(-1) - own).double().cpu()
    return [float(part.sum()) for part in torch.split(nats, [window.scored for window in batch])]


def _measured(rows: Sequence[tuple[int, float, int, int]], context: int, stride: int) -> Perplexity:
    documents: dict[int, tuple[float, int, int]] = {}
    for number, nats, tokens, size in rows:
        before = documents.get(number, (0.0, 0, 0))
        documents[number] = (before[0] + nats, before[1] + tokens, before[2] + size)
    by_document = len(documents) >= ENOUGH_DOCUMENTS
    units = list(documents.values()) if by_document else [row[1:] for row in rows]
    nats_, tokens_, sizes = zip(*units, strict=True)
    loss = ratio_interval(nats_, tokens_)
    if not sum(sizes):
        raise InputError("data", "0 bytes of text in the tokens scored", "text")
    bits = ratio_interval([x / math.log(2) for x in nats_], sizes)
    return Perplexity(
        perplexity=loss.map(_exp),
        bits_per_byte=bits,
        loss=loss,
        documents=len(documents),
        tokens=sum(tokens_),
        bytes=sum(sizes),
        units="documents" if by_document else "windows",
        context=context,
        stride=stride,
    )


def _exp(nats: float) -> float:
    """exp, kept within the finite numbers that JSON can say."""
    return math.exp(min(nats, 700.0))
