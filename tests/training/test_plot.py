"""The loss curve: well-formed SVG, a PNG that other decoders read, sane layout for any data."""

from __future__ import annotations

import json
import math
import struct
import zlib
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from headway.errors import InputError
from headway.training.plot import Series, chart, loss_chart, smooth, thin, to_png, to_svg, write_loss_curve
from headway.training.raster import Canvas, text_strokes, text_width

SVG = "{http://www.w3.org/2000/svg}"


def decode_png(data: bytes) -> np.ndarray:
    """Our own PNGs only: 8-bit RGB, filter 0."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, parts = 8, {}
    while at < len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 8 : at + 8 + size]
        assert struct.unpack(">I", data[at + 8 + size : at + 12 + size])[0] == zlib.crc32(kind + body)
        parts[kind] = body
        at += 12 + size
    width, height, depth, color = struct.unpack(">IIBB", parts[b"IHDR"][:10])
    assert (depth, color) == (8, 2)
    rows = np.frombuffer(zlib.decompress(parts[b"IDAT"]), np.uint8).reshape(height, 1 + 3 * width)
    assert not rows[:, 0].any()
    return rows[:, 1:].reshape(height, width, 3)


def rows(steps: int) -> list[dict[str, object]]:
    out: list[dict[str, object]] = []
    for step in range(1, steps + 1):
        out.append({"event": "step", "step": step, "loss": 1 + 5 / step})
        if step % 10 == 0:
            out.append({"event": "eval", "step": step, "loss": 1.1 + 5 / step})
    return out


def test_svg_is_well_formed_and_names_its_axes() -> None:
    tree = ElementTree.fromstring(to_svg(loss_chart(rows(200))))
    words = [node.text for node in tree.iter(f"{SVG}text")]
    assert {"loss", "step", "nats per token", "1", "10", "100"} <= set(words)
    assert any(word and word.startswith("training 1.0") for word in words)
    assert "validation 1.125" in words
    assert len(list(tree.iter(f"{SVG}polyline"))) >= 3 and len(list(tree.iter(f"{SVG}circle"))) == 20


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
def test_any_data_can_be_drawn_inside_the_frame(data: list[dict[str, object]]) -> None:
    marks = loss_chart(data)
    for node in ElementTree.fromstring(to_svg(marks)).iter():
        for x, y in (pair.split(",") for pair in node.get("points", "").split()):
            assert math.isfinite(float(x)) and -1 <= float(x) <= 761 and -1 <= float(y) <= 441
    assert decode_png(to_png(marks)).shape == (880, 1520, 3)


def test_png_agrees_with_matplotlibs_reader(tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    data = to_png(chart([Series("a", [(1, 1), (2, 4)], "#0072b2")], "t", "x", "y"))
    (tmp_path / "a.png").write_bytes(data)
    assert np.array_equal((image.imread(tmp_path / "a.png")[..., :3] * 255).round().astype(np.uint8), decode_png(data))


def test_a_stroke_covers_its_area_with_smooth_edges() -> None:
    canvas = Canvas(100, 40)
    canvas.draw([[(20, 20), (80, 20)]], "#000000", 6)
    ink = (255 - canvas.pixels[..., 0]) / 255
    assert ink.sum() == pytest.approx(60 * 6 + math.pi * 9, rel=0.02)  # the line and its two round ends
    assert ((ink > 0.01) & (ink < 0.99)).any()
    before = canvas.pixels.copy()
    canvas.draw([], "#ff0000", 3)
    canvas.draw([[(-50, -50), (-40, -20)]], "#ff0000", 3)
    assert np.array_equal(before, canvas.pixels)


def test_text_is_as_wide_as_measured_and_every_letter_has_strokes() -> None:
    for word in ("training", "0123456789", "MWmw", "nats per token"):
        xs = [x for stroke in text_strokes(word, 0, 0, 20) for x, _ in stroke]
        assert max(xs) == pytest.approx(text_width(word, 20), abs=5)
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789.,-+:*/%()_^"
    drawn = {letter: text_strokes(letter, 0, 0, 20) for letter in letters}
    assert all(drawn.values())
    shapes = {json.dumps(strokes) for letter, strokes in drawn.items() if letter not in "O0lIi"}
    assert len(shapes) == len(letters) - 5
    assert text_strokes("é ", 0, 0, 20) == []


def test_thinning_keeps_the_ends_and_smoothing_the_level() -> None:
    points = [(float(x), 2.0) for x in range(1, 10_000)]
    kept = thin(points, 300)
    assert len(kept) <= 300 and kept[0] == points[0] and kept[-1] == points[-1]
    assert all(y == pytest.approx(2.0) for _, y in smooth(points))


def test_files_beside_the_metrics(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        write_loss_curve(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(row) for row in rows(30)) + "\n{broken")
    svg, png = write_loss_curve(tmp_path)
    assert svg.read_text().startswith("<svg") and decode_png(png.read_bytes()).std() > 5
    again = svg.read_bytes(), png.read_bytes()
    write_loss_curve(tmp_path)
    assert again == (svg.read_bytes(), png.read_bytes())
