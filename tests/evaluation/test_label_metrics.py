"""Metrics of labels, numbers and ranks against scikit-learn and scipy, on the data and on every resample."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics as sk

from headway.errors import ConfigError, HeadwayError, InputError
from headway.evaluation import (
    METRICS,
    Interval,
    accuracy,
    f1,
    f1_per_class,
    mcc,
    mean_squared_error,
    measure,
    metrics,
    mrr,
    multilabel_f1,
    pearson,
    recall_at_k,
    spearman,
    subset_accuracy,
    top_k_accuracy,
)

ULPS = 1e-12


def labels(n: int, classes: int, right: float = 0.6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(predicted, true), classes uneven as they are in life; some may not occur."""
    rng = np.random.default_rng(seed)
    true = np.minimum(rng.geometric(0.4, n) - 1, classes - 1)
    return np.where(rng.random(n) < right, true, rng.integers(0, classes, n)), true


def flags(n: int, many: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    true = (rng.random((n, many)) < np.linspace(0.1, 0.7, many)).astype(int)
    return np.where(rng.random((n, many)) < 0.8, true, 1 - true), true


def numbers(n: int, seed: int = 0, steps: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Correlated numbers with many ties."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=n)
    return np.round((x + rng.normal(size=n)) / steps) * steps + 100, np.round(x / steps) * steps


class Spy:
    """Stands in for a bootstrap and keeps what it was given."""

    def __init__(self, monkeypatch):
        monkeypatch.setattr(metrics, "bootstrap", self)

    def __call__(self, units, statistic, seed=0):
        self.units, self.statistic = np.asarray(units), statistic
        return Interval(0.0, 0.0, 0.0, 1)

    def resamples(self, rows: int = 30) -> np.ndarray:
        n = self.units.sum()
        return np.random.default_rng(5).multinomial(n, self.units / n, rows).astype(float)


@pytest.mark.filterwarnings("ignore:A single label")
@pytest.mark.parametrize(("n", "classes"), [(1, 2), (2, 2), (40, 2), (200, 6), (60, 40), (3000, 17)])
def test_figures_of_labels_are_those_of_scikit_learn(n, classes):
    ours, own = labels(n, classes)
    expected = {
        "accuracy": sk.accuracy_score(own, ours),
        "f1_micro": sk.f1_score(own, ours, average="micro"),
        "f1_macro": sk.f1_score(own, ours, average="macro"),
        "mcc": sk.matthews_corrcoef(own, ours),
    }
    for name, value in expected.items():
        [found] = measure(name, ours, own)
        assert found.name == name and found.interval.n == n
        assert found.interval.value == pytest.approx(value, abs=ULPS)
    each = f1_per_class(ours, own)
    assert [row.interval.value for row in each] == pytest.approx(sk.f1_score(own, ours, average=None), abs=ULPS)
    assert [row.name for row in each] == [f"f1[{label}]" for label in sorted({*ours.tolist(), *own.tolist()})]


@pytest.mark.parametrize("classes", [2, 5, 30])
@pytest.mark.parametrize("name", ["f1_micro", "f1_macro", "mcc"])
def test_each_resample_of_labels_is_measured_as_scikit_learn_would(monkeypatch, name, classes):
    """Thirty examples and up to thirty classes: resamples lack some, and the macro mean is over those they have."""
    ours, own = labels(30, classes)
    spy = Spy(monkeypatch)
    measure(name, ours, own)
    cells = metrics._Cells.of(ours, own)
    known = {
        "f1_micro": lambda a, b: sk.f1_score(a, b, average="micro"),
        "f1_macro": lambda a, b: sk.f1_score(a, b, average="macro"),
        "mcc": sk.matthews_corrcoef,
    }[name]
    counts = spy.resamples()
    for row, figure in zip(counts.astype(int), spy.statistic(counts), strict=True):
        drawn_ours = np.repeat(cells.labels[cells.predicted], row)
        drawn_own = np.repeat(cells.labels[cells.true], row)
        assert figure == pytest.approx(known(drawn_own, drawn_ours), abs=ULPS)


def test_a_class_has_the_interval_of_its_own_decisions():
    """Against resampling examples one by one: 1,000 resamples know a bound to about 5 % of the half width."""
    ours, own = labels(300, 4)
    found = f1_per_class(ours, own)[1]
    rng = np.random.default_rng(9)
    drawn = rng.integers(0, 300, (1000, 300))
    slow = [sk.f1_score(own[i], ours[i], labels=[1], average="macro") for i in drawn]
    low, high = np.quantile(slow, [0.025, 0.975])
    half = (high - low) / 2
    assert found.interval.low == pytest.approx(low, abs=0.25 * half)
    assert found.interval.high == pytest.approx(high, abs=0.25 * half)


@pytest.mark.filterwarnings("ignore:A single label")
def test_one_class_alone_has_mcc_0_and_all_right_is_1():
    assert mcc([1, 1, 1], [0, 1, 2]).interval == (0.0, 0.0, 0.0, 3)
    assert mcc([1, 1], [1, 1]).interval.value == sk.matthews_corrcoef([1, 1], [1, 1]) == 0.0
    assert f1([3, 7], [3, 7]).interval == (1.0, 1.0, 1.0, 2)


def test_an_interval_covers_the_truth_as_often_as_it_says():
    """A model that is right with probability 0.8, on 100 examples, 400 times: 95 % and four standard errors."""
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(400):
        found = accuracy((rng.random(100) < 0.8).astype(int), np.ones(100, int)).interval
        covered += found.low <= 0.8 <= found.high
        assert found.low <= found.value <= found.high
    assert 0.90 <= covered / 400 <= 0.99


def test_top_k_is_that_of_scikit_learn_where_nothing_ties():
    rng = np.random.default_rng(0)
    logits, own = rng.normal(size=(200, 9)), rng.integers(0, 9, 200)
    for k in (1, 3, 8):
        found = top_k_accuracy(torch.tensor(logits), torch.tensor(own), k)
        assert found.name == f"top_{k}_accuracy"
        assert found.interval.value == sk.top_k_accuracy_score(own, logits, k=k, labels=range(9))
    first = accuracy(logits.argmax(1), own).interval
    assert top_k_accuracy(logits, own, 1).interval == first


def test_ties_count_against_the_model():
    """A model that says nothing is right nowhere; scikit-learn finds it right wherever the last classes are true."""
    logits, own = np.zeros((4, 3)), [0, 1, 2, 2]
    assert top_k_accuracy(logits, own, 2).interval.value == 0.0
    assert sk.top_k_accuracy_score(own, logits, k=2) == 0.75
    assert top_k_accuracy([[1.0, 1.0, 0.0]], [0], 2).interval.value == 1.0
    # -inf is how a class is forbidden; it is a number as others are.
    assert top_k_accuracy([[-math.inf, 1.0, 2.0]], [1], 2).interval.value == 1.0


@pytest.mark.parametrize("average", ["micro", "macro"])
def test_labels_of_any_number_are_those_of_scikit_learn(average):
    ours, own = flags(80, 7)
    ours[:, 3] = own[:, 3] = 0  # nowhere: 0 by scikit-learn's rule
    found = multilabel_f1(ours, own, average).interval
    known = sk.f1_score(own, ours, average=average, zero_division=0)
    assert found.value == pytest.approx(known, abs=ULPS) and found.low <= found.value <= found.high
    assert subset_accuracy(ours, own).interval.value == pytest.approx(sk.accuracy_score(own, ours), abs=ULPS)


def test_a_label_that_a_resample_lacks_does_not_pull_its_mean_down():
    """Forty labels, each right in the one example that has it: a third of them is missing from each resample."""
    ours = np.eye(40, dtype=int)
    assert multilabel_f1(ours, ours).interval == (1.0, 1.0, 1.0, 40)
    # scikit-learn counts them as 0: the whole interval would lie below the figure.
    drawn = np.random.default_rng(0).integers(0, 40, 40)
    assert sk.f1_score(ours[drawn], ours[drawn], average="macro", zero_division=0) < 0.8
    assert multilabel_f1(np.zeros((3, 2)), np.zeros((3, 2))).interval == (0.0, 0.0, 0.0, 3)


@pytest.mark.parametrize("n", [3, 10, 500])
def test_figures_of_numbers_are_those_of_scipy(n):
    ours, own = numbers(n)
    assert pearson(ours, own).interval.value == pytest.approx(stats.pearsonr(ours, own)[0], abs=ULPS)
    assert spearman(ours, own).interval.value == pytest.approx(stats.spearmanr(ours, own)[0], abs=ULPS)
    assert mean_squared_error(ours, own).interval.value == pytest.approx(sk.mean_squared_error(own, ours), rel=ULPS)


@pytest.mark.parametrize(("name", "known"), [("pearson", stats.pearsonr), ("spearman", stats.spearmanr)])
def test_each_resample_of_numbers_is_measured_as_scipy_would(monkeypatch, name, known):
    ours, own = numbers(25)
    spy = Spy(monkeypatch)
    measure(name, ours, own)
    counts = spy.resamples()
    for row, figure in zip(counts.astype(int), spy.statistic(counts), strict=True):
        assert figure == pytest.approx(known(np.repeat(ours, row), np.repeat(own, row))[0], abs=1e-10)


def test_a_large_common_part_costs_no_digits():
    x = np.random.default_rng(0).normal(size=50)
    y = x + np.random.default_rng(1).normal(size=50)
    assert pearson(x + 1e8, y).interval.value == pytest.approx(stats.pearsonr(x, y)[0], abs=1e-7)


def test_a_constant_resample_has_no_correlation(monkeypatch):
    """Of two examples half the resamples hold one alone; what rounding leaves of its spread must not become 1 or -1."""
    found = pearson([0.1, 0.7], [0.3, 0.2]).interval
    assert found == (-1.0, -1.0, -1.0, 2)
    x, counts = np.array([[0.1, 0.7]]), np.array([[3.0, 0.0], [3.0, 3.0]])
    assert math.isnan(metrics._correlation(counts, x, x)[0])
    assert metrics._correlation(counts, x, x)[1] == pytest.approx(1)
    # The guard off: the mean of three times 0.1 is not 0.1.
    monkeypatch.setattr(metrics, "_CONSTANT", 0.0)
    assert not math.isnan(metrics._correlation(counts, x, x)[0])


def test_ranks_of_documents():
    """Three queries by hand: found first; one of two among the first 3, the other fifth; not found."""
    ranks = [1, [5, 2], [0]]
    assert recall_at_k(ranks, 3).interval.value == pytest.approx((1 + 1 / 2 + 0) / 3)
    assert recall_at_k(ranks, 5).interval.value == pytest.approx((1 + 1 + 0) / 3)
    assert recall_at_k(ranks, 1).name == "recall@1"
    assert mrr(ranks).interval.value == pytest.approx((1 + 1 / 2 + 0) / 3)
    assert mrr(np.array([1, 4])).interval.value == 0.625
    assert mrr([[0, 4, 3]]).interval == (1 / 3, None, None, 1)


DATA = {
    "labels": labels(50, 4),
    "logits": (np.random.default_rng(0).normal(size=(50, 9)), labels(50, 4)[1]),
    "multilabel": flags(50, 4),
    "numbers": numbers(50),
    "ranks": ([1, 3, 12, 0, 2, [4, 20], 1, 1, 30, 5],),
    "tags": ([["B-A", "I-A", "O"], ["O", "B-B"], ["O"]], [["B-A", "I-A", "O"], ["B-B", "I-B"], ["O"]]),
    "texts": (
        ["the cat sat on the mat", "a dog barks in the night", "it rains"],
        [["the cat sat on a mat", "a cat sat on the mat"], "the dog barked in the night", "it rains"],
    ),
}


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_of_the_table_is_sound(name):
    data = DATA[METRICS[name].takes]
    found = measure(name, *data)
    assert found == measure(name, *data), "the same seed, the same bounds"
    again = measure(name, *data, seed=1)
    for row, other in zip(found, again, strict=True):
        value, low, high, n = row.interval
        assert low <= value <= high and all(map(math.isfinite, (value, low, high))) and n == len(data[0])
        assert row.signature.endswith("|bootstrap:1000|seed:0|level:0.95")
        assert other.signature == row.signature.replace("seed:0", "seed:1")
        assert "|units:" in row.signature and other.interval.value == value
    if METRICS[name].takes in ("labels", "numbers", "multilabel"):
        assert [row.interval for row in found] != [row.interval for row in again]


def test_signatures_say_what_figures_depend_on():
    ours, own = labels(90, 6)
    end = "|units:examples|bootstrap:1000|seed:0|level:0.95"
    assert f1(ours, own).signature == "f1|average:macro|classes:6" + end
    assert f1(ours, own, "micro").signature == "f1|average:micro|classes:6" + end
    assert f1_per_class(ours, own)[2].signature == "f1|class:2" + end
    assert top_k_accuracy(np.eye(90), own, 3).signature == "top_k_accuracy|k:3|ties:against|classes:90" + end
    everything = [row.signature for name in METRICS for row in measure(name, *DATA[METRICS[name].takes])]
    assert len(set(everything)) == len(everything)


EMPTY = {"logits": (np.zeros((0, 3)), []), "multilabel": (np.zeros((0, 3)), np.zeros((0, 3))), "ranks": ([],)}


@pytest.mark.parametrize("name", METRICS)
def test_nothing_to_measure_is_refused(name):
    with pytest.raises(InputError, match=r"predictions: 0 \w+; expected one or more"):
        measure(name, *EMPTY.get(METRICS[name].takes, ([], [])))


REFUSED = [
    (lambda: accuracy([1, 2], [1]), InputError, "predictions: 2 examples; expected 1, as many"),
    (
        lambda: accuracy([1, -100], [1, -100]),
        InputError,
        "predicted labels: -100; expected integers from 0. Fix: leave",
    ),
    (lambda: accuracy([1.0, 0.5], [1, 1]), InputError, "predicted labels: 0.5"),
    (lambda: accuracy([1.0, math.nan], [1, 1]), InputError, "predicted labels: nan"),
    (lambda: accuracy(["a"], ["a"]), InputError, "numbers, one per example"),
    (lambda: accuracy([[1, 2]], [[1, 2]]), InputError, r"shape \(1, 2\) of int64; expected numbers, one per example"),
    (lambda: f1([[1], [1, 2]], [1, 2]), InputError, "predicted labels: .*expected an array of numbers"),
    (lambda: f1([1], [1], "weighted"), ConfigError, "average: 'weighted'; expected micro or macro"),
    (lambda: multilabel_f1([[1]], [[1]], "samples"), ConfigError, "average: 'samples'"),
    (lambda: multilabel_f1([[0, 2]], [[0, 1]]), InputError, "predicted labels: 2; expected 0 to 1"),
    (lambda: multilabel_f1([[0, 1, 1]], [[0, 1]]), InputError, "predicted labels: 3 labels; expected 2"),
    (lambda: top_k_accuracy([[1.0, math.nan]], [0], 1), InputError, "logits: nan in 1 places"),
    (lambda: top_k_accuracy([[1.0, 2.0]], [2], 1), InputError, "true labels: 2; expected 0 to 1"),
    (lambda: top_k_accuracy([[1.0, 2.0]], [1], 2), ConfigError, "k: 2; expected 1 to 1"),
    (lambda: top_k_accuracy(torch.ones(1, 2).requires_grad_(), [1], 1), InputError, "logits: .*detach"),
    (lambda: pearson([1.0, 1.0], [1.0, 2.0]), InputError, "predicted numbers: all 1; .*a constant has no correlation"),
    (lambda: spearman([1.0, 2.0], [3.0, 3.0]), InputError, "true numbers: all 3"),
    (lambda: pearson([1.0, math.inf], [1.0, 2.0]), InputError, "predicted numbers: inf in 1 places; expected finite"),
    (lambda: mean_squared_error([1e200], [-1e200]), InputError, "data: inf is what comes out of 1 units"),
    (lambda: recall_at_k([1], 0), ConfigError, "k: 0; expected 1 or more"),
    (lambda: mrr([1, []]), InputError, "ranks: query 2 has no relevant document"),
    (lambda: mrr([-1]), InputError, "ranks: query 1 has rank -1"),
    (lambda: measure("f1_makro", [1], [1]), ConfigError, "did you mean 'f1_macro'"),
]


@pytest.mark.parametrize(("call", "kind", "text"), REFUSED)
@pytest.mark.filterwarnings("ignore:overflow")
def test_what_cannot_be_measured_is_refused_in_one_line(call, kind, text):
    with pytest.raises(HeadwayError, match=text) as caught:
        call()
    assert type(caught.value) is kind and "\n" not in str(caught.value)
