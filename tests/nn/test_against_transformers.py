"""Three whole models against transformers: tiny, random, weights copied here by hand, logits and every gradient.

Each `*_weights` says where our tensors come from; it maps values and gradients alike, since both are only renamed and
joined. The parity of every published family through the loader has its own table; this one needs no loader.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from formulas import randomize
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from headway.config import ModelConfig
from headway.nn import Transformer

Weights = dict[str, Tensor]
B, T, V = 3, 9, 41
SIZES = {"d_model": 32, "n_layers": 2, "n_heads": 4, "d_ff": 48, "vocab_size": V, "max_len": 16}
LENGTHS = (9, 4, 7)


# --- where our weights come from ---------------------------------------------------------------------------------


def llama_weights(w: Mapping[str, Tensor]) -> Weights:
    """Separate projections stand in one matrix here."""
    out = {
        "embeddings.tokens.weight": w["model.embed_tokens.weight"],
        "decoder.norm.weight": w["model.norm.weight"],
        "head.output.weight": w["lm_head.weight"],
    }
    for i in range(2):
        theirs, ours = f"model.layers.{i}", f"decoder.blocks.{i}"
        qkv = [w[f"{theirs}.self_attn.{name}_proj.weight"] for name in "qkv"]
        up = [w[f"{theirs}.mlp.{name}_proj.weight"] for name in ("gate", "up")]
        out |= {
            f"{ours}.attention.qkv.weight": torch.cat(qkv),
            f"{ours}.attention.output.weight": w[f"{theirs}.self_attn.o_proj.weight"],
            f"{ours}.attention_residual.before.weight": w[f"{theirs}.input_layernorm.weight"],
            f"{ours}.feed_forward.up.weight": torch.cat(up),
            f"{ours}.feed_forward.down.weight": w[f"{theirs}.mlp.down_proj.weight"],
            f"{ours}.feed_forward_residual.before.weight": w[f"{theirs}.post_attention_layernorm.weight"],
        }
    return out


def bert_weights(w: Mapping[str, Tensor]) -> Weights:
    """Weights and biases alike; the output matrix is the token table."""
    out = {f"embeddings.{ours}.weight": w[f"bert.embeddings.{theirs}_embeddings.weight"] for ours, theirs in (
        ("tokens", "word"), ("learned", "position"), ("types", "token_type"),
    )}  # fmt: skip
    out["head.output.weight"] = w["bert.embeddings.word_embeddings.weight"]
    out["head.output.bias"] = w["cls.predictions.decoder.bias"]
    for part in ("weight", "bias"):
        out |= {
            f"embeddings.norm.{part}": w[f"bert.embeddings.LayerNorm.{part}"],
            f"head.dense.{part}": w[f"cls.predictions.transform.dense.{part}"],
            f"head.transform_norm.{part}": w[f"cls.predictions.transform.LayerNorm.{part}"],
        }
        for i in range(2):
            theirs, ours = f"bert.encoder.layer.{i}", f"encoder.blocks.{i}"
            qkv = [w[f"{theirs}.attention.self.{name}.{part}"] for name in ("query", "key", "value")]
            out |= {
                f"{ours}.attention.qkv.{part}": torch.cat(qkv),
                f"{ours}.attention.output.{part}": w[f"{theirs}.attention.output.dense.{part}"],
                f"{ours}.attention_residual.after.{part}": w[f"{theirs}.attention.output.LayerNorm.{part}"],
                f"{ours}.feed_forward.up.{part}": w[f"{theirs}.intermediate.dense.{part}"],
                f"{ours}.feed_forward.down.{part}": w[f"{theirs}.output.dense.{part}"],
                f"{ours}.feed_forward_residual.after.{part}": w[f"{theirs}.output.LayerNorm.{part}"],
            }
    return out


def t5_weights(w: Mapping[str, Tensor]) -> Weights:
    """The bias table of a stack stands in its first layer there."""
    out = {"embeddings.tokens.weight": w["shared.weight"], "head.output.weight": w["lm_head.weight"]}
    out["decoder_embeddings.tokens.weight"] = w["shared.weight"]
    for side in ("encoder", "decoder"):
        bias = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        out |= {f"{side}.bias.table": w[bias], f"{side}.norm.weight": w[f"{side}.final_layer_norm.weight"]}
        for i in range(2):
            theirs, ours = f"{side}.block.{i}.layer", f"{side}.blocks.{i}"
            last = 2 if side == "decoder" else 1
            qkv = [w[f"{theirs}.0.SelfAttention.{name}.weight"] for name in "qkv"]
            up = [w[f"{theirs}.{last}.DenseReluDense.wi_{name}.weight"] for name in (0, 1)]
            out |= {
                f"{ours}.attention.qkv.weight": torch.cat(qkv),
                f"{ours}.attention.output.weight": w[f"{theirs}.0.SelfAttention.o.weight"],
                f"{ours}.attention_residual.before.weight": w[f"{theirs}.0.layer_norm.weight"],
                f"{ours}.feed_forward.up.weight": torch.cat(up),
                f"{ours}.feed_forward.down.weight": w[f"{theirs}.{last}.DenseReluDense.wo.weight"],
                f"{ours}.feed_forward_residual.before.weight": w[f"{theirs}.{last}.layer_norm.weight"],
            }
            if side == "decoder":
                kv = [w[f"{theirs}.1.EncDecAttention.{name}.weight"] for name in "kv"]
                out |= {
                    f"{ours}.cross_attention.q.weight": w[f"{theirs}.1.EncDecAttention.q.weight"],
                    f"{ours}.cross_attention.kv.weight": torch.cat(kv),
                    f"{ours}.cross_attention.output.weight": w[f"{theirs}.1.EncDecAttention.o.weight"],
                    f"{ours}.cross_residual.before.weight": w[f"{theirs}.1.layer_norm.weight"],
                }
    return out


# --- the three pairs ---------------------------------------------------------------------------------------------


def llama() -> tuple[nn.Module, Transformer]:
    """Grouped queries, RoPE in the half layout, RMSNorm, SwiGLU, an output of its own."""
    rope = {"rope_type": "default", "rope_theta": 500.0}
    theirs = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
            vocab_size=V, max_position_embeddings=16, rope_parameters=rope, rms_norm_eps=1e-5,
        )
    )  # fmt: skip
    ours = ModelConfig(
        **SIZES, n_kv_heads=2, positions={"type": "rope", "theta": 500.0}, norm={"type": "rmsnorm", "eps": 1e-5},
        feed_forward="swiglu",
    )  # fmt: skip
    return copied(theirs, ours, llama_weights)


def bert() -> tuple[nn.Module, Transformer]:
    """Post-norm, learned positions, token types, a norm on the embeddings, gelu, transform head, tied output."""
    theirs = BertForMaskedLM(
        BertConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=V,
            max_position_embeddings=16, layer_norm_eps=1e-12,
        )
    )  # fmt: skip
    ours = ModelConfig(
        **SIZES, kind="encoder", positions="learned", norm={"type": "layernorm", "eps": 1e-12}, placement="post",
        attention={"bias": True, "output_bias": True}, feed_forward={"activation": "gelu", "bias": True},
        embeddings={"tied": True, "token_types": 2, "norm": True}, head="masked-lm",
    )  # fmt: skip
    return copied(theirs, ours, bert_weights)


def t5() -> tuple[nn.Module, Transformer]:
    """Version 1.1: relative buckets, no scale, RMSNorm, GEGLU, d_head apart from d_model / n_heads, own output."""
    theirs = T5ForConditionalGeneration(
        T5Config(
            d_model=32, num_layers=2, num_heads=4, d_kv=10, d_ff=48, vocab_size=V, relative_attention_num_buckets=8,
            relative_attention_max_distance=12, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
            decoder_start_token_id=0, pad_token_id=0,
        )
    )  # fmt: skip
    assert theirs.config.scale_decoder_outputs is False
    theirs.lm_head.weight = nn.Parameter(theirs.lm_head.weight.detach().clone())
    ours = ModelConfig(
        **SIZES, kind="encoder-decoder", d_head=10, attention={"pattern": "full", "scale": 1.0},
        positions={"type": "relative", "buckets": 8, "max_distance": 12},
        feed_forward={"activation": "gelu-tanh", "gated": True}, tokens={"decoder_start": 0, "pad": 0},
    )  # fmt: skip
    return copied(theirs, ours, t5_weights)


def copied(theirs: nn.Module, config: ModelConfig, rename: Callable[..., Weights]) -> tuple[nn.Module, Transformer]:
    """Random weights there, the same here; every tensor of ours must be named."""
    randomize(theirs, 0.2)
    ours = Transformer(config).eval()
    ours.load_state_dict(rename(theirs.state_dict()), strict=True)
    return theirs, ours


def padded(side: str) -> tuple[Tensor, Tensor]:
    """Ids and which are real: rows of 9, 4 and 7 tokens."""
    real = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
    return torch.randint(1, V, (B, T)), (real if side == "right" else real.flip(1)).long()


def assert_same(ours: Tensor, theirs: Tensor, real: Tensor | None = None) -> None:
    """Within 1e-5 of the largest value: float32, two layers of sums over 32 to 48 terms in another order."""
    difference = (ours - theirs).abs()
    assert difference.isfinite().all()
    worst = difference.max() if real is None else difference[real.bool()].max()
    assert worst.item() <= 1e-5 * theirs.abs().max().item()


def assert_same_gradients(ours: Transformer, theirs: nn.Module, rename: Callable[..., Weights]) -> None:
    """Of every parameter; a tied table has the sum in both."""
    gradients = {name: p.grad for name, p in theirs.named_parameters(remove_duplicate=False)}
    for name, gradient in rename(gradients).items():
        assert_same(ours.get_parameter(name).grad, gradient)


def inputs(kind: str, side: str) -> tuple[dict[str, Any], dict[str, Any], Tensor]:
    """Arguments for ours and theirs, and which logits count."""
    ids, real = padded(side)
    ours: dict[str, Any] = {"input_ids": ids, "attention_mask": real}
    theirs = dict(ours)
    if kind == "t5":
        targets, target_real = padded("right")
        decoder = {"decoder_input_ids": targets[:, :6], "decoder_attention_mask": target_real[:, :6]}
        return ours | decoder, theirs | decoder, target_real[:, :6]
    # By default transformers counts padding on the left as positions.
    theirs["position_ids"] = (real.cumsum(1) - 1).clamp(min=0)
    if kind == "bert":
        ours["token_types"] = theirs["token_type_ids"] = torch.randint(2, (B, T))
    return ours, theirs, real


PAIRS = {"llama": (llama, llama_weights), "bert": (bert, bert_weights), "t5": (t5, t5_weights)}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", PAIRS)
def test_logits_and_gradients_equal(kind: str, side: str) -> None:
    make, rename = PAIRS[kind]
    theirs, ours = make()
    our_inputs, their_inputs, real = inputs(kind, side)
    found, expected = ours(**our_inputs).logits, theirs(**their_inputs).logits
    assert_same(found, expected, real)
    weights = torch.randn_like(found) * real[..., None]
    for logits in (found, expected):
        (logits * weights).sum().backward()
    assert_same_gradients(ours, theirs, rename)


def test_cached_decoding_equals_the_full_forward_of_transformers() -> None:
    theirs, ours = llama()
    ids = torch.randint(V, (B, T))
    cache = ours.new_cache(B, T)
    with torch.no_grad():
        parts = [ours(ids[:, :5], cache=cache).logits] + [
            ours(ids[:, t : t + 1], cache=cache).logits for t in range(5, T)
        ]
        assert_same(torch.cat(parts, 1), theirs(ids).logits)


def test_a_small_change_would_show() -> None:
    """Negative control: an eps of 1e-3 instead of 1e-5, or one row of the queries' projection."""
    theirs, ours = llama()
    ids = torch.randint(V, (B, T))
    with torch.no_grad():
        expected = theirs(ids).logits
        for block in ours.decoder.blocks:
            block.attention_residual.before.eps = 1e-3
        with pytest.raises(AssertionError):
            assert_same(ours(ids).logits, expected)
        theirs, ours = llama()
        ours.decoder.blocks[1].attention.qkv.weight[3] += 0.01
        with pytest.raises(AssertionError):
            assert_same(ours(ids).logits, theirs(ids).logits)
