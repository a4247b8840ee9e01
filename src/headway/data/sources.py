"""From paths to documents: what is read, what is one document, and what is refused.

    folder --> regular files, sorted --> bytes, 1 MiB at a time --> text --> documents

A document is
- a row's `text` in `.jsonl` and `.ndjson`;
- a whole file otherwise (`.txt`, `.md`, `.rst`, `.py`, any UTF-8 text), except that
- a file that begins like WikiText (a line ` = Title = ` between blank lines) has one document per title.
`.gz` of any of them is read through. White space alone is no document. In a folder, hidden entries and
`__pycache__` are left out; links, special files, unreadable and binary files are skipped with a line.

Line ends are kept byte for byte unless `newline="lf"`; only LF (and CR in .jsonl) ends a row, never U+2028.
Nothing holds more than a few MiB at once, apart from a single .jsonl row (up to 128 Mi characters) and the
text that `documents` hands out whole; `pieces` streams instead.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import os
import re
import stat
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import BinaryIO, Literal

from headway import strict
from headway.data.detect import HEAD, UTF8_MARK, WrongEncodingError, check_text
from headway.errors import InputError, nearest
from headway.files import open_regular

BLOCK = 1 << 20
PIECE = 1 << 20
"""Characters after which a document is handed on in part."""
MAX_ROW = 1 << 27
RATIO_FREE = 1 << 24  # decompressed bytes below which no ratio is suspicious
EXAMPLES = 5


@dataclass(frozen=True)
class ReadOptions:
    """How files become text.

    Args:
        encoding_errors: invalid UTF-8 is an error, becomes U+FFFD, or is left out; the lines are counted.
        newline: keep every line end, or turn CRLF, CR, NEL, U+2028 and U+2029 into LF.
        skip_bad_rows: leave out broken .jsonl rows and count them.
        split: "auto" finds the documents inside a WikiText file; "file" takes every text file whole.
        max_bytes, max_ratio: what one .gz may grow to, in bytes and as a multiple of its own size. deflate
            reaches 1032 to 1 at most; text compresses 2 to 10 times.
    """

    encoding_errors: Literal["strict", "replace", "skip"] = "strict"
    newline: Literal["keep", "lf"] = "keep"
    skip_bad_rows: bool = False
    split: Literal["auto", "file"] = "auto"
    max_bytes: int = 1 << 36
    max_ratio: float = 200.0


@dataclass
class ReadReport:
    """What reading left out or changed; counts in full, examples up to five."""

    documents: int = 0
    empty: int = 0
    bytes: int = 0
    skipped: int = 0
    skipped_examples: list[str] = field(default_factory=list)
    bad_rows: int = 0
    bad_row_examples: list[str] = field(default_factory=list)
    bad_lines: int = 0
    control: Counter[str] = field(default_factory=Counter)

    def skip(self, why: str) -> None:
        """Count a file that is not read."""
        self.skipped += 1
        if len(self.skipped_examples) < EXAMPLES:
            self.skipped_examples.append(why)

    def bad_row(self, why: str) -> None:
        """Count a .jsonl row that is left out."""
        self.bad_rows += 1
        if len(self.bad_row_examples) < EXAMPLES:
            self.bad_row_examples.append(why)

    def lines(self) -> list[str]:
        """One sentence per thing a user should know; empty when nothing was left out."""
        said = []
        if self.skipped:
            said.append(f"{self.skipped} entries skipped: {'; '.join(self.skipped_examples)}")
        if self.bad_rows:
            said.append(f"{self.bad_rows} bad rows skipped: {'; '.join(self.bad_row_examples)}")
        if self.bad_lines:
            said.append(f"{self.bad_lines} lines held invalid UTF-8")
        if self.empty:
            said.append(f"{self.empty} empty documents left out")
        for name, count in sorted(self.control.items()):
            said.append(f"{name!r} stands {count} times in the text; it was encoded as plain text")
        return said


@dataclass(frozen=True, slots=True)
class Document:
    """One whole document: its text and where it came from (`file` or `file:row`)."""

    text: str
    name: str


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a document, at least `PIECE` characters unless it is the last."""

    text: str
    name: str
    first: bool
    last: bool


def check_head(path: Path) -> None:
    """Refuse a file that is not text by its first bytes, decompressed. Raises InputError (see `detect`)."""
    with open_regular(path) as raw:
        check_text(_read(_opened(raw, path), HEAD, path), str(path))


