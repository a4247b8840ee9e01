"""What is foretold of a run: what a pass keeps is counted exactly, parts add up, what fits fits; the advice."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from headway.config import ModelConfig
from headway.nn import Transformer
from headway.run_config import Train
from headway.training import forecast as module
from headway.training.forecast import Meter, Probe, forecast, kept_for_backward
from headway.training.recipe import random_windows
from headway.tuning.tuned import tuned
from headway.tuning_config import LowRankTuning

SIZES: dict[str, Any] = {"d_model": 64, "n_layers": 3, "n_heads": 2, "vocab_size": 300, "max_len": 32}


def fields(**more: Any) -> Train:
    return Train(**{"steps": 100, "batch_size": 8, "lr": 0.01, "muon_lr": 0.02, "dtype": "float32", **more})


def test_what_a_pass_keeps_is_counted_by_hand() -> None:
    """A matrix product keeps its input, a square its argument; the weights themselves are not counted, nor twice."""

    class Toy(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(10, 20, bias=False)

        def loss(self, x: torch.Tensor) -> torch.Tensor:
            y = self.linear(x)  # keeps x: 3 x 10
            return (y * y).sum()  # keeps y, once: 3 x 20

    assert kept_for_backward(Toy(), {"x": torch.ones(3, 10)}) == 4 * (30 + 60)  # type: ignore[arg-type]


def test_recomputing_keeps_less_and_more_rows_keep_more() -> None:
    config = ModelConfig(**SIZES)
    plain = Meter(config, fields(), random_windows, 32, 0)
    less = Meter(config, fields(checkpoint_activations=True), random_windows, 32, 0)
    kept = [plain.parts(rows)["activations"] for rows in (8, 16, 32)]
    assert kept[1] == pytest.approx(2 * kept[0], rel=0.02) and kept[2] == pytest.approx(4 * kept[0], rel=0.03)
    assert less.parts(8)["activations"] < 0.6 * kept[0]
    model = Transformer(config).train()
    exact = kept_for_backward(model, random_windows(config, 32, 32))
    assert kept[2] == pytest.approx(exact, rel=0.02), "the line through few rows meets what many rows keep"


@pytest.mark.parametrize("optimizer", ["muon", "adamw", "lion", "adafactor"])
def test_parts_are_those_of_the_optimizer(optimizer: str) -> None:
    parts = Meter(ModelConfig(**SIZES), fields(optimizer=optimizer), random_windows, 32, 1000).parts(8)
    weights = sum(p.numel() for p in Transformer(ModelConfig(**SIZES)).parameters()) * 4
    assert parts["weights"] == parts["gradients"] == weights and parts["program and data"] == 1000
    assert parts["optimizer"] <= 2 * weights


def test_the_largest_pass_is_the_last_that_fits() -> None:
    meter = Meter(ModelConfig(**SIZES), fields(), random_windows, 32, 0)
    for room in (meter.peak(1), meter.peak(37), meter.peak(37) + 1, meter.peak(500) - 1):
        largest = meter.largest(room)
        assert meter.peak(largest) <= room < meter.peak(largest + 1)
    assert meter.largest(meter.peak(1) - 1) == 0


def told(monkeypatch: pytest.MonkeyPatch, free: int, **more: Any) -> module.Forecast:
    monkeypatch.setattr(module, "available_memory", lambda device: free)
    return forecast(ModelConfig(**SIZES), fields(**more), 32, random_windows, Probe(0.5, 10**6), 10_000)


def test_a_run_that_does_not_fit_is_told_how_it_would(monkeypatch: pytest.MonkeyPatch) -> None:
    fits = told(monkeypatch, 10**9)
    assert fits.seconds == 50 and fits.tokens_per_second == 8 * 32 / 0.5 and fits.largest > 8
    assert not any("does not fit" in line for line in fits.advice)
    tight = told(monkeypatch, fits.peak, batch_size=64)
    assert 0 < tight.largest < 64 and "train.accumulation=" in tight.advice[0]
    passes = int(tight.advice[0].split("train.accumulation=")[1].split()[0])
    assert -(-64 // passes) <= tight.largest


def test_what_steps_took_beyond_the_estimate_is_the_allocators(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = told(monkeypatch, 10**9)
    probe = Probe(0.5, 10**6, plain.peak + 10**8)
    more = forecast(ModelConfig(**SIZES), fields(), 32, random_windows, probe, 10_000)
    assert more.peak == probe.peak and more.memory["kept by the allocator"] == 10**8
    assert more.largest < plain.largest and plain.memory["kept by the allocator"] == 0
    less = forecast(ModelConfig(**SIZES), fields(), 32, random_windows, probe._replace(peak=plain.peak - 1000), 10_000)
    assert less.peak == plain.peak - 1000 and less.largest == plain.largest  # what was seen, and no bolder for it


def test_of_a_frozen_base_only_what_is_tuned_is_counted() -> None:
    def frozen(config: ModelConfig) -> Transformer:
        base = Transformer(config)
        return tuned(base, config, LowRankTuning(rank=2), "")

    config = ModelConfig(**SIZES)
    parts = Meter(config, fields(), random_windows, 32, 0, frozen).parts(8)
    learns = [p for p in frozen(config).parameters() if p.requires_grad]
    assert parts["weights"] == parts["gradients"] == 4 * sum(p.numel() for p in learns)
    whole = Meter(config, fields(), random_windows, 32, 0).parts(8)
    assert parts["weights"] < 0.2 * whole["weights"]
    assert whole["loss"] - parts["loss"] == 4 * config.vocab_size * config.d_model - parts["weights"]


def test_advice_is_about_length(monkeypatch: pytest.MonkeyPatch) -> None:
    short, long = told(monkeypatch, 10**9, steps=10), told(monkeypatch, 10**9, steps=100_000)
    assert any("a smaller model" in line for line in short.advice)
    assert any("passes over the data" in line for line in long.advice)
    assert not any("a smaller model" in line for line in long.advice)
