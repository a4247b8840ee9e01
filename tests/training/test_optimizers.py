"""Each method against its formula, the groups of parameters, and state that restores bit for bit."""

import copy
from typing import get_args

import pytest
import torch
from torch import nn
from transformers.optimization import Adafactor as PublishedAdafactor

from headway.checkpoints.state import flatten_state
from headway.config import ModelConfig
from headway.nn import Transformer
from headway.run_config import Train
from headway.training.optimizers import (
    POLAR_EXPRESS,
    Adafactor,
    AdamW,
    Lion,
    Muon,
    make_optimizer,
    matrix_parts,
    orthogonalize,
)

CONFIG = ModelConfig(
    d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=50, max_len=16,
    norm="layernorm", feed_forward="swiglu", attention={"qk_norm": "rmsnorm", "bias": True},
)  # fmt: skip
OPTIMIZERS = get_args(Train.model_fields["optimizer"].annotation)


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
    """The polynomials evaluated on X itself, one after the other, in float64."""
    for rows, cols in ((12, 48), (16, 16), (48, 12)):
        X = torch.randn(2, rows, cols, dtype=torch.float64)
        direct = X / torch.linalg.svdvals(X).pow(8).sum(-1).pow(1 / 8)[:, None, None]
        for a, b, c in POLAR_EXPRESS:
            S = direct @ direct.mT
            direct = a * direct + b * S @ direct + c * S @ S @ direct
        # What is added to the trace, 1e-14 of some 100, and float64 rounding are all that may differ.
        assert (orthogonalize(X) - direct).abs().max() < 1e-9


def test_nothing_is_made_of_nothing():
    """A layer that no gradient reaches stays; one whose gradient is all but zero does not leap."""
    assert orthogonalize(torch.zeros(2, 4, 8)).eq(0).all()
    assert orthogonalize(torch.full((1, 4, 8), 1e-20)).abs().max() < 1e-6
    tiny = torch.randn(1, 4, 8) * 1e-5
    assert torch.linalg.svdvals(orthogonalize(tiny)).sub(1).abs().max() < 0.15


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_parameter_belongs_to_exactly_one_method(kind):
    model = Transformer(CONFIG)
    frozen = model.head.output.weight.requires_grad_(False)
    optimizer = make_optimizer(model, CONFIG, Train(lr=0.01, muon_lr=0.02, weight_decay=0.1, optimizer=kind))
    owned = [id(p) for p in optimizer.parameters]
    assert sorted(owned) == sorted(id(p) for p in model.parameters() if p is not frozen)
    assert [method.name for method in optimizer.methods] == (["muon", "adamw"] if kind == "muon" else [kind])
    by_name = {method.name: method for method in optimizer.methods}
    if kind == "muon":
        assert all(p.ndim == 2 for p in by_name["muon"].parameters)
        assert id(model.embeddings.tokens.weight) in [id(p) for p in by_name["adamw"].parameters]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_weight_decay_touches_matrices_and_tables_only(kind):
    """Two runs of one step that differ in the decay alone; decoupled, so its share does not depend on the gradient."""
    moved = []
    for decay in (0.0, 0.1):
        torch.manual_seed(0)
        model = Transformer(CONFIG)
        for p in model.parameters():
            p.data.normal_()
        train = Train(lr=0.01, muon_lr=0.01, weight_decay=decay, optimizer=kind)
        optimizer = make_optimizer(model, CONFIG, train)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step(0.5)
        moved.append({name: p.detach() for name, p in model.named_parameters()})
    for name, start in before.items():
        taken = start * 0.01 * 0.5 * 0.1 if start.ndim >= 2 else torch.zeros_like(start)
        assert (moved[0][name] - moved[1][name] - taken).abs().max() < 2e-6, name


def test_heads_and_fused_projections_count_as_their_parts():
    model = Transformer(CONFIG)
    rows = {tuple(parts) for _, parts in matrix_parts(model, CONFIG)}
    assert rows == {(8,) * 8, (32,), (128, 128)}
    one = Muon([(torch.nn.Parameter(torch.randn(8, 4)), (4, 2, 2))], lr=1.0)
    one.parameters[0].grad = torch.randn(8, 4)
    before = one.parameters[0].detach().clone()
    one.step(1.0)
    moved = before - one.parameters[0].detach()
    for part in (moved[:4], moved[4:6], moved[6:]):
        assert torch.linalg.svdvals(part).sub(1).abs().max() < 0.4


@pytest.mark.parametrize("kind", OPTIMIZERS)
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


def stepped(method, parameters, gradients, scales):
    """The parameters after each step."""
    for step, scale in enumerate(scales):
        for parameter, gradient in zip(parameters, gradients[step], strict=True):
            parameter.grad = gradient.clone()
        method.step(scale)
        yield [p.detach().clone() for p in parameters]


