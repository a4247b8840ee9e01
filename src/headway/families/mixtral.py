"""Mixtral (arXiv:2401.04088): Mistral whose feed-forward networks are experts, two of eight per token."""

from headway.families._codecs import labels, rope, sizes, tokens, windows
from headway.families._decoder import ATTENTION, KEYS, LLAMA, PRE_NORM, body, heads
from headway.families._table import Family, Key, Node, halves

EXPERTS: dict[str, Node] = {
    "feed_forward.router": "block_sparse_moe.gate",
    "feed_forward.experts.{e}.up": halves("block_sparse_moe.experts.{e}.w1", "block_sparse_moe.experts.{e}.w3"),
    "feed_forward.experts.{e}.down": "block_sparse_moe.experts.{e}.w2",
}

FAMILY = Family(
    model_type="mixtral",
    source="arXiv:2401.04088; mistralai/Mixtral-8x7B-v0.1",
    fixed=LLAMA | {"feed_forward.experts.normalize": True},
    keys=KEYS
    | sizes(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=None,
        max_position_embeddings=131072,
    )
    | {
        "rms_norm_eps": Key("norm.eps", 1e-5),
        "num_local_experts": Key("feed_forward.experts.experts", 8),
        "num_experts_per_tok": Key("feed_forward.experts.top_k", 2),
        "router_aux_loss_coef": Key("feed_forward.experts.balance", 0.001),
    },
    special=(rope(1e6), windows(), tokens(bos=1, eos=2), labels()),
    weights=body(ATTENTION, EXPERTS, PRE_NORM),
    heads=heads("Mixtral"),
    only={"router_jitter_noise": 0.0},
    gguf="llama",
)
