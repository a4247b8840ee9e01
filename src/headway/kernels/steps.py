"""Native steps from Python: mirrors of cpu/steps.h, and the products that the rest of the library calls."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float as f32
from ctypes import c_int64 as i64
from ctypes import c_void_p as pointer

import torch
from torch import Tensor
from torch.nn import functional as F

from headway.kernels import built
from headway.kernels.codes import ROWS, CodedMatrix, check_rows, product
from headway.kernels.native import library, usable


class Matrix(ctypes.Structure):
    """Weights in codes."""

    _fields_ = [(name, pointer) for name in ("codes", "scales", "minima", "bias")]
    _fields_ += [(name, i64) for name in ("rows", "columns", "bits", "chunk", "group", "zero", "half")]


class Coded(ctypes.Structure):
    """Room for rows in codes."""

    _fields_ = [(name, pointer) for name in ("codes", "scales", "sums")]
    _fields_ += [(name, i64) for name in ("columns", "chunk", "planes")]


class Norm(ctypes.Structure):
    """Normalise rows, and add them to a stream or put them in codes."""

    _fields_ = [(name, pointer) for name in ("source", "weight", "bias", "scale", "out")]
    _fields_ += [(name, i64) for name in ("columns", "source_stride", "out_stride", "normalization", "adds")]
    _fields_ += [("eps", f32), ("codes", Coded)]


class Linear(ctypes.Structure):
    """Multiply rows in codes by a matrix."""

    _fields_ = [("weight", Matrix), ("source", Coded), ("out", pointer), ("beside", pointer)]
    _fields_ += [(name, i64) for name in ("stride", "beside_stride", "adds", "activation", "gated")]


class Columns(ctypes.Structure):
    """Keys and values of a layer."""

    _fields_ = [(name, pointer) for name in ("keys", "values", "positions", "state", "starts")]
    _fields_ += [(name, pointer) for name in ("key_scales", "value_scales")]
    _fields_ += [
        (name, i64) for name in ("sequence_stride", "head_stride", "column_stride", "positions_stride", "kept")
    ]


class Heads(ctypes.Structure):
    """Normalise and turn queries and keys, store keys and values."""

    _fields_ = [(name, pointer) for name in ("qkv", "q_weight", "q_bias", "k_weight", "k_bias", "angles", "rows")]
    _fields_ += [(name, i64) for name in ("N", "K", "H", "pairs", "interleaved", "normalization")]
    _fields_ += [("eps", f32), ("columns", Columns)]


class Attend(ctypes.Structure):
    """Gather values by queries and keys."""

    _fields_ = [(name, pointer) for name in ("q", "rows", "out", "scratch", "bias")]
    _fields_ += [(name, i64) for name in ("N", "K", "H", "q_stride", "window", "causal", "room", "reach")]
    _fields_ += [("scale", f32), ("cap", f32), ("columns", Columns)]


class Gather(ctypes.Structure):
    """Rows of a table."""

    _fields_ = [("table", Matrix), *((name, pointer) for name in ("plain", "ids", "out"))]
    _fields_ += [("id_stride", i64), ("adds", i64), ("scale", f32)]


class _Step(ctypes.Structure):
    _fields_ = [("kind", i64), ("what", pointer)]


STRUCTS: tuple[type[ctypes.Structure], ...] = (Matrix, Coded, Norm, Linear, Columns, Heads, Attend, Gather)
_KINDS: dict[type[ctypes.Structure], int] = {Norm: 0, Linear: 1, Heads: 2, Attend: 3, Gather: 4}
ACTIVATIONS = ("none", "relu", "gelu", "gelu-tanh", "quick-gelu", "silu", "relu2")
"""In the order of their numbers there."""
KEPT = (torch.float32, torch.float16, torch.int8)
"""What keys and values are kept in, in the order of the numbers there."""
PLAIN, RMS, LAYER = range(3)
QUERIES = 4  # that Attend takes together: the scratch of a thread is so many times the columns there can be


def levels() -> list[str]:
    """The instruction sets that the native kernels can use here, from the least; none where they were not built."""
    lib = library()
    return [] if lib is None else built.levels(lib)


def use_level(name: str = "") -> bool:
    """Use one of `levels` from now on, by default HEADWAY_KERNELS or the best. Returns whether it is there."""
    lib = library()
    return lib is not None and bool(lib.hw_use_level((name or built.FORCED).encode()))


def linear(x: Tensor, matrix: CodedMatrix, bias: Tensor | None = None, planes: int = 1) -> Tensor:
    """x W^T + b with W in codes and x put in codes of `planes` bytes, (..., C) -> (..., R) float32.

    The native kernel where it can take x, else its twin `codes.product`.
    """
    R, C = matrix.shape
    x_TC = x.reshape(-1, C)
    if not usable(x_TC, *([] if bias is None else [bias])):
        out = product(x_TC, matrix, planes)
        out = out if bias is None else out + bias.float()
        return out.view(*x.shape[:-1], R)
    x_TC, T, buffers = x_TC.contiguous(), len(x_TC), Buffers()
    out, codes = torch.empty(T, R), buffers.codes(T, C, matrix.chunk, planes)
    norm = Norm(source=x_TC.data_ptr(), columns=C, source_stride=C, codes=codes)
    weight = described(matrix, None if bias is None else buffers.padded(bias))
    Program([norm, Linear(weight, codes, out.data_ptr(), stride=R)]).run(T)
    return out.view(*x.shape[:-1], R)


def rows(matrix: CodedMatrix, ids: Tensor) -> Tensor:
    """Rows of a matrix in codes, (n) int64 -> (n, C) float32; its twin is `CodedMatrix.rows`.

    Raises IndexError for a row that is not there.
    """
    if not usable() or ids.device.type != "cpu" or ids.dtype != torch.long:
        return matrix.rows(ids)
    check_rows(ids.tolist(), matrix.shape[0])
    ids, out = ids.contiguous(), torch.empty(len(ids), matrix.shape[1])
    Program([Gather(described(matrix, None), None, ids.data_ptr(), out.data_ptr(), 1, 0, 1.0)]).run(len(ids))
    return out


def unpacked(matrix: CodedMatrix) -> Tensor:
    """W in float32, (R, C), to the last bit as its twin `CodedMatrix.weights` has it."""
    if not usable() or not matrix.codes.is_cpu:
        return matrix.weights()
    return rows(matrix, torch.arange(matrix.shape[0]))


class Buffers:
    """Memory that steps point to, kept as long as this is."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []

    def keep(self, tensor: Tensor | None) -> int | None:
        """The address of a tensor; None for none."""
        if tensor is None:
            return None
        self._kept.append(tensor)
        return tensor.data_ptr()

    def floats(self, *shape: int) -> Tensor:
        """New floats that nobody has written to."""
        self._kept.append(torch.empty(shape))
        return self._kept[-1]

    def codes(self, rows: int, columns: int, chunk: int, planes: int) -> Coded:
        """Room for rows in codes."""
        count = rows * planes * -(-columns // chunk)
        tensors = (
            torch.empty(count * chunk, dtype=torch.int8),
            torch.empty(count),
            torch.empty(count, dtype=torch.int32),
        )
        return Coded(*map(self.keep, tensors), columns, chunk, planes)

    def padded(self, bias: Tensor) -> int | None:
        """The address of a bias with room for whole blocks of rows."""
        return self.keep(F.pad(bias.detach(), (0, -len(bias) % ROWS)))


def described(matrix: CodedMatrix, bias: int | None) -> Matrix:
    """A matrix as the kernels see it; the caller keeps its tensors."""
    tensors = (matrix.codes, matrix.scales, matrix.minima)
    half = matrix.scales.dtype == torch.float16
    numbers = (*matrix.shape, matrix.bits, matrix.chunk, matrix.group, matrix.zero, half)
    return Matrix(*(None if t is None else t.data_ptr() for t in tensors), bias, *numbers)


class Program:
    """Steps in their order. What they point to must live as long as this is run."""

    def __init__(self, steps: Sequence[ctypes.Structure]) -> None:
        self._steps = list(steps)  # the list below holds only their addresses
        self._listed = (_Step * len(steps))(*(_Step(_KINDS[type(step)], ctypes.addressof(step)) for step in steps))
        self._counters = (i64 * len(steps))()

    def run(self, rows: int, begin: int = 0, end: int | None = None) -> None:
        """Take the steps from `begin` to `end`, or all, over `rows` rows, on torch's number of threads."""
        lib = library()
        assert lib is not None
        count = (len(self._steps) if end is None else end) - begin
        first, threads = ctypes.byref(self._listed, begin * ctypes.sizeof(_Step)), ctypes.c_int(torch.get_num_threads())
        lib.hw_run(first, i64(count), i64(rows), threads, self._counters)