def drawn(shapes, steps=20):
    """Parameters, the gradients of each step with very different sizes, and a changing rate."""
    torch.manual_seed(3)
    parameters = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes]
    gradients = [
        [torch.randn(shape, dtype=torch.float64) * 10.0 ** (step % 5 - 3) for shape in shapes] for step in range(steps)
    ]
    return parameters, gradients, [(step + 1) / steps for step in range(steps)]


def test_lion_is_the_papers_formula():
    """arXiv:2302.06675, algorithm 2, written out: c = b1 m + (1-b1) g; w -= rate (sign c + decay w); then m."""
    parameters, gradients, scales = drawn([(5, 3), (4,)])
    weights, momenta = [p.detach().clone() for p in parameters], [torch.zeros_like(p) for p in parameters]
    ours = stepped(Lion(parameters, 0.02, (0.9, 0.99), weight_decay=0.3), parameters, gradients, scales)
    for found, step_gradients, scale in zip(ours, gradients, scales, strict=True):
        for i, g in enumerate(step_gradients):
            c = 0.9 * momenta[i] + 0.1 * g
            decay = 0.3 * weights[i] if g.ndim > 1 else 0
            weights[i] = weights[i] - 0.02 * scale * (torch.sign(c) + decay)
            momenta[i] = 0.99 * momenta[i] + 0.01 * g
            assert (found[i] - weights[i]).abs().max() < 1e-12


def test_lion_moves_every_weight_by_the_rate():
    parameters, gradients, _ = drawn([(6, 6)], steps=1)
    before = parameters[0].detach().clone()
    (after,) = next(stepped(Lion(parameters, 0.1, (0.9, 0.99)), parameters, gradients, [0.5]))
    assert torch.allclose((after - before).abs(), torch.full_like(before, 0.05), atol=1e-12)


def test_adafactor_is_the_published_one():
    """transformers' Adafactor with external rates. The schedule sets its rate before each step."""
    parameters, gradients, scales = drawn([(5, 3), (4,), (2, 7)])
    twins = [nn.Parameter(p.detach().clone()) for p in parameters]
    published = PublishedAdafactor(twins, lr=0.02, scale_parameter=False, relative_step=False, weight_decay=0.0)
    ours = stepped(Adafactor(parameters, 0.02), parameters, gradients, scales)
    for found, step_gradients, scale in zip(ours, gradients, scales, strict=True):
        for twin, gradient in zip(twins, step_gradients, strict=True):
            twin.grad = gradient.clone()
        published.param_groups[0]["lr"] = 0.02 * scale
        published.step()
        for one, other in zip(found, twins, strict=True):
            assert (one - other).abs().max() < 1e-12


def test_adafactor_is_the_papers_formula_for_convolutions_too():
    """arXiv:1804.04235, algorithm 4 with sums in place of means, which cancel; a kernel is the matrix (out, rest)."""
    parameters, gradients, scales = drawn([(4, 3, 2)])
    weight, rows, columns = parameters[0].detach().clone().flatten(1), torch.zeros(4), torch.zeros(6)
    ours = stepped(Adafactor(parameters, 0.02, weight_decay=0.3), parameters, gradients, scales)
    for t, (found, (g,), scale) in enumerate(zip(ours, gradients, scales, strict=True), 1):
        g, beta = g.flatten(1), 1 - t**-0.8
        rows = beta * rows + (1 - beta) * (g**2 + 1e-30).sum(1)
        columns = beta * columns + (1 - beta) * (g**2 + 1e-30).sum(0)
        u = g / torch.sqrt(rows[:, None] * columns[None] / rows.sum())
        u = u / max(1.0, (u**2).mean().sqrt().item())
        weight = weight - 0.02 * scale * (u + 0.3 * weight)
        assert (found[0].flatten(1) - weight).abs().max() < 1e-12


def test_what_is_kept_per_weight():
    """The table of the module's docstring: numbers in the state over numbers in the weights."""
    weight = nn.Parameter(torch.randn(40, 30))
    methods = {
        "adamw": (AdamW([weight], 0.1, (0.9, 0.99), 1e-8, 0.0), 2 * 1200 + 1),  # and the number of updates
        "lion": (Lion([weight], 0.1, (0.9, 0.99)), 1200),
        "muon": (Muon([(weight, (40,))], 0.1), 1200),
        "adafactor": (Adafactor([weight], 0.1), 40 + 30 + 1),
    }
    for name, (method, expected) in methods.items():
        weight.grad = torch.randn_like(weight)
        method.step(1.0)
        tensors, _ = flatten_state(method.state())
        assert sum(tensor.numel() for tensor in tensors.values()) == expected, name
