"""The block formats of ggml: how a row of weights is packed into bytes, and back.

A row is a run of blocks; a block holds `size` weights in `bytes` bytes: one or two scales, then codes of a few bits.
Layouts are those of ggml (github.com/ggml-org/ggml, src/ggml-common.h, and dequantize_row_* in src/ggml-quants.c);
values are bit-equal to those of the `gguf` package. Everything is torch on chunks of blocks: all threads work,
and temporaries stay within 64 MB.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from headway.errors import BugError, ConfigError, InputError


class Block(NamedTuple):
    """A format: its name, the id that GGUF files use, weights per block, bytes per block."""

    name: str
    id: int
    size: int
    bytes: int


BLOCKS = {
    block.name: block
    for block in (
        Block("F32", 0, 1, 4),
        Block("F16", 1, 1, 2),
        Block("Q4_0", 2, 32, 18),
        Block("Q4_1", 3, 32, 20),
        Block("Q5_0", 6, 32, 22),
        Block("Q5_1", 7, 32, 24),
        Block("Q8_0", 8, 32, 34),
        Block("Q4_K", 12, 256, 144),
        Block("Q5_K", 13, 256, 176),
        Block("Q6_K", 14, 256, 210),
        Block("BF16", 30, 1, 2),
    )
}
"""The formats that Headway reads, by name."""

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The formats without scales and the dtypes they are."""

CHUNK = 1 << 20  # weights at a time: small enough for the cache, large enough that starting an operation is nothing
_OCTETS = (torch.arange(256)[:, None] >> torch.arange(8) & 1).mul(16).to(torch.uint8).view(torch.int64).squeeze(1)
"""For each byte its eight bits, lowest first, as eight bytes of 0 or 16: the fifth bits of eight codes at once."""


class Unpacked(NamedTuple):
    """n blocks unpacked: weight = scale * code + minimum, one scale to each of g equal groups of a block."""

    codes: Tensor  # (n, size), int8 or uint8
    scale: Tensor  # (n, g), float32
    minimum: Tensor | None  # (n, g), float32


def _half(blocks: Tensor, index: int) -> Tensor:
    """The 16-bit float at byte 2 * index of each block, as (n, 1) float32."""
    return blocks.view(torch.float16)[:, index : index + 1].float()


def _nibbles(blocks: Tensor, start: int, end: int, runs: int = 1) -> Tensor:
    """Bytes start to end of each block, in `runs` runs; the low halves of a run, then its high halves: (n, codes)."""
    n, size = len(blocks), (end - start) // runs
    codes = blocks.new_empty(n, runs, 2, size)
    # Whole blocks are masked, not only their codes: a contiguous pass is several times as fast.
    codes[:, :, 0] = (blocks & 15)[:, start:end].view(n, runs, size)
    codes[:, :, 1] = (blocks >> 4)[:, start:end].view(n, runs, size)
    return codes.flatten(1)


def _fifth_bits(blocks: Tensor, start: int) -> Tensor:
    """Bit i of the 32-bit word at `start`, as 16 for code i: (n, 32)."""
    octets = blocks[:, start : start + 4].int().flatten()
    return _OCTETS.to(blocks.device).index_select(0, octets).view(torch.uint8).view(-1, 32)


def _high_bits(blocks: Tensor, start: int, end: int, runs: int, bits: int) -> Tensor:
    """Bytes start to end, in `runs` runs; the lowest `bits` of each byte of a run, then the next, times 16."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=blocks.device)[:, None]
    spread = blocks[:, start:end].view(len(blocks), runs, 1, -1) >> shifts
    return spread.bitwise_and_((1 << bits) - 1).bitwise_left_shift_(4).flatten(1)


def _shifted(codes: Tensor, zero: int) -> Tensor:
    return codes.view(torch.int8).sub_(zero)


def _q4_0(blocks: Tensor) -> Unpacked:
    return Unpacked(_shifted(_nibbles(blocks, 2, 18), 8), _half(blocks, 0), None)


def _q4_1(blocks: Tensor) -> Unpacked:
    return Unpacked(_nibbles(blocks, 4, 20), _half(blocks, 0), _half(blocks, 1))


def _q5_0(blocks: Tensor) -> Unpacked:
    return Unpacked(_shifted(_nibbles(blocks, 6, 22) | _fifth_bits(blocks, 2), 16), _half(blocks, 0), None)


def _q5_1(blocks: Tensor) -> Unpacked:
    return Unpacked(_nibbles(blocks, 8, 24) | _fifth_bits(blocks, 4), _half(blocks, 0), _half(blocks, 1))


def _q8_0(blocks: Tensor) -> Unpacked:
    return Unpacked(blocks.view(torch.int8)[:, 2:], _half(blocks, 0), None)


def _k_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and negated minima of Q4_K and Q5_K, (n, 8) each, from 6 bits; the last four of each lie in two parts."""
    scale, minimum, rest = blocks[:, 4:16].chunk(3, 1)
    scales = torch.cat([scale & 63, (rest & 15) | ((scale >> 2) & 48)], 1)
    minima = torch.cat([minimum & 63, (rest >> 4) | ((minimum >> 2) & 48)], 1)
    return _half(blocks, 0) * scales, -(_half(blocks, 1) * minima)


