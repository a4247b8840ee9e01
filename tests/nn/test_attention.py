"""Every attention backend equals the formula of tests/nn/formulas.py, float64, one query at a time.

The reference knows nothing of positions, triangles or groups of heads as tensors: who sees whom is a Python predicate
over the columns of a padded or packed batch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import formulas
import numpy as np
import pytest
import torch
from formulas import TOLERANCE, Visible, assert_close, linear, randomize, wide
from torch import Tensor

from headway.config import ModelConfig
from headway.errors import ConfigError
from headway.kernels import native
from headway.nn import Transformer
from headway.nn.attention import Attention, Scores, attend, use_backend
from headway.nn.masks import Mask, Sight, build_mask

BACKENDS = ("naive", "sdpa", "flex")
HEADS = {"multi-head": (4, 4), "multi-query": (4, 1), "grouped-query": (6, 2)}
B, T, H = 2, 7, 5

# Flex is compiled on CUDA; here it runs as written, and says each time that this is slow.
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def reference(
    tensors: list[Tensor], how: Scores, visible: Visible = formulas.everything, bias: Tensor | None = None
) -> np.ndarray:
    """The formula on q (B, T, N, H), k and v (B, S, K, H); the bias may have one row or one head for all."""
    q, k, v = map(wide, tensors)
    if bias is not None:
        bias = wide(bias.expand(len(q), q.shape[2], -1, -1))
    return formulas.attention(q, k, v, how.scale, visible, softcap=how.softcap, bias=bias)


# --- who sees whom -----------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """One visibility: as the stack builds it, and as a predicate. `real` (B, T): the queries that count."""

    mask: Mask
    visible: Visible
    real: Tensor | None = None


def plain(*, is_causal: bool, window: int | None = None) -> Case:
    order = torch.arange(T)[None]
    mask = build_mask(Sight(order, order, plain=True), is_causal=is_causal, window=window)
    return Case(mask, lambda b, t, s: (not is_causal or s <= t) and (window is None or abs(t - s) < window))


def padded(side: str, *, is_causal: bool, window: int | None = None) -> Case:
    """Row 0 is whole, row 1 holds three real tokens."""
    real = torch.ones(B, T, dtype=torch.bool)
    real[1, : T - 3] = side != "left"
    real[1, 3:] = side != "right"
    positions = (real.long().cumsum(1) - 1).clamp(min=0)
    mask = build_mask(Sight(positions, positions, real), is_causal=is_causal, window=window)
    clear = plain(is_causal=is_causal, window=window).visible
    return Case(mask, lambda b, t, s: bool(real[b, s]) and clear(b, t, s), real)


def packed(*, is_causal: bool, window: int | None = None) -> Case:
    """Documents of 3, 1 and 3 tokens, and of 5 and 2; positions restart."""
    documents = torch.tensor([[0, 0, 0, 1, 2, 2, 2], [4, 4, 4, 4, 4, 7, 7]])
    positions = torch.tensor([[0, 1, 2, 0, 0, 1, 2], [0, 1, 2, 3, 4, 0, 1]])
    sight = Sight(positions, positions, None, documents, documents)
    clear = plain(is_causal=is_causal, window=window).visible
    mask = build_mask(sight, is_causal=is_causal, window=window)
    return Case(mask, lambda b, t, s: bool(documents[b, t] == documents[b, s]) and clear(b, t, s))


CASES: dict[str, Case] = {
    "full": plain(is_causal=False),
    "causal": plain(is_causal=True),
    "causal window 3": plain(is_causal=True, window=3),
    "causal window 1": plain(is_causal=True, window=1),
    "full window 3": plain(is_causal=False, window=3),
    "window wider than the sequence": plain(is_causal=True, window=64),
    "left padding, causal": padded("left", is_causal=True),
    "right padding, causal": padded("right", is_causal=True),
    "left padding, full": padded("left", is_causal=False),
    "right padding, full": padded("right", is_causal=False),
    "left padding, causal window 2": padded("left", is_causal=True, window=2),
    "packed, causal": packed(is_causal=True),
    "packed, full": packed(is_causal=False),
    "packed, causal window 2": packed(is_causal=True, window=2),
}
# nn/stack.py gives masks of one query row where all queries see the same keys: an encoder's padding, cross-attention.
EVERY_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
EVERY_HEADS = pytest.mark.parametrize("N,K", HEADS.values(), ids=HEADS.keys())


def heads(N: int, K: int, dtype: torch.dtype, S: int = T, T: int = T) -> list[Tensor]:
    """Random q (B, T, N, H), k and v (B, S, K, H); scores spread over several units, so that no row is flat."""
    shapes = ((B, T, N, H), (B, S, K, H), (B, S, K, H))
    return [2 * torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]


def dtypes(backend: str) -> list[torch.dtype]:
    """Flex traces anew at every call, a tenth of a second: for it the stricter dtype only."""
    return [torch.float64] if backend == "flex" else list(TOLERANCE)


def masked() -> Iterator[Any]:
    """Backend, heads and case; flex only with grouped queries."""
    for backend, kind, name in itertools.product(BACKENDS, HEADS, CASES):
        if backend != "flex" or kind == "grouped-query":
            yield pytest.param(backend, *HEADS[kind], CASES[name], id=f"{backend}-{kind}-{name}")


@pytest.mark.parametrize("backend,N,K,case", [*masked()])
def test_backends_equal_the_formula(backend: Any, N: int, K: int, case: Case) -> None:
    for dtype in dtypes(backend):
        q, k, v = heads(N, K, dtype)
        with use_backend(backend):
            out = attend(q, k, v, case.mask, Scores(0.4))
        assert_close(out, reference([q, k, v], Scores(0.4), case.visible), case.real)


def test_the_tolerance_would_notice_one_key_too_many() -> None:
    """Negative control: a window of 4 is not a window of 3."""
    q, k, v = heads(4, 2, torch.float32)
    out = attend(q, k, v, CASES["causal window 3"].mask, Scores(0.4))
    with pytest.raises(AssertionError):
        assert_close(out, reference([q, k, v], Scores(0.4), plain(is_causal=True, window=4).visible))


def biased() -> Iterator[Any]:
    """Backend, mask, cap and the shape of the bias; sdpa has no cap (see below), flex runs half of the rest."""
    names, shapes = ("full", "causal", "left padding, causal", "packed, causal"), (None, (1, 4), (B, 1), (B, 4))
    for number, (name, cap, shape) in enumerate(itertools.product(names, (None, 1.5), shapes)):
        yield "naive", name, cap, shape
        if cap is None:
            yield "sdpa", name, cap, shape
        if number % 5 in (0, 3):
            yield "flex", name, cap, shape


@pytest.mark.parametrize("backend,name,softcap,bias_shape", [*biased()], ids=str)
def test_bias_and_softcap_equal_the_formula(
    backend: Any, name: str, softcap: float | None, bias_shape: tuple[int, int] | None
) -> None:
    """The bias comes after the cap (else the cap would flatten distances too)."""
    case, how = CASES[name], Scores(0.7, softcap)
    for dtype in dtypes(backend):
        q, k, v = heads(4, 2, dtype)
        bias = None if bias_shape is None else 2 * torch.randn(*bias_shape, T, T, dtype=torch.float64).to(dtype)
        with use_backend(backend):
            out = attend(q, k, v, case.mask, how, bias)
        assert_close(out, reference([q, k, v], how, case.visible, bias), case.real)


@pytest.mark.parametrize("backend", ["naive", "sdpa", "flex"])
@pytest.mark.parametrize("N,K", [(4, 4), (6, 2)], ids=["multi-head", "grouped-query"])
def test_cross_attention_with_padded_keys(backend: Any, N: int, K: int) -> None:
    """Four queries over nine keys, under the mask of one row that nn/stack.py builds from the encoder's padding."""
    S = 9
    real = torch.ones(B, S, dtype=torch.bool)
    real[1, :4] = False
    for dtype in dtypes(backend):
        q, k, v = heads(N, K, dtype, S, 4)
        with use_backend(backend):
            out = attend(q, k, v, Mask(dense=real[:, None, None, :]), Scores(0.4))
        assert_close(out, reference([q, k, v], Scores(0.4), lambda b, t, s: bool(real[b, s])))


