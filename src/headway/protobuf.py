"""The protobuf wire format, read strictly and without a schema (protobuf.dev, "Encoding").

A message is a row of fields, each a key (number and wire type) and a value; a nested message is the bytes of a
value, read by calling `fields` again on them. Nothing is copied: a value that has a length is a view of `data`.
Every length is compared with the bytes that are left before it is used. Left out: groups (wire types 3 and 4),
deprecated before the formats that Headway reads began; sentencepiece and ONNX files have none.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np

from headway.errors import InputError

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_SIZES = {FIXED64: 8, FIXED32: 4}
_MAX_NUMBER = (1 << 29) - 1
Field = tuple[int, int, int | memoryview]


def fields(data: bytes | memoryview, where: str) -> Iterator[Field]:
    """The fields of one message, in the order of the file: (number, wire type, value).

    Args:
        data: the message's bytes.
        where: the file or field named in errors.

    Yields:
        As value the unsigned 64-bit integer of a varint (wire type 0), the raw little-endian bits of fixed64 (1)
        and fixed32 (5) as an unsigned integer, or a view of the bytes (2).

    Raises:
        InputError: naming `where` and the byte offset in `data`: a varint of more than 64 bits, a length beyond
            the end, field number 0 or above 2^29 - 1, a group or an unknown wire type.
    """
    view = memoryview(data)
    place, end = 0, len(view)
    while place < end:
        start = place
        key, place = _varint(view, place, where)
        number, wire = key >> 3, key & 7
        if not 0 < number <= _MAX_NUMBER:
            raise _wrong(where, start, f"field number {number}", f"1 to {_MAX_NUMBER}")
        if wire == VARINT:
            value, place = _varint(view, place, where)
            yield number, wire, value
            continue
        if wire == BYTES:
            size, place = _varint(view, place, where)
        elif wire in _SIZES:
            size = _SIZES[wire]
        else:
            raise _wrong(where, start, f"wire type {wire} of field {number}", "0, 1, 2 or 5")
        if size > end - place:
            raise _wrong(where, start, f"field {number} of {size} bytes with {end - place} left", "a whole file")
        content = view[place : place + size]
        place += size
        yield number, wire, content if wire == BYTES else int.from_bytes(content, "little")


def varints(data: bytes | memoryview, where: str) -> Iterator[int]:
    """The unsigned integers of a packed repeated field. Raises InputError as `fields` does."""
    view = memoryview(data)
    place = 0
    while place < len(view):
        value, place = _varint(view, place, where)
        yield value


def floats(data: bytes | memoryview, where: str) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """The float32 values of a packed repeated field, a view of `data`. Raises InputError for a part of a value."""
    if len(data) % 4:
        raise InputError(where, f"{len(data)} bytes of packed floats", "a multiple of 4")
    return np.frombuffer(data, dtype="<f4")


def signed(value: int) -> int:
    """A varint read as int32 or int64, which are written as 64 bits of two's complement (not zigzag)."""
    return value - (1 << 64) if value >= 1 << 63 else value


def as_float(bits: int) -> float:
    """The float of a fixed32 field."""
    return float(struct.unpack("<f", bits.to_bytes(4, "little"))[0])


def text(value: int | memoryview, where: str) -> str:
    """The str of a field of wire type 2. Raises InputError for another type or for invalid UTF-8."""
    if isinstance(value, int):
        raise InputError(where, f"the number {value}", "a string")
    try:
        return bytes(value).decode()
    except UnicodeDecodeError as error:
        raise InputError(where, f"invalid UTF-8 at byte {error.start} of a string", "UTF-8") from None


def _varint(view: memoryview, place: int, where: str) -> tuple[int, int]:
    """The integer at `place` and the place behind it: 7 bits a byte, the lowest first."""
    value = shift = 0
    for offset, byte in enumerate(view[place : place + 10], place):
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >> 64:
                break
            return value, offset + 1
        shift += 7
    found = "a varint cut short" if len(view) - place < 10 else "a varint of more than 64 bits"
    raise _wrong(where, place, found, "a whole file" if len(view) - place < 10 else "at most 10 bytes")


def _wrong(where: str, place: int, found: str, expected: str) -> InputError:
    return InputError(where, f"{found} at byte {place}", expected)
