"""Weights in codes of a few bits, laid out as the native kernels read them, and what a product with them is.

A matrix W (R, C) is stored as small unsigned integers with a scale per row and group of columns:

    W = scale * (code - zero)            symmetric: Q8_0, Q4_0, INT8, INT4
    W = scale * code + minimum           asymmetric: Q4_1, Q4_K

Inputs are put in codes as well, while the model runs: per row and chunk of 16 or 32 columns, x = step * q with q from
-127 to 127 and step = max |x| / 127. A product is then a sum of integer products, which are exact, times the two scales
per chunk. With two planes an input keeps 15 bits, x = step * (q + r / 128): its rounding no longer shows in the result.

`product` is the definition of what the native kernel computes (cpu/kernels.h): codes and their sums are equal to the
last bit, the result within float32 rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from headway.kernels import pages
from headway.kernels.ggml import BLOCKS, PAIRED, WRITABLE, pack_codes, pairs, unpack_blocks

ROWS = 16  # of W, side by side
UNROLLED = 1 << 22  # weights at a time while packing
ROUNDED = 127
FINE = 128  # the second plane's step is so much smaller
TINY = 1e-34  # a chunk without larger numbers is zero: the inverse of its step would overflow


class CodedMatrix(NamedTuple):
    """W (R, C) in codes.

    Attributes:
        codes: uint8 (R/16, C/chunk, chunk/4, 16, 4), or with 4 bits half as many, of which the low halves are the first
            half of the chunk. What is missing to whole blocks and chunks is zero.
        scales, minima: float32 or float16 (R/16, C/group, 16); minima None where W is symmetric about `zero`.
        shape: (R, C). bits: 4, 7 (codes below 128) or 8. chunk: columns that an input has one step for.
        group: columns that a row has one scale for, a multiple of chunk.
    """

    codes: Tensor
    scales: Tensor
    minima: Tensor | None
    shape: tuple[int, int]
    bits: int
    chunk: int
    group: int
    zero: int

    @property
    def bytes(self) -> int:
        """Memory of codes, scales and minima."""
        tensors = [self.codes, self.scales, *([] if self.minima is None else [self.minima])]
        return sum(t.numel() * t.element_size() for t in tensors)

    def settled(self) -> CodedMatrix:
        """The same in memory that is read fast from end to end."""
        minima = None if self.minima is None else pages.settled(self.minima)
        return self._replace(codes=pages.settled(self.codes), scales=pages.settled(self.scales), minima=minima)

    def plain(self) -> Codes:
        """The codes row by row, as they were before `lay_out`."""
        R, C = self.shape
        halves = torch.stack((self.codes & 15, self.codes >> 4), 2) if self.bits == 4 else self.codes[:, :, None]
        rows = halves.permute(0, 4, 1, 2, 3, 5).flatten(2).flatten(0, 1)[:R, :C]
        numbers = (None if t is None else t.transpose(1, 2).flatten(0, 1)[:R] for t in (self.scales, self.minima))
        scales, minima = numbers
        assert scales is not None
        return Codes(rows, scales, minima, self.zero)

    def weights(self) -> Tensor:
        """W in float32, (R, C)."""
        return self.plain().weights(self.group)

    def rows(self, numbers: Tensor) -> Tensor:
        """Rows of W in float32, (n) -> (n, C). Raises IndexError for a row that is not there."""
        if numbers.is_cpu:  # a look at a GPU's numbers would wait for it
            check_rows(numbers.tolist(), self.shape[0])
        block, lane = numbers // ROWS, numbers % ROWS
        codes = self.codes.permute(0, 3, 1, 2, 4)[block, lane]
        halves = torch.stack((codes & 15, codes >> 4), 2) if self.bits == 4 else codes
        low = None if self.minima is None else self.minima[block, :, lane]
        plain = Codes(halves.flatten(1)[:, : self.shape[1]], self.scales[block, :, lane], low, self.zero)
        return plain.weights(self.group)


def check_rows(numbers: Sequence[int], count: int) -> None:
    """Raise IndexError unless every number is one of a row."""
    if numbers and not 0 <= min(numbers) <= max(numbers) < count:
        raise IndexError(f"rows {min(numbers)} to {max(numbers)} of {count}")


class Codes(NamedTuple):
    """Codes (R, C) uint8 row by row, with scales and minima (R, C/group)."""

    codes: Tensor
    scales: Tensor
    minima: Tensor | None
    zero: int

    def weights(self, group: int) -> Tensor:
        """W in float32, (R, C)."""
        C = self.codes.shape[1]
        scales = self.scales.float().repeat_interleave(group, 1)[:, :C]
        if self.minima is None:
            return (self.codes.float() - self.zero) * scales
        return self.codes.float() * scales + self.minima.float().repeat_interleave(group, 1)[:, :C]


def lay_out(plain: Codes, bits: int, chunk: int, group: int) -> CodedMatrix:
    """Codes row by row -> sixteen rows side by side."""
    R, C = plain.codes.shape
    rows = F.pad(plain.codes, (0, -C % chunk)).view(R, -(-C // chunk), chunk)
    if bits == 4:
        first, second = rows.chunk(2, 2)
        rows = first | second << 4
    return _beside(rows, plain, (R, C), bits, chunk, group)


def _beside(rows: Tensor, plain: Codes, shape: tuple[int, int], bits: int, chunk: int, group: int) -> CodedMatrix:
    """Sixteen rows side by side, of bytes (R, C/chunk, bytes of a chunk) and the numbers of `plain`."""
    R, C = shape
    rows = F.pad(rows, (0, 0, 0, 0, 0, -R % ROWS)).view(-(-R // ROWS), ROWS, -(-C // chunk), -1, 4)
    codes = rows.permute(0, 2, 3, 1, 4).contiguous()

    def beside(numbers: Tensor | None) -> Tensor | None:
        if numbers is None:
            return None
        return F.pad(numbers, (0, 0, 0, -R % ROWS)).view(-(-R // ROWS), ROWS, -1).transpose(1, 2).contiguous()

    scales = beside(plain.scales)
    assert scales is not None
    return CodedMatrix(codes, scales, beside(plain.minima), (R, C), bits, chunk, group, plain.zero)


class _Form(NamedTuple):
    """How a ggml format stands in codes: bits, zero (None: it has minima), group, whether float16 holds its scales."""

    bits: int
    zero: int | None
    group: int
    half: bool


_FORMS = {
    "Q4_0": _Form(4, 8, 32, half=True),
    "Q4_1": _Form(4, None, 32, half=True),
    "Q5_0": _Form(7, 16, 32, half=True),
    "Q5_1": _Form(7, None, 32, half=True),
    "Q8_0": _Form(8, 128, 32, half=True),
    "Q4_K": _Form(4, None, 32, half=False),
    "Q5_K": _Form(7, None, 32, half=False),
    "Q6_K": _Form(7, 32, 16, half=False),
}
CODED = tuple(_FORMS)
"""The ggml formats that run in codes."""


def from_blocks(kind: str, raw: Tensor) -> CodedMatrix:
    """A matrix in ggml's blocks as codes: the same weights to the last bit.

    Args:
        kind: a name of CODED. raw: uint8 (R, row_bytes).
    """
    form, R = _FORMS[kind], len(raw)
    C = raw.shape[1] // BLOCKS[kind].bytes * BLOCKS[kind].size
    dtype = torch.float16 if form.half else torch.float32
    step = max(UNROLLED // C // ROWS, 1) * ROWS
    out: CodedMatrix | None = None
    for start in range(0, R, step):
        some = raw[start : start + step]
        # Their halves of bytes are those of our chunks: nothing has to be taken apart.
        found = pairs(kind, some) if kind in PAIRED else unpack_blocks(kind, some)
        scales = found.scale.reshape(len(some), -1).to(dtype)
        minima = None if found.minimum is None else found.minimum.reshape(len(some), -1).to(dtype)
        plain = Codes(found.codes, scales, minima, form.zero or 0)
        if kind in PAIRED:
            rows = found.codes.view(len(some), C // form.group, -1)
            part = _beside(rows, plain, (len(some), C), form.bits, form.group, form.group)
        else:
            codes = found.codes.reshape(-1, C)
            if form.zero is not None:
                codes = codes.view(torch.uint8) + form.zero  # signed ones, in the arithmetic of bytes
            part = lay_out(plain._replace(codes=codes), form.bits, min(form.group, 32), form.group)
        out = _room(part, R) if out is None else out
        for whole, piece in ((out.codes, part.codes), (out.scales, part.scales), (out.minima, part.minima)):
            if whole is not None and piece is not None:
                whole[start // ROWS : start // ROWS + len(piece)] = piece
    assert out is not None
    return out


def block_format(matrix: CodedMatrix) -> str | None:
    """The ggml format that holds these codes and scales as they are."""
    for kind in filter(WRITABLE.__contains__, CODED):
        form = _FORMS[kind]
        asked = (form.bits, form.zero or 0, form.zero is None, form.group, torch.float16)
        found = (matrix.bits, matrix.zero, matrix.minima is not None, matrix.group, matrix.scales.dtype)
        if asked == found and matrix.shape[1] % form.group == 0:
            return kind
    return None


def to_blocks(matrix: CodedMatrix) -> Tensor:
    """The rows of a matrix in its `block_format`, uint8 (R, row_bytes)."""
    kind, plain = block_format(matrix), matrix.plain()
    assert kind is not None
    return pack_codes(kind, plain.codes, plain.scales, plain.minima)


def _room(part: CodedMatrix, rows: int) -> CodedMatrix:
    """Memory for `rows` rows in the form of `part`."""

    def more(like: Tensor | None) -> Tensor | None:
        return None if like is None else pages.empty((-(-rows // ROWS), *like.shape[1:]), like)

    codes, scales = more(part.codes), more(part.scales)
    assert codes is not None and scales is not None
    return part._replace(codes=codes, scales=scales, minima=more(part.minima), shape=(rows, part.shape[1]))


# --- inputs ------------------------------------------------------------------------------------------------------


class CodedRows(NamedTuple):
    """Inputs (T, C) in codes: int8 (T, planes, C), steps (T, planes, C/chunk) and sums of codes int32 per chunk.

    Columns are padded with zeros to whole chunks.
    """

    codes: Tensor
    steps: Tensor
    sums: Tensor


def code_rows(x_TC: Tensor, chunk: int, planes: int) -> CodedRows:
    """Inputs in codes, halves rounded to even. A chunk with NaN or infinity has a step of NaN."""
    x = F.pad(x_TC.float(), (0, -x_TC.shape[1] % chunk)).view(len(x_TC), -(-x_TC.shape[1] // chunk), chunk)
    top = x.abs().amax(-1)
    finite = x.isfinite().all(-1)
    # A tensor, since torch divides a number by a tensor through its inverse, which rounds twice.
    inverse = torch.where((top > TINY) & finite, torch.tensor(float(ROUNDED), device=x.device) / top, 0.0)
    steps = torch.where(finite, torch.where(inverse > 0, top / ROUNDED, 0.0), torch.nan)
    scaled = torch.where(finite[..., None], x, 0.0) * (inverse * (FINE if planes == 2 else 1))[..., None]
    codes = scaled.round().int()
    if planes == 2:
        high = codes + FINE // 2 >> 7
        both, fine = torch.stack((high, codes - high * FINE), 1), torch.stack((steps, steps / FINE), 1)
    else:
        both, fine = codes[:, None], steps[:, None]
    return CodedRows(both.flatten(2).to(torch.int8), fine, both.sum(-1, dtype=torch.int32))


def product(x_TC: Tensor, matrix: CodedMatrix, planes: int = 1) -> Tensor:
    """x W^T with x in codes, (T, R) float32: the twin of the native kernel, in integers and float64."""
    rows = code_rows(x_TC, matrix.chunk, planes)
    R, C = matrix.shape
    T, chunks = len(x_TC), rows.steps.shape[2]
    plain = matrix.plain()
    codes = F.pad(plain.codes, (0, chunks * matrix.chunk - C)).view(R, chunks, matrix.chunk)
    inputs = rows.codes.view(T * planes, chunks, matrix.chunk)
    # Integers below 2^53 are exact in float64, which has a fast matrix product.
    dots = torch.einsum("tck,rck->trc", inputs.double(), codes.double()) - plain.zero * rows.sums.view(
        T * planes, 1, -1
    )
    per_group = matrix.group // matrix.chunk
    steps = rows.steps.view(T * planes, 1, chunks).double()
    out = dots * steps * plain.scales.double().repeat_interleave(per_group, 1)[None, :, :chunks]
    if plain.minima is not None:
        sums = rows.sums.view(T * planes, 1, chunks) * steps
        out += sums * plain.minima.double().repeat_interleave(per_group, 1)[None, :, :chunks]
    return out.sum(-1).view(T, planes, R).sum(1).float()
