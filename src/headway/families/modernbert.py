"""ModernBERT (arXiv:2412.13663): pre-norm, RoPE, GeGLU, no biases; two of three layers see a window."""

from headway.families._codecs import ACTIVATIONS, labels, rope, sizes, tokens, windows
from headway.families._encoder import BARE, masked_lm
from headway.families._table import Family, Head, Key, Node, layers

LAYER: dict[str, Node] = {
    "attention.qkv": "attn.Wqkv",
    "attention.output": "attn.Wo",
    "attention_residual.before": "attn_norm",
    "feed_forward_residual.before": "mlp_norm",
    "feed_forward.up": "mlp.Wi",
    "feed_forward.down": "mlp.Wo",
}
OUTSIDE: dict[str, Node] = {"embeddings.tokens": "embeddings.tok_embeddings", "embeddings.norm": "embeddings.norm"}

FAMILY = Family(
    model_type="modernbert",
    source="arXiv:2412.13663; answerdotai/ModernBERT-base",
    fixed={"kind": "encoder", "norm.type": "layernorm", "feed_forward.gated": True}
    | {"embeddings.norm": True, "embeddings.leads": True},
    keys=sizes(
        vocab_size=50368,
        hidden_size=768,
        intermediate_size=1152,
        num_hidden_layers=22,
        num_attention_heads=12,
        max_position_embeddings=8192,
    )
    | {
        "hidden_activation": Key("feed_forward.activation", "gelu", ACTIVATIONS),
        "norm_eps": Key("norm.eps", 1e-5),
        "norm_bias": Key("norm.bias", False),
        "attention_bias": Key("attention.bias", False, also=("attention.output_bias",)),
        "mlp_bias": Key("feed_forward.bias", False),
        "attention_dropout": Key("attention.dropout", 0.0),
        "classifier_bias": Key("head.transform_bias", False),
        "decoder_bias": Key("head.bias", True),
        "tie_word_embeddings": Key("embeddings.tied", True),
    },
    # `local_attention` counts both sides and not the token itself: half of it and one is what we call the window.
    special=(
        rope(160000.0, local=10000.0),
        windows(
            lambda raw, i: i % raw.get("global_attn_every_n_layers", 3) > 0,
            key="local_attention",
            size=128,
            full="full",
            inverse=(lambda width: width // 2 + 1, lambda window: 2 * (window - 1)),
        ),
        tokens(bos=50281, eos=50282, pad=50283),
        labels(),
    ),
    weights=OUTSIDE | {"encoder.norm": "final_norm"} | layers("encoder.blocks.{i}", "layers.{i}", LAYER),
    heads={
        "ModernBertForMaskedLM": masked_lm("head.dense", "head.norm", "decoder", "decoder.bias", "model.", gelu=True),
        "ModernBertModel": Head(BARE),
    },
    only={"classifier_activation": "gelu"},
)
