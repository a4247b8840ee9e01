"""ONNX files: the weights of a graph, and its nodes by which weights without a name of their own are found.

The messages (github.com/onnx/onnx, onnx/onnx.proto): ModelProto.graph = 7; GraphProto.node = 1, initializer = 5;
the fields of NodeProto, AttributeProto and TensorProto are named below. Exporters fold a linear layer's transpose into
a constant called `onnx::MatMul_1966`; the MatMul node that takes it still carries the layer's name. Left out: weights
in files beside the graph (they could lie anywhere), sparse, string and 4-bit tensors, subgraphs; nothing is executed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from headway.checkpoints.raw import map_file, view_tensor
from headway.errors import InputError
from headway.protobuf import FIXED32, as_float, fields, signed, text, varints

# As Python objects an empty node or tensor takes a hundred times its bytes in the file: they are counted, not measured.
MAX_NODES, MAX_VALUES, MAX_ATTRIBUTES, MAX_NAME, MAX_DIMS = 1 << 16, 1 << 17, 1 << 8, 1024, 16
Attribute = int | float | Tensor

# By TensorProto.DataType: our dtype; the typed field that can hold it; the numpy type of the values there (bits, for
# the floating types that numpy lacks).
_KINDS = {
    1: (torch.float32, 4, "<f4"),
    2: (torch.uint8, 5, "u1"),
    3: (torch.int8, 5, "i1"),
    4: (torch.uint16, 5, "<u2"),
    5: (torch.int16, 5, "<i2"),
    6: (torch.int32, 5, "<i4"),
    7: (torch.int64, 7, "<i8"),
    9: (torch.bool, 5, "u1"),
    10: (torch.float16, 5, "<u2"),
    11: (torch.float64, 10, "<f8"),
    12: (torch.uint32, 11, "<u4"),
    13: (torch.uint64, 11, "<u8"),
    16: (torch.bfloat16, 5, "<u2"),
    17: (torch.float8_e4m3fn, 5, "u1"),
    19: (torch.float8_e5m2, 5, "u1"),
}
_VARINTS = {5, 7, 11}  # int32_data, int64_data, uint64_data; 4 and 10, float_data and double_data, hold plain bytes


class Node(NamedTuple):
    """One operation: its type, its name, the names of what it takes and makes, attributes of one number or tensor."""

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Attribute]


class OnnxFile(NamedTuple):
    """A graph's initializers by name and its nodes in the order of the file."""

    tensors: dict[str, Tensor]
    nodes: list[Node]


def read_onnx(path: Path) -> OnnxFile:
    """The weights and nodes of an ONNX file; weights stored as raw bytes are views of the mapped file.

    Raises InputError naming the file, and the tensor where one is wrong: not an ONNX model, cut short, sizes that do
    not fit the bytes, an unsupported type, weights in another file, names that come twice.
    """
    where = str(path)
    graphs = [_part(value, where) for number, _, value in fields(map_file(path), where) if number == 7]
    if len(graphs) != 1:
        raise InputError(where, f"{len(graphs)} graphs", "an ONNX model with one")
    tensors: dict[str, Tensor] = {}
    nodes: list[Node] = []
    attributes = 0
    for number, _, value in fields(graphs[0], where):
        if number == 1:
            nodes.append(_node(_part(value, where), where))
            attributes += len(nodes[-1].attributes)
        elif number == 5:
            name, tensor = _tensor(_part(value, where), where)
            if not 0 < len(name) <= MAX_NAME or not name.isprintable() or name in tensors:
                found = f"initializer {name[:80]!r} of {len(name)} characters"
                raise InputError(where, found, f"1 to {MAX_NAME} printable ones, each name once")
            tensors[name] = tensor
        elif number == 15:
            raise InputError(where, "a sparse initializer", "dense weights")
        if len(nodes) > MAX_NODES or len(tensors) + attributes > MAX_VALUES:
            raise InputError(
                where, "too large a graph", f"at most {MAX_NODES} nodes, {MAX_VALUES} weights and attributes"
            )
    return OnnxFile(tensors, nodes)


def _part(value: int | memoryview, where: str) -> memoryview:
    """The bytes of a nested message or of packed values."""
    if isinstance(value, int):
        raise InputError(where, f"the number {value}", "a message or packed values")
    return value


