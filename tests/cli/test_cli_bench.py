"""`headway bench decode`: the figures that scripts read, and how they hang together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_loading import published

import headway
from headway import saving
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
        "first token", "decode", "read", "memory", "load before, after",
    ]  # fmt: skip


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
    ],
)
def test_wrong_options(command, model: Path, words: list[str], part: str) -> None:
    said = command("bench", *(model if word == "MODEL" else word for word in words))
    assert said.code == 2 and part in said.error
