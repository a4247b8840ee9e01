"""Students through the whole of `train`: from a teacher's folder to a run that resumes to the byte."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from headway import loading
from headway.checkpoints.folder import newest_good
from headway.checkpoints.tensors import read_tensors
from headway.errors import ConfigError, HeadwayError, InputError
from headway.launch import Launch, foretell, train
from headway.nn import Transformer
from headway.training import loop

from objective_cases import CASES, config, labelled, pair, rows_file  # isort: skip

pytestmark = pytest.mark.usefixtures("cache")
# Preferences have a reference instead of a teacher, and are refused: tests/cli/test_cli_preferences.py.
TEACHABLE = [name for name in CASES if name not in ("a number", "contrastive", "preferences")]
WIDE: dict[str, Any] = {"d_model": 48, "n_layers": 1, "n_heads": 2}


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "write_loss_curve", lambda folder: None)


def case(tmp_path: Path, name: str, output: str, **train_fields: Any) -> dict[str, Any]:
    make, fields, _ = CASES[name]
    path = tmp_path / "rows.jsonl"
    path = path if path.exists() else rows_file(tmp_path, make)
    run = config(path, {**fields, "output": str(tmp_path / output)}, **train_fields)
    run.pop("tokenizer")
    return run


def teach(tmp_path: Path, name: str, seed: int = 0, output: str = "teacher", **train_fields: Any) -> Path:
    run = case(tmp_path, name, output, seed=seed, **train_fields)
    run["model"] = {**run["model"], **WIDE}
    train({**run, "tokenizer": {"vocab_size": 400}})
    return tmp_path / output


def state(folder: Path) -> dict[str, bytes]:
    found = newest_good(folder).path
    return {name: (found / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors")}


@pytest.mark.parametrize("name", TEACHABLE)
def test_a_student_of_every_objective_trains(tmp_path: Path, name: str) -> None:
    """It takes its teacher's tokenizer, differs from one without a teacher, and holds nothing of the teacher."""
    teacher = teach(tmp_path, name)
    distill = {"teacher": str(teacher), "weight": 0.7}
    done = train({**case(tmp_path, name, "student"), "distill": distill})
    assert done.result is not None and done.result.step == 6
    alone = train({**case(tmp_path, name, "alone"), "tokenizer": {"path": str(teacher / "tokenizer.json")}})
    assert done.plan.model == alone.plan.model
    ours, others = (read_tensors(newest_good(tmp_path / x).path / "model.safetensors") for x in ("student", "alone"))
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in others.items()}
    assert any(not torch.equal(ours[n], others[n]) for n in ours)
    kept, alone_kept = (newest_good(tmp_path / x).path for x in ("student", "alone"))
    known = {"model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"}
    assert {file.name for file in kept.iterdir()} == known
    shapes = [{n: t.shape for n, t in read_tensors(x / "optimizer.safetensors").items()} for x in (kept, alone_kept)]
    assert shapes[0] == shapes[1]
    manifest = loading.find_checkpoint(tmp_path / "student").manifest
    hashed = loading.load(teacher, dtype=torch.float32).weights_sha256
    assert manifest.meta["identity"]["teacher"] == hashed
    loaded = loading.load(tmp_path / "student")
    assert loaded.model.teaching is None


@pytest.mark.fault("R7")
@pytest.mark.parametrize("name", ["text", "spans", "tags"])
def test_a_student_resumes_to_the_byte_and_with_no_other_teacher(tmp_path: Path, name: str) -> None:
    teacher, other = teach(tmp_path, name), teach(tmp_path, name, 1, "other")
    how: dict[str, Any] = {"schedule": "constant", "warmup": 0}
    half, straight = (
        {**case(tmp_path, name, output, **how), "distill": {"teacher": str(teacher)}} for output in ("half", "straight")
    )
    train(straight)
    train({**half, "train": {**half["train"], "steps": 3}})
    with pytest.raises(InputError, match=r"teacher: .*hash"):
        train({**half, "distill": {"teacher": str(other)}}, Launch(resume="must", override=True))
    with pytest.raises(ConfigError, match=r"distill\.weight"):
        changed = {"teacher": str(teacher), "weight": 0.4}
        train({**half, "distill": changed}, Launch(resume="must", override=True))
    with pytest.raises(ConfigError, match="distill"):
        train({key: half[key] for key in half if key != "distill"}, Launch(resume="must", override=True))
    moved = teacher.rename(tmp_path / "elsewhere")  # where it lies does not matter
    train({**half, "distill": {"teacher": str(moved)}}, Launch(resume="must", override=True))
    assert state(tmp_path / "half") == state(tmp_path / "straight")


def test_evaluation_is_the_plain_loss(tmp_path: Path) -> None:
    """Of the saved student, computed anew without its teacher."""
    teacher = teach(tmp_path, "text")
    done = train({**case(tmp_path, "text", "student"), "distill": {"teacher": str(teacher), "weight": 1.0}})
    assert done.result is not None and done.result.evaluation is not None
    model, (plan, run) = loading.load(tmp_path / "student").model, (done.plan, done.plan.run)
    total, count = 0.0, 0
    for batch in plan.material.evaluation(plan.model, run):
        total += float(model(**batch.inputs).loss) * batch.tokens
        count += batch.tokens
    assert done.result.evaluation.loss == pytest.approx(total / count, rel=1e-5)  # float32 sums in another order


