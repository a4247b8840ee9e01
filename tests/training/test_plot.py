"""The loss curve: well-formed SVG, a PNG that a reader reads, any data drawn, the same bytes every time."""

from __future__ import annotations

import builtins
import io
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from matplotlib import image

from headway.errors import InputError, MachineError
from headway.training.plot import draw, loss_series, smooth, write_loss_curve

SVG = "{http://www.w3.org/2000/svg}"


def rows(steps: int) -> list[dict[str, object]]:
    out: list[dict[str, object]] = []
    for step in range(1, steps + 1):
        out.append({"event": "step", "step": step, "loss": 1 + 5 / step})
        if step % 10 == 0:
            out.append({"event": "eval", "step": step, "loss": 1.1 + 5 / step})
    return out


def drawn(data: list[dict[str, object]]) -> dict[str, bytes]:
    return draw(loss_series(data), "loss", "step", "nats per token", log_x=True)


def test_svg_is_well_formed_and_names_its_axes_and_lines() -> None:
    words = [node.text for node in ElementTree.fromstring(drawn(rows(200))["svg"]).iter(f"{SVG}text")]
    assert {"loss", "step", "nats per token", "validation 1.125"} <= set(words)
    assert any(word and word.startswith("training 1.0") for word in words)


@pytest.mark.parametrize(
    "data",
    [
        [],
        rows(1),
        [{"event": "step", "step": 1, "loss": None}],
        [{"event": "step", "step": s, "loss": 2.0} for s in (1, 2, 3)],
        [{"event": "step", "step": s, "loss": 1e-9 * s} for s in range(1, 9)],
        [{"event": "step", "step": s, "loss": 1e12 / s} for s in range(1, 9)],
        rows(5000),
    ],
)
def test_any_data_can_be_drawn(data: list[dict[str, object]]) -> None:
    out = drawn(data)
    ElementTree.fromstring(out["svg"])
    pixels = image.imread(io.BytesIO(out["png"]))
    assert pixels.shape[:2] == (660, 1140) and pixels[..., :3].std() > 0.01


def test_smoothing_keeps_the_level() -> None:
    assert all(y == pytest.approx(2.0) for _, y in smooth([(float(x), 2.0) for x in range(1, 10_000)]))


def test_files_beside_the_metrics(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        write_loss_curve(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(row) for row in rows(30)) + "\n{broken")
    svg, png = write_loss_curve(tmp_path)
    again = svg.read_bytes(), png.read_bytes()
    write_loss_curve(tmp_path)
    assert again == (svg.read_bytes(), png.read_bytes()), "the same data, the same bytes"


def test_without_matplotlib_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return honest(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MachineError, match=r"pip install 'headway\[plots\]'"):
        draw([], "t", "x", "y")
