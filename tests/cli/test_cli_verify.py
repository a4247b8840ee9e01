"""`headway verify`: agreeing forms, each difference named in one line with exit code 5, JSON before the error."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from headway.checkpoints.gguf_model import gguf_chunks
from headway.checkpoints.hub_folder import choose_family, folder_files, write_folder
from headway.cli import verify
from headway.config import ModelConfig
from headway.errors import DivergedError
from headway.nn import Transformer
from headway.text import Tokenizer, train_tokenizer
from headway.text.gguf_vocab import to_gguf

SPECIALS = ("<|endoftext|>", "<|user|>", "<|assistant|>")
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"


@functools.cache
def trained_words() -> str:
    return train_tokenizer(
        ["the old cat sat on the mat and saw the birds"] * 4, "bpe", 270, special_tokens=SPECIALS
    ).to_json()


def words(template: str = TEMPLATE) -> Tokenizer:
    return Tokenizer(json.loads(trained_words()), "tokenizer", {"chat_template": template})


def config(**fields: Any) -> ModelConfig:
    sizes = {"d_model": 32, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 270, "max_len": 64}
    return ModelConfig(**{**sizes, "feed_forward": "swiglu", "tokens": {"eos": 0}, **fields})


@functools.cache
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    model = Transformer(config())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, float(parameter.ndim == 1), 0.3)
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def written(path: Path, change: dict[str, torch.Tensor] | None = None, template: str = TEMPLATE, **fields: Any) -> Path:
    """A Hugging Face folder."""
    made = config(**fields)
    kept = set(Transformer(made).state_dict())
    tensors = {name: tensor for name, tensor in (weights() | (change or {})).items() if name in kept}
    family, architecture = choose_family(made)
    write_folder(path, folder_files(made, tensors, family=family, architecture=architecture))
    words(template).save(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("forms") / "model")


ROWS = ["tokens", "vocabulary", "chat template", "logits", "top-1", "greedy text"]


def test_a_copy_and_a_gguf_file(command, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    family, _ = choose_family(config())
    parts = gguf_chunks(config(), weights(), family, vocabulary=to_gguf(words()))
    (tmp_path / "model.gguf").write_bytes(b"".join(bytes(part) for part in parts))
    for other in ("copy", "model.gguf"):
        said = command("verify", folder, other, "--max-tokens", 6, "--json").json
        assert said["agrees"] is True and (said["a"], said["b"]) == (str(folder), other) and said["tolerance"] == 1e-4
        assert [row["name"] for row in said["rows"]] == ROWS
        assert all(row["passed"] and row["difference"] == 0 and row["count"] for row in said["rows"])


def test_a_run_folder_and_its_copy(command, trained, own_run):
    """Its newest checkpoint against the copy's."""
    said = command("verify", trained, own_run, "--max-tokens", 4)
    assert said.code == 0 and "They agree" in said.out and "DIFFERS" not in said.out
    assert command("verify", trained, own_run, "--tolerance", 0, "--max-tokens", 4, "--json").json["tolerance"] == 0


ROW = "decoder.blocks.1.feed_forward.down.weight"


def damaged() -> torch.Tensor:
    weight = weights()[ROW].clone()
    weight[5] += 0.2
    return weight


@pytest.mark.parametrize(
    ("how", "failing", "parts"),
    [
        ({"change": {ROW: damaged()}}, "logits", ["logits, input 1, position 1, logit ", "expected within 0.0001"]),
        ({"template": TEMPLATE + " "}, "chat template", ["chat template, conversation 1, ", "expected no difference"]),
        ({"positions": {"type": "rope", "theta": 99.0}}, "logits", ["positions.theta (10000.0 against 99.0)"]),
        ({"n_layers": 2}, "logits", ["n_layers (3 against 2)"]),
        ({"tokens": {"eos": 1}}, "greedy text", ["ends the text of A alone", "tokens.eos (0 against 1)"]),
    ],
    ids=["weight", "template", "theta", "layer", "end"],
)
def test_each_damage_is_named(command, folder, tmp_path, how, failing, parts):
    """In the table, in the object that comes first, and in one line with exit code 5."""
    other = written(tmp_path / "other", **how)
    steps = 24 if failing == "greedy text" else 3  # until A says its end token
    said = command("verify", folder, other, "--max-tokens", steps, "--json")
    assert said.code == 5
    found = json.loads(said.out)
    assert found["agrees"] is False and found["rows"][-1]["name"] == "greedy text"
    assert next(row["name"] for row in found["rows"] if row["passed"] is False) == failing
    assert all(part in said.error for part in parts), said.error
    assert said.error.startswith(f"error: {other} against {folder}: ")
    plain = command("verify", folder, other, "--max-tokens", steps)
    assert plain.code == 5 and "DIFFERS" in plain.out and "They differ" in plain.out and plain.error == said.error


