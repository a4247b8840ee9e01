"""Events, their file, and the meter."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from headway.errors import InputError
from headway.strict import strict_json
from headway.training import throughput
from headway.training.events import CheckpointEvent, EvalEvent, ResumeEvent, StepEvent, WarningEvent, record
from headway.training.metrics import MetricsLog, read_metrics
from headway.training.throughput import Meter


def step(number: int, loss: float | None = 1.0) -> StepEvent:
    return StepEvent(number, loss, 0.1, 2.0, 64, 1000.0, None, 1, 3.0)


def test_records_are_strict_json_whatever_the_numbers() -> None:
    events = [
        step(1, math.nan),
        EvalEvent(2, math.inf, None, 0, False, "a\u2028\ud83d\ude00\n"),
        CheckpointEvent(3, Path("/tmp/a b"), 0.5),
        ResumeEvent(3, Path("x")),
        WarningEvent(4, "spike", "é"),
    ]
    rows = [record(event) for event in events]
    assert [row["event"] for row in rows] == ["step", "eval", "checkpoint", "resume", "warning"]
    assert rows[0]["loss"] is None and rows[1]["loss"] is None and rows[2]["path"] == "/tmp/a b"


def test_lines_wait_and_survive_a_torn_end(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, warn=lambda text: pytest.fail(text), every=3600)
    log.add(step(1))
    assert not path.exists()
    log.flush()
    with path.open("a") as file:
        file.write('{"event":"step","step":2,"lo')  # killed while writing
    again = MetricsLog(path, warn=lambda text: pytest.fail(text), every=0)
    again.add(ResumeEvent(1, Path("c")))
    again.add(step(2))
    again.flush()
    assert [(row["event"], row["step"]) for row in read_metrics(path)] == [("step", 1), ("resume", 1), ("step", 2)]
    good = [line for line in path.read_text().splitlines() if line.endswith("}")]
    assert len(good) == 3 and all(strict_json(line, "line") for line in good)


def test_a_resume_voids_what_lies_beyond_it(tmp_path: Path) -> None:
    path = tmp_path / "m"
    log = MetricsLog(path, warn=print, every=0)
    for number in range(1, 8):
        log.add(step(number))
    for event in (ResumeEvent(5, Path("c")), step(6, 9.0), ResumeEvent(5, Path("c")), step(6, 8.0)):
        log.add(event)
    log.flush()
    steps = [(row["step"], row["loss"]) for row in read_metrics(path) if row["event"] == "step"]
    assert steps == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0), (5, 1.0), (6, 8.0)]
    with pytest.raises(InputError):
        read_metrics(tmp_path / "none")


def test_the_meter_counts_training_time_only(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    meter = Meter(6e6, 1.2e10, memory=lambda: 7)
    for _ in range(4):
        now[0] += 0.5
        meter.add(500)
    assert meter.tokens_per_second == pytest.approx(1000) and meter.share_of_peak == pytest.approx(0.5)
    assert meter.eta(10) == pytest.approx(5) and meter.memory == 7
    now[0] += 30  # an evaluation
    meter.restart()
    now[0] += 0.5
    meter.add(500)
    assert meter.tokens_per_second == pytest.approx(1000) and meter.eta(10) == pytest.approx(5)
    for _ in range(40):  # the machine slows down; after ten seconds only the new pace counts
        now[0] += 1
        meter.add(500)
    assert meter.tokens_per_second == pytest.approx(500) and meter.eta(2) == pytest.approx(2)
    assert Meter(None, 1e9).share_of_peak is None and Meter(1e6, None).share_of_peak is None


def test_resident_bytes_are_real() -> None:
    assert 50e6 < throughput.resident_bytes() < 50e9
