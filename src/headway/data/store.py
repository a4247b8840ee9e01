"""Tokens on disk: one memory-mapped array of ids per split, with the documents' ends and byte counts.

    folder/meta.json                      what it was made of, and the sha256 of each file beside it
    folder/{train,valid}.tokens           uint16, or uint32 above 65,536 ids, little-endian
    folder/{train,valid}.ends             int64: where each document ends in the tokens, its eos included
    folder/{train,valid}.sizes            int64: each document's length in bytes of UTF-8

A store is written beside its place and renamed there when it is whole, so that a reader sees all of it or
nothing. Left out: appending to a store. A changed corpus is another store.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray

from headway import files
from headway.data.sources import Piece, ReadReport
from headway.errors import InputError, MachineError
from headway.strict import dump_json, field, strict_json
from headway.text.tokenizer import Tokenizer

Side = Literal["train", "valid"]
SIDES: tuple[Side, Side] = ("train", "valid")
TokenIds = NDArray[np.uint16] | NDArray[np.uint32]
Progress = Callable[[int, int], None]

META = "meta.json"
_COLUMNS = ("tokens", "ends", "sizes")
_FLUSH = 1 << 22  # bytes held per column before they are written
_SMALL = 1 << 16  # characters up to which documents are encoded many at a time, on all cores
_BATCH = 1 << 21


@dataclass(frozen=True)
class TokenStore:
    """The tokens of a corpus or of one side of its split.

    Attributes:
        tokens: ids, N of them, each document's followed by eos if the tokenizer has one.
        ends: end of each document in `tokens`, ascending, the last being N.
        sizes: bytes of UTF-8 of each document.
        hash: what the tokens depend on: source bytes, tokenizer and reading options.
    """

    tokens: TokenIds
    ends: NDArray[np.int64]
    sizes: NDArray[np.int64]
    hash: str

    @classmethod
    def of(cls, documents: Sequence[Sequence[int]], sizes: Sequence[int] | None = None) -> TokenStore:
        """A store in memory from token ids per document; a document's size is its length unless given."""
        flat = np.array([token for document in documents for token in document], dtype=np.uint32)
        lengths = np.array([len(document) for document in documents], dtype=np.int64)
        digest = hashlib.sha256(flat.tobytes() + lengths.tobytes()).hexdigest()
        return cls(flat, lengths.cumsum(), np.array(sizes if sizes is not None else lengths, np.int64), digest)

    @cached_property
    def bytes(self) -> int:
        """Bytes of UTF-8 that the tokens stand for."""
        return int(self.sizes.sum())

    @property
    def bytes_per_token(self) -> float:
        """Mean over the whole store, eos counted: bits per byte = bits per token / this. NaN when empty."""
        return self.bytes / len(self.tokens) if len(self.tokens) else float("nan")

    def document(self, number: int) -> TokenIds:
        """The tokens of one document, its eos included."""
        start = int(self.ends[number - 1]) if number else 0
        return self.tokens[start : int(self.ends[number])]


def open_stores(folder: Path, key: str) -> tuple[dict[Side, TokenStore], list[str]] | None:
    """Map the stores in `folder` and give what was said when they were built.

    Returns:
        None if the folder is absent, of another key, or damaged (sizes or sha256 differ): build it again.
    """
    try:
        meta = strict_json(files.read_bytes(folder / META, 1 << 24), str(folder / META))
        if field(meta, "hash", str, META) != key:
            return None
        dtype = np.dtype({"<u2": "<u2"}.get(str(field(meta, "dtype", str, META)), "<u4"))
        digests = cast("dict[str, object]", field(meta, "sha256", dict, META))
        stores = {}
        for side in SIDES:
            columns = [_mapped(folder / f"{side}.{column}", digests, dtype) for column in _COLUMNS]
            stores[side] = TokenStore(columns[0], columns[1], columns[2], f"{key}-{side}")  # type: ignore[arg-type]
        return stores, [str(line) for line in cast("list[object]", field(meta, "lines", list, META))]
    except (InputError, OSError, TypeError):
        return None


def _mapped(path: Path, digests: Mapping[str, object], tokens: np.dtype[np.generic]) -> NDArray[np.generic]:
    with files.open_regular(path) as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != digests.get(path.name):
            raise InputError(str(path), "does not match its manifest")
    dtype = tokens if path.suffix == ".tokens" else np.dtype("<i8")
    if not path.stat().st_size:
        return np.empty(0, dtype)
    # asarray drops np.memmap's subclass, whose indexing costs several times as much; the mapping stays.
    return np.asarray(np.memmap(path, dtype, mode="r"))


class _Column:
    """One file that grows by blocks, its digest kept as it grows."""

    def __init__(self, path: Path, dtype: str) -> None:
        self.path, self.dtype, self.digest = path, np.dtype(dtype), hashlib.sha256()
        self._held: list[NDArray[np.generic]] = []
        self._size = 0
        files.write(path, b"")

    def add(self, values: NDArray[np.generic] | Sequence[int]) -> None:
        block = np.asarray(values, dtype=self.dtype)
        self._held.append(block)
        self._size += block.nbytes
        if self._size >= _FLUSH:
            self.flush()

    def flush(self) -> None:
        if self._held:
            data = np.concatenate(self._held).tobytes()
            self.digest.update(data)
            files.append(self.path, data)
        self._held, self._size = [], 0


