"""`headway eval PATH --task perplexity --data FILE`: measure a model, each figure with its interval."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from headway.cli.options import Common, by_name, option
from headway.cli.output import Printer, duration, note
from headway.errors import ConfigError, nearest

if TYPE_CHECKING:
    from headway.evaluation import Interval, Perplexity

TASKS = ("perplexity",)


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """What `headway eval` takes."""

    task: Annotated[str, option(help="What to measure: perplexity.")] = "perplexity"
    data: Annotated[str | None, option(help="A text file or folder.")] = None
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
    if options.task not in TASKS:
        raise ConfigError("task", f"{options.task!r}{nearest(options.task, TASKS)}", ", ".join(TASKS))
    if options.data is None:
        raise ConfigError("data", "missing", "a text file or folder", "--data FILE")
    import time

    import torch

    from headway import api, loading
    from headway.cli.display import Display
    from headway.data import ReadReport, documents
    from headway.data.sources import find_files
    from headway.evaluation import TextTokens, perplexity
    from headway.launch import Phase, read_options
    from headway.run_config import RunConfig

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    reading = {"encoding_errors": options.encoding_errors, "skip_bad_rows": options.skip_bad_rows}
    how = read_options(RunConfig(data=reading).data)  # type: ignore[arg-type]  # checked there
    total = sum(file.stat().st_size for file in find_files(options.data, how, ReadReport()))
    dtype = loading.dtype_of(options.dtype)
    loaded = api.load(path, dtype=dtype, force_tokenizer=options.force_tokenizer, device=options.device)
    for line in loaded.notes:
        note(f"note: {line}")
    encode, report, began = loaded.words.encode, ReadReport(), time.perf_counter()
    with Display() as display:
        found = perplexity(
            loaded.model,
            (TextTokens.of(encode(d.text), loaded.words) for d in documents(options.data, how, report)),
            context=options.context,
            stride=options.stride,
            bos_id=loaded.config.tokens.bos,
            progress=lambda _: display(Phase("perplexity", report.bytes, total)),
        )
    seconds = time.perf_counter() - began
    printer = Printer(json=options.json)
    for line in report.lines():
        note(f"note: {line}")
    show(printer, found)
    printer.say(f"{found.tokens / seconds:,.0f} tokens/s, {duration(seconds)}")
    printer.result({"task": options.task, **as_json(found), "seconds": seconds})


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
