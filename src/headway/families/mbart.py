"""mBART (arXiv:2001.08210): BART with the norms in front of the branches and one behind each stack."""

from headway.families._codecs import tokens
from headway.families._pair import FIXED, UNREAD, alike, heads, keys, scaled, weights
from headway.families._table import Family

FAMILY = Family(
    model_type="mbart",
    source="arXiv:2001.08210; facebook/mbart-large-50",
    fixed=FIXED | {"placement": "pre", "positions.type": "learned", "positions.offset": 2, "embeddings.norm": True},
    keys=keys(),
    special=(scaled(), alike(), tokens(bos=0, eos=2, pad=1)),
    weights=weights("before", learned=True, embedding_norm=True, final_norm=True),
    heads=heads("MBartForConditionalGeneration"),
    unread=UNREAD,
)
