"""Gemma 2 (arXiv:2408.00118): sandwich norms with an offset, capped scores, every second layer slides."""

import math

from headway.config import ModelConfig
from headway.families._codecs import ACTIVATIONS, Raw, labels, rope, sizes, tokens, windows
from headway.families._decoder import ATTENTION, GATED, KEYS, LLAMA, SANDWICH, body, heads
from headway.families._table import Family, Key, Special

GEMMA = LLAMA | {"placement": "sandwich", "norm.offset": 1}
GEMMA_KEYS = (
    {key: value for key, value in KEYS.items() if key != "hidden_act"}
    | sizes(
        vocab_size=256000,
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=26,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        max_position_embeddings=8192,
    )
    | {
        "hidden_activation": Key("feed_forward.activation", "gelu_pytorch_tanh", ACTIVATIONS),
        "attention_bias": Key("attention.bias", False, also=("attention.output_bias",)),
        "tie_word_embeddings": Key("embeddings.tied", True),
    }
)


def scales(raw: Raw) -> dict[str, object]:
    """Embeddings times sqrt(D); scores over the root of a number of the config's own."""
    return {
        "embeddings.scale": math.sqrt(raw.get("hidden_size", 2304)),
        "attention.scale": raw.get("query_pre_attn_scalar", 256) ** -0.5,
    }


def scale_keys(config: ModelConfig) -> dict[str, object]:
    """The inverse of `scales`."""
    return {"query_pre_attn_scalar": round((config.attention.scale or config.d_head**-0.5) ** -2)}


FAMILY = Family(
    model_type="gemma2",
    source="arXiv:2408.00118; google/gemma-2-2b",
    fixed=GEMMA,
    keys=GEMMA_KEYS
    | {"attn_logit_softcapping": Key("attention.softcap", 50.0), "final_logit_softcapping": Key("head.softcap", 30.0)},
    special=(
        Special(scales, scale_keys),
        rope(10000.0),
        windows(lambda _, i: i % 2 == 0, size=4096),
        tokens(bos=2, eos=1, pad=0),
        labels(),
    ),
    weights=body(ATTENTION, GATED, SANDWICH),
    heads=heads("Gemma2"),
    gguf="gemma2",
)