@EVERY_BACKEND
def test_cross_attention_without_padding(backend: Any) -> None:
    q, k, v = heads(4, 2, torch.float64, 9, 4)
    with use_backend(backend):
        assert_close(attend(q, k, v, Mask(), Scores(0.4)), reference([q, k, v], Scores(0.4)))


# --- gradients ---------------------------------------------------------------------------------------------------


def gradients(backend: Any, tensors: list[Tensor], case: Case, how: Scores, bias: Tensor | None) -> list[Tensor]:
    """Of q, k, v (and the bias) under a fixed cotangent at the real queries."""
    leaves = [x.clone().requires_grad_() for x in (*tensors, *([] if bias is None else [bias]))]
    with use_backend(backend):
        out = attend(leaves[0], leaves[1], leaves[2], case.mask, how, leaves[3] if bias is not None else None)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    if case.real is not None:
        weights = weights * case.real[:, :, None, None]
    return list(torch.autograd.grad((out * weights.to(out.dtype)).sum(), leaves))


@pytest.mark.parametrize("name", ["full", "causal", "full window 3", "left padding, causal", "packed, causal"])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_gradients_of_the_formula_are_its_finite_differences(name: str, softcap: float | None) -> None:
    """The backend `naive` is what the others' gradients are compared with, so it is compared with numbers."""
    q, k, v = heads(2, 1, torch.float64)
    bias, case = torch.randn(1, 2, T, T, dtype=torch.float64), CASES[name]
    leaves = [x[..., :2].clone().requires_grad_() for x in (q, k, v)] + [bias.requires_grad_()]
    with use_backend("naive"):
        # The default tolerances: 1e-6 steps leave 1e-10 of rounding and 1e-6 of curvature.
        assert torch.autograd.gradcheck(lambda *x: attend(*x[:3], case.mask, Scores(0.7, softcap), x[3]), leaves)


