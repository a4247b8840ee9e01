"""ggml's block formats, bit for bit those of the gguf package; what cannot be packed is refused, never written."""

from __future__ import annotations

import resource
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from fault_injection import in_child
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from headway.errors import BugError, ConfigError, InputError
from headway.kernels import ggml
from headway.kernels.ggml import BLOCKS, WRITABLE, dequantize, quantize

PACKED = [kind for kind in BLOCKS if kind not in ggml.FLOATS]


def library_type(kind: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType(BLOCKS[kind].id)


def library_dequantize(kind: str, raw: Tensor) -> Tensor:
    with np.errstate(invalid="ignore"):
        return torch.from_numpy(gguf.quants.dequantize(raw.numpy(), library_type(kind)).copy())


def library_quantize(kind: str, weights: Tensor) -> Tensor:
    with np.errstate(over="ignore", invalid="ignore"):
        packed = gguf.quants.quantize(weights.numpy(), library_type(kind))
    return torch.from_numpy(packed.view(np.uint8).copy())


def random_bytes(kind: str, *shape: int) -> Tensor:
    """Rows of any bytes, so of any scale: NaN, infinite and subnormal ones too."""
    return torch.randint(0, 256, (*shape[:-1], shape[-1] * BLOCKS[kind].bytes), dtype=torch.uint8)


def same(left: Tensor, right: Tensor) -> bool:
    """The same bits; any NaN equals any other, for its bits depend on the processor."""
    nan = left.isnan()
    values = left.shape == right.shape and torch.equal(nan, right.isnan())
    return values and torch.equal(left[~nan].view(torch.int32), right[~nan].view(torch.int32))


def test_names_ids_and_sizes_are_those_of_ggml() -> None:
    assert set(BLOCKS) == {"F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"}
    for name, block in BLOCKS.items():
        assert name == block.name == library_type(name).name
        assert gguf.GGML_QUANT_SIZES[library_type(name)] == (block.size, block.bytes)


@pytest.mark.parametrize("kind", BLOCKS)
def test_dequantize_is_bit_equal(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = random_bytes(kind, 37, 5 if kind in PACKED else 96)
    truth = library_dequantize(kind, raw)
    assert truth.isfinite().any() and truth.isnan().any()
    for chunk in (ggml.CHUNK, 1024):  # in one piece and in many, the last one shorter
        monkeypatch.setattr(ggml, "CHUNK", chunk)
        assert same(dequantize(kind, raw), truth)
        out = torch.full(truth.shape, 7.0)
        assert dequantize(kind, raw, out) is out and same(out, truth)


@pytest.mark.parametrize("kind", BLOCKS)
def test_dequantize_takes_any_shape_and_place(kind: str) -> None:
    raw = random_bytes(kind, 2, 3, 4)
    truth = library_dequantize(kind, raw)
    assert truth.shape == (2, 3, 4 * BLOCKS[kind].size)
    assert same(dequantize(kind, raw), truth)
    assert same(dequantize(kind, raw[0, 0]), truth[0, 0])
    assert same(dequantize(kind, raw.transpose(0, 1)), truth.transpose(0, 1))
    assert dequantize(kind, raw[:0]).shape == (0, *truth.shape[1:])
    buffer = torch.empty(raw.numel() + 3, dtype=torch.uint8)
    for offset in (1, 2, 3):
        buffer[offset : offset + raw.numel()] = raw.view(-1)
        assert same(dequantize(kind, buffer[offset : offset + raw.numel()].view(raw.shape)), truth)


def test_dequantize_refuses_what_does_not_fit() -> None:
    raw = random_bytes("Q4_1", 2, 2)
    wrong = [
        ("Q2_K", raw, None),
        ("Q4_1", raw[:, :-1], None),
        ("Q4_1", raw.view(torch.int8), None),
        ("F32", torch.zeros((), dtype=torch.uint8), None),
        ("Q4_1", raw, torch.empty(2, 63)),
        ("Q4_1", raw, torch.empty(2, 64, dtype=torch.float64)),
        ("Q4_1", raw, torch.empty(64, 2).T),
    ]
    for kind, data, out in wrong:
        with pytest.raises(BugError):
            dequantize(kind, data, out)


def test_temporaries_stay_small() -> None:
    """67 million weights into given memory, with 32 MB to spare; in one piece that is not enough."""
    raw, out = torch.zeros(1 << 18, 210, dtype=torch.uint8), torch.empty(1 << 18, 256)

    def run(chunk: int) -> None:
        ggml.CHUNK = chunk
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (32 << 20), resource.RLIM_INFINITY))
        dequantize("Q6_K", raw, out)

    assert in_child(lambda: run(ggml.CHUNK)) == 0
    assert in_child(lambda: run(1 << 30)) == 99


