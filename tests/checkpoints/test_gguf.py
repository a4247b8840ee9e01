"""GGUF: our bytes against the gguf package's, and a reader that trusts no header."""

from __future__ import annotations

import os
import random
import resource
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from fault_injection import in_child
from torch import Tensor

from headway import files
from headway.checkpoints.gguf import MAX_HEADER, PIECE, GgufTensor, Source, read_gguf, write_gguf
from headway.errors import BugError, InputError
from headway.kernels.ggml import BLOCKS, dequantize

# --- files made by hand ------------------------------------------------------------------------------------------

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
ALIGN = "general.alignment"
PAYLOADS = {
    U8: b"\x80", I8: b"\x80", U16: b"\x01\x80", I16: b"\x01\x80", U32: b"\1\2\3\x84", I32: b"\1\2\3\x84",
    F32: struct.pack("<f", 0.1), BOOL: b"\1", U64: b"\xff" * 8, I64: b"\xfe" * 8, F64: struct.pack("<d", 0.1),
}  # fmt: skip
NAMES = {
    U8: "uint8", I8: "int8", U16: "uint16", I16: "int16", U32: "uint32", I32: "int32", F32: "float32", BOOL: "bool",
    STRING: "string", U64: "uint64", I64: "int64", F64: "float64",
}  # fmt: skip


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def text(value: str | bytes, length: int | None = None) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return u64(len(data) if length is None else length) + data


def kv(key: str | bytes, kind: int, payload: bytes) -> bytes:
    return text(key) + u32(kind) + payload


def info(
    name: str | bytes,
    dims: list[int],
    kind: int = 0,
    offset: int = 0,
    n_dims: int | None = None,
    length: int | None = None,
) -> bytes:
    """A tensor's entry; `dims` in ggml's order."""
    head = text(name, length) + u32(len(dims) if n_dims is None else n_dims)
    return head + b"".join(map(u64, dims)) + u32(kind) + u64(offset)


def pack(pairs: list[bytes] | None = None, infos: list[bytes] | None = None, data: bytes = b"", **other: Any) -> bytes:
    """A file; `other` may lie: magic, version, n_pairs, n_tensors, alignment."""
    pairs, infos = pairs or [], infos or []
    head = other.get("magic", b"GGUF") + u32(other.get("version", 3))
    head += u64(other.get("n_tensors", len(infos))) + u64(other.get("n_pairs", len(pairs)))
    head += b"".join(pairs) + b"".join(infos)
    return head + bytes(-len(head) % other.get("alignment", 32)) + data


def some_pairs() -> list[bytes]:
    """One key of every type and one array of every type, lengths 0, 1 and 3."""
    pairs = [kv(f"my_key_{id}", id, payload) for id, payload in PAYLOADS.items()]
    pairs += [kv(f"list_{id}", ARRAY, u32(id) + u64(id % 4) + payload * (id % 4)) for id, payload in PAYLOADS.items()]
    strings = text("") + text("\0é") + text("日本語")
    return [*pairs, kv("text", STRING, text("a\nb")), kv("texts", ARRAY, u32(STRING) + u64(3) + strings)]


def some_tensors(alignment: int = 32) -> tuple[list[bytes], bytes]:
    """One tensor of every format, of 1 to 4 dimensions, with its data."""
    infos, data = [], b""
    for index, block in enumerate(BLOCKS.values()):
        dims = [block.size * (1 + index % 3), 3, 2, 5][: 1 + index % 4]
        infos.append(info(f"my_tensor_{index}", dims, block.id, len(data)))
        size = int(np.prod(dims)) // block.size * block.bytes
        data += bytes(random.Random(index).randbytes(size)) + bytes(-size % alignment)
    return infos, data


INFOS, DATA = some_tensors()
GOOD = pack(some_pairs(), INFOS, DATA)
ONE = pack([], [info("a", [8])], bytes(32))


def put(folder: Path, data: bytes) -> Path:
    files.write(folder / "f.gguf", data)
    return folder / "f.gguf"


def read(path: Path) -> dict[str, Tensor]:
    """Everything in a file."""
    with read_gguf(path) as file:
        return {name: file.raw(name) for name in file.tensors}


