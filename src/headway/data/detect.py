"""Is this text? The first bytes of a file against the magic numbers of what is often mistaken for text.

A model trained on a zip file learns noise without a complaint, so anything that is recognisably not UTF-8 text
is refused by name before a token of it is read. What has no magic number and no NUL byte goes on to the UTF-8
decoder in `sources`, which has its own say.
"""

from __future__ import annotations

import re

from headway.errors import InputError

HEAD = 1 << 16
"""How many bytes of a file are looked at."""

# (magic, name, command that makes text of it). Sources: the formats' own specifications; file(1)'s table.
_MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (b"\x1f\x8b", "a gzip archive", "name it .gz, or gunzip it"),
    (b"PK\x03\x04", "a zip archive", "unzip it"),
    (b"PK\x05\x06", "a zip archive", "unzip it"),
    (b"\x7fELF", "an ELF program", ""),
    (b"MZ", "a Windows program", ""),
    (b"\xcf\xfa\xed\xfe", "a Mach-O program", ""),
    (b"\xca\xfe\xba\xbe", "a Java class", ""),
    (b"\x00asm", "a WebAssembly module", ""),
    (b"PAR1", "a parquet file", "write its text column as .jsonl"),
    (b"ARROW1", "an Arrow file", "write its text column as .jsonl"),
    (b"\x89HDF", "an HDF5 file", ""),
    (b"SQLite format 3", "an SQLite database", "write its text column as .jsonl"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", "unzstd it"),
    (b"\xfd7zXZ", "an xz archive", "unxz it"),
    (b"BZh", "a bzip2 archive", "bunzip2 it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it"),
    (b"%PDF-", "a PDF document", "extract its text first (pdftotext)"),
    (b"\xd0\xcf\x11\xe0", "an old Office document", "save it as text"),
    (b"\x89PNG", "a PNG image", ""),
    (b"\xff\xd8\xff", "a JPEG image", ""),
    (b"GIF8", "a GIF image", ""),
    (b"RIFF", "a RIFF file (WAV, AVI, WebP)", ""),
    (b"OggS", "an Ogg file", ""),
    (b"GGUF", "GGUF model weights", ""),
    (b"\x93NUMPY", "a NumPy array", ""),
    (b"\x80\x02", "a pickle", ""),
    (b"\x80\x03", "a pickle", ""),
    (b"\x80\x04", "a pickle", ""),
    (b"\x80\x05", "a pickle", ""),
)
# Longest first: the mark of UTF-32-LE begins with that of UTF-16-LE.
_MARKS = (
    (b"\xff\xfe\x00\x00", "UTF-32"),
    (b"\x00\x00\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)
UTF8_MARK = b"\xef\xbb\xbf"
# Text files do hold tab, line feed, vertical tab, form feed, carriage return, backspace and escape.
_CONTROL = re.compile(rb"[\x00-\x07\x0e-\x1a\x1c-\x1f\x7f]")


class WrongEncodingError(InputError):
    """Text, but in UTF-16 or UTF-32."""


def first_bad_byte(head: bytes) -> int | None:
    """Position of the first byte that text would not hold: a control character or invalid UTF-8."""
    control = _CONTROL.search(head)
    found = [control.start()] if control else []
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.reason != "unexpected end of data" or error.end < len(head):  # else only cut by HEAD
            found.append(error.start)
    return min(found, default=None)


def check_text(head: bytes, where: str) -> None:
    """Refuse a file by its first `HEAD` bytes.

    Raises:
        InputError: a known binary format or a NUL byte, with the first bad byte; UTF-16 or UTF-32, with the
            command that converts it (WrongEncodingError).
    """
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            found = f"{encoding} text (byte order mark {mark.hex(' ')})"
            source = f"zcat {where}" if where.endswith(".gz") else f"cat {where}"
            fix = f"{source} | iconv -f {encoding} -t UTF-8 > text.utf8"
            raise WrongEncodingError(where, found, "UTF-8", fix)
    bad = first_bad_byte(head)
    if bad is None:  # text may begin with "BZh" or "GGUF" too, so a magic number alone proves nothing
        return
    name, fix = next(((name, fix) for magic, name, fix in _MAGIC if head.startswith(magic)), ("", ""))
    if not name and b"\0" in head:
        name, bad = "binary data", head.index(b"\0")
    if name:
        found = f"{name} (byte {bad} is 0x{head[bad]:02x})"
        raise InputError(where, found, "UTF-8 text, .jsonl, or either as .gz", fix)
