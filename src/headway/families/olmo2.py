"""OLMo 2 (arXiv:2501.00656): the norms stand inside the branches, QK-norm runs over all heads."""

from headway.families._codecs import labels, rope, sizes, tokens
from headway.families._decoder import ATTENTION, GATED, KEYS, LLAMA, QK_NORM, body, heads
from headway.families._table import Family, Key, Node

INSIDE: dict[str, Node] = {
    "attention_residual.inside": "post_attention_layernorm",
    "feed_forward_residual.inside": "post_feedforward_layernorm",
}

FAMILY = Family(
    model_type="olmo2",
    source="arXiv:2501.00656; allenai/OLMo-2-1124-7B",
    fixed=LLAMA | {"placement": "inside", "attention.qk_norm": "rmsnorm", "attention.qk_norm_over": "all"},
    keys=KEYS
    | sizes(
        vocab_size=50304,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=None,
        max_position_embeddings=2048,
    )
    | {
        "rms_norm_eps": Key("norm.eps", 1e-5),
        "attention_bias": Key("attention.bias", False, also=("attention.output_bias",)),
    },
    special=(rope(10000.0), tokens(pad=1, eos=50279), labels()),
    weights=body(ATTENTION, QK_NORM, GATED, INSIDE),
    heads=heads("Olmo2"),
    gguf="olmo2",
)