def _node(data: memoryview, where: str) -> Node:
    """NodeProto: input = 1, output = 2, name = 3, op_type = 4, attribute = 5."""
    words: dict[int, list[str]] = {1: [], 2: [], 3: [], 4: []}
    attributes: dict[str, Attribute] = {}
    for number, _, value in fields(data, where):
        if number in words:
            words[number].append(text(value, where))
        elif number == 5:
            attributes |= _attribute(_part(value, where), where)
            if len(attributes) > MAX_ATTRIBUTES:
                raise InputError(where, f"a node of more than {MAX_ATTRIBUTES} attributes", "fewer")
    return Node("".join(words[4][-1:]), "".join(words[3][-1:]), tuple(words[1]), tuple(words[2]), attributes)


def _attribute(data: memoryview, where: str) -> dict[str, Attribute]:
    """AttributeProto: name = 1, f = 2, i = 3, t = 5; the other kinds say nothing about weights and are passed over."""
    name: str = ""
    found: Attribute | None = None
    for number, wire, value in fields(data, where):
        if number == 1:
            name = text(value, where)
        elif number == 2 and wire == FIXED32 and isinstance(value, int):
            found = as_float(value)
        elif number == 3 and isinstance(value, int):
            found = signed(value)
        elif number == 5:
            found = _tensor(_part(value, where), where)[1]
    return {} if found is None else {name: found}


def _tensor(data: memoryview, where: str) -> tuple[str, Tensor]:
    """TensorProto: dims = 1, data_type = 2, typed values = 4, 5, 7, 10, 11, name = 8, raw_data = 9."""
    name, kind = "", 0
    shape: list[int] = []
    stored: dict[int, memoryview] = {}
    for number, _, value in fields(data, where):
        if number == 1:
            shape += map(signed, islice(_numbers(value, where), MAX_DIMS + 1))
        elif number == 2 and isinstance(value, int):
            kind = value
        elif number == 8:
            name = text(value, where)
        elif number in (4, 5, 7, 9, 10, 11):
            stored[number] = _part(value, where)
        elif number in (13, 14) and value:  # external_data; data_location, where 0 is the default: in this file
            raise InputError(where, f"tensor {name[:80]!r} lies in another file", "weights inside the ONNX file")
        if len(shape) > MAX_DIMS:
            break
    where = f"{where} (tensor {name[:80]!r})"
    if len(shape) > MAX_DIMS or not all(0 <= size < 1 << 63 for size in shape):
        raise InputError(where, f"sizes {shape[:MAX_DIMS]}", f"at most {MAX_DIMS} of 0 or more")
    if kind not in _KINDS:
        raise InputError(where, f"data type {kind}", f"one of {', '.join(map(str, _KINDS))}")
    dtype, field, code = _KINDS[kind]
    count = math.prod(shape)
    if field in stored and field in _VARINTS and 9 not in stored:
        content = _integers(stored[field], count, np.dtype(code), where)
    else:
        content = stored.get(9, stored.get(field, memoryview(b"")))
    if len(content) != count * dtype.itemsize:
        raise InputError(where, f"{len(content)} bytes", f"{count * dtype.itemsize} for {dtype} {shape}")
    tensor = view_tensor(content, dtype, tuple(shape))
    if dtype is torch.bool and count and int(tensor.view(torch.uint8).max()) > 1:
        raise InputError(where, "bytes other than 0 and 1", "booleans")
    return name, tensor


def _numbers(value: int | memoryview, where: str) -> Iterator[int]:
    """A repeated integer, packed or not."""
    return iter((value,)) if isinstance(value, int) else varints(value, where)


def _integers(packed: memoryview, count: int, kind: np.dtype[np.generic], where: str) -> memoryview:
    """`count` packed varints as the bytes of a numpy type that must hold each of them."""
    if count > len(packed):  # a varint takes one byte or more
        raise InputError(where, f"{len(packed)} bytes", f"{count} integers")
    wide = np.fromiter(varints(packed, where), np.uint64)
    if len(wide) != count:
        raise InputError(where, f"{len(wide)} integers", f"{count}")
    narrow = wide.astype(kind)
    if not (narrow.astype(np.int64).astype(np.uint64) == wide).all():
        raise InputError(where, "integers beyond the range of their type", f"values of {kind}")
    return memoryview(bytearray(narrow.tobytes()))
