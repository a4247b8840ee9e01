"""What the encoders since BERT (arXiv:1810.04805) share: names of a layer, heads, sizes."""

from __future__ import annotations

from collections.abc import Mapping

from headway.errors import InputError
from headway.families._codecs import ACTIVATIONS, Raw, sizes
from headway.families._table import Copy, Head, Key, Node, Spare, Special, choice, layers, qkv, shared

FIXED: dict[str, object] = {
    "kind": "encoder",
    "positions.type": "learned",
    "norm.type": "layernorm",
    "placement": "post",
    "attention.bias": True,
    "attention.output_bias": True,
    "feed_forward.bias": True,
    "embeddings.norm": True,
    "embeddings.tied": True,
}

KEYS = sizes(
    vocab_size=30522,
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    intermediate_size=3072,
    max_position_embeddings=512,
) | {
    "hidden_act": Key("feed_forward.activation", "gelu", ACTIVATIONS),
    "layer_norm_eps": Key("norm.eps", 1e-12),
    "hidden_dropout_prob": Key("dropout", 0.1),
    "attention_probs_dropout_prob": Key("attention.dropout", 0.1),
    "type_vocab_size": Key("embeddings.token_types", 2, least=1),
    "tie_word_embeddings": Key("embeddings.tied", True),
}

LAYER: dict[str, Node] = {
    "attention.qkv": qkv("attention.self.query", "attention.self.key", "attention.self.value"),
    "attention.output": "attention.output.dense",
    "attention_residual.after": "attention.output.LayerNorm",
    "feed_forward.up": "intermediate.dense",
    "feed_forward.down": "output.dense",
    "feed_forward_residual.after": "output.LayerNorm",
}

WEIGHTS: dict[str, Node] = {
    "embeddings.tokens": "embeddings.word_embeddings",
    "embeddings.learned": "embeddings.position_embeddings",
    "embeddings.types": "embeddings.token_type_embeddings",
    "embeddings.norm": "embeddings.LayerNorm",
} | layers("encoder.blocks.{i}", "encoder.layer.{i}", LAYER)

POOLER: dict[str, object] = {
    "head.type": "pooled-embedding",
    "head.pooling": "first",
    "head.transform": "tanh",
    "head.normalize": False,
}
BARE: dict[str, object] = POOLER | {"head.transform": "none"}
CLASSES: dict[str, object] = {"head.type": "sequence-classification", "head.pooling": "first"}


def token_heads(name: str, prefix: str) -> dict[str, Head]:
    """Token classification and spans, which have the same names everywhere."""
    return {
        f"{name}ForTokenClassification": Head(
            {"head.type": "token-classification"}, {"head.output": "classifier"}, prefix
        ),
        f"{name}ForQuestionAnswering": Head({"head.type": "span"}, {"head.output": "qa_outputs"}, prefix),
    }


def masked_lm(dense: str, norm: str, output: str, bias: str, prefix: str, *, gelu: bool = False) -> Head:
    """A masked-lm head from the names of its four parts. An untied output has a bias of its own; `bias` is idle.

    `gelu`: its activation is that whatever the body's is.
    """
    own = f"{output}.bias"
    biases: dict[object, Node] = {True: shared(bias, Spare(own)), False: shared(own, Copy(bias))}
    names: dict[str, Node] = {
        "head.dense": dense,
        "head.transform_norm": norm,
        "head.output.weight": f"{output}.weight",
        "head.output.bias": bias if own == bias else choice("embeddings.tied", biases),
    }
    return Head({"head.type": "masked-lm"}, names, prefix, {"feed_forward.activation": "gelu"} if gelu else {})


def width(key: str, default: int | None = None) -> Special:
    """The width of the tables where it is not that of the model."""

    def read(raw: Raw) -> dict[str, object]:
        size = raw.get(key, default)
        return {} if size in (None, raw.get("hidden_size")) else {"embeddings.width": size}

    return Special(read, lambda c: {key: c.embeddings.width or c.d_model})


def offset_positions() -> Special:
    """RoBERTa's positions begin behind the padding id, and the table counts the rows in front of them."""

    def read(raw: Mapping[str, object]) -> dict[str, object]:
        pad, rows = raw.get("pad_token_id", 1), raw.get("max_position_embeddings", 512)
        if type(pad) is not int or type(rows) is not int or not 0 <= pad < rows - 1:
            raise InputError("pad_token_id", repr(pad)[:80], f"an id below {rows!r:.80}: positions begin behind it")
        return {"positions.offset": pad + 1, "max_len": rows - pad - 1}

    return Special(
        read,
        lambda c: {"max_position_embeddings": c.max_len + getattr(c.positions, "offset", 0)},
    )
