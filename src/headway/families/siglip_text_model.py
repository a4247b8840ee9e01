"""SigLIP's text tower (arXiv:2303.15343): everything sees everything, the last place is projected."""

from headway.families._codecs import sizes, tokens
from headway.families._encoder import BARE
from headway.families._table import Family, Head
from headway.families._vision import ATTENTION_DROPOUT, BIASED, TEXT, keys, projection

SHARED = ("hidden_act", "layer_norm_eps")


FAMILY = Family(
    model_type="siglip_text_model",
    source="arXiv:2303.15343; google/siglip-base-patch16-224",
    fixed=BIASED | {"kind": "encoder", "positions.type": "learned"},
    keys={
        name: key for name, key in keys(hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6).items() if name in SHARED
    }
    | sizes(
        vocab_size=32000,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=64,
    )
    | ATTENTION_DROPOUT,
    special=(projection("projection_size", None), tokens(bos=49406, eos=49407, pad=1)),
    weights=TEXT | {"head.project": "head"},
    heads={"SiglipTextModel": Head(BARE | {"head.pooling": "last", "head.projection_bias": True})},
    unread=("*position_ids",),
)
