"""Mistral 7B and its successors (arXiv:2310.06825): Llama with a sliding window."""

from headway.families._codecs import labels, rope, sizes, tokens, windows
from headway.families._decoder import ATTENTION, GATED, KEYS, LLAMA, PRE_NORM, body, heads
from headway.families._table import Family

FAMILY = Family(
    model_type="mistral",
    source="arXiv:2310.06825; mistralai/Mistral-7B-v0.1",
    fixed=LLAMA,
    keys=KEYS
    | sizes(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=None,
        max_position_embeddings=131072,
    ),
    special=(rope(10000.0), windows(size=4096), tokens(bos=1, eos=2), labels()),
    weights=body(ATTENTION, GATED, PRE_NORM),
    heads=heads("Mistral"),
    unread=("*.rotary_emb.inv_freq",),
    gguf="llama",
)
