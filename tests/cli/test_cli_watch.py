"""`headway watch`: the curve is the data, a resumed run is one run, the page holds no markup of the run's texts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from headway.cli.watch import braille, page, points_of, summary


def step(number: int, loss: float | None, eta: float = 9.0) -> dict[str, object]:
    return {
        "event": "step",
        "step": number,
        "loss": loss,
        "lr": 0.1,
        "grad_norm": 1.0,
        "tokens": 8,
        "tokens_per_second": 100.0,
        "share_of_peak": None,
        "memory": 10**8,
        "eta": eta,
        "applied": True,
    }


ROWS = [
    *(step(n, 4.0 / n) for n in range(1, 21)),
    {"event": "eval", "step": 10, "loss": 0.5, "bits_per_byte": 0.7, "tokens": 9, "best": True, "sample": "<b>x</b>"},
    {"event": "eval", "step": 20, "loss": 0.6, "bits_per_byte": 0.8, "tokens": 9, "best": False, "sample": None},
    {"event": "warning", "step": 12, "kind": "spike", "text": "<i>loss</i>"},
    step(21, None, eta=0.0),
]


def dots(lines: list[str]) -> set[tuple[int, int]]:
    """(column, row) of every dot, from the top left."""
    places = {0: (0, 0), 1: (0, 1), 2: (0, 2), 3: (1, 0), 4: (1, 1), 5: (1, 2), 6: (0, 3), 7: (1, 3)}  # Unicode's bits
    return {
        (2 * column + places[bit][0], 4 * row + places[bit][1])
        for row, line in enumerate(lines)
        for column, letter in enumerate(line)
        for bit in range(8)
        if ord(letter) - 0x2800 >> bit & 1
    }


def test_a_curve_is_its_points() -> None:
    points = [(float(x), float(y)) for x, y in ((0, 3), (1, 2), (2, 1), (3, 0))]
    assert dots(braille(points, 2, 1)) == {(0, 0), (1, 1), (2, 2), (3, 3)}, "down from the left"
    assert dots(braille([(x, -y) for x, y in points], 2, 1)) == {(0, 3), (1, 2), (2, 1), (3, 0)}, "and up"
    assert len(braille(points, 30, 5)) == 5 and all(len(line) == 30 for line in braille(points, 30, 5))
    assert braille([], 10, 2) == [] and dots(braille([(1.0, 7.0)], 4, 2)) == {(0, 0)}


def test_figures_are_those_of_the_records() -> None:
    found = summary(ROWS)
    assert found["last"]["step"] == 21 and found["best"]["step"] == 10 and found["evaluation"]["step"] == 20
    assert found["warnings"] == {"spike": 1}
    assert points_of(ROWS, "loss")[-1] == (20.0, 0.2), "a step without labels has no loss"


def test_the_page_shows_everything_and_runs_nothing() -> None:
    text = page(Path("runs/<x>"), ROWS)
    assert text.count("<svg") == 5 and "&lt;b&gt;x" in text and "&lt;i&gt;loss" in text and "run &lt;x&gt;" in text
    assert "<b>x" not in text and "<script" not in text and "best 0.5 at step 10" in text


def test_the_command_reads_a_run_and_says_when_there_is_none(command, trained, tmp_path: Path) -> None:
    said = command("watch", trained)
    assert said.code == 0 and "loss: now" in said.out and "held out" in said.out
    file = tmp_path / "report.html"
    assert command("watch", trained, "--html", file, "--follow").code == 0 and "<svg" in file.read_text()
    assert command("watch", trained, "--json").json["last"]["step"] == 40
    said = command("watch", tmp_path / "nothing")
    assert said.code == 3 and "metrics.jsonl" in said.error


@pytest.mark.parametrize("rows", [[], [{"event": "checkpoint", "step": 0}]])
def test_a_run_that_has_not_begun_says_so(command, tmp_path: Path, rows: list[dict[str, object]]) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = command("watch", tmp_path)
    assert said.code == 3 and "no step yet" in said.error and "--follow" in said.error
