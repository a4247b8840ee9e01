"""Every objective through the whole of `train`: from a file to a run that loads, resumes to the byte, is measured."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from headway import assess, loading
from headway.checkpoints.folder import newest_good
from headway.errors import ConfigError, InputError
from headway.launch import Launch, Note, train
from headway.training import loop

from objective_cases import CASES, SMALL, config, labelled, pair, rows_file, text  # isort: skip


pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "write_loss_curve", lambda folder: None)


def state(folder: Path) -> dict[str, bytes]:
    found = newest_good(folder).path
    names = ("model.safetensors", "optimizer.safetensors")
    return {name: (found / name).read_bytes() for name in names}


@pytest.mark.fault("R7")
@pytest.mark.parametrize("name", CASES)
def test_an_objective_trains_resumes_and_is_measured(tmp_path: Path, name: str) -> None:
    make, fields, metric = CASES[name]
    path = rows_file(tmp_path, make)
    whole = train(config(path, {**fields, "output": str(tmp_path / "whole")}))
    assert whole.result is not None and whole.result.step == 6
    assert whole.result.evaluation is not None and whole.result.evaluation.loss is not None
    # Half of it, and then the rest: the same bytes as in one go.
    half = config(path, {**fields, "output": str(tmp_path / "half")}, schedule="constant")
    straight = config(path, {**fields, "output": str(tmp_path / "straight")}, schedule="constant")
    train({**half, "train": {**half["train"], "steps": 3, "warmup": 0, "eval_every": 3}})
    resumed = {**half, "train": {**half["train"], "warmup": 0}}
    train(resumed, Launch(resume="must", override=True))
    train({**straight, "train": {**straight["train"], "warmup": 0}})
    assert state(tmp_path / "half") == state(tmp_path / "straight")
    loaded = loading.load(tmp_path / "whole")
    assert loaded.config.kind == whole.plan.model.kind
    if metric is not None:
        measured = {one.name: one for one in assess.assess(loaded, str(path), how=assess.How(max_tokens=4))}
        name_of = next(one for one in measured if one.split("@")[0] == metric.removesuffix("_at_k"))
        assert measured[name_of].interval.n > 0


def test_images_train_and_are_measured(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for side, count in (("train", 80), ("t10k", 20)):
        labels = rng.integers(0, 3, count).astype(np.uint8)
        pixels = (rng.integers(0, 60, (count, 8, 8)) + 60 * labels[:, None, None]).astype(np.uint8)
        for what, array in (("images-idx3-ubyte", pixels), ("labels-idx1-ubyte", labels)):
            head = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            (tmp_path / f"{side}-{what}").write_bytes(head + array.tobytes())
    run = config(tmp_path, {"output": str(tmp_path / "run"), "data": {"patch": 4}}, steps=120, lr=0.01, batch_size=16)
    done = train(run)
    assert done.result is not None and done.plan.model.kind == "vision"
    (accuracy, *_) = assess.assess(loading.load(tmp_path / "run"), str(tmp_path))
    assert accuracy.name == "accuracy" and accuracy.interval.n == 20
    assert accuracy.interval.value >= 0.8  # three shades of grey; chance is a third


def test_a_published_model_is_trained_further(tmp_path: Path) -> None:
    """The base's weights are where training begins, with a new head on top; its tokenizer is used."""
    base = tmp_path / "base"
    text_file = rows_file(tmp_path, text)
    train(config(text_file, {"objective": "masked-lm", "output": str(base), "data": {"context": 64}}))
    (tmp_path / "b").mkdir()
    path = rows_file(tmp_path / "b", labelled)
    run = {
        "base": str(base),
        "data": {"path": str(path), "val_fraction": 0.2},
        "output": str(tmp_path / "tuned"),
        "train": {**SMALL, "lr": 1e-9},
    }
    done = train(run)
    assert done.plan.run.train.optimizer == "adamw" and done.plan.model.head.type == "sequence-classification"
    ours, theirs = loading.load(tmp_path / "tuned").model.state_dict(), loading.load(base).model.state_dict()
    body = [name for name in theirs if not name.startswith("head.")]
    assert body and all((ours[name] - theirs[name]).abs().max() < 1e-6 for name in body)
    with pytest.raises(ConfigError, match="objective"):
        train({**run, "objective": "seq2seq", "output": str(tmp_path / "other")})


@pytest.mark.fault("R19")
def test_what_does_not_fit_is_counted_and_said(tmp_path: Path) -> None:
    said: list[str] = []
    path = rows_file(tmp_path, labelled)
    run = config(path, {"output": str(tmp_path / "run"), "data": {"context": 5}}, steps=1)
    train(run, on_event=lambda event: said.append(event.text) if isinstance(event, Note) else None)
    assert any("examples are longer than 5 tokens" in line and "rows.jsonl:" in line for line in said)


@pytest.mark.fault("R19")
def test_a_label_outside_the_named_ones_is_refused_with_its_row(tmp_path: Path) -> None:
    path = rows_file(tmp_path, labelled)
    with pytest.raises(InputError, match=r"data.labels.*none.*expected one of bird"):
        train(config(path, {"output": str(tmp_path / "run"), "data": {"labels": ["bird"]}}))


def test_the_same_examples_are_encoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from headway import prepare

    calls = []
    real = prepare.encode_all
    monkeypatch.setattr(prepare, "encode_all", lambda *args: calls.append(1) or real(*args))
    path = rows_file(tmp_path, pair, 61)
    for number in range(2):
        train(config(path, {"output": str(tmp_path / f"run{number}")}, steps=1))
    assert len(calls) == 2, "both sides, once"
