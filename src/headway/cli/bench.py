"""`headway bench decode PATH`: how fast a model writes on this machine, and how near that is to the machine's limit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from headway.cli.opening import opened
from headway.cli.options import Common, by_name, option
from headway.cli.output import Printer, duration, size
from headway.errors import ConfigError, nearest

if TYPE_CHECKING:
    from headway.generation.speed import Speed

WHAT = ("decode",)


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """What `headway bench` takes: what to measure, and a model."""

    prompt_tokens: Annotated[int, option(min=1, help="Tokens of the prompt.")] = 128
    new_tokens: Annotated[int, option(min=2, help="Tokens written after it.")] = 128
    batch_size: Annotated[int, option(min=1, help="Prompts at once.")] = 1
    rounds: Annotated[int, option(min=1, help="Repetitions, of which the median counts.")] = 5
    dtype: Annotated[str, option(help="float32, float16, bfloat16 or stored.")] = "stored"
    threads: Annotated[int | None, option(min=1, help="Threads of the CPU [torch's choice].")] = None
    device: Annotated[str, option(help="cpu or cuda.")] = "cpu"


def run(options: Options) -> None:
    """Load, measure, print."""
    options = by_name(options, "headway bench")
    if len(options.paths) != 2:
        found = " ".join(options.paths) or "nothing"
        raise ConfigError("headway bench", found, "what to measure, and a model", "headway bench decode PATH")
    what, path = options.paths
    if what not in WHAT:
        raise ConfigError("headway bench", f"unknown measurement {what!r}{nearest(what, WHAT)}", ", ".join(WHAT))
    import os
    import resource

    import torch

    from headway import machine
    from headway.cli.display import Display
    from headway.generation.prompts import check_can_generate
    from headway.generation.speed import measure
    from headway.launch import Phase

    loaded = opened(path, options)
    check_can_generate(loaded.config)
    limits = machine.probe(options.device)
    before = os.getloadavg()[0]
    with Display() as display:
        speed = measure(
            loaded.model,
            loaded.words,
            prompt_tokens=options.prompt_tokens,
            new_tokens=options.new_tokens,
            batch=options.batch_size,
            rounds=options.rounds,
            progress=lambda done: display(Phase("bench", done, options.rounds)),
        )
    rate = speed.decode_tokens_per_second / options.batch_size * speed.bytes_per_step
    figures = {
        **speed._asdict(),
        "bytes_per_second": rate,
        "share_of_bandwidth": rate / limits.bandwidth,
        "peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "threads": torch.get_num_threads(),
        "rounds": options.rounds,
        "load": [before, os.getloadavg()[0]],
    }
    printer = Printer(json=options.json)
    _show(printer, figures, speed, limits.bandwidth)
    printer.result(figures)


def _show(printer: Printer, figures: dict[str, Any], speed: Speed, bandwidth: float) -> None:
    low, high = speed.spread
    share, (before, after) = figures["share_of_bandwidth"], figures["load"]
    printer.table(
        [
            ("first token", duration(speed.first_token_seconds), f"{speed.prefill_tokens_per_second:.0f} tokens/s"),
            ("decode", f"{speed.decode_tokens_per_second:.1f} tokens/s", f"{low:.1f} to {high:.1f}"),
            (
                "read",
                f"{size(figures['bytes_per_second'])}/s",
                f"{100 * share:.0f} % of {size(bandwidth)}/s measured here",
            ),
            ("memory", size(figures["peak_memory"]), f"a step reads {size(speed.bytes_per_step)}"),
            ("load before, after", f"{before:.1f}", f"{after:.1f}"),
        ]
    )
