"""From hidden states to answers, and from answers and labels to a loss: one head per task.

Labels: ids (B, T) for language modelling and token classification, class indices or (B, labels) for classification,
(B, 2) start and end for spans, group numbers (B,) for embeddings (equal number: a positive pair), the pixels of hidden
patches (B, patches, pixels), which also say by -100 which patches the model may see. -100 is ignored;
when every label is ignored the loss is zero with zero gradients, never NaN.

The logits of a vocabulary are the largest thing in a training step: V numbers per position where a block keeps some
tens of D. `loss_of` therefore goes from hidden states to the loss without holding more than a piece of them, nor of
those of a teacher.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from headway import config as cfg
from headway.errors import BugError
from headway.kernels.training import Context, apply
from headway.nn.attention import Attention
from headway.nn.feed_forward import ACTIVATIONS, FeedForward
from headway.nn.masks import Mask
from headway.nn.norms import make_norm
from headway.nn.precision import wide

IGNORED = -100
Wanted = tuple[bool, ...]  # whether gradients by states, weight and bias are asked for


# Of the logits that loss_of makes at a time: large enough for a product to run at full speed, and 256 rows of 32,768.
LOGIT_BYTES = 1 << 25


class Soft(NamedTuple):
    """A teacher's answers beside the labels (arXiv:1503.02531, section 2), T the temperature: the loss per label is

    (1 - weight) cross-entropy + weight T^2 KL(softmax(teacher / T) || softmax(student / T)).

    `logits(rows)` are the teacher's at these rows of the student's.
    """

    logits: Callable[[slice], Tensor]
    weight: float
    temperature: float

    def shaped(self, change: Callable[[Tensor], Tensor]) -> Soft:
        """The same with logits in another form, row by row."""
        return self._replace(logits=lambda rows: change(self.logits(rows)))


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) per row; what p says cannot be adds nothing, whatever q says of it. (M, V), (M, V) -> (M,)."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)


def cross_entropy(
    logits: Tensor, labels: Tensor, smoothing: float = 0.0, z_loss: float = 0.0, soft: Soft | None = None
) -> Tensor:
    """Mean negative log-likelihood over labels that are not -100; zero when there are none.

    (..., V) float, (...) int64 -> scalar. Computed in float32 or wider. `smoothing` shares out so much of the target
    over all classes (arXiv:1512.00567); `z_loss` is the weight of log^2 Z, Z the sum of the exponentials, which keeps
    logits from drifting (arXiv:2204.02311, section 5); `soft` is what a teacher says.
    """
    flat = wide(logits.flatten(0, -2))
    known = labels.flatten() != IGNORED
    total = F.cross_entropy(flat, labels.flatten(), reduction="sum", ignore_index=IGNORED, label_smoothing=smoothing)
    if soft is not None:
        with torch.no_grad():
            taught = torch.log_softmax(wide(soft.logits(slice(None)).flatten(0, -2)) / soft.temperature, -1)
        apart = divergence(taught, torch.log_softmax(flat / soft.temperature, -1)).masked_fill(~known, 0.0).sum()
        total = (1 - soft.weight) * total + soft.weight * soft.temperature**2 * apart
    if z_loss:
        total = total + z_loss * flat.logsumexp(-1).square().masked_fill(~known, 0.0).sum()
    return total / known.sum().clamp(min=1)


class Entropy(NamedTuple):
    """What a loss over a vocabulary does besides: see `cross_entropy`; a softcap c makes logits c tanh(x / c)."""

    smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None


def linear_cross_entropy(
    states_MD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    labels_M: Tensor,
    how: Entropy | None = None,
    soft: Soft | None = None,
) -> Tensor:
    """`cross_entropy` of the logits `states weight^T + bias`, of which LOGIT_BYTES are in memory at a time.

    (M, D), (V, D), (V,) or None, (M,) int64, none of them ignored -> scalar. Where gradients are wanted, those of
    each piece are computed at once and summed, so that no logits are kept for the backward pass; what is kept is the
    size of states, weight and bias. Products run in autocast's precision, sums in float32 or wider. One backward
    pass; its gradient cannot be differentiated again.
    """
    inputs = (states_MD, weight_VD, bias_V)
    wanted = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs)
    if not any(wanted):
        total, _ = _in_pieces(*inputs, labels_M, how or Entropy(), wanted, soft)
        return total / max(len(labels_M), 1)
    loss: Tensor = apply(_LinearCrossEntropy, *inputs, labels_M, how or Entropy(), wanted, soft)
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are made in the forward pass and scaled by the incoming one in the backward pass."""

    @staticmethod
    def forward(
        ctx: Context,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        how: Entropy,
        wanted: Wanted,
        soft: Soft | None,
    ) -> Tensor:
        total, ctx.gradients = _in_pieces(states, weight, bias, labels, how, wanted, soft)
        count = max(len(labels), 1)
        ctx.count, ctx.dtypes = count, [None if x is None else x.dtype for x in (states, weight, bias)]
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, slope: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise BugError("loss", "a second backward pass", "one: its gradients are given away, not kept")
        gradients, ctx.gradients = ctx.gradients, None
        share = slope / ctx.count
        out = (None if g is None else g.mul_(share).to(t) for g, t in zip(gradients, ctx.dtypes, strict=True))
        return (*out, None, None, None, None)


