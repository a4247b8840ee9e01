"""`headway bench decode|prefill|batch|embed PATH`: how fast a model is on this machine, how near that is to the
machine's limit, and how fast others are."""

from __future__ import annotations

import itertools
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from headway.cli.opening import opened
from headway.cli.options import Common, by_name, option
from headway.cli.output import Printer, duration, note, size
from headway.errors import ConfigError, nearest

if TYPE_CHECKING:
    from headway.generation.speed import Speed
    from headway.loading import Loaded
    from headway.machine import Probe
    from headway.peers import Rate, Work

# What can be measured: rows and tokens of a prompt, where nobody says otherwise.
WHAT = {"decode": (1, 128), "prefill": (1, 512), "batch": (16, 16), "embed": (1, 1)}
AGAINST = ("llama.cpp", "transformers", "ctranslate2", "openvino")


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """What `headway bench` takes: what to measure, and a model."""

    prompt_tokens: Annotated[int | None, option(min=1, help="Tokens of a prompt [128; prefill 512, batch 16].")] = None
    new_tokens: Annotated[int, option(min=2, help="Tokens written after it.")] = 128
    batch_size: Annotated[int | None, option(min=1, help="Prompts at once [1; batch 16].")] = None
    texts: Annotated[Path | None, option(help="For embed: a file with one text per line [Python's reference].")] = None
    rounds: Annotated[int, option(min=1, help="Repetitions, of which the median counts.")] = 5
    against: Annotated[str | None, option(help=f"Others, as far as installed: {','.join(AGAINST)}.")] = None
    output: Annotated[Path | None, option(help="A plot, .svg or .png.")] = None
    dtype: Annotated[str, option(help="float32, float16, bfloat16 or stored.")] = "stored"
    threads: Annotated[int | None, option(min=1, help="Threads of the CPU [torch's choice].")] = None
    device: Annotated[str, option(help="cpu or cuda.")] = "cpu"

    @property
    def rows(self) -> int:
        """Prompts at once."""
        return self.batch_size or WHAT[self.paths[0]][0]

    @property
    def new(self) -> int:
        """Tokens to write behind a prompt."""
        return 1 if self.paths[0] == "prefill" else self.new_tokens

    def length(self, context: int) -> int:
        """Tokens of a prompt: those asked for, or as many as fit into a context beside what is written."""
        return self.prompt_tokens or max(min(WHAT[self.paths[0]][1], context - self.new), 1)


def run(options: Options) -> None:
    """Load, measure, print."""
    options = by_name(options, "headway bench")
    names = _checked(options)
    what, path = options.paths
    import os

    import torch

    from headway import machine

    loaded = opened(path, options)
    limits, before = machine.probe(options.device), os.getloadavg()[0]
    printer = Printer(json=options.json)
    figures: dict[str, Any] = {"what": what}
    if what == "decode":
        figures |= _decode(printer, loaded, options, limits)
    if what != "decode" or names:
        figures |= _compared(printer, loaded, options, names, limits)
    figures |= {
        "threads": torch.get_num_threads(),
        "rounds": options.rounds,
        "load": [before, os.getloadavg()[0]],
    }
    printer.table(
        [
            ("memory", size(figures["peak_memory"]), "of this process at most, others aside"),
            ("load before, after", f"{before:.1f}", f"{figures['load'][1]:.1f}"),
        ]
    )
    printer.result(figures)


def _checked(options: Options) -> list[str]:
    """The peers that are wanted. Raises ConfigError."""
    if len(options.paths) != 2:
        found = " ".join(options.paths) or "nothing"
        raise ConfigError("headway bench", found, "what to measure, and a model", "headway bench decode PATH")
    what = options.paths[0]
    if what not in WHAT:
        raise ConfigError("headway bench", f"unknown measurement {what!r}{nearest(what, WHAT)}", ", ".join(WHAT))
    names = [name.strip() for name in (options.against or "").split(",") if name.strip()]
    for name in names:
        if name not in AGAINST:
            raise ConfigError("--against", f"unknown runtime {name!r}{nearest(name, AGAINST)}", ", ".join(AGAINST))
    if options.output is not None and options.output.suffix not in (".svg", ".png"):
        raise ConfigError("--output", str(options.output), "a name that ends with .svg or .png")
    return names


def _decode(printer: Printer, loaded: Loaded, options: Options, limits: Probe) -> dict[str, Any]:
    """Headway alone, with what its time goes into."""
    from headway.cli.display import Display
    from headway.generation.prompts import check_can_generate
    from headway.generation.speed import measure
    from headway.launch import Phase
    from headway.machine import peak_bytes

    check_can_generate(loaded.config)
    with Display() as display:
        speed = measure(
            loaded.model,
            loaded.words,
            prompt_tokens=options.length(loaded.config.max_len),
            new_tokens=options.new_tokens,
            batch=options.rows,
            rounds=options.rounds,
            progress=lambda done: display(Phase("bench", done, options.rounds)),
        )
    read = speed.decode_tokens_per_second / options.rows * speed.bytes_per_step
    share = read / limits.bandwidth
    _show_decode(printer, speed, read, limits.bandwidth)
    return {**speed._asdict(), "bytes_per_second": read, "share_of_bandwidth": share, "peak_memory": peak_bytes()}


