"""GGUF as a second dialect of the families: the same kind of table, with the names that llama.cpp uses for all of them.

Names and conventions: gguf-py's constants.py and convert_hf_to_gguf.py in github.com/ggml-org/llama.cpp. What a GGUF
file leaves unsaid (activations, patterns of layers) llama.cpp has in its code for that architecture, and we in the
family. Two facts differ from a Hugging Face file: Llama's queries and keys are stored for interleaved rotary pairs,
and Gemma's norms with their offset of one added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from headway.config import Llama3Scaling, LongRopeScaling, ModelConfig, Rope
from headway.families._codecs import shortest, tokens
from headway.families._table import Family, Head, Key, Node, Op, Special, choice, halves, layers, qkv
from headway.nn.positions import rope_frequencies

Raw = Mapping[str, Any]
FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


@dataclass(frozen=True)
class Arch:
    """What one of llama.cpp's architectures does its own way.

    `interleaved`: queries and keys are permuted. `shifted`: norms hold one more. `fused`: one tensor for q, k and v.
    `biases`: projections may have them. `slides(layer)`: which layers have the window. `weights`, `fixed`, `keys`,
    `special` add to what all have.
    """

    interleaved: bool = False
    shifted: bool = False
    fused: bool = False
    biases: bool = True
    slides: Callable[[int], bool] | None = None
    weights: Mapping[str, Node] | None = None
    fixed: Mapping[str, object] | None = None
    keys: Mapping[str, Key] | None = None
    special: tuple[Special, ...] = ()


# --- operations --------------------------------------------------------------------------------------------------


def interleave(name: Node, heads: Callable[[ModelConfig], int]) -> Op:
    """Rows of each head as pairs (2i, 2i + 1) in the file, as (i, i + H/2) here."""

    def order(rows: Tensor, c: ModelConfig, sizes: tuple[int, int]) -> Tensor:
        return rows.reshape(heads(c), *sizes, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)

    return Op(
        (name,),
        lambda s, _: [s],
        lambda t, c: order(t[0], c, (c.d_head // 2, 2)),
        lambda t, c: [order(t, c, (2, c.d_head // 2))],
    )


def raised(name: Node) -> Op:
    """A norm's weight with the offset added: what the file holds is the factor itself."""

    def offset(c: ModelConfig) -> int:
        return int(getattr(c.norm, "offset", 0))

    return Op((name,), lambda s, _: [s], lambda t, c: t[0] - offset(c), lambda t, c: [t + offset(c)])


# --- what all have -----------------------------------------------------------------------------------------------

_KEYS = {
    "block_count": Key("n_layers"),
    "context_length": Key("max_len"),
    "embedding_length": Key("d_model"),
    "feed_forward_length": Key("d_ff"),
    "attention.head_count": Key("n_heads"),
    "attention.head_count_kv": Key("n_kv_heads"),
    "attention.key_length": Key("d_head"),
    "attn_logit_softcapping": Key("attention.softcap"),
    "final_logit_softcapping": Key("head.softcap"),
    "expert_count": Key("feed_forward.experts.experts"),
    "expert_used_count": Key("feed_forward.experts.top_k"),
}
# Not in the metadata: read off the tensors, and dropped when written.
HAS = {
    "has attn_q.bias": Key("attention.bias", False),
    "has attn_output.bias": Key("attention.output_bias", False),
    "has ffn_up.bias": Key("feed_forward.bias", False),
    "has no output.weight": Key("embeddings.tied", False),
}
_OUTSIDE: dict[str, Node] = {
    "embeddings.tokens": "token_embd",
    "embeddings.learned": "position_embd",
    "embeddings.types": "token_types",
    "embeddings.norm": "token_embd_norm",
    "head.output": "output",
}
_NORMS: dict[str, Node] = {
    "attention.q_norm": "attn_q_norm",
    "attention.k_norm": "attn_k_norm",
    "attention_residual.before": "attn_norm",
    "attention_residual.inside": "post_attention_norm",
    "attention_residual.after": "attn_output_norm",
    "feed_forward_residual.before": "ffn_norm",
    "feed_forward_residual.inside": "post_ffw_norm",
    "feed_forward_residual.after": "layer_output_norm",
}
_PARTS: dict[str, Node] = {
    "attention.output": "attn_output",
    "feed_forward.up": choice("feed_forward.gated", {True: halves("ffn_gate", "ffn_up"), False: "ffn_up"}),
    "feed_forward.down": "ffn_down",
    "feed_forward.router": "ffn_gate_inp",
    "feed_forward.experts.{e}.up": halves("ffn_gate_exps[{e}]", "ffn_up_exps[{e}]"),
    "feed_forward.experts.{e}.down": "ffn_down_exps[{e}]",
}


