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

from headway.data import rows as reader
from headway.data import sources
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
        ".ndjson": "".join(json.dumps(row) + "\n" for row in ROWS),
        ".jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
        ".json": json.dumps(ROWS),
        ".csv": as_csv(ROWS),
        ".tsv": "".join("\t".join(row) + "\n" for row in [list(ROWS[0]), *(list(row.values()) for row in ROWS)]),
    }[suffix.removesuffix(".gz")]
    data = text.encode()
    path.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
    return path


@pytest.mark.parametrize(
    "suffix", [".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz", ".json.gz", ".csv.gz", ".tsv.gz"]
)
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    path = written(tmp_path, suffix)
    assert read(path) == ROWS
    assert is_table(path) == (suffix.removesuffix(".gz") not in (".jsonl", ".ndjson"))
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


field = st.text(st.sampled_from("ab,;\"'\t\r\n é\u2028\x85\ufeff"), max_size=6)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.lists(field, min_size=2, max_size=2), min_size=1, max_size=5),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    st.integers(1, 9),
)
def test_csv_quoting_is_the_csv_modules_in_blocks_of_any_size(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[str]], end: str, quoting: int, block: int
) -> None:
    path = tmp_path_factory.mktemp("csv") / "x.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        # Under another end than CRLF the module's writer leaves a lone CR or LF unquoted, which ends the row.
        sure = quoting if end == "\r\n" else csv.QUOTE_ALL
        writer = csv.writer(file, lineterminator=end, quoting=sure)  # type: ignore[arg-type]
        writer.writerows([["a", "b"], *rows])
    with path.open(encoding="utf-8", newline="") as file:
        _, *wanted = (row for row in csv.reader(file, strict=True) if row)
    keep, sources.BLOCK = sources.BLOCK, block
    try:
        found = [list(row.values()) for row in read(path)]
    finally:
        sources.BLOCK = keep
    assert found == wanted == rows


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from('ab,"\r\n'), max_size=20), st.integers(1, 5))
def test_any_text_is_the_same_rows_or_refused_as_by_the_csv_module(text: str, size: int) -> None:
    chunks = [text[start : start + size] for start in range(0, len(text), size)]
    try:
        wanted = [row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if row]
    except csv.Error:
        wanted = None
    found = [row for _, row in reader._quoted(reader._whole_lines(chunks, "x"), "x")]
    assert (wanted is None) == any(isinstance(row, InputError) for row in found)
    assert wanted is None or found == wanted
    assert "".join(reader._whole_lines(chunks, "x")) == text


def test_a_tsv_keeps_its_quotes(tmp_path: Path) -> None:
    path = tmp_path / "x.tsv"
    path.write_bytes(b'text\tlabel\n"never ends\ta\r\n\nhe said ""hi""\t\n')
    assert read(path) == [{"text": '"never ends', "label": "a"}, {"text": 'he said ""hi""', "label": ""}]


def test_a_row_is_named_by_the_line_where_it_begins(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text('a\n\n"one\ntwo"\nthree\n"four"x\nfive\n"six\n')
    report = ReadReport()
    rows = list(read_rows(path, ReadOptions(skip_bad_rows=True), report))
    assert [row.where for row in rows] == [f"{path}:{line}" for line in (3, 5, 7)]
    assert report.bad_rows == 2 and "x.csv:6" in report.lines()[0] and "x.csv:8" in report.lines()[0]
    (tmp_path / "x.jsonl").write_text('\n{"a": 1}\n\n{"a": 2}')
    assert [row.where[-2:] for row in read_rows(tmp_path / "x.jsonl", ReadOptions(), ReadReport())] == [":2", ":4"]


def test_columns_reach_into_objects(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(
        '{"translation": {"en": "house", "es": "casa"}, "a.b": 1}\n{"translation": {"en": "tree"}, "a.b": 1}\n'
    )
    columns = {"source": "translation.en", "target": "translation.es", "n": "a.b"}
    rows = read_rows(path, ReadOptions(), ReadReport(), columns)
    fields = next(rows).fields
    assert (fields["source"], fields["target"], fields["n"], "a.b" in fields) == ("house", "casa", 1, False)
    with pytest.raises(
        InputError, match=r"x.jsonl:2: no column 'translation.es' .*one of translation, a.b, translation.en"
    ):
        next(rows)
    report = ReadReport()
    assert len(list(read_rows(path, ReadOptions(skip_bad_rows=True), report, columns))) == 1 and report.bad_rows == 1
    with pytest.raises(InputError, match="no column 'x'"):  # a name that no row has is not a bad row
        list(read_rows(path, ReadOptions(skip_bad_rows=True), ReadReport(), {"source": "x"}))
    path.write_text('{"a": 1, "b": 2}')
    assert read(path, {"a": "b", "b": "a"}) == [{"a": 2, "b": 1}]
    assert read(path, {"x": "b", "y": "b"}) == [{"a": 1, "x": 2, "y": 2}]


def test_a_folder_of_rows_is_read_in_order_beside_its_notes(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a/c.jsonl", "README.md", "LICENSE"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}))
    (tmp_path / "c.csv").write_text("text\nc.csv\n")
    written(tmp_path / "a", ".parquet")
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(9))
    report = ReadReport()
    rows = list(read_rows(tmp_path, ReadOptions(), report))
    assert [row.fields["text"] for row in rows] == ["a/c.jsonl", *(row["text"] for row in ROWS), "b.jsonl", "c.csv"]
    assert report.skipped == 3 and "README.md" in report.lines()[0] and "x.png: a PNG image" in report.lines()[0]
    (tmp_path / "a.txt").write_text("a book")  # now it is running text, and its first file says so
    found = find_tables(tmp_path, ReadOptions(), ReadReport())
    assert [file.name for file in found[:3]] == ["LICENSE", "README.md", "a.txt"] and len(found) == 7


def test_line_ends_become_lf_if_asked(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"a": "x\r\ny", "b": [{"c": "\u2028"}], "d": 1}))
    assert read(path) == [{"a": "x\r\ny", "b": [{"c": "\u2028"}], "d": 1}]
    assert read(path, newline="lf") == [{"a": "x\ny", "b": [{"c": "\n"}], "d": 1}]