def test_a_teacher_brings_the_student_nearer(tmp_path: Path) -> None:
    """KL(teacher || student) on held-out text falls, and below that of the same student without a teacher."""
    teacher = teach(tmp_path, "text", steps=150, batch_size=8, eval_every=150, checkpoint_every=150)
    how: dict[str, Any] = {"steps": 100, "batch_size": 8, "eval_every": 100, "checkpoint_every": 100}
    base = case(tmp_path, "text", "student", **how)
    taught = train({**base, "distill": {"teacher": str(teacher), "weight": 1.0, "temperature": 2.0}})
    same = {**base, "output": str(tmp_path / "alone"), "tokenizer": {"path": str(teacher / "tokenizer.json")}}
    train(same)
    oracle = loading.load(teacher).model

    def apart(model: Transformer) -> float:
        total, count = 0.0, 0
        for batch in taught.plan.material.evaluation(taught.plan.model, taught.plan.run):
            inputs = {name: tensor for name, tensor in batch.inputs.items() if name != "labels"}
            known = batch.inputs["labels"] >= 0
            with torch.no_grad():
                p, q = (one(**inputs).logits[known].double().log_softmax(-1) for one in (oracle, model))
            total += float((p.exp() * (p - q)).sum())
            count += int(known.sum())
        return total / count

    torch.manual_seed(0)
    before = apart(Transformer(taught.plan.model).eval())
    after, alone = (apart(loading.load(tmp_path / name).model) for name in ("student", "alone"))
    assert after < before / 4 and after < alone, (before, after, alone)


def images(place: Path, shift: int = 0) -> Path:
    rng = np.random.default_rng(0)
    for side, count in (("train", 40), ("t10k", 10)):
        labels = (rng.integers(0, 3, count) + shift).astype(np.uint8)
        pixels = rng.integers(0, 256, (count, 8, 8)).astype(np.uint8)
        for what, array in (("images-idx3-ubyte", pixels), ("labels-idx1-ubyte", labels)):
            head = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            (place / f"{side}-{what}").write_bytes(head + array.tobytes())
    return place


def test_images_have_teachers_too(tmp_path: Path) -> None:
    where = images(tmp_path)
    run = config(where, {"output": str(tmp_path / "teacher"), "data": {"patch": 4}})
    train({**run, "model": WIDE})
    student = {**run, "output": str(tmp_path / "student"), "distill": {"teacher": str(tmp_path / "teacher")}}
    assert train(student).result is not None
    (tmp_path / "other").mkdir()
    renamed = {**student, "data": {**student["data"], "path": str(images(tmp_path / "other", 1))}}
    with pytest.raises(ConfigError, match=r"distill\.teacher and data\.labels.*0, 1, 2.*1, 2, 3"):
        train({**renamed, "output": str(tmp_path / "x")})


def refused(run: dict[str, Any]) -> str:
    with pytest.raises(HeadwayError) as caught:
        train(run, Launch(dry_run=True))
    assert isinstance(caught.value, ConfigError)
    return str(caught.value)


def test_what_cannot_teach_is_refused_by_name(tmp_path: Path) -> None:
    teacher = teach(tmp_path, "text")
    run = {**case(tmp_path, "text", "student"), "distill": {"teacher": str(teacher)}}
    assert "data.context and distill.teacher" in refused({**run, "data": {**run["data"], "context": 17}})
    assert "data.context" not in str(train(run, Launch(dry_run=True)).plan.lines())
    # Another tokenizer: both are named.
    (tmp_path / "b").mkdir()
    rng_path = rows_file(tmp_path / "b", pair)
    other = tmp_path / "others"
    train(config(rng_path, {"objective": "causal-lm", "output": str(other)}))
    said = refused({**run, "tokenizer": {"path": str(other / "tokenizer.json")}})
    assert str(teacher) in said and str(other) in said and said.count("tokenizer") >= 2
    # Another head, another kind, nothing to score.
    pairs = {**run["data"], "path": str(rng_path), "context": 16}
    for objective, kind, what in (
        ("seq2seq", "encoder-decoder", "kind decoder and encoder-decoder"),
        ("contrastive", "encoder", "a student that gives vectors"),
    ):
        assert what in refused({**run, "data": pairs, "objective": objective, "model": {**run["model"], "kind": kind}})
    (tmp_path / "c").mkdir()
    rows = {**run["data"], "path": str(rows_file(tmp_path / "c", labelled)), "context": 16}
    assert "head causal-lm and sequence-classification" in refused({**run, "data": rows})
    (tmp_path / "d").mkdir()
    numbers = tmp_path / "d" / "rows.jsonl"
    numbers.write_text("".join(json.dumps({"text": f"the fox {i}", "label": 0.5 * i}) + "\n" for i in range(60)))
    assert "a student that gives a number" in refused({**run, "data": {**rows, "path": str(numbers)}})


def test_a_timed_step_counts_the_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`recipe.time_step` and the forecast run the teacher's forward pass, once per pass of the batch."""
    teacher = teach(tmp_path, "text")
    run = {**case(tmp_path, "text", "student", accumulation=2), "distill": {"teacher": str(teacher)}}
    run["train"] = {key: value for key, value in run["train"].items() if key != "steps"} | {"dtype": "float32"}
    seen: list[int] = []
    real = Transformer._states

    def counted(self: Transformer, *args: Any, **fields: Any) -> Any:
        seen.append(self.config.d_model)
        return real(self, *args, **fields)

    monkeypatch.setattr(Transformer, "_states", counted)
    plan = train({**run, "budget": "1s"}, Launch(dry_run=True)).plan
    assert seen.count(48) == seen.count(32) == 8  # four timed steps of two passes
    seen.clear()
    foretell(plan)
    assert seen.count(48) >= 8
