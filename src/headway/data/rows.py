"""Rows of named fields from the files that people keep examples in.

    .jsonl .ndjson    an object a line            .csv    RFC 4180, a header line first
    .json             a list of objects           .tsv    tabs, a header line first, quotes are plain characters
    .parquet          any columns (needs pyarrow) .gz     of all but parquet

`columns` renames: {"text": "sentence"} reads the field `text` from the column `sentence`; for a .csv or .tsv without a
header the columns are called by their numbers, {"text": "1"}. Values keep their types, text in .csv and .tsv is text.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from headway.data.sources import ReadOptions, ReadReport, decoded, find_files, lines
from headway.errors import InputError, MachineError
from headway.files import open_regular
from headway.strict import strict_json

MAX_FIELD = 1 << 24  # characters of one .csv field


class Row(NamedTuple):
    """One row: its fields by name, and `file:number` for messages."""

    fields: Mapping[str, object]
    where: str


def is_table(path: Path) -> bool:
    """Whether the name says that rows lie inside, other than lines of JSON."""
    return path.name.removesuffix(".gz").endswith((".csv", ".tsv", ".json", ".parquet"))


def find_tables(path: str | Path, options: ReadOptions, report: ReadReport) -> list[Path]:
    """The files at `path` in the order in which they are read: parquet files if there are any, else as find_files."""
    path = Path(path)
    tables = [path] if path.suffix == ".parquet" else sorted(path.glob("**/*.parquet")) if path.is_dir() else []
    for table in tables:
        open_regular(table).close()
    return tables or find_files(path, options, report)


def read_rows(
    path: Path, options: ReadOptions, report: ReadReport, columns: Mapping[str, str] | None = None
) -> Iterator[Row]:
    """The rows of one file, in order.

    Args:
        path: a file whose suffix names its format.
        options: how bytes become text; `skip_bad_rows` leaves broken rows out and counts them.
        report: filled while reading.
        columns: field -> column.

    Raises:
        InputError: naming file and row: a broken row, a column that is not there, another format. MachineError: a
            parquet file without pyarrow.
    """
    suffix = Path(path.name.removesuffix(".gz")).suffix
    if suffix not in _READERS:
        raise InputError(str(path), f"rows in a file of the kind {suffix or 'without a suffix'!r}", ", ".join(_READERS))
    for number, fields in _READERS[suffix](path, options, report, columns or {}):
        where = f"{path}:{number}"
        if isinstance(fields, InputError):
            if not options.skip_bad_rows:
                fix = "mend the row, or data.skip_bad_rows=true"
                raise InputError(fields.where, fields.found, fields.expected, fix)
            report.bad_row(f"{fields.where}: {fields.found}")
            continue
        report.documents += 1
        yield Row(_renamed(fields, columns or {}, where), where)


Numbered = Iterator[tuple[int, "dict[str, object] | InputError"]]


def _renamed(fields: dict[str, object], columns: Mapping[str, str], where: str) -> dict[str, object]:
    out = {name: value for name, value in fields.items() if name not in columns.values()}
    for name, column in columns.items():
        if column not in fields:
            there = ", ".join(map(str, fields))[:200]
            raise InputError(where, f"no column {column!r} (data.columns.{name})", f"one of {there}")
        out[name] = fields[column]
    return out


def _json_lines(path: Path, options: ReadOptions, report: ReadReport, columns: Mapping[str, str]) -> Numbered:
    for number, line in lines(decoded(path, options, report), str(path)):
        if line.strip():
            where = f"{path}:{number}"
            try:
                value: object = strict_json(line, where)
            except InputError as error:
                yield number, error
            else:
                yield number, _object(value, where)


def _object(value: object, where: str) -> dict[str, object] | InputError:
    return value if isinstance(value, dict) else InputError(where, f"{type(value).__name__}", "an object")


def _json_list(path: Path, options: ReadOptions, report: ReadReport, columns: Mapping[str, str]) -> Numbered:
    value = strict_json("".join(decoded(path, options, report)), str(path))
    if not isinstance(value, list):
        raise InputError(str(path), f"{type(value).__name__}", "a list of objects; one object a line is .jsonl")
    for number, item in enumerate(value, 1):
        yield number, _object(item, f"{path}:{number}")


def _separated(path: Path, options: ReadOptions, report: ReadReport, columns: Mapping[str, str]) -> Numbered:
    is_csv = path.name.removesuffix(".gz").endswith(".csv")
    text = (line + "\n" for _, line in lines(decoded(path, options, report), str(path)))
    rows: Iterable[list[str]]
    if is_csv:
        csv.field_size_limit(MAX_FIELD)
        rows = csv.reader(text, strict=True)
    else:
        rows = (line.removesuffix("\n").split("\t") for line in text if line.strip())
    names: list[str] | None = None
    has_header = not columns or not all(column.isdecimal() for column in columns.values())
    try:
        for number, row in enumerate(rows, 1):
            if not row:
                continue
            if names is None:
                names = row if has_header else [str(place) for place in range(len(row))]
                _check_header(names, path)
                if has_header:
                    continue
            if len(row) != len(names):
                yield (
                    number,
                    InputError(f"{path}:{number}", f"{len(row)} fields", f"{len(names)}, as in the first line"),
                )
                continue
            yield number, dict(zip(names, row, strict=True))
    except csv.Error as error:
        raise InputError(str(path), f"broken quoting: {error}", "quotes doubled inside a quoted field") from None


def _check_header(names: list[str], path: Path) -> None:
    double = next((name for place, name in enumerate(names) if name in names[:place]), None)
    if double is not None:
        raise InputError(f"{path}:1", f"the column {double!r} twice", "each column once")


def _parquet(path: Path, options: ReadOptions, report: ReadReport, columns: Mapping[str, str]) -> Numbered:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        found = "pyarrow, which reads .parquet, is not installed"
        raise MachineError(str(path), found, "", "pip install 'headway[data]'") from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            report.bytes += path.stat().st_size
            for batch in file.iter_batches(batch_size=1024):
                for fields in batch.to_pylist():
                    number += 1
                    yield number, _finite(fields, f"{path}:{number}")
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(str(path), f"cannot be read: {str(error)[:200]}", "a whole .parquet file") from error


def _finite(fields: dict[str, Any], where: str) -> dict[str, object] | InputError:
    for name, value in fields.items():
        if isinstance(value, float) and not math.isfinite(value):
            return InputError(f"{where} {name}", str(value), "a finite number")
    return fields


_READERS: dict[str, Callable[[Path, ReadOptions, ReadReport, Mapping[str, str]], Numbered]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_list,
    ".csv": _separated,
    ".tsv": _separated,
    ".parquet": _parquet,
}
