"""A corpus and its split: which text trains, which is held out, and the token stores made of both.

    corpus = open_corpus("books/", val_fraction=0.05)       # lists and fingerprints the files
    tokenizer = train_tokenizer(corpus.texts(), ...)        # the training side only
    data = prepare(corpus, tokenizer, Path("run/data"), context=256)
    batches = PackedBatches(data.train, 256, batch_size=8, seed=0)

Held out is, in this order: what `valid_path` names; of several documents those whose hash falls below
`val_fraction`, so that a document keeps its side whatever is added beside it and equal documents share one; of
one single document its tail, cut at a line, word or character.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

from headway.data.sources import PIECE, Piece, ReadOptions, ReadReport, find_files, is_rows, no_documents, pieces
from headway.data.store import Progress, Side, TokenStore, build_stores, clean_temporary, open_stores
from headway.errors import BugError, InputError
from headway.files import open_regular
from headway.strict import dump_json
from headway.text.tokenizer import Tokenizer

_VERSION = 1  # of what a store's bytes mean; raise it when reading, splitting or encoding changes
_SEARCH = 1 << 16  # how far before the cut of a single document a line's end is looked for, in bytes


@dataclass(frozen=True)
class Corpus:
    """The files of a corpus, in reading order, with the hash of their bytes.

    Attributes:
        path, valid_path: as the user gave them.
        val_fraction: share held out when there is no valid_path.
        options: how files become text.
        files, valid_files: what is read.
        hash: sha256 over the files' bytes; independent of where they lie and what they are called.
        report: what listing the files left out.
    """

    path: str
    valid_path: str | None
    val_fraction: float
    options: ReadOptions
    files: tuple[Path, ...]
    valid_files: tuple[Path, ...]
    hash: str
    report: ReadReport

    @cached_property
    def single(self) -> int | None:
        """Bytes of UTF-8 of the only document there is, or None for several. Raises InputError for none."""
        total = seen = 0
        for piece in pieces(self.files, self.options, ReadReport()):
            if piece.first and seen:
                return None
            seen, total = 1, total + len(piece.text.encode())
        if not seen:
            raise no_documents(self.path)
        return total

    @property
    def split(self) -> str:
        """How the held-out side is chosen, in words."""
        if self.valid_path is not None:
            return f"held out: {self.valid_path}"
        share = f"{self.val_fraction:.3g}"
        what = "of the documents, by hash" if self.single is None else "of the single document, its end"
        return f"held out: {share} {what}"

    def pieces(self, report: ReadReport) -> Iterator[tuple[Side, Piece]]:
        """All documents in parts, each with its side. Raises InputError (see `sources`)."""
        every = pieces(self.files, self.options, report)
        if self.valid_path is not None:
            yield from (("train", piece) for piece in every)
            yield from (("valid", piece) for piece in pieces(self.valid_files, self.options, report))
        elif self.single is not None:
            yield from _by_position(every, self.single, self.val_fraction)
        else:
            side: Side = "train"
            for piece in every:
                if piece.first:
                    side = "valid" if place(piece) < self.val_fraction else "train"
                yield side, piece

    def texts(self, side: Side = "train") -> Iterator[str]:
        """The text of one side, in parts of about a million characters at most: what a tokenizer may see."""
        return (piece.text for where, piece in self.pieces(ReadReport()) if where == side)


@dataclass(frozen=True)
class Prepared:
    """Both sides as tokens.

    Attributes:
        train, valid: the stores.
        hash: of everything the tokens depend on; `data_hash` and `tokenizer_hash` are its two main parts.
        built: False if the store was there already.
        lines: what the user should know, one sentence each.
    """

    train: TokenStore
    valid: TokenStore
    hash: str
    data_hash: str
    tokenizer_hash: str
    built: bool
    lines: list[str]


def open_corpus(
    path: str | Path,
    valid_path: str | Path | None = None,
    val_fraction: float = 0.05,
    options: ReadOptions | None = None,
) -> Corpus:
    """List and fingerprint a corpus; every byte is read once, none is decoded yet.

    Raises:
        InputError: a path is missing, special, binary, in UTF-16, or a folder without text.
    """
    options, report = options or ReadOptions(), ReadReport()
    files = tuple(find_files(path, options, report))
    valid_files = tuple(find_files(valid_path, options, report)) if valid_path is not None else ()
    digest = fingerprint(files, valid_files)
    valid = None if valid_path is None else str(valid_path)
    return Corpus(str(path), valid, val_fraction, options, files, valid_files, digest, report)


def fingerprint(*groups: tuple[Path, ...]) -> str:
    """sha256 over the kinds and bytes of files, in order; their names and places do not count."""
    total = hashlib.sha256()
    for files in groups:
        total.update(b"group")
        for file in files:
            with open_regular(file) as raw:
                total.update(bytes([is_rows(file), file.suffix == ".gz"]))
                total.update(hashlib.file_digest(raw, "sha256").digest())
    return total.hexdigest()


def place(piece: Piece) -> float:
    """Where in [0, 1) the hash of a document falls; of a long one its first million characters count."""
    return place_of(piece.text)


def place_of(text: str) -> float:
    """Where in [0, 1) the hash of a text falls: below val_fraction it is held out, whatever stands beside it."""
    return place_of_bytes(text[:PIECE].encode())


def place_of_bytes(data: bytes) -> float:
    """Where in [0, 1) the hash of some bytes falls."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=6).digest()) / 2**48


