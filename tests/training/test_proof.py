"""`headway train --resume RUN --prove N`: steps done again give the numbers and the bytes of the first time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pytest import CaptureFixture

from headway.checkpoints.folder import list_checkpoints
from headway.cli.main import main
from headway.files import remove_tree

from objective_cases import CASES, config, rows_file  # isort: skip
from headway.launch import train  # isort: skip

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Six steps with dropout, two passes and an average, saved after the third and the last."""
    make, fields, _ = CASES["sequence to sequence"]
    numbers = {"accumulation": 2, "ema": 0.9, "dtype": "float32"}
    whole = config(rows_file(tmp_path, make), {**fields, "output": str(tmp_path / "run")}, **numbers)
    whole["model"] = {**whole["model"], "dropout": 0.1}
    train(whole)
    return tmp_path / "run"


def proved(run: Path, steps: int, capsys: CaptureFixture[str]) -> tuple[int, dict[str, object], str]:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    code = main(["train", "--resume", str(run), "--prove", str(steps), "--json"])
    said = capsys.readouterr()
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "run.lock"} == {
        path: data for path, data in before.items() if path.name != "run.lock"
    }
    return code, json.loads(said.out)["proof"] if code == 0 else {}, said.err


def test_a_run_repeats_itself(run: Path, capsys: CaptureFixture[str]) -> None:
    code, proof, _ = proved(run, 20, capsys)
    newest = list_checkpoints(run)[-1][1]
    assert code == 0 and proof == {"first": 4, "last": 6, "compared": 3, "checkpoint": str(newest)}
    code, proof, _ = proved(run, 2, capsys)
    assert code == 0 and proof == {"first": 4, "last": 5, "compared": 2, "checkpoint": None}


def test_control_another_number_is_seen(run: Path, capsys: CaptureFixture[str]) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows:
        if row["event"] == "step" and row["step"] == 5:
            row["loss"] += 1e-7
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, said = proved(run, 20, capsys)
    assert code == 5 and "step 5: loss" in said


def test_control_other_bytes_are_seen(run: Path, capsys: CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Another rate gives other weights after the last step, though its loss was computed before."""
    from headway.training import loop

    original = loop.scale
    monkeypatch.setattr(loop, "scale", lambda step, train: original(step, train) * (0.999 if step == 5 else 1.0))
    code, _, said = proved(run, 20, capsys)
    assert code == 5 and "sha256" in said and "model.safetensors" in said


def test_one_checkpoint_proves_nothing(run: Path, capsys: CaptureFixture[str]) -> None:
    remove_tree(list_checkpoints(run)[0][1])
    code, _, said = proved(run, 20, capsys)
    assert code == 3 and "1 checkpoint" in said
    assert main(["train", f"data.path={run.parent / 'rows.jsonl'}", "--prove", "3"]) == 2
