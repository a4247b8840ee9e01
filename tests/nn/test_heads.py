"""Every head's answer and loss against its formula, label by label in float64."""

from __future__ import annotations

import math
from typing import Any

import formulas
import numpy as np
import pytest
import torch
from formulas import assert_close, randomize, wide
from torch import Tensor

from headway import config as cfg
from headway.errors import BugError
from headway.nn import Transformer, heads
from headway.nn.feed_forward import ACTIVATIONS
from headway.nn.heads import IGNORED, Entropy, cross_entropy, linear_cross_entropy, make_head, pool

B, T, D, V = 3, 5, 6, 11
EXACT = 1e-12  # float64 sums of at most 33 terms


def head(kind: str, description: dict[str, Any], **fields: Any) -> Any:
    """The head of a tiny model, random, in float64 and training mode."""
    sizes = {"d_model": D, "n_layers": 1, "n_heads": 2, "vocab_size": V, "max_len": T, "positions": "none"}
    config = cfg.ModelConfig(kind=kind, head=description, **sizes, **fields)
    return randomize(make_head(config).double()).train()


def log_probabilities(logits: Tensor) -> np.ndarray:
    x = wide(logits)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def mean_over_labels(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> float:
    """Cross-entropy with the target (1 - e) onehot + e / V (arXiv:1512.00567, section 7), -100 left out."""
    rows, total, count = log_probabilities(logits), 0.0, 0
    for index in np.ndindex(tuple(labels.shape)):
        label = int(labels[index])
        if label != -100:
            total -= (1 - smoothing) * rows[index][label] + smoothing * rows[index].mean()
            count += 1
    return total / max(count, 1)


# --- pooling -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right", "none", "holes"])
@pytest.mark.parametrize("how", ["first", "last", "mean"])
def test_pooling_reads_real_tokens_only(how: Any, side: str) -> None:
    hidden, real = torch.randn(B, T, D, dtype=torch.float64), torch.ones(B, T, dtype=torch.bool)
    real[1, 2:] = side == "none"
    real[2, 4:] = side == "none"
    if side == "left":
        real = real.flip(1)
    if side == "holes":
        real = torch.tensor([[0, 1, 0, 1, 0], [1, 0, 0, 0, 0], [0, 0, 0, 1, 1]], dtype=torch.bool)
    found = pool(hidden, None if side == "none" else real, how)
    for b in range(B):
        rows = [wide(hidden[b, t]) for t in range(T) if real[b, t]]
        expected = {"first": rows[0], "last": rows[-1], "mean": sum(rows) / len(rows)}[how]
        assert_close(found[b], expected)


@pytest.mark.fault("G14")
@pytest.mark.parametrize("how", ["first", "last", "mean"])
def test_pooling_nothing_but_padding_is_finite(how: Any) -> None:
    hidden = torch.randn(2, T, D, requires_grad=True)
    pooled = pool(hidden, torch.zeros(2, T, dtype=torch.bool), how)
    pooled.sum().backward()
    assert pooled.isfinite().all() and hidden.grad.isfinite().all()


# --- answers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 0.5])
@pytest.mark.parametrize("has_bias", [False, True])
def test_causal_lm_logits(has_bias: bool, softcap: float | None) -> None:
    """W h (+ b), capped to c tanh(x / c) (arXiv:2408.00118, section 2)."""
    module = head("decoder", {"type": "causal-lm", "bias": has_bias, "softcap": softcap})
    hidden = torch.randn(B, T, D, dtype=torch.float64)
    logits = formulas.linear(wide(hidden), module.output)
    expected = logits if softcap is None else softcap * np.tanh(logits / softcap)
    assert (module.output.bias is not None) == has_bias
    assert_close(module(hidden, None), expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_masked_lm_transform(norm: str, activation: str) -> None:
    """Dense, the model's activation, the model's norm, output (arXiv:1810.04805's code, cls/predictions)."""
    module = head("encoder", {"type": "masked-lm"}, norm=norm, feed_forward=activation)
    hidden = torch.randn(B, T, D, dtype=torch.float64)
    dense = formulas.ACTIVATIONS[activation](formulas.linear(wide(hidden), module.dense))
    weight = wide(module.transform_norm.weight)
    if norm == "layernorm":
        dense = formulas.layer_norm(dense, weight, wide(module.transform_norm.bias), 1e-5)
    else:
        dense = formulas.rms_norm(dense, weight, 1e-6)
    assert_close(module(hidden, None), formulas.linear(dense, module.output))


@pytest.mark.parametrize("how", ["first", "last", "mean"])
def test_classification_pools_and_projects(how: str) -> None:
    module = head("encoder", {"type": "sequence-classification", "labels": 3, "pooling": how})
    hidden = torch.randn(B, T, D, dtype=torch.float64)
    row = {"first": wide(hidden)[:, 0], "last": wide(hidden)[:, -1], "mean": wide(hidden).mean(1)}[how]
    assert_close(module(hidden, None), formulas.linear(row, module.output))


def test_padding_is_neither_start_nor_end() -> None:
    module, real = head("encoder", {"type": "span"}), torch.ones(B, T, dtype=torch.bool)
    real[1, 3:] = False
    hidden = torch.randn(B, T, D, dtype=torch.float64)
    logits = module(hidden, real)
    assert_close(logits[real], formulas.linear(wide(hidden[real]), module.output))
    assert logits.softmax(1)[1, 3:].abs().max() == 0 and logits.isfinite().all()


@pytest.mark.parametrize("normalize", [False, True])
def test_pooled_embedding(normalize: bool) -> None:
    hidden = torch.randn(B, T, D, dtype=torch.float64)
    expected = wide(hidden).mean(1)
    if normalize:
        expected = expected / np.sqrt((expected**2).sum(-1, keepdims=True))
    assert_close(head("encoder", {"type": "pooled-embedding", "normalize": normalize})(hidden, None), expected)


# --- cross-entropies ---------------------------------------------------------------------------------------------

ENTROPIES: dict[str, tuple[str, dict[str, Any], tuple[int, ...], tuple[int, ...]]] = {
    # name: kind, head, shape of the logits, shape of the labels
    "causal-lm": ("decoder", {"type": "causal-lm"}, (B, T, V), (B, T)),
    "masked-lm": ("encoder", {"type": "masked-lm"}, (B, T, V), (B, T)),
    "token-classification": ("encoder", {"type": "token-classification", "labels": 4}, (B, T, 4), (B, T)),
    "sequence-classification": ("encoder", {"type": "sequence-classification", "labels": 4}, (B, 4), (B,)),
    "span": ("encoder", {"type": "span"}, (B, T, 2), (B, 2)),
}
EVERY_ENTROPY = pytest.mark.parametrize("name", ENTROPIES)


def drawn(name: str, ignored: bool = True) -> tuple[Any, Tensor, Tensor]:
    """A head, logits with a gradient and labels of which about a third are ignored."""
    kind, description, shape, label_shape = ENTROPIES[name]
    logits = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(T if name == "span" else shape[-1], label_shape)
    if ignored:
        labels.view(-1)[::3] = -100
    return head(kind, description), logits, labels


def classes_last(name: str, logits: Tensor) -> Tensor:
    """A span picks among positions."""
    return logits.transpose(1, 2) if name == "span" else logits


@EVERY_ENTROPY
def test_loss_is_the_mean_over_labels_that_count(name: str) -> None:
    module, logits, labels = drawn(name)
    expected = mean_over_labels(classes_last(name, logits), labels)
    assert module.loss(logits, labels).item() == pytest.approx(expected, rel=EXACT)
    # Negative control: dividing by all labels would give another number.
    assert expected * (labels != -100).sum() / labels.numel() != pytest.approx(expected, rel=0.1)


@EVERY_ENTROPY
def test_every_label_ignored_gives_zero_and_zero_gradients(name: str) -> None:
    module, logits, labels = drawn(name)
    module.smoothing = 0.1
    loss = module.loss(logits, torch.full_like(labels, -100))
    loss.backward()
    assert loss.item() == 0 and logits.grad.abs().max() == 0


@EVERY_ENTROPY
def test_label_smoothing_acts_in_training_only(name: str) -> None:
    module, logits, labels = drawn(name)
    plain = mean_over_labels(classes_last(name, logits), labels)
    assert module.smoothing == 0.0
    module.smoothing = 0.1
    if name == "span":  # never smoothed: see the next test
        assert module.train().loss(logits, labels).item() == pytest.approx(plain, rel=EXACT)
        return
    smoothed = mean_over_labels(classes_last(name, logits), labels, 0.1)
    assert module.train().loss(logits, labels).item() == pytest.approx(smoothed, rel=EXACT)
    assert module.eval().loss(logits, labels).item() == pytest.approx(plain, rel=EXACT)
    assert abs(smoothed - plain) > 1e-3


def test_label_smoothing_of_a_span_leaves_padding_out() -> None:
    module, real = head("encoder", {"type": "span"}).float(), torch.ones(B, T, dtype=torch.bool)
    real[:, 3:] = False
    module.smoothing = 0.1
    logits = module(torch.randn(B, T, D), real)
    assert module.loss(logits, torch.tensor([[0, 1]] * B)) < 100


def test_low_precision_logits_are_widened_before_the_sum() -> None:
    """bfloat16 counts in steps of 1 from 256 on: a sum of 2000 losses in it would be off by several percent."""
    logits, labels = torch.randn(1, 2000, V, dtype=torch.bfloat16), torch.randint(V, (1, 2000))
    loss = head("decoder", {"type": "causal-lm"}).loss(logits, labels)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(mean_over_labels(logits, labels), rel=1e-5)


# --- z-loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["loss", "loss_of"])
def test_z_loss_is_the_square_of_log_z_in_training_only(path: str) -> None:
    """arXiv:2204.02311, section 5: plus z log^2 Z; so the logits' gradient is p (1 + 2 z log Z) - onehot, over n."""
    module, labels = head("decoder", {"type": "causal-lm"}), torch.randint(V, (B, T))
    labels[0, :2] = IGNORED
    hidden = torch.randn(B, T, D, dtype=torch.float64)
    logits = wide(module(hidden, None))
    log_z = np.log(np.exp(logits).sum(-1))
    known = (labels != IGNORED).numpy()
    plain = mean_over_labels(torch.from_numpy(logits), labels)
    expected = plain + 0.3 * (log_z[known] ** 2).sum() / known.sum()
    slope = np.exp(logits - log_z[..., None]) * (1 + 2 * 0.3 * log_z[..., None])
    for index in zip(*known.nonzero(), strict=True):
        slope[index][int(labels[tuple(map(int, index))])] -= 1
    slope[~known] = 0
    by_weight = np.einsum("btv,btd->vd", slope / known.sum(), wide(hidden))
    module.z_loss = 0.3

    def loss() -> Tensor:
        return module.loss(module(hidden, None), labels) if path == "loss" else module.loss_of(hidden, None, labels)

    assert loss().item() == pytest.approx(expected, rel=EXACT) and expected > plain + 0.1
    loss().backward()
    assert_close(module.output.weight.grad, by_weight)
    module.eval()
    assert loss().item() == pytest.approx(plain, rel=EXACT)


# --- the loss without the logits -----------------------------------------------------------------------------------

VOCABULARIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "plain": ("decoder", {"type": "causal-lm"}, {}),
    "bias": ("decoder", {"type": "causal-lm", "bias": True}, {}),
    "softcap": ("decoder", {"type": "causal-lm", "softcap": 0.7}, {}),
    "scale": ("decoder", {"type": "causal-lm", "scale": 0.3}, {}),
    "transform": ("encoder", {"type": "masked-lm"}, {}),
}
PIECES = [1, 3 * V * 8, 7 * V * 8, 1 << 25]  # of one row, of three, of seven (which do not divide), everything


def both_ways(module: Any, hidden: Tensor, labels: Tensor) -> list[tuple[Tensor, list[Tensor]]]:
    """Loss and gradients, by states and by every parameter, with the logits and without."""
    wanted = [hidden, *(p for p in module.parameters() if p.requires_grad)]
    losses = (module.loss(module(hidden, None), labels), module.loss_of(hidden, None, labels))
    return [(loss, list(torch.autograd.grad(loss, wanted))) for loss in losses]


@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize("smoothing,z_loss", [(0.0, 0.0), (0.1, 0.0), (0.0, 0.2), (0.1, 0.2)])
@pytest.mark.parametrize("name", VOCABULARIES)
def test_the_loss_in_pieces_is_the_loss(
    name: str, smoothing: float, z_loss: float, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, description, fields = VOCABULARIES[name]
    module = head(kind, description, **fields)
    module.smoothing, module.z_loss = smoothing, z_loss
    monkeypatch.setattr(heads, "LOGIT_BYTES", piece)
    hidden = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(V, (B, T))
    labels[0], labels[1, 2] = IGNORED, IGNORED
    (loss, expected), (found_loss, found) = both_ways(module, hidden, labels)
    assert found_loss.item() == pytest.approx(loss.item(), rel=EXACT)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() < EXACT
    assert found[0][0].abs().max() == 0 and found[0][2].abs().max() > 0
    with torch.no_grad():
        assert module.loss_of(hidden, None, labels).item() == pytest.approx(loss.item(), rel=EXACT)


def test_float32_sums_differ_in_their_last_bits_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """96 rows of 500 classes in 14 pieces: 2e-6 of the largest gradient, some ten roundings of 2^-24."""
    monkeypatch.setattr(heads, "LOGIT_BYTES", 7 * 500 * 4)
    states, weight = torch.randn(96, 32, requires_grad=True), torch.randn(500, 32, requires_grad=True)
    labels = torch.randint(500, (96,))
    plain = cross_entropy(states @ weight.T, labels, 0.1, 1e-4)
    pieces = linear_cross_entropy(states, weight, None, labels, Entropy(0.1, 1e-4))
    assert pieces.item() == pytest.approx(plain.item(), rel=1e-6)
    for one, other in zip(*(torch.autograd.grad(x, (states, weight)) for x in (pieces, plain)), strict=True):
        assert one.dtype == torch.float32 and (one - other).abs().max() < 2e-6 * other.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_products_keep_float32_sums_and_small_gradients(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under autocast; an unlikely class has gradients below float16's smallest number, 6e-8."""
    monkeypatch.setattr(heads, "LOGIT_BYTES", 100 * 4000 * 4)
    states, weight = torch.randn(256, 16, requires_grad=True), torch.randn(4000, 16, requires_grad=True)
    states.data[:, 0], weight.data[:, 0], weight.data[7] = 4.0, 0.0, 0.0
    weight.data[7, 0] = -4.0
    labels = torch.randint(4, (256,))
    expected = torch.autograd.grad(cross_entropy(states @ weight.T, labels), (states, weight))
    with torch.autocast("cpu", dtype=dtype):
        loss = linear_cross_entropy(states, weight, None, labels)
    found = torch.autograd.grad(loss, (states, weight))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32 and (one - other).norm() < 0.02 * other.norm()
    # One unlikely class: its gradient survives although float16 has no such number.
    rare = expected[1].abs().sum(1).argmin()
    assert (found[1][rare] - expected[1][rare]).norm() < 0.1 * expected[1][rare].norm()
    assert expected[1][rare].abs().max() < 1e-8


@pytest.mark.parametrize("name", ["plain", "transform"])
def test_rows_without_a_label_cost_nothing_and_pieces_stay_small(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, description, fields = VOCABULARIES[name]
    module = head(kind, description, **fields)
    sizes: list[tuple[int, ...]] = []
    original = heads._loss_and_slope
    monkeypatch.setattr(
        heads, "_loss_and_slope", lambda logits, *rest: (sizes.append(tuple(logits.shape)), original(logits, *rest))[1]
    )
    monkeypatch.setattr(heads, "LOGIT_BYTES", 2 * V * 8 + 5)
    transformed: list[int] = []
    if name == "transform":
        module.dense.register_forward_hook(lambda m, args, out: transformed.append(len(args[0])))
    labels = torch.full((B, T), IGNORED)
    labels.view(-1)[:5] = torch.arange(5)
    hidden = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    module.loss_of(hidden, None, labels).backward()
    assert sizes == [(2, V), (2, V), (1, V)] and transformed in ([], [5])
    assert (hidden.grad.flatten(0, 1)[5:] == 0).all() and (hidden.grad.flatten(0, 1)[:5] != 0).any()


@pytest.mark.parametrize("name", VOCABULARIES)
def test_no_label_at_all_gives_zero_and_zero_gradients_without_logits_too(name: str) -> None:
    kind, description, fields = VOCABULARIES[name]
    module = head(kind, description, **fields)
    hidden = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    loss = module.loss_of(hidden, None, torch.full((B, T), IGNORED))
    loss.backward()
    assert loss.item() == 0 and hidden.grad.abs().max() == 0
    assert all(p.grad is not None and p.grad.abs().max() == 0 for p in module.parameters())


def test_only_wanted_gradients_are_made_and_only_once() -> None:
    module, labels = head("decoder", {"type": "causal-lm", "bias": True}), torch.randint(V, (B, T))
    module.output.weight.requires_grad_(False)
    hidden = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    loss = module.loss_of(hidden, None, labels)
    states, weight, bias = loss.grad_fn.gradients
    assert states is not None and weight is None and bias is not None
    loss.backward(retain_graph=True)
    assert module.output.weight.grad is None and module.output.bias.grad is not None
    with pytest.raises(BugError, match="second backward"):
        loss.backward()
    hidden.requires_grad_(False)
    module.requires_grad_(False)
    assert module.loss_of(hidden, None, labels).grad_fn is None


def test_a_label_outside_the_vocabulary_is_an_error_as_before() -> None:
    module, hidden = head("decoder", {"type": "causal-lm"}), torch.randn(1, 2, D, dtype=torch.float64)
    for label in (V, -1):
        with pytest.raises((IndexError, RuntimeError)):
            module.loss_of(hidden, None, torch.tensor([[0, label]]))


class Adapted(torch.nn.Linear):
    """A layer that does something else than multiply."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + input.sum(-1, keepdim=True)


def test_a_layer_that_is_not_plainly_linear_answers_for_itself() -> None:
    module, labels = head("decoder", {"type": "causal-lm"}), torch.randint(V, (B, T))
    labels[1] = IGNORED
    other = Adapted(D, V, bias=False).double()
    hidden = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    before = module.loss_of(hidden, None, labels).item()
    module.output = other
    (loss, expected), (found_loss, found) = both_ways(module, hidden, labels)
    assert found_loss.item() == pytest.approx(loss.item(), rel=EXACT) and abs(before - loss.item()) > 1e-3
    assert all((one - other).abs().max() < EXACT for one, other in zip(found, expected, strict=True))


MODELS: dict[str, dict[str, Any]] = {
    "decoder": {},
    "tied": {"embeddings": {"tied": True}},
    "experts": {"feed_forward": {"activation": "gelu", "experts": {"experts": 4, "top_k": 2}}},
    "encoder": {"kind": "encoder", "head": "masked-lm"},
    "encoder-decoder": {"kind": "encoder-decoder", "tokens": {"decoder_start": 0}},
    "narrow table": {"embeddings": {"width": 4}},
    "classes": {"kind": "encoder", "head": {"type": "sequence-classification", "labels": 3}},
    "vision": {
        "kind": "vision", "vocab_size": 0, "max_len": 5, "embeddings": {"patch": {"size": 4, "image": 8}},
        "head": {"type": "image-classification", "labels": 3},
    },
}  # fmt: skip


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_models_loss_alone_is_its_loss(name: str, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and all gradients of `model.loss(...)` and `model(...).loss`, in float64 and pieces of four rows."""
    monkeypatch.setattr(heads, "LOGIT_BYTES", 4 * V * 8)
    torch.manual_seed(0)
    sizes = {"d_model": 8, "n_layers": 2, "n_heads": 2, "vocab_size": V, "max_len": T}
    model = Transformer(cfg.ModelConfig(**{**sizes, **MODELS[name]})).double().train()
    inputs: dict[str, Tensor] = {"input_ids": torch.randint(V, (B, T))}
    if name == "vision":
        inputs = {"pixel_values": torch.randn(B, 3, 8, 8, dtype=torch.float64)}
    elif padded:
        inputs["attention_mask"] = torch.arange(T)[None] < torch.tensor([[T], [3], [4]])
    labels = torch.randint(3, (B,)) if name in ("classes", "vision") else torch.randint(V, (B, T))
    if labels.ndim == 2:
        labels[1, 3:] = IGNORED
    whole, alone = model(**inputs, labels=labels).loss, model.loss(labels, **inputs)
    assert alone.item() == pytest.approx(whole.item(), rel=EXACT)
    for one, other in zip(*(torch.autograd.grad(x, list(model.parameters())) for x in (alone, whole)), strict=True):
        assert (one - other).abs().max() < EXACT
    with pytest.raises(TypeError):
        model.loss(labels, **inputs, cache=None, unknown=labels)


# --- other losses ------------------------------------------------------------------------------------------------


def sequence_head(problem: str, labels: int) -> Any:
    return head("encoder", {"type": "sequence-classification", "problem": problem, "labels": labels})


def binary(logit: float, label: float) -> float:
    """-y log p - (1 - y) log(1 - p), p the logistic of the logit."""
    p = 1 / (1 + math.exp(-logit))
    return -label * math.log(p) - (1 - label) * math.log(1 - p)


def test_multi_label_loss_is_binary_cross_entropy() -> None:
    logits, labels = torch.randn(B, 4, dtype=torch.float64), torch.randint(2, (B, 4))
    expected = np.mean([binary(float(logits[i]), float(labels[i])) for i in np.ndindex(B, 4)])
    assert sequence_head("multi", 4).loss(logits, labels).item() == pytest.approx(expected, rel=EXACT)


def test_multi_label_loss_ignores_unknown_labels() -> None:
    """heads.py: -100 is ignored, whatever the head."""
    logits, labels = torch.randn(B, 4, dtype=torch.float64), torch.randint(2, (B, 4))
    labels[0, 1] = labels[2] = -100
    known = [i for i in np.ndindex(B, 4) if labels[i] != -100]
    expected = np.mean([binary(float(logits[i]), float(labels[i])) for i in known])
    assert sequence_head("multi", 4).loss(logits, labels).item() == pytest.approx(expected, rel=EXACT)


@pytest.mark.parametrize(
    "size,shape",
    [
        (1, (B,)),
        (2, (B, 2)),
        (1, (B, 1)),
    ],
)
def test_regression_loss_is_the_mean_squared_error(size: int, shape: tuple[int, ...]) -> None:
    """heads.py allows (B, labels) for classification heads; with one label that is a column."""
    logits, labels = torch.randn(B, size, dtype=torch.float64), torch.randn(shape)
    pairs = zip(logits.flatten().tolist(), labels.flatten().tolist(), strict=True)
    expected = np.mean([(x - y) ** 2 for x, y in pairs])
    assert sequence_head("regression", size).loss(logits, labels).item() == pytest.approx(expected, rel=EXACT)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("groups", [[0, 0, 1, 1], [0, 1, 0, 2], [0, 0, 0, 1], [5, 5, 5, 5]], ids=str)
def test_contrastive_loss_is_info_nce(groups: list[int], normalize: bool) -> None:
    """-log exp(s_ij / t) / sum_{k != i} exp(s_ik / t) over the positives j of each row i that has one.

    s is the cosine (arXiv:1807.03748, equation 4; the mean over positives outside the log is arXiv:2004.11362, eq. 2).
    """
    module = head("encoder", {"type": "pooled-embedding", "normalize": normalize, "temperature": 0.2})
    vectors = torch.randn(4, D, dtype=torch.float64)
    unit = wide(vectors) / np.linalg.norm(wide(vectors), axis=-1, keepdims=True)
    weight, losses = np.exp(unit @ unit.T / 0.2), []
    for i in range(4):
        others = [k for k in range(4) if k != i]
        positives = [j for j in others if groups[j] == groups[i]]
        if positives:
            losses.append(np.mean([-math.log(weight[i, j] / sum(weight[i, k] for k in others)) for j in positives]))
    assert module.loss(vectors, torch.tensor(groups)).item() == pytest.approx(np.mean(losses), rel=EXACT)


@pytest.mark.parametrize("groups", [[0], [0, 1, 2]])
def test_contrastive_loss_without_a_positive_is_zero(groups: list[int]) -> None:
    vectors = torch.randn(len(groups), D, requires_grad=True)
    loss = head("encoder", {"type": "pooled-embedding"}).loss(vectors, torch.tensor(groups))
    loss.backward()
    assert loss.item() == 0 and vectors.grad.abs().max() == 0


def test_a_row_is_not_its_own_positive() -> None:
    """Two far groups: the loss falls when pairs close up, which a self-match would hide."""
    module = head("encoder", {"type": "pooled-embedding"})
    far = torch.eye(4, dtype=torch.float64)
    near = far[[0, 0, 2, 2]] + 0.01 * far
    losses = [module.loss(x, torch.tensor([0, 0, 1, 1])).item() for x in (far, near)]
    assert losses[0] == pytest.approx(math.log(3), rel=1e-9) and losses[1] < 1e-6
