"""BERT and what has its form: MiniLM, E5, BGE, GTE (arXiv:1810.04805)."""

from headway.families._codecs import labels, tokens
from headway.families._encoder import CLASSES, FIXED, KEYS, POOLER, WEIGHTS, masked_lm, token_heads
from headway.families._table import Family, Head

MASKED = masked_lm(
    "cls.predictions.transform.dense",
    "cls.predictions.transform.LayerNorm",
    "cls.predictions.decoder",
    "cls.predictions.bias",
    "bert.",
)

FAMILY = Family(
    model_type="bert",
    source="arXiv:1810.04805; google-bert/bert-base-uncased, sentence-transformers/all-MiniLM-L6-v2",
    fixed=FIXED,
    keys=KEYS,
    special=(tokens(pad=0), labels()),
    weights=WEIGHTS,
    heads={
        "BertForMaskedLM": MASKED,
        "BertModel": Head(POOLER, {"head.pool.dense": "pooler.dense"}),
        "BertForSequenceClassification": Head(
            CLASSES | {"head.transform": "tanh"},
            {"head.pool.dense": "bert.pooler.dense", "head.output": "classifier"},
            "bert.",
        ),
        **token_heads("Bert", "bert."),
        "BertForPreTraining": MASKED,
    },
    only={"add_cross_attention": False, "is_decoder": False},
    unread=("*position_ids", "*pooler.*", "cls.seq_relationship.*", "cls.predictions.decoder.bias"),
    gguf="bert",
)
