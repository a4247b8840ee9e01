"""Llama 2 and 3, SmolLM2, TinyLlama (arXiv:2302.13971, 2307.09288, 2407.21783)."""

from headway.families._codecs import labels, rope, sizes, tokens
from headway.families._decoder import ATTENTION, GATED, KEYS, LLAMA, PRE_NORM, body, heads
from headway.families._table import Family, Key

FAMILY = Family(
    model_type="llama",
    source="arXiv:2407.21783; meta-llama/Llama-3.1-8B",
    fixed=LLAMA,
    keys=KEYS
    | sizes(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=None,
        head_dim=None,
        max_position_embeddings=2048,
    )
    | {
        "attention_bias": Key("attention.bias", False, also=("attention.output_bias",)),
        "mlp_bias": Key("feed_forward.bias", False),
    },
    special=(rope(10000.0), tokens(bos=1, eos=2), labels()),
    weights=body(ATTENTION, GATED, PRE_NORM),
    heads=heads("Llama"),
    unread=("*.rotary_emb.inv_freq",),
    gguf="llama",
)
