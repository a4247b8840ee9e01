"""What vision models since ViT (arXiv:2010.11929) share."""

from __future__ import annotations

from headway.config import ModelConfig
from headway.families._codecs import ACTIVATIONS, Raw
from headway.families._encoder import POOLER
from headway.families._table import Head, Key, Node, Special, conv, layers, lead, qkv

FIXED: dict[str, object] = {
    "kind": "vision",
    "norm.type": "layernorm",
    "attention.output_bias": True,
    "feed_forward.bias": True,
}


def keys(**defaults: object) -> dict[str, Key]:
    """The keys of ViT's config with the defaults of a model of its form."""
    base = {
        "hidden_size": Key("d_model", 768),
        "num_hidden_layers": Key("n_layers", 12),
        "num_attention_heads": Key("n_heads", 12),
        "intermediate_size": Key("d_ff", 3072),
        "hidden_act": Key("feed_forward.activation", "gelu", ACTIVATIONS),
        "layer_norm_eps": Key("norm.eps", 1e-12),
        "image_size": Key("embeddings.patch.image", 224),
        "patch_size": Key("embeddings.patch.size", 16),
        "num_channels": Key("embeddings.patch.channels", 3),
    }
    return {theirs: key._replace(default=defaults.get(theirs, key.default)) for theirs, key in base.items()}


DROPOUTS = {
    "hidden_dropout_prob": Key("dropout", 0.0),
    "attention_probs_dropout_prob": Key("attention.dropout", 0.0),
    "qkv_bias": Key("attention.bias", True),
}

OUTSIDE: dict[str, Node] = {
    "embeddings.patches.project": conv("embeddings.patch_embeddings.projection"),
    "embeddings.patches.first": lead(lead("embeddings.cls_token")),
    "embeddings.learned.weight": lead("embeddings.position_embeddings"),
    "encoder.norm": "layernorm",
}
ATTENTION: dict[str, Node] = {
    "attention.qkv": qkv("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    "attention.output": "attention.output.dense",
}
PLAIN: dict[str, Node] = {
    "attention_residual.before": "layernorm_before",
    "feed_forward_residual.before": "layernorm_after",
    "feed_forward.up": "intermediate.dense",
    "feed_forward.down": "output.dense",
}

MODULES = {f"attention.attention.{name}": f"attention.{name[0]}_proj" for name in ("query", "key", "value")}
MODULES |= {"attention.output.dense": "attention.o_proj"}
LAYERS = MODULES | {"encoder.layer.": "layers.", "intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2"}


def body(*parts: dict[str, Node]) -> dict[str, Node]:
    """The names of one layer's parts, with those outside the layers."""
    layer = {name: node for part in parts for name, node in part.items()}
    return OUTSIDE | layers("encoder.blocks.{i}", "encoder.layer.{i}", layer)


def heads(name: str, prefix: str) -> dict[str, Head]:
    """Classification of the first token, and the bare model with its pooler."""
    classes = {"head.type": "image-classification", "head.pooling": "first"}
    return {
        f"{name}ForImageClassification": Head(classes, {"head.output": "classifier"}, prefix),
        f"{name}Model": Head(POOLER, {"head.pool.dense": "pooler.dense"}),
    }


# --- the two towers of CLIP (arXiv:2103.00020) and SigLIP (arXiv:2303.15343) -------------------------------------

TOWER: dict[str, Node] = layers(
    "encoder.blocks.{i}",
    "encoder.layers.{i}",
    {
        "attention.qkv": qkv("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention.output": "self_attn.out_proj",
        "attention_residual.before": "layer_norm1",
        "feed_forward_residual.before": "layer_norm2",
        "feed_forward.up": "mlp.fc1",
        "feed_forward.down": "mlp.fc2",
    },
)
TEXT: dict[str, Node] = TOWER | {
    "embeddings.tokens": "embeddings.token_embedding",
    "embeddings.learned": "embeddings.position_embedding",
    "encoder.norm": "final_layer_norm",
}
IMAGE: dict[str, Node] = TOWER | {
    "embeddings.patches.project": conv("embeddings.patch_embedding"),
    "embeddings.learned": "embeddings.position_embedding",
    "encoder.norm": "post_layernorm",
}
BIASED: dict[str, object] = {
    "norm.type": "layernorm",
    "attention.bias": True,
    "attention.output_bias": True,
    "feed_forward.bias": True,
}
ATTENTION_DROPOUT = {"attention_dropout": Key("attention.dropout", 0.0)}


def projection(key: str, default: int | None = 512) -> Special:
    """The size of the last linear map; as wide as the model where neither the config nor `default` says it."""

    def read(raw: Raw) -> dict[str, object]:
        return {"head.projection": raw.get(key) or default or raw.get("hidden_size", 768)}

    def write(config: ModelConfig) -> dict[str, object]:
        size = getattr(config.head, "projection", None)
        return {} if size is None else {key: size}

    return Special(read, write)