def _q4_k(blocks: Tensor) -> Unpacked:
    return Unpacked(_nibbles(blocks, 16, 144, 4), *_k_scales(blocks))


def _q5_k(blocks: Tensor) -> Unpacked:
    return Unpacked(_nibbles(blocks, 48, 176, 4) | _high_bits(blocks, 16, 48, 1, 1), *_k_scales(blocks))


def _q6_k(blocks: Tensor) -> Unpacked:
    codes = _nibbles(blocks, 0, 128, 2) | _high_bits(blocks, 128, 192, 2, 2)
    return Unpacked(_shifted(codes, 32), _half(blocks, 104) * blocks.view(torch.int8)[:, 192:208], None)


_UNPACK: dict[str, Callable[[Tensor], Unpacked]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}


def unpack_blocks(kind: str, raw: Tensor) -> Unpacked:
    """Codes and scales of packed rows, uint8 (..., row_bytes), of a format that has them, block after block."""
    return _UNPACK[kind](raw.reshape(-1, BLOCKS[kind].bytes))


PAIRED = {"Q4_0": 2, "Q4_1": 4}
"""Formats whose code i and code i + 16 share a byte, unsigned, and where the 16 bytes of a block begin."""


def pairs(kind: str, raw: Tensor) -> Unpacked:
    """As `unpack_blocks` of a PAIRED format, with two codes a byte as they are in the file."""
    blocks, start = raw.reshape(-1, BLOCKS[kind].bytes), PAIRED[kind]
    return Unpacked(blocks[:, start:].contiguous(), _half(blocks, 0), _half(blocks, 1) if start == 4 else None)


