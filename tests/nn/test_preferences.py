"""Rewards and losses of preferences against the papers' formulas in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from headway.config import ModelConfig
from headway.errors import BugError
from headway.nn import Transformer, heads
from headway.nn.preferences import Preferences

SIZES: dict[str, Any] = {"d_model": 16, "n_layers": 1, "n_heads": 2, "vocab_size": 30, "max_len": 16}
VARIANTS = {
    "dpo": Preferences(0.3),
    "by length": Preferences(0.3, by_length=True),
    "with a margin": Preferences(2.0, by_length=True, margin=0.7),
    "smoothed": Preferences(0.5, smoothing=0.2),
}


def case(rows: int = 6) -> tuple[Transformer, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**SIZES)).double()
    torch.nn.init.normal_(model.head.output.weight, std=0.5)
    ids, labels = torch.randint(30, (rows, 8)), torch.randint(30, (rows, 8))
    for row in range(rows):
        labels[row, : 2 + row % 3] = -100
    return model, {"input_ids": ids, "labels": labels, "reference": -10 - 5 * torch.rand(rows).double()}


def by_hand(model: Transformer, inputs: dict[str, Tensor], how: Preferences) -> Tensor:
    """The mean loss, pair by pair from the written-out distribution."""
    log_p = torch.log_softmax(model(input_ids=inputs["input_ids"]).logits, -1)
    losses = []
    for first in range(0, len(log_p), 2):
        reward = []
        for row in (first, first + 1):
            known = [(place, int(label)) for place, label in enumerate(inputs["labels"][row]) if label >= 0]
            gained = sum(log_p[row, place, label] for place, label in known) - inputs["reference"][row]
            reward.append(how.beta * gained / (len(known) if how.by_length else 1))
        ahead = reward[0] - reward[1] - how.margin
        right, wrong = torch.log(1 + torch.exp(-ahead)), torch.log(1 + torch.exp(ahead))
        losses.append((1 - how.smoothing) * right + how.smoothing * wrong)
    return torch.stack(losses).mean()


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradient_are_the_formulas(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces of a few rows of logits too."""
    how = VARIANTS[variant]
    model, inputs = case()
    model.preferences = how
    expected = by_hand(model, inputs, how)
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    for rows in (1000, 3):
        monkeypatch.setattr(model.head, "rows", rows)
        found = model.loss(**inputs)
        assert float((found - expected).abs()) < 1e-12
        grads = torch.autograd.grad(found, list(model.parameters()))
        assert all(torch.allclose(one, other, atol=1e-12) for one, other in zip(grads, wanted, strict=True))


def test_equal_to_the_reference_nothing_is_preferred() -> None:
    model, inputs = case()
    with torch.no_grad():
        inputs["reference"] = model.log_likelihoods(inputs["labels"], input_ids=inputs["input_ids"])
        assert float(model.rewards(**inputs).abs().max()) == 0.0
        assert float(model.loss(**inputs)) == pytest.approx(math.log(2), abs=1e-12)


def test_a_row_without_labels_has_likelihood_one_and_other_heads_have_none() -> None:
    model, inputs = case()
    inputs["labels"][1] = -100
    found = model.log_likelihoods(inputs["labels"], input_ids=inputs["input_ids"])
    assert float(found[1]) == 0.0 and float(found[0]) < 0
    assert heads.IGNORED == -100
    other = Transformer(ModelConfig(**{**SIZES, "kind": "encoder", "head": {"type": "span"}}))
    with pytest.raises(BugError, match="head span"):
        other.log_likelihoods(inputs["labels"], input_ids=inputs["input_ids"])
