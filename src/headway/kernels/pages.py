"""Memory that is read from end to end for each token, in large pages where the system has them.

Processors fetch ahead of a stream of loads, but not past the end of a page, and a page of 4 kB is read in a moment:
from pages of 2 MB the same loop reads up to twice as much a second (docs/log.md, 2026-11-30). Matrices are put one
behind the other, as they are made, into regions of a few pages. Where the system has no such pages it is memory like
any other.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import threading
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

PAGE = 1 << 21
REGION = 8 * PAGE
"""Bytes asked for at a time; a page takes memory only when something is put in it."""
_LINE = 64
_Weak = weakref.ReferenceType[mmap.mmap]


class _Region:
    """The region that was asked for last, and how much of it is taken. It lives as long as what is in it."""

    def __init__(self) -> None:
        self._memory: _Weak | None = None
        self._next = self._end = 0
        self._lock = threading.Lock()

    def take(self, size: int) -> Tensor:
        """So many bytes, from the beginning of a cache line on."""
        with self._lock:
            memory = self._memory() if self._memory is not None else None
            if memory is None or self._next + size > self._end:
                memory = self._new(max(size, REGION))
            at, self._next = self._next, self._next + size + -size % _LINE
        return torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=at)

    def _new(self, size: int) -> mmap.mmap:
        size += PAGE + -size % PAGE  # one more: it may begin anywhere, and pages are only taken when used
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a system without them
            memory.madvise(mmap.MADV_HUGEPAGE)
        first = torch.frombuffer(memory, dtype=torch.uint8, count=1).data_ptr()
        self._memory, self._next, self._end = weakref.ref(memory), -first % PAGE, size
        return memory


_region = _Region()


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """Room for numbers of the kind of `like`, where it is."""
    size = math.prod(shape) * like.element_size()
    if hasattr(mmap, "MADV_HUGEPAGE") and like.is_cpu and size:
        with contextlib.suppress(OSError):  # no room: torch says so in its own way, if it has none either
            return _region.take(size).view(like.dtype).view(*shape)
    return like.new_empty(*shape)


def settled(tensor: Tensor) -> Tensor:
    """The same numbers in such memory."""
    return empty(tensor.shape, tensor).copy_(tensor)
