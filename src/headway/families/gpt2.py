"""GPT-2 (Radford et al., 2019; model card openai-community/gpt2)."""

from headway.families._codecs import ACTIVATIONS, labels, tokens
from headway.families._decoder import heads
from headway.families._table import Family, Key, Node, layers, transpose

LAYER: dict[str, Node] = {
    "attention.qkv": transpose("attn.c_attn"),
    "attention.output": transpose("attn.c_proj"),
    "attention_residual.before": "ln_1",
    "feed_forward_residual.before": "ln_2",
    "feed_forward.up": transpose("mlp.c_fc"),
    "feed_forward.down": transpose("mlp.c_proj"),
}
FIXED: dict[str, object] = {
    "kind": "decoder",
    "positions.type": "learned",
    "norm.type": "layernorm",
    "attention.bias": True,
    "attention.output_bias": True,
    "feed_forward.bias": True,
}
OUTSIDE: dict[str, Node] = {"embeddings.tokens": "wte", "embeddings.learned": "wpe", "decoder.norm": "ln_f"}
KEYS = {
    "vocab_size": Key("vocab_size", 50257),
    "n_positions": Key("max_len", 1024),
    "n_embd": Key("d_model", 768),
    "n_layer": Key("n_layers", 12),
    "n_head": Key("n_heads", 12),
    "n_inner": Key("d_ff"),
    "activation_function": Key("feed_forward.activation", "gelu_new", ACTIVATIONS),
    "layer_norm_epsilon": Key("norm.eps", 1e-5),
    "resid_pdrop": Key("dropout", 0.1),
    "attn_pdrop": Key("attention.dropout", 0.1),
    "tie_word_embeddings": Key("embeddings.tied", True),
}
CAUSAL = heads("GPT2", "transformer.")

FAMILY = Family(
    model_type="gpt2",
    source="Radford et al. 2019; openai-community/gpt2",
    fixed=FIXED,
    keys=KEYS,
    special=(tokens(bos=50256, eos=50256), labels()),
    weights=OUTSIDE | layers("decoder.blocks.{i}", "h.{i}", LAYER),
    heads={
        "GPT2LMHeadModel": CAUSAL["GPT2ForCausalLM"],
        "GPT2ForSequenceClassification": CAUSAL["GPT2ForSequenceClassification"],
    },
    only={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    unread=("*attn.bias", "*attn.masked_bias"),
    gguf="gpt2",
)
