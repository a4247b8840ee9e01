"""Metrics of labels, numbers and ranks, and METRICS, the table of all by name.

    f1([0, 2, 1], [0, 1, 1], average="macro").interval          # value, low, high, n
    [found] = measure("mcc", predicted, true)

Every figure is a `Measured`: its bounds come from resampling examples (or queries), and its signature says what it
depends on. Arrays may be lists, numpy arrays or tensors on the CPU. Shapes: N examples, C classes, L labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from headway.errors import ConfigError, InputError, nearest
from headway.evaluation import text_metrics as text
from headway.evaluation.interval import Array, Measured, bootstrap, check_paired, mean_of, of_sums, ratio, signed

Average = Literal["micro", "macro"]
Ranks = Sequence[int | Sequence[int]]
"""Per query the ranks, from 1, of all documents that are relevant; 0: not found. One document: its rank alone."""
_CONSTANT = 1e-24
"""A sample whose spread is below 1e-12 of its size differs by rounding alone: it has no correlation."""


def accuracy(predicted: ArrayLike, true: ArrayLike, *, seed: int = 0) -> Measured:
    """The share of examples whose class is right; for one class per example this is micro F1 too.

    Args:
        predicted, true: (N,) integers from 0.

    Raises InputError for none, another number of each, or other values.
    """
    ours, own = _labels(predicted, true)
    return mean_of("accuracy", "accuracy|units:examples", (ours == own).astype(np.float64), seed)


def top_k_accuracy(logits: ArrayLike, true: ArrayLike, k: int = 5, *, seed: int = 0) -> Measured:
    """The share of examples whose true class is among the k highest logits.

    Ties count against the model: with equal logits everywhere nothing is right.

    Args:
        logits: (N, C). true: (N,) integers below C. k: below C.

    Raises InputError for none, NaN or other shapes and values, ConfigError for another k.
    """
    scores = _numbers(logits, "logits", 2)
    own = _integers(true, "true labels", 1)
    check_paired(scores, own, "examples")
    classes = scores.shape[1]
    if not 1 <= k < classes:
        raise ConfigError("k", str(k), f"1 to {classes - 1}, fewer than the {classes} classes")
    if own.max() >= classes:
        raise InputError("true labels", str(own.max()), f"0 to {classes - 1}: there are {classes} logits")
    rank = (scores >= np.take_along_axis(scores, own[:, None], 1)).sum(1)
    what = f"top_k_accuracy|k:{k}|ties:against|classes:{classes}|units:examples"
    return mean_of(f"top_{k}_accuracy", what, (rank <= k).astype(np.float64), seed)


def f1(predicted: ArrayLike, true: ArrayLike, average: Average = "macro", *, seed: int = 0) -> Measured:
    """F1 of classes: macro, the mean of the classes' F1, or micro, that of all decisions together.

    As in scikit-learn the classes of a sample, of the data or a resample, are those predicted or true in it. Where most
    classes have few examples (three or so) resamples lose whole classes, and the interval of the macro mean lies low.

    Args:
        predicted, true: (N,) integers from 0. average: macro or micro.

    Raises as `accuracy`; ConfigError for another average.
    """
    _check_average(average)
    cells = _Cells.of(predicted, true)
    figure = _micro if average == "micro" else _macro
    what = f"f1|average:{average}|classes:{cells.classes}|units:examples"
    interval = bootstrap(cells.sizes, lambda counts: figure(*cells.sums(counts)), seed)
    return Measured(f"f1_{average}", interval, signed(what, seed))


def f1_per_class(predicted: ArrayLike, true: ArrayLike, *, seed: int = 0) -> list[Measured]:
    """F1 of each class that is predicted or true somewhere, in their order; its name is `f1[CLASS]`.

    Arguments and errors as in `accuracy`.
    """
    cells = _Cells.of(predicted, true)
    hits, ours, own = (sums[0] for sums in cells.sums(cells.sizes[None].astype(np.float64)))
    out = []
    for i, label in enumerate(cells.labels.tolist()):
        # Four kinds of examples: found, found falsely, missed, and those that have nothing to do with the class.
        kinds = [int(hits[i]), int(ours[i] - hits[i]), int(own[i] - hits[i])]
        kinds.append(int(cells.sizes.sum()) - sum(kinds))
        what = f"f1|class:{label}|units:examples"
        found = bootstrap(kinds, lambda c: ratio(2 * c[:, 0], 2 * c[:, 0] + c[:, 1] + c[:, 2]), seed)
        out.append(Measured(f"f1[{label}]", found, signed(what, seed)))
    return out


def mcc(predicted: ArrayLike, true: ArrayLike, *, seed: int = 0) -> Measured:
    """Matthews correlation coefficient, -1 to 1, of any number of classes (Gorodkin 2004).

    0 where only one class is predicted, or true, as in scikit-learn. Arguments and errors as in `accuracy`.
    """
    cells = _Cells.of(predicted, true)

    def figure(counts: Array) -> Array:
        hits, ours, own = cells.sums(counts)
        n = counts.sum(1)
        spread = np.sqrt(n**2 - (ours**2).sum(1)) * np.sqrt(n**2 - (own**2).sum(1))
        return ratio(hits.sum(1) * n - (ours * own).sum(1), spread, 0.0)

    what = f"mcc|classes:{cells.classes}|units:examples"
    return Measured("mcc", bootstrap(cells.sizes, figure, seed), signed(what, seed))


def multilabel_f1(predicted: ArrayLike, true: ArrayLike, average: Average = "macro", *, seed: int = 0) -> Measured:
    """F1 of labels of which an example may have any number: macro, the mean over labels, or micro.

    A label that is nowhere in the data, predicted or true, has F1 0, as in scikit-learn; one that only a resample lacks
    is left out of that resample's mean.

    Args:
        predicted, true: (N, L) of 0 and 1. average: macro or micro.

    Raises InputError for no examples, other values or shapes, ConfigError for another average.
    """
    _check_average(average)
    ours, own = _binary(predicted, true)
    labels = ours.shape[1]
    absent = int((~(ours + own).any(0)).sum())

    def figure(sums: Array) -> Array:
        parts = sums[:, :labels], sums[:, labels : 2 * labels], sums[:, 2 * labels :]
        return _micro(*parts) if average == "micro" else _macro(*parts, absent=absent)

    what = f"multilabel_f1|average:{average}|labels:{labels}|units:examples"
    return of_sums(f"multilabel_f1_{average}", what, np.concatenate([ours * own, ours, own], axis=1), figure, seed)


def subset_accuracy(predicted: ArrayLike, true: ArrayLike, *, seed: int = 0) -> Measured:
    """The share of examples all of whose labels are right. Arguments and errors as in `multilabel_f1`."""
    ours, own = _binary(predicted, true)
    what = f"subset_accuracy|labels:{ours.shape[1]}|units:examples"
    return mean_of("subset_accuracy", what, (ours == own).all(1).astype(np.float64), seed)


def mean_squared_error(predicted: ArrayLike, true: ArrayLike, *, seed: int = 0) -> Measured:
    """The mean of (predicted - true) squared, in the square of their unit.

    Args:
        predicted, true: (N,) finite numbers.

    Raises InputError for none, another number of each, or other values.
    """
    ours, own = _number_pairs(predicted, true)
    return mean_of("mean_squared_error", "mean_squared_error|units:examples", (ours - own) ** 2, seed)


def pearson(predicted: ArrayLike, true: ArrayLike, *, seed: int = 0) -> Measured:
    """Pearson's correlation, -1 to 1.

    Resamples in which one side is constant have none and are left out.

    Args:
        predicted, true: (N,) finite numbers.

    Raises InputError where one side is constant in the data; else as `mean_squared_error`.
    """
    ours, own = _number_pairs(predicted, true)
    _check_varied(ours, own)
    # Centred first, so that a large common part costs no digits.
    x, y = (ours - ours.mean())[None], (own - own.mean())[None]
    interval = bootstrap(np.ones(len(ours), np.int64), lambda counts: _correlation(counts, x, y), seed)
    return Measured("pearson", interval, signed("pearson|units:examples", seed))


def spearman(predicted: ArrayLike, true: ArrayLike, *, seed: int = 0) -> Measured:
    """Spearman's rank correlation, -1 to 1: Pearson's of ranks; what ties has the mean of its ranks.

    Each resample is ranked anew. Arguments, resamples left out and errors as in `pearson`.
    """
    ours, own = _number_pairs(predicted, true)
    _check_varied(ours, own)
    x, y = (np.unique(side, return_inverse=True)[1] for side in (ours, own))
    interval = bootstrap(
        np.ones(len(ours), np.int64), lambda counts: _correlation(counts, _ranked(counts, x), _ranked(counts, y)), seed
    )
    return Measured("spearman", interval, signed("spearman|ties:mean|units:examples", seed))


def recall_at_k(ranks: Ranks, k: int = 10, *, seed: int = 0) -> Measured:
    """The share of a query's relevant documents among its first k, mean over queries.

    Args:
        ranks: per query the ranks, from 1, of all its relevant documents, 0 for one that was not found; where each
            has one, its rank alone. k: 1 or more.

    Raises InputError for no queries, one without relevant document, negative ranks, ConfigError for another k.
    """
    if k < 1:
        raise ConfigError("k", str(k), "1 or more")
    shares = [sum(1 <= rank <= k for rank in row) / len(row) for row in _ranks(ranks)]
    return mean_of(f"recall@{k}", f"recall|k:{k}|units:queries", shares, seed)


def mrr(ranks: Ranks, *, seed: int = 0) -> Measured:
    """Mean reciprocal rank: 1 / the rank of the first relevant document, 0 if none was found, mean over queries.

    Arguments and errors as in `recall_at_k`.
    """
    found = [[rank for rank in row if rank] for row in _ranks(ranks)]
    return mean_of("mrr", "mrr|units:queries", [1 / min(row) if row else 0.0 for row in found], seed)


class _Cells(NamedTuple):
    """The cells of the confusion matrix that hold something, K of them: resampling K kinds costs less than N examples.

    Attributes:
        labels: (C,) the classes that are predicted or true somewhere. predicted, true: (K,) indices into these.
        sizes: (K,) examples.
    """

    labels: NDArray[np.int64]
    predicted: NDArray[np.int64]
    true: NDArray[np.int64]
    sizes: NDArray[np.int64]

    @classmethod
    def of(cls, predicted: ArrayLike, true: ArrayLike) -> _Cells:
        labels, which = np.unique(np.stack(_labels(predicted, true)), return_inverse=True)
        pairs, sizes = np.unique(which, axis=1, return_counts=True)
        return cls(labels, pairs[0], pairs[1], sizes)

    @property
    def classes(self) -> int:
        return len(self.labels)

    def sums(self, counts: Array) -> tuple[Array, Array, Array]:
        """Per class, each (R, C), examples that are hit, predicted, true in samples (R, K)."""
        hits = counts * (self.predicted == self.true)
        pairs = (hits, self.true), (counts, self.predicted), (counts, self.true)
        hit, ours, own = (_grouped(what, index, self.classes) for what, index in pairs)
        return hit, ours, own


def _grouped(counts: Array, index: NDArray[np.int64], groups: int) -> Array:
    """Sums of counts (R, K) by group (K,): (R, groups), the product with a one-hot matrix that is never made."""
    places = np.arange(len(counts))[:, None] * groups + index
    sums = np.bincount(places.ravel(), weights=counts.ravel(), minlength=len(counts) * groups)
    return sums.astype(np.float64, copy=False).reshape(-1, groups)


def _macro(hits: Array, ours: Array, own: Array, absent: int = 0) -> Array:
    """Mean F1 (R,) of the classes a sample has, from sums (R, C), and of `absent` more, whose F1 is 0."""
    there = (ours + own > 0).sum(1) + absent
    return ratio(ratio(2 * hits, ours + own, 0.0).sum(1), there, 0.0)


def _micro(hits: Array, ours: Array, own: Array) -> Array:
    return ratio(2 * hits.sum(1), (ours + own).sum(1), 0.0)


def _ranked(counts: Array, index: NDArray[np.int64]) -> Array:
    """Ranks (R, N) in samples of values given by their place among the distinct values (N,)."""
    sizes = _grouped(counts, index, int(index.max()) + 1)
    ranks: Array = np.cumsum(sizes, axis=1) - (sizes - 1) / 2
    return np.take(ranks, index, axis=1)


def _correlation(counts: Array, x: Array, y: Array) -> Array:
    """Pearson's correlation (R,) of x and y, (R or 1, N), in samples (R, N); NaN where one of them is constant."""
    n = counts.sum(1)
    covariance, spread = counts, np.ones(len(counts))
    for side in (x, y):
        centred = side - ((counts * side).sum(1) / n)[:, None]
        squares = (counts * centred**2).sum(1)
        spread = spread * np.sqrt(np.where(squares > _CONSTANT * (counts * side**2).sum(1), squares, 0))
        covariance = covariance * centred
    return np.clip(ratio(covariance.sum(1), spread), -1, 1)


