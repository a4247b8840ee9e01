"""Qwen 3 with experts (arXiv:2505.09388)."""

from headway.families._codecs import labels, rope, sizes, tokens, windows
from headway.families._decoder import ATTENTION, KEYS, LLAMA, PRE_NORM, QK_NORM, body, heads
from headway.families._table import Family, Key, Node, halves

EXPERTS: dict[str, Node] = {
    "feed_forward.router": "mlp.gate",
    "feed_forward.experts.{e}.up": halves("mlp.experts.{e}.gate_proj", "mlp.experts.{e}.up_proj"),
    "feed_forward.experts.{e}.down": "mlp.experts.{e}.down_proj",
}
SIZES = sizes(
    vocab_size=151936,
    hidden_size=2048,
    num_hidden_layers=24,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=None,
    max_position_embeddings=32768,
)

FAMILY = Family(
    model_type="qwen3_moe",
    source="arXiv:2505.09388; Qwen/Qwen3-30B-A3B",
    fixed=LLAMA | {"attention.qk_norm": "rmsnorm"},
    keys=KEYS
    | SIZES
    | {
        "attention_bias": Key("attention.bias", False, also=("attention.output_bias",)),
        "moe_intermediate_size": Key("d_ff", 768),
        "num_experts": Key("feed_forward.experts.experts"),
        "num_local_experts": Key("feed_forward.experts.experts", 128),
        "num_experts_per_tok": Key("feed_forward.experts.top_k", 8),
        "norm_topk_prob": Key("feed_forward.experts.normalize", False),
        "router_aux_loss_coef": Key("feed_forward.experts.balance", 0.001),
    },
    special=(rope(10000.0), windows(size=4096, switch="use_sliding_window"), tokens(), labels()),
    weights=body(ATTENTION, QK_NORM, EXPERTS, PRE_NORM),
    heads=heads("Qwen3Moe"),
    only={"decoder_sparse_step": 1, "mlp_only_layers": []},
    gguf="qwen3moe",
)
