"""Reading: what is a document, and FAULTS rows C1-C7, C11, C14, C15."""

import gzip
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import zipfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.data import ReadOptions, ReadReport, documents, open_corpus, sources
from headway.errors import InputError


def texts(path, report=None, **options):
    return [document.text for document in documents(path, ReadOptions(**options), report)]


def refused(path, **options):
    with pytest.raises(InputError) as caught:
        texts(path, **options)
    assert caught.value.exit_code == 3
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.fault("C1")
def test_missing_path_names_the_nearest_sibling(tmp_path):
    (tmp_path / "corpus.txt").write_text("text")
    message = refused(tmp_path / "corpsu.txt")
    assert "corpsu.txt" in message and "did you mean 'corpus.txt'" in message
    (tmp_path / "books").mkdir()
    message = refused(tmp_path / "boks" / "deep" / "a.txt")
    assert "boks" in message and "did you mean 'books'" in message
    assert "did you mean" not in refused(tmp_path / "zzzzzzzz")
    assert texts(tmp_path / "corpus.txt") == ["text"]


@pytest.mark.fault("C2")
@pytest.mark.parametrize("content", [b"", b" \n\t\n", b"\xef\xbb\xbf", b"\xe3\x80\x80\n"])
def test_no_text_is_an_error(tmp_path, content):
    path = tmp_path / "empty.txt"
    path.write_bytes(content)
    assert "0 documents" in refused(path)
    assert "0 documents" in refused(tmp_path)
    (tmp_path / "rows.jsonl").write_text('\n{"text": ""}\n{"text": " "}\n\n')
    assert "0 documents" in refused(tmp_path / "rows.jsonl")
    path.write_bytes(content + b"x")
    assert len(texts(path)) == 1


def zipped():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.txt", "some text in a zip archive")
    return buffer.getvalue()


BINARY = {
    "zip": (zipped(), "zip archive", 2, 3),
    "gzip": (gzip.compress(b"text" * 99), "gzip archive", 0, 0x1F),
    "ELF": (b"\x7fELF\x02\x01\x01" + bytes(60), "ELF program", 0, 0x7F),
    "parquet": (b"PAR1\x15\x04\x15\x10" + bytes(40) + b"PAR1", "parquet file", 4, 0x15),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(9), "PNG image", 0, 0x89),
    "pdf": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj", "PDF", 10, 0xE2),
    "pickle": (b"\x80\x04\x95\x10" + bytes(8), "pickle", 0, 0x80),
    "NULs": (b"text, then\0\0", "binary data", 10, 0),
}


@pytest.mark.fault("C3")
@pytest.mark.parametrize("kind", BINARY)
def test_binary_is_refused_by_its_type_and_first_bad_byte(tmp_path, kind, monkeypatch):
    data, name, place, byte = BINARY[kind]
    path = tmp_path / "data.txt"
    path.write_bytes(data)
    message = refused(path, encoding_errors="replace")
    assert name in message and f"byte {place} is 0x{byte:02x}" in message
    packed = tmp_path / "data.txt.gz"
    packed.write_bytes(gzip.compress(data))
    assert name in refused(packed, encoding_errors="replace")
    if b"\0" not in data:  # without the guard it would be trained on
        monkeypatch.setattr(sources, "check_text", lambda head, where: None)
        assert texts(path, encoding_errors="replace")


@pytest.mark.fault("C3")
def test_a_nul_far_into_a_file_is_found_and_words_that_look_like_magic_are_text(tmp_path):
    path = tmp_path / "late.txt"
    path.write_bytes(b"x" * 3_000_000 + b"\0")
    assert "byte 3000000 is 0x00" in refused(path)
    for start in ("GGUF is a format", "MZ begins programs", "BZh9 too", "PAR1", "%PDF- is a mark", "\x1b[1mbold\f"):
        path.write_text(start)
        assert texts(path) == [start]


