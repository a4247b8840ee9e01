"""Qwen 3 (arXiv:2505.09388): Llama with QK-norm and heads whose size is apart from the width."""

from headway.families._codecs import labels, rope, sizes, tokens, windows
from headway.families._decoder import ATTENTION, GATED, KEYS, LLAMA, PRE_NORM, QK_NORM, body, heads
from headway.families._table import Family, Key

FAMILY = Family(
    model_type="qwen3",
    source="arXiv:2505.09388; Qwen/Qwen3-0.6B",
    fixed=LLAMA | {"attention.qk_norm": "rmsnorm"},
    keys=KEYS
    | sizes(
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=22016,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
        max_position_embeddings=32768,
    )
    | {"attention_bias": Key("attention.bias", False, also=("attention.output_bias",))},
    special=(
        rope(10000.0),
        windows(lambda raw, i: i >= raw.get("max_window_layers", 28), size=4096, switch="use_sliding_window"),
        tokens(),
        labels(),
    ),
    weights=body(ATTENTION, QK_NORM, GATED, PRE_NORM),
    heads=heads("Qwen3"),
    gguf="qwen3",
)
