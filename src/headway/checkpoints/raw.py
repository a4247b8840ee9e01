"""The raw bytes of weight files: what they begin with, a file as a private mapping, a tensor as a view of it.

The mapping belongs to this process alone: changing a tensor does not change the file, and a file replaced by
`files.atomic_write` stays intact behind it (S12).
"""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import torch
from torch import Tensor

from headway.errors import InputError
from headway.files import open_regular

# A zip file, which is what torch saves; a pickle of protocol 2 to 5; one of protocol 0 or 1 that begins with a global.
# A safetensors file begins with 8 bytes of length and `{`: a header of 640 bytes begins with 80 02 as well.
_PICKLE = re.compile(rb"PK\x03\x04|\x80[\x02-\x05](?!.{3}\0\0\0\{)|\(?c[A-Za-z_][\w.]*\n[\w.]+\n", re.DOTALL)


def looks_like_pickle(head: bytes) -> bool:
    """Whether a file that begins with these bytes (64 are enough) is a pickle, or the zip file that torch saves.

    By magic, whatever the file is called, so that a pickle named `.safetensors` is refused for what it is (K9).
    """
    return _PICKLE.match(head) is not None


def map_file(path: Path) -> memoryview:
    """The bytes of a file, read from the disk when they are looked at. Raises InputError; also for an empty file."""
    with open_regular(path) as file:
        if not file.seek(0, 2):
            raise InputError(str(path), "0 bytes", "a file with content")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))


def view_tensor(data: memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The tensor of `shape` whose bytes are exactly `data`; copied only where its alignment asks for it."""
    if not len(data):
        return torch.empty(shape, dtype=dtype)
    raw = torch.frombuffer(data, dtype=torch.uint8)
    if raw.data_ptr() % dtype.itemsize:  # vector loads need alignment
        raw = raw.clone()
    return raw.view(dtype).reshape(shape)
