"""`headway demo`: the whole way at a small size, on a part of this Python's own documentation."""

from __future__ import annotations

import pytest

from headway.checkpoints.folder import CONFIG
from headway.cli import demo

from conftest import SMALL  # isort: skip


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty documents instead of two thousand."""
    every = list(demo.documents())
    monkeypatch.setattr(demo, "documents", lambda: iter(every[:40]))
    monkeypatch.setattr(demo.Path, "is_file", lambda path: path.suffix != ".jsonl" and path.exists())


def test_documents_are_real_and_many():
    names = [name for name, _ in demo.documents()]
    assert len(names) > 500 and len(set(names)) == len(names)
    assert {name.split()[0] for name in names} == {"topic", "docstrings", "source"}
    assert not [name for name in names if "/test/" in name or "pydoc_data" in name]


def test_the_whole_way(command, little, tmp_path):
    words = [*(word for word in SMALL if "vocab" not in word), "data.val_fraction=0.3", "train.steps=30"]
    said = command("demo", "--output", tmp_path / "d", *words, "--json").json
    figure = said["evaluation"]["bits_per_byte"]
    assert figure["low"] < figure["value"] < figure["high"] < 8 and said["evaluation"]["units"] == "documents"
    assert list(said["texts"]) == list(demo.PROMPTS) and all(said["texts"].values())
    assert (tmp_path / "d" / "loss.svg").is_file() and (tmp_path / "d" / "loss.png").is_file()
    again = command("demo", "--output", tmp_path / "d", *words)  # a demo may replace a demo
    assert again.code == 0 and "Next:" in again.out and "headway generate" in again.out


def test_it_replaces_nothing_but_a_demo(command, little, own_run, tmp_path):
    assert not demo.is_own(own_run) and (own_run / CONFIG).is_file()
    said = command("demo", "--output", own_run, "--budget", "1s")
    assert said.code == 4 and "--overwrite" in said.error
    assert command("demo", "book.txt").code == 2
