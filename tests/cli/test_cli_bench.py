"""`headway bench decode`: the figures that scripts read, and how they hang together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_loading import published

import headway
from headway import peers, saving
from headway.cli import bench
from headway.generation import speed
from headway.machine import Probe


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model in 8 bits, on a machine whose limits are known."""
    known = Probe("x", 1, "2.13", "cpu", 0.0, {"float32": {1: 1.0}}, {1: 4.0}, {1: 4.0}, 1e-6)
    monkeypatch.setattr("headway.machine.probe", lambda device: known)
    original = headway.load(published(tmp_path / "in", "LlamaForCausalLM-tied"))
    return saving.save(original, tmp_path / "model.gguf", "gguf", dtype="q8_0")


def test_the_figures_hang_together(command, model: Path) -> None:
    words = ("--prompt-tokens", 5, "--new-tokens", 6, "--rounds", 2, "--threads", 1, "--batch-size", 2)
    found = command("bench", "decode", model, *words, "--json").json
    assert found["prefill_tokens_per_second"] == pytest.approx(10 / found["first_token_seconds"])
    low, high = found["spread"]
    assert 0 < low <= found["decode_tokens_per_second"] <= high
    assert found["bytes_per_second"] == pytest.approx(found["decode_tokens_per_second"] / 2 * found["bytes_per_step"])
    assert found["share_of_bandwidth"] == pytest.approx(found["bytes_per_second"] / 4e9)
    assert found["peak_memory"] > 2**20 and found["threads"] == 1 and len(found["load"]) == 2
    torch.set_num_threads(2)


def test_for_people(command, model: Path) -> None:
    said = command("bench", "decode", model, "prompt-tokens=4", "new-tokens=4", "rounds=1")
    assert said.code == 0
    assert [line.split("  ")[0] for line in said.out.splitlines()] == [
        "first token", "decode", "read", "a step reads", "memory", "load before, after",
    ]  # fmt: skip


@pytest.mark.parametrize(("what", "unit"), [("prefill", "tokens"), ("batch", "tokens"), ("embed", "texts")])
def test_other_measures(command, model: Path, tmp_path: Path, what: str, unit: str) -> None:
    (tmp_path / "texts.txt").write_text("a line\nanother one\n\nthe third\n")
    words = ("--prompt-tokens", 8, "--new-tokens", 4, "--rounds", 3, "--texts", tmp_path / "texts.txt", "--json")
    found = command("bench", what, model, *words).json
    low, high = found["spread"]
    assert found["what"] == what and 0 < low <= found[f"{unit}_per_second"] <= high
    assert found["against"] == {} and found["peak_memory"] > 2**20
    assert ("share_of_peak" in found) is (what != "batch")


def test_without_texts_it_reads_docstrings(command, model: Path) -> None:
    assert command("bench", "embed", model, "--rounds", 1, "--json").json["texts_per_second"] > 0


@pytest.mark.parametrize("what", ["decode", "prefill", "batch"])
def test_beside_others(command, model: Path, tmp_path: Path, what: str) -> None:
    """Real ones, as far as they are installed; a plot of the same figures."""
    words = ("--prompt-tokens", 6, "--new-tokens", 5, "--rounds", 2, "--output", tmp_path / "plot.svg", "--json")
    said = command("bench", what, model, "--against", "llama.cpp, transformers", *words)
    found = said.json
    assert list(found["against"]) == ["llama.cpp", "transformers"] and found["absent"] == {}
    for other in found["against"].values():
        assert 0 < other["low"] <= other["median"] <= other["high"]
        assert other["ratio"] == pytest.approx(found["tokens_per_second"] / other["median"])
    drawn = (tmp_path / "plot.svg").read_text()
    assert all(f">{name}</text>" in drawn for name in ("headway", "llama.cpp", "transformers"))


def test_all_who_are_offered_are_known() -> None:
    """The command names them without importing what asks them."""
    assert list(bench.AGAINST) == list(peers.PEERS)


def test_a_longer_text_gets_room(model: Path, tmp_path: Path) -> None:
    """What is asked after a short text may need a larger context than the server has."""
    peer = peers.LlamaCpp(peers.Given(headway.load(model), tmp_path, 1))
    assert peer.write(peers.Work([[5, 6, 7]] * 2, 1)) > 0 and peer._tokens == 1024
    peer._tokens = 8
    assert peer.write(peers.Work([[5, 6, 7]] * 2, 20)) > 0 and peer._tokens == 32


def test_who_is_not_there_is_not_asked(command, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not installed, does something else, or cannot load the model, by its reason."""

    class Broken(peers.Peer):
        package = "headway"
        does = peers.WRITING

        def __init__(self, given: peers.Given) -> None:
            raise KeyError("factor")

    monkeypatch.setattr(peers.OpenVino, "package", "a_package_that_nobody_has")
    monkeypatch.setitem(peers.PEERS, "ctranslate2", Broken)
    words = ("--prompt-tokens", 4, "--new-tokens", 4, "--rounds", 1, "--json")
    said = command("bench", "prefill", model, "--against", "openvino,ctranslate2", *words)
    assert said.json["absent"] == {
        "openvino": "is not installed (pip install a-package-that-nobody-has)",
        "ctranslate2": "cannot load it: KeyError: 'factor'",
    }
    assert said.err.count("note: ") == 2
    said = command("bench", "batch", model, "--against", "openvino", *words)
    assert said.json["absent"] == {"openvino": "is not asked for batch here"}


def test_what_a_step_reads(model: Path) -> None:
    """A tied table is read whole by the head; one of its own is only looked up."""
    loaded = headway.load(model, dtype="float32")
    all_of_it = sum(p.nbytes for p in loaded.model.parameters())
    assert speed.weight_bytes(loaded.model) == all_of_it
    config = loaded.config.model_dump() | {"embeddings": {"tied": False}}
    apart = headway.build(config)
    assert (
        speed.weight_bytes(apart) == sum(p.nbytes for p in apart.parameters()) - apart.embeddings.tokens.weight.nbytes
    )
    packed = headway.load(model)
    assert speed.weight_bytes(packed.model) < 0.4 * all_of_it  # 8.5 bits of 32, in whole blocks of 16 rows


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["decode"], "headway bench decode PATH"),
        (["decod", "x"], "did you mean 'decode'"),
        (["decode", "MODEL", "--new-tokens", "100000"], "together at most"),
        (["decode", "MODEL", "--dtype", "int3"], "stored, float32"),
        (["decode", "MODEL", "--against", "lama.cpp"], "did you mean 'llama.cpp'"),
        (["prefill", "MODEL", "--output", "plot.pdf"], ".svg or .png"),
    ],
)
def test_wrong_options(command, model: Path, words: list[str], part: str) -> None:
    said = command("bench", *(model if word == "MODEL" else word for word in words))
    assert said.code == 2 and part in said.error