@EVERY_CASE
@EVERY_HEADS
@pytest.mark.parametrize("with_bias", [False, True])
def test_gradients_of_sdpa_equal_those_of_the_formula(N: int, K: int, case: Case, with_bias: bool) -> None:
    """float32 without a bias takes the compiled causal kernel where the mask allows it."""
    tensors = heads(N, K, torch.float64)
    bias = torch.randn(1, N, T, T, dtype=torch.float64) if with_bias else None
    expected = gradients("naive", tensors, case, Scores(0.4), bias)
    for dtype in TOLERANCE:
        narrow = None if bias is None else bias.to(dtype)
        found = gradients("sdpa", [x.to(dtype) for x in tensors], case, Scores(0.4), narrow)
        for one, other in zip(found, expected, strict=True):
            # Relative to the tensor: gradients here reach 50, and the inputs were rounded to float32 first.
            limit = TOLERANCE[dtype] * max(1.0, other.abs().max().item())
            assert (one.double() - other).abs().max().item() < limit


@pytest.mark.skipif(native.library() is None, reason="no C++ compiler built the native kernels")
@pytest.mark.parametrize("is_packed", [False, True])
@EVERY_HEADS
def test_the_compiled_causal_kernel_equals_the_formula(N: int, K: int, is_packed: bool) -> None:
    """Training in float32 on CPU. 130 positions: one more block than the kernel's 128 queries."""
    length, start = 130, 125 if is_packed else 0  # the first 125 tokens and the last 5 are two documents
    order = torch.arange(length)[None]
    positions, documents = torch.where(order < start, order, order - start), (order >= start).long()
    expanded = positions.expand(B, -1), documents.expand(B, -1)
    sight = Sight(expanded[0], expanded[0], None, expanded[1], expanded[1])
    if not is_packed:
        sight = Sight(order, order, plain=True)
    q, k, v = heads(N, K, torch.float32, length, length)
    out = attend(q.requires_grad_(), k, v, build_mask(sight, is_causal=True, window=None), Scores(0.4))
    assert "CausalAttention" in str(out.grad_fn.next_functions)  # the fused path, not its fallback
    last = slice(120, None)  # the loop over every query would take half a minute
    expected = reference(
        [q[:, last], k, v], Scores(0.4), lambda b, t, s: s <= t + 120 and (s >= start or t + 120 < start)
    )
    assert_close(out[:, last], expected)


