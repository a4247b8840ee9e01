"""`headway tune BASE data.path=ROWS [key=value ...]`: a model that exists, adapted; it takes what train takes.

`--compare prompting` asks first whether it is worth it: prompting and tuning on the same held-out rows.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from headway.cli import train as train_verb
from headway.cli.options import option
from headway.cli.output import Printer, duration, note, size
from headway.errors import ConfigError

if TYPE_CHECKING:
    from headway.compare import Row


@dataclass(frozen=True, kw_only=True)
class Options(train_verb.Options):
    """What `headway tune` takes: a model, and what `headway train` takes."""

    compare: Annotated[str | None, option(help="prompting: a table of prompting and tuning on rows with a class.")] = (
        None
    )
    methods: Annotated[
        str | None, option(help="Of --compare, with commas between [zero-shot,few-shot,prompt,lora,full].")
    ] = None
    rows: Annotated[int, option(help="Held-out rows that --compare asks.", min=1)] = 400


def run(options: Options) -> int:
    """Adapt a base, go on with a run that does, or compare."""
    words = list(options.words or [])
    named = [word for word in options.paths if not word.endswith((".yaml", ".yml", ".json", ".html"))]
    given = {key.partition("=")[0] for key in options.overrides}
    if not options.resume:
        if len(named) + ("base" in given) != 1:
            found = f"{len(named)} models" if named else "no model"
            raise ConfigError("PATH", found, "the model to adapt", "headway tune MODEL data.path=ROWS")
        words = [word for word in words if word not in named] + [f"base={train_verb.quoted(name)}" for name in named]
        if options.compare is not None:
            return _compare(replace(options, words=words))
        if not any(key.startswith("tuning") for key in given):
            words.append("tuning.type=lora")
    return train_verb.run(replace(options, words=words))


def _compare(options: Options) -> int:
    if options.compare != "prompting":
        raise ConfigError("--compare", repr(options.compare)[:40], "prompting")
    from headway import files
    from headway.compare import DEFAULT, compare, machine_line

    resolved, _ = train_verb.read_config(options)
    run, printer = resolved.run, Printer(json=options.json)
    place = Path(run.output or f"runs/compare-{Path(run.data.path or 'rows').stem}")
    files.check_writable(place)
    skipped = ("data.", "output", "base", "tuning.type", "objective")
    words = [key for key in options.keys if not key.startswith(skipped)]
    methods = options.methods.split(",") if options.methods else list(DEFAULT)
    found = compare(str(run.base), run, words, place, methods, options.rows, lambda text: note(text))
    show(printer, found)
    printer.say(f"\n{machine_line()}; runs and answers are kept in {place}")
    printer.result({"rows": [asdict(row) for row in found], "machine": machine_line(), "output": str(place)})
    return 0


def show(printer: Printer, found: list[Row]) -> None:
    """The methods as a table."""
    header = ("", "right", "95 % interval", "nats", "trained", "peak memory", "tuned in", "one answer")
    rows = [
        (
            row.method,
            f"{row.value:.3f}",
            "n/a" if row.low is None else f"{row.low:.3f} to {row.high:.3f}",
            f"{row.nats:.3f}",
            f"{row.trained:,}",
            "" if row.peak is None else size(row.peak),
            duration(row.seconds) if row.seconds else "",
            f"{row.per_answer * 1000:.0f} ms",
        )
        for row in found
    ]
    printer.table(rows, header=header, right=True)
