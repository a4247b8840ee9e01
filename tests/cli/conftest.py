"""One small trained run, and the command in this process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from headway.cli.main import main

WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "saw", "seven", "small", "birds", "near", "an", "old", "tree")


def corpus_text(lines: int = 400) -> str:
    """Regular enough to be learnt in a few steps: every word is followed by one of two others."""
    state, out = 1, []
    for _ in range(lines):
        line = []
        for _ in range(8):
            state = (state * 1103515245 + 12345) % 2**31
            line.append(WORDS[(len(line) * 2 + (state >> 16) % 2) % len(WORDS)])
        out.append(" ".join(line) + ".")
    return "\n".join(out) + "\n"


class Said(NamedTuple):
    """What a command left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict:
        """stdout as the one JSON object it must be."""
        assert self.code == 0, self.err
        assert self.out.count("\n") == 1 and self.out.endswith("\n"), self.out
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The one line of an error."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert self.code and len(lines) == 1 and self.err.rstrip().endswith(lines[0]), (self.code, self.err)
        assert "Traceback" not in self.err
        return lines[0]


Command = Callable[..., Said]


@pytest.fixture(autouse=True)
def _at_rest(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The made-up machine, an empty working folder, and threads as they were."""
    monkeypatch.setenv("HEADWAY_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Command:
    """Run the command in this process."""

    def call(*arguments: object) -> Said:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        return Said(code, *capfd.readouterr())

    return call


SMALL = (
    "data.context=32",
    "model.d_model=32",
    "model.n_layers=2",
    "model.n_heads=2",
    "train.batch_size=8",
    "train.sample_tokens=8",
    "tokenizer.vocab_size=300",
)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text(corpus_text())
    return path


@pytest.fixture(scope="session")
def trained(cache: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of forty steps. Never change it: see `own_run`."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    code = main(["train", f"data.path={corpus}", *SMALL, "train.steps=40", "--output", str(folder)])
    torch.set_num_threads(1)
    assert code == 0
    return folder


@pytest.fixture
def own_run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained run that a test may break."""
    return Path(shutil.copytree(trained, tmp_path / "run"))
