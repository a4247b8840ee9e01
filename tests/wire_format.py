"""A protobuf writer for tests, from the encoding's description (protobuf.dev) and not from the reader's code."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence


def varint(number: int) -> bytes:
    """An unsigned integer in groups of seven bits, the lowest first; negative ones as 64 bits."""
    number &= (1 << 64) - 1
    groups = [number >> shift & 0x7F for shift in range(0, max(number.bit_length(), 1), 7)]
    return bytes([group | 0x80 for group in groups[:-1]] + groups[-1:])


def number(key: int, value: int) -> bytes:
    return varint(key << 3) + varint(value)


def single(key: int, value: float) -> bytes:
    return varint(key << 3 | 5) + struct.pack("<f", value)


def double(key: int, value: float) -> bytes:
    return varint(key << 3 | 1) + struct.pack("<d", value)


def content(key: int, value: bytes | str) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return varint(key << 3 | 2) + varint(len(data)) + data


ENDS = (("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3))


def sentencepiece_file(
    pieces: Iterable[tuple[str, float, int]],
    kind: int = 1,
    normalizer: Sequence[int] = (0, 0, 1),
    **trainer: int,
) -> bytes:
    """A .model file: pieces of (text, score, type), and the normalizer's flags prefix, tidy, escape.

    `trainer` holds further fields of trainer_spec by their numbers, as f35=1.
    """
    made = b"".join(content(1, content(1, text) + single(2, score) + number(3, of)) for text, score, of in pieces)
    spec = number(3, kind) + b"".join(number(int(name[1:]), value) for name, value in trainer.items())
    flags = b"".join(number(3 + place, value) for place, value in enumerate(normalizer))
    return made + content(2, spec) + content(3, flags)
