"""The wire reader against a writer of its own, and against files that lie about their lengths."""

import random
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from wire_format import content, double, number, single, varint

from headway.errors import InputError
from headway.protobuf import as_float, fields, floats, signed, text, varints

MESSAGE = number(1, 150) + content(2, "testing") + single(3, 1.5) + double(536870911, -2.0) + content(4, number(1, 1))


def test_the_published_examples():
    assert list(fields(bytes.fromhex("089601"), "f")) == [(1, 0, 150)]
    assert [(key, wire, bytes(value)) for key, wire, value in fields(bytes.fromhex("120774657374696e67"), "f")] == [
        (2, 2, b"testing")
    ]
    assert list(varints(bytes.fromhex("038e029ea705"), "f")) == [3, 270, 86942]


def test_every_wire_type():
    found = [(key, wire, bytes(value) if wire == 2 else value) for key, wire, value in fields(MESSAGE, "f")]
    assert found[:3] == [(1, 0, 150), (2, 2, b"testing"), (3, 5, 0x3FC00000)] and as_float(0x3FC00000) == 1.5
    assert found[3] == (536870911, 1, int.from_bytes(np.float64(-2.0).tobytes(), "little"))
    assert list(fields(found[4][2], "f")) == [(1, 0, 1)]
    assert list(fields(memoryview(MESSAGE), "f")) == list(fields(MESSAGE, "f")) and list(fields(b"", "f")) == []


@given(st.lists(st.integers(-(2**63), 2**64 - 1)))
def test_integers_round_trip(values):
    assert list(varints(b"".join(map(varint, values)), "f")) == [value % 2**64 for value in values]
    for value in values:
        assert list(fields(number(7, value), "f")) == [(7, 0, value % 2**64)]
        assert value >= 2**63 or signed(value % 2**64) == value


@given(st.lists(st.floats(width=32, allow_nan=False)))
def test_floats_round_trip(values):
    data = np.array(values, np.float32).tobytes()
    assert floats(data, "f").tolist() == values
    assert floats(memoryview(b"x" + data)[1:], "f").tolist() == values  # not aligned
    assert [as_float(bits) for _, _, bits in fields(b"".join(single(1, v) for v in values), "f")] == values


def test_strings():
    assert text(memoryview("日本".encode()), "f") == "日本"
    with pytest.raises(InputError, match=r"f: invalid UTF-8 at byte 1"):
        text(memoryview(b"a\xff"), "f")
    with pytest.raises(InputError, match=r"f: the number 3"):
        text(3, "f")
    with pytest.raises(InputError, match=r"f: 5 bytes of packed floats"):
        floats(b"12345", "f")


WRONG = [
    (b"\x08", "a varint cut short at byte 1"),
    (b"\x08" + b"\x80" * 9, "a varint cut short at byte 1"),
    (b"\x08" + b"\xff" * 10, "a varint of more than 64 bits at byte 1"),
    (b"\x08" + b"\xff" * 9 + b"\x02", "a varint of more than 64 bits at byte 1"),
    (b"\x00\x01", "field number 0 at byte 0"),
    (varint(1 << 32) + b"\x01", "field number 536870912 at byte 0"),
    (b"\x08\x01\x0b", "wire type 3 of field 1 at byte 2"),
    (b"\x0c", "wire type 4 of field 1"),
    (b"\x0e", "wire type 6 of field 1"),
    (b"\x0f", "wire type 7 of field 1"),
    (b"\x12\x02a", "field 2 of 2 bytes with 1 left at byte 0"),
    (b"\x12" + varint(2**63), "field 2 of 9223372036854775808 bytes with 0 left"),
    (b"\x1d123", "field 3 of 4 bytes with 3 left"),
    (b"\x191234567", "field 3 of 8 bytes with 7 left"),
]


@pytest.mark.fault("T11")
@pytest.mark.parametrize("case", WRONG, ids=lambda case: case[1])
def test_what_is_refused(case):
    tracemalloc.start()
    with pytest.raises(InputError) as caught:
        list(fields(case[0], "here.bin"))
    assert tracemalloc.get_traced_memory()[1] < 1 << 18
    tracemalloc.stop()
    assert str(caught.value).startswith("here.bin: ") and case[1] in str(caught.value)


@pytest.mark.fault("T11")
def test_every_cut_and_many_mutations():
    rng = random.Random(0)
    for end in range(len(MESSAGE)):
        try:
            assert len(list(fields(MESSAGE[:end], "f"))) < 5
        except InputError as error:
            assert "f: " in str(error)
    for _ in range(5000):
        data = bytearray(MESSAGE)
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            found = list(fields(bytes(data), "f"))
        except InputError:
            continue
        # What is accepted covers every byte once.
        assert sum(len(value) for _, wire, value in found if wire == 2) < len(data)
