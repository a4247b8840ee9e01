"""Qwen 2 and 2.5 (arXiv:2407.10671): Llama with biases on queries, keys and values."""

from headway.families._codecs import labels, rope, sizes, tokens, windows
from headway.families._decoder import ATTENTION, GATED, KEYS, LLAMA, PRE_NORM, body, heads
from headway.families._table import Family

FAMILY = Family(
    model_type="qwen2",
    source="arXiv:2407.10671; Qwen/Qwen2.5-0.5B",
    fixed=LLAMA | {"attention.bias": True},
    keys=KEYS
    | sizes(
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=22016,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=32768,
    ),
    # The first `max_window_layers` layers see everything, and all of them unless windows are switched on.
    special=(
        rope(10000.0),
        windows(lambda raw, i: i >= raw.get("max_window_layers", 28), size=4096, switch="use_sliding_window"),
        tokens(),
        labels(),
    ),
    weights=body(ATTENTION, GATED, PRE_NORM),
    heads=heads("Qwen2"),
    unread=("*.rotary_emb.inv_freq",),
    gguf="qwen2",
)
