"""ViT (arXiv:2010.11929)."""

from headway.families._codecs import labels
from headway.families._table import Family
from headway.families._vision import ATTENTION, DROPOUTS, FIXED, LAYERS, PLAIN, body, heads, keys

FAMILY = Family(
    model_type="vit",
    source="arXiv:2010.11929; google/vit-base-patch16-224",
    fixed=FIXED,
    keys=keys() | DROPOUTS,
    special=(labels(),),
    weights=body(ATTENTION, PLAIN),
    heads=heads("ViT", "vit."),
    unread=("*pooler.*", "*mask_token"),
    modules=LAYERS,
)
