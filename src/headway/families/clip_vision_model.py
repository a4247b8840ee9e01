"""CLIP's vision tower (arXiv:2103.00020): a norm on the embeddings, the first token projected."""

from headway.families._encoder import BARE
from headway.families._table import Family, Head
from headway.families._vision import ATTENTION_DROPOUT, BIASED, IMAGE, keys, projection

FAMILY = Family(
    model_type="clip_vision_model",
    source="arXiv:2103.00020; openai/clip-vit-base-patch32",
    fixed=BIASED | {"kind": "vision", "embeddings.norm": True, "embeddings.patch.bias": False},
    keys=keys(hidden_act="quick_gelu", layer_norm_eps=1e-5, patch_size=32) | ATTENTION_DROPOUT,
    special=(projection("projection_dim"),),
    weights=IMAGE | {"embeddings.patches.first": "embeddings.class_embedding", "embeddings.norm": "pre_layrnorm"},
    heads={
        "CLIPVisionModelWithProjection": Head(BARE, {"head.project": "visual_projection"}, "vision_model."),
        "CLIPVisionModel": Head(BARE | {"head.projection": None}),
    },
    unread=("*position_ids",),
)