def _show_decode(printer: Printer, speed: Speed, read: float, bandwidth: float) -> None:
    low, high = speed.spread
    printer.table(
        [
            ("first token", duration(speed.first_token_seconds), f"{speed.prefill_tokens_per_second:.0f} tokens/s"),
            ("decode", f"{speed.decode_tokens_per_second:.1f} tokens/s", f"{low:.1f} to {high:.1f}"),
            ("read", f"{size(read)}/s", f"{read / bandwidth:.0%} of {size(bandwidth)}/s measured here"),
            ("a step reads", size(speed.bytes_per_step), "weights, keys and values"),
        ]
    )


def _compared(printer: Printer, loaded: Loaded, options: Options, names: list[str], limits: Probe) -> dict[str, Any]:
    """Headway and others in turn."""
    import torch

    from headway import peers
    from headway.cli.display import Display
    from headway.launch import Phase
    from headway.machine import peak_bytes

    what, work = options.paths[0], _work(loaded, options)
    with tempfile.TemporaryDirectory(prefix="headway-bench-") as place:
        given = peers.Given(loaded, Path(place), torch.get_num_threads())
        ourselves = peers.Headway(given)
        peers.rate(what, ourselves, work)
        peak = peak_bytes()
        asked, absent = peers.opened(names, what, given)
        for name, reason in absent.items():
            note(f"note: {name} {reason}")
        everyone: dict[str, peers.Peer] = {"headway": ourselves, **asked}
        calls = {name: lambda peer=peer: peers.rate(what, peer, work) for name, peer in everyone.items()}
        with Display() as display:
            told = lambda done: display(Phase("bench", done, options.rounds))  # noqa: E731
            found = peers.in_turn(calls, options.rounds, told)
    unit = "texts" if what == "embed" else "tokens"
    ours = found["headway"].median
    rows = [
        (name, f"{r.median:.1f} {unit}/s", f"{r.low:.1f} to {r.high:.1f}", _ratio(name, ours / r.median))
        for name, r in found.items()
    ]
    printer.table(rows)
    spread = [found["headway"].low, found["headway"].high]
    out: dict[str, Any] = {f"{unit}_per_second": ours, "spread": spread, "peak_memory": peak}
    if what in ("prefill", "embed"):
        out["share_of_peak"] = ours * _operations(loaded, options, work) / limits.peak()
        printer.say(f"{out['share_of_peak']:.0%} of the float32 operations a second measured here")
    if options.output is not None:
        _draw(options, found, unit)
    against = {name: {**r._asdict(), "ratio": ours / r.median} for name, r in found.items() if name != "headway"}
    return out | {"against": against, "absent": absent}


def _ratio(name: str, ratio: float) -> str:
    return "" if name == "headway" else f"headway is {ratio:.2f} times as fast"


def _work(loaded: Loaded, options: Options) -> Work:
    from headway.generation.prompts import check_can_generate
    from headway.generation.speed import check_lengths, drawn
    from headway.peers import Work

    if options.paths[0] == "embed":
        from headway.evaluation.embed import check_can_embed

        check_can_embed(loaded.config)
        return Work(texts=_texts(options.texts))
    check_can_generate(loaded.config)
    length = options.length(loaded.config.max_len)
    check_lengths(loaded.config, length, options.new)
    return Work(drawn(loaded.model, loaded.words, options.rows, length), options.new)


def _texts(path: Path | None) -> list[str]:
    """Lines of a file; without one, paragraphs of Python's own documentation."""
    from headway.cli.embed import lines_of
    from headway.files import read_bytes

    if path is not None:
        lines = [line for line in lines_of(str(path), read_bytes(path)) if line.strip()]
        if not lines:
            raise ConfigError("--texts", f"{path}: no text", "a file with one text per line")
        return lines
    from pydoc_data.topics import topics

    paragraphs = (" ".join(part.split()) for text in topics.values() for part in text.split("\n\n"))
    return list(itertools.islice((text for text in paragraphs if len(text) > 80), 200))


def _operations(loaded: Loaded, options: Options, work: Work) -> float:
    """Floating-point operations of a token read, or of a text."""
    from headway import cost
    from headway.evaluation.embed import longest_text

    if not work.texts:
        return cost.forward_flops(loaded.config, options.length(loaded.config.max_len))
    longest = longest_text(loaded.config)
    lengths = [min(len(ids), longest) for ids in loaded.words.encode_batch(list(work.texts))]
    return sum(n * cost.forward_flops(loaded.config, max(n, 1)) for n in lengths) / len(lengths)


def _draw(options: Options, found: dict[str, Rate], unit: str) -> None:
    from headway.files import atomic_write
    from headway.training.plot import bars

    assert options.output is not None
    what, path = options.paths
    drawn = bars(found, f"{what}, {Path(path).name}", f"{unit} a second")
    atomic_write(options.output, drawn[options.output.suffix[1:]])
