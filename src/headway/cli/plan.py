"""`headway plan data.path=... [key=value ...]`: what a run would take, before it begins; it takes what train takes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from headway.cli import train as train_verb
from headway.cli.output import Printer, duration, size


@dataclass(frozen=True, kw_only=True)
class Options(train_verb.Options):
    """What `headway plan` takes: what `headway train` takes."""


def run(options: Options) -> None:
    """Resolve the run as train would, measure a few steps, and say what it needs."""
    printer = Printer(json=options.json)
    resolved, resume = train_verb.read_config(replace(options, dry_run=True))
    from headway.cli.display import Display
    from headway.launch import Launch, foretell, train

    with Display() as display:
        done = train(resolved.run, Launch(resume, options.override, dry_run=True), display)
        found = foretell(done.plan)
    rows = [(name, size(count)) for name, count in found.memory.items() if count]
    printer.table([*rows, ("at the worst moment", size(found.peak)), ("free", size(found.available))], right=True)
    printer.say(f"{found.seconds_per_step:.3g} s a step, {size(found.tokens_per_second, '')} positions/s")
    printer.say(f"{duration(found.seconds)} for {done.plan.run.train.steps:,} steps, evaluations not counted")
    printer.say(f"passes of up to {found.largest:,} rows fit")
    for line in found.advice:
        printer.say(line)
    printer.result(
        {
            **train_verb.summary(done),
            "memory": dict(found.memory),
            "peak_bytes": found.peak,
            "available_bytes": found.available,
            "seconds_per_step": found.seconds_per_step,
            "seconds": found.seconds,
            "tokens_per_second": found.tokens_per_second,
            "largest_rows": found.largest,
            "advice": found.advice,
        }
    )