@pytest.mark.skipif(native.library() is None, reason="no C++ compiler built the native kernels")
def test_a_document_number_that_comes_back_means_one_thing() -> None:
    """Whatever it means: the same with gradients (compiled kernel) and without (mask)."""
    model = randomize(Transformer(ModelConfig(d_model=8, n_layers=1, n_heads=2, vocab_size=11, max_len=T)))
    ids, documents = torch.randint(11, (1, T)), torch.tensor([[0, 0, 1, 1, 0, 0, 0]])
    with_gradients = model(ids, documents=documents).logits
    with torch.no_grad():
        assert torch.allclose(model(ids, documents=documents).logits, with_gradients, atol=1e-5)


# --- the module --------------------------------------------------------------------------------------------------


def module(cross: bool = False, **fields: Any) -> Attention:
    """An Attention in float64 with every parameter random, d_head apart from d_model / n_heads."""
    sizes = {"d_model": 10, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "d_head": 6, "vocab_size": 9, "max_len": T}
    kind = {"kind": "encoder-decoder", "tokens": {"decoder_start": 0}} if cross else {}
    return randomize(Attention(ModelConfig(**sizes, **kind, **fields), 0, cross=cross).double())


def normed(x: np.ndarray, norm: Any, kind: str) -> np.ndarray:
    """QK-norm over each head (arXiv:2302.05442), without a bias."""
    if kind == "none":
        return x
    weight = wide(norm.weight)
    return formulas.rms_norm(x, weight, 1e-6) if kind == "rmsnorm" else formulas.layer_norm(x, weight, None, 1e-6)


def by_hand(layer: Attention, x: Tensor, scale: float, norm: str, layout: str | None) -> np.ndarray:
    """Project, split into q, k and v, normalise per head, turn, attend, project back."""
    N, K, size = 4, 2, 6
    q, k, v = np.split(linear(wide(x), layer.qkv), [N * size, (N + K) * size], -1)
    q, k, v = (part.reshape(B, T, -1, size) for part in (q, k, v))
    q, k = normed(q, layer.q_norm, norm), normed(k, layer.k_norm, norm)
    if layout is not None:
        q, k = formulas.rotated(q, layout), formulas.rotated(k, layout)
    mixed = formulas.attention(q, k, v, scale, formulas.causal, softcap=layer.softcap)
    return linear(mixed.reshape(B, T, N * size), layer.output)


CAUSAL = CASES["causal"].mask


@pytest.mark.parametrize("layout", [None, "half", "interleaved"])
@pytest.mark.parametrize("norm", ["none", "rmsnorm", "layernorm"])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_module_equals_its_weights_applied_by_hand(scale: float | None, norm: str, layout: str | None) -> None:
    """The default scale is 1 / sqrt(d_head), here 1 / sqrt(6), not of d_model / n_heads (arXiv:1706.03762, eq. 1)."""
    positions = {"type": "rope", "layout": layout} if layout else "none"
    attention = {"qk_norm": norm, "scale": scale, "bias": True, "output_bias": True}
    config = {"positions": positions, "attention": attention}
    model = Transformer(
        ModelConfig(d_model=10, n_layers=1, n_heads=4, n_kv_heads=2, d_head=6, vocab_size=9, max_len=T, **config)
    )
    layer, x = module(**config), torch.randn(B, T, 10, dtype=torch.float64)
    rope = model.decoder.rope
    angles = rope.angles(torch.arange(T)[None], x) if rope is not None else None
    out = layer(x, CAUSAL, angles, None)
    assert_close(out, by_hand(layer, x, 1 / math.sqrt(6) if scale is None else scale, norm, layout))
    with pytest.raises(AssertionError):  # negative control: without the division the result is another
        assert_close(out, by_hand(layer, x, 1.0, norm, layout))