def test_a_swapped_token(command, folder, tmp_path):
    other = written(tmp_path / "other")
    path = other / "tokenizer.json"
    tree = json.loads(path.read_text())
    vocab = tree["model"]["vocab"]
    vocab["e"], vocab["z"] = vocab["z"], vocab["e"]
    path.write_text(json.dumps(tree))
    said = command("verify", folder, other, "--max-tokens", 2)
    assert (
        said.code == 5 and "tokens, 'Once upon a time" in said.error and "token 4: 71 'e' against 92 'e'" in said.error
    )


def test_the_first_differing_token_is_in_the_object(command, folder, tmp_path):
    """Where the tolerance lets the logits pass, the text decides: prompt, place, both tokens, both leads."""
    other = written(tmp_path / "other", {ROW: damaged()})
    (tmp_path / "prompts.txt").write_text("the old cat\n\nthe mat and the\r\n")
    arguments = ("verify", folder, other, "--prompts", "prompts.txt", "--max-tokens", 20, "--tolerance", "0.001")
    said = command(*arguments, "--json")
    found = json.loads(said.out)
    row = found["rows"][-1]
    assert said.code == 5 and row["name"] == "greedy text" and found["rows"][0]["compared"].startswith("2 prompts")
    figures = row["figures"]
    assert figures["a"] != figures["b"] and figures["prompt"] in (1, 2) and figures["a_gap"] > 0 < figures["b_gap"]
    assert row["detail"].startswith(f"prompt {figures['prompt']}, token {figures['token']}: {figures['a']} ")


def test_both_in_another_dtype(command, folder, tmp_path):
    other = written(tmp_path / "other", {name: value.bfloat16() for name, value in weights().items()})
    mixed = command("verify", folder, other, "--max-tokens", 4, "--json")
    assert json.loads(mixed.out)["tolerance"] == 0.2
    same = command("verify", other, other, "--dtype", "float32", "--max-tokens", 4, "--json").json
    assert same["agrees"] and same["tolerance"] == 1e-4
    # In float32 the rounded weights are what differs, and nothing else forgives it.
    said = command("verify", folder, other, "--dtype", "float32", "--max-tokens", 4, "--json")
    assert said.code == 5 and json.loads(said.out)["rows"][3]["difference"] > 1e-4


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        ([], 2, "0 paths"),
        (["{folder}"], 2, "1 paths"),
        (["{folder}", "{folder}", "{folder}"], 2, "3 paths"),
        (["{folder}", "absent"], 3, "absent"),
        (["{folder}", "{folder}", "--prompts", "absent.txt"], 3, "absent.txt"),
        (["{folder}", "{folder}", "--prompts", "empty.txt"], 3, "empty.txt: 0 prompts"),
        (["{folder}", "{folder}", "--prompts", "binary.txt"], 3, "binary.txt line 2: invalid UTF-8 at byte 4"),
        (["{folder}", "{folder}", "--max-tokens", "0"], 2, "max_tokens"),
        (["{folder}", "{folder}", "--tolerance", "nan"], 2, "tolerance"),
        (["{folder}", "{folder}", "--tolerance", "-1"], 2, "tolerance"),
        (["{folder}", "{folder}", "--dtype", "float31"], 2, "dtype"),
        (["{folder}", "{folder}", "max_tokns=3"], 2, "did you mean 'max_tokens'"),
        (["{folder}", "{trained}"], 3, "compare two forms of one model"),
    ],
)
def test_mistakes_are_named(command, folder, trained, tmp_path, words, code, part):
    (tmp_path / "empty.txt").write_text(" \n\n")
    (tmp_path / "binary.txt").write_bytes(b"one\n\xff\xfe\n")
    said = command("verify", *(word.format(folder=folder, trained=trained) for word in words))
    assert said.code == code and part in said.error


def test_the_module_alone(folder, capfd):
    """Without the command around it."""
    verify.run(verify.Options(words=[str(folder), str(folder)], max_tokens=2))
    assert "They agree" in capfd.readouterr().out


def test_the_module_raises_after_the_table(folder, tmp_path, capfd):
    other = written(tmp_path / "other", {ROW: damaged()})
    with pytest.raises(DivergedError) as caught:
        verify.run(verify.Options(words=[str(folder), str(other)], max_tokens=2))
    assert caught.value.exit_code == 5 and "DIFFERS" in capfd.readouterr().out
