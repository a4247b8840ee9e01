"""Safetensors files: written as a stream of chunks, read by mapping the file into memory.

The format (github.com/huggingface/safetensors, README "Format"): 8 bytes little-endian header length, a JSON
header {name: {dtype, shape, data_offsets}} with an optional `__metadata__` of strings, then the data without
holes. Layout and order are those of the safetensors library, so the same tensors give the bytes it writes.
The reader trusts nothing in the header before it fits the bytes that are there (rows K1, K2, K4, K6, K7).

Tied tensors (same memory under two names) are stored once; the second name goes into the metadata and is the
same tensor again after reading (K17).
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
from collections.abc import Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from headway.checkpoints.raw import looks_like_pickle
from headway.errors import BugError, InputError
from headway.files import Chunk, open_regular
from headway.strict import strict_json

DTYPES: dict[str, torch.dtype] = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The format's names in the order in which the safetensors library lays tensors out: wide ones first, which
keeps every tensor aligned to its own item size."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RANK = {name: rank for rank, name in enumerate(DTYPES)}
ALIASES = "headway.aliases"
CHUNK_BYTES = 1 << 23
MAX_HEADER = 1 << 25  # 32 MiB: about 300,000 tensors; the JSON parser needs some ten times that in memory
MAX_NAME = 1024
MAX_DIMS = 16


class Entry(NamedTuple):
    """One tensor of a file: dtype by the format's name, shape, and its byte range after the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def dtype_name(tensor: Tensor) -> str:
    """The format's name of a tensor's dtype, such as `BF16`. Raises BugError for one it cannot store."""
    if tensor.dtype not in _NAMES:
        raise BugError("checkpoint", f"dtype {tensor.dtype} cannot be stored", f"one of {', '.join(DTYPES)}")
    return _NAMES[tensor.dtype]


def _chunks(tensor: Tensor) -> Iterator[memoryview]:
    flat = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
    view = flat.numpy().data
    for start in range(0, len(view), CHUNK_BYTES):
        yield view[start : start + CHUNK_BYTES]


def _split_aliases(tensors: Mapping[str, Tensor]) -> tuple[list[str], dict[str, str]]:
    """Names to store, in file order, and {tied name: stored name} for the rest."""
    owners: dict[tuple[object, ...], str] = {}
    stored, aliases = [], {}
    for name in sorted(tensors):
        tensor = tensors[name]
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and key in owners:
            aliases[name] = owners[key]
        else:
            owners[key] = name
            stored.append(name)
    return _file_order(tensors, stored), aliases


def _file_order(tensors: Mapping[str, Tensor], names: list[str]) -> list[str]:
    return sorted(names, key=lambda name: (_RANK[dtype_name(tensors[name])], name))


def write_tensors(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, *, alias: bool = True
) -> Iterator[Chunk]:
    """The bytes of a safetensors file, chunk by chunk; the same tensors and metadata give the same bytes.

    Without `alias` tied tensors are stored under each name, for readers that do not know our note of them.

    Chunks on the CPU are views of the tensors' own memory: no second copy of the model is made, so tensors
    must not change until the last chunk is consumed (folder.BackgroundSaver takes a copy when they may).
    Raises BugError for a dtype that the format cannot hold.
    """
    names, aliases = _split_aliases(tensors) if alias else (_file_order(tensors, list(tensors)), {})
    extra = dict(metadata or {})
    if aliases:
        extra[ALIASES] = json.dumps(aliases, sort_keys=True)
    header: dict[str, object] = {"__metadata__": dict(sorted(extra.items()))} if extra else {}
    begin = 0
    for name in names:
        tensor = tensors[name]
        end = begin + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": dtype_name(tensor),
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        yield from _chunks(tensors[name])


