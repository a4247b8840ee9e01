"""Adapters beside layers in codes go through the native path: it computes what the layers compute one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_fused import FORMS, IN_PARTS, SIZES, WHOLE, decoded, gap, in_codes, inputs_of
from torch import Tensor

from headway.config import ModelConfig
from headway.kernels import steps
from headway.nn import Transformer
from headway.nn.attention import use_backend
from headway.nn.cache import Cache
from headway.nn.fused import Fused
from headway.nn.next_token import NextToken
from headway.nn.packed import use_planes
from headway.tuning import adapters
from headway.tuning.beside import Adapted
from headway.tuning.low_rank import LowRank
from headway.tuning_config import Added, BottleneckTuning, LowRankTuning, PrefixTuning, ScalingTuning

pytestmark = pytest.mark.skipif(not steps.levels(), reason="no C++ compiler built the native kernels")
IDS = (2, 14)
NEAR = 1e-3  # as without adapters


@torch.no_grad()
def stir(model: Transformer, name: str, seed: int) -> None:
    """Random signs in the place of an adapter's numbers, of a size that 8 bits hold to the last bit."""
    torch.manual_seed(seed)
    for site in adapters.adapted(model).values():
        for parameter in site.added[name].parameters() if name in site.added else ():
            parameter.copy_((torch.rand(parameter.shape) < 0.5).float() * 2 - 1).mul_(127 / 1024)


def with_adapters(form: dict[str, Any], *tunings: Added) -> Transformer:
    """Adapters n0, n1, ... of random numbers on a model in codes; the last is in use."""
    model = in_codes(ModelConfig(**{**SIZES, **form}), ("Q8_0", "Q4_1", "Q4_0"))
    for number, tuning in enumerate(tunings):
        adapters.attach(model, tuning, f"n{number}")
        stir(model, f"n{number}", number)
    return model


def both(model: Transformer, ids: Tensor, first: int = 6) -> tuple[Tensor, Tensor, Cache]:
    """Logits by the native path and by the layers, and the cache of the former."""
    with use_planes(2):
        found, cache = decoded(model, ids, first)
        with use_backend("naive"):
            known, slow = decoded(model, ids, first)
    assert slow.fused is None
    return found, known, cache


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_decoding_is_native_with_adapters(form: str) -> None:
    torch.manual_seed(1)
    model, ids = with_adapters(FORMS[form], LowRankTuning(rank=3, alpha=3.0)), torch.randint(50, IDS)
    found, known, cache = both(model, ids)
    assert type(cache.fused) is (Fused if form in IN_PARTS else NextToken)
    assert gap(found, known) < NEAR
    with adapters.unused(model):
        without, plain, cache = both(model, ids)
    assert type(cache.fused) is (Fused if form in IN_PARTS else NextToken)
    assert gap(without, plain) < 1e-3 and gap(without, known) > 10 * NEAR


@pytest.mark.parametrize("form", WHOLE)
@torch.no_grad()
def test_whole_sequences_are_too(form: str) -> None:
    model = with_adapters(WHOLE[form], LowRankTuning(rank=36, alpha=6.0, targets=("attention",), rslora=True))
    given = inputs_of(model.config, 3, 11)
    with use_planes(2):
        found = model(**given).logits
        with use_backend("naive"):
            known = model(**given).logits
        with adapters.unused(model):
            without = model(**given).logits
    assert gap(found, known) < NEAR and gap(without, known) > 10 * NEAR


@torch.no_grad()
def test_several_are_weighted_and_switched_while_a_cache_lives() -> None:
    model = with_adapters(
        FORMS["llama"], LowRankTuning(rank=2, alpha=2.0), LowRankTuning(rank=5, alpha=5.0, targets=("q", "down"))
    )
    ids, answers = torch.randint(50, IDS), []
    for strengths in ({"n0": 1.0}, {"n1": 1.0}, {"n0": 1.0, "n1": -1.0}):
        adapters.use(model, strengths)
        found, known, _ = both(model, ids)
        assert gap(found, known) < NEAR
        answers.append(found)
    assert min(gap(answers[a], answers[b]) for a, b in ((0, 1), (1, 2), (0, 2))) > 10 * NEAR
    parts = []
    for backend in ("auto", "naive"):
        with use_planes(2), use_backend(backend):
            adapters.use(model, {"n0": 1.0})
            cache = model.new_cache(2, 32)
            logits = [model(ids[:, :4], cache=cache).logits, model(ids[:, 4:5], cache=cache).logits]
            adapters.use(model, {"n1": 1.0})
            parts.append(torch.cat((*logits, model(ids[:, 5:6], cache=cache).logits), 1))
    assert gap(*parts) < NEAR


@torch.no_grad()
def test_what_learned_more_is_put_in_codes_again() -> None:
    model, ids = with_adapters(FORMS["gpt2"], LowRankTuning(rank=2, alpha=2.0)), torch.randint(50, IDS)
    before, _, _ = both(model, ids)
    stir(model, "n0", 9)
    after, known, _ = both(model, ids)
    assert gap(after, known) < NEAR and gap(after, before) > 10 * NEAR
    sites = [site for site in adapters.adapted(model).values() if isinstance(site, Adapted)]
    kept = [site.thin() for site in sites]
    assert all(one is other for one, other in zip(kept, (site.thin() for site in sites), strict=True))


def test_what_the_optimizer_moved_is_put_in_codes_again() -> None:
    """Evaluate, learn, evaluate, as a run does: torch's fused AdamW does not say that it changed a tensor."""
    model, ids = with_adapters(FORMS["gpt2"], LowRankTuning(rank=2, alpha=2.0)), torch.randint(50, IDS)
    learns = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learns, lr=127 / 1024, weight_decay=0.0, eps=1e-30, fused=True)
    seen = []
    for _ in range(3):
        model.eval()
        with torch.no_grad():
            found, known, _ = both(model, ids)
        assert gap(found, known) < 3 * NEAR  # numbers are rounded to 8 bits
        seen.append(found)
        model.train()
        model(input_ids=ids).logits.square().mean().backward()
        optimizer.step()
    assert min(gap(seen[0], seen[1]), gap(seen[1], seen[2])) > 10 * NEAR


@torch.no_grad()
def test_other_numbers_are_rounded_to_8_bits() -> None:
    model = with_adapters(FORMS["llama"], LowRankTuning(rank=3, alpha=3.0))
    [site, *_] = [one for one in adapters.adapted(model).values() if isinstance(one, Adapted)]
    for parameter in site.added["n0"].parameters():
        torch.nn.init.normal_(parameter)
    added = site.added["n0"]
    assert isinstance(added, LowRank)
    for kept, right in zip(site.thin(), added.thin(1.0) or (), strict=True):
        whole = torch.zeros(kept.shape)
        whole[: right.shape[0], : right.shape[1]] = right
        error = (kept.weights() - whole).abs().unflatten(1, (-1, 32)).amax(2)
        assert (error <= whole.abs().unflatten(1, (-1, 32)).amax(2) * (1 / 254 + 1e-3)).all()  # the scale is a half


@pytest.mark.parametrize(
    "tuning", [LowRankTuning(rank=2, dora=True), ScalingTuning(), BottleneckTuning(size=4), PrefixTuning(tokens=3)]
)
@torch.no_grad()
def test_other_sums_run_layer_by_layer(tuning: Added) -> None:
    model, ids = with_adapters(FORMS["llama"], tuning), torch.randint(50, IDS)
    found, known, cache = both(model, ids)
    assert cache.fused is None and gap(found, known) < 1e-3
