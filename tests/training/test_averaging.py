"""The average of the weights: its formula, who sees it, and that training does not."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from tiny_runs import Run, model_config, train_config, valid, weights
from torch import nn

from headway.checkpoints.tensors import read_tensors
from headway.errors import ConfigError
from headway.nn import Transformer
from headway.run_config import Train
from headway.training import loop
from headway.training.averaging import Average
from headway.training.evaluate import evaluate
from headway.training.events import EvalEvent
from headway.training.optimizers import make_optimizer
from headway.training.parallel import Parallel
from headway.training.resume import load_weights


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "write_loss_curve", lambda folder: None)


def held_out(model: Transformer) -> float:
    found = evaluate(Parallel(model), valid(), torch.device("cpu"), contextlib.nullcontext)
    assert found is not None and found.loss is not None
    return found.loss


@pytest.mark.parametrize("decay", [0.5, 0.99])
def test_the_average_is_its_formula(decay: float) -> None:
    """40 updates in float64 against the weighted sum of all weights that were, written out."""
    model = nn.Linear(3, 2).double()
    average = Average(model, decay)
    history, kept = [weights(model)], []
    for t in range(40):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        average.update()
        history.append(weights(model))
        kept.append(min(decay, (1 + t) / (10 + t)))
    for name in ("weight", "bias"):
        expected, share = torch.zeros_like(history[0][name]), 1.0
        for t in range(39, -1, -1):
            expected += share * (1 - kept[t]) * history[t + 1][name]
            share *= kept[t]
        expected += share * history[0][name]
        assert (average.values[name] - expected).abs().max() < 1e-12
    assert kept[0] == 0.1 and (kept[-1] == 0.5 if decay == 0.5 else kept[-1] == 40 / 49)


def test_showing_swaps_and_puts_back_and_optimizers_do_not_notice() -> None:
    """Muon and AdamW hold the weights' memory, which must be the same after an evaluation."""
    config = model_config(embeddings={"tied": True})
    model = Transformer(config)
    average, optimizer = Average(model, 0.9), make_optimizer(model, config, Train(lr=0.01, muon_lr=0.01))
    for _ in range(3):
        before, kept = weights(model), {name: value.clone() for name, value in average.values.items()}
        with pytest.raises(KeyError), average.shown():
            shown = weights(model)
            assert all(torch.equal(shown[name], value) for name, value in kept.items())
            assert torch.equal(shown["head.output.weight"], kept["embeddings.tokens.weight"])  # one table
            raise KeyError
        assert all(torch.equal(before[name], value) for name, value in weights(model).items())
        for p in model.parameters():
            p.grad = torch.ones_like(p) + torch.randn_like(p)
        optimizer.step(1.0)
        average.update()
        assert all(not torch.equal(before[name], value) for name, value in weights(model).items() if "norm" not in name)
        assert all(not torch.equal(kept[name], value) for name, value in average.values.items())


def test_frozen_weights_are_not_followed_and_narrow_ones_refused() -> None:
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    assert list(Average(model, 0.9).values) == ["weight"]
    with pytest.raises(ConfigError, match=r"train\.ema.*bfloat16"):
        Average(nn.Linear(3, 2).bfloat16(), 0.9)


def test_training_goes_on_as_without(tmp_path: Path) -> None:
    """The weights of the last step, beside the average, are to the bit those of a run without one."""
    plain = Run(tmp_path / "plain", train_config(eval_every=2)).fit().checkpoint
    trainer = Run(tmp_path / "ema", train_config(eval_every=2, ema=0.9)).trainer()
    averaged = trainer.fit().checkpoint
    expected, kept = read_tensors(plain / "model.safetensors"), read_tensors(averaged / "optimizer.safetensors")
    shown = read_tensors(averaged / "model.safetensors")
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, expected[name]) and not torch.equal(shown[name], expected[name])
        assert torch.equal(kept[f"average/weights/{name}"], expected[name])


@pytest.mark.parametrize("is_shown", [True, False])
def test_evaluation_samples_and_checkpoint_are_of_the_average(
    tmp_path: Path, is_shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: were the model shown as it is trained, the evaluation would be that of the last step."""
    if not is_shown:
        monkeypatch.setattr(loop, "shown", lambda average: contextlib.nullcontext())
    sampled: list[float] = []
    run = Run(tmp_path, train_config(steps=12, lr=0.05, ema=0.95))
    trainer = run.trainer()
    trainer.hooks = loop.Hooks(run._listen, lambda: str(sampled.append(held_out(trainer.model))))
    checkpoint = trainer.fit().checkpoint
    said = run.said(EvalEvent)[-1].loss
    last = held_out(trainer.model)
    load_weights(trainer.model, read_tensors(checkpoint / "model.safetensors"), "")
    average = held_out(trainer.model)
    assert sampled == [said] and abs(average - last) > 1e-3
    assert said == (average if is_shown else last)


def test_the_first_averages_forget_the_start(tmp_path: Path) -> None:
    """With the decay at once at 0.999 twelve steps would hardly move it: 99 % of it would be the random start."""
    trainer = Run(tmp_path, train_config(steps=12, ema=0.999)).trainer()
    start = weights(trainer.model)
    shown = read_tensors(trainer.fit().checkpoint / "model.safetensors")
    name = "embeddings.tokens.weight"
    moved = (trainer.model.state_dict()[name] - start[name]).norm()
    assert (shown[name] - start[name]).norm() > 0.3 * moved
