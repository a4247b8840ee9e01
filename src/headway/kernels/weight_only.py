"""Products with weights in codes on a GPU: weights are unpacked in registers, inputs stay as they are.

One token needs every weight once, so a product takes as long as reading them does, and fewer bits are less to read. The
codes lie as the CPU's kernels have them (codes.py): sixteen rows side by side. A program takes sixteen rows and a share
of their columns, and writes a partial sum; the shares are added afterwards, in order, so that answers repeat. Of many
tokens the weights are unpacked once, into a matrix for the library's product.

Written in Triton, which torch brings along where it was built for CUDA. Its interpreter (TRITON_INTERPRET=1) runs the
same code on a CPU, where tests/kernels/test_weight_only.py holds it to the twin, `CodedMatrix.weights`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from headway.kernels.codes import ROWS, CodedMatrix

FEW = 8
"""Tokens up to which a program per token reads the weights again; more are worth a matrix."""
_TILE = 4  # chunks of a row at a time
_PROGRAMS = 1024  # enough to keep any GPU's memory busy


class Form(NamedTuple):
    """What a kernel is compiled for."""

    bits: int
    chunk: int
    per_group: int
    zero: int
    has_minima: bool

    @classmethod
    def of(cls, matrix: CodedMatrix) -> Form:
        """That of a matrix."""
        assert matrix.codes.shape[-2] == ROWS
        per_group = matrix.group // matrix.chunk
        return cls(matrix.bits, matrix.chunk, per_group, matrix.zero, matrix.minima is not None)

    @property
    def quads(self) -> int:
        """Fours of columns in a chunk, or with 4 bits in one half of it."""
        return self.chunk // 8 if self.bits == 4 else self.chunk // 4


@triton.jit
def _weights(W, block, chunk, live, HALF: tl.constexpr, FORM: tl.constexpr, QUADS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of sixteen rows in some chunks, (chunks, columns / 4, 16, 4): all columns, or with 4 bits one half of each."""
    codes, scales, minima, chunks, groups = W[0], W[1], W[2], W[5], W[6]
    quad = tl.arange(0, QUADS)[None, :, None, None]
    row = tl.arange(0, 16)[None, None, :, None]
    column = tl.arange(0, 4)[None, None, None, :]
    raw = tl.load(codes + ((block * chunks + chunk) * QUADS + quad) * 64 + row * 4 + column, mask=live, other=0)
    if FORM[0] == 4:
        if HALF == 0:
            raw = raw & 15
        else:
            raw = raw >> 4
    place = (block * groups + chunk // FORM[2]) * 16 + row
    scale = tl.load(scales + place, mask=live, other=0).to(tl.float32)
    if FORM[4]:
        return raw.to(tl.float32) * scale + tl.load(minima + place, mask=live, other=0).to(tl.float32)
    return (raw.to(tl.float32) - FORM[3]) * scale


@triton.jit
def _columns(chunk, HALF: tl.constexpr, FORM: tl.constexpr, QUADS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which columns those are, (chunks, columns / 4, 1, 4)."""
    quad = tl.arange(0, QUADS)[None, :, None, None]
    return chunk * FORM[1] + HALF * (FORM[1] // 2) + quad * 4 + tl.arange(0, 4)[None, None, None, :]


@triton.jit
def _product(x, W, out, share, FORM: tl.constexpr, QUADS: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of token program_id(2), sixteen rows, a share of the columns: out (shares, T, R) float32."""
    R, C, chunks = W[3], W[4], W[5]
    block, part, token = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sums = tl.zeros((TILE, QUADS, 16, 4), tl.float32)
    begin, end = part * share, min(part * share + share, chunks)
    for first in range(begin, end, TILE):
        chunk = first + tl.arange(0, TILE)[:, None, None, None]
        live = chunk < end
        for half in tl.static_range(2 if FORM[0] == 4 else 1):
            w = _weights(W, block, chunk, live, half, FORM, QUADS)
            column = _columns(chunk, half, FORM, QUADS)
            sums += w * tl.load(x + token * C + column, mask=live & (column < C), other=0).to(tl.float32)
    found = tl.sum(tl.sum(tl.sum(sums, 3), 1), 0)
    row = block * 16 + tl.arange(0, 16)
    tl.store(out + (part * tl.num_programs(2) + token) * R + row, found, mask=row < R)


@triton.jit
def _unpack(W, out, FORM: tl.constexpr, QUADS: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """W of sixteen rows in some chunks -> out (R, C)."""
    R, C, chunks = W[3], W[4], W[5]
    block = tl.program_id(0)
    chunk = tl.program_id(1) * TILE + tl.arange(0, TILE)[:, None, None, None]
    row = block * 16 + tl.arange(0, 16)[None, None, :, None]
    for half in tl.static_range(2 if FORM[0] == 4 else 1):
        w = _weights(W, block, chunk, chunk < chunks, half, FORM, QUADS)
        column = _columns(chunk, half, FORM, QUADS)
        tl.store(out + row.to(tl.int64) * C + column, w.to(out.dtype.element_ty), mask=(row < R) & (column < C))


def linear(x: Tensor, matrix: CodedMatrix, bias: Tensor | None = None) -> Tensor:
    """x W^T + b with W in codes, (..., C) -> (..., R) in the dtype of x, summed in float32."""
    R, C = matrix.shape
    x_TC = x.reshape(-1, C).contiguous()
    if len(x_TC) > FEW:
        return F.linear(x, unpack(matrix, x.dtype), bias)
    blocks, chunks = matrix.codes.shape[:2]
    shares = max(min(_PROGRAMS // (blocks * max(len(x_TC), 1)), chunks // _TILE), 1)
    share = -(-chunks // shares)
    shares = -(-chunks // share)
    sums, form = x.new_empty(shares, len(x_TC), R, dtype=torch.float32), Form.of(matrix)
    if sums.numel():
        _product[(blocks, shares, len(x_TC))](x_TC, _fields(matrix), sums, share, form, form.quads, _TILE)
    out = sums.sum(0) if bias is None else sums.sum(0) + bias.float()
    return out.to(x.dtype).view(*x.shape[:-1], R)


def unpack(matrix: CodedMatrix, dtype: torch.dtype) -> Tensor:
    """W, (R, C)."""
    out, form = torch.empty(matrix.shape, dtype=dtype, device=matrix.codes.device), Form.of(matrix)
    blocks, chunks = matrix.codes.shape[:2]
    _unpack[(blocks, -(-chunks // _TILE))](_fields(matrix), out, form, form.quads, _TILE)
    return out


def _fields(matrix: CodedMatrix) -> tuple[Tensor, Tensor, Tensor, int, int, int, int]:
    """W as the kernels have it: codes, scales, minima, rows, columns, chunks and groups of a row."""
    minima = matrix.scales if matrix.minima is None else matrix.minima
    return matrix.codes, matrix.scales, minima, *matrix.shape, matrix.codes.shape[1], matrix.scales.shape[1]
