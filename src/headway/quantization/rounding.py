"""A matrix to codes of a few bits: which scale each group of columns gets, and which code each weight.

    W = scale * code + low        low = -zero * scale (symmetric) or a minimum of its own (asymmetric)

Plain rounding takes the scale from the largest weight of a group, as ggml's Q8_0, Q4_0 and Q4_1 do. A search tries
scales around it and keeps the one with the least error, in which columns may count differently.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from headway.errors import ConfigError, InputError
from headway.kernels.codes import Codes

TRIED = 19  # scales a search tries, from 0.9 codes below the plain range to 0.9 above
_AT_ONCE = 1 << 20  # weights


class Grid(NamedTuple):
    """The values that weights may take: `bits` (4 or 8), one scale for `group` columns, with a minimum or not."""

    bits: int
    group: int
    symmetric: bool = True

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def zero(self) -> int:
        """The code of weight 0 in symmetric grids."""
        return 1 << (self.bits - 1) if self.symmetric else 0

    @property
    def bits_per_weight(self) -> float:
        """With scales and minima, which are float16."""
        return self.bits + (16 if self.symmetric else 32) / self.group


class Steps(NamedTuple):
    """Scale and low of every group, (..., groups), as the file will hold them: scales and minima rounded to float16."""

    scale: Tensor
    low: Tensor

    @classmethod
    def of(cls, scale: Tensor, minimum: Tensor | None, grid: Grid) -> Steps:
        """From exact ones."""
        scale = scale.half().float()
        return cls(scale, -grid.zero * scale if minimum is None else minimum.half().float())

    def codes(self, weights: Tensor, grid: Grid) -> Tensor:
        """The nearest codes of weights (..., groups, n), as float."""
        inverse = torch.where(self.scale == 0, 0.0, 1 / torch.where(self.scale == 0, 1.0, self.scale))
        return ((weights - self.low[..., None]) * inverse[..., None]).round_().clamp_(0, grid.top)

    def weights(self, codes: Tensor) -> Tensor:
        """What codes (..., groups, n) stand for."""
        return codes * self.scale[..., None] + self.low[..., None]


def plain_steps(weights: Tensor, grid: Grid) -> Steps:
    """From the extremes of every group. (..., groups, n) -> (..., groups)."""
    if not grid.symmetric:
        low = weights.amin(-1)
        return Steps.of((weights.amax(-1) - low) / grid.top, low, grid)
    return Steps.of(_extreme(weights) / -grid.zero if grid.bits == 4 else weights.abs().amax(-1) / 127, None, grid)


def _extreme(weights: Tensor) -> Tensor:
    """The weight of largest size, with its sign."""
    return weights.gather(-1, weights.abs().argmax(-1, keepdim=True))[..., 0]


def searched_steps(weights: Tensor, grid: Grid, importance: Tensor | None = None) -> Steps:
    """The best of TRIED scales by the sum of importance * error^2, each refined by least squares.

    importance: (..., n), broadcast against the weights; None: all alike.
    """
    counts = torch.ones_like(weights) if importance is None else importance.expand_as(weights)
    best = plain_steps(weights, grid)
    least = _error(weights, best, grid, counts)
    low = weights.amin(-1)
    span = _extreme(weights) if grid.symmetric else weights.amax(-1) - low
    for tried in torch.linspace(-0.9, 0.9, TRIED).tolist():
        range_ = -(grid.zero + tried) if grid.symmetric else grid.top + tried
        rough = Steps.of(span / range_, None if grid.symmetric else low, grid)
        found = _fitted(weights, rough.codes(weights, grid), grid, counts)
        error = _error(weights, found, grid, counts)
        is_better = error < least
        least = torch.where(is_better, error, least)
        best = Steps(*(torch.where(is_better, new, old) for new, old in zip(found, best, strict=True)))
    return best


def _error(weights: Tensor, steps: Steps, grid: Grid, counts: Tensor) -> Tensor:
    rest = steps.weights(steps.codes(weights, grid)) - weights
    return (counts * rest * rest).sum(-1)


def _fitted(weights: Tensor, codes: Tensor, grid: Grid, counts: Tensor) -> Steps:
    """The scale, and the minimum where there is one, that fit these codes best."""
    if grid.symmetric:
        signed = codes - grid.zero
        above, below = (counts * signed * weights).sum(-1), (counts * signed * signed).sum(-1)
        return Steps.of(torch.where(below > 0, above / below.clamp_min(1e-30), 0.0), None, grid)
    total = counts.sum(-1).clamp_min(1e-30)
    code, weight = (counts * codes).sum(-1) / total, (counts * weights).sum(-1) / total
    away = codes - code[..., None]
    spread = (counts * away * away).sum(-1)
    slope = (counts * away * (weights - weight[..., None])).sum(-1) / spread.clamp_min(1e-30)
    slope = torch.where(spread > 0, slope, 0.0)
    return Steps.of(slope, weight - slope * code, grid)


def grouped(matrix: Tensor, group: int) -> Tensor:
    """(R, C) -> (R, groups, group); the last group is filled up with its own last weight, which widens no range."""
    missing = -matrix.shape[1] % group
    if missing:
        matrix = torch.cat((matrix, matrix[:, -1:].expand(-1, missing)), 1)
    return matrix.view(len(matrix), -1, group)


def steps_of(matrix: Tensor, grid: Grid, *, searched: bool, importance: Tensor | None = None) -> Steps:
    """Scale and low for every group of a matrix (R, C); importance (C,) of its columns."""
    missing, counts = -matrix.shape[1] % grid.group, importance
    if importance is None and missing:  # what fills the last group up does not count
        counts = torch.ones(matrix.shape[1])
    counts = None if counts is None else F.pad(counts, (0, missing)).view(1, -1, grid.group)
    rows = max(_AT_ONCE // matrix.shape[1], 1)
    parts = []
    for some in torch.split(matrix.float(), rows):
        groups = grouped(some, grid.group)
        parts.append(searched_steps(groups, grid, counts) if searched else plain_steps(groups, grid))
    return Steps(*(torch.cat(some) for some in zip(*parts, strict=True)))


def as_codes(codes: Tensor, steps: Steps, grid: Grid) -> Codes:
    """Codes (R, C) and steps in the form that kernels lay out."""
    minima = None if grid.symmetric else steps.low.half()
    return Codes(codes.to(torch.uint8), steps.scale.half(), minima, grid.zero)


def round_to(matrix: Tensor, grid: Grid, steps: Steps) -> Codes:
    """Every weight to its nearest value."""
    rows = max(_AT_ONCE // matrix.shape[1], 1)
    parts = [
        Steps(scale, low).codes(grouped(some, grid.group), grid).flatten(1)[:, : matrix.shape[1]].to(torch.uint8)
        for some, scale, low in zip(*(torch.split(t.float(), rows) for t in (matrix, *steps)), strict=True)
    ]
    return as_codes(torch.cat(parts), steps, grid)


def check_matrix(matrix: Tensor, where: str) -> None:
    """Refuse what has no finite image in codes (Q9). Raises InputError, ConfigError."""
    matrix = matrix.detach()
    bad = matrix.numel() - int(matrix.isfinite().sum())
    if bad:
        raise InputError(where, f"{bad} of {matrix.numel()} weights are NaN or infinite", "finite weights")
    top = float(matrix.abs().max()) if matrix.numel() else 0.0
    if top > 65504 * 7:  # the largest float16 is the largest scale
        raise InputError(where, f"a weight of {top:.4g}", "weights whose scale fits float16", "leave this one out")
    if not matrix.numel():
        raise ConfigError(where, f"shape {tuple(matrix.shape)}", "weights")
