"""Rounding: plain steps are ggml's, a search is never worse, GPTQ lowers the output's error, input scales cancel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from headway.errors import InputError
from headway.kernels.ggml import dequantize, quantize
from headway.quantization import scaling
from headway.quantization.calibration import Moments
from headway.quantization.compensation import compensated
from headway.quantization.rounding import Grid, Steps, check_matrix, round_to, steps_of
from headway.quantization.walk import in_codes, packed

GRIDS = {"Q4_0": Grid(4, 32), "Q4_1": Grid(4, 32, symmetric=False), "Q8_0": Grid(8, 32)}
OTHERS = (Grid(4, 64), Grid(4, 128, symmetric=False), Grid(8, 64, symmetric=False))


def rounded(matrix: Tensor, grid: Grid, importance: Tensor | None = None, *, searched: bool = False) -> Tensor:
    steps = steps_of(matrix, grid, searched=searched, importance=importance)
    return round_to(matrix, grid, steps).weights(grid.group)


def inputs(columns: int, count: int = 400) -> Tensor:
    """Dependent columns of very different size."""
    mix = torch.randn(columns, columns) / columns**0.5 + torch.eye(columns)
    return torch.randn(count, columns) @ mix * torch.logspace(-1, 1, columns)[torch.randperm(columns)]


def cost(matrix: Tensor, found: Tensor, moments: Tensor) -> float:
    """E |dW x|^2 in float64."""
    off = (found - matrix).double()
    return float(((off @ moments.double()) * off).sum())


@pytest.mark.parametrize("kind", GRIDS)
def test_plain_rounding_errs_as_ggml_does(kind: str) -> None:
    """The scales are its scales; a code differs where a tie or the scale's 16 bits decide, so errors are compared."""
    torch.manual_seed(0)
    matrix, grid = torch.randn(40, 320), GRIDS[kind]
    theirs = dequantize(kind, quantize(kind, matrix))
    ours = rounded(matrix, grid)
    mine, their = ((found - matrix).square().mean() for found in (ours, theirs))
    assert mine <= their * (1 + 1e-3)
    # No weight further off than half a step, of which Q4_0 lacks one on the side away from its largest weight.
    step = steps_of(matrix, grid, searched=False).scale.abs().repeat_interleave(32, 1)
    room = 1.01 if kind == "Q4_0" else 0.51
    assert bool(((ours - matrix).abs() <= room * step + 0.01 * step).all())


@pytest.mark.parametrize("grid", [*GRIDS.values(), *OTHERS])
def test_a_search_is_never_worse(grid: Grid) -> None:
    """Per group, in the error it weighs; and better in the sum. Rows of 200 columns end in a part of a group."""
    torch.manual_seed(1)
    matrix, importance = torch.randn(48, 200), torch.rand(200) ** 3
    for counts in (None, importance):
        plain, found = (rounded(matrix, grid, counts, searched=searched) for searched in (False, True))
        errors = [((one - matrix).square() * (1 if counts is None else counts)).sum(1) for one in (plain, found)]
        assert bool((errors[1] <= errors[0] * (1 + 1e-5)).all()) and errors[1].sum() < 0.99 * errors[0].sum()


@pytest.mark.parametrize("grid", [GRIDS["Q4_0"], GRIDS["Q4_1"], *OTHERS])
def test_gptq_lowers_the_error_of_the_output(grid: Grid) -> None:
    """Below plain rounding and below a search by importance, over layers wider and narrower than a group."""
    torch.manual_seed(2)
    for rows, columns in ((64, 256), (32, 48)):
        matrix, x = torch.randn(rows, columns), inputs(columns)
        moments = x.T @ x / len(x)
        plain = rounded(matrix, grid)
        important = rounded(matrix, grid, moments.diagonal(), searched=True)
        found = compensated(matrix, moments, grid).weights(grid.group)
        costs = [cost(matrix, one, moments) for one in (found, important, plain)]
        assert costs[0] < costs[1] * 0.9 and costs[1] < costs[2]


def test_gptq_without_dependence_is_rounding() -> None:
    """Columns that have nothing to do with each other cannot make up for each other."""
    torch.manual_seed(3)
    matrix, grid = torch.randn(32, 64), Grid(4, 32)
    steps = steps_of(matrix, grid, searched=True, importance=torch.ones(64))
    found = compensated(matrix, torch.eye(64), grid)
    assert torch.equal(found.codes, round_to(matrix, grid, steps).codes)


@pytest.mark.parametrize("method", ["awq", "smooth"])
def test_input_scales_leave_the_product_alone(method: str) -> None:
    """With many bits the layer is what it was; AWQ's search lowers the output's error at 4 bits."""
    torch.manual_seed(4)
    matrix, x = torch.randn(48, 128), inputs(128)
    moments = x.T @ x / len(x)
    both = Moments(moments, moments.diagonal())
    made = in_codes(matrix, Grid(8, 32), method, both)
    assert made.input_scale is not None
    assert (made.unpack() - matrix).abs().max() < 0.05 * matrix.abs().max()
    if method == "awq":
        grid = Grid(4, 32)
        scale = scaling.searched(matrix, both, grid)
        scaled = rounded(matrix * scale, grid) / scale
        assert cost(matrix, scaled, moments) < 0.9 * cost(matrix, rounded(matrix, grid), moments)


def test_zeros_and_tiny_weights_stay_finite() -> None:
    matrix = torch.zeros(16, 64)
    matrix[0, :32] = 1e-9
    for grid in GRIDS.values():
        for searched in (False, True):
            found = rounded(matrix, grid, searched=searched)
            assert bool(found.isfinite().all()) and found.abs().max() < 1e-6
        assert bool(packed(compensated(matrix, torch.zeros(64, 64), grid), grid).unpack().isfinite().all())


@pytest.mark.fault("Q9")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
def test_weights_without_an_image(bad: float) -> None:
    matrix = torch.ones(4, 32)
    matrix[2, 3] = bad
    with pytest.raises(InputError, match=r"layer\.weight"):
        check_matrix(matrix, "layer.weight")
    check_matrix(torch.ones(4, 32), "layer.weight")


def test_steps_are_what_the_file_holds() -> None:
    """Scales and minima are float16 before codes are chosen by them."""
    steps = Steps.of(torch.tensor([0.1]), torch.tensor([0.3]), Grid(4, 32, symmetric=False))
    assert steps.scale.half().float() == steps.scale and steps.low.half().float() == steps.low