def _weights(arch: Arch) -> dict[str, Node]:
    query: Node = "attn_q"
    key: Node = "attn_k"
    if arch.interleaved:
        query, key = interleave(query, lambda c: c.n_heads), interleave(key, lambda c: c.n_kv_heads)
    norms = {name: raised(node) if arch.shifted else node for name, node in _NORMS.items()}
    joined: dict[str, Node] = {"attention.qkv": "attn_qkv" if arch.fused else qkv(query, key, "attn_v")}
    layer = {**norms, **_PARTS, **joined, **(arch.weights or {})}
    last: Node = raised("output_norm") if arch.shifted else "output_norm"
    return _OUTSIDE | {"decoder.norm": last} | {
        name: node
        for side in ("decoder", "encoder")
        for name, node in layers(f"{side}.blocks.{{i}}", "blk.{i}", layer).items()
    }  # fmt: skip


# --- rotary positions, windows, pooling --------------------------------------------------------------------------


def _rope(arch: str) -> Special:
    """`rope.*`; factors per frequency, which both Llama 3's and Phi-3's scalings become, stand in tensors."""
    base, dims, kind, factor, original, attention = (
        f"{arch}.rope.{name}"
        for name in ("freq_base", "dimension_count", "scaling.type", "scaling.factor",
                     "scaling.original_context_length", "scaling.attn_factor")
    )  # fmt: skip

    def read(raw: Raw) -> dict[str, object]:
        width = raw.get(f"{arch}.attention.key_length") or (
            raw[f"{arch}.embedding_length"] // raw[f"{arch}.attention.head_count"]
        )
        out: dict[str, object] = {
            "positions.type": "rope",
            "positions.theta": raw.get(base, 10000.0),
            "positions.fraction": raw.get(dims, width) / width,
        }
        long = raw.get(FACTORS[1], raw.get(FACTORS[0]))
        if long is not None:
            scaling: dict[str, object] = {
                "type": "longrope",
                "long": tuple(long),
                "short": tuple(raw.get(FACTORS[2], long)),
            }
            scaling["original_len"] = raw.get(original, raw[f"{arch}.context_length"])
            scaling["attention_factor"] = raw.get(attention, 1.0)
        elif raw.get(kind) in ("linear", "yarn"):
            scaling = {"type": raw[kind], "factor": raw.get(factor, 1.0)}
            scaling |= {"original_len": raw.get(original)} if raw[kind] == "yarn" else {}
        else:
            return out
        return out | {f"positions.scaling.{name}": value for name, value in scaling.items()}

    def write(config: ModelConfig) -> dict[str, object]:
        positions = config.positions
        assert isinstance(positions, Rope)
        out: dict[str, object] = {base: positions.theta, dims: int(config.d_head * positions.fraction)}
        scaling = positions.scaling
        if scaling.type in ("linear", "yarn"):
            out |= {kind: scaling.type, factor: getattr(scaling, "factor", 1.0)}
            return out | ({original: getattr(scaling, "original_len", 0)} if scaling.type == "yarn" else {})
        if isinstance(scaling, Llama3Scaling):
            plain = rope_frequencies(positions.model_copy(update={"scaling": Rope().scaling}), config.d_head, 1, 1)[0]
            scaled = rope_frequencies(positions, config.d_head, 1, 1)[0]
            out[FACTORS[0]] = (plain / scaled).tolist()
        if isinstance(scaling, LongRopeScaling):
            _, attention_factor = rope_frequencies(positions, config.d_head, 1, config.max_len)
            out |= {FACTORS[1]: list(scaling.long), FACTORS[2]: list(scaling.short)}
            out |= {original: scaling.original_len, attention: attention_factor}
        return out

    return Special(read, write)


def _windows(arch: str, slides: Callable[[int], bool]) -> Special:
    key = f"{arch}.attention.sliding_window"

    def read(raw: Raw) -> dict[str, object]:
        width = raw.get(key)
        pattern = ["sliding" if width and slides(i) else "causal" for i in range(raw[f"{arch}.block_count"])]
        return {"attention.pattern": shortest(pattern), "attention.window": width if "sliding" in pattern else None}

    return Special(read, lambda c: {key: c.attention.window} if c.attention.window else {})


def _gemma(arch: str) -> Special:
    """Constants of Gemma's code: embeddings times sqrt(D), scores over the root of the head's size."""

    def read(raw: Raw) -> dict[str, object]:
        width = raw.get(f"{arch}.attention.key_length", 256)
        return {"embeddings.scale": raw[f"{arch}.embedding_length"] ** 0.5, "attention.scale": width**-0.5}

    return Special(read, lambda _: {})


