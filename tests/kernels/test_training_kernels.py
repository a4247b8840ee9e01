"""The fused operations equal their PyTorch twins, forward and backward, and their float64 gradients."""

import pytest
import torch

from headway.config import ModelConfig
from headway.kernels import native
from headway.kernels.training import (
    HeadShape,
    causal_attention,
    relu2,
    relu2_twin,
    rms_norm,
    split_heads,
    split_heads_twin,
)
from headway.nn import Transformer

needs_library = pytest.mark.skipif(native.library() is None, reason="no C++ compiler built the native kernels")


def gradients(function, *inputs):
    """Output and input gradients under a fixed random cotangent."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    outs = out if isinstance(out, tuple) else (out,)
    generator = torch.Generator().manual_seed(7)
    total = sum((o * torch.randn(o.shape, generator=generator).to(o.dtype)).sum() for o in outs)
    return [*outs, *torch.autograd.grad(total, leaves)]


def assert_close(ours, reference):
    """float32 sums of up to a few thousand terms: 1e-5 of each tensor's own scale."""
    for a, b in zip(ours, reference, strict=True):
        scale = b.abs().max().clamp(min=1e-3)
        assert ((a.double() - b.double()).abs().max() / scale).item() < 1e-5


@needs_library
@pytest.mark.parametrize("rows,size", [(1, 1), (3, 7), (64, 128), (130, 384)])
def test_rms_norm_equals_the_formula(rows, size):
    x, w = torch.randn(rows, size), torch.randn(size)
    formula = lambda x, w: x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w  # noqa: E731
    assert_close(gradients(lambda x, w: rms_norm(x, w, 1e-6), x, w), gradients(formula, x.double(), w.double()))


@needs_library
@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("N,K,H,pairs", [(4, 4, 32, 16), (4, 2, 16, 8), (3, 1, 10, 3), (2, 1, 8, 4)])
@pytest.mark.parametrize("rows", [1, 3])
def test_split_heads_equals_the_formula(layout, normed, N, K, H, pairs, rows):
    B, T = 3, 5
    qkv = torch.randn(B, T, (N + 2 * K) * H)
    angles = torch.polar(torch.ones(rows, T, 1, pairs), torch.randn(rows, T, 1, pairs))
    shape = HeadShape(N, K, layout, 1e-6)
    weights = (torch.randn(H), torch.randn(H)) if normed else ()

    def call(function, angles):
        return lambda qkv, *w: function(qkv, angles, w or None, shape)

    ours = gradients(call(split_heads, angles), qkv, *weights)
    twin = call(split_heads_twin, angles.to(torch.complex128))
    assert_close(ours, gradients(twin, qkv.double(), *(w.double() for w in weights)))


@needs_library
@pytest.mark.parametrize("size", [1, 4095, 4097, 10000])
def test_relu2_equals_the_formula(size):
    x = torch.randn(size)
    assert_close(gradients(relu2, x), gradients(relu2_twin, x.double()))


@needs_library
def test_the_native_path_is_taken_and_can_be_switched_off():
    x = torch.randn(4, 8, requires_grad=True)
    assert "RMSNorm" in type(rms_norm(x, torch.ones(8), 1e-6).grad_fn).__name__
    with native.twins_only():
        assert "_RMSNormBackward" not in type(rms_norm(x, torch.ones(8), 1e-6).grad_fn).__name__
    assert not native.usable(x.double()) and not native.usable(x.to(torch.bfloat16))


@needs_library
def test_a_whole_model_trains_the_same_with_and_without_the_library():
    config = ModelConfig(
        d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=50, max_len=16,
        attention={"qk_norm": "rmsnorm"}, feed_forward="relu2", positions={"type": "rope", "layout": "interleaved"},
    )  # fmt: skip
    model = Transformer(config)
    ids = torch.randint(0, 50, (3, 16))
    results = []
    for context in (native.twins_only, torch.enable_grad):
        with context():
            model.zero_grad()
            model(ids, labels=ids).loss.backward()
            results.append([p.grad.clone() for p in model.parameters()])
    assert_close(*results)


@needs_library
def test_repeats_bit_for_bit():
    x, w = torch.randn(1000, 96), torch.randn(96)
    first, second = (gradients(lambda x, w: rms_norm(x, w, 1e-6), x, w) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@needs_library
@pytest.mark.parametrize("N,K", [(3, 3), (4, 2), (3, 1)])
@pytest.mark.parametrize("T,H", [(1, 4), (7, 8), (64, 32), (130, 16), (257, 8)])
def test_causal_attention_equals_the_formula(T, H, N, K):
    q, k, v = torch.randn(2, N, T, H), torch.randn(2, K, T, H), torch.randn(2, K, T, H)

    def formula(q, k, v):
        k, v = (x.repeat_interleave(N // K, 1) for x in (k, v))
        scores = (q @ k.mT * 0.3).masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), float("-inf"))
        return scores.softmax(-1) @ v

    ours = gradients(lambda q, k, v: causal_attention(q, k, v, 0.3), q, k, v)
    assert_close(ours, gradients(formula, q.double(), k.double(), v.double()))


@needs_library
def test_causal_attention_survives_large_scores():
    """A score of 1e4 above the others gives weight one to its key, not NaN."""
    q = torch.full((1, 1, 3, 4), 100.0, requires_grad=True)
    k, v = torch.randn(1, 1, 3, 4) * 100, torch.randn(1, 1, 3, 4)
    out = causal_attention(q, k, v, 1.0)
    out.sum().backward()
    assert out.isfinite().all() and q.grad.isfinite().all()


@needs_library
@pytest.mark.parametrize("T", [9, 200])
def test_packed_documents_start_where_they_begin(T):
    """Each query sees its own document only, as under the dense mask."""
    q, k, v = torch.randn(2, 4, T, 8), torch.randn(2, 2, T, 8), torch.randn(2, 2, T, 8)
    firsts = torch.stack([torch.tensor([0] * 4 + [4] * (T - 4)), torch.tensor([0] * (T - 2) + [T - 2] * 2)])
    order = torch.arange(T)
    visible = (order <= order[:, None]) & (order >= firsts[:, :, None])

    def formula(q, k, v):
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        return (q @ k.mT * 0.3).masked_fill(~visible[:, None], float("-inf")).softmax(-1) @ v

    ours = gradients(lambda q, k, v: causal_attention(q, k, v, 0.3, firsts), q, k, v)
    assert_close(ours, gradients(formula, q.double(), k.double(), v.double()))
