"""Tiny random reference models of `transformers`, made from a family's own table: a new family needs no line here.

Sizes go in through the keys that the family maps to our sizes. VARIANTS holds what a published checkpoint of the
family switches on and the defaults leave off; each is one more row of the parity table.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from headway.families import Family, families

TINY: dict[str, object] = {
    "d_model": 32, "n_layers": 3, "n_decoder_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_head": 8, "d_ff": 48,
    "vocab_size": 61, "max_len": 32, "attention.window": 5, "embeddings.patch.image": 16, "embeddings.patch.size": 4,
    "embeddings.audio.bins": 10, "feed_forward.experts.experts": 4, "feed_forward.experts.top_k": 2,
    "embeddings.width": 24, "head.projection": 20,
}  # fmt: skip
# Keys of transformers' own that follow from the sizes and that no table of ours maps.
ALSO: dict[str, object] = {
    "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "decoder_vocab_size": 61, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0, "decoder_start_token_id": 2, "forced_eos_token_id": None, "sliding_window": 5,
    "query_pre_attn_scalar": 8, "max_source_positions": 12, "local_attention": 8, "word_embed_proj_dim": 32,
    "suppress_tokens": None, "begin_suppress_tokens": None, "cls_token_id": 1, "sep_token_id": 2,
}  # fmt: skip
# What a family needs to be itself at all.
ALWAYS: dict[str, dict[str, Any]] = {
    # CLIP's text tower pools at the end token; with id 2 the class looks for the highest id instead.
    "clip_text_model": {"eos_token_id": 60},
    "falcon": {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 2, "ffn_hidden_size": 48, "alibi": False},
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "partial_rotary_factor": 1.0,
}
LONG |= {"long_factor": [1.5, 2.0, 2.5, 3.0], "original_max_position_embeddings": 64}
SCALED: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 100.0, "original_max_position_embeddings": 8},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "rope_theta": 100.0, "original_max_position_embeddings": 16,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    },
}  # fmt: skip
UNTIED = {"tie_word_embeddings": False}
# model_type: {name of the variant: keys of its config}
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {"biases": {"attention_bias": True, "mlp_bias": True}, "tied": {"tie_word_embeddings": True}}
    | {f"rope-{name}": {"rope_parameters": keys} for name, keys in SCALED.items()},
    "qwen2": {"windows": {"use_sliding_window": True, "max_window_layers": 1, "layer_types": None}},
    "qwen3": {"biases": {"attention_bias": True}},
    "qwen3_moe": {"normalized": {"norm_topk_prob": True}},
    "mistral": {"no-window": {"sliding_window": None}},
    "mixtral": {"no-window": {"sliding_window": None}},
    "gemma2": {
        "uncapped": {"attn_logit_softcapping": None, "final_logit_softcapping": None},
        "scaled": {"query_pre_attn_scalar": 16},
    },
    "gemma3_text": {"pattern": {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}},
    "phi3": {
        "longrope": {"rope_parameters": LONG, "original_max_position_embeddings": 8, "sliding_window": None},
        "no-window": {"sliding_window": None},
    },
    "smollm3": {"no-positions": {"no_rope_layer_interval": 2, "no_rope_layers": None}},
    "starcoder2": {"no-biases": {"use_bias": False}, "no-window": {"sliding_window": None}},
    "gpt_neox": {"sequential": {"use_parallel_residual": False}},
    "gpt_bigcode": {"many-kv-heads": {"multi_query": False}},
    "falcon": {"biases": {"bias": True}},
    "roberta": {"pad-1": {"pad_token_id": 1}},
    "electra": {"as-wide": {"embedding_size": 32}},
    "modernbert": {"biases": {"attention_bias": True, "mlp_bias": True, "norm_bias": True, "classifier_bias": True}},
    "t5": {"gated": {"feed_forward_proj": "gated-gelu"}, "1.1": {"feed_forward_proj": "gated-gelu"} | UNTIED},
    "bart": {"scaled": {"scale_embedding": True}},
    "mbart": {"scaled": {"scale_embedding": True}},
    "vit": {"no-qkv-bias": {"qkv_bias": False}},
    "dinov2": {"swiglu": {"use_swiglu_ffn": True}},
}


class Reference(NamedTuple):
    """One row of the table: a family, an architecture class, and the keys of a variant."""

    model_type: str
    architecture: str
    variant: str

    @property
    def id(self) -> str:
        return "-".join(filter(None, (self.architecture, self.variant)))

    @property
    def family(self) -> Family:
        return families()[self.model_type]


def rows() -> Iterator[Reference]:
    """Every architecture of every family, and each variant with the family's first architecture."""
    for model_type, family in families().items():
        for architecture in family.heads:
            yield Reference(model_type, architecture, "")
        for name in VARIANTS.get(model_type, {}):
            yield Reference(model_type, next(iter(family.heads)), name)


def config_keys(row: Reference) -> dict[str, Any]:
    """The keys of a tiny config."""
    known = CONFIG_MAPPING[row.model_type]
    base = known()
    mapped = {theirs: TINY[key.ours] for theirs, key in row.family.keys.items() if key.ours in TINY}
    wanted = {**ALSO, **mapped}
    # Some classes compute a size instead of storing it; only what can be set is set.
    settable = {name for name in wanted if name in base.to_dict() or name in getattr(base, "attribute_map", {})}
    out = {name: wanted[name] for name in settable} | ALWAYS.get(row.model_type, {})
    return out | VARIANTS.get(row.model_type, {}).get(row.variant, {})


@functools.cache
def build(row: Reference) -> torch.nn.Module:
    """The random model of a row."""
    return build_with(row, config_keys(row))


def build_with(row: Reference, keys: Mapping[str, Any]) -> torch.nn.Module:
    """A random model: every parameter drawn, so that no norm is the identity and no bias is zero."""
    config = CONFIG_MAPPING[row.model_type](**keys)
    config._attn_implementation = config._experts_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, row.architecture)(config).eval()
    fixed = {id(p) for m in model.modules() if "Sinusoidal" in type(m).__name__ for p in m.parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            if id(parameter) in fixed:
                continue
            spread = 0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.normal_(float(parameter.ndim == 1), spread)
    return model


def saved(row: Reference, folder: Any) -> Mapping[str, Any]:
    """Save the model as transformers does; returns its config as a dict."""
    model = build(row)
    model.save_pretrained(folder)
    config: Mapping[str, Any] = model.config.to_dict()
    return config
