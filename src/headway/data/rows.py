"""Rows of named fields from the files that people keep examples in.

    .jsonl .ndjson    an object a line            .csv    RFC 4180, a header line first
    .json             a list of objects           .tsv    tabs, a header line first, quotes are plain characters
    .parquet          any columns (needs pyarrow) .gz     of all but parquet

`columns` renames: {"text": "sentence"} reads the field `text` from the column `sentence`, {"target": "translation.es"}
from inside an object. If all the columns named are numbers, a .csv or .tsv has no header line: {"text": "1"} is its
second field. Values keep their types; text in .csv and .tsv is text. Every number is finite.

A .tsv cannot say whether its quotes are text: GLUE's are, a spreadsheet's are not. Here they always are, so that no
quote swallows the lines after it. A .csv is stricter than RFC 4180 nowhere and looser in three things: any line end,
blank lines between rows, and a quote inside an unquoted field, which is a plain character.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import NamedTuple, cast

from headway.data import sources
from headway.data.sources import ReadOptions, ReadReport, decoded, lines
from headway.errors import InputError, MachineError
from headway.files import open_regular
from headway.strict import strict_json

MAX_FIELD = 1 << 24  # characters of one .csv field; an open quote would otherwise take in the rest of the file
MAX_LIST = 1 << 30  # characters of one .json file, which is parsed whole
_BATCH = 256  # rows of a .parquet file in memory at once
_LINE_END = re.compile(r"\r\n|\r|\n")
_NOTES = ("README", "LICENSE", "NOTICE", "CITATION", "CHANGELOG", "DATASET_INFOS")
_MISSING = object()


class Row(NamedTuple):
    """One row: its fields by name, and `file:number` for messages.

    The number counts lines in .jsonl, .csv and .tsv, where the row begins, and rows in .json and .parquet, from 1.
    """

    fields: Mapping[str, object]
    where: str


def is_table(path: Path) -> bool:
    """Whether the name says that rows lie inside, other than lines of JSON."""
    return _kind(path) in (".csv", ".tsv", ".json", ".parquet")


def _kind(path: Path) -> str:
    """The suffix, without .gz but of a .parquet file: that has a compression of its own."""
    bare = Path(path.name.removesuffix(".gz")).suffix
    return path.suffix if bare == ".parquet" else bare


def find_tables(path: str | Path, options: ReadOptions, report: ReadReport) -> list[Path]:
    """The files at `path` in the order in which they are read, by their parts.

    A folder that holds rows and nothing else but notes (README, LICENSE) gives its rows' files. Any other is running
    text, and then the first file given is one without rows, if there is one. Raises InputError as sources.find_files.
    """
    found = sources.find_files(path, options, report, _check)
    notes = [file for file in found if file.name.split(".")[0].upper() in _NOTES]
    tables = [file for file in found if _kind(file) in _READERS and file not in notes]
    if not tables or len(tables) + len(notes) < len(found):
        return sorted(found, key=lambda file: _kind(file) in _READERS)  # stable: else in their order
    for file in notes:
        report.skip(f"{file.name}: a note beside rows")
    return tables


def _check(file: Path) -> None:
    if _kind(file) == ".parquet":
        open_regular(file).close()
    else:
        sources.check_head(file)


def read_rows(
    path: str | Path, options: ReadOptions, report: ReadReport, columns: Mapping[str, str] | None = None
) -> Iterator[Row]:
    """The rows at `path`, in order, a few of them in memory at a time (but of .json the whole file).

    Args:
        path: a file whose suffix names its format, or a folder of such files.
        options: how bytes become text; `newline="lf"` changes the texts in rows too; `skip_bad_rows` leaves broken rows
            out and counts them; `max_bytes` and `max_ratio` bound what .gz and .parquet may grow to.
        report: filled while reading.
        columns: field -> column.

    Raises:
        InputError: naming file and row: a broken row, a column that is not there, another format. MachineError: a
            parquet file without pyarrow.
    """
    for file in find_tables(path, options, report):
        yield from _file_rows(file, options, report, columns or {})


def _file_rows(path: Path, options: ReadOptions, report: ReadReport, columns: Mapping[str, str]) -> Iterator[Row]:
    if _kind(path) not in _READERS:
        kind = f"rows in a file of the kind {_kind(path) or 'without a suffix'!r}"
        raise InputError(str(path), kind, ", ".join(_READERS), "a name that ends in the file's format")
    is_first = True
    for number, found in _READERS[_kind(path)](path, options, report, columns):
        where = f"{path}:{number}"
        try:
            if isinstance(found, InputError):
                raise found
            fields = cast("dict[str, object]", _sound(found, options.newline == "lf", where))
            row = Row(_renamed(fields, columns, where, is_first or not options.skip_bad_rows), where)
        except _MissingColumnError:
            raise
        except InputError as error:
            if not options.skip_bad_rows:
                fix = "mend the row, or data.skip_bad_rows=true"
                raise InputError(error.where, error.found, error.expected, fix) from None
            report.bad_row(f"{error.where}: {error.found}")
        else:
            is_first = False
            report.documents += 1
            yield row


class _MissingColumnError(InputError):
    """A column that the user names and the data does not have: no bad row, a bad name."""


Numbered = Iterator[tuple[int, "dict[str, object] | InputError"]]


def _renamed(fields: dict[str, object], columns: Mapping[str, str], where: str, strict: bool) -> dict[str, object]:
    """The fields by the names that the user gave; `strict`: a missing column is the user's mistake, not the row's."""
    out = {name: value for name, value in fields.items() if name not in columns.values()}
    for name, column in columns.items():
        value = _column(fields, column)
        if value is _MISSING:
            inner = [f"{key}.{name}" for key, value in fields.items() if isinstance(value, dict) for name in value]
            found = f"no column {column!r} (data.columns.{name})"
            kind = _MissingColumnError if strict else InputError
            raise kind(where, found, f"one of {', '.join([*map(str, fields), *inner])[:200]}", "name a column there is")
        out[name] = value
    return out


def _column(fields: Mapping[str, object], column: str) -> object:
    """The value of a column, or of `outer.inner` inside an object; _MISSING where there is none."""
    if column in fields:
        return fields[column]
    outer, dot, inner = column.partition(".")
    inside = fields.get(outer)
    return _column(inside, inner) if dot and isinstance(inside, dict) else _MISSING


def _sound(value: object, lf: bool, where: str) -> object:
    """A value with its line ends made LF if that is wanted. Raises InputError for a number that is not finite."""
    if isinstance(value, str):
        return sources.to_lf(value) if lf else value
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(where, str(value), "a finite number")
    if isinstance(value, list | tuple):
        return [_sound(item, lf, where) for item in value]
    if isinstance(value, dict):
        return {key: _sound(item, lf, f"{where} {key}") for key, item in value.items()}
    return value


# --- JSON ------------------------------------------------------------------------------------------------------


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
    parts, size = [], 0
    for part in decoded(path, options, report):
        parts.append(part)
        size += len(part)
        if size > MAX_LIST:
            raise InputError(
                str(path), f"more than {MAX_LIST} characters", "less in one list", "one object a line: .jsonl"
            )
    value = strict_json("".join(parts), str(path))
    if not isinstance(value, list):
        fix = "one object a line is .jsonl"
        raise InputError(str(path), f"{type(value).__name__}", "a list of objects", fix)
    for number, item in enumerate(value, 1):
        yield number, _object(item, f"{path}:{number}")


# --- separated values ------------------------------------------------------------------------------------------


def _separated(path: Path, options: ReadOptions, report: ReadReport, columns: Mapping[str, str]) -> Numbered:
    text = _whole_lines(decoded(path, options, report), str(path))
    names: list[str] | None = None
    has_header = not columns or not all(column.isdecimal() for column in columns.values())
    for number, row in (_quoted if _kind(path) == ".csv" else _plain)(text, str(path)):
        if isinstance(row, InputError):
            if names is None:  # without the names nothing that follows has a meaning
                raise row
            yield number, row
            continue
        if names is None:
            names = row if has_header else [str(place) for place in range(len(row))]
            _check_header(names, f"{path}:{number}")
            if has_header:
                continue
        if len(row) == len(names):
            yield number, dict(zip(names, row, strict=True))
        else:
            expected = f"{len(names)}, as in the first line"
            yield number, InputError(f"{path}:{number}", f"{len(row)} fields", expected)


def _whole_lines(chunks: Iterable[str], name: str) -> Iterator[str]:
    """Lines with their ends, which a quoted field keeps. CR, LF and CRLF end one, as the csv module has it."""
    held: list[str] = []
    size, number, carried = 0, 1, ""
    for chunk in chain(chunks, [None]):
        text = carried + (chunk or "")
        carried = "\r" if chunk is not None and text.endswith("\r") else ""  # its LF may open the next block
        text = text.removesuffix(carried)
        start = 0
        for end in _LINE_END.finditer(text):
            yield "".join([*held, text[start : end.end()]])
            held, size, start, number = [], 0, end.end(), number + 1
        held.append(text[start:])
        size += len(text) - start
        if size > sources.MAX_ROW:
            raise InputError(
                f"{name}:{number}", f"a line of more than {sources.MAX_ROW} characters", "rows, one a line"
            )
    if size:
        yield "".join(held)


def _plain(text: Iterable[str], name: str) -> Iterator[tuple[int, list[str] | InputError]]:
    for number, line in enumerate(text, 1):
        bare = line.rstrip("\r\n")
        if bare:
            yield number, bare.split("\t")


def _quoted(text: Iterable[str], name: str) -> Iterator[tuple[int, list[str] | InputError]]:
    # The limit is the process's; raised only, so that nobody else's reading breaks.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_FIELD))
    reader = csv.reader(text, strict=True)
    while True:
        number = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:  # the reader begins anew with the next line
            found, expected = f"broken quoting: {error}", "quotes doubled inside a quoted field"
            yield number, InputError(f"{name}:{number}", found, expected)
        else:
            if row:
                yield number, row


def _check_header(names: list[str], where: str) -> None:
    double = next((name for place, name in enumerate(names) if name in names[:place]), None)
    if double is not None:
        raise InputError(where, f"the column {double!r} twice", "each column once", "rename one of them")


# --- parquet ---------------------------------------------------------------------------------------------------


def _parquet(path: Path, options: ReadOptions, report: ReadReport, columns: Mapping[str, str]) -> Numbered:
    try:
        # From 15 on: earlier releases may run code that a file brings along (CVE-2023-47248, mended in 14.0.1).
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        found = "pyarrow, which reads .parquet, is not installed"
        raise MachineError(str(path), found, "", "pip install 'headway[data]'") from None
    number = 0
    try:
        with open_regular(path) as raw, pyarrow.parquet.ParquetFile(raw) as file:
            size = path.stat().st_size
            _check_growth(file.metadata, size, options, path)
            _check_header(file.schema_arrow.names, str(path))
            report.bytes += size
            for batch in file.iter_batches(batch_size=_BATCH):
                for fields in batch.to_pylist():
                    number += 1
                    yield number, fields
    except InputError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # ValueError: text that is not UTF-8
        found = f"cannot be read after row {number}: {str(error)[:200]}"
        raise InputError(str(path), found, "a whole .parquet file") from error


def _check_growth(metadata: object, size: int, options: ReadOptions, path: Path) -> None:
    """Hold what the file says it will decompress to against the caps of `options`."""
    groups = range(getattr(metadata, "num_row_groups", 0))
    total = sum(metadata.row_group(group).total_byte_size for group in groups)  # type: ignore[attr-defined]
    limit = min(options.max_bytes, max(sources.RATIO_FREE, int(size * options.max_ratio)))
    if total > limit:
        raise InputError(str(path), f"{size} bytes that decompress to {total}", f"at most {limit}", "look at it first")


_READERS: dict[str, Callable[[Path, ReadOptions, ReadReport, Mapping[str, str]], Numbered]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_list,
    ".csv": _separated,
    ".tsv": _separated,
    ".parquet": _parquet,
}