@pytest.mark.fault("C3")
def test_a_folder_skips_binary_files_with_a_line(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.png").write_bytes(BINARY["png"][0])
    report = ReadReport()
    assert texts(tmp_path, report) == ["text"]
    assert report.skipped == 1 and "b.png: a PNG image" in report.lines()[0]
    (tmp_path / "a.txt").unlink()
    message = refused(tmp_path)
    assert "0 documents" in message and "PNG" in message


@pytest.mark.fault("C4")
@pytest.mark.parametrize("before", [b"", b"ok\n", b"ok\n" * 100, b"x" * (sources.BLOCK - 1), b"x\n" * sources.BLOCK])
def test_invalid_utf8_names_byte_and_line(tmp_path, before):
    path = tmp_path / "a.txt"
    path.write_bytes(before + b"\xff\xfe" + b"\nmore\n")
    if not before:
        assert "UTF-16" in refused(path)  # the same two bytes are a byte order mark here
        path.write_bytes(b"\xc3\x28\nmore\n")
    message = refused(path)
    assert f"invalid UTF-8 at byte {len(before)}, line {before.count(10) + 1}:" in message
    assert "data.encoding_errors=replace" in message


@pytest.mark.fault("C4")
def test_replace_and_skip_count_the_lines(tmp_path):
    path = tmp_path / "a.txt"
    start = b"good\n" * (sources.BLOCK // 5)  # the bad lines lie on the edge of a block
    path.write_bytes(start[:-2] + b"\xff \xe2\x82\xac\nb\xfe\xfed\n" + b"tail \xf0\x9f")
    for mode, mark in (("replace", "\ufffd"), ("skip", "")):
        report = ReadReport()
        (text,) = texts(path, report, encoding_errors=mode)
        assert text == start[:-2].decode() + f"{mark} €\nb{mark * 2}d\ntail {mark}"
        assert report.bad_lines == 3 and "3 lines held invalid UTF-8" in report.lines()


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1), st.integers(1, 7))
def test_a_block_may_end_anywhere(tmp_path_factory, text, block):
    path = tmp_path_factory.mktemp("blocks") / "a.txt"
    path.write_bytes(text.encode())
    keep, sources.BLOCK = sources.BLOCK, block
    try:
        found = texts(path) if text.strip() and not text.startswith("\ufeff") else [text]
    finally:
        sources.BLOCK = keep
    assert found == [text]


@pytest.mark.fault("C5")
def test_byte_order_marks(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfhello \xef\xbb\xbf")
    assert texts(path) == ["hello \ufeff"]
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "hi"}')
    assert texts(tmp_path / "a.jsonl") == ["hi"]
    for codec, mark in (("utf-16-le", b"\xff\xfe"), ("utf-16-be", b"\xfe\xff")):
        path.write_bytes(mark + "hello".encode(codec))
        message = refused(path)
        assert "UTF-16" in message and f"cat {path} | iconv -f UTF-16 -t UTF-8" in message
        assert "iconv" in refused(tmp_path)  # a folder says so too, unless told to be lenient
        assert texts(tmp_path, encoding_errors="skip") == ["hi"]
    for codec, mark in (("utf-32-le", b"\xff\xfe\0\0"), ("utf-32-be", b"\0\0\xfe\xff")):
        path.write_bytes(mark + "hello".encode(codec))
        assert "iconv -f UTF-32 -t UTF-8" in refused(path)


@pytest.mark.fault("C6")
def test_line_ends_are_kept_or_made_lf(tmp_path):
    lines = ["one", "two", "", "three"]
    for name, end in (("lf", "\n"), ("crlf", "\r\n"), ("cr", "\r"), ("ls", "\u2028")):
        text = end.join(lines)
        (tmp_path / f"{name}.txt").write_bytes(text.encode())
        assert texts(tmp_path / f"{name}.txt") == [text]
        assert texts(tmp_path / f"{name}.txt", newline="lf") == ["\n".join(lines)]
        rows = [json.dumps({"text": f"{line}{end}x"}, ensure_ascii=False) for line in lines]
        separator = "\n" if end == "\u2028" else end  # U+2028 ends no row: it may stand inside a JSON string
        (tmp_path / f"{name}.jsonl").write_bytes(separator.join(rows).encode())
        assert texts(tmp_path / f"{name}.jsonl") == [f"{line}{end}x" for line in lines]
        assert texts(tmp_path / f"{name}.jsonl", newline="lf") == [f"{line}\nx" for line in lines]


@given(st.text(alphabet="a\r\n\u2028", max_size=30), st.integers(1, 5))
def test_lf_does_not_depend_on_blocks(text, size):
    chunks = [text[start : start + size] for start in range(0, len(text), size)]
    assert "".join(sources._unix(chunks)) == text.replace("\r\n", "\n").replace("\r", "\n").replace("\u2028", "\n")


GIANT = """
import sys
from pathlib import Path
from headway.data import open_corpus, prepare, documents
from headway.text import train_tokenizer
def peak():  # ru_maxrss would start at the parent's, even after exec
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024
tokenizer = train_tokenizer([], "byte", 257)
prepare(open_corpus(sys.argv[1] + ".small"), tokenizer, Path(sys.argv[2]), 8)
before = peak()
if sys.argv[3] == "stream":
    train = prepare(open_corpus(sys.argv[1]), tokenizer, Path(sys.argv[2]), 256).train
    assert train.bytes > 45e6
else:
    text = next(documents(sys.argv[1])).text
    tokens = list(tokenizer.encode_long(text))
print(peak() - before)
"""


