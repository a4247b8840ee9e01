"""The gradient of a batch does not depend on how it is cut, for any objective; packing changes it for none.

In float64 to 1e-10: what is left is the order of sums.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor

from headway.config import with_fields
from headway.launch import Launch, Plan, train
from headway.nn import Transformer
from headway.nn.heads import EmbeddingHead
from headway.nn.model import Teaching
from headway.training.gradients import backward
from headway.training.objectives import TrainingBatch
from headway.training.parallel import Parallel

import recording_toys  # isort: skip
from objective_cases import CASES, config, rows_file  # isort: skip

ROWS = 8
pytestmark = pytest.mark.usefixtures("cache")


def made(tmp_path: Path, name: str, **model: object) -> tuple[Transformer, TrainingBatch]:
    """A fresh model in float64 for an objective, and a batch of its own data."""
    make, fields, _ = CASES[name]
    run = config(rows_file(tmp_path, make), {**fields, "output": str(tmp_path / "run")}, batch_size=ROWS)
    return doubled(train(run, Launch(dry_run=True)).plan, **model)


def doubled(plan: Plan, **model: object) -> tuple[Transformer, TrainingBatch]:
    torch.manual_seed(0)
    # A residual branch that begins at zero would hide most gradients.
    shape = with_fields(plan.model, init={"std": 0.1, "residual": "plain"}, **model)
    built = Transformer(shape).double().train()
    batch = plan.material.source(shape, plan.run).batch(0)
    doubles = {n: t.double() if t.is_floating_point() else t for n, t in batch.inputs.items()}
    return built, TrainingBatch(doubles, batch.sample_ids)


def sounds(tmp_path: Path) -> tuple[Transformer, TrainingBatch]:
    """The same for recordings."""
    run = config(recording_toys.folder(tmp_path / "tones", 8), {"output": str(tmp_path / "run")}, batch_size=ROWS)
    return doubled(train(run, Launch(dry_run=True)).plan)


def gradients(model: Transformer, passes: list[dict[str, Tensor]]) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    torch.manual_seed(1)
    _, loss = backward(Parallel(model), passes, nullcontext)
    assert loss is not None
    return float(loss), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", [*CASES, "recordings"])
def test_passes_give_the_gradient_of_the_whole_batch(tmp_path: Path, name: str) -> None:
    model, batch = sounds(tmp_path) if name == "recordings" else made(tmp_path, name)
    loss, whole = gradients(model, batch.split(1))
    assert any(g.abs().max() > 1e-6 for g in whole.values())
    for parts in (2, 3, 8):
        again, cut = gradients(model, batch.split(parts))
        assert again == pytest.approx(loss, abs=1e-10)
        for key, gradient in whole.items():
            assert (cut[key] - gradient).abs().max() <= 1e-10, (parts, key)


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("a number", "contrastive", "preferences")])
def test_passes_give_the_gradient_of_the_whole_batch_with_a_teacher(tmp_path: Path, name: str) -> None:
    model, batch = made(tmp_path, name)
    plain, _ = gradients(model, batch.split(1))
    model.teaching = Teaching(Transformer(model.config).double().eval().requires_grad_(False), 0.7, 2.0)
    loss, whole = gradients(model, batch.split(1))
    assert abs(loss - plain) > 1e-6
    for parts in (2, 3, 8):
        again, cut = gradients(model, batch.split(parts))
        assert again == pytest.approx(loss, abs=1e-10)
        for key, gradient in whole.items():
            assert (cut[key] - gradient).abs().max() <= 1e-10, (parts, key)


def test_equal_shares_would_be_wrong(tmp_path: Path) -> None:
    """The control: a plain mean over passes is another gradient where rows have unequal numbers of labels."""
    model, batch = made(tmp_path, "sequence to sequence")
    _, whole = gradients(model, batch.split(1))
    model.zero_grad()
    for inputs in batch.split(4):
        (model.loss(**inputs) / 4).backward()
    assert max((p.grad - whole[n]).abs().max() for n, p in model.named_parameters() if n in whole) > 1e-6


def test_rows_of_other_passes_are_negatives_too(tmp_path: Path) -> None:
    """The control for contrastive training: passes on their own would see their own rows alone."""
    model, batch = made(tmp_path, "contrastive")
    assert isinstance(model.head, EmbeddingHead)
    loss, _ = gradients(model, batch.split(1))
    alone = sum(model.loss(**inputs).item() for inputs in batch.split(4)) / 4
    assert abs(alone - loss) > 0.1


def test_the_second_run_draws_what_the_first_drew(tmp_path: Path) -> None:
    """With dropout the gradient is that of the vectors which the loss saw: against one graph over all passes."""
    model, batch = made(tmp_path, "contrastive", dropout=0.3)
    loss, ours = gradients(model, batch.split(4))
    model.zero_grad()
    torch.manual_seed(1)
    vectors = [model(**{k: v for k, v in one.items() if k != "labels"}).logits for one in batch.split(4)]
    whole = model.head.loss(torch.cat(vectors), batch.inputs["labels"])
    whole.backward()
    assert whole.item() == pytest.approx(loss, abs=1e-12)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert (parameter.grad - ours[name]).abs().max() <= 1e-10, name


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_packed_documents_give_the_gradient_of_rows_of_their_own(kind: str) -> None:
    """Three documents in one row, and each in a row alone: the same loss, the same gradient."""
    from headway.config import ModelConfig

    torch.manual_seed(0)
    fields = {"d_model": 32, "n_layers": 2, "n_heads": 2, "vocab_size": 40, "max_len": 32, "init": {"std": 0.1}}
    model = Transformer(ModelConfig(kind=kind, **fields)).double().train()
    lengths = [5, 9, 3]
    ids = [torch.randint(40, (n,)) for n in lengths]
    labels = [torch.randint(40, (n,)) for n in lengths]
    packed = {
        "input_ids": torch.cat(ids)[None],
        "labels": torch.cat(labels)[None],
        "documents": torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None],
    }
    loss, one = gradients(model, [packed])
    apart = [{"input_ids": i[None], "labels": w[None]} for i, w in zip(ids, labels, strict=True)]
    again, each = gradients(model, apart)
    assert again == pytest.approx(loss, abs=1e-12)
    assert all((each[name] - one[name]).abs().max() <= 1e-10 for name in one)
    mixed = {name: tensor for name, tensor in packed.items() if name != "documents"}
    assert abs(gradients(model, [mixed])[0] - loss) > 1e-4  # the control: documents that see each other
