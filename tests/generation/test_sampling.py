"""Logit functions against transformers' processors and against the formulas in float64; the choice itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from headway.generation import GenerationOptions
from headway.generation import sampling as S

B, V = 8, 50


def logits(seed: int = 0, spread: float = 3.0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(B, V, generator=torch.Generator().manual_seed(seed), dtype=dtype) * spread


def history(options: GenerationOptions, prompts: list[list[int]], vocab: int = V) -> S.History:
    return S.History(options, prompts, vocab, torch.zeros(1))


IDS = torch.randint(0, V, (B, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        *((lambda x, t=t: S.temper(x, t), TemperatureLogitsWarper(t)) for t in (0.1, 0.7, 1.5, 10.0)),
        *((lambda x, k=k: S.keep_top_k(x, k), TopKLogitsWarper(k)) for k in (1, 2, 7, 49, 50, 500)),
        *((lambda x, p=p: S.keep_top_p(x, p), TopPLogitsWarper(p)) for p in (0.0, 0.01, 0.3, 0.9, 0.999)),
        *((lambda x, p=p: S.keep_min_p(x, p), MinPLogitsWarper(p)) for p in (0.001, 0.05, 0.5, 1.0)),
        *((lambda x, p=p: S.keep_typical(x, p), TypicalLogitsWarper(p)) for p in (0.01, 0.2, 0.9, 0.99)),
    ],
)
def test_filters_equal_transformers(ours, theirs, seed: int) -> None:
    x = logits(seed)
    torch.testing.assert_close(ours(x), theirs(IDS, x.clone()), rtol=1e-12, atol=0)


@pytest.mark.parametrize("penalty", [0.5, 1.3, 10.0])
def test_repetition_penalty_equals_transformers(penalty: float) -> None:
    options = GenerationOptions(repetition_penalty=penalty)
    past = history(options, IDS[:, :6].tolist())
    for column in IDS[:, 6:].T:
        past.add(column)
    x = logits()
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(IDS, x.clone())
    torch.testing.assert_close(S.repeat_less(x, past, penalty), theirs)


def test_presence_and_frequency_are_the_formula_of_the_api() -> None:
    """mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence, c counted in the continuation only."""
    options = GenerationOptions(presence_penalty=0.7, frequency_penalty=-0.4)
    past = history(options, [[3, 3, 4]] * B)
    for column in IDS.T:
        past.add(column)
    x = logits()
    expected = x.clone()
    for row in range(B):
        for token in range(V):
            count = int((IDS[row] == token).sum())
            expected[row, token] -= count * -0.4 + float(count > 0) * 0.7
    [step] = S.adjustments(options, (), x)
    torch.testing.assert_close(step(x, past), expected)


def test_bias_is_added() -> None:
    options = GenerationOptions(logit_bias={7: 2.5, 3: -100.0})
    [step] = S.adjustments(options, (), logits())
    x = logits()
    out = step(x, history(options, [[]] * B))
    expected = x.clone()
    expected[:, 7] += 2.5
    expected[:, 3] -= 100
    torch.testing.assert_close(out, expected)


def test_ends_are_forbidden_until_min_tokens() -> None:
    options = GenerationOptions(min_tokens=2)
    [step] = S.adjustments(options, {4, 9}, logits())
    past = history(options, [[]] * B)
    for place in range(4):
        banned = step(logits(), past)[:, [4, 9]].isinf().all()
        assert bool(banned) == (place < 2)
        past.add(torch.zeros(B, dtype=torch.long))


@pytest.mark.parametrize("bias", [{}, {3: 50.0}])
def test_greedy_with_forbidden_ends_is_the_best_of_the_rest(bias: dict[int, float]) -> None:
    ends, options = range(0, V, 2), GenerationOptions(temperature=0, min_tokens=20, logit_bias=bias)
    sampler, kinds = S.Sampler(options, ends, [[0]], [(0, 0)], V, torch.zeros(1)), []
    for step in range(40):
        given = torch.randn(1, V, generator=torch.Generator().manual_seed(step))
        expected = given.clone()
        for token, value in bias.items():
            expected[:, token] += value
        if step < 20:
            expected[:, list(ends)] = float("-inf")
        kinds.append((step < 20, int(given.argmax()) in ends))
        assert torch.equal(sampler.choose(given), expected.argmax(1))
    assert len(set(kinds)) == 4  # ends and others were the best, while ends were forbidden and afterwards


def test_inactive_options_cost_nothing() -> None:
    options = GenerationOptions(temperature=1.0)
    assert S.adjustments(options, {1}, logits()) == []
    assert S.filters(options) == []
    past = history(options, [[1]])
    assert past.seen is None
    assert past.counts is None


@pytest.mark.fault("G6", "G9")
def test_a_candidate_always_remains() -> None:
    grid = [
        {"temperature": t, "top_k": k, "top_p": p, "min_p": m, "typical_p": y, "repetition_penalty": r}
        for t in (1e-5, 1.0, 100.0)
        for k in (0, 1, 10**6)
        for p in (0.0, 0.5, 1.0)
        for m in (0.0, 1.0)
        for y in (1e-9, 1.0)
        for r in (0.01, 1.0, 100.0)
    ]
    for fields in grid:
        for x in (logits(dtype=torch.float32), torch.zeros(B, V), torch.full((B, V), -3e4)):
            options = GenerationOptions(**fields, logit_bias=dict.fromkeys(range(V), -100.0))
            sampler = S.Sampler(options, {0}, [list(range(V))] * B, [(0, i) for i in range(B)], V, x)
            out = x
            for step in sampler.adjustments:
                out = step(out, sampler.history)
            for keep in sampler.filters:
                out = keep(out)
            assert out.isfinite().any(-1).all(), fields
            assert ((sampler.choose(x) >= 0) & (sampler.choose(x) < V)).all()


@pytest.mark.fault("G6")
def test_a_candidate_may_vanish_without_the_guard() -> None:
    """Negative control: top_p 0 without the kept first candidate leaves nothing."""
    ordered = logits().sort(-1, descending=True).values.softmax(-1)
    assert (ordered.cumsum(-1) - ordered >= 0.0).all()


def test_pick_is_the_inverse_of_the_cumulative_distribution() -> None:
    x = torch.tensor([[0.1, 0.2, 0.0, 0.7]], dtype=torch.float64).log()
    places = [(0.0, 0), (0.0999, 0), (0.1001, 1), (0.2999, 1), (0.3001, 3), (0.9999, 3), (1 - 2**-53, 3)]
    for uniform, token in places:
        assert S.pick(x, torch.tensor([uniform], dtype=torch.float64)).item() == token


def test_pick_never_takes_a_removed_token() -> None:
    x = torch.full((3, 5), -math.inf)
    x[0, 4], x[1, 0], x[2, 2] = 1.0, -5.0, 0.0
    for uniform in (0.0, 1e-300, 0.5, 1 - 2**-53):
        chosen = S.pick(x, torch.full((3,), uniform, dtype=torch.float64))
        assert chosen.tolist() == [4, 0, 2]


def test_frequencies_follow_the_distribution() -> None:
    """Chi-square over 20,000 draws: 49 degrees of freedom stay below 95 (p = 1e-4) for a fixed seed."""
    x = logits()[:1].expand(20_000, V)
    uniform = torch.from_numpy(np.random.Generator(np.random.Philox(key=[5, 0])).random(20_000))
    counts = torch.bincount(S.pick(x, uniform), minlength=V).double()
    expected = x[0].softmax(-1) * 20_000
    large = expected >= 5
    chi = ((counts - expected) ** 2 / expected)[large].sum()
    assert chi < 95


def test_streams_do_not_depend_on_the_batch() -> None:
    options = GenerationOptions(temperature=1.0)
    x = torch.zeros(3, V)
    keys = [(1, 0), (1, 1), (2, 0)]
    together = S.Sampler(options, (), [[]] * 3, keys, V, x)
    columns = torch.stack([together.choose(x) for _ in range(300)])
    for row, key in enumerate(keys):
        alone = S.Sampler(options, (), [[]], [key], V, x)
        assert [int(alone.choose(x[:1])) for _ in range(300)] == columns[:, row].tolist()
    assert len({tuple(column.tolist()) for column in columns.T}) == 3


def test_dropped_rows_leave_the_streams_of_the_others() -> None:
    options = GenerationOptions(temperature=1.0, frequency_penalty=1.0, repetition_penalty=1.1)
    x = logits()
    keys = [(1, row) for row in range(B)]
    whole = S.Sampler(options, (), [[row] for row in range(B)], keys, V, x)
    part = S.Sampler(options, (), [[row] for row in range(B)], keys, V, x)
    kept = torch.tensor([1, 4, 6])
    for _ in range(5):
        whole.choose(x)
        part.choose(x)
    part.reorder(kept)
    for _ in range(200):
        assert torch.equal(whole.choose(x)[kept], part.choose(x[kept]))


@pytest.mark.fault("G15")
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_the_poisoned_row_fails(poison: float, temperature: float) -> None:
    x = logits(dtype=torch.float32)
    clean = S.Sampler(GenerationOptions(temperature=temperature), (), [[]] * B, [(0, i) for i in range(B)], V, x)
    sick = S.Sampler(GenerationOptions(temperature=temperature), (), [[]] * B, [(0, i) for i in range(B)], V, x)
    y = x.clone()
    y[3, 17] = poison
    expected, got = clean.choose(x), sick.choose(y)
    assert got[3] == -1
    others = torch.arange(B) != 3
    assert torch.equal(expected[others], got[others])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits(dtype: torch.dtype) -> None:
    x = logits(dtype=torch.float32).to(dtype)
    keys = [(0, i) for i in range(B)]
    fields = {"top_p": 0.9, "repetition_penalty": 1.2, "frequency_penalty": 0.5}
    low = S.Sampler(GenerationOptions(**fields), (), [[1]] * B, keys, V, x)
    wide = S.Sampler(GenerationOptions(**fields), (), [[1]] * B, keys, V, x.float())
    for _ in range(20):
        assert torch.equal(low.choose(x), wide.choose(x.float()))
