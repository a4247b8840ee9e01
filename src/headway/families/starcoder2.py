"""StarCoder 2 (arXiv:2402.19173): LayerNorm, plain GELU and biases everywhere, grouped queries, a window."""

from headway.families._codecs import ACTIVATIONS, labels, rope, sizes, tokens, windows
from headway.families._decoder import ATTENTION, PRE_NORM, body, heads
from headway.families._table import Family, Key, Node

PLAIN: dict[str, Node] = {"feed_forward.up": "mlp.c_fc", "feed_forward.down": "mlp.c_proj"}

FAMILY = Family(
    model_type="starcoder2",
    source="arXiv:2402.19173; bigcode/starcoder2-3b",
    fixed={"kind": "decoder", "norm.type": "layernorm"},
    keys=sizes(
        vocab_size=49152,
        hidden_size=3072,
        intermediate_size=12288,
        num_hidden_layers=30,
        num_attention_heads=24,
        num_key_value_heads=2,
        max_position_embeddings=4096,
    )
    | {
        "hidden_act": Key("feed_forward.activation", "gelu_pytorch_tanh", ACTIVATIONS),
        "norm_epsilon": Key("norm.eps", 1e-5),
        "use_bias": Key("attention.bias", True, also=("attention.output_bias", "feed_forward.bias")),
        "attention_dropout": Key("attention.dropout", 0.0),
        "residual_dropout": Key("dropout", 0.0),
        "tie_word_embeddings": Key("embeddings.tied", True),
    },
    special=(rope(10000.0), windows(), tokens(bos=50256, eos=50256), labels()),
    weights=body(ATTENTION, PLAIN, PRE_NORM),
    heads=heads("Starcoder2"),
    gguf="starcoder2",
)