_POOLINGS = {"mean": 1, "first": 2, "last": 3}
_POOL = Special(
    lambda raw: {"head.pooling": {v: k for k, v in _POOLINGS.items()}.get(raw.get("bert.pooling_type", 1), "mean")},
    lambda c: {"bert.pooling_type": _POOLINGS[getattr(c.head, "pooling", "mean")], "bert.attention.causal": False},
)
_TYPES = Special(
    lambda raw: {"embeddings.token_types": raw.get("tokenizer.ggml.token_type_count", 2)},
    lambda c: {"tokenizer.ggml.token_type_count": c.embeddings.token_types},
)
_GEMMA_FIXED: dict[str, object] = {"norm.offset": 0}
_PARALLEL = Special(
    lambda raw: {"residual": "parallel" if raw.get("gptneox.use_parallel_residual", True) else "sequential"},
    lambda c: {"gptneox.use_parallel_residual": c.residual == "parallel"},
)
_FALCON: dict[str, Node] = {"attention_residual.before": "attn_norm_2", "feed_forward_residual.before": "attn_norm"}

_SKIPS = Special(
    lambda raw: {"positions.layers": shortest([(i + 1) % 4 > 0 for i in range(raw["smollm3.block_count"])])},
    lambda _: {},
)

ARCHS: dict[str, Arch] = {
    "llama": Arch(interleaved=True),
    "smollm3": Arch(interleaved=True, special=(_SKIPS,)),
    "qwen2": Arch(),
    "qwen3": Arch(biases=False),
    "qwen3moe": Arch(
        biases=False,
        keys={"qwen3moe.expert_feed_forward_length": Key("d_ff")},
        fixed={"feed_forward.experts.normalize": True},
    ),
    "gemma2": Arch(shifted=True, slides=lambda i: i % 2 == 0, fixed=_GEMMA_FIXED, special=(_gemma("gemma2"),)),
    "gemma3": Arch(
        shifted=True,
        slides=lambda i: (i + 1) % 6 > 0,
        fixed=_GEMMA_FIXED | {"positions.window_theta": 10000.0},
        special=(_gemma("gemma3"),),
    ),
    # llama.cpp reads Phi-3's window and lets every layer see everything, so only models without one are the same there.
    "phi3": Arch(fused=True, weights={"feed_forward.up": "ffn_up"}),
    "olmo2": Arch(biases=False),
    "starcoder2": Arch(),
    "gpt2": Arch(fused=True),
    "starcoder": Arch(fused=True),
    "gptneox": Arch(fused=True, special=(_PARALLEL,)),
    "bloom": Arch(fused=True),
    "falcon": Arch(fused=True, biases=False, weights=_FALCON),
    "bert": Arch(special=(_POOL, _TYPES)),
}


# --- the dialect of a family -------------------------------------------------------------------------------------


def dialect(family: Family) -> Family:
    """The family as its GGUF files say it. Its one head is named like the architecture.

    What the file does not say is the default of the family's own keys. Only for families with `gguf`.
    """
    name = family.gguf
    assert name is not None
    arch = ARCHS[name]
    middle = "rms_" if family.fixed.get("norm.type") == "rmsnorm" else ""
    eps = {f"attention.layer_norm_{middle}epsilon": Key("norm.eps")}
    keys = {f"{name}.{theirs}": key for theirs, key in (_KEYS | eps).items()}
    keys |= {"vocab_size": Key("vocab_size")} | dict(arch.keys or {})
    keys |= {theirs: key for theirs, key in HAS.items() if arch.biases or not theirs.endswith(".bias")}
    if family.fixed.get("kind") != "decoder":
        del keys["has no output.weight"]
    said = {key.ours for key in keys.values()} | {also for key in keys.values() for also in key.also}
    unsaid = {ours: value for ours, value in _defaults(family) if ours not in said}
    special = list(arch.special)
    if "positions.type" not in family.fixed:
        special.insert(0, _rope(name))
    if arch.slides is not None:
        special.append(_windows(name, arch.slides))
    return replace(
        family,
        model_type=name,
        fixed={**unsaid, **family.fixed, **(arch.fixed or {})},
        keys=keys,
        weights=_weights(arch),
        heads={name: _head(family)},
        special=(*special, tokens()),
        only={},
        unread=(*FACTORS, "*.attn_rot_embd.weight"),
    )


_SIZES = ("dropout", "attention.dropout", "n_", "d_", "max_len", "vocab")


def _defaults(family: Family) -> Iterator[tuple[str, object]]:
    """Our fields with the values that the family's own config has where it says nothing."""
    for key in family.keys.values():
        value = key.names[key.default] if key.names is not None and isinstance(key.default, str) else key.default
        if value is not None and not key.ours.startswith(_SIZES):
            for ours in (key.ours, *key.also):
                yield ours, value


def _head(family: Family) -> Head:
    if family.fixed.get("kind") == "decoder":
        return Head({"head.type": "causal-lm"}, {"head.output": "output"})
    return Head({"head.type": "pooled-embedding"})
