"""Muon's orthogonal factor, the groups of parameters, and state that restores bit for bit."""

import copy

import pytest
import torch

from headway.config import ModelConfig
from headway.nn import Transformer
from headway.run_config import Train
from headway.training.optimizers import Muon, make_optimizer, matrix_parts, orthogonalize

CONFIG = ModelConfig(
    d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=50, max_len=16,
    norm="layernorm", feed_forward="swiglu", attention={"qk_norm": "rmsnorm", "bias": True},
)  # fmt: skip


@pytest.mark.parametrize("rows,cols", [(8, 8), (16, 16), (16, 24), (16, 64), (128, 512)])
def test_every_singular_value_becomes_nearly_one(rows, cols):
    U, _, Vh = torch.linalg.svd(torch.randn(3, rows, cols, dtype=torch.float64), full_matrices=False)
    spectrum = torch.logspace(0, -2.3, rows, dtype=torch.float64)  # from 1 down to 5e-3 of the largest
    out = orthogonalize(((U * spectrum) @ Vh).float()).double()
    found = torch.linalg.svdvals(out)
    assert found.min() > 0.6 and found.max() < 1.3
    # The singular vectors are those of the input: U^T out V is diagonal and positive.
    core = U.mT @ out @ Vh.mT
    assert (core - torch.diag_embed(core.diagonal(dim1=-2, dim2=-1))).abs().max() < 1e-3
    assert core.diagonal(dim1=-2, dim2=-1).min() > 0.6


def test_the_gram_form_equals_the_direct_one():
    """Wide matrices go through X X^T; padded to square they would not, and must agree."""
    X = torch.randn(2, 12, 48, dtype=torch.float64)
    wide = orthogonalize(X)
    padded = orthogonalize(torch.cat((X, torch.zeros(2, 36, 48, dtype=torch.float64)), 1))[:, :12]
    # The small 1e-7 in the normalisation and float64 rounding are all that may differ.
    assert (wide - padded).abs().max() < 1e-6


def test_every_parameter_is_in_exactly_one_group():
    model = Transformer(CONFIG)
    optimizer = make_optimizer(model, CONFIG, Train(lr=0.01, muon_lr=0.02, weight_decay=0.1))
    muon = [p for p, _ in optimizer.muon.pieces]
    adamw = [p for group in optimizer.adamw.param_groups for p in group["params"]]
    assert sorted(map(id, muon + adamw)) == sorted(map(id, model.parameters()))
    assert all(p.ndim == 2 for p in muon)
    names = {id(p): name for name, p in model.named_parameters()}
    decay = {names[id(p)]: group["weight_decay"] for group in optimizer.adamw.param_groups for p in group["params"]}
    assert all(
        value == (0.1 if name.endswith(("tokens.weight", "head.output.weight")) else 0) for name, value in decay.items()
    )


def test_a_fused_projection_counts_as_its_parts():
    model = Transformer(CONFIG)
    rows = {tuple(parts) for _, parts in matrix_parts(model, CONFIG)}
    assert rows == {(32, 16, 16), (32,), (128, 128)}
    one = Muon([(torch.nn.Parameter(torch.randn(6, 4)), (4, 2))], lr=1.0)
    one.pieces[0][0].grad = torch.randn(6, 4)
    before = one.pieces[0][0].detach().clone()
    one.step(1.0)
    moved = before - one.pieces[0][0].detach()
    for part in (moved[:4], moved[4:]):
        assert torch.linalg.svdvals(part).sub(1).abs().max() < 0.4


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_state_restores_bit_for_bit(kind):
    torch.manual_seed(0)
    model = Transformer(CONFIG)
    train = Train(lr=0.01, muon_lr=0.02, optimizer=kind)
    optimizer = make_optimizer(model, CONFIG, train)
    ids = torch.randint(0, 50, (2, 16))

    def step(model, optimizer):
        model(ids, labels=ids).loss.backward()
        optimizer.step(0.5)
        optimizer.zero_grad()

    for _ in range(3):
        step(model, optimizer)
    other = copy.deepcopy(model)
    twin = make_optimizer(other, CONFIG, train)
    twin.load_state(copy.deepcopy(optimizer.state()))
    for _ in range(3):
        step(model, optimizer)
        step(other, twin)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_weight_decay_is_decoupled():
    weight = torch.nn.Parameter(torch.randn(4, 4))
    muon = Muon([(weight, (4,))], lr=0.1, weight_decay=0.5)
    weight.grad = torch.zeros(4, 4)
    before = weight.detach().clone()
    muon.step(1.0)
    assert torch.allclose(weight, before * 0.95)
