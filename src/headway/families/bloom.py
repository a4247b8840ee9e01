"""BLOOM (arXiv:2211.05100): ALiBi, a norm on the embeddings."""

from headway.families._codecs import labels, tokens
from headway.families._decoder import heads
from headway.families._table import Family, Key, Node, grouped, layers

LAYER: dict[str, Node] = {
    "attention.qkv": grouped("self_attention.query_key_value"),
    "attention.output": "self_attention.dense",
    "attention_residual.before": "input_layernorm",
    "feed_forward_residual.before": "post_attention_layernorm",
    "feed_forward.up": "mlp.dense_h_to_4h",
    "feed_forward.down": "mlp.dense_4h_to_h",
}
OUTSIDE: dict[str, Node] = {
    "embeddings.tokens": "word_embeddings",
    "embeddings.norm": "word_embeddings_layernorm",
    "decoder.norm": "ln_f",
}

FAMILY = Family(
    model_type="bloom",
    source="arXiv:2211.05100; bigscience/bloom-560m",
    fixed={
        "kind": "decoder",
        "positions.type": "alibi",
        "norm.type": "layernorm",
        "attention.bias": True,
        "attention.output_bias": True,
        "feed_forward.activation": "gelu-tanh",
        "feed_forward.bias": True,
        "embeddings.norm": True,
    },
    keys={
        "vocab_size": Key("vocab_size", 250880),
        "hidden_size": Key("d_model", 64),
        "n_embed": Key("d_model"),
        "n_layer": Key("n_layers", 2),
        "num_hidden_layers": Key("n_layers"),
        "n_head": Key("n_heads", 8),
        "num_attention_heads": Key("n_heads"),
        "seq_length": Key("max_len", 2048),
        "layer_norm_epsilon": Key("norm.eps", 1e-5),
        "hidden_dropout": Key("dropout", 0.0),
        "attention_dropout": Key("attention.dropout", 0.0),
        "tie_word_embeddings": Key("embeddings.tied", True),
    },
    special=(tokens(bos=1, eos=2), labels()),
    weights=OUTSIDE | layers("decoder.blocks.{i}", "h.{i}", LAYER),
    heads=heads("Bloom", "transformer."),
    only={"apply_residual_connection_post_layernorm": False},
    gguf="bloom",
)