@pytest.mark.fault("C4")
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl"])
def test_bytes_that_are_no_text_are_refused_as_in_text(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    path.write_bytes(b'[{"a": "\xff"}]' if suffix == ".json" else b'{"a": "\xff"}\n')
    with pytest.raises(InputError, match=r"invalid UTF-8 at byte .*data.encoding_errors=replace"):
        read(path)
    path.write_bytes(b"a\0b")
    with pytest.raises(InputError, match="binary data"):
        read(path)
    path.write_bytes(b"\xff\xfea\0")
    with pytest.raises(InputError, match="UTF-16"):
        read(path)
    path.write_bytes(b"\xef\xbb\xbf" + {".json": b'[{"a": "1"}]', ".jsonl": b'{"a": "1"}'}.get(suffix, b"a\n1\n"))
    assert read(path) == [{"a": "1"}]


@pytest.mark.fault("C15")
def test_what_grows_too_much_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setattr(sources, "RATIO_FREE", 1 << 16)
    packed = tmp_path / "x.csv.gz"
    packed.write_bytes(gzip.compress(b"a\n" + b"x" * 1000 * 1000))
    table = tmp_path / "x.parquet"
    columns = pyarrow.table({"a": ["x" * 1000 * 1000]})
    pyarrow.parquet.write_table(columns, table, compression="zstd", use_dictionary=False)
    for path, found in ((packed, "grows .* times"), (table, "bytes that decompress to")):
        with pytest.raises(InputError, match=found):
            read(path)
        assert len(read(path, max_ratio=10.0**6)[0]["a"]) == 10**6  # type: ignore[arg-type]  # the guard off
        with pytest.raises(InputError, match="at most 100000"):
            read(path, max_ratio=10.0**6, max_bytes=100_000)


def test_a_line_a_field_and_a_list_have_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "BLOCK", 100)
    for name, text, limit, found in (
        ("x.csv", "a\n" + "x" * 999, "MAX_ROW", "x.csv:2: a line of more than 500 characters"),
        ("x.tsv", "a\n" + "x" * 999, "MAX_ROW", "x.tsv:2: a line of more than 500 characters"),
        ("x.json", "[" + " " * 999 + "]", "MAX_LIST", "more than 500 characters"),
        ("x.csv", 'a\n"' + "x\n" * 500, "MAX_FIELD", "x.csv:2: broken quoting: field larger than field limit"),
    ):
        (tmp_path / name).write_text(text)
        with monkeypatch.context() as patch:
            patch.setattr(sources if limit == "MAX_ROW" else reader, limit, 500)
            patch.setattr(csv, "field_size_limit", limited(csv.field_size_limit))
            with pytest.raises(InputError, match=found):
                read(tmp_path / name)
        csv.field_size_limit(reader.MAX_FIELD)
        if limit != "MAX_FIELD":  # the guard off
            assert len(read(tmp_path / name)) == (name != "x.json")


def limited(plain):  # type: ignore[no-untyped-def]
    """The csv module's limit as if the process had never raised it."""
    return lambda *size: plain(500) and 500 if size else 500


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [1.0, float("-inf")], {"b": float("nan")}])
def test_a_parquet_number_that_is_not_finite_is_a_bad_row(tmp_path: Path, value: object) -> None:
    import pyarrow
    import pyarrow.parquet

    good = {float: 0.5, list: [0.5], dict: {"b": 0.5}}[type(value)]
    path = tmp_path / "x.parquet"
    rows = [{"a": good, "t": "x"}, {"a": value, "t": None}, {"a": good, "t": "y"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    with pytest.raises(InputError, match=r"x.parquet:2 a.*(nan|inf); expected a finite number"):
        read(path)
    assert read(path, skip_bad_rows=True) == [rows[0], rows[2]]


def test_parquet_comes_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setattr(reader, "_BATCH", 3)
    path = tmp_path / "x.parquet"
    rows = [{"n": number, "l": [str(number)] * number} for number in range(10)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    found = list(read_rows(path, ReadOptions(), ReadReport()))
    assert [dict(row.fields) for row in found] == rows and found[9].where == f"{path}:10"
    assert read(path, {"text": "n"})[9]["text"] == 9
    (tmp_path / "x.parquet.gz").write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(InputError, match="a parquet file"):
        read(tmp_path / "x.parquet.gz")


@settings(max_examples=40, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255), cut=st.booleans())
def test_a_damaged_parquet_file_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, place: float, byte: int, cut: bool
) -> None:
    path = written(tmp_path_factory.mktemp("p"), ".parquet")
    data = bytearray(path.read_bytes())
    at = int(place * len(data))
    data[at:] = b"" if cut else bytes([byte]) + data[at + 1 :]
    path.write_bytes(data)
    try:
        read(path)
    except InputError as error:
        assert str(path) in str(error)
