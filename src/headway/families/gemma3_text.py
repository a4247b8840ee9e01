"""Gemma 3, the text model (arXiv:2503.19786): QK-norm, five sliding layers to one full, two thetas."""

from headway.families._codecs import ACTIVATIONS, labels, rope, sizes, tokens, windows
from headway.families._decoder import ATTENTION, GATED, KEYS, QK_NORM, SANDWICH, body, heads
from headway.families._table import Family, Key, Special
from headway.families.gemma2 import GEMMA, scale_keys, scales

FAMILY = Family(
    model_type="gemma3_text",
    source="arXiv:2503.19786; google/gemma-3-1b-pt",
    fixed=GEMMA | {"attention.qk_norm": "rmsnorm"},
    keys={key: value for key, value in KEYS.items() if key != "hidden_act"}
    | sizes(
        vocab_size=262208,
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=26,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        max_position_embeddings=131072,
    )
    | {
        "hidden_activation": Key("feed_forward.activation", "gelu_pytorch_tanh", ACTIVATIONS),
        "attention_bias": Key("attention.bias", False, also=("attention.output_bias",)),
        "tie_word_embeddings": Key("embeddings.tied", True),
        "final_logit_softcapping": Key("head.softcap"),
    },
    special=(
        Special(scales, scale_keys),
        rope(1e6, local=10000.0),
        windows(lambda raw, i: (i + 1) % raw.get("sliding_window_pattern", 6) > 0, size=4096),
        tokens(bos=2, eos=1, pad=0),
        labels(),
    ),
    weights=body(ATTENTION, QK_NORM, GATED, SANDWICH),
    heads={"Gemma3ForCausalLM": heads("Gemma3")["Gemma3ForCausalLM"]},
    only={"use_bidirectional_attention": False},
    gguf="gemma3",
)
