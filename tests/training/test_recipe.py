"""The recipe fills in every number, respects what the user said, and repeats itself."""

import math

import pytest
import torch

from headway.nn import heads, stack
from headway.run_config import RunConfig
from headway.training.recipe import PASSES, Facts, _heads, resolve, time_step

TOKENS = 3_000_000


def slow_clock(config, train, context):
    """A machine of exactly 40 GFLOP/s on 6 N per token."""
    matrices = 12 * config.n_layers * config.d_model**2 + config.vocab_size * config.d_model
    return 6 * matrices * train.batch_size * context / 4e10


def resolved(tokens=TOKENS, vocab=2048, **fields):
    return resolve(RunConfig(**fields), Facts(tokens, {"vocab_size": vocab}), None, slow_clock)


def test_nothing_is_left_open():
    model, run = resolved(budget="3m")
    open_fields = {name for name, value in run.train.model_dump().items() if value is None}
    assert open_fields <= {"early_stop", "threads", "epochs", "ema", "batch_tokens"}
    assert run.data.context == model.max_len and model.vocab_size == 2048
    assert run.model == model.model_dump(mode="json")


def test_the_budget_is_used_and_not_exceeded():
    for budget, seconds in (("30s", 30), ("3m", 180)):
        model, run = resolved(budget=budget, tokens=10**9)
        spent = run.train.steps * slow_clock(model, run.train, run.data.context)
        assert 0.8 * seconds < spent <= 0.9 * seconds


def test_more_time_gives_a_larger_model_and_small_data_ends_early():
    depths = [resolved(budget=b, tokens=10**9)[0].n_layers for b in ("10s", "3m", "5h")]
    assert depths == sorted(depths) and depths[0] < depths[-1]
    _, run = resolved(budget="1h", tokens=20_000)
    seen = run.train.steps * run.train.batch_size * run.data.context
    assert seen <= (PASSES + 1) * 20_000 + run.train.batch_size * run.data.context


@pytest.mark.parametrize("depth", [1, 2, 6, 12])
def test_the_dial_sets_the_shape(depth):
    model, run = resolved(model={"depth": depth}, budget="1m")
    assert (model.n_layers, model.d_model, model.d_head) == (depth, 64 * depth, 64)
    assert run.train.lr == pytest.approx(0.04 * math.sqrt(128 / model.d_model))


def test_the_users_fields_win():
    model, run = resolved(
        model={
            "d_model": 96,
            "n_layers": 3,
            "positions": "learned",
            "attention": {"dropout": 0.1},
            "norm": "layernorm",
        },
        train={"steps": 50, "lr": 0.01, "batch_size": 5, "warmup": 0, "eval_every": 7},
        data={"context": 33},
    )
    assert (model.d_model, model.n_layers, model.max_len, model.positions.type) == (96, 3, 33, "learned")
    assert model.attention.dropout == 0.1 and model.attention.qk_norm == "rmsnorm" and model.norm.type == "layernorm"
    t = run.train
    assert (t.steps, t.lr, t.batch_size, t.warmup, t.eval_every) == (50, 0.01, 5, 0, 7)


def test_heads_divide_any_width():
    for width in range(1, 400):
        assert width % _heads(width) == 0


def test_resolving_a_resolved_run_changes_nothing():
    model, run = resolved(model={"depth": 2}, budget="1m")
    fixed = run.model_copy(update={"budget": None})
    assert resolve(fixed, Facts(TOKENS, {"vocab_size": 2048}), None, slow_clock) == (model, fixed)


def test_trial_steps_leave_the_random_state_alone():
    model, run = resolved(model={"depth": 1}, train={"steps": 2, "batch_size": 2}, data={"context": 8})
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert time_step(model, run.train, 8) > 0
    assert torch.equal(before, torch.get_rng_state())


def test_lion_goes_slower_than_adamw_and_remembers_longer():
    """arXiv:2302.06675, section 5: a rate 3 to 10 times lower, betas 0.9 and 0.99."""
    by_name = {
        name: resolved(train={"optimizer": name, "steps": 9})[1].train for name in ("adamw", "lion", "adafactor")
    }
    assert 1 / 10 <= by_name["lion"].lr / by_name["adamw"].lr <= 1 / 3
    assert (by_name["lion"].beta2, by_name["adamw"].beta2) == (0.99, 0.95)
    assert by_name["adafactor"].lr == by_name["adamw"].lr
    said = resolved(train={"optimizer": "lion", "steps": 9, "beta2": 0.97, "lr": 0.5})[1].train
    assert (said.beta2, said.lr) == (0.97, 0.5)
    model, _ = resolved(train={"steps": 9})
    facts = Facts(TOKENS, {"vocab_size": 2048}, base=model)
    tuned = [resolve(RunConfig(train={"optimizer": name}), facts, None, slow_clock)[1].train for name in by_name]
    assert tuned[1].lr == pytest.approx(0.2 * tuned[0].lr) and tuned[1].beta2 == 0.99 and tuned[0].beta2 == 0.999


def test_the_trial_is_the_step_that_will_be_made(monkeypatch):
    """Its blocks are recomputed and its logits made in pieces, as training will have them."""
    model, run = resolved(model={"d_model": 64}, train={"steps": 9, "batch_size": 4, "checkpoint_activations": True})
    seen = []
    monkeypatch.setattr(stack, "checkpoint", lambda block, *args, **how: (seen.append(block), block(*args))[1])
    monkeypatch.setattr(heads.LanguageModelHead, "forward", lambda *given: pytest.fail("all logits were made"))
    assert time_step(model, run.train, 16) > 0 and len(seen) == 4 * model.n_layers
