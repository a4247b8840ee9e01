"""Where the values of a run come from, in the corners: replaced sections, lists, pairs, keys in two spellings."""

from __future__ import annotations

from pathlib import Path

import pytest

from headway.errors import ConfigError
from headway.run_config import load_run


def file(folder: Path, content: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(content)
    return path


@pytest.mark.fault("F10")
def test_a_section_replaced_as_a_whole_forgets_the_origins_of_its_keys(tmp_path: Path) -> None:
    path = file(tmp_path, "model:\n  positions: {type: rope, theta: 5.0}\n")
    resolved = load_run([path], ["model.positions=alibi"], {})
    assert resolved.origins == {"model.positions": "command line"} and resolved.run.model == {"positions": "alibi"}


@pytest.mark.parametrize(
    ("content", "where"),
    [
        ("model:\n  attention:\n    pattern: [causal, x]\n", "line 3: model.attention.pattern.1"),
        ("train:\n  steps: 3\n  warmup: 9\n", "line 3: train.warmup and train.steps"),
        ("train:\n  lr: 1.0\ntrain.lr: 2.0\n", "train.lr"),
    ],
)
def test_a_finding_in_a_file_has_its_line(tmp_path: Path, content: str, where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run([file(tmp_path, content)], [], {})
    assert caught.value.where.endswith(where)


@pytest.mark.parametrize("words", [["budget=٣m"], ["train.device=cuda:٣"]])
def test_only_our_own_digits_are_digits(words: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"of the form"):
        load_run([], words, {})
