"""From hidden states to answers, and from answers and labels to a loss: one head per task.

Labels: ids (B, T) for language modelling and token classification, class indices or (B, labels) for classification,
(B, 2) start and end for spans, group numbers (B,) for embeddings (equal number: a positive pair). -100 is ignored;
when every label is ignored the loss is zero with zero gradients, never NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headway import config as cfg
from headway.nn.attention import Attention
from headway.nn.feed_forward import ACTIVATIONS, FeedForward
from headway.nn.masks import Mask
from headway.nn.norms import make_norm
from headway.nn.precision import wide

IGNORED = -100


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean negative log-likelihood over labels that are not -100; zero when there are none.

    (..., V) float, (...) int64 -> scalar. Computed in float32 or wider.
    """
    flat = wide(logits.flatten(0, -2))
    total = F.cross_entropy(flat, labels.flatten(), reduction="sum", ignore_index=IGNORED, label_smoothing=smoothing)
    return total / (labels != IGNORED).sum().clamp(min=1)


class Head(nn.Module):
    """What every head has. `smoothing` of its labels (arXiv:1512.00567) acts in training only, like dropout."""

    smoothing = 0.0

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(logits, labels, self.smoothing if self.training else 0.0)


def pool(hidden_BTD: Tensor, real: Tensor | None, how: Literal["first", "last", "mean"]) -> Tensor:
    """One vector per sequence from its real tokens: the first, the last, or their mean. (B, T, D) -> (B, D)."""
    B, T, _ = hidden_BTD.shape
    if real is None:
        real = hidden_BTD.new_ones(B, T, dtype=torch.bool)
    if how == "mean":
        weights = real.to(hidden_BTD.dtype)[..., None]
        return (hidden_BTD * weights).sum(1) / weights.sum(1).clamp(min=1)
    order = torch.arange(T, device=real.device)
    index = torch.where(real, order, T).amin(1) if how == "first" else torch.where(real, order, -1).amax(1)
    return hidden_BTD[torch.arange(B, device=real.device), index.clamp(0, T - 1)]


class AttentionPool(nn.Module):
    """A learned query asks the whole sequence, a feed-forward network follows (SigLIP, arXiv:2303.15343)."""

    def __init__(self, config: cfg.ModelConfig) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(config.d_model))
        self.attention = Attention(config, 0)
        self.norm = make_norm(config.d_model, config.norm)
        self.feed_forward = FeedForward(config)

    def forward(self, hidden_BTD: Tensor, real: Tensor | None) -> Tensor:
        """(B, T, D) -> (B, D)."""
        B, T, _ = hidden_BTD.shape
        # The query stands in front of the sequence and nobody sees it: one fused projection serves both.
        whole = torch.cat((self.query.expand(B, 1, -1), hidden_BTD), 1)
        seen = real if real is not None else torch.ones(B, T, dtype=torch.bool, device=hidden_BTD.device)
        mask = Mask(dense=F.pad(seen, (1, 0), value=False)[:, None, None, :])
        x_BD = self.attention(whole, mask, None, None)[:, 0]
        out: Tensor = x_BD + self.feed_forward(self.norm(x_BD))
        return out


class Pool(nn.Module):
    """One vector per sequence, through a dense layer and an activation where `transform` names one."""

    def __init__(self, config: cfg.ModelConfig, how: cfg.Pooling, transform: str) -> None:
        super().__init__()
        self.how = how
        self.attention = AttentionPool(config) if how == "attention" else None
        self.dense = nn.Linear(config.d_model, config.d_model) if transform != "none" else None
        known: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "relu": F.relu, "gelu": F.gelu}
        self.activation = known.get(transform)

    def forward(self, hidden_BTD: Tensor, real: Tensor | None) -> Tensor:
        """(B, T, D) -> (B, D)."""
        if self.attention is not None:
            vectors: Tensor = self.attention(hidden_BTD, real)
        else:
            assert self.how != "attention"
            vectors = pool(hidden_BTD, real, self.how)
        return vectors if self.dense is None or self.activation is None else self.activation(self.dense(vectors))


