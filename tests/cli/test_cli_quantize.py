"""`headway quantize`: the receipt, the gate, and what is kept."""

from __future__ import annotations

from pathlib import Path

import gguf
import image_toys
import pytest
import torch
from test_loading import published

import headway
from headway import saving
from headway.loading import class_names
from headway.nn.packed import PackedLinear
from headway.saving import plain_weights

WORDS = ("--calibration-tokens", 64, "--measured-tokens", 64, "--context", 16)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return published(tmp_path / "in", "LlamaForCausalLM-tied")


def test_the_receipt_goes_with_the_model(command, model: Path, tmp_path: Path) -> None:
    said = command("quantize", model, tmp_path / "small", "--to", "int8", *WORDS, "--json")
    assert said.code == 0
    found, again = said.json, headway.load(tmp_path / "small")
    assert again.receipt["figures"] == found["figures"] and again.receipt["method"] == "round"
    assert any(isinstance(m, PackedLinear) for m in again.model.modules())
    assert set(found["speed"]) == {"read", "write"} and all(
        rate > 0 for both in found["speed"].values() for rate in both
    )
    change = found["figures"]["loss_change"]
    assert change["value"] == pytest.approx(
        found["figures"]["loss_after"]["value"] - found["figures"]["loss_before"]["value"], abs=1e-9
    )
    assert change["low"] <= change["value"] <= change["high"] and abs(change["value"]) < 0.01
    assert found["bytes_after"] < 0.5 * found["bytes_before"]
    assert again.receipt["speed"] == found["speed"]
    shown = command("inspect", tmp_path / "small", "--json").json
    assert shown["receipt"]["figures"] == found["figures"]
    assert "loss change" in command("inspect", tmp_path / "small").out


@pytest.mark.parametrize("to", ["q8_0", "q4_0", "q4_1"])
def test_a_gguf_file_holds_the_very_codes(command, model: Path, tmp_path: Path, to: str) -> None:
    """Read by the gguf package its weights are those that were measured, its scales not ggml's own."""
    words = ("quantize", model, tmp_path / "small.gguf", "--to", to, "--method", "search", "--force", *WORDS, "--json")
    said = command(*words)
    assert said.code == 0
    again = headway.load(tmp_path / "small.gguf")
    assert again.receipt["figures"] == said.json["figures"] and again.receipt["scheme"] == to
    weights = plain_weights(again)
    file = gguf.GGUFReader(tmp_path / "small.gguf")
    theirs = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in file.tensors}
    kinds = {t.name: t.tensor_type.name for t in file.tensors}
    assert kinds["blk.0.attn_q.weight"] == to.upper() and kinds["token_embd.weight"] == "Q8_0"
    assert kinds["blk.0.ffn_down.weight"] == "F32"  # 48 columns are not whole blocks
    for name, ours in {"ffn_down": "feed_forward.down", "attn_output": "attention.output"}.items():
        found = torch.from_numpy(theirs[f"blk.0.{name}.weight"])
        assert torch.equal(found, weights[f"decoder.blocks.0.{ours}.weight"])
    plain = headway.load(saving.save(headway.load(model), tmp_path / "plain.gguf", "gguf", dtype=to))
    name = "decoder.blocks.0.attention.output.weight"
    assert not torch.equal(plain_weights(plain)[name], weights[name])


@pytest.mark.parametrize("words", [("--group", 64), ("--method", "awq"), ("--asymmetric",)])
def test_what_gguf_has_no_place_for(command, model: Path, tmp_path: Path, words: tuple[object, ...]) -> None:
    said = command("quantize", model, tmp_path / "small.gguf", "--to", "q4_0", *words)
    assert said.code == 2 and "--to int4" in said.err and not (tmp_path / "small.gguf").exists()


@pytest.mark.fault("Q11")
def test_what_costs_too_much_is_not_kept(command, model: Path, tmp_path: Path) -> None:
    """Exit 5 with both figures and nothing on the disk; kept with --force."""
    words = ("quantize", model, tmp_path / "small", "--to", "int4", "--method", "round", *WORDS, "--bound", -1)
    said = command(*words)
    assert said.code == 5 and "quality: int4 costs" in said.err and "--force" in said.err
    assert not (tmp_path / "small").exists()
    assert command(*words, "--force").code == 0 and (tmp_path / "small").exists()


@pytest.mark.fault("Q10")
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--to", "int3"), "int4"),
        (("--method", "gtpq"), "did you mean 'gptq'"),
        (("--group", 48), "32, 64 or 128"),
        (("--asymmetric",), "--to int4"),
    ],
)
def test_what_it_does_not_know(command, model: Path, tmp_path: Path, words: tuple[object, ...], told: str) -> None:
    said = command("quantize", model, tmp_path / "small", *words)
    assert said.code == 2 and told in said.err and not (tmp_path / "small").exists()


def test_a_model_in_codes(command, model: Path, tmp_path: Path) -> None:
    assert command("quantize", model, tmp_path / "small", *WORDS).code == 0
    assert command("quantize", tmp_path / "small", tmp_path / "again", *WORDS).code == 2
    words = (*WORDS, "--dtype", "float32", "--to", "int4", "--force")
    assert command("quantize", tmp_path / "small", tmp_path / "again", *words).code == 0