def find_files(
    path: str | Path, options: ReadOptions, report: ReadReport, check: Callable[[Path], None] = check_head
) -> list[Path]:
    """The text files at `path` in the order in which they are read: sorted by their parts.

    Args:
        path: a file, a folder, or a glob of some, as pathlib and the shell have it.
        options, report: as for `documents`.
        check: raises InputError for a file that is not to be read.

    Raises:
        InputError: missing path (with the nearest name beside it), a special file, a binary file, or a folder
            in which no text file is left. UTF-16 and UTF-32, even in a folder if `encoding_errors` is strict.
    """
    if glob.has_magic(str(path)) and not os.path.exists(path):
        matching = sorted(glob.glob(str(path), recursive=True))
        if not matching:
            raise InputError(str(path), "no file or folder matches", "a path or a glob of some", "check the path")
        return list(dict.fromkeys(file for one in matching for file in find_files(one, options, report, check)))
    path = Path(path)
    if not _is_folder(path):
        _check_parents(path)
        check(path)
        return [path]
    found = []
    for file in _walk(path, report):
        try:
            check(file)
            found.append(file)
        except InputError as error:
            if isinstance(error, WrongEncodingError) and options.encoding_errors == "strict":
                raise  # text that the user may well mean to train on
            report.skip(f"{file.relative_to(path)}: {error.found}")
    if not found:
        why = f" ({report.skipped} skipped: {'; '.join(report.skipped_examples)})" if report.skipped else ""
        raise InputError(str(path), f"0 documents: no text file in this folder{why}", "UTF-8 text or .jsonl")
    return found


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except (OSError, ValueError):  # open_regular says what is wrong with it
        return False


def _check_parents(path: Path) -> None:
    """Name the first folder of a path that is missing; the file itself is open_regular's affair."""
    missing = [parent for parent in path.parents if not parent.exists()]
    if missing:
        folder = missing[-1]
        known = [entry.name for entry in folder.parent.iterdir()]
        found = f"no such folder: {str(folder)!r}{nearest(folder.name, known)}"
        raise InputError(str(path), found, "", "check the path")


def _walk(root: Path, report: ReadReport) -> list[Path]:
    """Regular files below `root`. Links are not followed, so nothing outside `root` is read and no loop exists."""
    files, folders = [], [root]
    while folders:
        folder = folders.pop()
        try:
            entries = sorted(folder.iterdir())
        except OSError as error:
            report.skip(f"{folder.relative_to(root)}: {error.strerror}")
            continue
        for entry in entries:
            if entry.name.startswith(".") or entry.name == "__pycache__":
                continue
            mode = entry.lstat().st_mode
            if stat.S_ISDIR(mode):
                folders.append(entry)
            elif stat.S_ISREG(mode):
                files.append(entry)
            else:
                kind = "a link" if stat.S_ISLNK(mode) else "not a regular file"
                report.skip(f"{entry.relative_to(root)}: {kind}")
    return sorted(files, key=lambda file: file.relative_to(root).parts)


def _opened(raw: BinaryIO, path: Path) -> BinaryIO | gzip.GzipFile:
    return gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw


def _read(stream: BinaryIO | gzip.GzipFile, size: int, path: Path) -> bytes:
    try:
        return stream.read(size)
    except (OSError, EOFError, zlib.error) as error:
        what = "a whole gzip file" if path.suffix == ".gz" else "a readable file"
        raise InputError(str(path), f"cannot be read: {error}", what) from error


def blocks(path: Path, options: ReadOptions, report: ReadReport) -> Iterator[bytes]:
    """A file's bytes, decompressed, with the caps of `options` on what decompression may yield."""
    before = report.bytes
    with open_regular(path) as raw:
        stream, total = _opened(raw, path), 0
        while block := _read(stream, BLOCK, path):
            total += len(block)
            used = raw.tell()
            report.bytes = before + used
            if stream is not raw and total > options.max_bytes:
                expected = f"at most {options.max_bytes}"
                fix = f"data.max_bytes={options.max_bytes * 4} if this is meant"
                raise InputError(str(path), f"{total} bytes and more after decompression", expected, fix)
            if stream is not raw and total > max(RATIO_FREE, used * options.max_ratio):
                found = f"grows {total / used:.0f} times on decompression"
                expected = f"at most {options.max_ratio:g} times"
                raise InputError(str(path), found, expected, f"gunzip {path} and look at it first")
            yield block


