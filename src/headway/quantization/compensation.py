"""GPTQ (arXiv:2210.17323): round column by column, and let the columns that are left make up for the error.

After column j is rounded with error e, the best the others can do is W += -e * U[j, j:] / U[j, j], where U is the upper
Cholesky factor of the inverse of H. Columns with large inputs go first, while many are left to make up for them; scales
are those of the matrix as it was, so that the order does not show in the file. Afterwards, with the codes fixed, the
scales that minimise the same error follow from one small system per row.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from headway.kernels.codes import Codes
from headway.quantization.rounding import Grid, Steps, as_codes, grouped, steps_of

DAMPING = 0.01  # of the mean diagonal, added to it: as in the paper
_TOGETHER = 64  # columns whose errors are carried over to the rest in one product


def compensated(matrix: Tensor, moments: Tensor, grid: Grid) -> Codes:
    """The codes of a matrix (R, C) by GPTQ; moments H (C, C)."""
    matrix = matrix.float()
    steps = steps_of(matrix, grid, searched=True, importance=moments.diagonal())
    codes = _codes(matrix, moments, grid, steps)
    return as_codes(codes, _refitted(matrix, codes, moments, grid, steps), grid)


def _codes(matrix: Tensor, moments: Tensor, grid: Grid, steps: Steps) -> Tensor:
    order = moments.diagonal().argsort(descending=True)
    factor = _factor(moments[order][:, order])
    left, group = matrix[:, order].clone(), order // grid.group
    scale, low = steps.scale[:, group], steps.low[:, group]
    inverse = torch.where(scale == 0, 0.0, 1 / torch.where(scale == 0, 1.0, scale))
    codes = torch.empty_like(left)
    for begin in range(0, left.shape[1], _TOGETHER):
        end = min(begin + _TOGETHER, left.shape[1])
        errors = left.new_empty(len(left), end - begin)
        for j in range(begin, end):
            column = left[:, j]
            codes[:, j] = ((column - low[:, j]) * inverse[:, j]).round_().clamp_(0, grid.top)
            error = (column - codes[:, j] * scale[:, j] - low[:, j]) / factor[j, j]
            left[:, j:end].addr_(error, factor[j, j:end], alpha=-1)
            errors[:, j - begin] = error
        left[:, end:].addmm_(errors, factor[begin:end, end:], alpha=-1)
    return codes[:, order.argsort()]


def _factor(moments: Tensor) -> Tensor:
    """U with U^T U the inverse of the damped H, in float64."""
    H = moments.double()
    mean = H.diagonal().mean().clamp_min(1e-30)
    H = H + torch.eye(len(H), dtype=H.dtype) * DAMPING * mean
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(H))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()


def _refitted(matrix: Tensor, codes: Tensor, moments: Tensor, grid: Grid, steps: Steps) -> Steps:
    """Scales that minimise tr(dW H dW^T) with these codes; the old ones for a row where that gains nothing."""
    groups, C = steps.scale.shape[1], matrix.shape[1]
    low = steps.low if grid.zero == 0 else torch.zeros_like(steps.low)
    signed = grouped(codes, grid.group) - grid.zero
    signed.flatten(1)[:, C:] = 0
    rest = matrix - low.repeat_interleave(grid.group, 1)[:, :C]
    out = steps.scale.clone()
    H = F.pad(moments, (0, -C % grid.group, 0, -C % grid.group)).double()
    damping = torch.eye(len(H), dtype=H.dtype) * DAMPING * moments.diagonal().mean().double().clamp_min(1e-30)
    H = H + damping
    wanted = F.pad(rest, (0, -C % grid.group)).double() @ H  # (R, C)
    for begin in range(0, len(matrix), 32):
        some = signed[begin : begin + 32].double()  # (r, G, n)
        spread = torch.einsum("rgn,gnkm->rgkm", some, H.view(groups, grid.group, groups, grid.group))
        system = torch.einsum("rgkm,rkm->rgk", spread, some)
        aim = (some * wanted[begin : begin + 32].view(len(some), groups, -1)).sum(-1)
        level = system.diagonal(dim1=1, dim2=2).mean(-1).clamp_min(1e-12)[:, None, None]
        system = system + torch.eye(groups, dtype=H.dtype) * level * 1e-6
        out[begin : begin + 32] = torch.linalg.solve(system, aim).float()
    found = Steps.of(out, None if grid.symmetric else steps.low, grid)

    def error(of: Steps) -> Tensor:
        off = (of.weights(grouped(codes, grid.group)).flatten(1)[:, :C] - matrix).double()
        return torch.einsum("rc,cd,rd->r", off, H[:C, :C], off)

    keep = (error(found) < error(steps))[:, None]
    return Steps(torch.where(keep, found.scale, steps.scale), torch.where(keep, found.low, steps.low))
