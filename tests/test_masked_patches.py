"""Masked patches (arXiv:2111.09886): the loss against transformers, runs, and where classification begins."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from headway import assess, loading
from headway.checkpoints.folder import newest_good
from headway.checkpoints.tensors import read_tensors
from headway.config import ModelConfig, with_fields
from headway.data.images import find_images
from headway.errors import ConfigError
from headway.families import families
from headway.families._translate import plan, read_config
from headway.launch import Launch, train
from headway.nn import Transformer
from headway.nn.embeddings import cut
from headway.run_config import MaskedPatches
from headway.training import loop
from headway.training.gradients import backward
from headway.training.parallel import Parallel
from headway.training.pictures import ImageBatches, hide

import image_toys  # isort: skip
from objective_cases import SMALL, config  # isort: skip

pytestmark = pytest.mark.usefixtures("cache")
WIDE: dict[str, Any] = {"d_model": 32, "n_layers": 1, "n_heads": 2}
VIT: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
VIT |= {"image_size": 8, "patch_size": 4, "encoder_stride": 4, "num_channels": 1}


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "write_loss_curve", lambda folder: None)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return image_toys.folder(tmp_path / "images")


def masked(images: Path, output: Path, **fields: Any) -> dict[str, Any]:
    run = config(images, {"output": str(output), "data": {"patch": 4}, "objective": "masked-patches"}, **fields)
    return {**run, "model": WIDE}


def classes(images: Path, output: Path, **fields: Any) -> dict[str, Any]:
    return {"data": {"path": str(images)}, "output": str(output), "train": {**SMALL, **fields}}


# --- the loss ------------------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_transformers(tmp_path: Path) -> None:
    """ViTForMaskedImageModeling with our weights: pixels and loss in float64, but for its 1e-5 in the denominator."""
    torch.manual_seed(0)
    theirs = transformers.ViTForMaskedImageModeling(transformers.ViTConfig(**VIT)).double().eval()
    torch.nn.init.normal_(theirs.vit.embeddings.mask_token)
    theirs.save_pretrained(tmp_path)
    state = read_tensors(tmp_path / "model.safetensors")
    raw = {**VIT, "model_type": "vit", "architectures": ["ViTForImageClassification"]}
    family = families()["vit"]
    found = read_config(family, raw, "config.json")
    ours = Transformer(with_fields(found.config, head="masked-patches")).double().eval()
    rules = plan(family, family.heads["ViTForImageClassification"], found.config).rules
    body = [rule for rule in rules if not rule.names[0].startswith("head.")]
    weights = {name: rule.gather(state.__getitem__) for rule in body for name in rule.names}
    weights["embeddings.patches.mask"] = state["vit.embeddings.mask_token"][0, 0]
    weights |= {"head.output.weight": state["decoder.0.weight"].flatten(1), "head.output.bias": state["decoder.0.bias"]}
    ours.load_state_dict(weights)
    pixels = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    hidden = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1], [1, 1, 1, 0]], dtype=torch.bool)
    labels = cut(pixels, 4).where(hidden[..., None], -100.0)
    with torch.no_grad():
        out, expected = ours(pixel_values=pixels, labels=labels), theirs(pixels, bool_masked_pos=hidden)
        plain = ours(pixel_values=pixels).logits
    assert (out.logits - cut(expected.reconstruction, 4)).abs().max() < 1e-12
    count = int(hidden.sum()) * 16
    assert out.loss.item() == pytest.approx(expected.loss.item() * (count + 1e-5) / count, rel=1e-7)  # a sum in float32
    assert (plain - out.logits).abs().max() > 1e-3  # the control: with nothing hidden another answer


def test_hidden_are_so_many_and_others_every_time(images: Path) -> None:
    chosen = hide(np.random.default_rng(0).random((500, 16)), 0.6)
    assert (chosen.sum(1) == 10).all() and (chosen.mean(0) > 0.5).all() and (chosen.mean(0) < 0.7).all()
    assert hide(np.random.default_rng(0).random((5, 4)), 0.01).sum() == 5
    data, _ = find_images(images, None, None, 0.1)
    batches = ImageBatches(data, MaskedPatches(), 2)
    stream = batches.shuffled(8, 0)
    first, second, again = (stream.batch(number).inputs["labels"] for number in (0, 10, 0))
    assert torch.equal(first, again) and not torch.equal(first == -100, second == -100)
    assert ((first[..., 0] != -100).sum(1) == 10).all()
    # Held out the same, whatever the batch.
    whole = torch.cat([one.inputs["labels"] for one in batches.in_order(20, 20)])
    pieces = torch.cat([one.inputs["labels"] for one in batches.in_order(3, 20)])
    assert torch.equal(whole, pieces)


def test_a_hidden_patch_is_not_seen(images: Path) -> None:
    torch.manual_seed(0)
    fields = {"embeddings": {"patch": {"size": 4, "image": 8, "channels": 1, "first_token": False}}}
    model = Transformer(ModelConfig(kind="vision", head="masked-patches", **WIDE, **fields)).eval()
    data, _ = find_images(images, None, None, 0.1)
    inputs = ImageBatches(data, MaskedPatches(), 4).collate([0, 1], None)
    other = inputs["pixel_values"].clone()
    hidden = inputs["labels"][..., 0] != -100
    for row, patch in hidden.nonzero().tolist():
        other[row, :, patch // 2 * 4 : patch // 2 * 4 + 4, patch % 2 * 4 : patch % 2 * 4 + 4] += 1
    with torch.no_grad():
        seen, unseen = (model(pixel_values=p, labels=inputs["labels"]).logits for p in (inputs["pixel_values"], other))
        control = model(pixel_values=other + 1, labels=inputs["labels"]).logits
    assert torch.equal(seen, unseen) and not torch.equal(seen, control)


def test_passes_give_the_gradient_of_the_whole_batch(images: Path, tmp_path: Path) -> None:
    done = train(masked(images, tmp_path / "run", batch_size=8), Launch(dry_run=True)).plan
    torch.manual_seed(0)
    model = Transformer(with_fields(done.model, init={"std": 0.1, "residual": "plain"})).double().train()
    batch = done.material.source(done.model, done.run).batch(0)

    def gradients(parts: int) -> tuple[float, dict[str, Tensor]]:
        model.zero_grad()
        passes = [{n: t.double() for n, t in one.items()} for one in batch.split(parts)]
        tokens, loss = backward(Parallel(model), passes, nullcontext)
        assert loss is not None and tokens == int((batch.inputs["labels"] != -100).sum())
        return float(loss), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    loss, whole = gradients(1)
    assert whole.keys() == {name for name, _ in model.named_parameters()}
    for parts in (2, 3, 8):
        again, cut_up = gradients(parts)
        assert again == pytest.approx(loss, abs=1e-10)
        assert all((cut_up[name] - gradient).abs().max() <= 1e-10 for name, gradient in whole.items())


# --- runs ----------------------------------------------------------------------------------------------------------


def state(folder: Path) -> list[bytes]:
    found = newest_good(folder).path
    return [(found / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors")]


@pytest.mark.fault("R7")
def test_it_learns_and_resumes_to_the_byte(images: Path, tmp_path: Path) -> None:
    done = train(masked(images, tmp_path / "long", steps=60, batch_size=16, lr=0.01))
    assert done.result is not None and done.result.evaluation is not None
    start = train(masked(images, tmp_path / "short", steps=1, batch_size=16, lr=1e-9)).result
    assert start is not None and start.evaluation is not None
    assert done.result.evaluation.loss < 0.6 * start.evaluation.loss
    assert done.plan.run.data.labels == ()
    how = {"schedule": "constant", "warmup": 0}
    half, straight = (masked(images, tmp_path / name, **how) for name in ("half", "straight"))
    train(straight)
    train({**half, "train": {**half["train"], "steps": 3}})
    train(half, Launch(resume="must", override=True))
    assert state(tmp_path / "half") == state(tmp_path / "straight")
    with pytest.raises(ConfigError, match="masked-patches tells no classes"):
        assess.assess(loading.load(tmp_path / "long"), str(images))


def test_its_encoder_is_where_classification_begins(images: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    train(masked(images, base, steps=20))
    run = {**classes(images, tmp_path / "tuned", lr=1e-9), "base": str(base)}
    done = train(run)
    assert done.plan.model.head.type == "image-classification" and done.plan.run.train.optimizer == "adamw"
    ours, theirs = (loading.load(x).model.state_dict() for x in (tmp_path / "tuned", base))
    body = [name for name in ours if not name.startswith("head.")]
    assert len(body) > 8 and all((ours[name] - theirs[name]).abs().max() < 1e-6 for name in body)
    assert "embeddings.patches.mask" in theirs and "embeddings.patches.mask" not in ours
    # From a classifier further: its head is kept, and of other patches, sizes or kinds it is refused.
    again = train({**classes(images, tmp_path / "again", lr=1e-9), "base": str(tmp_path / "tuned")})
    kept = loading.load(tmp_path / "again").model.state_dict()
    assert again.plan.model == done.plan.model
    assert all((kept[name] - ours[name]).abs().max() < 1e-6 for name in ours)
    large = {"path": str(image_toys.folder(tmp_path / "large", 12)), "image": 12}
    for data, found in ((large, "1 x 12 x 12 for"), ({"patch": 2}, "which sees 1 x 8 x 8 in patches of 4")):
        with pytest.raises(ConfigError, match=found):
            train({**run, "data": {**run["data"], **data}, "output": str(tmp_path / "x")})


def test_a_published_vit_is_trained_further(images: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    place = tmp_path / "vit"
    transformers.ViTForImageClassification(transformers.ViTConfig(**VIT, num_labels=5)).save_pretrained(place)
    run = {**classes(images, tmp_path / "tuned", lr=1e-9), "base": str(place)}
    done = train(run)
    assert (done.plan.model.head.labels, done.plan.model.head.pooling) == (3, "first")  # type: ignore[union-attr]
    ours, theirs = (loading.load(x).model.state_dict() for x in (tmp_path / "tuned", place))
    assert all((ours[n] - theirs[n]).abs().max() < 1e-6 for n in ours if not n.startswith("head."))
    assert train({**run, "objective": "masked-patches", "output": str(tmp_path / "hidden")}).result is not None
    # Pixels in another scale than -1 to 1 would be other images to it.
    (place / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5], "image_std": [0.5]}))
    train({**run, "output": str(tmp_path / "same")}, Launch(dry_run=True))
    (place / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.485], "image_std": [0.229]}))
    with pytest.raises(ConfigError, match=r"image_mean.*0\.485"):
        train({**run, "output": str(tmp_path / "y")}, Launch(dry_run=True))


def test_text_models_see_no_images(images: Path, tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("the quick brown fox jumps over the lazy dog. " * 200)
    train({**config(book, {"output": str(tmp_path / "text"), "data": {"context": 16}}), "model": WIDE})
    with pytest.raises(ConfigError, match="kind decoder"):
        train({**classes(images, tmp_path / "x"), "base": str(tmp_path / "text")})
