"""Every objective through the whole of `train`: from a file to a run that loads, resumes to the byte, is measured."""

from __future__ import annotations

import json
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
from headway.launch import Launch, Note, train
from headway.training import loop

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "seven",
    "green",
    "birds",
    "sing",
    "in",
    "old",
    "trees",
]
SMALL: dict[str, Any] = {"steps": 6, "batch_size": 4, "checkpoint_every": 3, "eval_every": 3, "threads": 1}
TINY: dict[str, Any] = {"d_model": 32, "n_layers": 1, "n_heads": 2}


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "write_loss_curve", lambda folder: None)


def sentence(rng: random.Random, longest: int = 9) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(3, longest)))


def labelled(rng: random.Random) -> dict[str, object]:
    text = sentence(rng)
    return {"text": text, "label": "bird" if "birds" in text else "none"}


def several(rng: random.Random) -> dict[str, object]:
    text = sentence(rng)
    return {"text": text, "labels": [word for word in ("fox", "dog", "birds") if word in text]}


def number(rng: random.Random) -> dict[str, object]:
    text = sentence(rng)
    return {"text": text, "label": float(len(text.split())) / 3}


def tagged(rng: random.Random) -> dict[str, object]:
    tokens = sentence(rng).split()
    return {"tokens": tokens, "tags": ["B-ANIMAL" if word in ("fox", "dog", "birds") else "O" for word in tokens]}


def question(rng: random.Random) -> dict[str, object]:
    context = sentence(rng, 30) + " fox"
    return {
        "question": "which animal",
        "context": context,
        "answers": [{"text": "fox", "answer_start": context.index("fox")}],
    }


def pair(rng: random.Random) -> dict[str, object]:
    text = sentence(rng)
    return {"source": text, "target": " ".join(reversed(text.split()))}


def chat(rng: random.Random) -> dict[str, object]:
    turns = [{"role": "user", "content": sentence(rng)}, {"role": "assistant", "content": sentence(rng)}]
    return {"messages": turns}


def text(rng: random.Random) -> dict[str, object]:
    return {"text": ". ".join(sentence(rng) for _ in range(8)) + "."}


# name: (rows, fields of the run beside its data, the metric that `assess` gives or None)
CASES: dict[str, tuple[Callable[[random.Random], dict[str, object]], dict[str, Any], str | None]] = {
    "classes": (labelled, {}, "accuracy"),
    "classes of a decoder": (labelled, {"model": {"kind": "decoder", **TINY}}, "accuracy"),
    "several classes": (several, {}, "multilabel_f1_micro"),
    "a number": (number, {}, "mean_squared_error"),
    "tags": (tagged, {}, "span_f1"),
    "an answer's place": (question, {}, "squad_f1"),
    "sequence to sequence": (pair, {}, "bleu"),
    "prompt and completion": (pair, {"objective": "causal-lm"}, None),
    "a conversation": (chat, {}, None),
    "contrastive": (pair, {"objective": "contrastive"}, "recall_at_k"),
    "text": (text, {"data": {"context": 16}}, None),
    "masked": (text, {"objective": "masked-lm", "data": {"context": 16}}, None),
    "masked words, static": (
        text,
        {"objective": {"type": "masked-lm", "whole_words": True, "static": True}, "data": {"context": 16}},
        None,
    ),
    "spans": (text, {"objective": "span-corruption", "data": {"context": 16}}, None),
    "denoising": (text, {"objective": "denoising", "data": {"context": 16}}, None),
}


def rows_file(place: Path, make: Callable[[random.Random], dict[str, object]], count: int = 60) -> Path:
    rng = random.Random(0)
    path = place / "rows.jsonl"
    path.write_text("".join(json.dumps(make(rng)) + "\n" for _ in range(count)))
    return path


def config(path: Path, fields: dict[str, Any], **train_fields: Any) -> dict[str, Any]:
    return {
        "model": TINY,
        **fields,
        "data": {"path": str(path), "val_fraction": 0.2, **fields.get("data", {})},
        "train": {**SMALL, **train_fields},
        "tokenizer": {"vocab_size": 400},
    }


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

    monkeypatch.setenv("HEADWAY_CACHE", str(tmp_path / "cache"))
    calls = []
    real = prepare.encode_all
    monkeypatch.setattr(prepare, "encode_all", lambda *args: calls.append(1) or real(*args))
    path = rows_file(tmp_path, pair, 61)
    for number in range(2):
        train(config(path, {"output": str(tmp_path / f"run{number}")}, steps=1))
    assert len(calls) == 2, "both sides, once"
