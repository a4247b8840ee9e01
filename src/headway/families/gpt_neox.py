"""GPT-NeoX and Pythia (arXiv:2204.06745, 2304.01373): parallel branches, RoPE on a quarter of each head."""

from headway.config import ModelConfig
from headway.families._codecs import ACTIVATIONS, Raw, labels, rope, sizes, tokens
from headway.families._table import Family, Head, Key, Node, Special, grouped, layers

LAYER: dict[str, Node] = {
    "attention.qkv": grouped("attention.query_key_value"),
    "attention.output": "attention.dense",
    "attention_residual.before": "input_layernorm",
    "feed_forward_residual.before": "post_attention_layernorm",
    "feed_forward.up": "mlp.dense_h_to_4h",
    "feed_forward.down": "mlp.dense_4h_to_h",
}


def residual(raw: Raw) -> dict[str, object]:
    """Parallel branches unless switched off."""
    return {"residual": "parallel" if raw.get("use_parallel_residual", True) else "sequential"}


def residual_keys(config: ModelConfig) -> dict[str, object]:
    """The inverse of `residual`."""
    return {"use_parallel_residual": config.residual == "parallel"}


FAMILY = Family(
    model_type="gpt_neox",
    source="arXiv:2304.01373; EleutherAI/pythia-70m",
    fixed={"kind": "decoder", "norm.type": "layernorm", "feed_forward.bias": True, "embeddings.tied": False},
    keys=sizes(
        vocab_size=50432,
        hidden_size=6144,
        intermediate_size=24576,
        num_hidden_layers=44,
        num_attention_heads=64,
        max_position_embeddings=2048,
    )
    | {
        "hidden_act": Key("feed_forward.activation", "gelu", ACTIVATIONS),
        "layer_norm_eps": Key("norm.eps", 1e-5),
        "hidden_dropout": Key("dropout", 0.0),
        "attention_dropout": Key("attention.dropout", 0.0),
        "attention_bias": Key("attention.bias", True, also=("attention.output_bias",)),
        "tie_word_embeddings": Key("embeddings.tied", False),
    },
    special=(rope(10000.0, fraction=0.25), Special(residual, residual_keys), tokens(bos=0, eos=2), labels()),
    weights={"embeddings.tokens": "embed_in", "decoder.norm": "final_layer_norm"}
    | layers("decoder.blocks.{i}", "layers.{i}", LAYER),
    heads={"GPTNeoXForCausalLM": Head({"head.type": "causal-lm"}, {"head.output": "embed_out"}, "gpt_neox.")},
    unread=("*.rotary_emb.inv_freq", "*.attention.bias", "*.attention.masked_bias"),
    gguf="gptneox",
)
