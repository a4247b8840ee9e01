"""Scales of a layer's inputs that make its weights, or its inputs, easier to round.

    W x = (W diag(s)) (x / s)

AWQ (arXiv:2306.00978) makes the columns larger that meet large inputs, so that their relative error gets smaller.
SmoothQuant (arXiv:2211.10438) shares the range of outliers between inputs and weights, for products of both in 8 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headway.quantization.calibration import Moments
from headway.quantization.rounding import Grid, round_to, steps_of

EXPONENTS = tuple(place / 10 for place in range(11))  # the paper's grid is 20 steps; its optimum is flat


def balanced(matrix: Tensor, sizes: Tensor, exponent: float) -> Tensor:
    """s of (C,): sizes^a / (largest weight of the column)^(1 - a), around 1. sizes: of the inputs."""
    largest = matrix.abs().amax(0).float().clamp_min(1e-5)
    return _centred(sizes.clamp_min(1e-5) ** exponent / largest ** (1 - exponent))


def searched(matrix: Tensor, moments: Moments, grid: Grid) -> Tensor:
    """s of (C,) with the least error at the layer's output, after AWQ's rule s = sizes^a."""
    sizes = moments.squares.sqrt()
    best, least = torch.ones_like(sizes), float("inf")
    for exponent in EXPONENTS:
        tried = _centred(sizes.clamp_min(1e-5) ** exponent)
        scaled = matrix.float() * tried
        codes = round_to(scaled, grid, steps_of(scaled, grid, searched=False))
        off = codes.weights(grid.group) / tried - matrix
        error = float(((off @ moments.products) * off).sum())
        if error < least:
            best, least = tried, error
    return best


def _centred(scales: Tensor) -> Tensor:
    """Around 1: their product with the layer's own range changes nothing."""
    return scales / (scales.max() * scales.min()).sqrt()
