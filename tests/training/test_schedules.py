"""Schedules against the formulas, in float64."""

import itertools
import math

import pytest

from headway.run_config import Train
from headway.training.schedules import scale


def curve(**fields: object) -> list[float]:
    train = Train(**fields)  # type: ignore[arg-type]
    return [scale(step, train) for step in range((train.steps or 0) + 3)]


@pytest.mark.parametrize("steps,warmup,final", [(100, 10, 0.1), (37, 0, 0.0), (5, 5, 0.5), (1, 0, 0.0), (1, 1, 0.2)])
def test_formulas(steps: int, warmup: int, final: float) -> None:
    shapes = {
        "constant": lambda t: 1.0,
        "linear": lambda t: 1 - t,
        "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
    }
    for name, shape in shapes.items():
        got = curve(steps=steps, warmup=warmup, schedule=name, final_lr=final)
        for step, value in enumerate(got):
            if step < warmup:
                expected = (step + 1) / warmup
            else:
                t = min((step - warmup) / max(steps - warmup, 1), 1.0)
                expected = final + (1 - final) * shape(t)
            assert value == pytest.approx(expected, abs=1e-15), (name, step)


def test_wsd_holds_and_then_falls() -> None:
    got = curve(steps=100, warmup=10, schedule="wsd", decay=0.2, final_lr=0.1)
    assert got[9:80] == [1.0] * 71
    for step in range(80, 100):
        assert got[step] == pytest.approx(0.1 + 0.9 * (1 - math.sqrt((step - 80) / 20)), abs=1e-15)
    assert got[100:] == pytest.approx([0.1] * 3)
    assert curve(steps=10, warmup=9, schedule="wsd", decay=1.0)[:9] == [(s + 1) / 9 for s in range(9)]


def test_every_schedule_ends_where_it_should_and_never_rises_after_warmup() -> None:
    for name in ("constant", "linear", "cosine", "wsd"):
        got = curve(steps=50, warmup=7, schedule=name, final_lr=0.05)
        assert max(got) == 1.0 and got[6] == 1.0
        assert all(a >= b for a, b in itertools.pairwise(got[6:]))
        assert got[50] == pytest.approx(1.0 if name == "constant" else 0.05)
        assert all(value > 0 for value in got[:50])


@pytest.mark.parametrize("warmup,final", [(4000, 0.0), (7, 0.0), (7, 0.1), (0, 0.0)])
def test_inverse_sqrt_is_the_transformers_formula(warmup: int, final: float) -> None:
    """arXiv:1706.03762, equation 3, over its peak, which is at step `warmup`: min(n^-1/2, n warmup^-3/2) warmup^1/2."""
    peak = max(warmup, 1)
    for update in (1, 2, 6, 7, 8, 100, 3999, 4000, 4001, 10**6):
        expected = min(update**-0.5, update * peak**-1.5) * peak**0.5
        if update > warmup:
            expected = final + (1 - final) * expected
        got = scale(update - 1, Train(steps=5000, warmup=warmup, schedule="inverse-sqrt", final_lr=final))
        assert got == pytest.approx(expected, rel=1e-14), update
