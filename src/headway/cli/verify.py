"""`headway verify A B`: prove that two forms of one model answer the same, or name the first thing that differs.

A counts as right. Each is what `headway generate` takes: a run folder, a Hugging Face folder, a GGUF file, a packaged
model's name. Exit code 5 when they differ, after the table. `headway verify A --through merged,hf,gguf,q8_0` writes
these forms of A for a moment and compares each; of codes it tells what they cost.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from headway.cli.options import Common, by_name, option
from headway.cli.output import Printer, duration, note
from headway.errors import ConfigError, DivergedError, InputError

if TYPE_CHECKING:
    from headway.evaluation.agreement import Agreement, Row

_LARGEST = 1 << 24  # bytes of a file of prompts
_OF_TEXT = ("tokens", "vocabulary", "chat template")  # which codes may not change either
_SHOWN = ("max_absolute", "mean_kl", "max_kl", "agreement", "near_ties")


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """What `headway verify` takes."""

    prompts: Annotated[Path | None, option(help="A text file, one prompt per line [20 built-in texts].")] = None
    max_tokens: Annotated[int, option(help="Greedy tokens from each prompt.")] = 32
    tolerance: Annotated[
        float | None,
        option(help="Allowed difference of logits, as a share of the largest [1e-4; 3e-2 if one has 16 bits]."),
    ] = None
    through: Annotated[
        str | None, option(help="Forms to write A in and compare: merged, hf, gguf, q8_0, q4_0, q4_1, commas between.")
    ] = None
    dtype: Annotated[str, option(help="Load both in it: float32, float16, bfloat16 or stored.")] = "stored"


def read_prompts(path: Path) -> list[str]:
    """The lines that are not blank. Raises InputError."""
    from headway.files import read_bytes

    data = read_bytes(path, _LARGEST)
    try:
        lines = data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path} line {line}", f"invalid UTF-8 at byte {error.start}", "UTF-8 text") from None
    prompts = [line.rstrip("\r") for line in lines if line.strip()]
    if not prompts:
        raise InputError(str(path), "0 prompts", "one prompt per line")
    return prompts


def run(options: Options) -> None:
    """Load both, compare, print; raise DivergedError where they differ."""
    options = by_name(options, "headway verify")
    count = 2 if options.through is None else 1
    if len(options.paths) != count:
        expected = "two forms of one model" if count == 2 else "one model"
        raise ConfigError("PATH", f"{len(options.paths)} paths", expected, "headway verify A B")
    prompts = read_prompts(options.prompts) if options.prompts is not None else None
    import time

    from headway import api
    from headway.cli.display import Display
    from headway.evaluation.agreement import agree
    from headway.launch import Phase

    began = time.perf_counter()
    if options.through is not None:
        _through(options, options.through.split(","), prompts)
        return
    a, b = (api.load(path, dtype=options.dtype) for path in options.paths)
    for line in (*a.notes, *b.notes):
        note(f"note: {line}")
    with Display() as display:
        found = agree(
            a,
            b,
            prompts,
            max_tokens=options.max_tokens,
            tolerance=options.tolerance,
            progress=lambda what, done, total: display(Phase(what, done, total)),
        )
    printer = Printer(json=options.json)
    show(printer, options.paths, found)
    seconds = time.perf_counter() - began
    printer.say(f"{'They agree' if found.agrees else 'They differ'}; {duration(seconds)}")
    paths = dict(zip("ab", options.paths, strict=True))
    printer.result({"agrees": found.agrees, **paths, **asdict(found), "seconds": seconds})
    if found.first is not None:
        raise _error(options.paths, found, found.first)


# What each form of --through is written as: form and dtype.
_FORMS: dict[str, tuple[str, str | None]] = {"merged": ("headway", None), "hf": ("hf", None), "gguf": ("gguf", None)}
_FORMS |= {codes: ("gguf", codes) for codes in ("q8_0", "q4_0", "q4_1")}


def _through(options: Options, forms: list[str], prompts: list[str] | None) -> None:
    """Each form against the model as it stands; the first that may not differ and does is the error."""
    import tempfile

    from headway import api, saving
    from headway.evaluation.agreement import agree
    from headway.tuning import adapters

    for form in forms:
        if form not in _FORMS:
            raise ConfigError("--through", repr(form)[:40], ", ".join(_FORMS))
    source, printer, found = options.paths[0], Printer(json=options.json), []
    a = api.load(source, dtype="float32")
    is_adapted = bool(adapters.names(a.model))
    error: DivergedError | None = None
    with tempfile.TemporaryDirectory(prefix="headway-verify-") as place:
        for name in forms:
            form, dtype = _FORMS[name]
            target = Path(place) / (f"{name}.gguf" if form == "gguf" else name)
            saving.save(api.load(source, dtype="float32"), target, form, dtype=dtype, merge=is_adapted)
            said = agree(a, api.load(str(target)), prompts, max_tokens=options.max_tokens, tolerance=options.tolerance)
            text = [row for row in said.rows if row.name in _OF_TEXT]
            first = next((row for row in (said.rows if dtype is None else text) if row.passed is False), None)
            figures = {row.name: row for row in said.rows}
            kl, same = (figures[row].figures.get(key) for row, key in (("logits", "mean_kl"), ("top-1", "agreement")))
            row = {"form": name, "agrees": first is None, "rounds": dtype is not None, "mean_kl": kl, "agreement": same}
            found.append({**row, "first": None if first is None else f"{first.name}, {first.detail}"})
            if first is not None and error is None:
                error = _error([source, name], said, first)
    cells = [
        (
            r["form"],
            "DIFFERS" if r["first"] else "codes" if r["rounds"] else "ok",
            _shown(r["mean_kl"]),
            _shown(r["agreement"]),
        )
        for r in found
    ]
    printer.table(cells, header=(source, "", "mean KL", "same first choice"))
    printer.result({"path": source, "agrees": error is None, "forms": found})
    if error is not None:
        raise error


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float | int) else "n/a"


def _error(paths: list[str], found: Agreement, first: Row) -> DivergedError:
    """The first thing that differs, and what the configs say of it."""
    names = [f"{key} ({one} against {other})" for key, (one, other) in found.config_differences.items()]
    fix = "--tolerance X, if it is meant, or --dtype float32, if it is rounding" if first.limit else ""
    if names and first.name in ("logits", "top-1", "greedy text"):
        fix = f"the same {', '.join(names[:3])}"
    expected = f"within {first.limit:.2g}" if first.limit else "no difference"
    return DivergedError(f"{paths[1]} against {paths[0]}", f"{first.name}, {first.detail}", expected, fix)


def show(printer: Printer, paths: list[str], found: Agreement) -> None:
    """The checks as a table, the first difference of each, and what the configs say differently."""
    printer.say(f"A {paths[0]}\nB {paths[1]}\n")
    rows = []
    for row in found.rows:
        cells = [f"{x:.2g}" if isinstance(x, float) else "n/a" if x is None else x for x in (row.difference, row.limit)]
        rows.append((row.name, row.compared, *cells, {True: "ok", False: "DIFFERS", None: "not compared"}[row.passed]))
    printer.table(rows, header=("", "compared", "differs by", "allowed", ""))
    details = [f"{row.name}: {row.detail}" for row in found.rows if row.detail]
    for row in found.rows:
        known = ((name.replace("_", " "), row.figures[name]) for name in _SHOWN if name in row.figures)
        if figures := [f"{name} {value:.4g}" for name, value in known if isinstance(value, float | int)]:
            details.append(f"{row.name}: {', '.join(figures)}")
    configs = [f"configs: {key} {one} against {other}" for key, (one, other) in found.config_differences.items()]
    for line in ("", *details, *configs, *found.notes):
        printer.say(line)
