"""ONNX: weights and nodes against torch's exporter and a writer by hand; DINOv2 under the names transformers writes."""

from __future__ import annotations

import random
import re
import struct
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from mutants import in_little_memory, mutant
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from headway import files
from headway.checkpoints.foreign import read_foreign
from headway.checkpoints.onnx import read_onnx
from headway.errors import InputError


def varint(value: int) -> bytes:
    made = bytearray()
    value %= 1 << 64
    while value > 127:
        made.append(value & 127 | 128)
        value >>= 7
    return bytes([*made, value])


def field(number: int, value: int | bytes | str, wire: int | None = None) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    content = value.encode() if isinstance(value, str) else value
    if wire == 5:
        return varint(number << 3 | 5) + content
    return varint(number << 3 | 2) + varint(len(content)) + content


def tensor(name: str, kind: int, shape: list[int], **data: bytes) -> bytes:
    numbers = {"float": 4, "int32": 5, "int64": 7, "raw": 9, "double": 10, "uint64": 11}
    sizes = b"".join(field(1, size) for size in shape)
    return sizes + field(2, kind) + field(8, name) + b"".join(field(numbers[k], v) for k, v in data.items())


def floats(name: str, value: Tensor) -> bytes:
    return tensor(name, 1, list(value.shape), raw=value.contiguous().numpy().tobytes())


def node(op: str, name: str, inputs: list[str], output: str = "", *attributes: bytes) -> bytes:
    words = b"".join(field(1, word) for word in inputs) + field(2, output) + field(3, name) + field(4, op)
    return words + b"".join(field(5, attribute) for attribute in attributes)


def constant(output: str, value: bytes) -> bytes:
    return node("Constant", output, [], output, field(1, "value") + field(5, value) + field(20, 4))


def model(tensors: list[bytes], nodes: list[bytes] = []) -> bytes:  # noqa: B006
    graph = b"".join(field(1, n) for n in nodes) + field(2, "graph") + b"".join(field(5, t) for t in tensors)
    return field(1, 7) + field(2, "writer") + field(7, graph) + field(8, field(2, 14))


def store(path: Path, data: bytes) -> Path:
    files.write(path, data)
    return path


def packed(values: list[int]) -> bytes:
    return b"".join(map(varint, values))


F16 = torch.tensor([1.5, -2.0, float("inf")], dtype=torch.float16)
BF16 = torch.tensor([1.5, -2.0, 3e38], dtype=torch.bfloat16)
TYPED: list[tuple[str, bytes, Tensor]] = [
    ("f32 typed", tensor("x", 1, [2], float=struct.pack("<2f", 1.5, -0.0)), torch.tensor([1.5, -0.0])),
    ("f64 typed", tensor("x", 11, [1], double=struct.pack("<d", 1e-300)), torch.tensor([1e-300], dtype=torch.float64)),
    ("u8", tensor("x", 2, [2], int32=packed([0, 255])), torch.tensor([0, 255], dtype=torch.uint8)),
    ("i8", tensor("x", 3, [2], int32=packed([-128, 127])), torch.tensor([-128, 127], dtype=torch.int8)),
    ("u16", tensor("x", 4, [1], int32=packed([65535])), torch.tensor([65535], dtype=torch.uint16)),
    ("i16", tensor("x", 5, [2, 1], int32=packed([-32768, 5])), torch.tensor([[-32768], [5]], dtype=torch.int16)),
    ("i32", tensor("x", 6, [1], int32=packed([-(1 << 31)])), torch.tensor([-(1 << 31)], dtype=torch.int32)),
    ("i64", tensor("x", 7, [2], int64=packed([-1, 1 << 62])), torch.tensor([-1, 1 << 62])),
    ("u32", tensor("x", 12, [1], uint64=packed([(1 << 32) - 1])), torch.tensor([(1 << 32) - 1], dtype=torch.uint32)),
    ("u64", tensor("x", 13, [1], uint64=packed([1 << 63])), torch.tensor([1 << 63], dtype=torch.uint64)),
    ("bool", tensor("x", 9, [2], int32=packed([1, 0])), torch.tensor([True, False])),
    ("f16 bits", tensor("x", 10, [3], int32=packed(F16.view(torch.uint16).tolist())), F16),
    ("bf16 bits", tensor("x", 16, [3], int32=packed(BF16.view(torch.uint16).tolist())), BF16),
    ("f16 raw", tensor("x", 10, [3], raw=F16.numpy().tobytes()), F16),
    ("i64 raw", tensor("x", 7, [1], raw=struct.pack("<q", -7)), torch.tensor([-7])),
    ("scalar", tensor("x", 1, [], raw=struct.pack("<f", 2.5)), torch.tensor(2.5)),
    ("empty", tensor("x", 1, [0, 3]), torch.empty(0, 3)),
    ("packed sizes", field(1, packed([2, 1])) + tensor("x", 1, [], raw=bytes(8)), torch.zeros(2, 1)),
]  # fmt: skip