# --- packing -----------------------------------------------------------------------------------------------------


def hard_weights() -> dict[str, Tensor]:
    """Where roundings and ties are decided."""
    scales = 10.0 ** torch.arange(-12, 5).repeat_interleave(8)[:, None]
    steps = torch.arange(-64, 64).repeat(8, 1) / 2
    ties = torch.tensor([1.0, -1.0]).repeat(8, 16)
    return {
        "random": torch.randn(136, 96) * scales,
        "uniform": torch.rand(64, 96) - 0.25,
        "halves": steps,
        "equal largest, either sign first": torch.cat([ties, -ties]),
        "zeros": torch.zeros(2, 64),
        "negative zeros": -torch.zeros(2, 64),
        "one value": torch.full((3, 32), -0.3),
        "one weight": torch.eye(32) * 5,
        "subnormal scales": torch.randn(8, 64) * 1e-6,
        "scales that become zero": torch.randn(8, 64) * 1e-30,
    }


@pytest.mark.parametrize("kind", WRITABLE)
def test_quantize_gives_the_bytes_of_the_library(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, weights in hard_weights().items():
        if kind == "F16":
            weights = weights.clamp(-65504, 65504)
        truth = library_quantize(kind, weights)
        assert torch.equal(quantize(kind, weights), truth), name
        assert torch.equal(quantize(kind, weights.T.contiguous().T), truth), name
        with monkeypatch.context() as patch:
            patch.setattr(ggml, "CHUNK", 96)
            assert torch.equal(quantize(kind, weights[None]), truth[None]), name


# Below this the inverse of a scale can overflow float32; the library then casts NaN to a code, which nothing defines.
TINY = 2.0**-100


@settings(max_examples=150, deadline=None)
@given(st.lists(st.floats(-60_000, 60_000, width=32, allow_subnormal=False), min_size=32, max_size=32))
@example([0.0] * 31 + [2.0**-126])
def test_quantize_any_block(values: list[float]) -> None:
    weights = torch.tensor([values])
    tiny = bool(weights.any()) and float(weights.abs().max()) < TINY
    for kind in WRITABLE:
        if tiny and kind.startswith("Q"):
            assert not dequantize(kind, quantize(kind, weights)).any(), kind
        else:
            assert torch.equal(quantize(kind, weights), library_quantize(kind, weights)), kind


@pytest.mark.parametrize("kind", WRITABLE)
def test_error_of_a_round_trip_is_half_a_step(kind: str) -> None:
    weights = torch.randn(64, 256)
    error = (dequantize(kind, quantize(kind, weights)) - weights).abs().view(64, -1, 32).amax(2)
    blocks = weights.view(64, -1, 32)
    largest, spread = blocks.abs().amax(2), blocks.amax(2) - blocks.amin(2)
    # Half a step, and the 16-bit scale's own rounding (2^-11) times the largest code. Q4_0 has codes -8 to 7, so a
    # weight opposite in sign to the largest loses up to a whole step.
    bound = {
        "F32": 0 * largest,
        "F16": largest * 2**-11,
        "BF16": largest * 2**-8,
        "Q8_0": largest * (0.5 / 127 + 2**-11),
        "Q4_0": largest * (1 / 8 + 2**-11),
        "Q4_1": spread * (0.5 / 15 + 2**-11) + largest * 2**-11,
    }[kind]
    assert (error <= bound * (1 + 1e-5)).all()
    assert kind == "F32" or (error.amax() > bound.amax() / 8)  # the bound is not idle


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_quantize_takes_other_floats(dtype: torch.dtype) -> None:
    weights = torch.randn(4, 64).to(dtype)
    for kind in WRITABLE:
        assert torch.equal(quantize(kind, weights), library_quantize(kind, weights.float()))


@pytest.mark.fault("Q9")
@pytest.mark.parametrize("kind", WRITABLE)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 31, 32, 1000])
def test_weights_that_are_not_finite_are_refused(kind: str, value: float, place: int) -> None:
    weights = torch.randn(16, 64)
    weights.view(-1)[place] = value
    weights[-1, -1] = value
    with pytest.raises(InputError, match=r"^blk\.0\.w: 2 of 1024 weights are NaN or infinite"):
        quantize(kind, weights, "blk.0.w")


