"""softmax(q k^T / sqrt(H)) v: one entry for training, prefill, decoding, cross, bidirectional and windowed attention.

`attend` takes queries, keys, values, a mask and an optional bias, and chooses a backend by what it can do:

    naive   the formula, written out; the only one with softcap on CPU
    sdpa    PyTorch's fused scaled_dot_product_attention
    flex    FlexAttention, compiled, for softcap and biases on CUDA

Every backend equals the float64 formula in tests/nn/test_attention.py. Grouped queries: query head n reads key-value
head n // (N / K) (arXiv:2305.13245).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headway.config import LayerNorm, ModelConfig, RMSNorm, Rope
from headway.errors import ConfigError
from headway.kernels.training import HeadShape, causal_attention, rotate, split_heads
from headway.nn.cache import Cache
from headway.nn.masks import Mask
from headway.nn.norms import RMSNorm as RMSNormModule
from headway.nn.norms import make_norm

Backend = Literal["auto", "naive", "sdpa", "flex"]
_forced: Backend = "auto"
_observer: Callable[[Tensor], None] | None = None


@contextlib.contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Force one backend for everything inside; a backend that cannot do the job raises ConfigError."""
    global _forced
    before, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = before


@contextlib.contextmanager
def observed(see: Callable[[Tensor], None]) -> Iterator[None]:
    """Show the weights (B, N, T, S) of every attention inside, in the order of the calls; they are computed for it."""
    global _observer
    before, _observer = _observer, see
    try:
        yield
    finally:
        _observer = before


def is_steered() -> bool:
    """Whether `use_backend` or `observed` is in force."""
    return _forced != "auto" or _observer is not None


class Scores(NamedTuple):
    """How scores become weights: s = softcap(scale * q k^T) + bias, masked, softmax, dropout."""

    scale: float
    softcap: float | None = None
    dropout: float = 0.0


def attend(
    q_BTNH: Tensor,
    k_BSKH: Tensor,
    v_BSKH: Tensor,
    mask: Mask,
    scores: Scores,
    bias_BNTS: Tensor | None = None,
) -> Tensor:
    """Attention of T queries over S keys. Rows that may see nothing yield zeros.

    Args:
        q_BTNH: queries. k_BSKH, v_BSKH: keys and values, K a divisor of N.
        mask: what is visible. scores: scale, cap and dropout. bias_BNTS: added to the scaled scores (B and N may be 1).

    Returns:
        (B, T, N, H).
    """
    backend = _choose(q_BTNH, scores) if _forced == "auto" else _forced
    q, k, v = q_BTNH.transpose(1, 2), k_BSKH.transpose(1, 2), v_BSKH.transpose(1, 2)
    if _observer is not None:
        _observer(_weights(q, k, mask, scores, bias_BNTS))
    return _BACKENDS[backend](q, k, v, mask, scores, bias_BNTS).transpose(1, 2)


def _choose(q: Tensor, scores: Scores) -> Backend:
    if scores.softcap is None:
        return "sdpa"
    return "flex" if q.is_cuda and scores.dropout == 0 else "naive"


