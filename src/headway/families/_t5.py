"""What T5 (arXiv:1910.10683), its version 1.1 (arXiv:2002.05202) and mT5 share."""

from headway.config import ModelConfig
from headway.families._codecs import ACTIVATIONS, Raw
from headway.families._table import Head, Key, Node, Spare, choice, halves, layers, qkv, shared


def feed_forward(raw: Raw) -> dict[str, object]:
    """`relu`, or `gated-gelu`, where gelu is the one by tanh; a tied output reads states times 1 / sqrt(D)."""
    name = raw.get("feed_forward_proj", "relu")
    act = {"gated-gelu": "gelu_new"}.get(name, name.removeprefix("gated-"))
    scales = raw.get("scale_decoder_outputs", raw.get("tie_word_embeddings") is not False)
    out: dict[str, object] = {"head.scale": raw.get("d_model", 512) ** -0.5 if scales else 1.0}
    return out | {"feed_forward.activation": ACTIVATIONS.get(act, act), "feed_forward.gated": name.startswith("gated-")}


def feed_forward_keys(config: ModelConfig) -> dict[str, object]:
    """The inverse of `feed_forward`."""
    shape = config.feed_forward
    act = next(name for name, ours in ACTIVATIONS.items() if ours == shape.activation)
    act = {"gelu_new": "gelu"}.get(act, act) if shape.gated else act
    return {
        "feed_forward_proj": f"gated-{act}" if shape.gated else act,
        "scale_decoder_outputs": getattr(config.head, "scale", 1.0) != 1.0,
        "is_encoder_decoder": True,
    }


def stack(side: str, last: int) -> dict[str, Node]:
    """One stack; the table of its biases stands in its first layer, the feed-forward network is part `last`."""
    wide = halves(f"layer.{last}.DenseReluDense.wi_0", f"layer.{last}.DenseReluDense.wi_1")
    parts: dict[str, Node] = {
        "attention.qkv": qkv(*(f"layer.0.SelfAttention.{name}" for name in "qkv")),
        "attention.output": "layer.0.SelfAttention.o",
        "attention_residual.before": "layer.0.layer_norm",
        "cross_attention.q": "layer.1.EncDecAttention.q",
        "cross_attention.kv": halves("layer.1.EncDecAttention.k", "layer.1.EncDecAttention.v"),
        "cross_attention.output": "layer.1.EncDecAttention.o",
        "cross_residual.before": "layer.1.layer_norm",
        "feed_forward.up": choice("feed_forward.gated", {True: wide, False: f"layer.{last}.DenseReluDense.wi"}),
        "feed_forward.down": f"layer.{last}.DenseReluDense.wo",
        "feed_forward_residual.before": f"layer.{last}.layer_norm",
    }
    bias = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    outside: dict[str, Node] = {f"{side}.norm": f"{side}.final_layer_norm", f"{side}.bias.table": bias}
    return outside | layers(f"{side}.blocks.{{i}}", f"{side}.block.{{i}}", parts)


TABLES: dict[str, Node] = {
    "embeddings.tokens": shared("shared", Spare("encoder.embed_tokens")),
    "decoder_embeddings.tokens": "decoder.embed_tokens",
}
WEIGHTS = TABLES | stack("encoder", 1) | stack("decoder", 2)
FIXED: dict[str, object] = {
    "kind": "encoder-decoder",
    "positions.type": "relative",
    "norm.type": "rmsnorm",
    "attention.scale": 1.0,
}
UNREAD = ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)


def keys(**defaults: int | None) -> dict[str, Key]:
    """The sizes with the defaults of T5 or mT5, and what they have in common."""
    names = {
        "vocab_size": "vocab_size",
        "d_model": "d_model",
        "d_kv": "d_head",
        "d_ff": "d_ff",
        "num_layers": "n_layers",
        "num_decoder_layers": "n_decoder_layers",
        "num_heads": "n_heads",
        "n_positions": "max_len",
    }
    return {theirs: Key(ours, defaults.get(theirs)) for theirs, ours in names.items()} | {
        "relative_attention_num_buckets": Key("positions.buckets", 32),
        "relative_attention_max_distance": Key("positions.max_distance", 128),
        "dropout_rate": Key("dropout", 0.1),
        "layer_norm_epsilon": Key("norm.eps", 1e-6),
        "tie_word_embeddings": Key("embeddings.tied", True),
    }


def heads(name: str) -> dict[str, Head]:
    """The one head; an output that is not tied stands under its own name."""
    return {name: Head({"head.type": "causal-lm"}, {"head.output": "lm_head"})}
