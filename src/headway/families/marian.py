"""Marian's translation models, OPUS-MT (arXiv:1804.00344): the original Transformer, sines split in halves."""

from headway.families._codecs import tokens
from headway.families._pair import FIXED, UNREAD, alike, heads, keys, scaled, weights
from headway.families._table import Family

FAMILY = Family(
    model_type="marian",
    source="arXiv:1804.00344; Helsinki-NLP/opus-mt-en-de",
    fixed=FIXED | {"placement": "post", "positions.type": "sinusoidal", "positions.layout": "split"},
    keys=keys(vocab_size=58101),
    special=(scaled(), alike(), tokens(eos=0, pad=58100, decoder_start=58100)),
    weights=weights("after", learned=False, embedding_norm=False, final_norm=False),
    heads=heads("MarianMTModel"),
    only={"share_encoder_decoder_embeddings": True},
    unread=(*UNREAD, "model.*.embed_positions.weight"),
)