def _check_average(average: str) -> None:
    if average not in ("micro", "macro"):
        raise ConfigError("average", repr(average), "micro or macro", "f1_per_class gives each class")


def _array(values: ArrayLike, where: str, dimensions: int) -> NDArray[np.generic]:
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: a tensor with a gradient
        raise InputError(where, str(error), "an array of numbers") from None
    if array.size and (array.ndim != dimensions or array.dtype.kind not in "biuf"):
        found = f"shape {array.shape} of {array.dtype}"
        raise InputError(where, found, "numbers, " + ("one per example" if dimensions == 1 else "a row per example"))
    return array


def _numbers(values: ArrayLike, where: str, dimensions: int, finite: bool = False) -> Array:
    numbers = _array(values, where, dimensions).astype(np.float64)
    wrong = ~np.isfinite(numbers) if finite else np.isnan(numbers)
    if wrong.any():
        raise InputError(
            where, f"{numbers[wrong][0]} in {wrong.sum()} places", "finite numbers" if finite else "numbers"
        )
    return numbers


def _integers(values: ArrayLike, where: str, dimensions: int, most: int | None = None) -> NDArray[np.int64]:
    array = _array(values, where, dimensions)
    if not array.size:
        return array.astype(np.int64)
    with np.errstate(invalid="ignore"):  # NaN is found below
        numbers = array.astype(np.int64)
    wrong = (numbers != array) | (numbers < 0) | (numbers > (numbers if most is None else most))
    if wrong.any():
        fix = "leave out examples without a label" if most is None else ""
        raise InputError(where, str(array[wrong][0]), "integers from 0" if most is None else f"0 to {most}", fix)
    return numbers


