"""Falcon 40B, 180B and Falcon 2 (arXiv:2311.16867): the new decoder layout, parallel branches, grouped queries."""

from headway.families._codecs import ACTIVATIONS, labels, rope, sizes, tokens
from headway.families._decoder import heads
from headway.families._table import Family, Key, Node, grouped, layers

LAYER: dict[str, Node] = {
    "attention.qkv": grouped("self_attention.query_key_value"),
    "attention.output": "self_attention.dense",
    "attention_residual.before": "ln_attn",
    "feed_forward_residual.before": "ln_mlp",
    "feed_forward.up": "mlp.dense_h_to_4h",
    "feed_forward.down": "mlp.dense_4h_to_h",
}

FAMILY = Family(
    model_type="falcon",
    source="arXiv:2311.16867; tiiuae/falcon-40b",
    fixed={"kind": "decoder", "norm.type": "layernorm", "residual": "parallel"},
    keys=sizes(
        vocab_size=65024,
        hidden_size=4544,
        num_hidden_layers=32,
        num_attention_heads=71,
        max_position_embeddings=2048,
    )
    | {
        "num_kv_heads": Key("n_kv_heads"),
        "ffn_hidden_size": Key("d_ff"),
        "activation": Key("feed_forward.activation", "gelu", ACTIVATIONS),
        "layer_norm_epsilon": Key("norm.eps", 1e-5),
        "bias": Key("attention.bias", False, also=("attention.output_bias", "feed_forward.bias")),
        "hidden_dropout": Key("dropout", 0.0),
        "attention_dropout": Key("attention.dropout", 0.0),
        "tie_word_embeddings": Key("embeddings.tied", True),
    },
    special=(rope(10000.0), tokens(bos=11, eos=11), labels()),
    weights={"embeddings.tokens": "word_embeddings", "decoder.norm": "ln_f"}
    | layers("decoder.blocks.{i}", "h.{i}", LAYER),
    heads=heads("Falcon", "transformer."),
    only={"new_decoder_architecture": True, "alibi": False, "num_ln_in_parallel_attn": 2},
    unread=("*.rotary_emb.inv_freq",),
    gguf="falcon",
)
