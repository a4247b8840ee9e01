"""Loggers get a run's events once each, and can neither stop a run nor change it.

The packages are stood in for by fakes; docs/log.md has the run with the real ones.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from logger_fakes import MODULES, Board, install
from tiny_runs import Run, checkpoint_bytes, train_config

from headway.cli.main import main
from headway.errors import ConfigError, MachineError
from headway.run_config import load_run
from headway.training import loop
from headway.training.events import EvalEvent, Event, HealthEvent, StepEvent, WarningEvent
from headway.training.loggers import Begin, Loggers, values
from headway.training.metrics import METRICS, read_metrics
from headway.training.world import World

BOTH = ("tensorboard", "wandb")


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> Board:
    return install(monkeypatch)


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No plots, and nobody's W&B account."""
    monkeypatch.setattr(loop, "write_loss_curve", lambda folder: None)
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def config(**fields: Any) -> Any:
    return train_config(checkpoint_every=2, eval_every=3, **{"loggers": BOTH, **fields})


def test_the_names_of_values_are_those_of_the_metrics_file() -> None:
    event = HealthEvent(3, {"head": 1.0}, {"decoder.blocks.0": 2.0}, {})
    assert dict(values(event)) == {"health/gradients/head": 1.0, "health/activations/decoder.blocks.0": 2.0}
    found = dict(values(EvalEvent(3, None, 1.5, 9, True, "text", {"a.txt": 2.0})))
    assert found == {
        "eval/bits_per_byte": 1.5,
        "eval/tokens": 9.0,
        "eval/best": 1.0,
        "eval/sample": "text",
        "eval/sources/a.txt": 2.0,
    }


def test_both_get_what_the_metrics_file_holds(tmp_path: Path, board: Board) -> None:
    run = Run(tmp_path / "run", config(), sample=lambda: "some text")
    run.fit()
    rows = [row for row in read_metrics(run.folder / METRICS) if row["event"] == "step"]
    for logger in BOTH:
        found = [(step, value) for one, name, value, step in board.said if (one, name) == (logger, "step/loss")]
        assert found == [(row["step"], row["loss"]) for row in rows] and len(found) == 6
        assert board.steps(logger, "eval/sample") == [3, 6] and board.closed.count(logger) == 1
    assert board.began[0] == {"log_dir": str(run.folder / "tensorboard"), "purge_step": None}
    began = board.began[1]
    assert (began["project"], began["dir"], began["resume"]) == ("headway", str(run.folder), "allow")
    assert began["config"]["train"]["lr"] == 0.01 and began["id"] is None
    assert json.loads((run.folder / "wandb.json").read_text()) == {"id": "run2"}


class Killed(Exception):
    """As a power cut: nothing of ours runs afterwards."""


def test_after_a_resume_nothing_is_logged_twice(tmp_path: Path, board: Board) -> None:
    run = Run(tmp_path / "run", config())

    def stop(event: Event) -> None:
        if isinstance(event, StepEvent) and event.step == 5:
            raise Killed

    run.on_event = stop
    with pytest.raises(Killed):
        run.fit()
    first = board.steps("wandb", "step/loss")
    again = Run(run.folder, config())
    again.fit("must")
    assert board.steps("wandb", "step/loss") == [1, 2, 3, 4, 5, 6] and first == [1, 2, 3, 4, 5]
    assert board.steps("wandb", "eval/loss") == [3, 6]
    everything = [step for logger, _, _, step in board.said if logger == "wandb"]
    assert everything == sorted(everything), "wandb drops a step below the last one"
    assert [one["id"] for one in board.began if "id" in one] == [None, "run2"]
    # TensorBoard's reader drops what lies at this step and beyond, so there they come again.
    assert board.began[2]["purge_step"] == 5
    assert board.steps("tensorboard", "step/loss") == [1, 2, 3, 4, 5, 5, 6]


def test_a_logger_switched_on_later_gets_the_steps_from_then_on(tmp_path: Path, board: Board) -> None:
    Run(tmp_path / "run", config(loggers=(), steps=4)).fit()
    again = Run(tmp_path / "run", config(steps=6))
    again.fit("must", override=True)
    assert board.steps("wandb", "step/loss") == [5, 6] and board.began[1]["id"] is None


