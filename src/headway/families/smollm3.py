"""SmolLM3 (model card HuggingFaceTB/SmolLM3-3B): Llama in which every fourth layer has no positions at all."""

from headway.config import ModelConfig, Rope
from headway.errors import InputError
from headway.families._codecs import Raw, labels, rope, shortest, sizes, tokens, windows
from headway.families._decoder import ATTENTION, GATED, KEYS, LLAMA, PRE_NORM, body, heads
from headway.families._table import Family, Key, Special


def turned(raw: Raw) -> list[bool]:
    """Which layers turn their queries and keys: `no_rope_layers` holds a one for each that does."""
    every, depth = raw.get("no_rope_layer_interval", 4), raw["num_hidden_layers"]
    given = raw.get("no_rope_layers") or [(i + 1) % every for i in range(depth)]
    if len(given) != depth:
        raise InputError("no_rope_layers", f"{len(given)} layers", f"{depth}, as num_hidden_layers")
    return [bool(one) for one in given]


def turned_keys(config: ModelConfig) -> dict[str, object]:
    """The inverse of `turned`."""
    layers = config.positions.layers if isinstance(config.positions, Rope) else (False,)
    return {"no_rope_layers": [int(layers[i % len(layers)]) for i in range(config.n_layers)]}


FAMILY = Family(
    model_type="smollm3",
    source="HuggingFaceTB/SmolLM3-3B; arXiv:2501.18795 for layers without positions",
    fixed=LLAMA,
    keys=KEYS
    | sizes(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=None,
        max_position_embeddings=32768,
    )
    | {
        "attention_bias": Key("attention.bias", False, also=("attention.output_bias",)),
        "mlp_bias": Key("feed_forward.bias", False),
        "tie_word_embeddings": Key("embeddings.tied", True),
    },
    special=(
        rope(2e6),
        Special(lambda raw: {"positions.layers": shortest(turned(raw))}, turned_keys),
        windows(lambda raw, i: not turned(raw)[i], switch="use_sliding_window"),
        tokens(bos=128000, eos=128001, pad=128004),
        labels(),
    ),
    weights=body(ATTENTION, GATED, PRE_NORM),
    heads=heads("SmolLM3"),
    gguf="smollm3",
)
