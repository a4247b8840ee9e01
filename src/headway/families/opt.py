"""OPT (arXiv:2205.01068) in the pre-norm form of all sizes but 350M: learned positions that begin at two, ReLU."""

from headway.families._codecs import ACTIVATIONS, labels, tokens
from headway.families._decoder import heads
from headway.families._encoder import width
from headway.families._table import Family, Key, Node, layers, qkv

LAYER: dict[str, Node] = {
    "attention.qkv": qkv("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.output": "self_attn.out_proj",
    "attention_residual.before": "self_attn_layer_norm",
    "feed_forward_residual.before": "final_layer_norm",
    "feed_forward.up": "fc1",
    "feed_forward.down": "fc2",
}
OUTSIDE: dict[str, Node] = {
    "embeddings.tokens": "embed_tokens",
    "embeddings.learned": "embed_positions",
    "decoder.norm": "final_layer_norm",
}

FAMILY = Family(
    model_type="opt",
    source="arXiv:2205.01068; facebook/opt-125m",
    fixed={"kind": "decoder", "positions.type": "learned", "positions.offset": 2, "norm.type": "layernorm"},
    keys={
        "vocab_size": Key("vocab_size", 50272),
        "hidden_size": Key("d_model", 768),
        "num_hidden_layers": Key("n_layers", 12),
        "num_attention_heads": Key("n_heads", 12),
        "ffn_dim": Key("d_ff", 3072),
        "max_position_embeddings": Key("max_len", 2048),
        "activation_function": Key("feed_forward.activation", "relu", ACTIVATIONS),
        "enable_bias": Key("attention.bias", True, also=("attention.output_bias", "feed_forward.bias")),
        "dropout": Key("dropout", 0.1),
        "attention_dropout": Key("attention.dropout", 0.0),
        "tie_word_embeddings": Key("embeddings.tied", True),
    },
    special=(width("word_embed_proj_dim"), tokens(bos=2, eos=2, pad=1), labels()),
    weights=OUTSIDE | layers("decoder.blocks.{i}", "layers.{i}", LAYER),
    heads=heads("OPT", "model.decoder."),
    only={"do_layer_norm_before": True, "_remove_final_layer_norm": False, "layer_norm_elementwise_affine": True},
)
