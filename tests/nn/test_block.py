"""Blocks and whole stacks by hand in float64 from their weights; how weights begin; which weights are one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import formulas
import numpy as np
import pytest
import torch
from formulas import assert_close, randomize, wide
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from headway.config import ModelConfig
from headway.nn import Transformer
from headway.nn.block import Block, Surroundings
from headway.nn.masks import Mask

B, T, S, D = 2, 5, 4, 8
NORMS = ("layernorm", "rmsnorm")
Function = Callable[[np.ndarray], np.ndarray]


def config(**fields: Any) -> ModelConfig:
    sizes = {"d_model": D, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "d_ff": 12, "vocab_size": 11, "max_len": T}
    start = {"tokens": {"decoder_start": 0}} if fields.get("kind") == "encoder-decoder" else {}
    return ModelConfig(**{**sizes, "positions": "none", **start, **fields})


# --- a block by hand ---------------------------------------------------------------------------------------------


def norm(layer: nn.Module) -> Function:
    """The module's formula with its weights."""
    if isinstance(layer, nn.Identity):
        raise AssertionError("this placement has a norm here")
    bias = getattr(layer, "bias", None)
    if type(layer).__name__ == "RMSNorm":
        return lambda x: formulas.rms_norm(x, wide(layer.weight), 1e-6)
    return lambda x: formulas.layer_norm(x, wide(layer.weight), None if bias is None else wide(bias), 1e-5)


def self_attention(layer: Any, x: np.ndarray) -> np.ndarray:
    """Two query heads, one key-value head, causal, scale 1 / sqrt(4)."""
    q, k, v = np.split(formulas.linear(x, layer.qkv), [D, D + 4], -1)
    q, k, v = q.reshape(*x.shape[:2], 2, 4), k[:, :, None], v[:, :, None]
    mixed = formulas.attention(q, k, v, 0.5, formulas.causal)
    return formulas.linear(mixed.reshape(x.shape), layer.output)


def cross_attention(layer: Any, x: np.ndarray, encoded: np.ndarray) -> np.ndarray:
    """Every key is visible."""
    k, v = np.split(formulas.linear(encoded, layer.kv), 2, -1)
    q = formulas.linear(x, layer.q).reshape(*x.shape[:2], 2, 4)
    return formulas.linear(formulas.attention(q, k[:, :, None], v[:, :, None], 0.5).reshape(x.shape), layer.output)


def branch(placement: str, norms: Any, x: np.ndarray, part: Function) -> np.ndarray:
    """The docstring of nn/block.py, line by line."""
    if placement == "pre":
        return x + part(norm(norms.before)(x))
    if placement == "post":
        return norm(norms.after)(x + part(x))
    return x + norm(norms.inside)(part(norm(norms.before)(x)))


def block_by_hand(block: Any, x: np.ndarray, placement: str, encoded: np.ndarray | None = None) -> np.ndarray:
    """Attention, cross-attention where there is an encoder, feed-forward."""
    x = branch(placement, block.attention_residual, x, lambda y: self_attention(block.attention, y))
    if encoded is not None:
        x = branch(placement, block.cross_residual, x, lambda y: cross_attention(block.cross_attention, y, encoded))
    return branch(placement, block.feed_forward_residual, x, lambda y: feed_forward(block, y))


def feed_forward(block: Any, x: np.ndarray) -> np.ndarray:
    return formulas.feed_forward(x, block.feed_forward, "gelu", False)


def surroundings(block: Any, encoded: Tensor | None = None) -> Surroundings:
    return Surroundings({block.mask: Mask(is_causal=True)}, encoder_BSD=encoded)


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("placement", ["pre", "post", "sandwich"])
@pytest.mark.parametrize("has_encoder", [False, True])
def test_block_equals_its_drawing(placement: str, kind: str, has_encoder: bool) -> None:
    """pre: x + f(norm x). post: norm(x + f x). sandwich: x + norm(f(norm x))."""
    fields = {"kind": "encoder-decoder" if has_encoder else "decoder", "norm": kind, "placement": placement}
    block = randomize(Transformer(config(**fields)).double()).decoder.blocks[0]
    x, encoded = torch.randn(B, T, D, dtype=torch.float64), torch.randn(B, S, D, dtype=torch.float64)
    out = block(x, surroundings(block, encoded if has_encoder else None))
    assert_close(out, block_by_hand(block, wide(x), placement, wide(encoded) if has_encoder else None))