class LanguageModelHead(Head):
    """Logits over the vocabulary; `transform` first passes dense, activation and norm (BERT).

    Where the token table is narrower than the model, the states are first brought to its width.
    """

    def __init__(self, config: cfg.ModelConfig, head: cfg.CausalLM | cfg.MaskedLM) -> None:
        super().__init__()
        width = config.embeddings.width or config.d_model
        self.scale, self.softcap = (head.scale, head.softcap) if isinstance(head, cfg.CausalLM) else (1.0, None)
        self.has_transform = isinstance(head, cfg.MaskedLM) and head.transform
        if isinstance(head, cfg.MaskedLM) and head.transform:
            self.dense = nn.Linear(config.d_model, width, bias=head.transform_bias)
            self.activation = ACTIVATIONS[config.feed_forward.activation]
            self.transform_norm = make_norm(width, config.norm)
        narrows = width != config.d_model and not self.has_transform
        self.project = nn.Linear(config.d_model, width, bias=False) if narrows else nn.Identity()
        self.output = nn.Linear(width, config.vocab_size, bias=head.bias)

    def forward(self, hidden_BTD: Tensor, real: Tensor | None) -> Tensor:
        """(B, T, D) -> (B, T, V)."""
        if self.has_transform:
            hidden_BTD = self.transform_norm(self.activation(self.dense(hidden_BTD)))
        if self.scale != 1.0:
            hidden_BTD = hidden_BTD * self.scale
        logits: Tensor = self.output(self.project(hidden_BTD))
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy; labels already stand where they are predicted (the data shifts them, not the model)."""
        return self._cross_entropy(logits, labels)


class ClassificationHead(Head):
    """Sequence and image classification, regression and token classification: one projection."""

    def __init__(
        self,
        config: cfg.ModelConfig,
        head: cfg.SequenceClassification | cfg.TokenClassification | cfg.ImageClassification,
    ) -> None:
        super().__init__()
        self.pool = None
        if not isinstance(head, cfg.TokenClassification):
            self.pool = Pool(config, head.pooling, getattr(head, "transform", "none"))
        self.problem = head.problem if isinstance(head, cfg.SequenceClassification) else "single"
        self.output = nn.Linear(config.d_model, head.labels, bias=getattr(head, "bias", True))

    def forward(self, hidden_BTD: Tensor, real: Tensor | None) -> Tensor:
        """(B, T, D) -> (B, labels), or (B, T, labels) for token classification."""
        logits: Tensor = self.output(hidden_BTD if self.pool is None else self.pool(hidden_BTD, real))
        return logits

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy, binary cross-entropy (multi) or mean squared error (regression)."""
        if self.problem == "single":
            return self._cross_entropy(logits, labels)
        logits = wide(logits)
        known, targets = (labels != IGNORED).view_as(logits), labels.to(logits.dtype).view_as(logits)
        loss = F.binary_cross_entropy_with_logits if self.problem == "multi" else F.mse_loss
        each = loss(logits, targets.where(known, 0.0), reduction="none")
        return each.where(known, 0.0).sum() / known.sum().clamp(min=1)


class SpanHead(Head):
    """Start and end of an answer (arXiv:1810.04805, section 4.2)."""

    def __init__(self, config: cfg.ModelConfig) -> None:
        super().__init__()
        self.output = nn.Linear(config.d_model, 2)

    def forward(self, hidden_BTD: Tensor, real: Tensor | None) -> Tensor:
        """(B, T, D) -> (B, T, 2); padding can be neither start nor end."""
        logits: Tensor = self.output(hidden_BTD)
        return logits if real is None else logits.masked_fill(~real[..., None], torch.finfo(logits.dtype).min)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean of the cross-entropies of start and end, never smoothed: padding must get no mass. Labels (B, 2)."""
        return cross_entropy(logits.transpose(1, 2), labels)


class EmbeddingHead(Head):
    """One vector per sequence, compared within the batch by cosine (InfoNCE, arXiv:1807.03748)."""

    def __init__(self, config: cfg.ModelConfig, head: cfg.PooledEmbedding) -> None:
        super().__init__()
        self.head = head
        self.pool = Pool(config, head.pooling, head.transform)
        size = head.projection
        self.project = nn.Linear(config.d_model, size, bias=head.projection_bias) if size else nn.Identity()

    def forward(self, hidden_BTD: Tensor, real: Tensor | None) -> Tensor:
        """(B, T, D) -> (B, D), or (B, projection)."""
        vectors: Tensor = self.project(self.pool(hidden_BTD, real))
        return F.normalize(vectors, dim=-1) if self.head.normalize else vectors

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Each row must find the other rows of its group among the batch."""
        unit = F.normalize(wide(logits), dim=-1)
        scores = unit @ unit.T / self.head.temperature
        itself = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
        positive = (labels[:, None] == labels[None, :]) & ~itself
        scores = scores.masked_fill(itself, torch.finfo(scores.dtype).min)
        found = -(torch.log_softmax(scores, -1) * positive).sum(-1) / positive.sum(-1).clamp(min=1)
        return found.sum() / positive.any(-1).sum().clamp(min=1)


AnyHead = LanguageModelHead | ClassificationHead | SpanHead | EmbeddingHead


def make_head(config: cfg.ModelConfig) -> AnyHead:
    """The head of `config`."""
    match config.head:
        case cfg.CausalLM() | cfg.MaskedLM() as head:
            return LanguageModelHead(config, head)
        case cfg.SequenceClassification() | cfg.TokenClassification() | cfg.ImageClassification() as head:
            return ClassificationHead(config, head)
        case cfg.PooledEmbedding() as head:
            return EmbeddingHead(config, head)
        case _:
            return SpanHead(config)
