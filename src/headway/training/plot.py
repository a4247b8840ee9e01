"""Line charts as SVG and PNG, and the loss curve of a run.

A chart is a short list of marks (strokes and texts) that two writers turn into the two formats, so both show the
same thing and neither needs a plotting library.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from xml.sax.saxutils import escape

from headway import files
from headway.training.metrics import METRICS, read_metrics
from headway.training.raster import Canvas, Point, text_strokes, text_width

BLUE, ORANGE, INK, GREY, GRID = "#0072b2", "#d55e00", "#222222", "#6b6b6b", "#e3e3e3"
_WIDTH, _HEIGHT = 760, 440
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 24, 52, 50
_PNG_SCALE = 2
_POINTS = 1200  # of one line; more could not be told apart at this width


@dataclass(frozen=True)
class Stroke:
    """Polylines in chart units (0,0 top left); a single point is a dot."""

    points: Sequence[Point]
    color: str
    width: float
    opacity: float = 1.0


@dataclass(frozen=True)
class Text:
    """A line of text on its base line; `turned` runs upwards."""

    text: str
    x: float
    y: float
    size: float
    color: str
    anchor: Literal["start", "middle", "end"] = "start"
    turned: bool = False


Mark = Stroke | Text


@dataclass(frozen=True)
class Series:
    """One line of a chart: finite values only. `faint` lines have no entry in the legend, `dots` mark each point."""

    name: str
    points: Sequence[Point]
    color: str
    faint: bool = False
    dots: bool = False


def chart(series: Sequence[Series], title: str, x_label: str, y_label: str, *, log_x: bool = False) -> list[Mark]:
    """Lay out a line chart; with `log_x` every x must be positive. Without any point, only the frame."""
    points = [point for line in series for point in line.points]
    xs, ys = [x for x, _ in points] or [1.0, 10.0], [y for _, y in points] or [0.0, 1.0]
    low_x, high_x = min(xs), max(xs)
    if low_x == high_x:
        high_x = low_x * 10 if log_x else low_x + 1
    y_ticks = _linear_ticks(min(ys), max(ys))
    x_ticks = _log_ticks(low_x, high_x) if log_x else _linear_ticks(low_x, high_x)
    low_y, high_y = y_ticks[0], y_ticks[-1]
    if not log_x:
        low_x, high_x = x_ticks[0], x_ticks[-1]

    def place(point: Point) -> Point:
        x, y = point
        along = math.log(x / low_x) / math.log(high_x / low_x) if log_x else (x - low_x) / (high_x - low_x)
        up = (y - low_y) / (high_y - low_y)
        return _LEFT + along * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM)

    marks: list[Mark] = []
    for y in y_ticks:
        at = place((low_x, y))[1]
        marks.append(Stroke([(_LEFT, at), (_WIDTH - _RIGHT, at)], GRID, 1))
        marks.append(Text(_tick(y), _LEFT - 9, at + 4, 12, GREY, "end"))
    for x in x_ticks:
        at = place((x, low_y))[0]
        marks.append(Stroke([(at, _HEIGHT - _BOTTOM), (at, _HEIGHT - _BOTTOM + 5)], GREY, 1))
        marks.append(Text(_tick(x), at, _HEIGHT - _BOTTOM + 20, 12, GREY, "middle"))
    marks.append(Stroke([(_LEFT, _HEIGHT - _BOTTOM), (_WIDTH - _RIGHT, _HEIGHT - _BOTTOM)], GREY, 1))
    for line in series:
        placed = [place(point) for point in line.points]
        marks.append(Stroke(placed, line.color, 1.0 if line.faint else 2.0, 0.28 if line.faint else 1.0))
        marks += [Stroke([point], line.color, 6) for point in placed if line.dots]
    return marks + _words([line for line in series if not line.faint], title, x_label, y_label)


def _words(legend: Sequence[Series], title: str, x_label: str, y_label: str) -> list[Mark]:
    marks: list[Mark] = [
        Text(title, _LEFT, 28, 15, INK),
        Text(x_label, (_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 10, 13, INK, "middle"),
        Text(y_label, 18, (_TOP + _HEIGHT - _BOTTOM) / 2, 13, INK, "middle", turned=True),
    ]
    at = float(_WIDTH - _RIGHT)
    for line in reversed(legend):
        at -= text_width(line.name, 13)
        marks.append(Text(line.name, at, 28, 13, INK))
        marks.append(Stroke([(at - 26, 24), (at - 8, 24)], line.color, 2.5))
        at -= 44
    return marks


def _linear_ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers that enclose [low, high]."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 5))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if span / (power * factor) <= 6)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, max(last, first + 1) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, with 2 and 5 times them where fewer than three would show."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        ticks = [factor * 10.0**power for power in powers for factor in factors]
        ticks = [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]
        if len(ticks) >= 4:
            break
    return ticks


def _tick(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):g}{unit}"
    return f"{value:.6g}"


def to_svg(marks: Sequence[Mark]) -> str:
    """The chart as a standalone SVG file."""
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}"'
        ' font-family="system-ui, Helvetica, Arial, sans-serif">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
    ]
    for mark in marks:
        if isinstance(mark, Text):
            turn = f' transform="rotate(-90 {mark.x:g} {mark.y:g})"' if mark.turned else ""
            place = f'x="{mark.x:.1f}" y="{mark.y:.1f}" font-size="{mark.size:g}" text-anchor="{mark.anchor}"'
            out.append(f'<text {place} fill="{mark.color}"{turn}>{escape(mark.text)}</text>')
        elif len(mark.points) == 1:
            x, y = mark.points[0]
            out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{mark.width / 2:g}" fill="{mark.color}"/>')
        elif mark.points:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in mark.points)
            style = f'stroke="{mark.color}" stroke-width="{mark.width:g}" stroke-opacity="{mark.opacity:g}"'
            out.append(f'<polyline points="{path}" fill="none" {style} stroke-linejoin="round"/>')
    return "\n".join([*out, "</svg>"]) + "\n"


def to_png(marks: Sequence[Mark]) -> bytes:
    """The chart as a PNG file, two pixels per unit."""
    canvas = Canvas(_WIDTH * _PNG_SCALE, _HEIGHT * _PNG_SCALE)
    for mark in marks:
        if isinstance(mark, Text):
            canvas.draw(_letters(mark), mark.color, 1.25 * _PNG_SCALE)
        elif mark.points:
            points = [(x * _PNG_SCALE, y * _PNG_SCALE) for x, y in mark.points]
            canvas.draw([points], mark.color, mark.width * _PNG_SCALE, mark.opacity)
    return canvas.png()


def _letters(mark: Text) -> list[list[Point]]:
    back = text_width(mark.text, mark.size) * {"start": 0.0, "middle": 0.5, "end": 1.0}[mark.anchor]
    x, y = (mark.x, mark.y + back) if mark.turned else (mark.x - back, mark.y)
    size, scale = mark.size, _PNG_SCALE
    return text_strokes(mark.text, x * scale, y * scale, size * scale, upright=not mark.turned)


def thin(points: Sequence[Point], limit: int = _POINTS) -> list[Point]:
    """At most `limit` of the points, evenly spread in the logarithm of x; first and last are kept."""
    if len(points) <= limit:
        return list(points)
    low, high = math.log(points[0][0]), math.log(points[-1][0])
    kept: dict[int, Point] = {}
    for point in points:
        kept[int((math.log(point[0]) - low) / (high - low) * (limit - 1))] = point
    return [points[0], *list(kept.values())[1:]]


def smooth(points: Sequence[Point]) -> list[Point]:
    """A running mean whose memory grows with x to a twentieth of it: a straight view on a logarithmic axis."""
    out: list[Point] = []
    mean = 0.0
    for count, (x, y) in enumerate(points, 1):
        mean += (y - mean) / min(count, max(x / 20, 1.0))
        out.append((x, mean))
    return out


def loss_chart(rows: Sequence[dict[str, object]]) -> list[Mark]:
    """The loss curve from the records of a metrics file (metrics.read_metrics)."""

    def points(kind: str) -> list[Point]:
        found = [(row["step"], row["loss"]) for row in rows if row.get("event") == kind]
        return [(float(x), float(y)) for x, y in found if isinstance(x, int) and x > 0 and isinstance(y, float | int)]

    train, valid = points("step"), points("eval")
    mean = smooth(train)
    lines = [Series("", thin(train), BLUE, faint=True)]
    lines.append(Series(f"training {mean[-1][1]:.3f}" if mean else "training", thin(mean), BLUE))
    if valid:
        lines.append(Series(f"validation {valid[-1][1]:.3f}", valid, ORANGE, dots=len(valid) <= 60))
    return chart(lines, "loss", "step", "nats per token", log_x=True)


def write_loss_curve(folder: Path) -> tuple[Path, Path]:
    """Draw FOLDER/loss.svg and loss.png from FOLDER/metrics.jsonl.

    Raises InputError if there are no metrics, MachineError if the disk refuses.
    """
    marks = loss_chart(read_metrics(folder / METRICS))
    svg, png = folder / "loss.svg", folder / "loss.png"
    files.atomic_write(svg, to_svg(marks).encode())
    files.atomic_write(png, to_png(marks))
    return svg, png