def decoded(path: Path, options: ReadOptions, report: ReadReport) -> Iterator[str]:
    """A file's text, block by block; a character cut by a block's end is carried to the next."""
    name, pending, offset, line, last_bad = str(path), b"", 0, 1, 0
    mode = {"strict": "strict", "replace": "replace", "skip": "ignore"}[options.encoding_errors]
    for block, final in _with_last(blocks(path, options, report)):
        data = pending + block
        if offset == 0 and data.startswith(UTF8_MARK):
            data, offset = data[len(UTF8_MARK) :], len(UTF8_MARK)
        nul = data.find(b"\0")
        if nul >= 0:
            raise InputError(name, f"binary data (byte {offset + nul} is 0x00)", "UTF-8 text")
        try:
            text, used = codecs.utf_8_decode(data, "strict", final)
        except UnicodeDecodeError as error:
            if mode == "strict":
                at = line + data.count(b"\n", 0, error.start)
                found = f"invalid UTF-8 at byte {offset + error.start}, line {at}: 0x{data[error.start]:02x}"
                fix = f"data.encoding_errors=replace (or skip), or iconv -f LATIN1 -t UTF-8 {name}"
                raise InputError(name, found, "UTF-8 text", fix) from None
            text, used = codecs.utf_8_decode(data, mode, final)
            bad = [line + i for i, row in enumerate(data[:used].split(b"\n")) if not _is_utf8(row)]
            report.bad_lines += len(bad) - (bad[:1] == [last_bad])  # a line may go on over the block's end
            last_bad = bad[-1] if bad else last_bad
        line += data.count(b"\n", 0, used)
        offset, pending = offset + used, data[used:]
        yield text


def _is_utf8(row: bytes) -> bool:
    try:
        row.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _with_last(blocks: Iterable[bytes]) -> Iterator[tuple[bytes, bool]]:
    held = b""
    for block in blocks:
        if held:
            yield held, False
        held = block
    yield held, True


def to_lf(text: str) -> str:
    """Every line end as LF: CRLF, CR, NEL, U+2028 and U+2029."""
    for end in ("\r\n", "\r", "\x85", "\u2028", "\u2029"):
        text = text.replace(end, "\n")
    return text


def _unix(chunks: Iterable[str]) -> Iterator[str]:
    held = ""
    for chunk in chunks:
        chunk = held + chunk
        held = "\r" if chunk.endswith("\r") else ""  # its LF may open the next block
        yield to_lf(chunk.removesuffix("\r"))
    yield to_lf(held)


# WikiText writes an article as ` \n = Title = \n \n`; sections have two and more signs (arXiv 1609.07843). The blank
# lines matter: WikiText-2's train.raw has 629 lines that look like titles, and 600 articles.
_TITLE = re.compile(r"(?m)^[ \t]*\r?\n = [^=\n](?:[^\n]*[^=\n])? = *\r?\n(?=[ \t]*\r?\n)")
_FIRST_TITLE = re.compile(r"(?:[ \t]*\r?\n)* = [^=\n](?:[^\n]*[^=\n])? = *\r?\n(?=[ \t]*\r?\n)")