@pytest.mark.fault("R20")
@pytest.mark.parametrize("name", BOTH)
def test_one_that_fails_costs_a_warning_and_nothing_else(tmp_path: Path, board: Board, name: str) -> None:
    board.breaks_at[name] = 3
    run = Run(tmp_path / "run", config())
    assert run.fit().stopped == "done"
    warnings: list[WarningEvent] = run.said(WarningEvent)
    assert [event.kind for event in warnings] == ["logger"] and f"{name} failed (ConnectionError" in warnings[0].text
    other = BOTH[BOTH.index(name) - 1]
    assert board.steps(other, "step/loss") == [1, 2, 3, 4, 5, 6] and max(board.steps(name, "step/loss"), default=0) < 3
    assert board.closed == [other]
    plain = Run(tmp_path / "plain", config(loggers=BOTH))
    board.breaks_at = {}
    plain.fit()
    last = "checkpoints/step-00000006"
    assert checkpoint_bytes(run.folder / last) == checkpoint_bytes(plain.folder / last)


def test_one_that_cannot_begin_is_an_error_before_the_first_step(tmp_path: Path, board: Board) -> None:
    board.breaks_at["wandb"] = -1
    run = Run(tmp_path / "run", config())
    with pytest.raises(MachineError, match=r"^train\.loggers: wandb cannot begin: ConnectionError") as caught:
        run.fit()
    assert "WANDB_MODE=offline" in caught.value.fix and not run.events


@pytest.mark.fault("R20")
@pytest.mark.parametrize("name", BOTH)
def test_a_missing_package_is_an_error_before_anything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.setitem(sys.modules, MODULES[name], None)
    output = tmp_path / "run"
    code = main(["train", f"data.path={tmp_path / 'none.txt'}", f"train.loggers={name}", f"output={output}"])
    said = capsys.readouterr().err
    assert code == 2 and said.startswith("error: train.loggers: ") and f"pip install 'headway[{name}]'" in said
    assert said.count("\n") == 1 and not output.exists()


def test_a_folder_of_that_name_is_not_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`wandb/`, which earlier runs leave where they are started, is a module to Python."""
    monkeypatch.setitem(sys.modules, "wandb", ModuleType("wandb"))
    with pytest.raises(ConfigError, match="has no init"):
        Loggers(["wandb"], Begin(tmp_path, {}), print)


def test_only_the_first_process_logs(tmp_path: Path, board: Board) -> None:
    trainer = Run(tmp_path / "run", config()).trainer()
    trainer.world = World(rank=1)
    trainer.fit()
    assert not board.began and not board.said


@pytest.mark.parametrize(
    ("environment", "login", "mode"),
    [
        ({}, "", "offline"),
        ({}, "machine example.org login user password x\n", "offline"),
        ({}, "machine api.wandb.ai login user password x\n", None),
        ({"WANDB_BASE_URL": "https://wb.example.org:8080"}, "machine api.wandb.ai login user password x\n", "offline"),
        ({"WANDB_BASE_URL": "https://wb.example.org:8080"}, "machine wb.example.org login u password x\n", None),
        ({}, "machine\n", "offline"),
        ({"WANDB_MODE": "online"}, "", None),
        ({"WANDB_API_KEY": "x"}, "", None),
    ],
)
def test_wandb_reaches_no_network_unless_somebody_said_so(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    board: Board,
    environment: dict[str, str],
    login: str,
    mode: str | None,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "home").mkdir()
    if login:
        (tmp_path / "home" / ".netrc").write_text(login)
        (tmp_path / "home" / ".netrc").chmod(0o600)
    Loggers(["wandb"], Begin(tmp_path, {}), print)
    assert board.began[0]["mode"] == mode


def test_the_key_is_a_list_or_a_word() -> None:
    assert load_run([], ["train.loggers=wandb"], {}).run.train.loggers == ("wandb",)
    assert load_run([], ["train.loggers=[tensorboard, wandb]"], {}).run.train.loggers == BOTH
    with pytest.raises(ConfigError, match=r"train\.loggers.*did you mean 'tensorboard'"):
        load_run([], ["train.loggers=tensorbord"], {})
