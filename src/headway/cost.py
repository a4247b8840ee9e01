"""What a model costs, from its config alone: parameters by part, FLOPs per token, cache and bytes per decoded token.

A multiply and an add count as two FLOPs; a backward pass costs twice its forward pass (one product for the gradient of
the input, one for that of the weights). Lookups, norms, activations and softmax are left out: they cost time, but
hardly any FLOPs. tests/test_cost.py holds the counts to the modules and the FLOPs to PyTorch's own counter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from headway.config import CausalLM, LayerNorm, Learned, MaskedLM, ModelConfig, PooledEmbedding, Relative

TOKEN_HEADS = ("causal-lm", "masked-lm", "token-classification", "span", "masked-patches")


@dataclass(frozen=True)
class _Stack:
    """One stack of a model: its name, whether it decodes, and its depth."""

    name: str
    decodes: bool
    layers: int
    cross: int  # layers that attend to an encoder


def _stacks(c: ModelConfig) -> Iterator[_Stack]:
    is_pair = c.kind == "encoder-decoder"
    if c.kind != "decoder":
        yield _Stack("encoder " if is_pair else "", False, c.n_layers, 0)
    if c.kind in ("decoder", "encoder-decoder"):
        depth = c.n_decoder_layers if is_pair else c.n_layers
        every = c.attention.cross_every
        yield _Stack("decoder " if is_pair else "", True, depth, -(-depth // every) if every else 0)


def _width(c: ModelConfig) -> int:
    """Of the tables of tokens, positions and types."""
    return c.embeddings.width or c.d_model


def _norm(c: ModelConfig, size: int = 0) -> int:
    return (size or c.d_model) * (2 if isinstance(c.norm, LayerNorm) and c.norm.bias else 1)


def _matrices(c: ModelConfig) -> dict[str, int]:
    """Weights of one layer's matrices by part, biases left out; of the experts all, and the router."""
    D, F, H, N, K = c.d_model, c.d_ff, c.d_head, c.n_heads, c.n_kv_heads
    expert = D * F * (3 if c.feed_forward.gated else 2)
    experts = c.feed_forward.experts
    attention = D * H * (2 * N + 2 * K)
    feed_forward = expert * experts.experts + D * experts.experts if experts else expert
    return {"attention": attention, "cross-attention": attention, "feed-forward": feed_forward}


def _active(c: ModelConfig) -> dict[str, int]:
    """Weights of one layer's matrices that one token visits."""
    matrices, experts = _matrices(c), c.feed_forward.experts
    if experts:
        router = c.d_model * experts.experts
        matrices["feed-forward"] = (matrices["feed-forward"] - router) // experts.experts * experts.top_k + router
    return matrices


def _head_matrices(c: ModelConfig) -> int:
    """Weights of the head's matrices, the table of a tied head included."""
    head, D, W = c.head, c.d_model, _width(c)
    if isinstance(head, CausalLM | MaskedLM):
        has_dense = head.transform if isinstance(head, MaskedLM) else W != D
        return W * c.vocab_size + (D * W if has_dense or W != D else 0)
    dense = D * D if getattr(head, "transform", "none") != "none" else 0
    if getattr(head, "pooling", "") == "attention":
        dense += 2 * D * c.d_head * (c.n_heads + c.n_kv_heads) + D * c.d_ff * (3 if c.feed_forward.gated else 2)
    if isinstance(head, PooledEmbedding):
        return dense + D * (head.projection or 0)
    return dense + D * _outputs(c)


def _head_vectors(c: ModelConfig) -> int:
    """Biases of the head, and the query of an attention pool; its norms are counted as norms."""
    head, D, ff = c.head, c.d_model, c.feed_forward
    if isinstance(head, CausalLM | MaskedLM):
        dense = isinstance(head, MaskedLM) and head.transform and head.transform_bias
        return (c.vocab_size if head.bias else 0) + (_width(c) if dense else 0)
    count = D if getattr(head, "transform", "none") != "none" else 0
    if getattr(head, "pooling", "") == "attention":
        count += D + _biases(c)["attention"] + ((c.d_ff * (2 if ff.gated else 1) + D) if ff.bias else 0)
    if isinstance(head, PooledEmbedding):
        return count + (head.projection or 0) * head.projection_bias
    return count + _outputs(c) * getattr(head, "bias", True)


def _outputs(c: ModelConfig) -> int:
    """Numbers that a head without a vocabulary gives per position or sequence."""
    if c.head.type == "masked-patches" and c.embeddings.patch is not None:
        return c.embeddings.patch.pixels
    return 2 if c.head.type == "span" else getattr(c.head, "labels", 0)


def _biases(c: ModelConfig) -> dict[str, int]:
    """Biases of one layer's matrices by part."""
    a, ff, N, K, H = c.attention, c.feed_forward, c.n_heads, c.n_kv_heads, c.d_head
    attention = ((N + 2 * K) * H if a.bias else 0) + (c.d_model if a.output_bias else 0)
    copies = ff.experts.experts if ff.experts else 1
    feed_forward = copies * (c.d_ff * (2 if ff.gated else 1) + c.d_model) if ff.bias else 0
    return {"attention": attention, "cross-attention": attention, "feed-forward": feed_forward}


def parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters by part; a tied table counts once, as an embedding."""
    c, a = config, config.attention
    biases = _biases(c)
    out: Counter[str] = Counter({"embeddings": _embeddings(c)})
    per_part = _norm(c) * (2 if c.placement == "sandwich" else 1) + (c.d_model if c.layer_scale else 0)
    per_attention = _query_norms(c)
    for s in _stacks(c):
        counts = {"attention": s.layers, "cross-attention": s.cross, "feed-forward": s.layers}
        for part, weights in _matrices(c).items():
            out[s.name + part] += counts[part] * (weights + biases[part])
        attentions = s.layers + s.cross
        out[s.name + "norms"] += attentions * (per_part + per_attention) + s.layers * per_part
        out[s.name + "norms"] += _norm(c) if c.placement != "post" else 0
        out[s.name + "norms"] -= _norm(c) if c.embeddings.leads else 0
        out[s.name + "norms"] += _norm(c, _width(c)) if c.embeddings.norm else 0
        if isinstance(c.positions, Relative):
            out[s.name + "bias"] += c.positions.buckets * c.n_heads
    out["head"] = _head_matrices(c) + _head_vectors(c) - (_width(c) * c.vocab_size if c.embeddings.tied else 0)
    if isinstance(c.head, MaskedLM) and c.head.transform:
        out["norms"] += _norm(c, _width(c))
    if getattr(c.head, "pooling", "") == "attention":
        out["norms"] += _norm(c) + (_query_norms(c) if a.qk_norm != "none" else 0)
    return {part: count for part, count in out.items() if count}


def _query_norms(c: ModelConfig) -> int:
    """Weights of QK-norm in one attention."""
    if c.attention.qk_norm == "none":
        return 0
    return c.d_head * (c.n_heads + c.n_kv_heads if c.attention.qk_norm_over == "all" else 2)


def _embeddings(c: ModelConfig) -> int:
    D, W, e = c.d_model, _width(c), c.embeddings
    total, sides = c.vocab_size * W, 1 + (c.kind == "encoder-decoder")
    if isinstance(c.positions, Learned):
        lengths = [e.audio.count if e.audio else c.max_len, c.max_len][:sides]
        total += sum(length + c.positions.offset for length in lengths) * W
    total += e.token_types * W + (sides * (W + 1) * D if e.width else 0)
    if e.patch is not None:
        total += D * (e.patch.pixels + e.patch.extra + e.patch.bias + (c.head.type == "masked-patches"))
    if e.audio is not None:
        total += D * (3 * e.audio.bins + 1) + D * (3 * D + 1)
    return total


def keys_seen(config: ModelConfig, layer: int, length: int, *, causal: bool) -> float:
    """Keys that a query of one layer sees, on average over a sequence of `length`.

    In the decoder of an encoder-decoder and in a decoder `causal` is True.
    """
    window = min(config.window(layer) or length, length)
    if causal:
        # The first `window` queries see 1, 2, ... window keys, the others `window`.
        return (window * (window + 1) / 2 + (length - window) * window) / length
    # Closer than `window` on either side, less what lies beyond the two ends.
    return length if config.window(layer) is None else 2 * window - 1 - window * (window - 1) / length


def forward_flops(config: ModelConfig, length: int) -> float:
    """FLOPs of one position's forward pass within a sequence of `length`; of one source and one target position in an
    encoder-decoder (both sides of that length). A head that reads one position per sequence counts 1 / length."""
    c = config
    active, total = _active(c), 0.0
    for s in _stacks(c):
        counts = {"attention": s.layers, "cross-attention": s.cross, "feed-forward": s.layers}
        total += sum(2 * counts[part] * weights for part, weights in active.items())
        masks = list(c.masks(decoder=s.decodes))
        seen = sum(keys_seen(c, layer, length, causal=mask == "causal") for layer, mask in enumerate(masks))
        total += 4 * c.n_heads * c.d_head * (seen + s.cross * length)  # scores and mixing
    patch = c.embeddings.patch
    if patch is not None:
        total += 2 * c.d_model * patch.pixels
    if c.embeddings.audio is not None:  # per position: one of the second convolution, two of the first
        total += 2 * 3 * c.d_model * (2 * c.embeddings.audio.bins + c.d_model)
    return total + 2 * _head_matrices(c) / (1 if c.head.type in TOKEN_HEADS else length)


def training_flops(config: ModelConfig, length: int) -> float:
    """FLOPs of one position forward and backward: three times the forward pass."""
    return 3 * forward_flops(config, length)


def cache_bytes_per_token(config: ModelConfig, size: int = 4) -> int:
    """Bytes of self-attention keys and values that one more token adds, before windows; `size` bytes per number.

    Zero for kinds without a decoder. Grouped queries divide it by N / K (arXiv:2305.13245).
    """
    layers = sum(s.layers for s in _stacks(config) if s.decodes)
    return 2 * layers * config.n_kv_heads * config.d_head * size


def cache_bytes(config: ModelConfig, length: int, size: int = 4) -> int:
    """Bytes of the whole cache of one sequence of `length`: sliding layers keep their window only."""
    kept = sum(
        min(config.window(layer) or length, length) for s in _stacks(config) if s.decodes for layer in range(s.layers)
    )
    return 2 * kept * config.n_kv_heads * config.d_head * size


def decode_bytes(config: ModelConfig, length: int, size: float = 4, cache_size: int = 4) -> float:
    """Bytes read from memory for one decoded token after `length` others: every active weight once, and the cache.

    At batch 1 this over the memory's bandwidth bounds the speed. `size` bytes per weight: 4, 2, 1, 0.5.
    """
    active = _active(config)
    weights: float = _head_matrices(config)
    for s in _stacks(config):
        if s.decodes:
            weights += s.layers * (active["attention"] + active["feed-forward"])
            # Keys and values of the encoder were projected once: only queries and output are left.
            weights += s.cross * 2 * config.d_model * config.n_heads * config.d_head
    return weights * size + cache_bytes(config, length, cache_size)