class _Writer:
    """The three columns of one side."""

    def __init__(self, folder: Path, side: Side, tokenizer: Tokenizer) -> None:
        self.columns = {
            column: _Column(folder / f"{side}.{column}", dtype)
            for column, dtype in zip(_COLUMNS, (token_dtype(tokenizer.vocab_size), "<i8", "<i8"), strict=True)
        }
        eos, bos = tokenizer.eos_id, tokenizer.bos_id
        self._after = [] if eos is None else [eos]
        self._before = [] if bos is None or bos == eos else [bos]
        self._end = self._bytes = 0

    def add(self, ids: Iterable[NDArray[np.generic] | Sequence[int]], piece: Piece) -> None:
        """Append a piece's ids, with what opens and closes a document where it does."""
        for block in (self._before * piece.first, *ids, self._after * piece.last):
            self.columns["tokens"].add(block)
            self._end += len(block)
        self._bytes += len(piece.text) if piece.text.isascii() else len(piece.text.encode())
        if piece.last:
            self.columns["ends"].add([self._end])
            self.columns["sizes"].add([self._bytes])
            self._bytes = 0


def token_dtype(vocab_size: int) -> str:
    """The smallest of uint16 and uint32 that holds every id."""
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


def build_stores(
    pieces: Iterable[tuple[Side, Piece]],
    tokenizer: Tokenizer,
    folder: Path,
    key: str,
    report: ReadReport,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Encode `pieces` into a new store at `folder`; nothing is visible there before it is whole.

    Args:
        pieces: parts of documents with their side, in order.
        tokenizer: ids of its control tokens never come from the text; their spellings are counted in `report`.
        folder: where the store appears; what is there and does not match `key` is replaced.
        key: the hash of everything the tokens depend on.
        report: what reading said so far; its lines are kept in the store.
        check: called when all is read and before the store appears; may raise.

    Raises:
        InputError: from the sources. MachineError: the disk refuses. Nothing is left behind but for a kill.
    """
    files.make_dir(folder.parent)
    temporary = files.temporary_sibling(folder)
    try:
        files.make_dir(temporary)
        writers = {side: _Writer(temporary, side, tokenizer) for side in SIDES}
        _encode(pieces, tokenizer, writers, report)
        check()
        columns = [column for writer in writers.values() for column in writer.columns.values()]
        for column in columns:
            column.flush()
            files.sync(column.path)
        meta = {
            "hash": key,
            "tokenizer": tokenizer.hash,
            "dtype": token_dtype(tokenizer.vocab_size),
            "sha256": {column.path.name: column.digest.hexdigest() for column in columns},
            "lines": report.lines(),
        }
        files.atomic_write(temporary / META, dump_json(meta).encode())
        _place(temporary, folder, key)
    except BaseException:
        with contextlib.suppress(MachineError):
            files.remove_tree(temporary)
        raise


def _place(temporary: Path, folder: Path, key: str) -> None:
    if folder.exists() and open_stores(folder, key) is None:
        files.remove_tree(folder)
    try:
        files.rename(temporary, folder)
        files.sync(folder.parent)
    except MachineError:
        if open_stores(folder, key) is None:  # else another process has just built the same
            raise
        files.remove_tree(temporary)


def _encode(
    pieces: Iterable[tuple[Side, Piece]], tokenizer: Tokenizer, writers: dict[Side, _Writer], report: ReadReport
) -> None:
    """Small documents many at a time, which uses all cores; long ones in order, in bounded memory."""
    names = [name for name in map(tokenizer.token, sorted(tokenizer.special_ids)) if name]
    waiting: list[tuple[Side, Piece]] = []
    size = 0

    def flush() -> None:
        nonlocal waiting, size
        batch = tokenizer.encode_batch([piece.text for _, piece in waiting])
        for (side, piece), ids in zip(waiting, batch, strict=True):
            writers[side].add([ids], piece)
        waiting, size = [], 0

    for side, piece in pieces:
        for name in names:
            count = piece.text.count(name)
            if count:
                report.control[name] += count
        if piece.first and piece.last and len(piece.text) <= _SMALL:
            waiting.append((side, piece))
            size += len(piece.text)
            if size >= _BATCH:
                flush()
        else:
            flush()
            writers[side].add(tokenizer.encode_long(piece.text), piece)
    flush()


def clean_temporary(folder: Path) -> Iterator[Path]:
    """Remove what builds that were killed left in `folder`; a build whose process lives is left alone."""
    for entry in sorted(folder.glob(f"{files.TEMPORARY_PREFIX}*")):
        pid = entry.name.removeprefix(files.TEMPORARY_PREFIX).split("-")[0]
        if pid.isdigit() and not _alive(int(pid)):
            files.remove_tree(entry)
            yield entry


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