@pytest.mark.parametrize(("data", "wanted"), [row[1:] for row in TYPED], ids=[row[0] for row in TYPED])
def test_every_type_raw_and_typed(tmp_path: Path, data: bytes, wanted: Tensor) -> None:
    for padding in range(8):  # wherever in the file it lies
        path = store(tmp_path / "f", model([tensor("p" * padding + "q", 1, [0]), data]))
        found = read_onnx(path).tensors["x"]
        assert found.dtype == wanted.dtype and found.shape == wanted.shape
        assert found.reshape(-1).view(torch.uint8).equal(wanted.reshape(-1).view(torch.uint8))


def test_nodes(tmp_path: Path) -> None:
    attributes = [
        field(1, "axis") + field(3, -1),
        field(1, "alpha") + field(2, struct.pack("<f", 0.5), wire=5),
        field(1, "value") + field(5, tensor("", 7, [2], int64=packed([3, 4]))),
        field(1, "perm") + field(8, 1) + field(8, 0),
        field(1, "mode") + field(4, b"\xff"),
    ]
    path = store(tmp_path / "f", model([], [node("Op", "/a/Op", ["x", ""], "y", *attributes)]))
    (found,) = read_onnx(path).nodes
    assert found[:4] == ("Op", "/a/Op", ("x", ""), ("y",))
    value = found.attributes.pop("value")
    assert isinstance(value, Tensor) and value.tolist() == [3, 4]
    assert found.attributes == {"axis": -1, "alpha": 0.5}


