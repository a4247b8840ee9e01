"""Phi-3 and Phi-4-mini (arXiv:2404.14219): Llama with fused projections, long contexts by LongRoPE."""

from headway.families._codecs import labels, rope, sizes, tokens, windows
from headway.families._decoder import KEYS, LLAMA, PRE_NORM, body, heads
from headway.families._table import Family, Key, Node

FUSED: dict[str, Node] = {
    "attention.qkv": "self_attn.qkv_proj",
    "attention.output": "self_attn.o_proj",
    "feed_forward.up": "mlp.gate_up_proj",
    "feed_forward.down": "mlp.down_proj",
}

FAMILY = Family(
    model_type="phi3",
    source="arXiv:2404.14219; microsoft/Phi-3-mini-4k-instruct",
    fixed=LLAMA,
    keys=KEYS
    | sizes(
        vocab_size=32064,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=None,
        max_position_embeddings=4096,
    )
    | {"rms_norm_eps": Key("norm.eps", 1e-5), "resid_pdrop": Key("dropout", 0.0)},
    special=(rope(10000.0, fraction=1.0), windows(), tokens(bos=1, eos=32000, pad=32000), labels()),
    weights=body(FUSED, PRE_NORM),
    heads=heads("Phi3"),
    gguf="phi3",
)
