"""What a model costs, from its config alone: parameters by part, FLOPs per token, cache and bytes per decoded token.

A multiply and an add count as two FLOPs; a backward pass costs twice its forward pass (one product for the gradient of
the input, one for that of the weights). Lookups, norms, activations and softmax are left out: they cost time, but
hardly any FLOPs. tests/test_cost.py holds the counts to the modules and the FLOPs to PyTorch's own counter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from headway.config import CausalLM, LayerNorm, Learned, MaskedLM, ModelConfig, Relative

TOKEN_HEADS = ("causal-lm", "masked-lm", "token-classification", "span")


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


def _norm(c: ModelConfig) -> int:
    return c.d_model * (2 if isinstance(c.norm, LayerNorm) and c.norm.bias else 1)


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
    head, D = c.head, c.d_model
    if isinstance(head, CausalLM | MaskedLM):
        return D * c.vocab_size + (D * D if isinstance(head, MaskedLM) and head.transform else 0)
    return D * (2 if head.type == "span" else getattr(head, "labels", 0))


def parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters by part; a tied table counts once, as an embedding."""
    c, a, ff = config, config.attention, config.feed_forward
    D, F, H, N, K = c.d_model, c.d_ff, c.d_head, c.n_heads, c.n_kv_heads
    copies = ff.experts.experts if ff.experts else 1
    biases = {"attention": ((N + 2 * K) * H if a.bias else 0) + (D if a.output_bias else 0)}
    biases["cross-attention"] = biases["attention"]
    biases["feed-forward"] = copies * (F * (2 if ff.gated else 1) + D) if ff.bias else 0
    out: Counter[str] = Counter({"embeddings": _embeddings(c), "norms": _norm(c) if c.embeddings.norm else 0})
    per_part = _norm(c) * (2 if c.placement == "sandwich" else 1)
    per_attention = 2 * H if a.qk_norm != "none" else 0
    for s in _stacks(c):
        counts = {"attention": s.layers, "cross-attention": s.cross, "feed-forward": s.layers}
        for part, weights in _matrices(c).items():
            out[s.name + part] += counts[part] * (weights + biases[part])
        attentions = s.layers + s.cross
        out[s.name + "norms"] += attentions * (per_part + per_attention) + s.layers * per_part
        out[s.name + "norms"] += _norm(c) if c.placement != "post" else 0
        if isinstance(c.positions, Relative):
            out[s.name + "bias"] += c.positions.buckets * N
    head = c.head
    out["head"] = _head_matrices(c) - (D * c.vocab_size if c.embeddings.tied else 0)
    if isinstance(head, CausalLM | MaskedLM):
        out["head"] += c.vocab_size if head.bias else 0
        if isinstance(head, MaskedLM) and head.transform:
            out["head"] += D
            out["norms"] += _norm(c)
    else:
        out["head"] += out["head"] // D  # a bias per output
    return {part: count for part, count in out.items() if count}


def _embeddings(c: ModelConfig) -> int:
    D, e = c.d_model, c.embeddings
    rows = c.vocab_size + e.token_types + (c.max_len + c.positions.offset if isinstance(c.positions, Learned) else 0)
    if e.patch is not None:
        rows += e.patch.channels * e.patch.size**2 + 1 + int(e.patch.first_token)  # the projection and its bias
    return rows * D


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
        total += 2 * c.d_model * patch.channels * patch.size**2
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