def snapshot(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy on the CPU that later in-place updates do not reach; tied tensors stay tied (S9)."""
    names, aliases = _split_aliases(tensors)
    copies = {name: tensors[name].detach().to("cpu", copy=True) for name in names}
    return copies | {name: copies[owner] for name, owner in aliases.items()}


def tensor_hash(tensors: Mapping[str, Tensor]) -> str:
    """sha256 (hex) over names, dtypes, shapes, bytes in the order of names, whatever is tied or strided."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        head = json.dumps([name, dtype_name(tensor), list(tensor.shape)])
        digest.update(f"{len(head)}:{head}".encode())
        for chunk in _chunks(tensor):
            digest.update(chunk)
    return digest.hexdigest()


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, list[str | int]]:
    """{name: [dtype, *shape]} in the order of names, as a manifest shows it."""
    return {name: [dtype_name(tensors[name]), *tensors[name].shape] for name in sorted(tensors)}


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _entry(where: str, name: str, value: object) -> Entry:
    def wrong(found: str, expected: str) -> InputError:
        return InputError(where, f"tensor {name[:80]!r}: {found}", expected)

    if not name or len(name) > MAX_NAME or any(ord(letter) < 32 for letter in name):
        raise wrong(f"a name of {len(name)} characters", f"1 to {MAX_NAME} printable characters")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise wrong("a malformed entry", "exactly dtype, shape, data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise wrong(f"unknown dtype {str(dtype)[:20]!r}", f"one of {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(map(_is_count, shape)):
        raise wrong("a malformed shape", f"at most {MAX_DIMS} sizes of 0 or more")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise wrong("malformed data_offsets", "two offsets of 0 or more")
    needed, (begin, end) = math.prod(shape) * DTYPES[dtype].itemsize, offsets
    if end - begin != needed:
        raise wrong(f"data_offsets {begin} to {end}", f"{needed} bytes for {dtype} {shape}")
    return Entry(dtype, tuple(shape), begin, end)


def _metadata(where: str, value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise InputError(where, "__metadata__ is malformed", "names with strings")
    return value


def _aliases(where: str, text: str, entries: Mapping[str, Entry]) -> dict[str, str]:
    aliases = strict_json(text, f"{where} ({ALIASES})")
    if not isinstance(aliases, dict):
        raise InputError(where, f"{ALIASES} is malformed", "names with names")
    for name, owner in aliases.items():
        if name in entries or not isinstance(owner, str) or owner not in entries:
            raise InputError(where, f"{ALIASES}: {name[:80]!r} is tied to nothing in the file")
    return aliases


def _parse(where: str, size: int, head: bytes) -> tuple[dict[str, str], dict[str, Entry]]:
    header = strict_json(head, where)
    if not isinstance(header, dict):
        raise InputError(where, "the header is not a JSON object", "a safetensors file")
    metadata = _metadata(where, header.pop("__metadata__", {}))
    entries = {name: _entry(where, name, value) for name, value in header.items()}
    reached, data = 0, size - 8 - len(head)
    for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.begin != reached:
            kind = "overlaps the tensor before it" if entry.begin < reached else "leaves a hole before it"
            found = f"tensor {name[:80]!r} {kind}"
            raise InputError(where, found, f"it to begin at byte {reached} of the data, not {entry.begin}")
        reached = entry.end
    if reached != data:
        kind = "cut short" if reached > data else "followed by bytes that belong to no tensor"
        raise InputError(where, f"{kind}: {size} bytes", f"{8 + len(head) + reached} bytes by its header")
    return metadata, entries


def _read_header(file: BufferedReader, where: str) -> tuple[dict[str, str], dict[str, Entry], int]:
    size = file.seek(0, 2)
    file.seek(0)
    if looks_like_pickle(file.read(64)):
        fix = "headway convert --unsafe-pickle FOLDER DST"
        raise InputError(where, "a pickle, which can run code", "a safetensors file", fix)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or not 2 <= length <= min(size - 8, MAX_HEADER):
        found = f"{size} bytes with a header of {length}" if size >= 8 else f"{size} bytes"
        raise InputError(where, found, "a safetensors file, not cut short")
    head = file.read(length)
    if head[:1] != b"{" or len(head) != length:
        raise InputError(where, "the header is not a JSON object", "a safetensors file")
    metadata, entries = _parse(where, size, head)
    return metadata, entries, 8 + length


def read_header(path: Path) -> tuple[dict[str, str], dict[str, Entry], int]:
    """Metadata, entries by name, and where the data begins; checked against the file's size.

    Raises InputError naming the file, and the tensor where one is wrong.
    """
    with open_regular(path) as file:
        return _read_header(file, str(path))


def _tensor(buffer: mmap.mmap, entry: Entry, start: int) -> Tensor:
    dtype, count = DTYPES[entry.dtype], math.prod(entry.shape)
    if not count:
        return torch.empty(entry.shape, dtype=dtype)
    offset = start + entry.begin
    source: mmap.mmap | bytearray = buffer
    if offset % dtype.itemsize:  # a header that is not a multiple of 8 long; vector loads need alignment
        source, offset = bytearray(buffer[offset : start + entry.end]), 0
    return torch.frombuffer(source, dtype=dtype, count=count, offset=offset).reshape(entry.shape)


def count_nonfinite(tensor: Tensor) -> int:
    """How many values are NaN or infinite: one pass over their sum, and the count only where that says so."""
    if not tensor.is_floating_point() or bool(torch.isfinite(tensor.sum(dtype=torch.float32))):
        return 0
    return int((~torch.isfinite(tensor)).sum())


def check_finite(tensor: Tensor, name: str, where: str) -> None:
    """Refuse NaN and infinity in the tensor `name` of the file `where` (K11). Raises InputError."""
    if bad := count_nonfinite(tensor):
        found = f"tensor {name} holds {bad} values that are NaN or infinite"
        raise InputError(where, found, "finite weights", "--allow-nonfinite to load them as they are")


class TensorFile:
    """A safetensors file opened for reading: the header checked, the data mapped and not yet touched.

    Attributes: `entries` by name; `metadata`; `path`. Raises InputError for anything malformed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_regular(path) as file:  # once: a second opening could find another file under that name
            self.metadata, self.entries, self._start = _read_header(file, str(path))
            if file.seek(0, 2) != self._start + max((entry.end for entry in self.entries.values()), default=0):
                raise InputError(str(path), "changed while it was read", "a file that nobody is writing")
            self._buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.aliases = _aliases(str(path), self.metadata.get(ALIASES, "{}"), self.entries)

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of this name, a view of the mapped file private to this process. Raises InputError (BOOL data)."""
        tensor = _tensor(self._buffer, self.entries[name], self._start)
        if tensor.dtype is torch.bool and tensor.numel() and int(tensor.view(torch.uint8).max()) > 1:
            raise InputError(str(self.path), f"tensor {name!r} holds bytes other than 0 and 1", "BOOL data")
        return tensor

    def release(self, name: str) -> None:
        """Give the pages of a tensor back that was copied elsewhere; views of it stay valid and read the file again."""
        entry, page = self.entries[name], mmap.PAGESIZE
        begin = -(-(self._start + entry.begin) // page) * page
        end = (self._start + entry.end) // page * page
        if end > begin:
            self._buffer.madvise(mmap.MADV_DONTNEED, begin, end - begin)


def read_tensors(path: Path, *, copy: bool = False) -> dict[str, Tensor]:
    """The tensors of a safetensors file on the CPU, by name.

    Without `copy` they are views of the mapped file, private to this process: changing them does not change
    the file, and replacing the file by atomic_write leaves them intact (S12). Writing into that same file
    from elsewhere would not, hence `copy` for files that others edit in place.
    Raises InputError naming file and tensor for anything malformed.
    """
    file = TensorFile(path)
    tensors = {name: file[name] for name in file.entries}
    if copy:
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    return tensors | {name: tensors[owner] for name, owner in file.aliases.items()}
