"""DistilBERT (arXiv:1910.01108): BERT with half the layers, no sentence types, no pooler."""

from headway.families._codecs import ACTIVATIONS, labels, tokens
from headway.families._encoder import BARE, CLASSES, FIXED, masked_lm, token_heads
from headway.families._table import Family, Head, Key, Node, layers, qkv

LAYER: dict[str, Node] = {
    "attention.qkv": qkv("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    "attention.output": "attention.out_lin",
    "attention_residual.after": "sa_layer_norm",
    "feed_forward.up": "ffn.lin1",
    "feed_forward.down": "ffn.lin2",
    "feed_forward_residual.after": "output_layer_norm",
}
OUTSIDE: dict[str, Node] = {
    "embeddings.tokens": "embeddings.word_embeddings",
    "embeddings.learned": "embeddings.position_embeddings",
    "embeddings.norm": "embeddings.LayerNorm",
}

FAMILY = Family(
    model_type="distilbert",
    source="arXiv:1910.01108; distilbert/distilbert-base-uncased",
    fixed=FIXED | {"norm.eps": 1e-12},
    keys={
        "vocab_size": Key("vocab_size", 30522),
        "max_position_embeddings": Key("max_len", 512),
        "dim": Key("d_model", 768),
        "n_layers": Key("n_layers", 6),
        "n_heads": Key("n_heads", 12),
        "hidden_dim": Key("d_ff", 3072),
        "activation": Key("feed_forward.activation", "gelu", ACTIVATIONS),
        "dropout": Key("dropout", 0.1),
        "attention_dropout": Key("attention.dropout", 0.1),
        "tie_word_embeddings": Key("embeddings.tied", True),
    },
    special=(tokens(pad=0), labels()),
    weights=OUTSIDE | layers("encoder.blocks.{i}", "transformer.layer.{i}", LAYER),
    heads={
        "DistilBertForMaskedLM": masked_lm(
            "vocab_transform", "vocab_layer_norm", "vocab_projector", "vocab_projector.bias", "distilbert."
        ),
        "DistilBertModel": Head(BARE),
        "DistilBertForSequenceClassification": Head(
            CLASSES | {"head.transform": "relu"},
            {"head.pool.dense": "pre_classifier", "head.output": "classifier"},
            "distilbert.",
        ),
        **token_heads("DistilBert", "distilbert."),
    },
)
