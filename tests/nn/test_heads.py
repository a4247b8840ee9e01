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
from headway.nn.feed_forward import ACTIVATIONS
from headway.nn.heads import make_head, pool

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
