"""How sure a figure is: bootstrap intervals over the units that were drawn (documents, questions, sentences).

`bootstrap` is the one home of resampling; `Measured` is a figure with its interval and all that it depends on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence, Sized
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from headway.errors import InputError

RESAMPLES = 1000
LEVEL = 0.95
_BLOCK = 1 << 22  # counts drawn at once
Array = NDArray[np.float64]


class Interval(NamedTuple):
    """A figure with the bounds of its interval and the number of units it rests on.

    With one unit there is nothing to resample: the bounds are None.
    """

    value: float
    low: float | None
    high: float | None
    n: int

    def map(self, change: Callable[[float], float]) -> Interval:
        """The interval of an increasing function of the figure."""
        low, high = (None if x is None else change(x) for x in (self.low, self.high))
        return Interval(change(self.value), low, high, self.n)


class Measured(NamedTuple):
    """A metric's figure.

    Attributes:
        name: what it is called where it is printed: `f1_macro`, `recall@10`.
        interval: the figure, its bounds, the number of units resampled.
        signature: all that it depends on but the data: `f1|average:macro|classes:6|units:examples|bootstrap:1000|...`.
            Figures under one signature can be compared.
    """

    name: str
    interval: Interval
    signature: str


def bootstrap(units: Sequence[int] | NDArray[np.int64], statistic: Callable[[Array], Array], seed: int = 0) -> Interval:
    """A figure of n units and its 95 % percentile interval (Efron, Annals of Statistics 7, 1979).

    Args:
        units: (K,) how many units there are of each kind, n in all. Units that count alike are one kind, for drawing
            kinds by their share is drawing units; where all differ these are n ones.
        statistic: from samples (R, K), how often each kind is in each, to their figures (R,). It is asked for the value
            with the units themselves, and for the bounds with a few resamples at a time, so that memory is bounded.
            NaN where a sample leaves the figure undefined: such resamples are left out.
        seed: the same seed gives the same bounds.

    Raises InputError if there are no units, or the figure of the units themselves is not a finite number.
    """
    sizes = np.asarray(units, dtype=np.float64)
    n = int(sizes.sum())
    if n < 1:
        raise InputError("data", "0 units", "one or more")
    value = float(statistic(sizes[None])[0])
    if not math.isfinite(value):
        raise InputError("data", f"{value} is what comes out of {n} units", "units for which the figure is defined")
    if n < 2:
        return Interval(value, None, None, n)
    rng = np.random.Generator(np.random.Philox(key=seed))
    rows = max(_BLOCK // len(sizes), 1)
    blocks: list[Array] = []
    for done in range(0, RESAMPLES, rows):
        counts = rng.multinomial(n, sizes / n, size=min(rows, RESAMPLES - done))
        # float64 holds counts exactly, and products of matrices of integers do not go through BLAS.
        blocks.append(statistic(counts.astype(np.float64)))
    figures = np.concatenate(blocks)
    figures = figures[np.isfinite(figures)]
    if not len(figures):
        return Interval(value, None, None, n)
    low, high = np.quantile(figures, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high), n)


def ratio(tops: Array, bottoms: Array, undefined: float = math.nan) -> Array:
    """tops / bottoms, element by element, and `undefined` where the bottom is not above zero."""
    out: Array = np.full(np.shape(bottoms), undefined)
    np.divide(tops, bottoms, out=out, where=bottoms > 0)
    return out


def ratio_interval(numerators: Sequence[float], denominators: Sequence[float], seed: int = 0) -> Interval:
    """sum(numerators) / sum(denominators) and its interval.

    Units are resampled whole, so long and short documents keep their weight and the dependence inside a document does
    not narrow the interval. A mean is the ratio with denominators of one. The same seed gives the same bounds.

    Args:
        numerators, denominators: one number per unit; the denominators sum to more than zero.

    Raises InputError if they do not.
    """
    pairs = np.array([numerators, denominators], dtype=np.float64).T

    def statistic(counts: Array) -> Array:
        sums = counts @ pairs
        return ratio(sums[:, 0], sums[:, 1])

    return bootstrap(np.ones(len(pairs), dtype=np.int64), statistic, seed)


def signed(what: str, seed: int) -> str:
    """The signature of a metric and its options (`f1|average:macro`), with what its interval depends on."""
    return f"{what}|bootstrap:{RESAMPLES}|seed:{seed}|level:{LEVEL}"


def of_sums(name: str, what: str, units: Array, figure: Callable[[Array], Array], seed: int) -> Measured:
    """A metric that depends on sums over units alone (their sufficient statistics), as most do.

    Args:
        name: as in Measured. what: the metric and its options, the head of the signature.
        units: (n, F) what each unit adds to each sum.
        figure: from sums (R, F) to figures (R,).
    """
    kinds, sizes = np.unique(units, axis=0, return_counts=True)
    return Measured(name, bootstrap(sizes, lambda counts: figure(counts @ kinds), seed), signed(what, seed))


def mean_of(name: str, what: str, figures: Sequence[float] | Array, seed: int) -> Measured:
    """The mean of one figure per unit, (n,)."""
    units = np.stack([np.asarray(figures, dtype=np.float64), np.ones(len(figures))], axis=1)
    return of_sums(name, what, units, lambda sums: sums[:, 0] / sums[:, 1], seed)


def check_paired(predicted: Sized, true: Sized, units: str) -> None:
    """As many predicted as true, and one at least. Raises InputError."""
    if len(predicted) != len(true):
        raise InputError("predictions", f"{len(predicted)} {units}", f"{len(true)}, as many as there are references")
    if not len(predicted):
        raise InputError("predictions", f"0 {units}", "one or more")