def _articles(chunks: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Cut WikiText before each title; other text passes as one document.

    The last two whole lines wait for the next chunk, because a title is told by three.
    """
    text, wiki = "", None
    for chunk in chain(chunks, [None]):
        text += chunk or ""
        if wiki is None:
            wiki = _FIRST_TITLE.match(text) is not None
        if not wiki:
            yield text, False
            text = ""
            continue
        keep = len(text) if chunk is None else _third_last_line(text)
        start = 0
        for title in _TITLE.finditer(text):
            if title.start() < keep:
                yield text[start : title.start()], True  # may be empty: what went before it has gone out already
                start = title.start()
        yield text[start:keep], False
        text = text[keep:]


def _third_last_line(text: str) -> int:
    """Where the last two whole lines and the rest begin; the end if they are too long for a title."""
    place = len(text)
    for _ in range(3):
        place = max(text.rfind("\n", 0, place), 0)
    place += text[place : place + 1] == "\n"
    return place if len(text) - place < BLOCK else len(text)


def lines(chunks: Iterable[str], name: str) -> Iterator[tuple[int, str]]:
    """Numbered rows. CR cannot stand inside a JSON string, so a file with lone CRs has the same rows."""
    number, size = 1, 0
    held: list[str] = []
    for chunk in chunks:
        *whole, rest = chunk.split("\n")
        for line in whole:
            for row in ("".join(held) + line).split("\r"):
                yield number, row
            held, size, number = [], 0, number + 1
        held.append(rest)
        size += len(rest)
        if size > MAX_ROW:
            raise InputError(f"{name}:{number}", f"a row of more than {MAX_ROW} characters", "rows, one a line")
    for row in "".join(held).split("\r"):
        yield number, row


def _rows(chunks: Iterable[str], name: str, options: ReadOptions, report: ReadReport) -> Iterator[str]:
    """The `text` of each row of a .jsonl file; blank rows do not count."""
    for number, line in lines(chunks, name):
        if not line.strip():
            continue
        try:
            where = f"{name}:{number}"
            text = strict.field(strict.strict_json(line, where), "text", str, where)
        except InputError as error:
            if not options.skip_bad_rows:
                fix = "mend the row, or data.skip_bad_rows=true"
                raise InputError(error.where, error.found, error.expected, fix) from None
            report.bad_row(f"{error.where}: {error.found}")
            continue
        yield str(text)


def _parts(path: Path, options: ReadOptions, report: ReadReport) -> Iterator[tuple[str, bool]]:
    """A file as (text, whether a document ends there)."""
    chunks = decoded(path, options, report)
    lf = options.newline == "lf"
    if is_rows(path):
        for text in _rows(chunks, str(path), options, report):
            yield to_lf(text) if lf else text, True
        return
    if lf:
        chunks = _unix(chunks)
    yield from _articles(chunks) if options.split == "auto" else ((chunk, False) for chunk in chunks)
    yield "", True


def is_rows(path: Path) -> bool:
    """Whether the file's name says JSON lines."""
    return path.name.removesuffix(".gz").endswith((".jsonl", ".ndjson"))


def _gathered(parts: Iterable[tuple[str, bool]], name: str, report: ReadReport) -> Iterator[Piece]:
    """Parts joined to pieces: a document's first piece is the whole or at least PIECE characters."""
    held: list[str] = []
    size, first = 0, True
    for text, ends in parts:
        held.append(text)
        size += len(text)
        if not ends and size < PIECE:
            continue
        joined = "".join(held)
        stop = len(joined) if ends else _cut(joined)
        if first and ends and not joined.strip():
            report.empty += size > 0
        else:
            report.documents += first
            yield Piece(joined[:stop], name, first, ends)
            first = ends
        held, size = [joined[stop:]], len(joined) - stop


# Where a tokenizer has a boundary whatever its rules are (headway.text.pieces), surest first, so that the tokens of the
# pieces are those of the document: between ASCII words, before any other single space, after a single newline.
_CUTS = tuple(map(re.compile, (r"(?<=[A-Za-z0-9])(?= [A-Za-z0-9])", r"(?<=\S)(?= \S)", r"(?<=\S\n)(?=[^\W_])")))


def _cut(text: str) -> int:
    for pattern in _CUTS:
        places = [match.start() for match in pattern.finditer(text, max(len(text) - 4096, 1))]
        if places:
            return places[-1]
    return len(text)


def pieces(files: Iterable[Path], options: ReadOptions, report: ReadReport) -> Iterator[Piece]:
    """The documents of `files` in parts of bounded size, in order. `report` fills as the parts are taken.

    Raises:
        InputError: naming file and place, for what `options` does not allow.
    """
    for file in files:
        yield from _gathered(_parts(file, options, report), str(file), report)


def documents(
    path: str | Path, options: ReadOptions | None = None, report: ReadReport | None = None
) -> Iterator[Document]:
    """Whole documents at `path`, one in memory at a time.

    Args:
        path: a file or a folder.
        options: how to read; the defaults are strict.
        report: filled while reading, if given.

    Raises:
        InputError: nothing there, nothing readable, 0 documents, or what `options` does not allow.
    """
    options, report = options or ReadOptions(), report or ReadReport()
    held: list[str] = []
    for piece in pieces(find_files(path, options, report), options, report):
        held.append(piece.text)
        if piece.last:
            yield Document("".join(held), piece.name)
            held = []
    if not report.documents:
        raise no_documents(path)


def no_documents(path: str | Path, context: int | None = None) -> InputError:
    """The error for a corpus without text."""
    need = f"text of at least {context + 1} tokens (data.context + 1)" if context else "some text"
    return InputError(str(path), "0 documents: empty or only white space", need, "name a file with text in it")
