"""How sure a figure is: bootstrap intervals over the units that were drawn (documents, questions, sentences)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95
_BLOCK = 1 << 22  # counts drawn at once


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


def ratio_interval(numerators: Sequence[float], denominators: Sequence[float], seed: int = 0) -> Interval:
    """sum(numerators) / sum(denominators) and its 95 % percentile interval (Efron, Annals of Statistics 7, 1979).

    Units are resampled whole, so long and short documents keep their weight and the dependence inside a document does
    not narrow the interval. A mean is the ratio with denominators of one. The same seed gives the same bounds.

    Args:
        numerators, denominators: one number per unit; the denominators sum to more than zero.
    """
    pairs = np.array([numerators, denominators], dtype=np.float64)
    n = pairs.shape[1]
    top, bottom = pairs.sum(1)
    value = float(top / bottom)
    if n < 2:
        return Interval(value, None, None, n)
    rng = np.random.Generator(np.random.Philox(key=seed))
    ratios: list[float] = []
    rows = max(_BLOCK // n, 1)
    while len(ratios) < RESAMPLES:
        counts = rng.multinomial(n, np.full(n, 1 / n), size=min(rows, RESAMPLES - len(ratios)))
        sums = counts @ pairs.T
        ratios += (sums[:, 0] / np.maximum(sums[:, 1], np.finfo(np.float64).tiny)).tolist()
    low, high = np.quantile(ratios, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high), n)
