"""CTranslate2's `model.bin`, version 6: the variables of a converted model, and which names share one.

The format (github.com/OpenNMT/CTranslate2, python/ctranslate2/specs/model_spec.py), little-endian: version, the
model specification's name and revision, the count of variables; for each its name, rank, sizes, type, size in bytes and
data; then the count of aliases, pairs of names. A name is 16 bits of length, the closing NUL included. Nothing is
aligned. The reader compares each count and size with the bytes that are left first (rows K1, K2, K6, K7).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from headway.checkpoints.raw import map_file, view_tensor
from headway.errors import InputError

VERSION = 6
DTYPES = (torch.float32, torch.int8, torch.int16, torch.int32, torch.float16, torch.bfloat16)
"""By type id: the order of `DataType` in include/ctranslate2/types.h."""
MAX_VARIABLES, MAX_NAME, MAX_DIMS = 1 << 16, 1024, 16
_VARIABLE, _ALIAS = 2 + 2 + 1 + 1 + 4, 2 * (2 + 2)  # the fewest bytes of each: one-letter names, rank 0, no data


class Ct2File(NamedTuple):
    """What a file holds: format version, specification's name and revision, variables, {name: the variable it is}."""

    version: int
    spec: str
    revision: int
    tensors: dict[str, Tensor]
    aliases: dict[str, str]


class _Reader:
    """A place in the file that only moves over bytes that are there."""

    def __init__(self, path: Path) -> None:
        self.where, self.view, self.place = str(path), map_file(path), 0

    def wrong(self, found: str, expected: str = "") -> InputError:
        return InputError(self.where, f"{found} at byte {self.place}", expected)

    def bytes(self, size: int, what: str) -> memoryview:
        left = len(self.view) - self.place
        if size > left:
            raise self.wrong(f"{len(self.view)} bytes, cut short: {what} of {size}", f"at most the {left} bytes left")
        self.place += size
        return self.view[self.place - size : self.place]

    def number(self, size: int, what: str) -> int:
        return int.from_bytes(self.bytes(size, what), "little")

    def count(self, least: int, what: str) -> int:
        """A number of things that take `least` bytes or more each."""
        count, left = self.number(4, what), len(self.view) - self.place
        if count > min(left // least, MAX_VARIABLES):
            raise self.wrong(f"{what} {count}", f"at most {MAX_VARIABLES}, in the {left} bytes left")
        return count

    def name(self) -> str:
        size = self.number(2, "a name's length")
        if not 2 <= size <= MAX_NAME:
            raise self.wrong(f"a name of {size} bytes", f"2 to {MAX_NAME}, the closing NUL included")
        try:
            name = str(self.bytes(size, "a name"), "utf-8")
        except UnicodeDecodeError:
            raise self.wrong("a name that is not UTF-8") from None
        if name[-1] != "\0" or not name[:-1].isprintable():
            raise self.wrong(f"the name {name[:80]!r}", "printable characters and a closing NUL")
        return name[:-1]

    def variable(self) -> tuple[str, Tensor]:
        name = self.name()
        rank = self.number(1, "a rank")
        if rank > MAX_DIMS:
            raise self.wrong(f"tensor {name!r}: rank {rank}", f"at most {MAX_DIMS}")
        shape = tuple(self.number(4, "a size") for _ in range(rank))
        kind, size = self.number(1, "a type"), self.number(4, "a size in bytes")
        if kind >= len(DTYPES):
            raise self.wrong(f"tensor {name!r}: type {kind}", f"0 to {len(DTYPES) - 1}: {', '.join(map(str, DTYPES))}")
        if size != math.prod(shape) * DTYPES[kind].itemsize:
            raise self.wrong(f"tensor {name!r}: {size} bytes for {DTYPES[kind]} {list(shape)}", "its size in bytes")
        return name, view_tensor(self.bytes(size, f"tensor {name!r}"), DTYPES[kind], shape)


def read_ctranslate2(path: Path) -> Ct2File:
    """The variables of a `model.bin`, views of the mapped file where their alignment allows it.

    Raises InputError naming the file, the tensor and the byte where it is wrong: another version, cut short, counts or
    sizes beyond the bytes left, an unknown type, malformed or repeated names, an alias of nothing, bytes left over.
    """
    reader = _Reader(path)
    version = reader.number(4, "a version")
    if version != VERSION:
        fix = "convert the model again with a current CTranslate2"
        raise InputError(reader.where, f"version {version}", f"a CTranslate2 model of version {VERSION}", fix)
    spec, revision = reader.name(), reader.number(4, "a revision")
    tensors: dict[str, Tensor] = {}
    for _ in range(reader.count(_VARIABLE, "the count of variables")):
        name, tensor = reader.variable()
        if name in tensors:
            raise reader.wrong(f"tensor {name!r} again", "each name once")
        tensors[name] = tensor
    aliases: dict[str, str] = {}
    for _ in range(reader.count(_ALIAS, "the count of aliases")):
        name, owner = reader.name(), reader.name()
        if name in tensors or name in aliases or owner not in tensors:
            raise reader.wrong(f"alias {name!r} of {owner!r}", "a new name of a variable in the file")
        aliases[name] = owner
    if reader.place != len(reader.view):
        raise reader.wrong(f"{len(reader.view) - reader.place} bytes that belong to nothing", "the end of the file")
    return Ct2File(version, spec, revision, tensors, aliases)