def copied(path: Path) -> bytes:
    """The file, read and written again."""
    with read_gguf(path) as file:
        sources = {name: Source(t.kind, t.shape, partial(file.raw, name)) for name, t in file.tensors.items()}
        return b"".join(map(bytes, write_gguf(file.metadata, sources, file.types)))


def refused(folder: Path, data: bytes, found: str) -> str:
    path = put(folder, data)
    with pytest.raises(InputError, match=found) as caught:
        read_gguf(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message and len(message) < 600
    return message


# --- against the gguf package ------------------------------------------------------------------------------------


def library_file(path: Path, alignment: int = 0) -> None:
    """A file of the gguf package: every value type, every format, 1 to 4 dimensions."""
    writer = gguf.GGUFWriter(path, "llama")
    if alignment:
        writer.add_custom_alignment(alignment)
    for index, kind in enumerate(gguf.GGUFValueType):
        if kind is gguf.GGUFValueType.ARRAY:
            continue
        special = {F32: [0.1, -0.0], BOOL: [True, False], STRING: ["", "é\0", "x" * 1000], F64: [0.1, 1e300]}
        values: list[Any] = special.get(int(kind), [1, 100])
        writer.add_key_value(f"value.{index}", values[-1], kind)
        writer.add_key_value(f"array.{index}", values, gguf.GGUFValueType.ARRAY, kind)
    for index, block in enumerate(BLOCKS.values()):
        shape = [5, 2, 3, block.bytes * 2][index % 4 :]
        raw = np.random.default_rng(index).integers(0, 256, shape, dtype=np.uint8)
        writer.add_tensor(f"t.{index}.weight", raw, raw_dtype=gguf.GGMLQuantizationType(block.id))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("alignment", [0, 1, 64, 4096])
def test_reads_what_the_library_writes_and_gives_its_bytes(tmp_path: Path, alignment: int) -> None:
    path = tmp_path / "library.gguf"
    library_file(path, alignment)
    truth = gguf.GGUFReader(path)
    with read_gguf(path) as file:
        fields = {name: field for name, field in truth.fields.items() if not name.startswith("GGUF.")}
        assert file.metadata == {name: field.contents() for name, field in fields.items()}
        assert [repr(value) for value in file.metadata.values()] == [repr(f.contents()) for f in fields.values()]
        for name, kind in file.types.items():
            types = [item.name.lower() for item in fields[name].types]
            assert kind == (f"{types[1]}[]" if types[0] == "array" else types[0])
        assert list(file.tensors) == [tensor.name for tensor in truth.tensors]
        for tensor in truth.tensors:
            ours = file.tensors[tensor.name]
            shape = tuple(reversed(tensor.shape.tolist()))
            assert ours == GgufTensor(tensor.tensor_type.name, shape, tensor.data_offset, tensor.n_bytes)
            raw = file.raw(tensor.name)
            assert raw.numpy().tobytes() == tensor.data.tobytes()
            assert dequantize(ours.kind, raw).shape == shape
    assert copied(path) == path.read_bytes()


def test_types_without_being_told_are_those_of_the_library(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "library.gguf", "llama")
    writer.add_context_length(2048)
    writer.add_rope_freq_base(1e4)
    writer.add_add_bos_token(True)
    writer.add_token_list(["a", "b"])
    writer.add_token_scores([0.5, -1.0])
    writer.add_token_types([1, 3])
    weights = torch.randn(3, 4)
    writer.add_tensor("w", weights.numpy())
    writer.add_tensor("h", weights.half().numpy())
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    values = ("llama", 2048, 1e4, True, ["a", "b"], [0.5, -1.0], [1, 3])
    keys = list(gguf.GGUFReader(tmp_path / "library.gguf").fields)[3:]  # after version and counts
    metadata = dict(zip(keys, values, strict=True))
    tensors = {"w": Source("F32", (3, 4), weights), "h": Source("F16", (3, 4), weights.half)}
    ours = b"".join(map(bytes, write_gguf(metadata, tensors)))
    assert ours == (tmp_path / "library.gguf").read_bytes()


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    weights = torch.randn(2, 3, 32).to(torch.bfloat16)
    source = Source("BF16", (2, 3, 32), weights)
    files.atomic_write(tmp_path / "f", write_gguf({ALIGN: 8, "k": []}, {"w": source}, {"k": "int8[]"}))
    reader = gguf.GGUFReader(tmp_path / "f")
    assert reader.alignment == 8 and reader.fields["k"].types == [gguf.GGUFValueType.ARRAY]
    assert reader.tensors[0].shape.tolist() == [32, 3, 2]
    assert reader.tensors[0].data.tobytes() == weights.view(torch.uint8).numpy().tobytes()
    files.atomic_write(tmp_path / "empty", write_gguf({}, {}))
    assert (tmp_path / "empty").stat().st_size == 32 and read_gguf(tmp_path / "empty").tensors == {}


# --- reading -----------------------------------------------------------------------------------------------------


def test_every_type_format_and_length(tmp_path: Path) -> None:
    path = put(tmp_path, GOOD)
    with read_gguf(path) as file:
        for id, payload in PAYLOADS.items():
            value = np.frombuffer(payload, NAMES[id])[0]
            assert file.metadata[f"my_key_{id}"] == value and file.types[f"my_key_{id}"] == NAMES[id]
            assert file.metadata[f"list_{id}"] == [value] * (id % 4) and file.types[f"list_{id}"] == f"{NAMES[id]}[]"
        assert type(file.metadata[f"my_key_{BOOL}"]) is bool and type(file.metadata[f"my_key_{F32}"]) is float
        assert file.metadata["text"] == "a\nb" and file.metadata["texts"] == ["", "\0é", "日本語"]
        assert [tensor.kind for tensor in file.tensors.values()] == list(BLOCKS)
    assert copied(path) == GOOD
    assert len(gguf.GGUFReader(path).tensors) == len(BLOCKS)  # the library agrees that it is good


def test_version_2_and_a_file_without_its_last_padding(tmp_path: Path) -> None:
    assert copied(put(tmp_path, pack(some_pairs(), INFOS, DATA, version=2))) == GOOD
    short = pack([], [info("a", [3])], bytes(12))
    assert read(put(tmp_path, short))["a"].shape == (12,)
    assert read(put(tmp_path, short + bytes(20)))["a"].shape == (12,)
    for extra in (1, 19, 21, 32):
        refused(tmp_path, short + bytes(extra), rf"{len(short) + extra} bytes; expected {len(short) + 20} bytes")


def test_raw_reads_into_given_memory(tmp_path: Path) -> None:
    with read_gguf(put(tmp_path, GOOD)) as file:
        for name, tensor in file.tensors.items():
            fresh = file.raw(name)
            assert fresh.numel() == tensor.size and fresh.shape[:-1] == tensor.shape[:-1]
            out = torch.empty(tensor.size, dtype=torch.uint8)
            assert torch.equal(file.raw(name, out), fresh) and torch.equal(out, fresh.view(-1))
            wrong = (torch.empty(tensor.size + 1, dtype=torch.uint8), torch.empty(tensor.size, dtype=torch.int8))
            for bad in (*wrong, torch.empty(tensor.size, 2, dtype=torch.uint8)[:, 0]):
                with pytest.raises(BugError):
                    file.raw(name, bad)


def test_only_the_header_is_read(tmp_path: Path) -> None:
    """64 GB of data that are not on the disk, opened with 16 MB to spare."""
    path = put(tmp_path, pack([kv("k", U8, b"\1")], [info("w", [1 << 20, 1 << 14])]))
    os.truncate(path, path.stat().st_size + (1 << 36))

    def run() -> None:
        allow(16 << 20)
        with read_gguf(path) as file:
            assert file.tensors["w"].size == 1 << 36
            assert os.lseek(file._file.fileno(), 0, os.SEEK_CUR) <= PIECE

    assert in_child(run) == 0


def test_a_file_cut_after_it_was_opened(tmp_path: Path) -> None:
    path = put(tmp_path, GOOD)
    with read_gguf(path) as file:
        os.truncate(path, len(GOOD) - 64)
        with pytest.raises(InputError, match=r"f\.gguf: tensor 'my_tensor_10' was cut off after"):
            file.raw("my_tensor_10")


def test_closing(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with read_gguf(put(tmp_path, GOOD)) as file:
        assert len(os.listdir("/proc/self/fd")) == before + 1
    for _ in range(3):
        refused(tmp_path, GOOD[:-1], "cut short")
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ValueError, match="closed"):
        file.raw("my_tensor_0")


@pytest.mark.fault("S12")
def test_writing_over_the_file_that_is_read(tmp_path: Path) -> None:
    path = put(tmp_path, GOOD)
    with read_gguf(path) as file:
        sources = {name: Source(t.kind, t.shape, partial(file.raw, name)) for name, t in file.tensors.items()}
        files.atomic_write(path, write_gguf(file.metadata, sources, file.types))
        assert torch.equal(file.raw("my_tensor_3"), read(path)["my_tensor_3"])
    assert path.read_bytes() == GOOD


# --- hostile files -----------------------------------------------------------------------------------------------


def allow(more: int) -> None:
    """Limit this process to `more` bytes above what it has now."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + more, resource.RLIM_INFINITY))


LOOSE, LOOSE_DATA = some_tensors(1)
BIG = 0x7FFFFFFFFFFFFFC0  # the size of ggml's own test: two of them overflow 64 bits
GGML_KINDS: list[tuple[str, bytes, str]] = [
    ("HEADER_BAD_MAGIC", pack(magic=b"FUGG"), "begins with b'FUGG'; expected a GGUF file"),
    ("HEADER_BAD_VERSION_0", pack(version=0), "GGUF version 0; expected version 2 or 3"),
    ("HEADER_BAD_VERSION_1", pack(version=1), "GGUF version 1; expected version 2 or 3"),
    ("HEADER_BAD_VERSION_FUTURE", pack(version=4), "GGUF version 4; expected version 2 or 3"),
    ("HEADER_BIG_ENDIAN", pack(version=3 << 24), "a big-endian GGUF file"),
    ("HEADER_BAD_N_TENSORS", pack(n_tensors=(1 << 64) - 1), "metadata of 0 keys and 18446744073709551615 tensors"),
    ("HEADER_BAD_N_KV", pack(n_pairs=(1 << 64) - 1), "metadata of 18446744073709551615 keys and 0 tensors"),
    ("HEADER_EMPTY", pack(), ""),
    ("KV_BAD_KEY_SIZE", pack([text("key", (1 << 64) - 1) + u32(U8) + b"\1"] * 9), "a key at byte 24 takes 18446744073"),
    ("KV_EMPTY_KEY", pack([kv("", U8, b"\1") + bytes(9)]), "a key '' of 0 characters"),
    ("KV_BAD_TYPE", pack([kv("k", 13, b"\1")]), "'k' is of type 13; expected one of uint8, int8"),
    ("KV_BAD_ARRAY_TYPE", pack([kv("k", ARRAY, u32(13) + u64(1) + b"\1")]), "'k' is of type 13"),
    ("KV_BAD_VALUE_SIZE", pack([kv("k", STRING, text("v", 1 << 62))]), "the value of 'k' at byte 37 takes 4611686018"),
    ("KV_DUPLICATE_KEY", pack([kv("k", U8, b"\1"), kv("k", I8, b"\1")]), "key 'k' appears twice"),
    ("KV_BAD_ALIGN", pack([kv(ALIGN, U32, u32(13))], alignment=13), "alignment is 13 .uint32.; expected a power"),
    ("KV_WRONG_TYPE_ALIGN", pack([kv(ALIGN, I32, u32(32))]), "general.alignment is 32 .int32.; expected a power"),
    ("KV_SUCCESS", pack(some_pairs()), ""),
    ("TENSORS_BAD_NAME_SIZE", pack([], [info("n" * 64, [8])], bytes(32)), "a tensor's name 'n*' of 64 characters"),
    ("TENSORS_BAD_N_DIMS", pack([], [info("a", [8], n_dims=5)], bytes(64)), "'a' has 5 dimensions; expected 1 to 4"),
    ("TENSORS_BAD_SHAPE", pack([], [info("a", [(1 << 64) - 1])], bytes(32)), "'a': shape .18446744073709551615,."),
    ("TENSORS_ZERO_DIM", pack([], [info("a", [8, 0])], bytes(32)), "tensor 'a': shape .0, 8.; expected 1 to 4 sizes"),
    ("TENSORS_NE_TOO_BIG", pack([], [info("a", [1 << 33, 1 << 33])], bytes(32)), r"expected 29514790517935\d* bytes"),
    ("TENSORS_NBYTES_TOO_BIG", pack([], [info("a", [1 << 31, 1 << 31])], bytes(32)), r"expected 18446744073709\d*"),
    ("TENSORS_BAD_TYPE", pack([], [info("a", [8], 42)], bytes(32)), "of ggml type 42; expected one of F32, F16"),
    ("TENSORS_BAD_OFFSET", pack([], [info("a", [8], 0, (1 << 64) - 1)], bytes(32)), "leaves a hole before it"),
    ("TENSORS_DUPLICATE_NAME", pack([], [info("a", [8]), info("a", [8], 0, 32)], bytes(64)), "'a' appears twice"),
    ("TENSORS_BAD_ALIGN", pack([kv(ALIGN, U32, u32(13))], LOOSE, LOOSE_DATA), "general.alignment is 13"),
    ("TENSORS_INCONSISTENT_ALIGN", pack([], LOOSE, LOOSE_DATA), "is not aligned; expected offset 32, not 4"),
    ("TENSORS_SUCCESS without data", pack(some_pairs(), INFOS), "cut short"),  # ggml asks for the data later
    ("DATA_NOT_ENOUGH_DATA", GOOD[:-1], f"cut short: {len(GOOD) - 1} bytes; expected {len(GOOD)} bytes by its header"),
    ("DATA_BAD_ALIGN", pack([kv(ALIGN, U32, u32(13))], INFOS, DATA), "general.alignment is 13"),
    ("DATA_INCONSISTENT_ALIGN", pack([kv(ALIGN, U32, u32(1))], INFOS, DATA), "leaves a hole before it"),
    ("DATA_MEM_SIZE_OVERFLOW", pack([], [info("a", [BIG], 8), info("b", [BIG], 8, 34 * (BIG // 32) + 4)]), "cut short"),
    ("DATA_SUCCESS", GOOD, ""),
    ("DATA_CUSTOM_ALIGN", pack([kv(ALIGN, U32, u32(1))], LOOSE, LOOSE_DATA, alignment=1), ""),
]  # fmt: skip


@pytest.mark.fault("Q1")
@pytest.mark.parametrize(("data", "found"), [row[1:] for row in GGML_KINDS], ids=[row[0] for row in GGML_KINDS])
def test_the_kinds_of_ggmls_own_test(tmp_path: Path, data: bytes, found: str) -> None:
    """Those of llama.cpp's tests/test-gguf.cpp by their names there, and a few of their kin."""
    if found:
        refused(tmp_path, data, found)
    else:
        assert copied(put(tmp_path, data)) == data


CLASS: list[tuple[str, bytes, str]] = [
    ("nothing", b"", "0 bytes; expected a GGUF file"),
    ("a pickle in a zip", b"PK\3\4" + bytes(60), "begins with b'PK"),
    ("nested array", pack([kv("k", ARRAY, u32(ARRAY) + u64(1) + u32(U8) + u64(1) + b"\1")]), "'k' is of type 9"),
    ("key of control letters", pack([kv("a\x1b]0;x", U8, b"\1")]), r"a key 'a\\x1b\]0;x' of 6 characters"),
    ("key with NUL", pack([kv("a\0b", U8, b"\1")]), r"a key 'a\\x00b'"),
    ("key of 64 KiB", pack([kv("k" * (1 << 16), U8, b"\1")]), "of 65536 characters; expected 1 to 65535"),
    ("key not UTF-8", pack([kv(b"\xff\xfe", U8, b"\1") + bytes(9)]), "a key at byte 24 is not UTF-8"),
    ("text not UTF-8", pack([kv("k", STRING, text(b"ok\xff"))]), "the value of 'k' at byte 37 is not UTF-8"),
    ("strings beyond the file", pack([kv("k", ARRAY, u32(STRING) + u64(1 << 40) + bytes(64))]), "49 takes 87960930222"),
    ("surrogate", pack([kv("k", ARRAY, u32(STRING) + u64(2) + text("ok") + text(b"\xed\xa0\x80"))]), "59 is not UTF-8"),
    ("bool of 2", pack([kv("k", BOOL, b"\2")]), "the value of 'k' holds a bool of 2; expected 0 or 1"),
    ("bools of 255", pack([kv("k", ARRAY, u32(BOOL) + u64(2) + b"\1\xff")]), "holds a bool of 255"),
    ("tensor without a name", pack([], [info("", [8]) + bytes(1)], bytes(32)), "a tensor's name '' of 0 characters"),
    ("tensor named with NUL", pack([], [info("a\0", [8])], bytes(32)), r"a tensor's name 'a\\x00'"),
    ("tensor named not UTF-8", pack([], [info(b"\xff", [8])], bytes(32)), "is not UTF-8"),
    ("name of 63 bytes in 32 letters", pack([], [info("é" * 32, [8])], bytes(32)), "expected 1 to 63 printable bytes"),
    ("no dimensions", pack([], [info("a", []) + bytes(8)], bytes(32)), "tensor 'a' has 0 dimensions"),
    ("2^32 - 1 dimensions", pack([], [info("a", [8], n_dims=(1 << 32) - 1)], bytes(32)), "has 4294967295 dimensions"),
    ("size of 2^63", pack([], [info("a", [1 << 63])], bytes(32)), "tensor 'a': shape"),
    ("product that wraps to 8", pack([], [info("a", [1 << 62, 4, 8])], bytes(32)), "cut short"),
    ("the same place twice", pack([], [info("a", [8]), info("b", [8])], bytes(64)), "tensor 'b' overlaps .* offset 32"),
    ("in the middle of the first", pack([], [info("a", [64]), info("b", [8], 0, 32)], bytes(288)), "'b' overlaps"),
    ("misaligned", pack([], [info("a", [9]), info("b", [8], 0, 36)], bytes(96)), "'b' is not aligned; .* offset 64"),
    ("hole", pack([], [info("a", [8]), info("b", [8], 0, 64)], bytes(96)), "'b' leaves a hole .* offset 32, not 64"),
    ("hole at the start", pack([], [info("a", [8], 0, 32)], bytes(64)), "'a' leaves a hole"),
    ("other order", pack([], [info("a", [8], 0, 32), info("b", [8])], bytes(64)), "'a' leaves a hole"),
    ("trailing bytes", ONE + bytes(32), "followed by bytes that belong to no tensor: 128 bytes; expected 96"),
    ("trailing byte of no tensors", pack() + b"\0", "followed by bytes that belong to no tensor"),
]  # fmt: skip


@pytest.mark.fault("Q1")
@pytest.mark.parametrize(("data", "found"), [row[1:] for row in CLASS], ids=[row[0] for row in CLASS])
def test_what_is_next_to_them(tmp_path: Path, data: bytes, found: str) -> None:
    refused(tmp_path, data, found)
    assert read(put(tmp_path, ONE))["a"].shape == (32,)


HUGE = 1 << 63
CLAIMS = {
    "tensors": pack(n_tensors=HUGE)[:43],
    "keys": pack(n_pairs=HUGE)[:43],
    "array": pack([kv("k", ARRAY, u32(U8) + u64(HUGE))]),
    "array of strings": pack([kv("k", ARRAY, u32(STRING) + u64(HUGE))]),
    "array whose size wraps": pack([kv("k", ARRAY, u32(U64) + u64((1 << 61) + 1) + bytes(8))]),
    "string": pack([kv("k", STRING, u64(HUGE))]),
    "string of 2^64 - 1": pack([kv("k", STRING, u64(HUGE * 2 - 1))]),
    "key": (pack(n_pairs=1)[:24] + u64(HUGE) + bytes(11))[:43],
    "tensor's name": pack([], [info("a", [8], length=HUGE)]),
    "2 GB array in a small file": pack([kv("k", ARRAY, u32(F32) + u64(1 << 29) + bytes(64))]),
}


@pytest.mark.fault("Q2")
@pytest.mark.parametrize("data", CLAIMS.values(), ids=CLAIMS)
def test_counts_beyond_the_file(tmp_path: Path, data: bytes) -> None:
    path = put(tmp_path, data)
    refused(tmp_path, data, "cut short or damaged: .* takes|bytes; expected")

    def run(action: Callable[[], object]) -> None:
        allow(16 << 20)
        action()

    assert in_child(lambda: run(lambda: read_gguf(path))) == InputError.exit_code
    assert in_child(lambda: run(lambda: bytearray(1 << 31))) == 99  # control: who believes the count runs out of memory


@pytest.mark.fault("Q2")
@pytest.mark.parametrize("item", [U8, STRING])
def test_a_header_of_gigabytes(tmp_path: Path, item: int) -> None:
    """The bytes are there, as a hole on the disk, but no header is that large."""
    path = put(tmp_path, pack([kv("k", ARRAY, u32(item) + u64(1 << 30))]))
    os.truncate(path, 1 << 34)
    with pytest.raises(InputError, match=r"takes \d+ or more; expected at most the \d+ bytes left for a header"):
        read_gguf(path)
    assert MAX_HEADER < 1 << 30


@pytest.mark.fault("Q4")
@pytest.mark.parametrize(
    ("kind", "payload"),
    [(U32, u32(value)) for value in (0, 3, 13, 33, 1 << 21, 1 << 31, (1 << 32) - 1)]
    + [
        (I32, u32(32)),
        (U64, u64(32)),
        (STRING, text("32")),
        (ARRAY, u32(U32) + u64(1) + u32(32)),
        (F32, PAYLOADS[F32]),
    ],
)
def test_alignment(tmp_path: Path, kind: int, payload: bytes) -> None:
    refused(
        tmp_path, pack([kv(ALIGN, kind, payload)], INFOS, DATA), r"general\.alignment is .*; expected a power of two"
    )
    for good in (1, 32, 4096):
        infos, data = some_tensors(good)
        content = pack([kv(ALIGN, U32, u32(good))], infos, data, alignment=good)
        assert copied(put(tmp_path, content)) == content


@pytest.mark.fault("Q6")
@pytest.mark.parametrize("block", [block for block in BLOCKS.values() if block.size > 1])
def test_rows_that_are_not_whole_blocks(tmp_path: Path, block: Any) -> None:
    for columns in (1, block.size - 1, block.size + 1, block.size * 3 // 2):
        found = f"tensor 'w': rows of {columns} weights; expected a multiple of {block.size}, the block of {block.name}"
        refused(tmp_path, pack([], [info("w", [columns, block.size], block.id)], bytes(1 << 16)), found)


@pytest.mark.fault("Q6")
def test_types_that_are_not_supported(tmp_path: Path) -> None:
    known = {block.id for block in BLOCKS.values()}
    for kind in {*range(64), 1 << 31, (1 << 32) - 1} - known:
        message = refused(tmp_path, pack([], [info("w", [256], kind)], bytes(2048)), "tensor 'w' is of ggml type")
        assert message.endswith(f"expected one of {', '.join(BLOCKS)}")
    for kind, name in ((10, "Q2_K"), (11, "Q3_K"), (20, "IQ4_NL"), (26, "I32"), (39, "MXFP4")):
        assert gguf.GGMLQuantizationType(kind).name == name
        refused(tmp_path, pack([], [info("w", [256], kind)], bytes(2048)), f"of ggml type {name};")


@pytest.mark.fault("K1")
def test_cut_at_any_byte(tmp_path: Path) -> None:
    head = GOOD[: len(GOOD) - len(DATA)]
    for cut in [*range(len(head) + 1), *range(len(head) + 1, len(GOOD), len(DATA) // 50), len(GOOD) - 1]:
        message = refused(tmp_path, GOOD[:cut], f"{cut} bytes")
        if cut >= len(head):
            assert f"expected {len(GOOD)} bytes" in message


@pytest.mark.fault("K15")
def test_places_that_are_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for place in (tmp_path, tmp_path / "fifo", Path("/dev/zero"), tmp_path / "missing"):
        with pytest.raises(InputError):
            read_gguf(place)


INTERESTING = [
    struct.pack("<Q", value) for value in (0, 1, 9, 31, 255, 1 << 31, 1 << 32, 1 << 62, 1 << 63, (1 << 64) - 1)
]


def mutants(data: bytes, seed: int, count: int) -> Iterator[bytes]:
    """`count` damaged copies: bits flipped, numbers replaced or moved by one, parts cut, doubled, swapped, lost."""
    source = random.Random(seed)
    for _ in range(count):
        mutant = bytearray(data)
        for _ in range(source.choice((1, 1, 1, 2, 4, 16))):
            place, size = source.randrange(len(mutant) + 1), source.choice((1, 4, 8, 8, 32, 200))
            part = bytes(mutant[place : place + size])
            match source.randrange(8):
                case 0 if place < len(mutant):
                    mutant[place] ^= 1 << source.randrange(8)
                case 1 if part:
                    mutant[place : place + size] = source.randbytes(len(part))
                case 2:
                    mutant[place : place + 8] = source.choice(INTERESTING)
                case 3 if part:
                    value = int.from_bytes(part[:8], "little") + source.choice((-1, 1))
                    mutant[place : place + len(part[:8])] = (value % (1 << 64)).to_bytes(8, "little")[: len(part[:8])]
                case 4:
                    del mutant[place : place + size]
                case 5:
                    mutant[place:place] = part or b"\0"
                case 6:
                    other = source.randrange(len(mutant) + 1)
                    mutant[other : other + len(part)] = part
                case _:
                    del mutant[place:]
        yield bytes(mutant)


@pytest.mark.fault("K18")
def test_mutants_give_our_error_or_tensors(tmp_path: Path) -> None:
    seeds = (GOOD, ONE, pack([kv(ALIGN, U32, u32(32)), kv("a", STRING, text("bc"))]))
    outcomes = []
    for seed, data in enumerate(seeds):
        for mutant in mutants(data, seed, 400):
            path = put(tmp_path, mutant)
            try:
                outcomes.append(sum(raw.numel() for raw in read(path).values()) <= len(mutant))
            except InputError as error:
                assert str(path) in str(error)
    assert all(outcomes) and 60 < len(outcomes) < 1000  # many are harmless, many are caught


# --- writing -----------------------------------------------------------------------------------------------------


def test_data_is_asked_for_when_its_turn_comes_and_never_copied() -> None:
    weights, asked = torch.zeros(1 << 16), []

    def give(name: str) -> Tensor:
        asked.append(name)
        return weights

    sources = {name: Source("F32", (1 << 16,), partial(give, name)) for name in "ab"}
    chunks = write_gguf({}, sources)
    next(chunks)
    assert not asked
    view = next(chunks)
    assert asked == ["a"]
    weights[0] = 1.0
    assert bytes(view[:4]) == struct.pack("<f", 1.0)
    assert len(list(chunks)) == 3 and asked == ["a", "b"]


UNWRITABLE: list[tuple[object, str]] = [
    *((value, "") for value in (-1, 1 << 32, [1 << 31], 1e39, "\ud800", None, b"raw", [], [1, "a"], [[1]])),
    (256, "uint8"), (1.5, "int32"), ("1", "int32"), (1, "string"), ([1], "array[]"), (1, "int32[]"), (1, "int128"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "kind"), UNWRITABLE)
def test_values_that_cannot_be_written(value: object, kind: str) -> None:
    with pytest.raises(BugError, match="k"):
        list(write_gguf({"k": value}, {}, {"k": kind}))


@pytest.mark.parametrize("key", ["", "a\0", "\ud800", "k" * (1 << 16)])
def test_keys_that_cannot_be_written(key: str) -> None:
    with pytest.raises(BugError, match="a printable key"):
        list(write_gguf({key: 1}, {}))


def test_tensors_that_cannot_be_written() -> None:
    weights = torch.zeros(4, 32)
    for name in ("", "n" * 64, "é" * 32, "a\0", "a\n", "\ud800"):
        with pytest.raises(BugError, match="1 to 63 printable bytes"):
            list(write_gguf({}, {name: Source("F32", (4, 32), weights)}))
    for kind, shape, data in (("Q2_K", (4, 32), weights), ("F32", (4, 31), weights), ("F16", (4, 32), weights)):
        with pytest.raises(BugError):
            list(write_gguf({}, {"a": Source(kind, shape, data)}))
    for kind, shape in (("Q8_0", (32, 4)), ("F32", (4, 0)), ("F32", ()), ("F32", (1, 1, 1, 4, 32)), ("F32", (-4, -32))):
        with pytest.raises(InputError, match="tensor 'a'"):
            list(write_gguf({}, {"a": Source(kind, shape, weights)}))
    for alignment in (0, 13, 1 << 31, "32", 32.0):
        with pytest.raises(InputError, match=r"general\.alignment"):
            list(write_gguf({ALIGN: alignment}, {}))
