"""GGUF files: the header parsed with suspicion, tensors read one at a time, files written as a stream of chunks.

The format (github.com/ggml-org/ggml, docs/gguf.md), little-endian: magic, version, counts; metadata as typed key-value
pairs; for each tensor its name, sizes, type and offset; then the data, every tensor padded to `general.alignment`.
What ggml itself refuses (ggml/src/gguf.cpp) is refused here, and each declared count must fit the bytes that are left
before anything is allocated for it (rows Q1, Q2, Q4, Q6). Written files are byte for byte those of the `gguf` package.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from headway.errors import BugError, InputError
from headway.files import Chunk, open_regular
from headway.kernels.ggml import BLOCKS

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 20
MAX_HEADER = 1 << 26  # 64 MiB, 37 times that of 49,152 tokens with merges; Python's values take up to nine times that
MAX_KEY = (1 << 16) - 1
MAX_DIMS = 4
MAX_NAME = 63  # bytes; GGML_MAX_NAME is 64 with the closing NUL
PIECE = 1 << 18  # bytes of the header at a time: at most this much of the data is read with it

# Value types: id, and the code that struct and numpy share. Strings and arrays are put together by hand.
_SCALARS = {
    "uint8": (0, "B"),
    "int8": (1, "b"),
    "uint16": (2, "H"),
    "int16": (3, "h"),
    "uint32": (4, "I"),
    "int32": (5, "i"),
    "float32": (6, "f"),
    "bool": (7, "?"),
    "uint64": (10, "Q"),
    "int64": (11, "q"),
    "float64": (12, "d"),
}
_STRING, _ARRAY = 8, 9
_IDS = {name: id for name, (id, _) in _SCALARS.items()} | {"string": _STRING}
_TYPES = {id: name for name, id in _IDS.items()}
_KINDS = {block.id: block.name for block in BLOCKS.values()}
_OTHERS = {10: "Q2_K", 11: "Q3_K", 20: "IQ4_NL", 23: "IQ4_XS", 26: "I32", 39: "MXFP4"}  # named when refused
_U64 = struct.Struct("<Q")


class GgufTensor(NamedTuple):
    """One tensor of a file: format (a name of kernels.ggml.BLOCKS), shape (last = contiguous), place, size in bytes."""

    kind: str
    shape: tuple[int, ...]
    begin: int
    size: int


def packed_shape(kind: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of a tensor's raw bytes: (*shape[:-1], row_bytes). Rows must be whole blocks."""
    block = BLOCKS[kind]
    return (*shape[:-1], shape[-1] // block.size * block.bytes)


def _is_name(text: str, longest: int) -> bool:
    return text.isprintable() and 0 < len(text.encode()) <= longest


def _alignment(where: str, metadata: Mapping[str, object], types: Mapping[str, str]) -> int:
    value, kind = metadata.get("general.alignment", ALIGNMENT), types.get("general.alignment", "uint32")
    if kind != "uint32" or not isinstance(value, int) or not 0 < value <= MAX_ALIGNMENT or value & (value - 1):
        found = f"general.alignment is {str(value)[:20]} ({kind})"
        raise InputError(where, found, f"a power of two up to {MAX_ALIGNMENT}, as uint32")
    return value


def _check_tensor(where: str, name: str, kind: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor whose format and sizes fit each other. Raises InputError."""
    if not 1 <= len(shape) <= MAX_DIMS or not all(0 < size < 1 << 63 for size in shape):
        raise InputError(where, f"tensor {name!r}: shape {tuple(shape)}", f"1 to {MAX_DIMS} sizes of 1 or more")
    if shape[-1] % BLOCKS[kind].size:
        found = f"tensor {name!r}: rows of {shape[-1]} weights"
        raise InputError(where, found, f"a multiple of {BLOCKS[kind].size}, the block of {kind}")
    return math.prod(packed_shape(kind, shape))


class _Header:
    """The bytes of a header, fetched from the file as they are asked for."""

    def __init__(self, file: BufferedReader, where: str) -> None:
        self.where, self._file = where, file
        self.size = file.seek(0, os.SEEK_END)
        self._buffer, self._end = bytearray(), min(self.size, MAX_HEADER)
        self.at = 0  # bytes read so far
        file.seek(0)

    def refuse(self, found: str, expected: str = "") -> NoReturn:
        raise InputError(self.where, found, expected)

    def claim(self, size: int, what: str) -> None:
        """Refuse what needs more bytes than the file, or a header, has left."""
        if size > self._end - self.at:
            left = self._end - self.at
            found = f"{self.size} bytes, cut short or damaged: {what} at byte {self.at} takes {size} or more"
            self.refuse(found, f"at most the {left} bytes left{' for a header' * (self._end < self.size)}")

    def need(self, size: int, what: str) -> None:
        """Have the next `size` bytes in the buffer."""
        self.claim(size, what)
        while (missing := self.at + size - len(self._buffer)) > 0:
            piece = self._file.read(max(missing, PIECE))
            if not piece:
                self.refuse("changed while it was read", "a file that nobody is writing")
            self._buffer += piece

    def values(self, code: str, count: int, what: str) -> list[Any]:
        """`count` numbers of one code, as Python's own."""
        kind = np.dtype(f"<{code}")
        self.need(kind.itemsize * count, what)
        found: list[Any] = np.frombuffer(self._buffer, kind, count, self.at).tolist() if count else []
        self.at += kind.itemsize * count
        return found

    def number(self, code: str, what: str) -> int:
        value: int = self.values(code, 1, what)[0]
        return value

    def strings(self, count: int, what: str) -> list[str]:
        """`count` strings, each a 64-bit length and as many bytes of UTF-8."""
        self.claim(8 * count, what)
        found: list[str] = []
        buffer, at, unpack = self._buffer, self.at, _U64.unpack_from
        try:
            for _ in range(count):
                if at + 8 > len(buffer):
                    self.at = at
                    self.need(8, what)
                end = at + 8 + unpack(buffer, at)[0]
                if end > len(buffer):
                    self.at = at
                    self.need(end - at, what)
                found.append(buffer[at + 8 : end].decode())
                at = end
        except UnicodeDecodeError:
            self.refuse(f"{what} at byte {at} is not UTF-8", "valid UTF-8")
        self.at = at
        return found

    def name(self, what: str, longest: int) -> str:
        """A key or a tensor's name."""
        name = self.strings(1, what)[0]
        if not _is_name(name, longest):
            self.refuse(f"{what} {name[:80]!r} of {len(name)} characters", f"1 to {longest} printable bytes")
        return name

    def pair(self) -> tuple[str, object, str]:
        """A metadata entry: key, value, and the name of its type."""
        key = self.name("a key", MAX_KEY)
        what, id, count = f"the value of {key[:80]!r}", self.number("I", "a value's type"), 1
        if is_array := id == _ARRAY:
            id, count = self.number("I", "an array's type"), self.number("Q", "an array's length")
        if id not in _TYPES:
            self.refuse(f"{key[:80]!r} is of type {id}", f"one of {', '.join(_IDS)}, or an array of one of them")
        kind = _TYPES[id]
        if kind == "string":
            values: list[Any] = self.strings(count, what)
        else:
            values = self.values("B" if kind == "bool" else _SCALARS[kind][1], count, what)
        if kind == "bool":
            if max(values, default=0) > 1:
                self.refuse(f"{what} holds a bool of {max(values)}", "0 or 1")
            values = list(map(bool, values))
        return key, values if is_array else values[0], f"{kind}[]" if is_array else kind

    def tensor(self) -> tuple[str, str, tuple[int, ...], int]:
        """A tensor's entry: name, format, shape, offset in the data."""
        name = self.name("a tensor's name", MAX_NAME)
        what = f"the entry of tensor {name!r}"
        n_dims = self.number("I", what)
        if not 1 <= n_dims <= MAX_DIMS:
            self.refuse(f"tensor {name!r} has {n_dims} dimensions", f"1 to {MAX_DIMS}")
        shape = tuple(reversed(self.values("Q", n_dims, what)))  # ggml puts the contiguous dimension first
        id, offset = self.number("I", what), self.number("Q", what)
        if id not in _KINDS:
            self.refuse(f"tensor {name!r} is of ggml type {_OTHERS.get(id, id)}", f"one of {', '.join(BLOCKS)}")
        return name, _KINDS[id], shape, offset

    def counts(self) -> tuple[int, int]:
        """Tensors and metadata entries, after magic and version."""
        if self.size < 24:
            self.refuse(f"{self.size} bytes", "a GGUF file, at least 24 bytes")
        self.need(24, "the start")
        if self._buffer[:4] != MAGIC:
            self.refuse(f"begins with {bytes(self._buffer[:4])!r}", f"a GGUF file: {MAGIC!r}")
        self.at = 4
        version = self.number("I", "the version")
        if version & 0xFFFF == 0 and version:
            self.refuse("a big-endian GGUF file", "a little-endian one")
        if version not in (2, VERSION):
            self.refuse(f"GGUF version {version}", f"version 2 or {VERSION}")
        tensors, pairs = self.number("Q", "the count of tensors"), self.number("Q", "the count of keys")
        # At least: key of one letter, type, one byte; name of one letter, one size, type, offset.
        self.claim(14 * pairs + 33 * tensors, f"metadata of {pairs} keys and {tensors} tensors")
        return tensors, pairs


class Gguf:
    """An open GGUF file: metadata and where its tensors lie; their bytes are read when asked for.

    `types` names each value's type, such as `uint32` or `string[]`, so that a copy can be written byte for byte.
    A context manager; reading after `close` is an error.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._file = path, open_regular(path)
        self.metadata: dict[str, object] = {}
        self.types: dict[str, str] = {}
        self.tensors: dict[str, GgufTensor] = {}
        try:
            self._parse(_Header(self._file, str(path)))
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise InputError(str(path), f"cannot be read: {error.strerror}", "a readable file") from error
            raise

    def _parse(self, header: _Header) -> None:
        n_tensors, n_pairs = header.counts()
        for _ in range(n_pairs):
            key, value, kind = header.pair()
            if key in self.metadata:
                header.refuse(f"key {key[:80]!r} appears twice")
            self.metadata[key], self.types[key] = value, kind
        alignment = _alignment(header.where, self.metadata, self.types)
        entries = [header.tensor() for _ in range(n_tensors)]
        end = header.at
        begin = reached = end + -end % alignment
        for name, kind, shape, offset in entries:
            size = _check_tensor(header.where, name, kind, shape)
            if name in self.tensors:
                header.refuse(f"tensor {name!r} appears twice")
            if (place := begin + offset) != reached:
                fault = "is not aligned" if place < reached else "leaves a hole before it"
                fault = "overlaps the one before it" if place < end else fault
                header.refuse(f"tensor {name!r} {fault}", f"offset {reached - begin}, not {offset}")
            self.tensors[name] = GgufTensor(kind, shape, reached, size)
            end = reached + size
            reached = end + -end % alignment
        # Some writers leave out the padding at the very end, where nothing can be missing.
        if header.size not in (end, reached):
            fault = "cut short" if header.size < reached else "followed by bytes that belong to no tensor"
            header.refuse(f"{fault}: {header.size} bytes", f"{reached} bytes by its header")

    def raw(self, name: str, out: Tensor | None = None, *, part: int | None = None) -> Tensor:
        """A tensor's bytes: uint8 (*shape[:-1], row_bytes), read into fresh memory, or into `out` of that many bytes.

        kernels.ggml.dequantize makes weights of them. Of a stack (E, ...) `part` is the one matrix to read.
        Raises InputError if the file was cut since it was opened.
        """
        tensor = self.tensors[name]
        shape = packed_shape(tensor.kind, tensor.shape)[part is not None :]
        size = math.prod(shape)
        out = torch.empty(shape, dtype=torch.uint8) if out is None else out
        if out.dtype is not torch.uint8 or out.numel() != size or not out.is_contiguous():
            raise BugError("Gguf.raw", f"out is {out.dtype} {tuple(out.shape)}", f"{size} contiguous bytes")
        rest, place = out.view(-1).numpy().data, tensor.begin + (part or 0) * size
        while rest:
            try:
                done = os.preadv(self._file.fileno(), [rest], place)
            except OSError as error:
                raise InputError(str(self.path), f"cannot be read: {error.strerror}", "a readable file") from error
            if not done:
                raise InputError(str(self.path), f"tensor {name!r} was cut off after the file was opened")
            rest, place = rest[done:], place + done
        return out.view(shape)

    def close(self) -> None:
        """Let go of the file; tensors read before stay."""
        self._file.close()

    def __enter__(self) -> Gguf:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_gguf(path: Path) -> Gguf:
    """Open a GGUF file of version 2 or 3 and parse its header; no tensor is read.

    Raises InputError naming the file, and the key or tensor, for anything malformed.
    """
    return Gguf(path)


# --- writing -----------------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """A tensor to write: format, shape, and its bytes (or a call that gives them when their turn comes)."""

    kind: str
    shape: tuple[int, ...]
    data: Tensor | Callable[[], Tensor]


def _value_type(value: object, in_array: bool = False) -> str:
    """The type that the gguf package, and llama.cpp's reader, expect of a Python value."""
    if isinstance(value, list):
        kinds = {_value_type(item, True) for item in value}
        return f"{kinds.pop()}[]" if len(kinds) == 1 else "an empty or mixed array"
    names = {bool: "bool", str: "string", float: "float32", int: "int32" if in_array else "uint32"}
    return names.get(type(value), type(value).__name__)


def _string(text: str) -> bytes:
    data = text.encode()
    return _U64.pack(len(data)) + data


def _pair(key: str, value: Any, kind: str) -> bytes:
    is_array, item = kind.endswith("[]"), kind.removesuffix("[]")
    values = value if is_array else [value]
    if not _is_name(key, MAX_KEY) or item not in _IDS:
        raise BugError("GGUF", f"key {key[:80]!r} as {kind}", f"a printable key and one of {', '.join(_IDS)}, or []")
    try:
        head = struct.pack("<IIQ", _ARRAY, _IDS[item], len(values)) if is_array else struct.pack("<I", _IDS[item])
        if item == "string":
            data = b"".join(map(_string, values))
        else:
            data = struct.pack(f"<{len(values)}{_SCALARS[item][1]}", *values)
    except (struct.error, OverflowError, AttributeError, TypeError, UnicodeEncodeError) as error:
        raise BugError("GGUF", f"the value of {key[:80]!r} does not fit {kind}: {error}") from error
    return _string(key) + head + data


def write_gguf(
    metadata: Mapping[str, object], tensors: Mapping[str, Source], types: Mapping[str, str] | None = None
) -> Iterator[Chunk]:
    """The bytes of a GGUF v3 file, chunk by chunk, in the order of the mappings.

    Values have the type in `types`; without one a str is a string, a bool a bool, a float a float32, an int a uint32,
    in an array an int32. A tensor's chunk is a view of its own memory, and data that is a call is made only when its
    turn comes, so no second copy of the model exists. Alignment is `general.alignment`, or 32.
    Raises InputError for sizes that do not fit the format; BugError for names, types and data that cannot be written.
    """
    types = types or {}
    kinds = {key: types.get(key) or _value_type(value) for key, value in metadata.items()}
    alignment = _alignment("GGUF", metadata, kinds)
    head = [MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    head += [_pair(key, value, kinds[key]) for key, value in metadata.items()]
    sizes, offset = {}, 0
    for name, (kind, shape, _) in tensors.items():
        if not _is_name(name, MAX_NAME) or kind not in BLOCKS:
            found = f"tensor {name[:80]!r} as {kind}"
            raise BugError("GGUF", found, f"1 to {MAX_NAME} printable bytes, and one of {', '.join(BLOCKS)}")
        sizes[name] = _check_tensor("GGUF", name, kind, shape)
        entry = struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), BLOCKS[kind].id, offset)
        head.append(_string(name) + entry)
        offset += sizes[name] + -sizes[name] % alignment
    text = b"".join(head)
    yield text + bytes(-len(text) % alignment)
    for name, (_, _, data) in tensors.items():
        values = data() if callable(data) else data
        raw = values.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
        if raw.numel() != sizes[name]:
            raise BugError("GGUF", f"tensor {name!r} has {raw.numel()} bytes", f"{sizes[name]} bytes")
        yield raw.numpy().data
        yield bytes(-sizes[name] % alignment)