def _naive(q: Tensor, k: Tensor, v: Tensor, mask: Mask, how: Scores, bias: Tensor | None) -> Tensor:
    """The formula. Shapes (B, N, T, H), (B, K, S, H)."""
    B, N, T, _ = q.shape
    K, S = k.shape[1], k.shape[2]
    weights = F.dropout(_weights(q, k, mask, how, bias), how.dropout)
    return (weights.view(B, K, N // K * T, S) @ v).view(B, N, T, v.shape[-1])


def _weights(q: Tensor, k: Tensor, mask: Mask, how: Scores, bias: Tensor | None) -> Tensor:
    """Who reads how much from whom, (B, N, T, S); queries are folded by group, keys are never repeated."""
    B, N, T, H = q.shape
    K, S = k.shape[1], k.shape[2]
    scores = (q.reshape(B, K, N // K * T, H) @ k.transpose(-1, -2)).view(B, N, T, S) * how.scale
    if how.softcap is not None:
        scores = how.softcap * torch.tanh(scores / how.softcap)
    if bias is not None:
        scores = scores + bias
    visible = mask.tensor(T, S, q.device)
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
        # A row without a single visible key has softmax 0/0: give it finite scores, and zero weights afterwards.
        blind = ~visible.any(-1, keepdim=True)
        scores = scores.masked_fill(blind, 0.0)
    weights = torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(q.dtype)
    if visible is not None:
        weights = weights.masked_fill(blind, 0.0)
    return weights


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Mask, how: Scores, bias: Tensor | None) -> Tensor:
    """PyTorch's fused kernel; the mask and the bias go in as one additive tensor when both exist."""
    if how.softcap is not None:
        raise ConfigError("attention.softcap and backend", "sdpa cannot cap scores", "backend naive or flex")
    if bias is None and how.dropout == 0 and (mask.is_causal or mask.starts is not None):
        fused = causal_attention(q, k, v, how.scale, mask.starts)
        if fused is not None:
            return fused
    dense = mask.dense
    is_causal = mask.is_causal and bias is None
    blind = None
    if bias is not None:
        visible = mask.tensor(q.shape[2], k.shape[2], q.device)
        dense = bias if visible is None else bias.masked_fill(~visible, float("-inf"))
    if mask.dense is not None and not mask.sighted:
        blind = ~mask.dense.any(-1, keepdim=True)
        # Whether a row is blind is a look at the data, which a compiled graph cannot take.
        if dense is not None and (torch.compiler.is_compiling() or bool(blind.any())):
            # Let blind rows see everything, then zero them: no kernel needs to agree on softmax of nothing.
            dense = dense | blind if dense.dtype == torch.bool else dense.masked_fill(blind, 0.0)
        else:
            blind = None
    grouped, shape = q.shape[1] != k.shape[1], q.shape
    if grouped and q.shape[2] == 1:  # heads that share keys stand as queries of one head, which every kernel can take
        q, grouped = _by_group(q, k), False
        dense = dense if dense is None or dense.shape[1] == 1 else _by_group(dense, k)
    out = F.scaled_dot_product_attention(
        q, k, v, dense, how.dropout, is_causal=is_causal, scale=how.scale, enable_gqa=grouped
    ).view(*shape[:3], v.shape[3])
    return out if blind is None else out.masked_fill(blind, 0.0)


def _by_group(per_head: Tensor, k: Tensor) -> Tensor:
    """(B, N, 1, X) -> (B, K, N/K, X): what stands for each head, by the keys (B, K, S, H) that they read."""
    return per_head.reshape(len(per_head), k.shape[1], -1, per_head.shape[3])


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: Mask, how: Scores, bias: Tensor | None) -> Tensor:
    """FlexAttention (arXiv:2412.05496): cap, bias and mask inside the kernel. Compiled on CUDA, eager elsewhere."""
    from torch.nn.attention.flex_attention import flex_attention

    if how.dropout:
        raise ConfigError("attention.dropout and backend", "flex has no dropout", "backend sdpa or naive")
    if not q.is_cuda and q.requires_grad:
        raise ConfigError("gradients and backend", "flex has none on CPU", "backend sdpa or naive")
    visible = mask.tensor(q.shape[2], k.shape[2], q.device)
    if visible is not None:
        visible = visible.expand(-1, -1, q.shape[2], k.shape[2])

    def change(score: Tensor, b: Tensor, n: Tensor, t: Tensor, s: Tensor) -> Tensor:
        if how.softcap is not None:
            score = how.softcap * torch.tanh(score / how.softcap)
        if bias is not None:
            score = score + bias[b % bias.shape[0], n % bias.shape[1], t, s]
        if visible is not None:
            score = torch.where(visible[b % visible.shape[0], 0, t, s], score, -float("inf"))
        return score

    run = torch.compile(flex_attention, dynamic=False) if q.is_cuda else flex_attention
    out: Tensor = run(q, k, v, score_mod=change, scale=how.scale, enable_gqa=q.shape[1] != k.shape[1])
    return out if visible is None else out.masked_fill(~visible.any(-1, keepdim=True), 0.0)


_BACKENDS = {"naive": _naive, "sdpa": _sdpa, "flex": _flex}


class Attention(nn.Module):
    """Multi-head attention with n_kv_heads keys and values: n_heads (MHA), 1 (MQA) or between (GQA).

    Self-attention projects queries, keys and values with one matrix `qkv`, rows in that order; cross-attention has
    `q` for the decoder's states and `kv` for the encoder's. Split among processes it has the heads from `first` on.
    """

    first, is_split = 0, False

    def __init__(self, config: ModelConfig, layer: int, *, cross: bool = False) -> None:
        super().__init__()
        attention, H = config.attention, config.d_head
        self.layer, self.N, self.K, self.H = layer, config.n_heads, config.n_kv_heads, H
        self.dropout = attention.dropout
        self.softcap = attention.softcap
        self.scale = attention.scale if attention.scale is not None else 1 / math.sqrt(H)
        self.layout = config.positions.layout if isinstance(config.positions, Rope) else ""
        self.is_cross = cross
        if cross:
            self.q = nn.Linear(config.d_model, self.N * H, bias=attention.bias)
            self.kv = nn.Linear(config.d_model, 2 * self.K * H, bias=attention.bias)
        else:
            self.qkv = nn.Linear(config.d_model, (self.N + 2 * self.K) * H, bias=attention.bias)
        self.q_norm, self.k_norm = (_query_norm(config, heads) for heads in (self.N, self.K))
        self.norm_heads = attention.qk_norm_over == "head"
        self.output = nn.Linear(self.N * H, config.d_model, bias=attention.output_bias)
        self.prefix: nn.Module | None = None  # trained keys and values before its own (tuning/small.py)

    def forward(
        self,
        x_BTD: Tensor,
        mask: Mask,
        angles: Tensor | None,
        bias: Tensor | None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Self-attention: (B, T, D) -> (B, T, D). `angles` turn queries and keys (RoPE), `bias` moves the scores."""
        q, k, v = self._heads(self.qkv(x_BTD), angles)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        return self._mix(q, k, v, mask, bias)

    def cross(self, x_BTD: Tensor, encoder_BSD: Tensor, mask: Mask, cache: Cache | None = None) -> Tensor:
        """Cross-attention: queries from the decoder, keys and values from the encoder, cached after the first call."""
        q = self._normalized(self.q_norm, self.q(x_BTD))
        return self._mix(q, *self.remembered(encoder_BSD, cache), mask, None)

    def remembered(self, encoder_BSD: Tensor, cache: Cache | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values (B, S, K, H) of the encoder's states, computed once where there is a cache."""
        kept = None if cache is None else cache.cross[self.layer]
        if kept is None:
            k, v = self.kv(encoder_BSD).chunk(2, -1)
            k = self._normalized(self.k_norm, k)
            kept = (k.contiguous(), v.reshape(*v.shape[:-1], self.K, self.H).contiguous())
            if cache is not None:
                cache.cross[self.layer] = kept
        return kept

    def _heads(self, qkv_BTX: Tensor, angles: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The projection as queries, keys and values, normalised per head and turned to their positions."""
        shape = HeadShape(self.N, self.K, self.layout, getattr(self.q_norm, "eps", 0.0))
        if self.norm_heads and isinstance(self.q_norm, RMSNormModule) and isinstance(self.k_norm, RMSNormModule):
            return split_heads(qkv_BTX, angles, (self.q_norm.scale, self.k_norm.scale), shape)
        if isinstance(self.q_norm, nn.Identity):
            return split_heads(qkv_BTX, angles, None, shape)
        q, k, v = torch.split(qkv_BTX, [heads * self.H for heads in (self.N, self.K, self.K)], -1)
        q, k = self._normalized(self.q_norm, q), self._normalized(self.k_norm, k)
        v = v.view(*v.shape[:-1], self.K, self.H)
        return (q, k, v) if angles is None else (rotate(q, angles, self.layout), rotate(k, angles, self.layout), v)

    def _normalized(self, norm: nn.Module, x_BTX: Tensor) -> Tensor:
        """(B, T, heads * H) -> (B, T, heads, H), normalised per head or over all of them."""
        heads = x_BTX.view(*x_BTX.shape[:-1], -1, self.H)
        out: Tensor = norm(heads) if self.norm_heads else norm(x_BTX).view_as(heads)
        return out

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, bias: Tensor | None) -> Tensor:
        how = Scores(self.scale, self.softcap, self.dropout if self.training else 0.0)
        if self.is_split and bias is not None:
            bias = bias[:, self.first : self.first + self.N]
        if self.prefix is not None:
            k, v, mask, bias = self.prefix(k, v, mask, bias, q.shape[1])
        out: Tensor = self.output(attend(q, k.to(q.dtype), v.to(q.dtype), mask, how, bias).flatten(-2))
        return out


def _query_norm(config: ModelConfig, heads: int) -> nn.Module:
    """QK-norm over one head's H dimensions (arXiv:2302.05442) or over those of all heads, or nothing."""
    size = config.d_head * (heads if config.attention.qk_norm_over == "all" else 1)
    match config.attention.qk_norm:
        case "rmsnorm":
            return make_norm(size, RMSNorm(eps=config.norm.eps, offset=getattr(config.norm, "offset", 0)))
        case "layernorm":
            return make_norm(size, LayerNorm(eps=config.norm.eps, bias=False))
        case _:
            return nn.Identity()