def test_a_vision_model_is_measured_on_images(command, tmp_path: Path) -> None:
    """Its codes answer like it, and `eval` measures both on the same held-out side."""
    images = image_toys.folder(tmp_path / "images")
    run = tmp_path / "run"
    sizes = ("model.depth=1", "train.steps=4", "train.batch_size=4")
    assert command("train", f"data.path={images}", *sizes, "--output", run, "--json").code == 0
    words = ("--calibration-tokens", 200, "--measured-tokens", 200, "--json")
    missing = command("quantize", run, tmp_path / "none", *words)
    assert missing.code == 2 and "--data IMAGES" in missing.error
    for to in ("int8", "int4"):
        said = command("quantize", run, tmp_path / to, "--to", to, "--data", images, "--bound", 0.5, *words)
        cosine = said.json["figures"]["cosine"]
        assert said.code == 0 and cosine["value"] > 0.9
        both = [command("eval", place, "--data", images, "--json").json for place in (run, tmp_path / to)]
        accuracies = [row["accuracy"] for row in both]
        assert [row["n"] for row in accuracies] == [20, 20]
        assert abs(accuracies[0]["value"] - accuracies[1]["value"]) <= 0.1


def with_large_inputs(run: Path, folder: Path) -> Path:
    """The same function, harder to round: one column of each group 64 times as large, its input as much smaller."""
    loaded = headway.load(run)
    with torch.no_grad():
        for block in loaded.model.decoder.blocks:
            for norm, matrix in (
                (block.attention_residual.before, block.attention.qkv),
                (block.feed_forward_residual.before, block.feed_forward.up),
            ):
                norm.weight[::32] /= 64
                matrix.weight[:, ::32] *= 64
    return saving.save(loaded, folder, "headway")


def test_layers_are_widened_until_the_quality_is_kept(command, trained: Path, corpus: Path, tmp_path: Path) -> None:
    trained = with_large_inputs(trained, tmp_path / "model")
    amount = ("--data", corpus, "--calibration-tokens", 256, "--measured-tokens", 512, "--context", 32)
    words, model = ("--to", "int4", "--method", "round", *amount, "--json"), trained
    costs = {}
    for to in ("int4", "int8"):
        said = command(
            "quantize", model, tmp_path / to, "--to", to, "--bound", 9, "--method", "round", *amount, "--json"
        ).json
        costs[to] = said["figures"]["loss_change"]["value"]
    asked = costs["int8"] + 0.4 * (costs["int4"] - costs["int8"])
    said = command("quantize", model, tmp_path / "mixed", "--quality", asked, *words)
    assert said.code == 0 and said.json["figures"]["loss_change"]["value"] <= asked < costs["int4"]
    wide = [
        name for line in said.err.splitlines() if "8 bits: " in line for name in line.split("8 bits: ")[1].split(", ")
    ]
    again = headway.load(tmp_path / "mixed")
    kinds = {name: leaf.kinds for name, leaf in again.model.named_modules() if isinstance(leaf, PackedLinear)}
    inner = {name: kind for name, kind in kinds.items() if ".blocks." in name}
    assert {name for name, kind in inner.items() if kind == ["INT8/32"]} == set(wide)
    assert 0 < len(wide) < len(inner) and f"{len(wide)} of {len(inner)} layers" in again.receipt["scheme"]
    easy = command("quantize", model, tmp_path / "easy", "--quality", 9, *words).json
    assert easy["scheme"].startswith("int4, 0 of ")
    hard = command("quantize", model, tmp_path / "hard", "--quality", -9, *words)
    assert hard.code == 5 and not (tmp_path / "hard").exists()
    assert command("quantize", model, tmp_path / "x", "--to", "int8", "--quality", 0.1).code == 2


def test_classes_keep_their_names(command, tmp_path: Path) -> None:
    """In codes, as a run folder and as a published one: labelled rows are measured on each."""
    rows = tmp_path / "rows.jsonl"
    words = {"good": "up", "bad": "down", "odd": "sideways"}
    rows.write_text(
        "".join(f'{{"text": "a {w} day {n}", "label": "{l}"}}\n' for n in range(30) for w, l in words.items())
    )
    run = tmp_path / "run"
    sizes = ("preset=bert", "model.depth=1", "tokenizer.vocab_size=300", "train.steps=4", "train.batch_size=4")
    assert command("train", f"data.path={rows}", *sizes, "--output", run, "--json").code == 0
    amount = ("--data", rows, "--calibration-tokens", 64, "--measured-tokens", 64, "--context", 16, "--bound", 9)
    assert command("quantize", run, tmp_path / "small", "--to", "int8", *amount, "--json").code == 0
    assert command("convert", run, tmp_path / "hf", "--to", "hf", "--json").code == 0
    names = class_names(headway.load(run))
    assert sorted(names) == ["down", "sideways", "up"]
    for place in ("small", "hf"):
        assert class_names(headway.load(tmp_path / place)) == names
        measured = command("eval", tmp_path / place, "--data", rows, "--json")
        assert measured.code == 0 and measured.json["accuracy"]["n"] == 90


def test_a_translator_is_measured_on_pairs(command, tmp_path: Path) -> None:
    rows = tmp_path / "pairs.jsonl"
    rows.write_text("".join(f'{{"source": "the number {n}", "target": "{n} and {n}"}}\n' for n in range(60)))
    run = tmp_path / "run"
    sizes = ("model.depth=1", "tokenizer.vocab_size=300", "train.steps=4", "train.batch_size=4")
    assert command("train", f"data.path={rows}", *sizes, "--output", run, "--json").code == 0
    amount = ("--data", rows, "--calibration-tokens", 64, "--measured-tokens", 64, "--bound", 9, "--json")
    for to in ("int8", "int4"):
        said = command("quantize", run, tmp_path / to, "--to", to, *amount).json
        assert said["figures"]["cosine"]["n"] > 3 and said["figures"]["cosine"]["value"] > 0.9
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "one", "label": "a"}\n')
    wrong = command("quantize", run, tmp_path / "x", "--to", "int8", "--data", texts, "--json")
    assert wrong.code == 3 and "source and target" in wrong.error
