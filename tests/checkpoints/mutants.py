"""Damaged files by the seed, and little memory: what the parsers of other containers must survive (K2, K18)."""

from __future__ import annotations

import random
import resource
from collections.abc import Callable
from pathlib import Path

from fault_injection import in_child


def mutant(whole: bytes, rng: random.Random) -> bytes:
    """Bytes changed, taken out, put in, copied over others, or the rest cut off; one to four times."""
    data = bytearray(whole)
    for _ in range(rng.randint(1, 4)):
        at, size = rng.randrange(len(data)), rng.choice((1, 1, 1, 2, 4, 8, 50))
        kind = rng.choice("wwwwddiiccx")
        if kind == "w":
            data[at : at + size] = rng.randbytes(len(data[at : at + size]))
        elif kind == "d":
            del data[at : at + size]
        elif kind == "i":
            data[at:at] = rng.choice((b"\xff" * size, bytes(size), rng.randbytes(size)))
        elif kind == "c":
            source = rng.randrange(len(data))
            data[at : at + size] = data[source : source + size]
        else:
            del data[max(at, 1) :]
        data = data or bytearray(b"\0")
    return bytes(data)


def in_little_memory(action: Callable[[], object], room: int = 16 << 20) -> int:
    """Run in a child that may take `room` more bytes of address space; see `in_child` for what it returns."""

    def run() -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + room, resource.RLIM_INFINITY))
        action()

    return in_child(run)
