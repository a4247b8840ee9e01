"""Rows from every format the same; what is broken is named by file and row, or counted and left out."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.data.rows import find_tables, is_table, read_rows
from headway.data.sources import ReadOptions, ReadReport
from headway.errors import InputError, MachineError

ROWS = [{"text": "one", "label": "a"}, {"text": 'two, "quoted"', "label": "b"}, {"text": "drei ü\u2028x", "label": "a"}]


def read(path: Path, columns: dict[str, str] | None = None, **options: object) -> list[dict[str, object]]:
    report = ReadReport()
    return [dict(row.fields) for row in read_rows(path, ReadOptions(**options), report, columns)]  # type: ignore[arg-type]


def as_csv(rows: list[dict[str, str]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def written(place: Path, suffix: str) -> Path:
    path = place / f"rows{suffix}"
    if suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
        return path
    text = {
        ".jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
        ".json": json.dumps(ROWS),
        ".csv": as_csv(ROWS),
        ".tsv": "".join("\t".join(row) + "\n" for row in [list(ROWS[0]), *(list(row.values()) for row in ROWS)]),
    }[suffix.removesuffix(".gz")]
    data = text.encode()
    path.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz", ".csv.gz"])
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    path = written(tmp_path, suffix)
    assert read(path) == ROWS
    assert is_table(path) == ("jsonl" not in suffix)
    assert find_tables(path, ReadOptions(), ReadReport()) == [path]
    assert find_tables(tmp_path, ReadOptions(), ReadReport()) == [path]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(*[st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=8)] * 2), min_size=1))
def test_csv_is_read_as_the_standard_library_does(tmp_path_factory: pytest.TempPathFactory, rows: list) -> None:
    path = tmp_path_factory.mktemp("csv") / "x.csv"
    wanted = [{"a": a, "b": b} for a, b in rows]
    path.write_text(as_csv(wanted), encoding="utf-8", newline="")
    assert read(path) == wanted


def test_a_field_over_several_lines_is_one_field(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text('text,label\n"one\ntwo",a\nthree,b\n')
    assert read(path) == [{"text": "one\ntwo", "label": "a"}, {"text": "three", "label": "b"}]


def test_columns_are_renamed_and_numbered(tmp_path: Path) -> None:
    path = tmp_path / "x.tsv"
    path.write_text("s\tl\na\tb\n")
    assert read(path, {"text": "s", "label": "l"}) == [{"text": "a", "label": "b"}]
    assert read(path, {"text": "0"}) == [{"text": "s", "1": "l"}, {"text": "a", "1": "b"}]
    with pytest.raises(InputError, match=r"x.tsv:2.*no column 'S' \(data.columns.text\); expected one of s, l"):
        read(path, {"text": "S"})


BAD = {
    "{": (".jsonl", '{"text": "a"}\n{\n{"text": "b"}\n', "x.jsonl:2"),
    "a list": (".jsonl", '{"text": "a"}\n[1]\n{"text": "b"}\n', "x.jsonl:2: list; expected an object"),
    "a double key": (".jsonl", '{"text": "a"}\n{"a": 1, "a": 2}\n{"text": "b"}\n', "x.jsonl:2"),
    "NaN": (".jsonl", '{"text": "a"}\n{"a": NaN}\n{"text": "b"}\n', "x.jsonl:2"),
    "a field too many": (".csv", "text\na\nx,y\nb\n", "x.csv:3: 2 fields; expected 1"),
    "a field too few": (".tsv", "text\tl\na\t1\nx\nb\t2\n", "x.tsv:3: 1 fields; expected 2"),
}


@pytest.mark.fault("C11")
@pytest.mark.parametrize("name", BAD)
def test_a_broken_row_is_named_or_counted(tmp_path: Path, name: str) -> None:
    suffix, text, message = BAD[name]
    path = tmp_path / f"x{suffix}"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        read(path)
    assert message in str(caught.value) and "skip_bad_rows" in str(caught.value)
    report = ReadReport()
    kept = [row.fields["text"] for row in read_rows(path, ReadOptions(skip_bad_rows=True), report)]
    assert kept == ["a", "b"] and report.bad_rows == 1 and message[:8] in report.lines()[0]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.json", '{"text": 1}', "expected a list of objects"),
        ("x.csv", "a,a\n1,2\n", "the column 'a' twice"),
        ("x.csv", 'a\n"x', "broken quoting"),
        ("x.xml", "<a/>", "rows in a file of the kind '.xml'"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        read(tmp_path / name)


def test_parquet_cut_or_without_its_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, ".parquet")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"rows.parquet.*a whole .parquet file"):
        read(path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MachineError, match=r"pip install 'headway\[data\]'"):
        read(path)