def test_weights_that_torch_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exporter serializes in C++; only its last step, functions written in onnxscript, wants the onnx package."""
    utils = pytest.importorskip("torch.onnx._internal.torchscript_exporter.onnx_proto_utils")
    monkeypatch.setattr(utils, "_add_onnxscript_fn", lambda data, opsets: data)
    net = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Conv1d(4, 2, 3), torch.nn.BatchNorm1d(2)).eval()
    net[0].register_buffer("steps", torch.arange(3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(net, (torch.randn(1, 4, 5),), str(tmp_path / "f"), dynamo=False, do_constant_folding=False)
    file = read_onnx(tmp_path / "f")
    state = net.state_dict()
    shared = state.keys() & file.tensors.keys()
    assert {"0.bias", "1.weight", "1.bias"} <= shared
    assert all(file.tensors[name].equal(state[name]) for name in shared)
    assert {"Conv", "Add"} <= {n.op for n in file.nodes}


def test_raw_weights_are_views_of_a_private_mapping(tmp_path: Path) -> None:
    data = model([floats("x", torch.ones(4096))])
    aligned = next(
        n for n in range(4) if store(tmp_path / "f", field(2, "p" * n) + data).read_bytes().find(b"\0\0\x80?") % 4 == 0
    )
    path = store(tmp_path / "f", field(2, "p" * aligned) + data)
    before = path.read_bytes()
    read_onnx(path).tensors["x"].zero_()
    assert path.read_bytes() == before


ONE = floats("a", torch.ones(2))
MALFORMED: list[tuple[str, bytes, str]] = [
    ("empty", b"", "0 bytes"),
    ("no graph", field(1, 7) + field(2, "x"), "0 graphs"),
    ("two graphs", model([ONE]) + model([ONE]), "2 graphs"),
    ("graph a number", field(7, 3), "the number 3"),
    ("not protobuf", b"\x07" * 50, "field number 0"),
    ("safetensors", b"\x08\0\0\0\0\0\0\0{}      ", "graph|field number"),
    ("too few bytes", model([tensor("a", 1, [3], raw=bytes(8))]), "8 bytes; expected 12 for torch.float32"),
    ("too many bytes", model([tensor("a", 1, [1], raw=bytes(8))]), "8 bytes; expected 4"),
    ("no data", model([tensor("a", 1, [1])]), "0 bytes; expected 4"),
    ("data of another field", model([tensor("a", 1, [1], int32=bytes(4))]), "0 bytes; expected 4"),
    ("huge", model([tensor("a", 1, [1 << 62, 1 << 62], raw=bytes(8))]), "8 bytes; expected"),
    ("product wraps to 8", model([tensor("a", 1, [1 << 62, 8, 1], raw=bytes(8))]), "8 bytes; expected"),
    ("negative size", model([tensor("a", 1, [-2, -1], raw=bytes(8))]), "sizes"),
    ("many sizes", model([tensor("a", 1, [1] * 17, raw=bytes(4))]), "sizes"),
    ("packed million of sizes", model([field(1, b"\x01" * 1_000_000) + ONE]), "sizes"),
    ("integers too few", model([tensor("a", 6, [3], int32=packed([1, 2]) + b"")]), "2 bytes; expected 3 integers"),
    ("integers of many bytes", model([tensor("a", 6, [2], int32=packed([1 << 20]))]), "1 integers; expected 2"),
    ("many integers", model([tensor("a", 6, [1 << 40], int32=packed([1]))]), "1 bytes; expected"),
    ("beyond int8", model([tensor("a", 3, [1], int32=packed([128]))]), "beyond the range"),
    ("negative bits", model([tensor("a", 10, [1], int32=packed([-1]))]), "beyond the range"),
    ("bool of 2", model([tensor("a", 9, [1], raw=b"\2")]), "other than 0 and 1"),
    ("string data", model([tensor("a", 8, [1])]), "data type 8"),
    ("int4", model([tensor("a", 22, [2], raw=b"\0")]), "data type 22; expected one of 1, 2"),
    ("no type", model([field(8, "a") + field(9, b"")]), "data type 0"),
    ("external", model([ONE + field(13, field(1, "location") + field(2, "../x"))]), "another file"),
    ("external by location", model([ONE + field(14, 1)]), "another file"),
    ("sparse", field(7, field(15, b"")), "sparse"),
    ("twice", model([ONE, ONE]), "'a' of 1 characters; expected .* each name once"),
    ("nameless", model([floats("", torch.ones(1))]), "initializer ''"),
    ("name of a megabyte", model([floats("n" * (1 << 20), torch.ones(1))]), "1048576 characters"),
    ("NUL and escapes in a name", model([floats("a\0\x1b]0;x", torch.ones(1))]), "printable"),
    ("name not UTF-8", model([field(8, b"\xff") + ONE]), "UTF-8"),
    ("name a number", model([field(8, 5) + ONE]), "the number 5"),
    ("node a number", field(7, field(1, 5)), "the number 5"),
    ("raw a number", model([field(9, 5)]), "the number 5"),
    ("bad constant", model([], [constant("c", tensor("", 1, [9], raw=bytes(4)))]), "4 bytes; expected 36"),
]


@pytest.mark.fault("K4", "K6", "K7", "K12")
@pytest.mark.parametrize(("data", "found"), [row[1:] for row in MALFORMED], ids=[row[0] for row in MALFORMED])
def test_malformed(tmp_path: Path, data: bytes, found: str) -> None:
    with pytest.raises(InputError, match=found) as caught:
        read_onnx(store(tmp_path / "f", data))
    assert str(caught.value).startswith(str(tmp_path / "f")) and len(str(caught.value)) < 600
    assert list(read_onnx(store(tmp_path / "control", model([ONE]))).tensors) == ["a"]


@pytest.mark.fault("K1")
def test_cut_at_any_byte(tmp_path: Path) -> None:
    whole = field(7, model([ONE, floats("b", torch.ones(3))], [node("Op", "n", ["a"])])[10:])
    for cut in range(1, len(whole)):
        with pytest.raises(InputError, match=re.escape(str(tmp_path / "f"))):
            read_onnx(store(tmp_path / "f", whole[:cut]))


@pytest.mark.fault("K2")
def test_counts_beyond_the_bytes_take_no_memory(tmp_path: Path) -> None:
    bombs = [
        field(1, 7) + varint(7 << 3 | 2) + varint((1 << 63) + 5) + b"x",
        model([tensor("a", 6, [1 << 62], int32=packed([1] * 50))]),
        model([tensor("a", 1, [1 << 62], raw=bytes(4))]),
        field(7, field(1, b"") * 70_000),
        field(7, field(1, b"".join(field(5, field(1, f"{n}") + field(3, 0)) for n in range(5_000)))),
    ]
    for number, bomb in enumerate(bombs):
        path = store(tmp_path / f"{number}", bomb)
        assert in_little_memory(lambda path=path: read_onnx(path), room=64 << 20) == InputError.exit_code


# --- DINOv2 ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dinov2Config, dict[str, Tensor]]:
    """A small model as transformers saves it."""
    config = Dinov2Config(
        hidden_size=12, num_hidden_layers=2, num_attention_heads=3, image_size=28, patch_size=7, num_channels=2,
        mlp_ratio=2, layer_norm_eps=1e-5, use_mask_token=False,
    )  # fmt: skip
    made = Dinov2Model(config)
    for parameter in made.parameters():
        parameter.data.normal_()
    folder = tmp_path_factory.mktemp("dinov2")
    made.save_pretrained(folder)
    return config, safetensors.torch.load_file(folder / "model.safetensors")


def exported(state: dict[str, Tensor], prefix: str = "backbone.", heads: int = 3, eps: float = 1e-5) -> bytes:
    """What torch's exporter makes of it: transposed weights without names, positions in two parts, constants."""
    place = "/" + prefix.replace(".", "/")
    tensors, nodes = [floats("decoder.bias", torch.ones(2)), floats("onnx::Mul_9", torch.ones(1))], []
    for number, (name, value) in enumerate(state.items()):
        anonymous = f"onnx::MatMul_{number}"
        if name == "embeddings.position_embeddings":
            tensors += [floats("onnx::Concat_1", value[:, :1]), floats("onnx::Reshape_2", value[:, 1:])]
            nodes += [node("Reshape", f"{place}embeddings/Reshape_1", ["onnx::Reshape_2", "shape"], "r")]
            nodes += [node("Concat", f"{place}embeddings/Concat_6", ["onnx::Concat_1", "r"], "c")]
        elif name.endswith("weight") and value.dim() == 2:
            tensors.append(floats(anonymous, value.T))
            layer = name.removesuffix(".weight").replace("layer.", "layer#").replace(".", "/").replace("#", ".")
            nodes.append(node("MatMul", f"{place}{layer}/MatMul", ["x", anonymous], f"o{number}"))
        else:
            tensors.append(floats(prefix + name, value))
    attention = f"{place}encoder/layer.0/attention/attention"
    nodes += [
        constant(f"h{i}", tensor("", 7, [1], raw=struct.pack("<q", n))) for i, n in enumerate((heads, 12 // heads))
    ]
    nodes += [constant("eps", floats("", torch.tensor(eps)))]
    nodes += [
        node("MatMul", f"{attention}/MatMul", ["q", "k"]),
        node("Concat", f"{attention}/Concat", ["b", "h0", "h1"]),
    ]
    nodes += [node("Add", f"{place}encoder/layer.0/norm1/Add", ["variance", "eps"])]
    return model(tensors, nodes)


@pytest.mark.parametrize("prefix", ["backbone.", "", "model.vit."])
def test_dinov2_as_transformers_saves_it(
    tmp_path: Path, published: tuple[Dinov2Config, dict[str, Tensor]], prefix: str
) -> None:
    config, state = published
    said: list[str] = []
    store(tmp_path / "preprocessor_config.json", b"{}")
    found, tensors, beside = read_foreign(store(tmp_path / "f.onnx", exported(state, prefix)), say=said.append)
    assert tensors.keys() == state.keys() and all(tensors[name].equal(state[name]) for name in state)
    assert all(found[key] == getattr(config, key) for key in found.keys() - {"architectures", "dtype"})
    assert found["dtype"] == "float32" and beside == {"preprocessor_config.json": tmp_path / "preprocessor_config.json"}
    assert len(said) == 1 and said[0].endswith(
        "left out 2 tensors that belong to no DINOv2 backbone: decoder.bias, onnx::Mul_9"
    )


POSITIONS, PATCHES = "embeddings.position_embeddings", "embeddings.patch_embeddings.projection.weight"
WRONG: list[tuple[str, Callable[[dict[str, Tensor]], bytes], str]] = [
    ("another model", lambda s: model([ONE]), "no tensor embeddings.patch"),
    ("no positions", lambda s: exported({k: v for k, v in s.items() if "position" not in k}), "by Concat"),
    ("positions no square", lambda s: exported(s | {POSITIONS: torch.ones(1, 16, 12)}), "fit no"),
    ("positions of another width", lambda s: exported(s | {POSITIONS: torch.ones(1, 17, 5)}), "1, 5"),
    ("heads that do not fit", lambda s: exported(s, heads=5), r"heads \[5, 2\]"),
    ("negative heads", lambda s: exported(s, heads=-3), r"heads \[-3, -4\]"),
    ("no epsilon", lambda s: exported(s, eps=2.0), "epsilon"),
    ("no feed-forward", lambda s: exported({k: v for k, v in s.items() if "fc1.weight" not in k}), "fc1.weight"),
    ("flat patches", lambda s: exported(s | {PATCHES: torch.ones(12, 5)}), "no tensor embeddings.patch"),
]  # fmt: skip


@pytest.mark.fault("K8", "F9")
@pytest.mark.parametrize(("make", "found"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG])
def test_a_graph_that_is_no_dinov2(
    tmp_path: Path,
    published: tuple[Dinov2Config, dict[str, Tensor]],
    make: Callable[[dict[str, Tensor]], bytes],
    found: str,
) -> None:
    with pytest.raises(InputError, match=found):
        read_foreign(store(tmp_path / "f", make(published[1])), say=lambda line: None)


@pytest.mark.fault("K18")
def test_mutants_give_our_error_or_tensors(tmp_path: Path, published: tuple[Dinov2Config, dict[str, Tensor]]) -> None:
    whole = exported(published[1])
    rng = random.Random(0)
    fine = 0
    for _ in range(300):
        path = store(tmp_path / "f", mutant(whole, rng))
        try:
            read_foreign(path, say=lambda line: None)
            fine += 1
        except InputError as error:
            assert str(path) in str(error)
    assert 0 < fine < 300
