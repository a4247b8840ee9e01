"""Safetensors: our bytes against the safetensors library's, and a reader that trusts no header."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import safetensors.torch
import torch
from fault_injection import in_child
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headway import files
from headway.checkpoints.tensors import (
    DTYPES,
    read_header,
    read_tensors,
    snapshot,
    tensor_hash,
    write_tensors,
)
from headway.errors import BugError, InputError


def every_dtype() -> dict[str, Tensor]:
    raw = torch.randint(0, 2, (6, 16), dtype=torch.uint8)
    tensors = {f"t.{name}": raw.clone().view(dtype) for name, dtype in DTYPES.items()}
    return tensors | {
        "empty": torch.zeros(0, 3),
        'scalar é"\\': torch.tensor(2.5),
        "strided": torch.randn(4, 3).T,
    }


def store(path: Path, tensors: Mapping[str, Tensor], **metadata: str) -> bytes:
    files.write(path, write_tensors(tensors, metadata))
    return path.read_bytes()


def pack(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: object, shape: object, begin: object, end: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    def bits(tensors: Mapping[str, Tensor]) -> dict[str, object]:
        return {name: (t.dtype, t.shape, t.contiguous().reshape(-1).view(torch.uint8).tolist())
                for name, t in tensors.items()}  # fmt: skip

    return bits(left) == bits(right)


def test_bytes_are_those_of_the_safetensors_library(tmp_path: Path) -> None:
    tensors = every_dtype()
    library = {name: tensor.contiguous() for name, tensor in tensors.items()}
    assert store(tmp_path / "plain", tensors) == safetensors.torch.save(library)
    assert store(tmp_path / "one", tensors, format="pt") == safetensors.torch.save(library, {"format": "pt"})


def test_the_same_tensors_and_metadata_give_the_same_bytes(tmp_path: Path) -> None:
    tensors = every_dtype()
    ours = store(tmp_path / "ours", tensors, b="2", a="1")
    assert ours == store(tmp_path / "again", dict(reversed(tensors.items())), a="1", b="2")
    assert safetensors.safe_open(tmp_path / "ours", "pt").metadata() == {"a": "1", "b": "2"}


@pytest.mark.parametrize("copy", [False, True])
def test_round_trip(tmp_path: Path, copy: bool) -> None:
    tensors = every_dtype()
    store(tmp_path / "f", tensors)
    assert same(read_tensors(tmp_path / "f", copy=copy), tensors)
    assert same(safetensors.torch.load_file(tmp_path / "f"), tensors)
    store(tmp_path / "none", {})
    assert read_tensors(tmp_path / "none") == {}


def test_mapped_tensors_are_private(tmp_path: Path) -> None:
    before = store(tmp_path / "f", {"a": torch.ones(8)})
    read_tensors(tmp_path / "f")["a"].zero_()
    assert (tmp_path / "f").read_bytes() == before


def test_unaligned_header_of_another_writer(tmp_path: Path) -> None:
    data = torch.arange(5, dtype=torch.float64)
    raw = pack({"a": entry("F64", [5], 0, 40)} | {"__metadata__": {"x": "y"}}, data.numpy().tobytes())
    assert int.from_bytes(raw[:8], "little") % 8
    files.write(tmp_path / "f", raw)
    tensor = read_tensors(tmp_path / "f")["a"]
    assert torch.equal(tensor, data) and tensor.data_ptr() % 8 == 0


def test_chunks_are_views_and_bounded() -> None:
    tensor = torch.zeros(5 << 20)
    chunks = list(write_tensors({"a": tensor}))
    assert [len(chunk) for chunk in chunks[1:]] == [8 << 20, 8 << 20, 4 << 20]
    tensor[0] = 1.0
    assert bytes(chunks[1][:4]) == torch.ones(1).numpy().tobytes()  # no copy was made


@pytest.mark.fault("K17")
def test_tied_tensors_are_stored_once_and_tied_again(tmp_path: Path) -> None:
    weight = torch.randn(50, 8)
    tied = {"embed": weight, "head": weight, "row": weight[:1], "transposed": weight.T}
    raw = store(tmp_path / "f", tied)
    assert len(raw) < 2 * weight.numel() * 4 + weight[:1].numel() * 4 + 600
    for copy in (False, True):
        read = read_tensors(tmp_path / "f", copy=copy)
        assert same(read, tied) and read["embed"].data_ptr() == read["head"].data_ptr()
    kept = snapshot(tied)
    weight.zero_()
    assert same(kept, read) and kept["embed"] is kept["head"]
    aliases = json.dumps({"head": "nowhere"})
    files.write(tmp_path / "bad", write_tensors({"a": torch.ones(1)}, {"headway.aliases": aliases}))
    with pytest.raises(InputError, match="tied to nothing"):
        read_tensors(tmp_path / "bad")


def test_hash_depends_on_names_dtypes_shapes_bytes_and_nothing_else() -> None:
    base = {"a": torch.arange(6.0), "b": torch.zeros(2)}
    digest = tensor_hash(base)
    assert digest == tensor_hash({"b": torch.zeros(2), "a": torch.arange(12.0)[::1][:6].clone()})
    assert digest == tensor_hash({"a": torch.arange(6.0).repeat_interleave(2)[::2], "b": torch.zeros(2)})
    others: list[dict[str, Tensor]] = [
        {"a": torch.arange(6.0), "c": torch.zeros(2)},
        {"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(2)},
        {"a": torch.arange(6.0), "b": torch.zeros(2, dtype=torch.int32)},
        {"a": torch.arange(6.0), "b": torch.tensor([0.0, -0.0])},
        {"a": torch.arange(6.0)},
    ]
    assert len({digest, *map(tensor_hash, others)}) == 6


def test_a_dtype_that_cannot_be_stored() -> None:
    with pytest.raises(BugError, match="complex128"):
        list(write_tensors({"a": torch.zeros(1, dtype=torch.complex128)}))


@pytest.mark.fault("K1")
def test_cut_at_any_byte(tmp_path: Path) -> None:
    raw = store(tmp_path / "f", every_dtype(), note="x")
    head = 8 + int.from_bytes(raw[:8], "little")
    cuts = [*range(head + 1), *range(head + 1, len(raw), max(1, (len(raw) - head) // 50)), len(raw) - 1]
    for cut in cuts:
        files.write(tmp_path / "cut", raw[:cut])
        with pytest.raises(InputError, match=str(tmp_path / "cut")) as caught:
            read_tensors(tmp_path / "cut")
        assert f"{cut} bytes" in str(caught.value), caught.value
        if cut >= head:
            assert f"expected {len(raw)} bytes" in str(caught.value)


@pytest.mark.fault("K2")
@pytest.mark.parametrize("length", [0, 1, 3, 1 << 25, 1 << 31, 1 << 63, (1 << 64) - 1])
def test_header_length(tmp_path: Path, length: int) -> None:
    files.write(tmp_path / "f", pack(b"{}", length=length))

    def in_little_memory(action: Callable[[], object]) -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (16 << 20), resource.RLIM_INFINITY))
        action()

    assert in_child(lambda: in_little_memory(lambda: read_tensors(tmp_path / "f"))) == InputError.exit_code
    if length >= 1 << 31:  # control: who believes the header runs out of memory
        assert in_child(lambda: in_little_memory(lambda: bytearray(length))) == 99


ONE = entry("F32", [2], 0, 8)
MALFORMED: list[tuple[str, object, int, str]] = [
    ("K4 overlap", {"a": ONE, "b": entry("F32", [2], 4, 12)}, 12, "tensor 'b' overlaps"),
    ("K4 same range", {"a": ONE, "b": ONE}, 8, "overlaps"),
    ("K4 hole", {"a": ONE, "b": entry("F32", [2], 12, 20)}, 20, "tensor 'b' leaves a hole"),
    ("K4 hole at the start", {"a": entry("F32", [2], 4, 12)}, 12, "tensor 'a' leaves a hole"),
    ("K4 trailing", {"a": ONE}, 9, "belong to no tensor"),
    ("K4 reversed", {"a": entry("F32", [2], 8, 0)}, 8, "tensor 'a': data_offsets 8 to 0"),
    ("K4 negative", {"a": entry("F32", [2], -8, 0)}, 8, "data_offsets"),
    ("K4 wrong size", {"a": entry("F32", [3], 0, 8)}, 8, "12 bytes for F32"),
    ("K4 huge", {"a": entry("F32", [1 << 62, 1 << 62], 0, 8)}, 8, "data_offsets 0 to 8"),
    ("K4 product wraps to 8", {"a": entry("F32", [1 << 62, 1 << 2, 2], 0, 8)}, 8, "data_offsets 0 to 8"),
    ("shape of bool", {"a": entry("F32", [True, 2], 0, 8)}, 8, "shape"),
    ("shape of float", {"a": entry("F32", [2.0], 0, 8)}, 8, "shape"),
    ("shape negative", {"a": entry("F32", [-1, -2], 0, 8)}, 8, "shape"),
    ("many dimensions", {"a": entry("F32", [1] * 100_000 + [2], 0, 8)}, 8, "shape"),
    ("offsets of text", {"a": entry("F32", [2], "0", "8")}, 8, "data_offsets"),
    ("three offsets", {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]}}, 8, "data_offsets"),
    ("no dtype", {"a": {"shape": [2], "data_offsets": [0, 8]}}, 8, "exactly dtype"),
    ("not an entry", {"a": [1]}, 8, "malformed entry"),
    ("K6 duplicate", b'{"a":%s,"a":%s}' % ((json.dumps(ONE).encode(),) * 2), 8, "'?a'?"),
    ("K6 metadata of numbers", {"__metadata__": {"a": 1}, "a": ONE}, 8, "__metadata__"),
    ("K6 metadata a list", {"__metadata__": [], "a": ONE}, 8, "__metadata__"),
    ("K6 NUL", {"a\0b": ONE}, 8, "printable"),
    ("K6 empty name", {"": ONE}, 8, "0 characters"),
    ("K6 1 MB name", {"n" * (1 << 20): ONE}, 8, "1048576 characters"),
    ("K7 F4", {"a": entry("F4", [2], 0, 1)}, 1, "unknown dtype 'F4'; expected one of U64, I64"),
    ("K7 Q4_K", {"a": entry("Q4_K", [2], 0, 1)}, 1, "unknown dtype 'Q4_K'"),
    ("K7 dtype a list", {"a": entry([], [2], 0, 1)}, 1, "unknown dtype"),
    ("a list", [], 0, "not a JSON object"),
    ("NaN", b'{"a":NaN}', 0, "NaN"),
    ("UTF-16", '{"a":1}'.encode("utf-16-le"), 0, "header|UTF|JSON"),
    ("deep", b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 0, "nested|deep"),
    ("bool of 2", {"a": entry("BOOL", [2], 0, 2)}, 2, "other than 0 and 1"),
]


@pytest.mark.fault("K4", "K6", "K7")
@pytest.mark.parametrize(("header", "size", "found"), [row[1:] for row in MALFORMED], ids=[r[0] for r in MALFORMED])
def test_malformed_header(tmp_path: Path, header: object, size: int, found: str) -> None:
    files.write(tmp_path / "f", pack(header, b"\2" * size))
    with pytest.raises(InputError, match=found) as caught:
        read_tensors(tmp_path / "f")
    assert str(caught.value).startswith(str(tmp_path / "f")) and len(str(caught.value)) < 600
    files.write(tmp_path / "control", pack({"a": ONE}, bytes(8)))
    assert read_tensors(tmp_path / "control")["a"].shape == (2,)


def test_header_of_a_good_file(tmp_path: Path) -> None:
    store(tmp_path / "f", {"w": torch.zeros(2, 3, dtype=torch.bfloat16)}, note="x")
    metadata, entries, start = read_header(tmp_path / "f")
    assert metadata == {"note": "x"} and entries == {"w": ("BF16", (2, 3), 0, 12)}
    assert start + 12 == (tmp_path / "f").stat().st_size


BASE = b"".join(map(bytes, write_tensors({"aa": torch.ones(3), "b": torch.ones(2, dtype=torch.int8)}, {"k": "v"})))


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(BASE) - 1), st.binary(max_size=4)), min_size=1, max_size=4))
def test_mutants_give_our_error_or_tensors(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, bytes]]
) -> None:
    raw = bytearray(BASE)
    for place, data in edits:
        raw[place : place + len(data)] = data
    path = tmp_path_factory.getbasetemp() / "mutant"
    files.write(path, bytes(raw))
    try:
        assert all(isinstance(tensor, Tensor) for tensor in read_tensors(path).values())
    except InputError as error:
        assert str(path) in str(error)


@pytest.mark.fault("S12")
def test_saving_over_the_file_the_weights_are_mapped_from(tmp_path: Path) -> None:
    path, truth = tmp_path / "f", {"a": torch.arange(1 << 20, dtype=torch.float32), "b": torch.ones(5000)}
    store(path, truth)
    mapped = read_tensors(path)
    files.atomic_write(path, write_tensors(mapped))
    assert same(mapped, truth) and same(read_tensors(path), truth)
    files.atomic_write(path, write_tensors({"other": torch.zeros(1)}))
    assert same(mapped, truth)

    def control(save: Callable[[Path, files.Content], None]) -> None:
        store(path, truth)
        weights = read_tensors(path)
        save(path, write_tensors(weights))
        assert same(weights, truth) and same(read_tensors(path), truth)

    assert in_child(lambda: control(files.atomic_write)) == 0
    assert in_child(lambda: control(files.write)) != 0  # truncating in place takes the mapped bytes away
