"""SigLIP's vision tower (arXiv:2303.15343): no first token; a learned query asks the patches."""

from headway.families._encoder import BARE
from headway.families._table import Family, Head, Node, lead
from headway.families._vision import ATTENTION_DROPOUT, BIASED, IMAGE, keys

PROBE: dict[str, Node] = {
    "head.pool.attention.query": lead(lead("head.probe")),
    "head.pool.attention.attention.qkv.weight": "head.attention.in_proj_weight",
    "head.pool.attention.attention.qkv.bias": "head.attention.in_proj_bias",
    "head.pool.attention.attention.output": "head.attention.out_proj",
    "head.pool.attention.norm": "head.layernorm",
    "head.pool.attention.feed_forward.up": "head.mlp.fc1",
    "head.pool.attention.feed_forward.down": "head.mlp.fc2",
}

FAMILY = Family(
    model_type="siglip_vision_model",
    source="arXiv:2303.15343; google/siglip-base-patch16-224",
    fixed=BIASED | {"kind": "vision", "embeddings.patch.first_token": False},
    keys=keys(hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6) | ATTENTION_DROPOUT,
    weights=IMAGE | PROBE,
    heads={"SiglipVisionModel": Head(BARE | {"head.pooling": "attention"})},
    only={"vision_use_head": True},
    unread=("*position_ids",),
)
