"""DeiT (arXiv:2012.12877): ViT with a second learned token, for distillation."""

from headway.families._codecs import labels
from headway.families._table import Family, Node, lead
from headway.families._vision import ATTENTION, DROPOUTS, FIXED, LAYERS, PLAIN, body, heads, keys

DISTILLATION: dict[str, Node] = {"embeddings.patches.registers": lead("embeddings.distillation_token")}

FAMILY = Family(
    model_type="deit",
    source="arXiv:2012.12877; facebook/deit-base-patch16-224",
    fixed=FIXED | {"embeddings.patch.registers": 1},
    keys=keys() | DROPOUTS,
    special=(labels(),),
    weights=body(ATTENTION, PLAIN) | DISTILLATION,
    heads=heads("DeiT", "deit."),
    unread=("*pooler.*", "*mask_token"),
    modules=LAYERS,
)