def _by_position(every: Iterator[Piece], total: int, fraction: float) -> Iterator[tuple[Side, Piece]]:
    """The single document cut in two: the tail of about `fraction` of its bytes is held out."""
    cut, before = total - math.ceil(total * fraction), 0
    for piece in every:
        data = piece.text.encode()
        start, before = before, before + len(data)
        if before <= cut:
            yield "train", replace(piece, last=before == cut)
        elif start >= cut:
            yield "valid", replace(piece, first=start == cut)
        else:
            at = _cut(data, cut - start, min(_SEARCH, int(total * fraction)))
            head, tail = data[:at].decode(), data[at:].decode()
            if head or start:
                yield "train", replace(piece, text=head, last=True)
            yield "valid", replace(piece, text=tail, first=True)


def _cut(data: bytes, at: int, reach: int) -> int:
    """The last line's end, else space, else character's edge at or before `at`."""
    for mark in (b"\n", b" "):
        found = data.rfind(mark, max(at - reach, 0), at) + 1
        if found:
            return found
    while at and data[at] & 0xC0 == 0x80:  # inside a UTF-8 character (RFC 3629)
        at -= 1
    return at


def prepare(
    corpus: Corpus,
    tokenizer: Tokenizer,
    folder: Path,
    context: int,
    progress: Progress | None = None,
) -> Prepared:
    """The corpus as tokens on disk: opened if it was built before, else built.

    Args:
        corpus: what `open_corpus` found.
        tokenizer: encodes user text; ids above 65,535 take four bytes a token.
        folder: holds one sub-folder per combination of bytes, tokenizer and options.
        context: tokens per training window; the training side needs one more.
        progress: called as (bytes read, bytes in all).

    Raises:
        InputError: 0 documents; fewer tokens than a window; nothing held out; a file changed meanwhile; bad
            text (see `sources`). MachineError: the disk refuses.
    """
    parts = {name: value for name, value in asdict(corpus.options).items() if not name.startswith("max_")}
    fraction = None if corpus.valid_path is not None else corpus.val_fraction
    made_of = {"version": _VERSION, "data": corpus.hash, "tokenizer": tokenizer.hash, "val_fraction": fraction, **parts}
    key = hashlib.sha256(dump_json(made_of, sort_keys=True).encode()).hexdigest()
    target = folder / key[:32]
    lines = corpus.report.lines()
    lines += [f"removed {entry.name}, left by a build that was killed" for entry in clean_temporary(folder)]
    ready = open_stores(target, key)
    built = ready is None
    if ready is None:
        if target.exists():
            lines.append(f"{target} is damaged: built again")
        _build(corpus, tokenizer, target, key, context, progress)
        ready = open_stores(target, key)
        if ready is None:
            raise BugError(str(target), "a store just built cannot be opened")
    stores, said = ready
    if set(corpus.files) & set(corpus.valid_files):
        lines.append(f"{corpus.valid_path} is part of the training data: its figures will be too good")
    _check_sizes(corpus, stores["train"], stores["valid"], context)
    return Prepared(stores["train"], stores["valid"], key, corpus.hash, tokenizer.hash, built, lines + said)


def _build(
    corpus: Corpus, tokenizer: Tokenizer, target: Path, key: str, context: int, progress: Progress | None
) -> None:
    report = ReadReport()
    total = sum(file.stat().st_size for file in (*corpus.files, *corpus.valid_files))

    def watched() -> Iterator[tuple[Side, Piece]]:
        for item in corpus.pieces(report):
            yield item
            if progress is not None:
                progress(report.bytes, total)

    def check() -> None:
        if not report.documents:
            raise no_documents(corpus.path, context)
        if fingerprint(corpus.files, corpus.valid_files) != corpus.hash:
            raise InputError(corpus.path, "changed while it was read", "files that hold still", "run again")

    build_stores(watched(), tokenizer, target, key, report, check)


def _check_sizes(corpus: Corpus, train: TokenStore, valid: TokenStore, context: int) -> None:
    n_train, n_valid = len(train.tokens), len(valid.tokens)
    sizes = f"{n_train} tokens ({len(train.ends)} documents) to train, {n_valid} ({len(valid.ends)}) held out"
    if not n_train and corpus.valid_path is not None:
        raise no_documents(corpus.path, context)
    if not n_train:
        fix = f"data.val_fraction={corpus.val_fraction / 2:.3g}, or data.valid_path=FILE"
        raise InputError(corpus.path, f"nothing left to train on: {sizes}", "documents on both sides", fix)
    if n_train < context + 1:
        expected = f"at least {context + 1}, one window of data.context={context} and its last label"
        shorter = f"data.context={n_train - 1} (--context {n_train - 1}), or " if n_train > 2 else ""
        raise InputError(corpus.path, f"{n_train} tokens to train on", expected, f"{shorter}more text")
    if n_valid < 2:
        where = corpus.path if corpus.valid_path is None else corpus.valid_path
        raise InputError(where, f"the validation split is empty: {sizes}", "2 tokens or more held out", _more(corpus))


def _more(corpus: Corpus) -> str:
    """A val_fraction that holds something out."""
    if corpus.valid_path is not None:
        return "name a longer file in data.valid_path"
    enough = 0.5
    if corpus.single is None:
        lowest = min(place(piece) for piece in pieces(corpus.files, corpus.options, ReadReport()) if piece.first)
        enough = (math.floor(lowest * 1000) + 1) / 1000
    fix = f"data.val_fraction={enough:g} (--val-fraction {enough:g}), or " if corpus.val_fraction < enough < 1 else ""
    return f"{fix}data.valid_path=FILE"
