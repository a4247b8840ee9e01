"""Every objective through the whole of `train`: from a file to a run that loads, resumes to the byte, is measured."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headway import assess, loading
from headway.checkpoints.folder import newest_good
from headway.errors import ConfigError, InputError
from headway.launch import Launch, Note, Plan, RunEvent, foretell, train
from headway.run_config import load_run
from headway.training import loop
from headway.training.events import EvalEvent

import recording_toys  # isort: skip
from objective_cases import CASES, SMALL, config, labelled, number, pair, rows_file, text  # isort: skip


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
    # From the run's own config, as the command resumes: what was left open is said there.
    resumed = load_run([tmp_path / "half" / "config.yaml"], ["train.steps=6"], {}).run
    train(resumed, Launch(resume="must", override=True))
    train({**straight, "train": {**straight["train"], "warmup": 0}})
    assert state(tmp_path / "half") == state(tmp_path / "straight")
    loaded = loading.load(tmp_path / "whole")
    assert loaded.config.kind == whole.plan.model.kind
    if metric is not None:
        measured = {one.name: one for one in assess.assess(loaded, str(path), how=assess.How(max_tokens=4))}
        if loaded.config.kind == "encoder-decoder" and "bleu" in measured:
            beams = assess.assess(loaded, str(path), how=assess.How(max_tokens=4, beams=2))
            assert {one.name for one in beams} == set(measured)
        name_of = next(one for one in measured if one.split("@")[0] == metric.removesuffix("_at_k"))
        assert measured[name_of].interval.n > 0


def two(place: Path, make: Callable[[random.Random], dict[str, object]]) -> dict[str, float]:
    """Two sources of the same form, the second a fifth of the first."""
    paths = []
    for name, count in (("large", 60), ("small", 40)):
        (place / name).mkdir()
        paths.append(rows_file(place / name, make, count))
    return {str(place / "l*"): 1.0, str(paths[1]): 3.0}


def mixed(place: Path, name: str, weights: dict[str, float], **train_fields: Any) -> dict[str, Any]:
    fields = CASES[name][1]
    run = config(place, {**fields, "output": str(place / "run")}, **train_fields)
    data = {key: value for key, value in run["data"].items() if key != "path"}
    return {**run, "data": {**data, "mixture": weights}}


@pytest.mark.fault("R7")
@pytest.mark.parametrize("name", ["text", "masked", "denoising", "classes", "sequence to sequence", "contrastive"])
def test_a_mixture_trains_resumes_and_reports_each_source(tmp_path: Path, name: str) -> None:
    weights = two(tmp_path, CASES[name][0])
    said: list[str] = []
    heard: list[EvalEvent] = []

    def listen(event: RunEvent) -> None:
        said.extend(event.lines() if isinstance(event, Plan) else ())
        heard.extend([event] if isinstance(event, EvalEvent) else ())

    run = mixed(tmp_path, name, weights, schedule="constant", warmup=0)
    straight = train({**run, "output": str(tmp_path / "straight")}, on_event=listen)
    lines = [line for line in said if line.startswith("source: ")]
    assert [line.split(",")[0] for line in lines] == [f"source: {path}" for path in weights]
    assert " 25.0% of the rows" in lines[0] and " 75.0% of the rows" in lines[1] and "passes" in lines[0]
    assert heard and heard[-1].sources is not None and list(heard[-1].sources) == list(weights)
    low, high = sorted(heard[-1].sources.values())
    assert low <= heard[-1].loss <= high  # the whole is a mean of its parts
    train({**run, "train": {**run["train"], "steps": 3}})
    # Where the files lie does not matter; what they hold, and their shares, do.
    moved = tmp_path / "moved.jsonl"
    small = Path(list(weights)[1])
    small.rename(moved)
    again = {**run, "data": {**run["data"], "mixture": {str(tmp_path / "l*"): 10.0, str(moved): 30.0}}}
    train(again, Launch(resume="must", override=True))
    assert state(tmp_path / "run") == state(tmp_path / "straight") and straight.result is not None
    other = {**again, "data": {**run["data"], "mixture": {str(tmp_path / "l*"): 1.0, str(moved): 2.0}}}
    with pytest.raises(InputError, match=r"^data: hash"):
        train({**other, "train": {**run["train"], "steps": 9}}, Launch(resume="must", override=True))


def test_what_cannot_be_mixed_is_refused_with_its_source(tmp_path: Path) -> None:
    weights = two(tmp_path, labelled)
    for name, make in (("pairs", pair), ("numbers", number), ("plain", text)):
        (tmp_path / name).mkdir()
        path = rows_file(tmp_path / name, make)
        with pytest.raises(
            InputError, match=rf"data\.mixture\.{path}.*expected rows of the form Labelled with a class"
        ):
            train(mixed(tmp_path, "classes", {**weights, str(path): 1.0}))
    with pytest.raises(InputError, match=r"nowhere.*no such"):
        train(mixed(tmp_path, "classes", {**weights, str(tmp_path / "nowhere.jsonl"): 1.0}))
    with pytest.raises(InputError, match=r"x\*: no file or folder matches"):
        train(mixed(tmp_path, "classes", {**weights, str(tmp_path / "x*"): 1.0}))
    tones = recording_toys.folder(tmp_path / "tones", 2)
    with pytest.raises(InputError, match=rf"data\.mixture\.{tones}: recordings; expected text or rows"):
        train(mixed(tmp_path, "classes", {**weights, str(tones): 1.0}))
    for weight in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=r"^data\.mixture\.a\.txt: "):
            train(mixed(tmp_path, "classes", {"a.txt": weight}))


def test_a_mixture_of_one_is_that_source(tmp_path: Path) -> None:
    path = rows_file(tmp_path, text)
    run = config(path, {"output": str(tmp_path / "alone"), **CASES["text"][1]})
    train(run)
    train({**mixed(tmp_path, "text", {str(path): 5.0}), "output": str(tmp_path / "mixed")})
    assert state(tmp_path / "alone") == state(tmp_path / "mixed")


@pytest.mark.fault("R7")
@pytest.mark.parametrize(
    "name", ["classes", "tags", "an answer's place", "sequence to sequence", "prompt and completion", "contrastive"]
)
def test_a_budget_of_tokens_trains_and_resumes(tmp_path: Path, name: str) -> None:
    make, fields, _ = CASES[name]
    path = rows_file(tmp_path, make, 90)

    def run(folder: str, **some: Any) -> dict[str, Any]:
        made = config(path, {**fields, "output": str(tmp_path / folder)}, schedule="constant", warmup=0, **some)
        del made["train"]["batch_size"]
        return {**made, "train": {**made["train"], "batch_tokens": 150, "accumulation": 2}}

    straight = train(run("straight"))
    plan = straight.plan
    assert plan.run.train.batch_size is None and any("up to 150 tokens" in line for line in plan.lines())
    source = plan.material.source(plan.model, plan.run)
    pass_steps = plan.material.facts.batches(150)
    seen = []
    for cursor in range(pass_steps):
        inputs = source.batch(cursor).inputs
        both = [inputs["input_ids"], *([inputs["labels"]] if plan.model.kind == "encoder-decoder" else [])]
        assert sum(table.numel() for table in both) <= 150
        seen += source.batch(cursor).sample_ids
    assert sorted(seen) == list(range(plan.material.sizes[0]))
    assert all(batch.inputs["input_ids"].numel() <= 150 for batch in plan.material.evaluation(plan.model, plan.run))
    train(run("half", steps=3))
    train(run("half"), Launch(resume="must", override=True))
    assert state(tmp_path / "half") == state(tmp_path / "straight")
    # The written config is read again; two passes over the data are twice the batches of one.
    assert load_run([tmp_path / "half" / "config.yaml"], [], {}).run.train.batch_tokens == 150
    whole = {**run("epochs"), "train": {**run("epochs")["train"], "steps": None, "epochs": 2.0}}
    assert train(whole, Launch(dry_run=True)).plan.run.train.steps == 2 * pass_steps


def test_a_budget_of_tokens_is_foretold(tmp_path: Path) -> None:
    run = config(rows_file(tmp_path, pair, 90), {"output": str(tmp_path / "run")})
    run["train"] = {**run["train"], "batch_size": None, "batch_tokens": 150, "accumulation": 2}
    plan = train(run, Launch(dry_run=True)).plan
    rows = plan.material.facts.rows_of_batch(plan.run.train)
    assert rows == plan.material.sizes[0] / plan.material.facts.batches(150)
    assert foretell(plan).largest > rows / 2


@pytest.mark.fault("R19")
def test_a_budget_that_does_not_go_with_the_data_is_refused(tmp_path: Path) -> None:
    path = rows_file(tmp_path, labelled)
    run = config(path, {"output": str(tmp_path / "run")})
    run["train"] = {"steps": 1, "threads": 1, "batch_tokens": 8}
    with pytest.raises(
        InputError, match=r"train\.batch_tokens: \d+ of \d+ examples are longer, number \d+ has \d+ tokens"
    ):
        train(run)
    (tmp_path / "text").mkdir()
    run["data"] = {"path": str(rows_file(tmp_path / "text", text)), "context": 16}
    with pytest.raises(ConfigError, match=r"train\.batch_tokens: 8 tokens of windows, which are all of one length"):
        train(run)


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


@pytest.mark.fault("R7")
def test_recordings_train_resume_and_are_measured(tmp_path: Path) -> None:
    place = tmp_path / "tones"
    recording_toys.folder(place / "train", 20)
    recording_toys.folder(place / "test", 8, seed=1)
    data = {"bins": 16}
    run = config(place, {"output": str(tmp_path / "run"), "data": data}, steps=60, lr=0.01, batch_size=16)
    done = train(run)
    assert done.plan.model.kind == "encoder" and done.plan.model.head.labels == 3
    assert done.plan.run.objective.type == "audio-classification" and not (tmp_path / "run" / "tokenizer.json").exists()
    (accuracy, *_) = assess.assess(loading.load(tmp_path / "run"), str(place))
    assert accuracy.name == "accuracy" and accuracy.interval.n == 24
    assert accuracy.interval.value >= 0.9  # three pitches; chance is a third

    def few(folder: str, **some: Any) -> dict[str, Any]:
        return config(place, {"output": str(tmp_path / folder), "data": data}, schedule="constant", warmup=0, **some)

    train(few("straight"))
    train(few("half", steps=3))
    train(few("half"), Launch(resume="must", override=True))
    assert state(tmp_path / "half") == state(tmp_path / "straight")
    with pytest.raises(ConfigError, match=r"objective: seq2seq for recordings.*audio-classification"):
        train({**few("other"), "objective": "seq2seq"})
    with pytest.raises(ConfigError, match="base: a published model for recordings"):
        train({**few("other"), "base": str(tmp_path / "run"), "model": {}})
    with pytest.raises(ConfigError, match=r"train\.batch_tokens: 9 tokens of recordings"):
        train({**few("other"), "train": {"batch_tokens": 9, "steps": 1}})


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
    for count in range(2):
        train(config(path, {"output": str(tmp_path / f"run{count}")}, steps=1))
    assert len(calls) == 2, "both sides, once"