@pytest.mark.parametrize("kind", NORMS)
def test_parallel_block_equals_its_drawing(kind: str) -> None:
    """Both branches read x, both are added to it (arXiv:2204.06745, section 2.1)."""
    block = randomize(Transformer(config(norm=kind, residual="parallel")).double()).decoder.blocks[0]
    x = torch.randn(B, T, D, dtype=torch.float64)
    first, last = block.attention_residual, block.feed_forward_residual
    read = [norm(residual.before)(wide(x)) for residual in (first, last)]
    expected = wide(x) + self_attention(block.attention, read[0]) + feed_forward(block, read[1])
    out = block(x, surroundings(block))
    assert_close(out, expected)
    with pytest.raises(AssertionError):  # negative control: one after the other is another function
        assert_close(out, block_by_hand(block, wide(x), "pre"))


def test_dropout_acts_on_branches_in_training_only() -> None:
    """x + dropout(f(norm x)): with nearly everything dropped, the stream itself passes."""
    block = randomize(Transformer(config(dropout=0.999)).double()).decoder.blocks[0]
    x = torch.randn(B, T, D, dtype=torch.float64)
    assert_close(block(x, surroundings(block)), block_by_hand(block, wide(x), "pre"))
    same = (block.train()(x, surroundings(block)) == x).double().mean()
    assert same > 0.9  # of 80 entries each survives two branches with 0.998


# --- a model by hand ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["pre", "post", "sandwich"])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_model_equals_embeddings_blocks_norm_head(placement: str, scale: float) -> None:
    """Scaled tokens, two blocks, a final norm unless the last block already ends in one, and W h."""
    model = randomize(Transformer(config(placement=placement, embeddings={"scale": scale})).double())
    ids = torch.randint(11, (B, T))
    x = wide(model.embeddings.tokens.weight)[ids.numpy()] * scale
    for block in model.decoder.blocks:
        x = block_by_hand(block, x, placement)
    x = x if placement == "post" else norm(model.decoder.norm)(x)
    out = model(ids)
    assert_close(out.hidden, x)
    assert_close(out.logits, formulas.linear(x, model.head.output))


def test_embeddings_add_then_normalise() -> None:
    """norm(scale * token + position + token type); without token_types every token is of type 0."""
    fields = {"token_types": 2, "norm": True, "scale": 3.0}
    model = randomize(Transformer(config(kind="encoder", positions="learned", embeddings=fields)).double())
    ids, types, parts = torch.randint(11, (B, T)), torch.randint(2, (B, T)), model.embeddings
    order = torch.arange(T)[None]
    for given in (types, None):
        rows = np.zeros((B, T), dtype=int) if given is None else given.numpy()
        x = 3 * wide(parts.tokens.weight)[ids.numpy()] + wide(parts.learned.weight)[None]
        assert_close(parts(order, ids, given), norm(parts.norm)(x + wide(parts.types.weight)[rows]))


def test_teacher_forcing_shifts_labels_right() -> None:
    """start, l0, l1, ...: -100 becomes the padding id, which no loss reads."""
    fields = config(kind="encoder-decoder", tokens={"decoder_start": 3, "pad": 1})
    model, ids = randomize(Transformer(fields).double()), torch.randint(11, (B, S))
    labels = torch.tensor([[4, 5, 6], [7, -100, -100]])
    expected = model(ids, decoder_input_ids=torch.tensor([[3, 4, 5], [3, 7, 1]]), labels=labels)
    found = model(ids, labels=labels)
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)


# --- how weights begin -------------------------------------------------------------------------------------------

LARGE = {"d_model": 128, "n_heads": 4, "n_kv_heads": 4, "d_ff": 256, "vocab_size": 400}


def writes_to_the_stream(name: str) -> bool:
    return name.endswith(("attention.output.weight", "feed_forward.down.weight"))


@pytest.mark.parametrize("kind,depth", [("decoder", 2), ("encoder-decoder", 3)])
@pytest.mark.parametrize("residual", ["plain", "scaled", "zero"])
@pytest.mark.parametrize("std", [0.02, 0.1, None])
def test_weights_begin_as_the_scheme_says(std: float | None, residual: str, kind: str, depth: int) -> None:
    """N(0, std^2), or 1 / sqrt(fan_in); residual writers divided by sqrt(2 n_layers) (GPT-2, section 2.3), or zero."""
    layers = {"n_decoder_layers": 3} if kind == "encoder-decoder" else {}
    attention = {"bias": True, "output_bias": True}
    init = {"std": std, "residual": residual}
    model = Transformer(config(**LARGE, **layers, kind=kind, attention=attention, init=init, norm="layernorm"))
    checked = 0
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            is_norm_weight = name.endswith("weight")
            assert parameter.eq(1.0 if is_norm_weight else 0.0).all(), name
            continue
        expected = std if std is not None else 1.0 if "embeddings" in name else parameter.shape[1] ** -0.5
        if writes_to_the_stream(name):
            expected *= {"plain": 1, "scaled": 1 / math.sqrt(2 * depth), "zero": 0}[residual]
            checked += 1
        # The relative error of a std from n draws is 1 / sqrt(2n) = 0.6 % for the smallest matrix; 5 % is 8 of those.
        assert parameter.std().item() == pytest.approx(expected, rel=0.05), name
        assert abs(parameter.mean().item()) <= 0.05 * expected, name
    assert checked == (4 if kind == "decoder" else 2 * 2 + 3 * 3)


