"""Preferences from rows to a report: a base learns which of two completions is the better one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_loading import published

import headway
from headway.data.encode import Coder, preferred
from headway.data.examples import prepare_examples
from headway.data.forms import Message, Preference
from headway.tuning import adapters

QUICK = ["train.steps=30", "train.batch_size=8", "train.threads=1", "train.lr=0.02", "train.eval_every=10"]


def pairs(count: int, *, turns: bool = False) -> str:
    rows = []
    for number in range(count):
        texts = [f"What is {number}", f" it is good {number}", f" it is bad {number}"]
        if turns:
            roles = ("user", "assistant", "assistant")
            said = [[{"role": role, "content": text}] for role, text in zip(roles, texts, strict=True)]
            rows.append({"prompt": said[0], "chosen": said[1], "rejected": said[2]})
        else:
            rows.append(dict(zip(("prompt", "chosen", "rejected"), texts, strict=True)))
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("turns", [False, True])
def test_the_chosen_one_gets_ahead(command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, turns: bool) -> None:
    published(tmp_path / "model", "LlamaForCausalLM")
    monkeypatch.setenv("HEADWAY_CACHE", str(tmp_path / "cache"))
    Path("pairs.jsonl").write_text(pairs(60, turns=turns))
    words = ["tune", "model", "data.path=pairs.jsonl", "data.val_fraction=0.2", "tuning.rank=4", *QUICK]
    shown = command(*words, "--show-batch")
    words_shown = shown.out.replace("[", "").replace("]", "")
    assert shown.code == 0 and "it is good" in words_shown and "it is bad" in words_shown
    said = command(*words, "--output", "run", "--json").json
    assert said["config"]["objective"]["type"] == "preference"
    assert said["rewards"]["accuracy"] == 1.0 and said["rewards"]["margin"] > 0.1
    assert said["loss"] < 0.693 and said["rewards"]["chosen"] > said["rewards"]["rejected"]
    found = command("eval", "run", "--data", "pairs.jsonl", "--json").json
    assert found["accuracy"]["value"] == 1.0
    assert command("watch", "run", "--html", "report.html").code == 0
    page = Path("report.html").read_text()
    assert "accuracy of rewards" in page and "of held-out completions" in page
    # What the base says stands with the examples: a second run reads it there.
    loaded = headway.load("run")
    assert adapters.names(loaded.model)
    assert command(*words, "--output", "again", "tuning.rank=2").code == 0


def test_without_a_base_there_is_no_reference(command, tmp_path: Path) -> None:
    published(tmp_path / "model", "LlamaForCausalLM")
    Path("pairs.jsonl").write_text(pairs(60))
    more = ["model.d_model=32", "model.n_layers=1", "model.n_heads=2", *QUICK, "tokenizer.kind=byte"]
    said = command("train", "data.path=pairs.jsonl", *more, "--output", "run")
    assert said.code == 2 and "preferences against the model as it is at the start" in said.err
    taught = command("train", "data.path=pairs.jsonl", *QUICK, "base=model", "distill.teacher=model", "--output", "run")
    assert taught.code == 2 and "distill and objective: model and preferences" in taught.err
    simpo = [
        "objective.type=preference",
        "objective.reference=none",
        "objective.by_length=true",
        "objective.margin=0.5",
    ]
    assert command("train", "data.path=pairs.jsonl", *more, *simpo, "--output", "run").code == 0
    assert command("eval", "run", "--data", "pairs.jsonl", "--json").json["accuracy"]["value"] == 1.0


def test_only_what_stands_behind_the_prompt_is_learned(tmp_path: Path) -> None:
    published(tmp_path / "model", "LlamaForCausalLM")
    words = headway.load(tmp_path / "model").words
    before = (Message("user", "one"), Message("assistant", "two"), Message("user", "three"))
    pair = Preference(before, (Message("assistant", "four"),), (Message("assistant", "five six"),), "f:1")
    [one] = preferred(pair, Coder(words, 200))
    for prefix, text in (("", "four"), ("second_", "five six")):
        labels = one.columns["labels" if not prefix else "second_labels"]
        ids = one.columns["input_ids" if not prefix else "second_ids"]
        learned = words.decode([label for label in labels if label >= 0])
        assert text in learned and "two" not in learned
        assert "two" in words.decode(list(ids)) and "three" in words.decode(list(ids))
        assert all(label in (-100, token) for label, token in zip(labels[:-1], ids[1:], strict=True))


def test_a_reference_is_the_bases_own_likelihood(command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept with the examples, for each pair, in float32."""
    from headway import prepare

    published(tmp_path / "model", "LlamaForCausalLM")
    Path("pairs.jsonl").write_text(pairs(40))
    kept = {}

    def keep(made_of, folder, build):  # type: ignore[no-untyped-def]
        kept["sides"], kept["made_of"] = build(), made_of
        return prepare_examples(made_of, folder, build)

    monkeypatch.setattr(prepare, "prepare_examples", keep)
    words = ["tune", "model", "data.path=pairs.jsonl", "data.val_fraction=0.3", *QUICK, "--dry-run"]
    assert command(*words).code == 0
    base = headway.load("model")
    assert str(kept["made_of"]["reference"]).startswith(base.weights_sha256)
    columns = kept["sides"].train.columns
    for number in (0, 7):
        for place, (ids, labels) in enumerate((("input_ids", "labels"), ("second_ids", "second_labels"))):
            row = [torch.from_numpy(columns[name][number]).long()[None] for name in (ids, labels)]
            with torch.no_grad():
                expected = base.model.log_likelihoods(row[1], input_ids=row[0])
            assert float(columns["reference"][number][place]) == pytest.approx(float(expected), rel=1e-5)
