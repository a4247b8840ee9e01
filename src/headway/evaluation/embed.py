"""Texts as vectors: one per text, pooled and normalised as the model's head says."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from headway.config import ModelConfig, PooledEmbedding
from headway.errors import ConfigError
from headway.generation.session import inference
from headway.nn import Transformer
from headway.nn.heads import pool
from headway.text import Tokenizer

TOKENS = 1 << 13
"""Tokens of a batch, padding included: at this size a batch keeps the cores busy and its scores small."""


def embed(
    model: Transformer,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    progress: Callable[[int], None] | None = None,
    tokens: int = TOKENS,
) -> Tensor:
    """Vectors of texts, (len(texts), size) float32 on the CPU, in their order.

    A pooled-embedding head gives its vectors; any other model the mean of its last states over real tokens, of length
    one. Texts longer than the head's `max_len` or the model's context are cut, as sentence-transformers does. Batches
    hold texts of similar length, at most `tokens` with padding. `progress` is told the number of texts done.
    """
    check_can_embed(model.config)
    longest = longest_text(model.config)
    rows = [_cut(tokenizer, ids, longest) for ids in tokenizer.encode_batch(texts)]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    out: list[Tensor | None] = [None] * len(rows)
    done = 0
    with inference(model):
        while done < len(order):
            some = order[done : done + max(1, tokens // len(rows[order[done]]))]
            for i, vector in zip(some, _vectors(model, [rows[i] for i in some]), strict=True):
                out[i] = vector
            done += len(some)
            if progress is not None:
                progress(done)
    vectors = [vector for vector in out if vector is not None]
    head = model.config.head
    size = (head.projection if isinstance(head, PooledEmbedding) else None) or model.config.d_model
    return torch.stack(vectors) if vectors else torch.empty(0, size)


def longest_text(config: ModelConfig) -> int:
    """Tokens of a text that count: as many as the head says, or the context holds."""
    return min(getattr(config.head, "max_len", None) or config.max_len, config.max_len)


def check_can_embed(config: ModelConfig) -> None:
    """Refuse models that read no text, or read it for another. Raises ConfigError."""
    if config.kind not in ("encoder", "decoder"):
        raise ConfigError("kind", f"{config.kind} gives no vector of a text", "an encoder or a decoder")


def _cut(tokenizer: Tokenizer, ids: list[int], longest: int) -> list[int]:
    """With the template's ids around it, at most `longest` in all; nothing at all becomes the end token."""
    room = longest - len(tokenizer.prefix_ids) - len(tokenizer.suffix_ids)
    row = [*tokenizer.prefix_ids, *ids[: max(room, 0)], *tokenizer.suffix_ids]
    return row or [tokenizer.eos_id or 0]


def _vectors(model: Transformer, rows: list[list[int]]) -> Tensor:
    device = next(model.parameters()).device
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
    real = None
    if min(map(len, rows)) < longest:
        real = torch.arange(longest, device=device)[None] < torch.tensor([[len(row)] for row in rows], device=device)
    found = model(ids, attention_mask=real)
    if isinstance(model.config.head, PooledEmbedding):
        vectors: Tensor = found.logits.float().cpu()
        return vectors
    return torch.nn.functional.normalize(pool(found.hidden, real, "mean").float(), dim=-1).cpu()