@pytest.mark.parametrize("experts", [None, {"experts": 2}])
@pytest.mark.parametrize("placement,residual", [("pre", "sequential"), ("sandwich", "sequential"), ("pre", "parallel")])
def test_zero_residuals_make_blocks_the_identity(placement: str, residual: str, experts: Any) -> None:
    fields = {"placement": placement, "residual": residual, "feed_forward": {"experts": experts}}
    x = torch.randn(B, T, D)
    for scheme in ("zero", "plain"):
        block = Transformer(config(**fields, init={"residual": scheme})).decoder.blocks[0]
        assert torch.equal(block(x, surroundings(block)), x) == (scheme == "zero")


def test_the_same_seed_gives_the_same_weights() -> None:
    torch.manual_seed(5)
    first = Transformer(config())
    torch.manual_seed(5)
    second, third = Transformer(config()), Transformer(config())
    pairs = list(zip(first.parameters(), second.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(second.embeddings.tokens.weight, third.embeddings.tokens.weight)


# --- tied weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["decoder", "encoder", "encoder-decoder"])
def test_tied_embeddings_are_one_tensor_whose_gradients_add_up(kind: str) -> None:
    """arXiv:1608.05859: the gradient of the shared table is that of its use as input plus that as output."""
    models = [randomize(Transformer(config(kind=kind, embeddings={"tied": tied})).double()) for tied in (True, False)]
    tied, untied = models
    assert tied.head.output.weight is tied.embeddings.tokens.weight
    assert untied.head.output.weight is not untied.embeddings.tokens.weight
    table = tied.embeddings.tokens.weight
    extra = untied.head.output.weight.numel()
    count = [sum(p.numel() for p in model.parameters()) for model in models]
    assert count[1] - count[0] == extra
    untied.load_state_dict(tied.state_dict())
    ids, labels = torch.randint(11, (B, T)), torch.randint(11, (B, T))
    for model in models:
        model(ids, labels=labels).loss.backward()
    both = untied.embeddings.tokens.weight.grad + untied.head.output.weight.grad
    assert torch.allclose(table.grad, both, atol=1e-14, rtol=1e-12)
    assert untied.head.output.weight.grad.abs().max() > 1e-3 < untied.embeddings.tokens.weight.grad.abs().max()


# --- compiled ----------------------------------------------------------------------------------------------------

OWN = {
    "norm": "rmsnorm",
    "positions": "rope",
    "attention": {"qk_norm": "rmsnorm"},
    "feed_forward": {"activation": "relu2"},
}
FORMS: dict[str, dict[str, Any]] = {
    "recipe": OWN,
    "gpt2": {"norm": "layernorm", "positions": "learned", "feed_forward": {"activation": "gelu-tanh"}},
    "alibi": {"positions": "alibi", "placement": "post"},
    "encoder": {"kind": "encoder", **OWN},
}


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_block_is_one_graph_to_torch_compile(monkeypatch: pytest.MonkeyPatch, form: str, is_packed: bool) -> None:
    """The native kernels step aside for their twins, and nothing looks at data: loss and gradients stay the same."""
    model = Transformer(config(**FORMS[form]))
    randomize(model)
    ids = torch.randint(11, (B, T))
    inputs = {"input_ids": ids, "labels": ids.roll(-1, 1)}
    if is_packed:
        inputs["documents"] = (torch.arange(T) >= 2).long().expand(B, T)

    def gradients() -> list[Tensor]:
        loss = model.loss(**inputs)
        return [loss, *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)]

    expected = gradients()
    calls = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(Block, "forward", torch.compile(Block.forward, backend=calls, fullgraph=True, dynamic=False))
    for found, wanted in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert calls.frame_count >= 1, "nothing was compiled"
