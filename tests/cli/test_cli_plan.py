"""`headway plan`: train's own arguments, nothing written, figures that a program can use."""

from __future__ import annotations

from pathlib import Path

from conftest import SMALL


def test_plan_says_what_a_run_takes_and_writes_nothing(command, corpus, tmp_path: Path) -> None:
    said = command("plan", f"data.path={corpus}", *SMALL, "train.steps=4", "--output", tmp_path / "run", "--json")
    assert said.code == 0 and not (tmp_path / "run").exists()
    found = said.json
    assert found["seconds"] == found["seconds_per_step"] * 4 and found["largest_rows"] >= 1
    assert found["peak_bytes"] > sum(found["memory"][name] for name in ("program and data", "weights", "optimizer"))
    words = command("plan", f"data.path={corpus}", *SMALL, "train.steps=4").out
    assert "at the worst moment" in words and "a step" in words and "rows fit" in words


def test_a_wrong_key_is_trains_own_error(command, corpus) -> None:
    said = command("plan", f"data.path={corpus}", "train.stepz=4")
    assert said.code == 2 and "did you mean 'steps'" in said.error
