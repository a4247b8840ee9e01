"""ELECTRA (arXiv:2003.10555): BERT whose tables may be narrower than the model."""

from headway.families._codecs import labels, tokens
from headway.families._encoder import BARE, CLASSES, FIXED, KEYS, WEIGHTS, masked_lm, token_heads, width
from headway.families._table import Family, Head

FAMILY = Family(
    model_type="electra",
    source="arXiv:2003.10555; google/electra-small-discriminator",
    fixed=FIXED,
    keys=KEYS
    | {
        "hidden_size": KEYS["hidden_size"]._replace(default=256),
        "num_attention_heads": KEYS["num_attention_heads"]._replace(default=4),
        "intermediate_size": KEYS["intermediate_size"]._replace(default=1024),
    },
    special=(width("embedding_size", 128), tokens(pad=0), labels()),
    weights=WEIGHTS | {"embeddings.project": "embeddings_project"},
    heads={
        "ElectraForMaskedLM": masked_lm(
            "generator_predictions.dense",
            "generator_predictions.LayerNorm",
            "generator_lm_head",
            "generator_lm_head.bias",
            "electra.",
            gelu=True,
        ),
        "ElectraModel": Head(BARE),
        # The discriminator's own head is left aside: what people take from it is the encoder.
        "ElectraForPreTraining": Head(BARE, {}, "electra."),
        "ElectraForSequenceClassification": Head(
            CLASSES | {"head.transform": "gelu"},
            {"head.pool.dense": "classifier.dense", "head.output": "classifier.out_proj"},
            "electra.",
        ),
        **token_heads("Electra", "electra."),
    },
    only={"add_cross_attention": False, "is_decoder": False},
    unread=("*position_ids", "discriminator_predictions.*"),
)
