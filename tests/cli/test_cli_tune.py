"""`headway tune`: from a published model to a run, an adapter's folder and merged weights that answer the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_loading import logits, published

import headway
from headway import saving
from headway.checkpoints.folder import newest_good
from headway.checkpoints.tensors import read_tensors
from headway.tuning import adapters, peft_folder

RUN = ["tuning.rank=2", "train.steps=4", "train.lr=0.01", "train.batch_size=2", "train.threads=1", "--output", "run"]
RUN += ["train.sample_tokens=0", "train.eval_windows=2", "data.context=16", "data.val_fraction=0.3"]


@pytest.fixture
def tuned(command, tmp_path: Path) -> Path:
    published(tmp_path / "model", "LlamaForCausalLM")
    Path("text.txt").write_text("".join(f"Line {number} of the text that is learned.\n\n" for number in range(300)))
    assert command("tune", "model", "data.path=text.txt", *RUN).code == 0
    return Path("run")


def test_every_form_of_it_answers_the_same(command, tuned: Path) -> None:
    loaded, base = headway.load(tuned), headway.load("model")
    assert loaded.family == "llama" and loaded.base == "model"
    assert (logits(loaded) - logits(base)).abs().max() > 1e-3
    said = command("convert", "run", "adapter", "--to", "peft", "--json").json
    assert (said["form"], said["family"]) == ("peft", "llama") and said["bytes"] < 100_000
    peft_folder.read(base.model, Path("adapter"), saving.plan_of(base), base_sha256=base.weights_sha256)
    assert torch.equal(logits(base), logits(loaded))
    for form, place in (("hf", "merged"), ("gguf", "merged.gguf"), ("headway", "merged-run")):
        assert command("convert", "run", place, "--to", form, "--merge").code == 0
        merged = headway.load(place)
        assert not adapters.names(merged.model)
        # Two thin products in one sum with the weight's, in float32.
        assert (logits(merged) - logits(loaded)).abs().max() < 1e-5 * logits(loaded).abs().max()
    assert "adapters on model" in command("inspect", "run").out


def test_what_it_refuses(command, tuned: Path) -> None:
    """Each by one line, and nothing is written."""
    for words, found in (
        (["tune", "data.path=text.txt"], "PATH: no model"),
        (["tune", "model", "other", "data.path=text.txt"], "PATH: 2 models"),
        (
            ["tune", "model", "data.path=text.txt", "tuning.targets=query", "--output", "x"],
            "'query', which is in no",
        ),
        (["train", "data.path=text.txt", "tuning.rank=2", "--output", "x"], "adapters, and no model to put them on"),
        (["convert", "run", "out", "--to", "hf"], "adapters beside its weights"),
        (["quantize", "run", "out", "--to", "int8", "--data", "text.txt"], "adapters beside its weights"),
        (["convert", "model", "out", "--to", "hf", "--merge"], "a model without adapters"),
        (["convert", "model", "out", "--to", "peft"], "0 adapters"),
    ):
        said = command(*words)
        assert said.code == 2 and found in said.err.splitlines()[-1], (words, said.err)
    assert not Path("out").exists() and not Path("x").exists()


@pytest.mark.fault("L1")
def test_the_base_is_looked_for_and_compared(command, tuned: Path) -> None:
    """Moved away, or with other weights: the run says which base it needs."""
    before = logits(headway.load(tuned))
    Path("model").rename("elsewhere")
    said = command("generate", "run", "--prompt", "a")
    assert said.code == 3 and "model" in said.err
    other = headway.load("elsewhere")
    other.model.decoder.norm.weight.data += 0.1
    saving.save(other, "model", "hf")
    said = command("generate", "run", "--prompt", "a")
    assert said.code == 3 and "base: model with weights" in said.err and "those in training" in said.err
    headway.files.remove_tree(Path("model"))
    Path("elsewhere").rename("model")
    assert torch.equal(logits(headway.load(tuned)), before)


def test_a_new_head_is_trained_whole_beside_the_adapters(command, tmp_path: Path) -> None:
    """Classes for a decoder that had none: the run holds the head, and answers with the classes' names."""
    published(tmp_path / "model", "LlamaForCausalLM")
    rows = [{"text": f"{word} {number}", "label": word} for number in range(40) for word in ("red", "blue")]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ["tuning.rank=2", "tuning.dora=true", "train.steps=30", "train.lr=0.02", "train.threads=1"]
    assert command("tune", "model", "data.path=rows.jsonl", *more, "--output", "run").code == 0
    assert headway.load("run").config.head.type == "sequence-classification"
    held = read_tensors(newest_good(Path("run")).path / "model.safetensors")
    assert {name for name in held if ".added." not in name} == {"head.output.weight", "head.output.bias"}
    alone = command("convert", "run", "adapter", "--to", "peft")
    assert alone.code == 2 and "a head trained beside the adapters" in alone.err and not Path("adapter").exists()
    said = command("eval", "run", "--data", "rows.jsonl", "--json").json
    assert said["accuracy"]["value"] > 0.9
    assert command("convert", "run", "merged", "--to", "headway", "--merge").code == 0
    assert command("eval", "merged", "--data", "rows.jsonl", "--json").json["accuracy"] == said["accuracy"]


def test_every_form_is_proven_and_the_step_that_breaks_is_named(
    command, tuned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["verify", "run", "--through", "merged,hf,gguf,q8_0", "--max-tokens", "4"]
    said = command(*words, "--json").json
    assert said["agrees"] and [row["form"] for row in said["forms"]] == ["merged", "hf", "gguf", "q8_0"]
    assert [row["rounds"] for row in said["forms"]] == [False, False, False, True]
    exact, codes = said["forms"][1], said["forms"][3]
    assert exact["mean_kl"] < 1e-8 < codes["mean_kl"] and exact["agreement"] == 1.0
    save = saving.save

    def broken(loaded, target, form, **more):  # type: ignore[no-untyped-def]
        adapters.merge(loaded.model)
        if form == "hf":
            loaded.model.decoder.blocks[1].feed_forward.down.weight.data *= 1.5
        return save(loaded, target, form, **{**more, "merge": False})

    monkeypatch.setattr(saving, "save", broken)
    said = command(*words)
    assert said.code == 5 and "hf against run" in said.err.splitlines()[-1]
    other = command("verify", "run", "--through", "onnx")
    assert other.code == 2 and "--through: 'onnx'" in other.err


def test_merged_into_codes_it_tells_what_that_cost(command, tuned: Path) -> None:
    said = command("convert", "run", "merged.gguf", "--dtype", "q8_0", "--merge", "--json").json
    assert 0 < said["mean_kl"] < 1 and 0 < said["agreement"] <= 1
    plain = command("convert", "run", "plain.gguf", "--merge", "--json").json
    assert "mean_kl" not in plain
