"""mT5 (arXiv:2010.11934): T5 1.1 over a hundred languages, its output a table of its own, without a scale."""

from headway.families._codecs import tokens
from headway.families._t5 import FIXED, UNREAD, WEIGHTS, feed_forward, feed_forward_keys, heads, keys
from headway.families._table import Family, Special

FAMILY = Family(
    model_type="mt5",
    source="arXiv:2010.11934; google/mt5-small",
    fixed=FIXED,
    keys=keys(vocab_size=250112, d_model=512, d_kv=64, d_ff=1024, num_layers=8, num_heads=6, n_positions=512),
    special=(
        Special(
            lambda raw: feed_forward({"feed_forward_proj": "gated-gelu", **raw}) | {"head.scale": 1.0},
            feed_forward_keys,
        ),
        tokens(eos=1, pad=0, decoder_start=0),
    ),
    weights=WEIGHTS,
    heads=heads("MT5ForConditionalGeneration"),
    unread=UNREAD,
)
