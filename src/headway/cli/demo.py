"""`headway demo`: the whole way on text that every Python carries: documentation topics, docstrings, source.

Corpus -> tokenizer -> small GPT for three minutes -> bits per byte on held-out documents with an interval -> text.
Nothing is downloaded.
"""

from __future__ import annotations

import ast
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from headway.cli.options import Common, option
from headway.cli.output import Printer, duration, note, size
from headway.errors import ConfigError
from headway.strict import dump_json

if TYPE_CHECKING:
    from headway.api import Loaded
    from headway.evaluation import Perplexity
    from headway.launch import RunResult

PROMPTS = ("The list type", "def read(self", "Return a new")
# Tables, tests and generated code teach a small model little.
_LEFT_OUT = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "encodings",
    "site-packages",
    "dist-packages",
    "pydoc_data",
    "ensurepip",
}
_LARGEST = 200_000  # characters of one module
_MEASURED = 150_000  # tokens of held-out documents: some seconds' work, and an interval of about 1 %


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """What `headway demo` takes; free words are overrides of the run config."""

    output: Annotated[str, option(help="The run folder; an earlier demo in it is replaced.")] = "runs/demo"
    budget: Annotated[str, option(help="How long to train: 90s, 3m, 1h.")] = "3m"


def documents() -> Iterator[tuple[str, str]]:
    """(name, text) of this Python's documentation topics, and of each standard module its docstrings and its source."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield f"topic {name}", topics[name]
    folder = Path(sysconfig.get_path("stdlib"))
    for path in sorted(folder.rglob("*.py")):
        inside = path.relative_to(folder)
        if _LEFT_OUT & set(inside.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
            tree = ast.parse(text)
        except (OSError, UnicodeDecodeError, SyntaxError, ValueError):
            continue
        words = "\n\n".join(docstrings(tree))
        if words:
            yield f"docstrings {inside}", words
        if len(text) <= _LARGEST:
            yield f"source {inside}", text


def docstrings(tree: ast.Module) -> Iterator[str]:
    """Every docstring of a module below the heading of what it documents."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            words = ast.get_docstring(node)
            if words:
                heading = "" if isinstance(node, ast.Module) else f"{node.name}\n"
                yield heading + words


def write_corpus() -> Path:
    """The demo's documents as one JSONL file in the cache, made once per version of Python."""
    import platform

    from headway import files, machine

    path = machine.cache_folder() / "demo" / f"python-{platform.python_version()}.jsonl"
    if not path.is_file():
        files.make_dir(path.parent)
        rows = (dump_json({"text": text, "name": name}).encode() + b"\n" for name, text in documents() if text.strip())
        files.atomic_write(path, rows)
    return path


def run(options: Options) -> None:
    """Make the corpus, train, measure, write, and say what to try next."""
    from headway import api
    from headway.cli.display import Display
    from headway.launch import Launch, train
    from headway.run_config import load_run

    if options.paths:
        raise ConfigError(
            options.paths[0], "the demo takes no path", "key=value", f"headway train data.path={options.paths[0]}"
        )
    printer, began = Printer(json=options.json), time.monotonic()
    note("collecting text from this Python's documentation and source (the first time takes some seconds)")
    corpus = write_corpus()
    note(f"{corpus}: {size(corpus.stat().st_size)}")
    keys = [f"data.path={dump_json(str(corpus))}", "train.sample_prompt=The", *options.overrides]
    if not any(key.startswith(("budget=", "train.steps=")) for key in options.overrides):
        keys.append(f"budget={options.budget}")
    resolved = load_run((), [*keys, f"output={dump_json(options.output)}"])
    with Display() as display:
        done = train(resolved.run, Launch(overwrite=is_own(Path(options.output))), display)
        loaded = api.load(done.folder)
        note("measuring on held-out documents")
        measured = measure(loaded, done)
    how: dict[str, Any] = {"max_tokens": 60, "temperature": 0.7, "seed": 0, "truncate": "left"}
    texts = [api.generate(loaded, prompt, **how)[0].text for prompt in PROMPTS]
    _report(printer, done, measured, texts, time.monotonic() - began)


def measure(loaded: Loaded, done: RunResult) -> Perplexity:
    """Perplexity and bits per byte on documents held out from training, drawn evenly over the corpus."""
    import random

    from headway.evaluation import TextTokens, perplexity

    store, tokenizer = done.plan.material.prepared[0].valid, loaded.words
    numbers = list(range(len(store.ends)))
    random.Random(0).shuffle(numbers)

    def drawn() -> Iterator[TextTokens]:
        left = _MEASURED
        while numbers and left > 0:
            ids = [token for token in store.document(numbers.pop()).tolist() if token not in tokenizer.special_ids]
            left -= len(ids)
            yield TextTokens.of(ids, tokenizer)

    return perplexity(loaded.model, drawn())


def _report(printer: Printer, done: RunResult, measured: Perplexity, texts: list[str], seconds: float) -> None:
    from headway.cli.eval import as_json, show
    from headway.cli.train import summary

    printer.say(f"\nOn {measured.documents} held-out documents:")
    show(printer, measured)
    printer.say("\nIt writes:")
    for prompt, text in zip(PROMPTS, texts, strict=True):
        printer.say(f"  {prompt}{text}".replace("\n", "\n  "))
    folder = done.folder
    printer.say(f"\nloss curve {folder / 'loss.svg'}, {folder / 'loss.png'}; all of it took {duration(seconds)}. Next:")
    for command in (
        f"headway generate {folder} --prompt 'import ' --stream",
        f"headway eval {folder} --data README.md",
        f"headway inspect {folder}",
        "headway train data.path=YOUR_TEXT budget=3m",
    ):
        printer.say(f"  {command}")
    texts_by_prompt = dict(zip(PROMPTS, texts, strict=True))
    result = {**summary(done), "evaluation": as_json(measured), "texts": texts_by_prompt, "total_seconds": seconds}
    printer.result(result)


def is_own(folder: Path) -> bool:
    """Whether what lies there is an earlier demo, which may be replaced: its data is the demo's."""
    from headway.checkpoints.folder import CONFIG
    from headway.machine import cache_folder

    config = folder / CONFIG
    return config.is_file() and f"path: {cache_folder() / 'demo'}" in config.read_text(
        encoding="utf-8", errors="replace"
    )
