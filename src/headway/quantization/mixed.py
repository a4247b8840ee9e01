"""Mixed precision: as few layers in 8 bits as keep what is lost within a bound.

Layers are ordered by the error that 4 bits make in their output, tr(dW H dW^T) / tr(W H W^T) with H of calibration
(calibration.py), for each byte that 8 bits would add. The smallest beginning of that order that keeps the bound is
found by halving, each try measured on text. Left out: other widths than 4 and 8, and the order in which errors add up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

from headway.errors import BugError
from headway.nn import Transformer
from headway.nn.packed import Packed, PackedLinear, weights_of
from headway.quantization.calibration import Moments


class Mixed(NamedTuple):
    """A model whose layers `wide`, those with the largest errors, are in 8 bits, and what it loses."""

    model: Transformer
    wide: tuple[str, ...]
    cost: float


def mixed(
    before: Transformer,
    small: Transformer,
    large: Transformer,
    moments: Mapping[str, Moments],
    cost: Callable[[Transformer], float],
    bound: float,
) -> Mixed:
    """The smallest mixture of two models in codes that costs at most `bound`; all of `large` where none does.

    Args:
        before: the model in floats. small, large: the same in 4 and in 8 bits. moments: of the layers to choose from.
        cost: what a model loses, measured.
    """
    errors = {name: error(before, small, name, moments[name]) for name in moments}
    order = sorted(errors, key=lambda name: (-errors[name], name))
    low, high = 0, len(order)
    tried: dict[int, Mixed] = {}

    def at(count: int) -> Mixed:
        if count not in tried:
            model = _mixture(small, large, order[:count])
            tried[count] = Mixed(model, tuple(order[:count]), cost(model))
        return tried[count]

    while low < high:
        middle = low + (high - low) // 2 if tried else 0  # perhaps nothing has to be done
        if at(middle).cost <= bound:
            high = middle
        else:
            low = middle + 1
    return at(high)


def error(before: Transformer, small: Transformer, name: str, moments: Moments) -> float:
    """The share of a layer's output that 4 bits get wrong, for each weight."""
    exact, leaf = before.get_submodule(name).weight, small.get_submodule(name)
    if not isinstance(exact, Tensor) or not isinstance(leaf, PackedLinear):
        raise BugError(name, type(leaf).__name__, "a layer in codes")
    exact = exact.detach().float()
    both = [((some @ moments.products) * some).sum() for some in (leaf.packed.unpack() - exact, exact)]
    return float(both[0] / both[1].clamp_min(1e-30)) / exact.numel()


def _mixture(small: Transformer, large: Transformer, wide: list[str]) -> Transformer:
    weights: dict[str, Tensor | Packed] = weights_of(small)
    better = weights_of(large)
    weights |= {f"{name}.weight": better[f"{name}.weight"] for name in wide}
    return Transformer.of(small.config, weights)
