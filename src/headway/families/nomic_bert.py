"""Nomic's BERT (arXiv:2402.01613): post-norm with RoPE and SwiGLU, no biases in the layers."""

from headway.families._codecs import labels, rope, tokens
from headway.families._encoder import BARE, KEYS, masked_lm
from headway.families._table import Family, Head, Key, Node, halves, layers

LAYER: dict[str, Node] = {
    "attention.qkv": "attn.Wqkv",
    "attention.output": "attn.out_proj",
    "attention_residual.after": "norm1",
    "feed_forward.up": halves("mlp.fc12", "mlp.fc11"),
    "feed_forward.down": "mlp.fc2",
    "feed_forward_residual.after": "norm2",
}
OUTSIDE: dict[str, Node] = {
    "embeddings.tokens": "embeddings.word_embeddings",
    "embeddings.types": "embeddings.token_type_embeddings",
    "embeddings.norm": "emb_ln",
}

FAMILY = Family(
    model_type="nomic_bert",
    source="arXiv:2402.01613; nomic-ai/nomic-embed-text-v1.5",
    fixed={"kind": "encoder", "norm.type": "layernorm", "placement": "post", "feed_forward.gated": True}
    | {"embeddings.norm": True},
    keys=KEYS
    | {
        "vocab_size": Key("vocab_size", 30528),
        "max_position_embeddings": Key("max_len", 2048),
        "hidden_act": KEYS["hidden_act"]._replace(default="silu"),
        "hidden_dropout_prob": Key("dropout", 0.0),
        "attention_probs_dropout_prob": Key("attention.dropout", 0.0),
        "head_dim": Key("d_head"),
    },
    special=(rope(1000.0), tokens(pad=0), labels()),
    weights=OUTSIDE | layers("encoder.blocks.{i}", "encoder.layers.{i}", LAYER),
    heads={
        "NomicBertForMaskedLM": masked_lm(
            "cls.predictions.transform.dense",
            "cls.predictions.transform.layer_norm",
            "cls.predictions.decoder",
            "cls.predictions.bias",
            "nomic_bert.",
        ),
        "NomicBertModel": Head(BARE),
    },
    unread=("*pooler.*", "cls.predictions.decoder.bias"),
)
