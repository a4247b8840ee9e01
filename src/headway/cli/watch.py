"""`headway watch RUN`: a run's curves in the terminal, or as a page (`--html FILE`); `--follow` until it ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from headway.cli.options import Common, option
from headway.cli.output import Printer, duration, size
from headway.errors import InputError

if TYPE_CHECKING:
    from headway.training.plot import Point, Series

# key of a step's record: what it is called, its unit
CURVES = {
    "loss": ("loss", "nats per label"),
    "lr": ("learning rate", "rate"),
    "grad_norm": ("gradient norm", "norm before clipping"),
    "tokens_per_second": ("speed", "supervised labels per second"),
    "memory": ("memory", "bytes"),
}
# The same of a health record, which has one value per part.
INSIDE = {
    "gradients": ("gradient norm by part", "norm before clipping"),
    "activations": ("activations by block", "root mean square"),
    "entropy": ("attention entropy by block", "nats"),
}
# The same of an evaluation's rewards: lines of one curve, by its name and unit.
REWARDS = {
    ("rewards", "of held-out completions"): ("chosen", "rejected", "margin"),
    ("accuracy of rewards", "share of held-out pairs"): ("accuracy",),
}
MOST_LINES = 8
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # of a braille cell, from the top, left and right
_SECONDS = 2.0
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; padding: 0 1rem; max-width: 60rem; color: #222;
background: #fff } svg { width: 100%; height: auto; margin: 1rem 0 } td { padding: 0 1rem 0 0 } .w { color: #a40 }
pre { white-space: pre-wrap; background: #f4f4f4; padding: .6rem }
"""


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """What `headway watch` takes."""

    html: Annotated[str | None, option(help="Write one page with all curves to this file.")] = None
    follow: Annotated[bool, option("--follow", help="Show again every two seconds until the run ends.")] = False
    width: Annotated[int, option(min=20, help="Columns of a curve.")] = 72
    height: Annotated[int, option(min=2, help="Lines of a curve.")] = 8


def run(options: Options) -> None:
    """Read the metrics, draw, and with --follow again."""
    import time

    from headway import files
    from headway.training.metrics import METRICS, read_metrics

    folder, printer = Path(options.one_path("the folder of a run")), Printer(json=options.json)
    while True:
        rows = read_metrics(folder / METRICS)
        steps = [row for row in rows if row.get("event") == "step"]
        if not steps and not options.follow:
            raise InputError(str(folder / METRICS), "no step yet", "a run that has begun", "--follow waits for it")
        if options.html is not None:
            files.atomic_write(Path(options.html), page(folder, rows).encode())
        if options.html is None and steps:
            if options.follow and printer.words.isatty():
                printer.words.write("\x1b[H\x1b[J")
            _terminal(printer, rows, options.width, options.height)
        if not options.follow or _is_over(rows):
            break
        time.sleep(_SECONDS)
    if options.html is not None:
        printer.say(f"report: {options.html}")
    printer.result({"run": str(folder), **summary(rows)})


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, object]:
    """The last step, the last and the best evaluation, warnings by kind."""
    steps = [row for row in rows if row.get("event") == "step"]
    evaluations = [row for row in rows if row.get("event") == "eval" and row.get("loss") is not None]
    kinds: dict[str, int] = {}
    for row in rows:
        if row.get("event") == "warning":
            kinds[str(row["kind"])] = kinds.get(str(row["kind"]), 0) + 1
    keys = ("step", *CURVES, "share_of_peak", "eta")
    return {
        "last": {key: steps[-1].get(key) for key in keys} if steps else None,
        "evaluation": dict(evaluations[-1]) if evaluations else None,
        "best": dict(min(evaluations, key=lambda row: row["loss"])) if evaluations else None,
        "warnings": kinds,
    }


def points_of(rows: Sequence[Mapping[str, Any]], key: str, event: str = "step") -> list[Point]:
    """(step, value) of the records that have one."""
    found = [(row["step"], row.get(key)) for row in rows if row.get("event") == event]
    return [(float(step), float(value)) for step, value in found if isinstance(value, int | float)]


def _rewards(rows: Sequence[Mapping[str, Any]], key: str) -> list[Point]:
    judged = [row for row in rows if row.get("event") == "eval" and row.get("rewards")]
    return [(float(row["step"]), float(row["rewards"][key])) for row in judged]


def inside(rows: Sequence[Mapping[str, Any]], key: str) -> dict[str, list[Point]]:
    """The curve of each part; of many those that lie evenly among them, first and last included."""
    found: dict[str, list[Point]] = {}
    for row in rows:
        if row.get("event") == "health":
            for name, value in row[key].items():
                if isinstance(value, int | float):
                    found.setdefault(name, []).append((float(row["step"]), float(value)))
    count = min(len(found), MOST_LINES)
    chosen = {round(place * (len(found) - 1) / max(count - 1, 1)) for place in range(count)}
    return {name: points for number, (name, points) in enumerate(found.items()) if number in chosen}


