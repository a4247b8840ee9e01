"""PEGASUS (arXiv:1912.08777): pre-norm, sines split in halves."""

from headway.families._codecs import tokens
from headway.families._pair import FIXED, UNREAD, alike, heads, keys, scaled, weights
from headway.families._table import Family

FAMILY = Family(
    model_type="pegasus",
    source="arXiv:1912.08777; google/pegasus-xsum",
    fixed=FIXED | {"placement": "pre", "positions.type": "sinusoidal", "positions.layout": "split"},
    keys=keys(),
    special=(scaled(), alike(), tokens(eos=1, pad=0, decoder_start=0)),
    weights=weights("before", learned=False, embedding_norm=False, final_norm=True),
    heads=heads("PegasusForConditionalGeneration"),
    unread=(*UNREAD, "model.*.embed_positions.weight"),
)