@pytest.mark.fault("C7")
def test_one_giant_line_is_streamed(tmp_path):
    path = tmp_path / "line.txt"
    path.write_bytes(b"words and more, without an end " * (50_000_000 // 31))
    (tmp_path / "line.txt.small").write_bytes(b"words and more " * 99)

    def grown(how):
        command = [sys.executable, "-c", GIANT, str(path), str(tmp_path / "cache"), how]
        return float(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout)

    assert grown("stream") < 100  # MiB
    assert grown("whole") > 150  # what reading it at once costs


BAD_ROWS = {
    "cut": ('{"text": "a', "not valid JSON"),
    "array": ('["text"]', "an array"),
    "no text": ('{"txt": "a"}', "'text' is missing"),
    "number": ('{"text": 7}', "'text' is an integer"),
    "null": ('{"text": null}', "'text'"),
    "duplicate": ('{"text": "a", "text": "b"}', "'text' appears twice"),
    "deep": ('{"text": "a", "x": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested"),
    "NaN": ('{"text": "a", "x": NaN}', "NaN"),
    "surrogate": ('{"text": "\\ud800"}', "Unicode"),
    "two values": ('{"text": "a"} {"text": "b"}', "not valid JSON"),
}


@pytest.mark.fault("C11")
@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_row_is_named_by_line_and_key(tmp_path, kind):
    row, why = BAD_ROWS[kind]
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "first"}\n\n' + row + '\n{"text": "last"}\n')
    message = refused(path)
    assert "rows.jsonl:3: " in message and why in message
    assert "data.skip_bad_rows=true" in message
    report = ReadReport()
    assert texts(path, report, skip_bad_rows=True) == ["first", "last"]
    assert report.bad_rows == 1 and "rows.jsonl:3" in report.lines()[0]


@pytest.mark.fault("C11")
def test_five_bad_rows_are_listed_and_all_counted(tmp_path):
    path = tmp_path / "rows.ndjson"
    path.write_text("".join('{"text": "good"}\n{"text": 1}\n' for _ in range(8)))
    report = ReadReport()
    assert len(texts(path, report, skip_bad_rows=True)) == 8
    (line,) = report.lines()
    assert "8 bad rows" in line and line.count("rows.ndjson:") == 5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "BLOCK", 8)
        patch.setattr(sources, "MAX_ROW", 10)
        assert "a row of more than 10 characters" in refused(path, skip_bad_rows=True)


@pytest.mark.fault("C14")
def test_special_files_are_skipped_without_a_hang(tmp_path, monkeypatch):
    (tmp_path / "good.txt").write_text("text")
    os.mkfifo(tmp_path / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as unix:
        monkeypatch.chdir(tmp_path)
        unix.bind("sock.txt")
        (tmp_path / "loop").symlink_to(tmp_path)
        (tmp_path / "self").symlink_to(tmp_path / "self")
        (tmp_path / "out.txt").symlink_to("/etc/passwd")
        (tmp_path / ".hidden").write_text("left out")
        (tmp_path / "shut.txt").write_text("unreadable")
        opened = os.open

        def guarded(path, *args, **kwargs):  # chmod means nothing to root, who runs many test machines
            if str(path).endswith("shut.txt"):
                raise PermissionError(13, "Permission denied")
            return opened(path, *args, **kwargs)

        monkeypatch.setattr(os, "open", guarded)
        report, start = ReadReport(), time.monotonic()
        assert texts(tmp_path, report) == ["text"]
        assert time.monotonic() - start < 5
    assert report.skipped == 6
    (tmp_path / "good.txt").unlink()
    assert "0 documents" in refused(tmp_path)
    assert "Permission denied" in refused(tmp_path / "shut.txt")
    for name, kind in (("pipe.txt", "a fifo"), ("sock.txt", "a socket"), ("self", "symbolic links")):
        assert kind in refused(tmp_path / name)
    assert "a device" in refused("/dev/zero")


@pytest.mark.fault("C14")
def test_opening_a_fifo_plainly_would_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    child = os.fork()
    if not child:
        os.close(os.open(tmp_path / "pipe", os.O_RDONLY))
        os._exit(0)
    time.sleep(0.3)
    assert os.waitpid(child, os.WNOHANG) == (0, 0)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def bomb(path, byte, size):
    with gzip.open(path, "wb", compresslevel=9) as file:
        for _ in range(size >> 20):
            file.write(byte * (1 << 20))


@pytest.mark.fault("C15")
@pytest.mark.parametrize("byte", [b"\0", b"a"])
def test_a_gzip_bomb_stops_at_the_cap(tmp_path, byte):
    path = tmp_path / "bomb.txt.gz"
    bomb(path, byte, 128 << 20)
    assert path.stat().st_size < 1 << 18
    read = []
    with pytest.MonkeyPatch.context() as patch:
        plain = sources._read
        patch.setattr(sources, "_read", lambda *args: read.append(len(got := plain(*args))) or got)
        message = refused(path, max_bytes=10_000_000)
    assert "10000000" in message or "0x00" in message
    assert sum(read) < 12_000_000
    if byte == b"a":
        assert "200 times" in refused(path)
        assert sum(map(len, texts(path, max_ratio=2000))) == 128 << 20  # the guards off: all of it


@pytest.mark.fault("C15")
def test_broken_gzip_and_zip_are_refused(tmp_path):
    path = tmp_path / "a.txt.gz"
    whole = gzip.compress(b"some text in here, long enough " * 100_000)
    for data in (whole[: len(whole) // 2], whole[:-4], b"not gzip at all", whole[:100] + b"x" + whole[101:]):
        path.write_bytes(data)
        refused(path)
    path.write_bytes(whole + gzip.compress(b"second member"))
    assert texts(path)[0].endswith("second member")
    (tmp_path / "b.zip").write_bytes(zipped())
    assert "a zip archive" in refused(tmp_path / "b.zip")


def test_folders_are_read_in_order_whatever_the_disk_says(tmp_path):
    for name in ("b.txt", "a/z.md", "a/b/c.py", "a.txt", "__pycache__/x.txt", ".git/y.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "r1"}\n{"text": "r2"}'))
    assert texts(tmp_path) == ["a/b/c.py", "a/z.md", "a.txt", "b.txt", "r1", "r2"]
    assert len(open_corpus(tmp_path).files) == 5


ARTICLES = [
    " \n = First = \n \n Some text . \n = not a title , no blank line = \n \n = = Section = = \n \n More . \n",
    " \n = The = sign = \n \n Text of the second . \n",
    " \n = Third = \n \n The end . \n",
]


def test_wikitext_is_cut_at_its_titles(tmp_path):
    path = tmp_path / "wiki.raw"
    path.write_text("".join(ARTICLES))
    assert texts(path) == ARTICLES
    assert texts(path, split="file") == ["".join(ARTICLES)]
    path.write_text("An essay.\n" + "".join(ARTICLES))
    assert len(texts(path)) == 1


@pytest.mark.parametrize("size", range(1, 60))
def test_a_title_may_lie_across_blocks(size):
    text = "".join(ARTICLES)
    chunks = [text[:20], *(text[start : start + size] for start in range(20, len(text), size))]
    pieces = sources._gathered([*sources._articles(chunks), ("", True)], "wiki", ReadReport())
    assert [piece.text for piece in pieces] == ARTICLES


def test_pieces_of_a_long_document_join_to_it_and_break_at_spaces(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PIECE", 1000)
    monkeypatch.setattr(sources, "BLOCK", 300)
    text = "".join(f"word{number} and, more; " for number in range(2000))
    path = tmp_path / "a.txt"
    path.write_text(text)
    found = list(sources.pieces([path], ReadOptions(), ReadReport()))
    assert "".join(piece.text for piece in found) == text
    assert [piece.first for piece in found] == [True] + [False] * (len(found) - 1)
    assert [piece.last for piece in found] == [False] * (len(found) - 1) + [True]
    assert all(piece.text.startswith(" ") for piece in found[1:]) and len(found) > 30


def test_a_glob_names_files_and_folders_once_in_order(tmp_path):
    for name in ("b/x.txt", "b/deep/z.txt", "a.txt", "c.md", "star*.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)

    def found(pattern):
        return [
            str(file.relative_to(tmp_path))
            for file in sources.find_files(tmp_path / pattern, ReadOptions(), ReadReport())
        ]

    assert found("*.txt") == ["a.txt", "star*.txt"]
    assert found("[ab]*") == ["a.txt", "b/deep/z.txt", "b/x.txt"]
    assert found("**/*.txt") == ["a.txt", "b/deep/z.txt", "b/x.txt", "star*.txt"]
    assert found("b*/") == ["b/deep/z.txt", "b/x.txt"]
    assert found("star*.txt") == ["star*.txt"]  # a file that is really called so
    with pytest.raises(InputError, match=r"\*\.csv: no file or folder matches"):
        found("*.csv")
