"""`headway eval PATH --data FILE`: measure a model, each figure with its interval and all that it depends on.

Running text gives perplexity; rows with labels, answers or translations, images and recordings give the metrics of
their task.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from headway.cli.opening import opened
from headway.cli.options import Common, by_name, option
from headway.cli.output import Printer, duration, note
from headway.errors import ConfigError, nearest

if TYPE_CHECKING:
    from headway.api import Loaded
    from headway.data import ReadOptions
    from headway.evaluation import Interval, Perplexity

TASKS = ("perplexity", "labelled")


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """What `headway eval` takes."""

    task: Annotated[str | None, option(help="perplexity or labelled [what the data are for].")] = None
    data: Annotated[str | None, option(help="A file or folder of text, rows, images or sound.")] = None
    metrics: Annotated[str | None, option(help="Names of metrics, with commas [those of the task].")] = None
    column: Annotated[list[str] | None, option(help="text=NAME: where a field stands; repeat for several.")] = None
    beams: Annotated[int, option(min=1, help="Beams of an encoder-decoder's answers.")] = 1
    max_tokens: Annotated[int, option(min=1, help="Longest answer.")] = 128
    limit: Annotated[int | None, option(min=1, help="Examples to measure on, spread over the data [all].")] = None
    context: Annotated[int | None, option(min=1, help="Tokens of a window [the model's max_len].")] = None
    stride: Annotated[int | None, option(min=1, help="Tokens between windows [half the context].")] = None
    encoding_errors: Annotated[str, option(help="strict, replace or skip.")] = "strict"
    skip_bad_rows: Annotated[bool, option("--skip-bad-rows", help="Leave out broken JSONL rows.")] = False
    threads: Annotated[int | None, option(min=1, help="Threads of the CPU [torch's choice].")] = None
    dtype: Annotated[str, option(help="float32, float16, bfloat16, or stored.")] = "float32"
    device: Annotated[str, option(help="cpu or cuda.")] = "cpu"
    force_tokenizer: Annotated[bool, option("--force-tokenizer", help="Accept another tokenizer.")] = False


def run(options: Options) -> None:
    """Load, measure, print."""
    options = by_name(options, "headway eval")
    path = options.one_path("the folder of a trained model")
    if options.task not in (None, *TASKS):
        raise ConfigError("task", f"{options.task!r}{nearest(options.task, TASKS)}", ", ".join(TASKS))
    if options.data is None:
        raise ConfigError("data", "missing", "a file or folder of text, rows, images or sound", "--data FILE")
    import time

    loaded = opened(path, options, force_tokenizer=options.force_tokenizer)
    began, printer = time.perf_counter(), Printer(json=options.json)
    task = options.task or ("perplexity" if _reads_text(loaded, options, options.data) else "labelled")
    out = {"perplexity": _perplexity, "labelled": _labelled}[task](options, loaded, options.data, printer)
    seconds = time.perf_counter() - began
    printer.say(f"measured in {duration(seconds)}")
    printer.result({"task": task, **out, "seconds": seconds})


def _reads_text(loaded: Loaded, options: Options, data: str) -> bool:
    """Whether it writes text and the data is text: of pairs of completions it is asked which it prefers."""
    from headway.assess import form_of_rows
    from headway.data.forms import Preference

    writes = loaded.config.kind == "decoder" and loaded.config.head.type == "causal-lm"
    return writes and form_of_rows(data, _reading(options)) is not Preference


def _perplexity(options: Options, loaded: Loaded, data: str, printer: Printer) -> dict[str, object]:
    from headway.cli.display import Display
    from headway.data import ReadReport, documents
    from headway.data.sources import find_files
    from headway.evaluation import TextTokens, perplexity
    from headway.launch import Phase

    how, report = _reading(options), ReadReport()
    total = sum(file.stat().st_size for file in find_files(data, how, ReadReport()))
    encode = loaded.words.encode
    with Display() as display:
        found = perplexity(
            loaded.model,
            (TextTokens.of(encode(d.text), loaded.words) for d in documents(data, how, report)),
            context=options.context,
            stride=options.stride,
            bos_id=loaded.config.tokens.bos,
            progress=lambda _: display(Phase("perplexity", report.bytes, total)),
        )
    for line in report.lines():
        note(f"note: {line}")
    show(printer, found)
    return as_json(found)


def _reading(options: Options) -> ReadOptions:
    from headway.material import read_options
    from headway.run_config import RunConfig

    reading = {"encoding_errors": options.encoding_errors, "skip_bad_rows": options.skip_bad_rows}
    return read_options(RunConfig(data=reading).data)  # type: ignore[arg-type]  # checked there


def _labelled(options: Options, loaded: Loaded, data: str, printer: Printer) -> dict[str, object]:
    from headway.assess import How, assess
    from headway.cli.display import Display
    from headway.launch import Phase

    columns = dict(_column(text) for text in options.column or [])
    with Display() as display:
        how = How(
            _reading(options),
            columns,
            beams=options.beams,
            max_tokens=options.max_tokens,
            limit=options.limit,
            progress=lambda done, total: display(Phase("predicting", done, total)),
        )
        found = assess(loaded, data, [name.strip() for name in (options.metrics or "").split(",") if name.strip()], how)
    printer.table(
        [(one.name, *_cells(one.interval)) for one in found], header=("", "value", "95 % interval", ""), right=True
    )
    for one in found:
        printer.say(f"{one.name}: n {one.interval.n:,}, {one.signature}")
    return {one.name: {**one.interval._asdict(), "signature": one.signature} for one in found}


def _column(text: str) -> tuple[str, str]:
    name, equals, column = text.partition("=")
    if not equals:
        raise ConfigError("column", repr(text), "FIELD=COLUMN", "--column text=sentence")
    return name, column


def show(printer: Printer, found: Perplexity) -> None:
    """The figures as a table, and what they rest on."""
    rows = [(name, *_cells(getattr(found, name))) for name in ("perplexity", "bits_per_byte", "loss")]
    printer.table(rows, header=("", "value", "95 % interval", ""), right=True)
    printer.say(
        f"{found.documents:,} documents, {found.tokens:,} tokens, {found.bytes:,} bytes; context {found.context}, "
        f"stride {found.stride}; intervals over {found.units}"
    )


def _cells(interval: Interval) -> tuple[str, str, str]:
    low, high = interval.low, interval.high
    bounds = ("n/a", "") if low is None or high is None else (f"{low:.4f}", f"{high:.4f}")
    return f"{interval.value:.4f}", *bounds


def as_json(found: Perplexity) -> dict[str, object]:
    """A measurement as JSON values: each metric with value, low, high and n."""
    from headway.evaluation import Interval

    return {name: value._asdict() if isinstance(value, Interval) else value for name, value in found._asdict().items()}
