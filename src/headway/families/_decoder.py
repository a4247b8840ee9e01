"""What most decoders since Llama (arXiv:2302.13971) share; their files say only where they differ."""

from __future__ import annotations

from headway.families._codecs import ACTIVATIONS
from headway.families._table import Head, Key, Node, halves, layers, qkv

LLAMA: dict[str, object] = {
    "kind": "decoder",
    "norm.type": "rmsnorm",
    "placement": "pre",
    "feed_forward.gated": True,
    "embeddings.tied": False,
}

KEYS = {
    "hidden_act": Key("feed_forward.activation", "silu", ACTIVATIONS),
    "rms_norm_eps": Key("norm.eps", 1e-6),
    "attention_dropout": Key("attention.dropout", 0.0),
    "tie_word_embeddings": Key("embeddings.tied", False),
}

ATTENTION: dict[str, Node] = {
    "attention.qkv": qkv("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.output": "self_attn.o_proj",
}
QK_NORM: dict[str, Node] = {"attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm"}
GATED: dict[str, Node] = {
    "feed_forward.up": halves("mlp.gate_proj", "mlp.up_proj"),
    "feed_forward.down": "mlp.down_proj",
}
PRE_NORM: dict[str, Node] = {
    "attention_residual.before": "input_layernorm",
    "feed_forward_residual.before": "post_attention_layernorm",
}
SANDWICH: dict[str, Node] = {
    "attention_residual.before": "input_layernorm",
    "attention_residual.inside": "post_attention_layernorm",
    "feed_forward_residual.before": "pre_feedforward_layernorm",
    "feed_forward_residual.inside": "post_feedforward_layernorm",
}


def body(*parts: dict[str, Node]) -> dict[str, Node]:
    """The names outside the layers, and those of one layer's parts."""
    layer = {name: node for part in parts for name, node in part.items()}
    outside: dict[str, Node] = {"embeddings.tokens": "embed_tokens", "decoder.norm": "norm"}
    return outside | layers("decoder.blocks.{i}", "layers.{i}", layer)


def heads(name: str, prefix: str = "model.", output: str = "lm_head") -> dict[str, Head]:
    """`NameForCausalLM` and `NameForSequenceClassification`, which reads the last token."""
    classes = {"head.type": "sequence-classification", "head.pooling": "last", "head.bias": False}
    return {
        f"{name}ForCausalLM": Head({"head.type": "causal-lm"}, {"head.output": output}, prefix),
        f"{name}ForSequenceClassification": Head(classes, {"head.output": "score"}, prefix),
    }