def shaded(count: int) -> list[str]:
    """Colours from dark blue to yellow, one per depth, told apart by all kinds of eyes (viridis)."""
    stops = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (190, 190, 30))
    out = []
    for number in range(count):
        place = number / max(count - 1, 1) * (len(stops) - 1)
        left = min(int(place), len(stops) - 2)
        mixed = (a + (b - a) * (place - left) for a, b in zip(stops[left], stops[left + 1], strict=True))
        out.append("#" + "".join(f"{round(value):02x}" for value in mixed))
    return out


def braille(points: Sequence[Point], width: int, height: int) -> list[str]:
    """A curve as `height` lines of `width` braille cells, two by four dots each; the top line is the highest value."""
    if not points:
        return []
    low, high = min(y for _, y in points), max(y for _, y in points)
    left, right = points[0][0], points[-1][0]
    cells = [[0] * width for _ in range(height)]
    for x, y in points:
        column = round((x - left) / (right - left) * (2 * width - 1)) if right > left else 0
        row = round((high - y) / (high - low) * (4 * height - 1)) if high > low else 0
        cells[row // 4][column // 2] |= _DOTS[row % 4][column % 2]
    return ["".join(chr(0x2800 + cell) for cell in line) for line in cells]


def _terminal(printer: Printer, rows: Sequence[Mapping[str, Any]], width: int, height: int) -> None:
    from headway.training.plot import smooth

    for key in ("loss", "grad_norm", "lr"):
        points = points_of(rows, key)
        if not points:
            continue
        shown = smooth(points) if key == "loss" else points
        low, high = min(y for _, y in shown), max(y for _, y in shown)
        printer.say(f"{CURVES[key][0]}: now {shown[-1][1]:.4g}, from {low:.4g} to {high:.4g}")
        for line in braille(shown, width, height if key == "loss" else max(height // 3, 2)):
            printer.say(f"  {line}")
    for line in _sentences(rows):
        printer.say(line)


def _sentences(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    found = summary(rows)
    said = []
    if isinstance(last := found["last"], dict):
        said.append(
            f"step {last['step']:,}: {size(last['tokens_per_second'] or 0, '')} labels/s, {size(last['memory'] or 0)}"
            f", {duration(last['eta'] or 0)} left"
        )
    if isinstance(best := found["best"], dict) and isinstance(now := found["evaluation"], dict):
        bits = now.get("bits_per_byte")
        said.append(
            f"held out: {now['loss']:.4g} at step {now['step']:,}, best {best['loss']:.4g} at step {best['step']:,}"
            + (f", {bits:.4f} bits per byte" if bits else "")
        )
    said += [f"{count} warnings of the kind {kind}" for kind, count in dict(found["warnings"]).items()]  # type: ignore[call-overload]
    return said


def _is_over(rows: Sequence[Mapping[str, Any]]) -> bool:
    """No step is left, or the loop said that it stopped."""
    steps = [row for row in rows if row.get("event") == "step"]
    stopped = bool(rows) and rows[-1].get("event") == "warning" and rows[-1].get("kind") == "diverged"
    return stopped or (bool(steps) and steps[-1].get("eta") == 0)


def page(folder: Path, rows: Sequence[dict[str, Any]]) -> str:
    """One HTML page without scripts: figures, curves, samples and warnings of a run. Raises MachineError."""
    from html import escape

    from headway.training.plot import BLUE, Series, draw, loss_series

    title = f"run {folder.name}"
    parts = [f"<!doctype html><meta charset='utf-8'><title>{escape(title)}</title><style>{_STYLE}</style>"]
    parts += [f"<h1>{escape(title)}</h1>", *(f"<p>{escape(line)}</p>" for line in _sentences(rows))]
    curves: list[tuple[str, str, list[Series], bool]] = [("loss", CURVES["loss"][1], loss_series(rows), True)]
    for key, (name, unit) in CURVES.items():
        points = points_of(rows, key)
        if key != "loss" and points:
            curves.append((name, unit, [Series("", points, BLUE)], False))
    grouped = [(name, unit, inside(rows, key)) for key, (name, unit) in INSIDE.items()]
    grouped += [(name, unit, {key: _rewards(rows, key) for key in keys}) for (name, unit), keys in REWARDS.items()]
    for name, unit, lines in grouped:
        if any(lines.values()):
            shades = shaded(len(lines))
            curves.append(
                (name, unit, [Series(n, p, c) for (n, p), c in zip(lines.items(), shades, strict=True)], False)
            )
    for name, unit, series, is_log in curves:
        svg = draw(series, name, "step", unit, log_x=is_log)["svg"].decode()
        parts.append(svg[svg.index("<svg") :])
    for row in rows:
        if row.get("event") == "eval" and row.get("sample"):
            parts.append(f"<h3>step {row['step']}</h3><pre>{escape(str(row['sample']))}</pre>")
        if row.get("event") == "warning":
            parts.append(f"<p class='w'>step {row['step']}: {escape(str(row['text']))}</p>")
    return "\n".join(parts) + "\n"