TOO_LARGE = {"F16": 65_520.0, "BF16": 3.4e38, "Q8_0": 127 * 65_521.0, "Q4_0": -8 * 65_521.0, "Q4_1": -65_521.0}


@pytest.mark.fault("Q9")
@pytest.mark.parametrize(("kind", "outlier"), TOO_LARGE.items())
def test_outlier_that_overflows_the_scale_is_refused(kind: str, outlier: float) -> None:
    weights = torch.randn(16, 64)
    weights[3, 40] = outlier
    with pytest.raises(InputError, match=f"^out: a weight of .* beyond what {kind} can hold.*write this tensor as F32"):
        quantize(kind, weights, "out")
    # Control: the library writes it, and what is read back is not finite.
    assert not library_dequantize(kind, library_quantize(kind, weights)).isfinite().all()
    weights[3, 40] = outlier * 0.998
    assert dequantize(kind, quantize(kind, weights)).isfinite().all()


@pytest.mark.fault("Q9")
def test_a_range_too_wide_for_the_scale_is_refused() -> None:
    weights = torch.zeros(1, 32)
    weights[0, 0], weights[0, 1] = -60_000, 15 * 65_521 - 60_000
    with pytest.raises(InputError, match="beyond what Q4_1 can hold"):
        quantize("Q4_1", weights)


@pytest.mark.fault("Q9")
@pytest.mark.parametrize("kind", [*PACKED[:2], "Q8_0"])
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-40, 1e-38])
def test_groups_too_small_for_a_scale_become_zeros(kind: str, size: float) -> None:
    weights = torch.randn(4, 64).clamp(-1, 1).mul_(size)
    weights[1:3] = 0
    packed = quantize(kind, weights)
    assert torch.equal(dequantize(kind, packed), torch.zeros(4, 64))
    # The inverse of such a scale is infinite, and what that makes of a weight as an integer is undefined: not used.
    codes = packed.view(8, -1)[:, 4 if kind == "Q4_1" else 2 :]
    assert torch.equal(codes, codes[2].expand(8, -1))


@pytest.mark.fault("Q10")
def test_formats_that_are_not_written_and_rows_that_do_not_divide() -> None:
    for kind in [*set(BLOCKS) - set(WRITABLE), "Q2_K", ""]:
        with pytest.raises(ConfigError, match=r"^w: cannot be written as .*expected one of F32, F16, BF16, Q4_0"):
            quantize(kind, torch.zeros(2, 256), "w")
    for shape in ((2, 100), (32, 31), ()):
        with pytest.raises(ConfigError, match=r"^w: shape .*; expected rows of a multiple of 32 for Q8_0$"):
            quantize("Q8_0", torch.zeros(shape), "w")