def test_module_caps_its_scores() -> None:
    layer, x = module(positions="none", attention={"softcap": 0.5}), torch.randn(B, T, 10, dtype=torch.float64)
    out = layer(x, CAUSAL, None, None)
    assert_close(out, by_hand(layer, x, 1 / math.sqrt(6), "none", None))
    layer.softcap = None
    assert not torch.allclose(out, layer(x, CAUSAL, None, None))


@pytest.mark.parametrize("norm", ["none", "rmsnorm"])
def test_cross_attention_equals_its_weights_applied_by_hand(norm: str) -> None:
    """Queries from the decoder, keys and values from an encoder of another length, the last key padding in row 1."""
    S, size = 5, 6
    layer = module(True, positions="none", attention={"qk_norm": norm, "bias": True})
    x, encoded = torch.randn(B, T, 10, dtype=torch.float64), torch.randn(B, S, 10, dtype=torch.float64)
    real = torch.ones(B, S, dtype=torch.bool)
    real[1, -1] = False
    out = layer.cross(x, encoded, Mask(dense=real[:, None, None, :]))
    q = normed(linear(wide(x), layer.q).reshape(B, T, 4, size), layer.q_norm, norm)
    k, v = (part.reshape(B, S, 2, size) for part in np.split(linear(wide(encoded), layer.kv), 2, -1))
    k = normed(k, layer.k_norm, norm)
    mixed = formulas.attention(q, k, v, 1 / math.sqrt(size), lambda b, t, s: bool(real[b, s]))
    assert_close(out, linear(mixed.reshape(B, T, -1), layer.output))


# --- rows that see nothing ---------------------------------------------------------------------------------------


@pytest.mark.fault("G14")
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("is_row", [False, True], ids=["one query", "a whole row"])
@EVERY_BACKEND
def test_queries_that_see_nothing_give_zeros_and_finite_gradients(backend: Any, is_row: bool, with_bias: bool) -> None:
    """softmax of nothing is 0/0; the formula here says zero, and the others keep their values."""
    seen = torch.ones(B, T, T, dtype=torch.bool).tril()
    if is_row:
        seen[1] = False
    else:
        seen[1, 2] = False
    case = Case(Mask(dense=seen[:, None]), lambda b, t, s: bool(seen[b, t, s]))
    for dtype in dtypes(backend):
        q, k, v = heads(4, 2, dtype)
        bias = torch.randn(1, 4, T, T, dtype=dtype) if with_bias else None
        with use_backend(backend):
            out = attend(q, k, v, case.mask, Scores(0.4), bias)
        assert (out[1] if is_row else out[1, 2]).abs().max() == 0
        assert_close(out, reference([q, k, v], Scores(0.4), case.visible, bias))
        if backend != "flex":  # PyTorch has no gradient of flex on CPU
            assert all(x.isfinite().all() for x in gradients(backend, [q, k, v], case, Scores(0.4), bias))


@pytest.mark.fault("G14")
@pytest.mark.parametrize("side", ["encoder", "decoder", "encoder-decoder"])
@pytest.mark.parametrize("positions", ["rope", "alibi", "relative", "learned"])
def test_a_row_of_nothing_but_padding_harms_no_other(side: str, positions: str) -> None:
    """Finite output and gradients, and the other row answers as if alone."""
    start = {"tokens": {"decoder_start": 0}} if side == "encoder-decoder" else {}
    config = ModelConfig(
        kind=side, d_model=8, n_layers=2, n_heads=2, vocab_size=11, max_len=T, positions=positions, **start
    )
    model, ids = Transformer(config), torch.randint(11, (B, T))
    real, labels = torch.ones(B, T), torch.randint(11, (B, T))
    real[1], labels[1] = 0, -100
    masks = {"attention_mask": real}
    if side == "encoder-decoder":
        masks["decoder_attention_mask"] = real
    out = model(ids, **masks, labels=labels)
    out.loss.backward()
    assert out.logits.isfinite().all() and out.loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    alone = model(ids[:1], labels=labels[:1])
    # float32 sums over 8 dimensions, in another order.
    assert torch.allclose(out.logits[:1], alone.logits, atol=1e-6)
    assert torch.allclose(out.loss, alone.loss, atol=1e-6)


