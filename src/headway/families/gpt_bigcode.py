"""StarCoder and SantaCoder (arXiv:2301.03988): GPT-2 with one key-value head for all queries."""

from headway.config import ModelConfig
from headway.families._codecs import ACTIVATIONS, Raw, labels, tokens
from headway.families._decoder import heads
from headway.families._table import Family, Key, Node, Special, grouped, layers
from headway.families.gpt2 import FIXED, KEYS, OUTSIDE

LAYER: dict[str, Node] = {
    "attention.qkv": grouped("attn.c_attn"),
    "attention.output": "attn.c_proj",
    "attention_residual.before": "ln_1",
    "feed_forward_residual.before": "ln_2",
    "feed_forward.up": "mlp.c_fc",
    "feed_forward.down": "mlp.c_proj",
}


def kv_heads(raw: Raw) -> dict[str, object]:
    """One key-value head, or as many as queries."""
    return {"n_kv_heads": 1 if raw.get("multi_query", True) else raw.get("n_head", 12)}


def kv_keys(config: ModelConfig) -> dict[str, object]:
    """The inverse of `kv_heads`."""
    return {"multi_query": config.n_kv_heads == 1}


FAMILY = Family(
    model_type="gpt_bigcode",
    source="arXiv:2305.06161; bigcode/starcoder",
    fixed=FIXED,
    keys=KEYS | {"activation_function": Key("feed_forward.activation", "gelu_pytorch_tanh", ACTIVATIONS)},
    special=(Special(kv_heads, kv_keys), tokens(bos=50256, eos=50256), labels()),
    weights=OUTSIDE | layers("decoder.blocks.{i}", "h.{i}", LAYER),
    heads=heads("GPTBigCode", "transformer."),
    only={"scale_attn_weights": True, "add_cross_attention": False},
    unread=("*attn.bias", "*attn.masked_bias"),
    gguf="starcoder",
)