def _in_pieces(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    how: Entropy,
    wanted: Wanted,
    soft: Soft | None,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The summed loss, and its gradients by states, weight and bias where wanted."""
    device = states.device.type
    lowers = torch.is_autocast_enabled(device) and states.dtype is not torch.float64
    dtype = torch.get_autocast_dtype(device) if lowers else states.dtype
    # The loss scale that keeps float16's gradients above its smallest number is not known yet.
    slope_dtype = torch.float32 if dtype is torch.float16 else dtype
    total_dtype = torch.promote_types(dtype, torch.float32)
    with torch.autocast(device, enabled=False):
        x, w, b = states.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        back_x, back_w = (x, w) if slope_dtype is dtype else (states.to(slope_dtype), weight.to(slope_dtype))
        d_states = torch.empty_like(back_x) if wanted[0] else None
        d_weight = torch.zeros_like(w, dtype=total_dtype) if wanted[1] else None
        d_bias = torch.zeros_like(w[:, 0], dtype=total_dtype) if wanted[2] else None
        total = torch.zeros((), dtype=total_dtype, device=states.device)
        rows = max(LOGIT_BYTES // (len(weight) * total.element_size()), 1)
        for begin in range(0, len(labels), rows):
            piece = slice(begin, begin + rows)
            loss, slope = _loss_and_slope(wide(F.linear(x[piece], w, b)), labels[piece], how, any(wanted), soft, piece)
            total += loss
            if slope is None:
                continue
            if d_bias is not None:
                d_bias += slope.sum(0)
            slope = slope.to(slope_dtype)
            if d_states is not None:
                torch.mm(slope, back_w, out=d_states[piece])
            if d_weight is not None and slope_dtype is total_dtype:
                d_weight.addmm_(slope.T, back_x[piece])
            elif d_weight is not None:
                d_weight += slope.T @ back_x[piece]
    return total, (d_states, d_weight, d_bias)


def _loss_and_slope(
    logits: Tensor, labels: Tensor, how: Entropy, sloped: bool, soft: Soft | None, rows: slice
) -> tuple[Tensor, Tensor | None]:
    """The summed loss of some rows and its gradient by their logits: softmax, less the target, and log^2 Z's.

    log Z gives (1 + 2 z log Z) softmax; the smoothed target is 1 - s at the label and s / V everywhere. A teacher's
    share w adds w T (softmax(x / T) - softmax(teacher / T)) and leaves 1 - w of the labels'.
    """
    capped = logits if how.softcap is None else how.softcap * torch.tanh(logits / how.softcap)
    log_p, chosen = torch.log_softmax(capped, -1), labels[:, None]
    hard, T = (1.0, 1.0) if soft is None else (1 - soft.weight, soft.temperature)
    loss = -hard * (1 - how.smoothing) * log_p.gather(1, chosen).sum()
    if how.smoothing:
        loss = loss - hard * how.smoothing * log_p.mean(-1).sum()
    taught, said = None, log_p
    if soft is not None:
        taught = torch.log_softmax(wide(soft.logits(rows)) / T, -1)
        said = torch.log_softmax(capped / T, -1)
        loss = loss + soft.weight * T**2 * divergence(taught, said).sum()
    log_z = torch.logsumexp(capped, -1) if how.z_loss else None
    if log_z is not None:
        loss = loss + how.z_loss * log_z.square().sum()
    if not sloped:
        return loss, None
    slope = log_p.exp_()
    if log_z is not None:
        slope *= (hard + 2 * how.z_loss * log_z)[:, None]
    elif soft is not None:
        slope *= hard
    if how.smoothing:
        slope -= hard * how.smoothing / logits.shape[-1]
    slope.scatter_add_(1, chosen, torch.full_like(chosen, -hard * (1 - how.smoothing), dtype=slope.dtype))
    if soft is not None and taught is not None:
        slope += (said.exp_() - taught.exp_()) * (soft.weight * T)
    if how.softcap is not None:
        slope *= 1 - (capped / how.softcap).square()
    return loss, slope


class Head(nn.Module):
    """What every head has. `smoothing` of its labels and `z_loss` act in training only, like dropout."""

    smoothing, z_loss = 0.0, 0.0

    @property
    def entropy(self) -> Entropy:
        """What its cross-entropy does at the moment besides."""
        return Entropy(self.smoothing, self.z_loss) if self.training else Entropy()

    def loss(self, logits: Tensor, labels: Tensor, soft: Soft | None = None) -> Tensor:
        """Cross-entropy; labels already stand where they are predicted (the data shifts them, not the model)."""
        return cross_entropy(logits, labels, self.entropy.smoothing, self.entropy.z_loss, soft)

    def loss_of(self, hidden_BTD: Tensor, real: Tensor | None, labels: Tensor, taught: Taught | None = None) -> Tensor:
        """The loss of the answer to these states, for those who do not need the answer itself."""
        return self.loss(self(hidden_BTD, real), labels, None if taught is None else taught.soft())

    def answers(self, hidden_BTD: Tensor, real: Tensor | None, places: Tensor | None) -> Callable[[slice], Tensor]:
        """The logits piece by piece; of a vocabulary only those at `places` (M,) of the B T positions, None for all."""
        logits: Tensor = self(hidden_BTD, real)
        return lambda rows: logits[rows]


class Taught(NamedTuple):
    """What a teacher makes of the same inputs: its states, the head that reads them, and how much its answers count."""

    head: Head
    hidden: Tensor
    real: Tensor | None
    weight: float
    temperature: float

    def soft(self, places: Tensor | None = None) -> Soft:
        """Its answers where labels stand."""
        with torch.no_grad():
            return Soft(self.head.answers(self.hidden, self.real, places), self.weight, self.temperature)


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
        self.rows = max(LOGIT_BYTES // (4 * config.vocab_size), 1)  # of logits at a time

    def forward(self, hidden_BTD: Tensor, real: Tensor | None) -> Tensor:
        """(B, T, D) -> (B, T, V)."""
        return self._answer(self._read(hidden_BTD))

    def _answer(self, read: Tensor) -> Tensor:
        return self.capped(self.output(read))

    def capped(self, logits: Tensor) -> Tensor:
        """What the output layer gives, with the softcap."""
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def answers(self, hidden_BTD: Tensor, real: Tensor | None, places: Tensor | None) -> Callable[[slice], Tensor]:
        """See Head; each piece is made when it is asked for, in the precision that holds now."""
        states = hidden_BTD.flatten(0, -2)
        read = self._read(states if places is None else states[places])
        device = states.device.type
        dtype, lowers = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)

        def piece(rows: slice) -> Tensor:
            with torch.autocast(device, dtype, enabled=lowers):
                return self._answer(read[rows])

        return piece

    def loss_of(self, hidden_BTD: Tensor, real: Tensor | None, labels: Tensor, taught: Taught | None = None) -> Tensor:
        """The same as `loss(head(hidden), labels)` up to the order of sums; positions without a label cost nothing.

        The logits are never all in memory, see linear_cross_entropy; unless another layer than a plain linear one,
        packed or adapted, makes them.
        """
        states, targets = hidden_BTD.flatten(0, -2), labels.flatten()
        known = (targets != IGNORED).nonzero()[:, 0]
        places = known if len(known) < len(targets) else None
        soft = None if taught is None else taught.soft(places)
        if places is not None:
            states, targets = states[places], targets[places]
        if type(self.output) is not nn.Linear:
            return self.loss(self(states, None), targets, soft)
        how = self.entropy._replace(softcap=self.softcap)
        return linear_cross_entropy(self._read(states), self.output.weight, self.output.bias, targets, how, soft)

    def log_likelihoods(self, hidden_BTD: Tensor, labels_BT: Tensor) -> Tensor:
        """log p of all labels of a row that are not -100, (B,): of the logits a piece is in memory, made once more for
        the backward pass."""
        places = (labels_BT.flatten() != IGNORED).nonzero()[:, 0]
        targets, piece = labels_BT.flatten()[places], self.answers(hidden_BTD, None, places)

        def some(rows: slice) -> Tensor:
            return -F.cross_entropy(wide(piece(rows)), targets[rows], reduction="none")

        pieces = [slice(begin, begin + self.rows) for begin in range(0, len(places), self.rows)]
        each = [checkpoint(some, rows, use_reentrant=False) for rows in pieces]
        found = wide(hidden_BTD).new_zeros(len(labels_BT))
        return found.index_add(0, places // labels_BT.shape[1], torch.cat(each)) if each else found

    def _read(self, hidden: Tensor) -> Tensor:
        """What the output layer multiplies. (..., D) -> (..., width of the table)."""
        if self.has_transform:
            hidden = self.transform_norm(self.activation(self.dense(hidden)))
        out: Tensor = self.project(hidden * self.scale if self.scale != 1.0 else hidden)
        return out


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

    def loss(self, logits: Tensor, labels: Tensor, soft: Soft | None = None) -> Tensor:
        """Cross-entropy, binary cross-entropy (multi) or mean squared error (regression)."""
        if self.problem == "single":
            return super().loss(logits, labels, soft)
        if self.problem == "multi":
            return cross_entropy(_yes_or_no(logits), labels.long(), soft=soft and soft.shaped(_yes_or_no))
        _no_classes(soft)
        logits = wide(logits)
        known, targets = (labels != IGNORED).view_as(logits), labels.to(logits.dtype).view_as(logits)
        each = F.mse_loss(logits, targets.where(known, 0.0), reduction="none")
        return each.where(known, 0.0).sum() / known.sum().clamp(min=1)


def _yes_or_no(logits: Tensor) -> Tensor:
    """A logit as two whose softmax is its sigmoid. (B, labels) -> (B, labels, 2)."""
    return torch.stack((torch.zeros_like(logits), logits), -1)


def _no_classes(soft: Soft | None) -> None:
    if soft is not None:
        raise BugError("loss", "a teacher", "a head that scores a vocabulary or classes")


class SpanHead(Head):
    """Start and end of an answer (arXiv:1810.04805, section 4.2)."""

    def __init__(self, config: cfg.ModelConfig) -> None:
        super().__init__()
        self.output = nn.Linear(config.d_model, 2)

    def forward(self, hidden_BTD: Tensor, real: Tensor | None) -> Tensor:
        """(B, T, D) -> (B, T, 2); padding can be neither start nor end."""
        logits: Tensor = self.output(hidden_BTD)
        return logits if real is None else logits.masked_fill(~real[..., None], torch.finfo(logits.dtype).min)

    def loss(self, logits: Tensor, labels: Tensor, soft: Soft | None = None) -> Tensor:
        """Mean of the cross-entropies of start and end, never smoothed: padding must get no mass. Labels (B, 2)."""
        return cross_entropy(logits.transpose(1, 2), labels, soft=soft and soft.shaped(lambda x: x.transpose(1, 2)))


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

    def loss(self, logits: Tensor, labels: Tensor, soft: Soft | None = None) -> Tensor:
        """Each row must find the other rows of its group among the batch."""
        _no_classes(soft)
        unit = F.normalize(wide(logits), dim=-1)
        scores = unit @ unit.T / self.head.temperature
        itself = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
        positive = (labels[:, None] == labels[None, :]) & ~itself
        scores = scores.masked_fill(itself, torch.finfo(scores.dtype).min)
        found = -(torch.log_softmax(scores, -1) * positive).sum(-1) / positive.sum(-1).clamp(min=1)
        return found.sum() / positive.any(-1).sum().clamp(min=1)


class PatchHead(Head):
    """The pixels of every patch (SimMIM, arXiv:2111.09886, sections 3.4 and 3.5)."""

    def __init__(self, config: cfg.ModelConfig) -> None:
        super().__init__()
        patch = config.embeddings.patch
        assert patch is not None
        self.extra = patch.extra
        self.output = nn.Linear(config.d_model, patch.pixels)

    def forward(self, hidden_BTD: Tensor, real: Tensor | None) -> Tensor:
        """(B, T, D) -> (B, patches, pixels)."""
        pixels: Tensor = self.output(hidden_BTD[:, self.extra :])
        return pixels

    def loss(self, logits: Tensor, labels: Tensor, soft: Soft | None = None) -> Tensor:
        """The mean distance of a hidden pixel's value; what was seen does not count."""
        _no_classes(soft)
        known = labels != IGNORED
        each = (wide(logits) - labels).abs()
        return each.where(known, 0.0).sum() / known.sum().clamp(min=1)


AnyHead = LanguageModelHead | ClassificationHead | SpanHead | EmbeddingHead | PatchHead


def make_head(config: cfg.ModelConfig) -> AnyHead:
    """The head of `config`."""
    match config.head:
        case cfg.CausalLM() | cfg.MaskedLM() as head:
            return LanguageModelHead(config, head)
        case cfg.SequenceClassification() | cfg.TokenClassification() | cfg.ImageClassification() as head:
            return ClassificationHead(config, head)
        case cfg.PooledEmbedding() as head:
            return EmbeddingHead(config, head)
        case cfg.MaskedPatches():
            return PatchHead(config)
        case _:
            return SpanHead(config)
