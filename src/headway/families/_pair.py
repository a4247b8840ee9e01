"""What encoder-decoders since BART (arXiv:1910.13461) share: two stacks with the same names, one vocabulary."""

from __future__ import annotations

import math

from headway.config import ModelConfig
from headway.errors import InputError
from headway.families._codecs import ACTIVATIONS, Raw
from headway.families._table import (
    Copy,
    Head,
    Key,
    NoBias,
    Node,
    Spare,
    Special,
    choice,
    halves,
    layers,
    lead,
    qkv,
    shared,
)

FIXED: dict[str, object] = {
    "kind": "encoder-decoder",
    "norm.type": "layernorm",
    "attention.bias": True,
    "attention.output_bias": True,
    "feed_forward.bias": True,
}


def keys(activation: str = "gelu", **defaults: int) -> dict[str, Key]:
    """The keys of BART's config, with its defaults where a model of its form has no others."""
    sizes = {
        "vocab_size": ("vocab_size", 50265),
        "max_position_embeddings": ("max_len", 1024),
        "d_model": ("d_model", 1024),
        "encoder_layers": ("n_layers", 12),
        "decoder_layers": ("n_decoder_layers", 12),
        "encoder_attention_heads": ("n_heads", 16),
        "encoder_ffn_dim": ("d_ff", 4096),
    }
    return {theirs: Key(ours, defaults.get(theirs, bart)) for theirs, (ours, bart) in sizes.items()} | {
        "activation_function": Key("feed_forward.activation", activation, ACTIVATIONS),
        "dropout": Key("dropout", 0.1),
        "attention_dropout": Key("attention.dropout", 0.0),
        "tie_word_embeddings": Key("embeddings.tied", True),
    }


def scaled() -> Special:
    """Embeddings times sqrt(D) where `scale_embedding` says so."""

    def read(raw: Raw) -> dict[str, object]:
        return {"embeddings.scale": math.sqrt(raw.get("d_model", 1024)) if raw.get("scale_embedding") else 1.0}

    return Special(read, lambda c: {"scale_embedding": c.embeddings.scale != 1.0})


def alike() -> Special:
    """Heads and feed-forward size, which the two sides have in common here."""
    pairs = {
        "decoder_attention_heads": "encoder_attention_heads",
        "decoder_ffn_dim": "encoder_ffn_dim",
        "decoder_vocab_size": "vocab_size",
    }

    def read(raw: Raw) -> dict[str, object]:
        for one, other in pairs.items():
            if raw.get(one) is not None and raw.get(other, raw[one]) != raw[one]:
                raise InputError(one, repr(raw[one])[:80], f"{raw[other]!r:.80}, as {other}: the sides are alike")
        return {}

    def write(config: ModelConfig) -> dict[str, object]:
        return {
            "decoder_attention_heads": config.n_heads,
            "decoder_ffn_dim": config.d_ff,
            "num_hidden_layers": config.n_layers,
            "is_encoder_decoder": True,
        }

    return Special(read, write)


def weights(
    place: str, *, learned: bool, embedding_norm: bool, final_norm: bool, keys_biased: bool = True
) -> dict[str, Node]:
    """Both stacks. `place` is where a block has its norms: `before` or `after`."""
    # Untied, their class parts the two sides' tables from the one that they share here, and wants all three.
    ones = {tied: shared("shared", kind("encoder.embed_tokens")) for tied, kind in ((True, Spare), (False, Copy))}
    tables: dict[object, Node] = {True: ones[True], False: shared(ones[False], Copy("decoder.embed_tokens"))}
    out: dict[str, Node] = {"embeddings.tokens": choice("embeddings.tied", tables)}
    out |= {"decoder_embeddings.tokens": "decoder.embed_tokens"}
    key = str if keys_biased else NoBias
    for side, table in (("encoder", "embeddings"), ("decoder", "decoder_embeddings")):
        layer: dict[str, Node] = {
            "attention.qkv": qkv("self_attn.q_proj", key("self_attn.k_proj"), "self_attn.v_proj"),
            "attention.output": "self_attn.out_proj",
            f"attention_residual.{place}": "self_attn_layer_norm",
            "cross_attention.q": "encoder_attn.q_proj",
            "cross_attention.kv": halves(key("encoder_attn.k_proj"), "encoder_attn.v_proj"),
            "cross_attention.output": "encoder_attn.out_proj",
            f"cross_residual.{place}": "encoder_attn_layer_norm",
            "feed_forward.up": "fc1",
            "feed_forward.down": "fc2",
            f"feed_forward_residual.{place}": "final_layer_norm",
        }
        out |= layers(f"{side}.blocks.{{i}}", f"{side}.layers.{{i}}", layer)
        out |= {f"{table}.learned": f"{side}.embed_positions"} if learned else {}
        out |= {f"{table}.norm": f"{side}.layernorm_embedding"} if embedding_norm else {}
        out |= {f"{side}.norm": f"{side}.layer_norm"} if final_norm else {}
    return out


def heads(name: str) -> dict[str, Head]:
    """The one head: a tied output whose bias stands in a buffer of shape (1, V)."""
    names: dict[str, Node] = {"head.output.weight": "lm_head.weight", "head.output.bias": lead("final_logits_bias")}
    return {name: Head({"head.type": "causal-lm", "head.bias": True}, names, "model.")}


UNREAD = ()
