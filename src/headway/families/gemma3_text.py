"""Gemma 3, the text model (arXiv:2503.19786): QK-norm, five sliding layers to one full, two thetas."""

from headway.families._codecs import labels, rope, tokens, windows
from headway.families._decoder import ATTENTION, GATED, QK_NORM, SANDWICH, body, heads
from headway.families._table import Family, Key, Special
from headway.families.gemma2 import GEMMA, GEMMA_KEYS, scale_keys, scales

FAMILY = Family(
    model_type="gemma3_text",
    source="arXiv:2503.19786; google/gemma-3-1b-pt",
    fixed=GEMMA | {"attention.qk_norm": "rmsnorm"},
    keys=GEMMA_KEYS
    | {
        "vocab_size": Key("vocab_size", 262208),
        "max_position_embeddings": Key("max_len", 131072),
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
