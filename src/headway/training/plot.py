"""Line charts as SVG and PNG, and the loss curve of a run. Drawn by matplotlib (`pip install 'headway[plots]'`)."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headway import files
from headway.errors import MachineError
from headway.training.metrics import METRICS, read_metrics

BLUE, ORANGE, GREEN = "#0072b2", "#d55e00", "#009e73"  # told apart by all kinds of eyes (Okabe and Ito, 2008)
Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line: its name in the legend (none: not in it), points, colour; faint lines lie behind, dots mark points."""

    name: str
    points: Sequence[Point]
    color: str
    faint: bool = False
    dots: bool = False


def smooth(points: Sequence[Point]) -> list[Point]:
    """A running mean whose memory grows with x to a twentieth of it: a straight view on a logarithmic axis."""
    out: list[Point] = []
    mean = 0.0
    for count, (x, y) in enumerate(points, 1):
        mean += (y - mean) / min(count, max(x / 20, 1.0))
        out.append((x, mean))
    return out


def draw(series: Sequence[Series], title: str, x_label: str, y_label: str, *, log_x: bool = False) -> dict[str, bytes]:
    """A chart of lines as {"svg": ..., "png": ...}; the same data give the same bytes.

    Raises MachineError where matplotlib is missing.
    """

    def fill(axes: Any) -> None:
        for line in series:
            x, y = zip(*line.points, strict=True) if line.points else ((), ())
            style: dict[str, Any] = {"linewidth": 0.8, "alpha": 0.3} if line.faint else {"linewidth": 1.8}
            axes.plot(x, y, color=line.color, marker="o" if line.dots else "", markersize=4, label=line.name, **style)
        axes.set(title=title, xlabel=x_label, ylabel=y_label, xscale="log" if log_x else "linear")
        axes.grid(alpha=0.25)
        if any(line.name for line in series):
            axes.legend(frameon=False)

    return _rendered(title, 4.4, fill)


def bars(values: Mapping[str, tuple[float, float, float]], title: str, label: str) -> dict[str, bytes]:
    """A bar for each name, (its length, from, to), with the range as a whisker; the first one is ours.

    Raises MachineError where matplotlib is missing.
    """

    def fill(axes: Any) -> None:
        places = range(len(values))
        middle, low, high = zip(*values.values(), strict=True)
        ranges = ([m - x for m, x in zip(middle, low, strict=True)], [y - m for m, y in zip(middle, high, strict=True)])
        axes.barh(places, middle, 0.6, color=[BLUE, *["#9aa5b1"] * (len(values) - 1)])
        axes.errorbar(middle, places, xerr=ranges, fmt="none", ecolor="#333333", elinewidth=1, capsize=3)
        for place, most, m in zip(places, high, middle, strict=True):
            axes.annotate(
                f"{m:,.0f}" if m >= 100 else f"{m:.1f}", (most, place), (6, 0), textcoords="offset points", va="center"
            )
        axes.set(title=title, xlabel=label, yticks=list(places), yticklabels=list(values), xlim=(0, max(high) * 1.12))
        axes.invert_yaxis()
        axes.grid(alpha=0.25, axis="x")
        axes.set_axisbelow(True)

    return _rendered(title, 1.4 + 0.5 * len(values), fill)


def _rendered(title: str, height: float, fill: Callable[[Any], None]) -> dict[str, bytes]:
    """What `fill` draws, in both forms."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise MachineError("matplotlib", "not installed", "it, to draw", "pip install 'headway[plots]'") from None
    out = {}
    # Identifiers inside an SVG are random unless salted; its creation date is left out below.
    with rc_context({"svg.hashsalt": title, "svg.fonttype": "none", "font.size": 10}):
        figure = Figure(figsize=(7.6, height), layout="constrained")
        axes = figure.subplots()
        fill(axes)
        axes.spines[["top", "right"]].set_visible(False)
        for kind, metadata in (("svg", {"Date": None}), ("png", {"Software": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, dpi=150, metadata=metadata)
            out[kind] = buffer.getvalue()
    return out


def loss_series(rows: Sequence[dict[str, object]]) -> list[Series]:
    """The loss curve from the records of a metrics file (metrics.read_metrics)."""

    def points(kind: str) -> list[Point]:
        found = [(row["step"], row["loss"]) for row in rows if row.get("event") == kind]
        return [(float(x), float(y)) for x, y in found if isinstance(x, int) and x > 0 and isinstance(y, float | int)]

    train, valid = points("step"), points("eval")
    mean = smooth(train)
    lines = [
        Series("", train, BLUE, faint=True),
        Series(f"training {mean[-1][1]:.3f}" if mean else "training", mean, BLUE),
    ]
    if valid:
        lines.append(Series(f"validation {valid[-1][1]:.3f}", valid, ORANGE, dots=len(valid) <= 60))
    return lines


def write_loss_curve(folder: Path) -> tuple[Path, Path]:
    """Draw FOLDER/loss.svg and loss.png from FOLDER/metrics.jsonl.

    Raises InputError if there are no metrics, MachineError if the disk refuses or matplotlib is missing.
    """
    series = loss_series(read_metrics(folder / METRICS))
    drawn = draw(series, "loss", "step", "nats per token", log_x=True)
    paths = folder / "loss.svg", folder / "loss.png"
    for path in paths:
        files.atomic_write(path, drawn[path.suffix[1:]])
    return paths