def _labels(predicted: ArrayLike, true: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    ours, own = _integers(predicted, "predicted labels", 1), _integers(true, "true labels", 1)
    check_paired(ours, own, "examples")
    return ours, own


def _binary(predicted: ArrayLike, true: ArrayLike) -> tuple[Array, Array]:
    ours, own = _integers(predicted, "predicted labels", 2, 1), _integers(true, "true labels", 2, 1)
    check_paired(ours, own, "examples")
    if ours.shape != own.shape:
        raise InputError("predicted labels", f"{ours.shape[1]} labels", f"{own.shape[1]}, as many as are true or false")
    return ours.astype(np.float64), own.astype(np.float64)


def _number_pairs(predicted: ArrayLike, true: ArrayLike) -> tuple[Array, Array]:
    ours, own = _numbers(predicted, "predicted numbers", 1, True), _numbers(true, "true numbers", 1, True)
    check_paired(ours, own, "examples")
    return ours, own


def _check_varied(predicted: Array, true: Array) -> None:
    for values, where in ((predicted, "predicted numbers"), (true, "true numbers")):
        if not np.ptp(values):
            raise InputError(where, f"all {values[0]:g}", "two different ones at least: a constant has no correlation")


def _ranks(ranks: Ranks) -> list[Sequence[int]]:
    check_paired(ranks, ranks, "queries")
    rows = [(row,) if isinstance(row, int | np.integer) else row for row in ranks]
    for number, row in enumerate(rows, 1):
        if not len(row) or min(row) < 0:
            found = f"query {number} has {'no relevant document' if not len(row) else f'rank {min(row)}'}"
            raise InputError("ranks", found, "of each relevant document its rank from 1, or 0 where it was not found")
    return rows


class Metric(NamedTuple):
    """A row of METRICS.

    Attributes:
        measure: the function. takes: what it is given: labels, logits, multilabel, numbers, ranks, tags or texts. Ranks
            are one argument; the others two, what was predicted and what is true.
    """

    measure: Callable[..., Measured | list[Measured]]
    takes: str


METRICS: dict[str, Metric] = {
    "accuracy": Metric(accuracy, "labels"),
    "f1_micro": Metric(partial(f1, average="micro"), "labels"),
    "f1_macro": Metric(partial(f1, average="macro"), "labels"),
    "f1_per_class": Metric(f1_per_class, "labels"),
    "mcc": Metric(mcc, "labels"),
    "top_k_accuracy": Metric(top_k_accuracy, "logits"),
    "multilabel_f1_micro": Metric(partial(multilabel_f1, average="micro"), "multilabel"),
    "multilabel_f1_macro": Metric(partial(multilabel_f1, average="macro"), "multilabel"),
    "subset_accuracy": Metric(subset_accuracy, "multilabel"),
    "mean_squared_error": Metric(mean_squared_error, "numbers"),
    "pearson": Metric(pearson, "numbers"),
    "spearman": Metric(spearman, "numbers"),
    "recall_at_k": Metric(recall_at_k, "ranks"),
    "mrr": Metric(mrr, "ranks"),
    "span_f1": Metric(text.span_f1, "tags"),
    "token_accuracy": Metric(text.token_accuracy, "tags"),
    "exact_match": Metric(text.exact_match, "texts"),
    "squad_exact_match": Metric(text.squad_exact_match, "texts"),
    "squad_f1": Metric(text.squad_f1, "texts"),
    "bleu": Metric(text.bleu, "texts"),
    "chrf": Metric(text.chrf, "texts"),
    "chrf++": Metric(partial(text.chrf, word_order=2), "texts"),
    "rouge1": Metric(partial(text.rouge, kind="rouge1"), "texts"),
    "rouge2": Metric(partial(text.rouge, kind="rouge2"), "texts"),
    "rougeL": Metric(partial(text.rouge, kind="rougeL"), "texts"),
    "rougeLsum": Metric(partial(text.rouge, kind="rougeLsum"), "texts"),
}
"""Every metric by name."""


def measure(name: str, *data: object, **options: object) -> list[Measured]:
    """The metric of that name on data as its row in METRICS says: one figure, or one per class.

    Raises ConfigError for an unknown name; else as the metric's function.
    """
    if name not in METRICS:
        raise ConfigError("metric", f"{name!r}{nearest(name, METRICS)}", ", ".join(METRICS))
    found = METRICS[name].measure(*data, **options)
    return found if isinstance(found, list) else [found]