# --- dropout -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["naive", "sdpa"])
def test_dropout_leaves_the_mean_as_it_is(backend: Any) -> None:
    """Weights are zeroed with probability p and divided by 1 - p, so the mean over draws is the undropped result."""
    draws, p = 20000, 0.25
    q, k = (torch.randn(1, 3, 1, 4).expand(draws, -1, -1, -1) for _ in range(2))
    v = 1 + torch.randn(1, 3, 1, 4).expand(draws, -1, -1, -1)  # a mean away from zero shows a missing 1 / (1 - p)
    with use_backend(backend):
        kept = attend(q[:1], k[:1], v[:1], Mask(is_causal=True), Scores(0.5))[0]
        out = attend(q, k, v, Mask(is_causal=True), Scores(0.5, dropout=p))
    # One draw deviates by at most |v| sqrt(p / (1 - p)) < 2; the mean of 20000 by 0.014, five times that is 0.07.
    assert (out.mean(0) - kept).abs().max() < 0.07
    # The first query has one key: its output is dropped whole in a quarter of the draws.
    assert abs((out[:, 0].abs().sum((1, 2)) == 0).float().mean().item() - p) < 5 * math.sqrt(p * (1 - p) / draws)


def test_dropout_is_for_training_only() -> None:
    layer = module(positions="none", attention={"dropout": 0.5})
    x = torch.randn(B, T, 10, dtype=torch.float64)
    first, second = layer(x, CAUSAL, None, None), layer(x, CAUSAL, None, None)
    assert torch.equal(first, second)
    assert_close(first, by_hand(layer, x, 1 / math.sqrt(6), "none", None))
    layer.train()
    assert not torch.allclose(layer(x, CAUSAL, None, None), first)


# --- choosing a backend ------------------------------------------------------------------------------------------


@pytest.fixture
def qkv() -> Iterator[list[Tensor]]:
    yield heads(4, 2, torch.float64)


@pytest.mark.parametrize(
    "backend,how", [("sdpa", Scores(0.4, softcap=2.0)), ("flex", Scores(0.4, dropout=0.1))], ids=["softcap", "dropout"]
)
def test_a_forced_backend_that_cannot_do_it_says_so(backend: Any, how: Scores, qkv: list[Tensor]) -> None:
    """A silent fallback would make a comparison of backends compare one with itself."""
    with use_backend(backend), pytest.raises(ConfigError, match=f"{backend}.*naive"):
        attend(*qkv, CAUSAL, how)
    attend(*qkv, CAUSAL, how)  # left to itself, the entry finds a backend that can


def test_forced_flex_on_cpu_with_gradients_says_so(qkv: list[Tensor]) -> None:
    with use_backend("flex"), pytest.raises(ConfigError):
        attend(qkv[0].requires_grad_(), *qkv[1:], CAUSAL, Scores(0.4))


def test_use_backend_restores_what_was_before(qkv: list[Tensor]) -> None:
    """Nested, and through an exception; the probe is a cap, which only naive of these two can do."""

    def is_sdpa() -> bool:
        try:
            attend(*qkv, CAUSAL, Scores(0.4, softcap=2.0))
        except ConfigError:
            return True
        return False

    assert not is_sdpa()
    with use_backend("sdpa"):
        assert is_sdpa()
        with use_backend("naive"):
            assert not is_sdpa()
        assert is_sdpa()
    assert not is_sdpa()
    with pytest.raises(ZeroDivisionError), use_backend("sdpa"):
        raise ZeroDivisionError
    assert not is_sdpa()
