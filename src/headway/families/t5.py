"""T5 1.0 and 1.1, Flan-T5 (arXiv:1910.10683, 2002.05202): relative positions, no biases, scores without a scale."""

from headway.families._codecs import tokens
from headway.families._t5 import FIXED, UNREAD, WEIGHTS, feed_forward, feed_forward_keys, heads, keys
from headway.families._table import Family, Special

FAMILY = Family(
    model_type="t5",
    source="arXiv:1910.10683; google-t5/t5-small, google/flan-t5-base",
    fixed=FIXED,
    keys=keys(vocab_size=32128, d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_heads=8, n_positions=512),
    special=(Special(feed_forward, feed_forward_keys), tokens(eos=1, pad=0, decoder_start=0)),
    weights=WEIGHTS,
    heads=heads("T5ForConditionalGeneration"),
    unread=UNREAD,
)
