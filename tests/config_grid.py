"""At least 200 tiny model configs in which every value of every field appears, and nearly every pair of values.

Drawn greedily (each config is the one of several random candidates that covers most pairs of field values not seen
together before), from a fixed seed: the same grid everywhere.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Iterator, Mapping
from typing import Any

from headway.config import ModelConfig
from headway.errors import ConfigError

SIZE = 224
MAX_LEN = 14
VOCABULARY = 19

PATTERNS: dict[str, list[list[str]]] = {
    "decoder": [["causal"], ["sliding"], ["sliding", "causal"]],
    "encoder": [["full"], ["sliding"], ["full", "sliding"], ["causal"], ["causal", "full"]],
    "encoder-decoder": [["full"], ["sliding"], ["full", "sliding"], ["causal", "full"]],
    "vision": [["full"], ["full", "sliding"], ["causal"]],
}
HEADS: dict[str, list[str]] = {
    "decoder": ["causal-lm", "causal-lm", "causal-lm", "sequence-classification", "token-classification"],
    "encoder": [
        "masked-lm",
        "sequence-classification",
        "token-classification",
        "span",
        "pooled-embedding",
        "masked-lm",
    ],
    "encoder-decoder": ["causal-lm"],
    "vision": ["image-classification", "sequence-classification", "pooled-embedding", "masked-patches"],
}


def _scaling(rng: random.Random, pairs: int) -> dict[str, Any]:
    kind = rng.choice(["none", "linear", "ntk", "dynamic", "yarn", "longrope", "llama3"])
    scaling: dict[str, Any] = {"type": kind}
    if kind not in ("none", "longrope"):
        scaling["factor"] = rng.choice([2.0, 4.0])
    if kind in ("dynamic", "yarn", "longrope", "llama3"):
        scaling["original_len"] = rng.choice([4, 6])
    if kind == "yarn":
        scaling["beta_fast"] = rng.choice([32.0, 4.0])
        scaling["beta_slow"] = rng.choice([1.0, 0.1])
        scaling["truncate"] = rng.choice([True, False])
        scaling["mscale"], scaling["mscale_all_dim"] = rng.choice([(None, None), (1.0, 0.7), (0.5, 1.0)])
    if kind in ("yarn", "longrope"):
        scaling["attention_factor"] = rng.choice([None, 1.2])
    if kind == "longrope":
        scaling["short"] = [1.0 + 0.25 * i for i in range(pairs)]
        scaling["long"] = [2.0 + 0.5 * i for i in range(pairs)]
    if kind == "llama3":
        scaling["low_freq_factor"] = rng.choice([1.0, 0.5])
        scaling["high_freq_factor"] = rng.choice([4.0, 2.0])
    return scaling


def _positions(rng: random.Random, d_head: int) -> dict[str, Any]:
    kind = rng.choice(["none", "sinusoidal", "learned", "relative", "alibi", "rope", "rope", "rope"])
    positions: dict[str, Any] = {"type": kind}
    if kind == "sinusoidal":
        positions |= {"theta": rng.choice([10000.0, 100.0]), "layout": rng.choice(["interleaved", "split"])}
    if kind == "learned":
        positions["offset"] = rng.choice([0, 2])
    if kind == "relative":
        positions["buckets"], positions["max_distance"] = rng.choice([(32, 128), (4, 5), (8, 10)])
    if kind == "rope":
        fraction = rng.choice([1.0, 0.5])
        positions |= {"theta": rng.choice([10000.0, 100.0]), "fraction": fraction}
        positions["layout"] = rng.choice(["half", "interleaved"])
        positions["scaling"] = _scaling(rng, int(d_head * fraction) // 2)
        positions["layers"] = rng.choice([[True], [True, False]])
        positions["window_theta"] = rng.choice([None, 50.0])
    return positions


def _head(rng: random.Random, kind: str) -> dict[str, Any]:
    head: dict[str, Any] = {"type": rng.choice(HEADS[kind])}
    match head["type"]:
        case "causal-lm":
            head |= {"bias": rng.choice([False, True]), "softcap": rng.choice([None, 5.0])}
            head["scale"] = rng.choice([1.0, 0.5])
        case "masked-lm":
            head |= {name: rng.choice([False, True]) for name in ("bias", "transform", "transform_bias")}
        case "sequence-classification":
            head["problem"] = rng.choice(["single", "multi", "regression"])
            head["labels"] = 1 if head["problem"] == "regression" else rng.choice([2, 3])
            head["transform"] = rng.choice(["none", "tanh", "relu", "gelu"])
            head["bias"] = rng.choice([True, False])
        case "token-classification" | "image-classification":
            head["labels"] = rng.choice([2, 3])
        case "pooled-embedding":
            head |= {"normalize": rng.choice([True, False]), "temperature": rng.choice([0.05, 1.0])}
            head["max_len"] = rng.choice([None, 3])
            head |= {"projection": rng.choice([None, 6]), "projection_bias": rng.choice([True, False])}
            head["transform"] = rng.choice(["none", "tanh"])
    if head["type"] in ("sequence-classification", "image-classification", "pooled-embedding"):
        head["pooling"] = rng.choice(["first", "last", "mean", "attention"])
    return head


def _embeddings(rng: random.Random, kind: str) -> dict[str, Any]:
    embeddings: dict[str, Any] = {"scale": rng.choice([1.0, 2.5]), "norm": rng.choice([False, True])}
    embeddings["leads"] = embeddings["norm"] and rng.random() < 0.3
    embeddings["width"] = rng.choice([None, None, 6]) if kind != "vision" else None
    if kind == "encoder-decoder" and embeddings["width"] is None and rng.random() < 0.3:
        embeddings["audio"] = {"bins": rng.choice([3, 5]), "frames": rng.choice([8, 13])}
    if kind == "encoder":
        embeddings["token_types"] = rng.choice([0, 2])
    if kind == "vision":
        size, channels = rng.choice([2, 3]), rng.choice([3, 1])
        image = size * rng.choice([2, 3])
        embeddings["patch"] = {"size": size, "image": image, "channels": channels, "first_token": rng.random() < 0.6}
        embeddings["patch"] |= {"registers": rng.choice([0, 2]), "bias": rng.choice([True, False])}
    return embeddings


def _attention(rng: random.Random, kind: str) -> dict[str, Any]:
    pattern = rng.choice(PATTERNS[kind])
    return {
        "pattern": pattern,
        "window": rng.choice([1, 3, 5, 64]) if "sliding" in pattern else None,
        "qk_norm": rng.choice(["none", "layernorm", "rmsnorm"]),
        "qk_norm_over": rng.choice(["head", "all"]),
        "softcap": rng.choice([None, None, 2.0]),
        "scale": rng.choice([None, 0.3]),
        "bias": rng.choice([False, True]),
        "output_bias": rng.choice([False, True]),
        "dropout": rng.choice([0.0, 0.1]),
        "cross_every": rng.choice([1, 2]) if kind == "encoder-decoder" else 0,
    }


def _feed_forward(rng: random.Random) -> dict[str, Any]:
    experts = {
        "experts": rng.choice([2, 4]),
        "top_k": rng.choice([1, 2]),
        "normalize": rng.choice([True, False]),
        "balance": rng.choice([0.01, 0.0]),
    }
    return {
        "activation": rng.choice(["relu", "gelu", "gelu-tanh", "quick-gelu", "silu", "relu2"]),
        "gated": rng.choice([False, True]),
        "bias": rng.choice([False, True]),
        "experts": rng.choice([None, None, experts]),
    }


def _norm(rng: random.Random) -> dict[str, Any]:
    if rng.random() < 0.5:
        return {"type": "layernorm", "eps": rng.choice([1e-5, 1e-3]), "bias": rng.choice([True, False])}
    return {"type": "rmsnorm", "eps": rng.choice([1e-6, 1e-3]), "offset": rng.choice([0, 1])}


def draw(rng: random.Random) -> dict[str, Any]:
    """One random description; it may be an impossible combination."""
    kind = rng.choice(["decoder", "decoder", "encoder", "encoder-decoder", "vision"])
    n_heads, n_kv_heads = rng.choice([(2, 2), (4, 4), (4, 1), (4, 2), (3, 3), (6, 3)])
    d_head = rng.choice([4, 8])
    d_model = rng.choice([n_heads * d_head, 10])
    embeddings = _embeddings(rng, kind)
    head = _head(rng, kind)
    embeddings["tied"] = head["type"] in ("causal-lm", "masked-lm") and rng.random() < 0.5
    placement = rng.choice(["pre", "pre", "post", "sandwich", "inside"])
    can_be_parallel = placement == "pre" and kind != "encoder-decoder"
    ids = [None, 1, VOCABULARY - 1]
    tokens = {name: rng.choice(ids) for name in ("bos", "eos", "pad", "mask", "decoder_start")}
    tokens["ends"] = rng.choice([[], [2, 3]])
    if kind == "encoder-decoder":
        tokens["decoder_start"] = rng.choice([0, 1])
    return {
        "kind": kind,
        "d_model": d_model,
        "n_layers": rng.choice([1, 2, 2]),
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "d_head": d_head,
        "d_ff": rng.choice([7, 16]),
        "vocab_size": 0 if kind == "vision" else VOCABULARY,
        "max_len": MAX_LEN,
        "n_decoder_layers": rng.choice([1, 2]) if kind == "encoder-decoder" else 0,
        "attention": _attention(rng, kind),
        "positions": _positions(rng, d_head),
        "norm": _norm(rng),
        "placement": placement,
        "residual": rng.choice(["sequential", "parallel"]) if can_be_parallel else "sequential",
        "layer_scale": rng.choice([None, None, 0.1]),
        "feed_forward": _feed_forward(rng),
        "embeddings": embeddings,
        "dropout": rng.choice([0.0, 0.1]),
        "head": head,
        "init": {"std": rng.choice([0.02, None]), "residual": rng.choice(["plain", "scaled", "zero"])},
        "tokens": tokens if kind != "vision" else {},
    }


def leaves(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    """(dotted field, value as text) of every leaf; lists are one value."""
    for name, value in tree.items():
        here = f"{path}.{name}" if path else name
        if isinstance(value, Mapping):
            yield from leaves(value, here)
        else:
            yield here, repr(value)


def pairs(config: ModelConfig) -> set[tuple[tuple[str, str], tuple[str, str]]]:
    """Every pair of (field, value) in this config."""
    return set(itertools.combinations(sorted(leaves(config.model_dump())), 2))


def candidates(seed: int) -> Iterator[ModelConfig]:
    """Random valid configs, endless."""
    rng = random.Random(seed)
    while True:
        try:
            yield ModelConfig(**draw(rng))
        except ConfigError:
            continue


def newness(config: ModelConfig, seen: set[object]) -> float:
    """The share of the config's pairs that are new: a share, or kinds with many fields would always win."""
    found = pairs(config)
    return len(found - seen) / len(found)


@functools.cache
def grid() -> tuple[ModelConfig, ...]:
    """The configs of the property tests."""
    seen: set[object] = set()
    chosen = []
    stream = candidates(20240611)
    for _ in range(SIZE):
        best = max(itertools.islice(stream, 10), key=lambda config: newness(config, seen))
        seen |= pairs(best)
        chosen.append(best)
    return tuple(chosen)
