"""Norms, activations, feed-forward networks, experts and patches against formulas in float64 and other libraries."""

from __future__ import annotations

import itertools
from typing import Any

import formulas
import numpy as np
import pytest
import torch
from formulas import TOLERANCE, assert_close, randomize, wide
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from headway import config as cfg
from headway.kernels import native
from headway.nn import Transformer
from headway.nn.embeddings import Patches
from headway.nn.feed_forward import ACTIVATIONS, FeedForward, MixtureOfExperts, make_feed_forward
from headway.nn.norms import make_norm

SIZE = 24


def norm(description: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    config = cfg.RMSNorm if description["type"] == "rmsnorm" else cfg.LayerNorm
    return randomize(make_norm(SIZE, config.model_validate(description))).to(dtype)


def vectors(dtype: torch.dtype = torch.float64) -> Tensor:
    """(2, 3, SIZE), far from mean zero and variance one; the last is so small that eps decides."""
    x = 3 * torch.randn(2, 3, SIZE, dtype=torch.float64) + 1.5
    x[1, 2] *= 1e-3
    return x.to(dtype)


# --- norms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [1e-5, 1e-2])
@pytest.mark.parametrize("has_bias", [True, False])
def test_layer_norm_equals_its_formula(has_bias: bool, eps: float) -> None:
    for dtype in TOLERANCE:
        module, x = norm({"type": "layernorm", "eps": eps, "bias": has_bias}, dtype), vectors(dtype)
        assert (module.bias is not None) == has_bias
        bias = wide(module.bias) if has_bias else None
        assert_close(module(x), formulas.layer_norm(wide(x), wide(module.weight), bias, eps))


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
@pytest.mark.parametrize("offset", [0, 1])
def test_rms_norm_equals_its_formula(offset: int, eps: float) -> None:
    """float32 runs compiled and as its twin."""
    for dtype in TOLERANCE:
        module, x = norm({"type": "rmsnorm", "eps": eps, "offset": offset}, dtype), vectors(dtype)
        expected = formulas.rms_norm(wide(x), wide(module.weight) + offset, eps)
        assert_close(module(x), expected)
        with native.twins_only():
            assert_close(module(x), expected)


@pytest.mark.parametrize("offset,theirs", [(0, LlamaRMSNorm), (1, GemmaRMSNorm)], ids=["llama", "gemma"])
def test_rms_norm_equals_transformers(offset: int, theirs: type[nn.Module]) -> None:
    """The stored weight is theirs: Gemma's is the difference from one."""
    module, x = norm({"type": "rmsnorm", "offset": offset}, torch.float32), vectors(torch.float32)
    other = theirs(SIZE, eps=1e-6)
    other.load_state_dict(module.state_dict())
    assert torch.allclose(module(x), other(x), atol=1e-5, rtol=1e-5)  # float32, values up to 10
    fresh = make_norm(SIZE, cfg.RMSNorm(offset=offset))
    assert torch.equal(fresh.weight, theirs(SIZE).weight)


def test_eps_stands_under_the_root() -> None:
    """Negative control: with eps beside the root the smallest vector comes out otherwise."""
    x = vectors()
    beside = wide(x) / (np.sqrt((wide(x) ** 2).mean(-1, keepdims=True)) + 1e-2)
    with pytest.raises(AssertionError):
        assert_close(make_norm(SIZE, cfg.RMSNorm(eps=1e-2)).double()(x), beside)


# --- activations and feed-forward --------------------------------------------------------------------------------

THEIRS = [
    ("relu", "relu"), ("gelu", "gelu"), ("gelu-tanh", "gelu_pytorch_tanh"), ("gelu-tanh", "gelu_new"),
    ("silu", "silu"), ("relu2", "relu2"),
    ("quick-gelu", "quick_gelu"),
]  # fmt: skip


def test_every_activation_has_a_reference() -> None:
    assert {ours for ours, _ in THEIRS} == set(ACTIVATIONS) == set(formulas.ACTIVATIONS)


@pytest.mark.parametrize("ours,theirs", THEIRS)
def test_activations_equal_transformers_and_the_formula(ours: Any, theirs: str) -> None:
    """From deep saturation through zero; gelu and its tanh form differ by up to 5e-4, far above the tolerance."""
    x = torch.cat((torch.linspace(-12, 12, 4001, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)))
    for dtype in TOLERANCE:
        found = ACTIVATIONS[ours](x.to(dtype))
        assert_close(found, wide(ACT2FN[theirs](x.to(dtype))))
        assert_close(found, formulas.ACTIVATIONS[ours](wide(x.to(dtype))))


def model_config(**fields: Any) -> cfg.ModelConfig:
    sizes = {"d_model": 6, "n_layers": 1, "n_heads": 2, "d_ff": 10, "vocab_size": 9, "max_len": 5, "positions": "none"}
    return cfg.ModelConfig(**sizes | fields)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_feed_forward_equals_its_formula(activation: str, gated: bool, has_bias: bool) -> None:
    """down(act(up x)), and gated down(act(gate x) * up x)."""
    shape = {"activation": activation, "gated": gated, "bias": has_bias}
    for dtype in TOLERANCE:
        module = randomize(make_feed_forward(model_config(feed_forward=shape))).to(dtype)
        assert isinstance(module, FeedForward) and module.up.weight.shape == (20 if gated else 10, 6)
        x = torch.randn(2, 3, 6, dtype=torch.float64).to(dtype)
        assert_close(module(x), formulas.feed_forward(wide(x), module, activation, gated))


@pytest.mark.parametrize("name,activation", [("swiglu", "silu"), ("geglu", "gelu"), ("reglu", "relu")])
def test_gated_units_by_their_published_names(name: str, activation: str) -> None:
    """arXiv:2002.05202, equation 6."""
    module = randomize(make_feed_forward(model_config(feed_forward=name)).double())
    x = torch.randn(4, 6, dtype=torch.float64)
    assert_close(module(x), formulas.feed_forward(wide(x), module, activation, True))


# --- mixture of experts ------------------------------------------------------------------------------------------


def experts(top_k: int, normalize: bool = True, balance: float = 0.01, gated: bool = True) -> MixtureOfExperts:
    shape = {"experts": 4, "top_k": top_k, "normalize": normalize, "balance": balance}
    config = model_config(feed_forward={"activation": "silu", "gated": gated, "experts": shape})
    return randomize(make_feed_forward(config).double())


def token_by_token(module: MixtureOfExperts, x: np.ndarray, top_k: int, normalize: bool, gated: bool) -> Any:
    """Output, and per expert the share of visits and the mean gate."""
    out, visits, gates = np.zeros_like(x), np.zeros(4), np.zeros(4)
    for index in np.ndindex(x.shape[:-1]):
        gate = formulas.softmax(formulas.linear(x[index], module.router))
        chosen = np.argsort(-gate)[:top_k]
        total = gate[chosen].sum() if normalize else 1.0
        for e in chosen:
            out[index] += gate[e] / total * formulas.feed_forward(x[index], module.experts[e], "silu", gated)
            visits[e] += 1
        gates += gate
    return out, visits / visits.sum(), gates / np.prod(x.shape[:-1])


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_experts_equal_a_loop_over_tokens(top_k: int, normalize: bool, gated: bool) -> None:
    """And the balance loss is weight * E * sum(f_e p_e) (arXiv:2101.03961, equation 4)."""
    module, x = experts(top_k, normalize, 0.3, gated), torch.randn(3, 5, 6, dtype=torch.float64)
    found = module(x)
    expected, share, mean_gate = token_by_token(module, wide(x), top_k, normalize, gated)
    assert_close(found, expected)
    assert module.balance_loss.item() == pytest.approx(0.3 * 4 * float(share @ mean_gate), rel=1e-12)


def test_no_token_is_dropped_when_all_choose_the_same_expert() -> None:
    """Capacity limits drop tokens (arXiv:2101.03961, section 2.2); here there is none."""
    module, x = experts(1), torch.rand(1, 64, 6, dtype=torch.float64) + 0.1
    module.router.weight.data.zero_()
    module.router.weight.data[2] = 100.0  # positive inputs: every token wants expert 2
    assert_close(module(x), formulas.feed_forward(wide(x), module.experts[2], "silu", True))
    assert module.balance_loss.item() == pytest.approx(0.01 * 4)  # all visits to one expert: the worst value, E


def test_balance_is_one_when_even_and_counts_in_training_only() -> None:
    config = model_config(n_layers=2, feed_forward={"experts": {"experts": 4, "top_k": 2, "balance": 0.3}})
    model, ids = Transformer(config), torch.randint(9, (2, 5))
    for module in model.modules():
        if isinstance(module, MixtureOfExperts):
            module.router.weight.data.zero_()
    plain = model.eval()(ids, labels=ids).loss
    # Even gates of 1/4 give one per layer, times the weight, two layers; float32.
    assert (model.train()(ids, labels=ids).loss - plain).item() == pytest.approx(0.3 * 2, rel=1e-5)
    assert model.balance_loss().item() == pytest.approx(0.3 * 2, rel=1e-6)


# --- patches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first_token", [False, True])
@pytest.mark.parametrize("size,image,channels", [(4, 12, 3), (2, 8, 1), (5, 5, 2)])
def test_patches_equal_a_strided_convolution(size: int, image: int, channels: int, first_token: bool) -> None:
    """What every published vision Transformer uses, and how its weights are stored (arXiv:2010.11929, section 3.1)."""
    shape = cfg.Patch(size=size, image=image, channels=channels, first_token=first_token)
    module = randomize(Patches(7, shape).double())
    conv = nn.Conv2d(channels, 7, size, stride=size).double()
    conv.weight.data = module.project.weight.data.view(7, channels, size, size)
    conv.bias.data = module.project.bias.data
    pixels = torch.randn(2, channels, image, image, dtype=torch.float64)
    found = module(pixels)
    assert found.shape == (2, shape.count, 7)
    patches = found[:, 1:] if first_token else found
    assert_close(patches, wide(conv(pixels).flatten(2).transpose(1, 2)))
    if first_token:
        assert torch.equal(found[:, 0], module.first.expand(2, 7))


def test_patches_stand_in_reading_order() -> None:
    """Row by row: a bright patch at (row 1, column 2) of a 3 x 3 grid is token 5."""
    module = Patches(1, cfg.Patch(size=2, image=6, channels=1, first_token=False))
    module.project.weight.data.fill_(1.0)
    module.project.bias.data.zero_()
    pixels = torch.zeros(1, 1, 6, 6)
    for y, x in itertools.product((2, 3), (4, 5)):
        pixels[0, 0, y, x] = 1.0
    assert module(pixels)[0, :, 0].tolist() == [0, 0, 0, 0, 0, 4, 0, 0, 0]
