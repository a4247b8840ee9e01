"""CLIP's text tower (arXiv:2103.00020): causal, its last token projected."""

from headway.families._codecs import sizes, tokens
from headway.families._encoder import BARE
from headway.families._table import Family, Head
from headway.families._vision import ATTENTION_DROPOUT, BIASED, TEXT, keys, projection

LAST = BARE | {"head.pooling": "last"}
SHARED = ("hidden_act", "layer_norm_eps")

FAMILY = Family(
    model_type="clip_text_model",
    source="arXiv:2103.00020; openai/clip-vit-base-patch32",
    fixed=BIASED | {"kind": "encoder", "positions.type": "learned", "attention.pattern": ("causal",)},
    keys={name: key for name, key in keys(hidden_act="quick_gelu", layer_norm_eps=1e-5).items() if name in SHARED}
    | sizes(
        vocab_size=49408,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=8,
        max_position_embeddings=77,
    )
    | ATTENTION_DROPOUT,
    special=(
        projection("projection_dim"),
        tokens(bos=49406, eos=49407, pad=1),
    ),
    weights=TEXT,
    heads={
        "CLIPTextModelWithProjection": Head(LAST, {"head.project": "text_projection"}, "text_model."),
        "CLIPTextModel": Head(LAST | {"head.projection": None}),
    },
    unread=("*position_ids",),
)
