"""BART (arXiv:1910.13461): post-norm, learned positions that begin at two, a norm on the embeddings."""

from headway.families._codecs import tokens
from headway.families._pair import FIXED, UNREAD, alike, heads, keys, scaled, weights
from headway.families._table import Family

FAMILY = Family(
    model_type="bart",
    source="arXiv:1910.13461; facebook/bart-base",
    fixed=FIXED | {"placement": "post", "positions.type": "learned", "positions.offset": 2, "embeddings.norm": True},
    keys=keys(),
    special=(scaled(), alike(), tokens(bos=0, eos=2, pad=1, decoder_start=2)),
    weights=weights("after", learned=True, embedding_norm=True, final_norm=False),
    heads=heads("BartForConditionalGeneration"),
    unread=UNREAD,
)
