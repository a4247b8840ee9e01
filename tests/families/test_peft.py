"""Adapters of every family against peft: what it writes answers the same here, and what is written here there."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import peft
import pytest
import reference
import torch
import transformers
from reference import Reference
from test_parity import answer, inputs, loaded
from torch import Tensor, nn

from headway.families import families
from headway.families._translate import Plan, plan
from headway.nn import Transformer
from headway.tuning import adapters, peft_folder
from headway.tuning_config import LowRankTuning

# Its layers in transformers 5 are others than those of its files: three projections where these have one.
ROWS = [Reference(name, next(iter(f.heads)), "") for name, f in families().items() if name != "nomic_bert"]
EVERY = pytest.mark.parametrize("row", ROWS, ids=[row.id for row in ROWS])


NEAR = 1e-5  # in float64, of which transformers computes norms and softmax in float32


@functools.cache
def plan_of(row: Reference) -> Plan:
    return plan(row.family, row.family.heads[row.architecture], loaded(row)[0].config)


def fresh(row: Reference) -> Transformer:
    """A copy in float64, so that nothing is left to rounding."""
    return copy.deepcopy(loaded(row)[1]).double().requires_grad_(False)


def targets(row: Reference, theirs: nn.Module) -> list[str]:
    """The layers that both sides know as layers."""
    kinds = (nn.Linear, transformers.pytorch_utils.Conv1D)
    known = {name for name, module in theirs.named_modules() if isinstance(module, kinds)}
    return [p.name for p in peft_folder.places(loaded(row)[1], plan_of(row)) if p.name in known]


def with_peft(row: Reference, **more: Any) -> Any:
    """Their model with a random adapter on every layer of its blocks."""
    theirs = copy.deepcopy(reference.build(row)).double()
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets(row, theirs), **more)
    theirs = peft.get_peft_model(theirs, config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.normal_(0, 0.2)
    return theirs


def doubled(row: Reference) -> dict[str, Tensor]:
    return {name: x.double() if x.is_floating_point() else x for name, x in inputs(row).items()}


def gap(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


@EVERY
@torch.no_grad()
def test_what_peft_writes_answers_the_same(row: Reference, tmp_path: Path) -> None:
    theirs, model = with_peft(row), fresh(row)
    theirs.save_pretrained(tmp_path)
    plain = model(**doubled(row)).logits
    peft_folder.read(model, tmp_path, plan_of(row))
    found, expected = model(**doubled(row)).logits, answer(row, theirs(**doubled(row)))
    assert gap(found, expected) < NEAR < 1e-4 < gap(plain, expected)
    adapters.use(model, {})
    assert torch.equal(model(**doubled(row)).logits, plain)
    adapters.use(model, {"default": 1.0})
    adapters.merge(model)
    assert not adapters.adapted(model) and gap(model(**doubled(row)).logits, expected) < NEAR


@EVERY
@torch.no_grad()
def test_what_is_written_here_answers_the_same_in_peft(row: Reference, tmp_path: Path) -> None:
    """Queries and values alone, so that rows of a joined projection have no part."""
    model = fresh(row)
    has_experts = model.config.feed_forward.experts is not None  # which are no layers in transformers 5
    adapters.attach(
        model, LowRankTuning(rank=3, targets=("q", "*.v", "output", *([] if has_experts else ["feed_forward"])))
    )
    torch.manual_seed(2)
    for layer in adapters.adapted(model).values():
        for parameter in layer.added.parameters():
            parameter.normal_(0, 0.2)
    peft_folder.write(model, tmp_path / "a", plan_of(row), base="nowhere")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(reference.build(row)).double(), tmp_path / "a").eval()
    found, expected = model(**doubled(row)).logits, answer(row, theirs(**doubled(row)))
    assert gap(expected, found) < NEAR
    again = fresh(row)
    peft_folder.read(again, tmp_path / "a", plan_of(row), name="again")
    assert gap(again(**doubled(row)).logits, found) < NEAR