def dequantize(kind: str, raw: Tensor, out: Tensor | None = None) -> Tensor:
    """Packed rows as float32.

    Args:
        kind: a name of BLOCKS.
        raw: uint8 (..., row_bytes).
        out: contiguous float32 (..., columns) to write into.

    Returns: float32 (..., columns): `out`, or for F32 without `out` a view of `raw`. NaN and infinity in the file
    come through. Raises BugError for an unknown kind and for shapes that do not fit it.
    """
    block = BLOCKS.get(kind)
    if block is None or raw.dtype is not torch.uint8 or not raw.ndim or raw.shape[-1] % block.bytes:
        raise BugError("dequantize", f"{raw.dtype} {tuple(raw.shape)} as {kind}", "uint8 rows of whole blocks")
    shape = (*raw.shape[:-1], raw.shape[-1] // block.bytes * block.size)
    if out is not None and (out.dtype is not torch.float32 or out.shape != shape or not out.is_contiguous()):
        raise BugError("dequantize", f"out is {out.dtype} {tuple(out.shape)}", f"contiguous float32 {shape}")
    raw = raw.contiguous()
    if raw.data_ptr() % 4:  # a view into the middle of something: torch reads floats only at whole addresses
        raw = raw.clone()
    if kind in FLOATS:
        values = raw.view(FLOATS[kind])
        return values.float() if out is None else out.copy_(values)
    out = torch.empty(shape, device=raw.device) if out is None else out
    blocks, weights, step = raw.view(-1, block.bytes), out.view(-1, block.size), CHUNK // block.size
    for start in range(0, len(blocks), step):
        codes, scale, minimum = _UNPACK[kind](blocks[start : start + step])
        part = weights[start : start + step].copy_(codes)
        groups = part.view(*scale.shape, -1).mul_(scale[..., None])
        if minimum is not None:
            groups.add_(minimum[..., None])
    return out


# --- packing -----------------------------------------------------------------------------------------------------


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale; 0 for a group of zeros, and for one whose scale is so small that its inverse overflows."""
    inverse = 1 / scale
    return torch.where(inverse.isfinite(), inverse, 0)


def _paired(codes: Tensor) -> Tensor:
    """Codes 0 to 15 (n, 32), limited to 15, as bytes (n, 16): the inverse of _nibbles."""
    low, high = codes.to(torch.uint8).clamp_(max=15).chunk(2, 1)
    return low | high << 4


def _pack_q8_0(weights: Tensor) -> tuple[Tensor, Tensor]:
    scale = weights.abs().amax(1, keepdim=True) / 127
    codes = weights * _inverse(scale)
    size = codes.abs()
    whole = size.floor()
    rounded = whole + (2 * (size - whole)).floor()  # halves away from zero, as C's roundf
    return scale.half(), (codes.sign() * rounded).to(torch.int8).view(torch.uint8)


def _pack_q4_0(weights: Tensor) -> tuple[Tensor, Tensor]:
    scale = weights.gather(1, weights.abs().argmax(1, keepdim=True)) / -8
    return scale.half(), _paired(weights * _inverse(scale) + 8.5)


def _pack_q4_1(weights: Tensor) -> tuple[Tensor, Tensor]:
    minimum = weights.amin(1, keepdim=True)
    scale = (weights.amax(1, keepdim=True) - minimum) / 15
    codes = (weights - minimum) * _inverse(scale) + 0.5
    return torch.cat([scale, minimum], 1).half(), _paired(codes)


_PACK = {"Q4_0": _pack_q4_0, "Q4_1": _pack_q4_1, "Q8_0": _pack_q8_0}
WRITABLE = (*FLOATS, *_PACK)
"""The formats that `quantize` writes."""


def pack_codes(kind: str, codes: Tensor, scales: Tensor, minima: Tensor | None) -> Tensor:
    """Rows of blocks with these very codes and scales, (R, C), (R, C/32) -> uint8 (R, row_bytes).

    Args:
        kind: Q4_0, Q4_1 or Q8_0. codes: uint8, zero at 8 in Q4_0 and at 128 in Q8_0. scales, minima: float16.
    """
    flat = codes.reshape(-1, BLOCKS[kind].size)
    held = flat ^ 128 if kind == "Q8_0" else _paired(flat)
    numbers = torch.stack([some.flatten() for some in (scales, minima) if some is not None], 1).view(torch.uint8)
    return torch.cat([numbers, held], 1).view(len(codes), -1)


def _refusal(where: str, kind: str, weights: Tensor) -> InputError:
    """Why a tensor has no finite image in `kind`: its NaN and infinities, or else its largest weight."""
    bad = weights.numel() - int(weights.isfinite().sum())
    if bad:
        return InputError(where, f"{bad} of {weights.numel()} weights are NaN or infinite", "finite weights")
    found = f"a weight of {float(weights.abs().max()):.4g} is beyond what {kind} can hold"
    return InputError(where, found, "smaller weights", "write this tensor as F32")


def quantize(kind: str, weights: Tensor, where: str = "weights") -> Tensor:
    """Weights packed into rows of blocks; the bytes are those of the `gguf` package.

    Args:
        kind: a name of WRITABLE.
        weights: float (..., columns); `columns` a multiple of the block's size.
        where: the tensor's name, for messages.

    Returns: uint8 (..., row_bytes). A group of zeros, or of weights too small for a 16-bit scale, becomes zeros.
    Raises ConfigError for a kind that is not written or does not divide the rows (Q10); InputError for NaN, infinity,
    and weights too large for the format or for a group's 16-bit scale (Q9): what is written is always finite.
    """
    if kind not in WRITABLE:
        raise ConfigError(where, f"cannot be written as {kind!r}", f"one of {', '.join(WRITABLE)}")
    block = BLOCKS[kind]
    if not weights.ndim or weights.shape[-1] % block.size:
        raise ConfigError(where, f"shape {tuple(weights.shape)}", f"rows of a multiple of {block.size} for {kind}")
    shape = (*weights.shape[:-1], weights.shape[-1] // block.size * block.bytes)
    packed = torch.empty(shape, dtype=torch.uint8, device=weights.device)
    source, target, step = weights.reshape(-1, block.size), packed.view(-1, block.bytes), CHUNK // block.size
    for start in range(0, len(source), step):
        chunk = source[start : start + step].float()
        head, codes = _PACK[kind](chunk) if kind in _PACK else (chunk.to(FLOATS[kind]), None)
        if not head.isfinite().all():
            raise _refusal(where, kind, weights)
        head = head.view(torch.uint8)
        target[start : start + step] = head if codes is None else torch.cat([head, codes], 1)
    return packed
