"""Weights in codes: layout, ggml's blocks, inputs in codes, and the native product against its twin."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headway.kernels import built, codes, native, steps
from headway.kernels.codes import CODED, CodedMatrix, Codes, code_rows, from_blocks, lay_out, product
from headway.kernels.ggml import BLOCKS, dequantize
from headway.kernels.native import twins_only
from headway.nn.feed_forward import ACTIVATIONS

SIZES = st.integers(1, 70)


every_level = pytest.mark.parametrize("level", steps.levels())


@contextlib.contextmanager
def forced(level: str) -> Iterator[None]:
    """One instruction set inside, the best one afterwards."""
    assert steps.use_level(level)
    yield
    steps.use_level()


def random_matrix(R: int, C: int, bits: int, chunk: int, per_group: int, *, minima: bool, half: bool) -> CodedMatrix:
    group, dtype = chunk * per_group, torch.float16 if half else torch.float32
    top, zero = {4: (16, 8), 7: (128, 32), 8: (256, 128)}[bits]
    numbers = (torch.rand(2, R, -(-C // group)) * 0.01 + 0.001).to(dtype)
    plain = torch.randint(0, top, (R, C), dtype=torch.uint8)
    low = -8 * numbers[1] if minima else None
    return lay_out(Codes(plain, numbers[0], low, 0 if minima else zero), bits, chunk, group)


@st.composite
def matrices(draw: st.DrawFn) -> CodedMatrix:
    torch.manual_seed(draw(st.integers(0, 2**16)))
    bits = draw(st.sampled_from([4, 7, 8]))
    chunk = 32 if bits == 4 else draw(st.sampled_from([16, 32]))
    per_group = draw(st.sampled_from([1, 2, 4]))
    R, C = draw(SIZES), draw(st.integers(1, 300))
    return random_matrix(R, C, bits, chunk, per_group, minima=draw(st.booleans()), half=draw(st.booleans()))


@given(matrices())
def test_laying_out_can_be_undone(matrix: CodedMatrix) -> None:
    again = lay_out(matrix.plain(), matrix.bits, matrix.chunk, matrix.group)
    for one, other in zip(matrix, again, strict=True):
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other


@pytest.mark.parametrize("kind", CODED)
@pytest.mark.parametrize("rows", [1, 16, 33])
def test_blocks_in_codes_are_the_same_weights(kind: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codes, "UNROLLED", 16 * 512)  # several steps
    block = BLOCKS[kind]
    raw = torch.randint(0, 256, (rows, 512 // block.size * block.bytes), dtype=torch.uint8)
    known = dequantize(kind, raw)
    kept = known.isfinite()
    assert torch.equal(from_blocks(kind, raw).weights()[kept], known[kept]) and kept.float().mean() > 0.8


@given(matrices(), st.integers(1, 9), st.sampled_from([1, 2]))
@settings(max_examples=60)
def test_inputs_in_codes_are_near_and_sum_up(matrix: CodedMatrix, T: int, planes: int) -> None:
    x = torch.randn(T, matrix.shape[1]) * 10 ** torch.randn(T, 1)
    rows = code_rows(x, matrix.chunk, planes)
    values = (rows.codes.unflatten(2, (-1, matrix.chunk)) * rows.steps[..., None]).sum(1).flatten(1)[:, : x.shape[1]]
    step = rows.steps[:, -1].repeat_interleave(matrix.chunk, 1)[:, : x.shape[1]]
    # Half a step of the finest plane, and the rounding of float32 beside it.
    assert ((values - x).abs() <= 0.5001 * step + 1e-6 * x.abs()).all()
    assert rows.codes.abs().max() <= 127
    assert torch.equal(rows.codes.unflatten(2, (-1, matrix.chunk)).sum(-1, dtype=torch.int32), rows.sums)


@every_level
@given(matrix=matrices(), T=st.integers(1, 11), planes=st.sampled_from([1, 2]), biased=st.booleans())
@settings(max_examples=80)
def test_the_native_product_is_its_twin(level: str, matrix: CodedMatrix, T: int, planes: int, biased: bool) -> None:
    x = torch.randn(T, matrix.shape[1]) * 10 ** torch.randn(T, 1)
    bias = torch.randn(matrix.shape[0]) if biased else None
    with twins_only():
        known = steps.linear(x, matrix, bias, planes)
    # The integer parts are exact; what is left is float32 addition over the chunks, whose size the absolute sum bounds.
    size = x.abs() @ matrix.weights().abs().T + (0 if bias is None else bias.abs())
    if matrix.minima is not None:
        size += (x.abs().sum(1, keepdim=True) * matrix.minima.abs().max()).float()
    with forced(level):
        assert ((steps.linear(x, matrix, bias, planes) - known).abs() <= 2e-6 * size + 1e-30).all()


@every_level
def test_one_chunk_is_exact_to_the_last_bit(level: str) -> None:
    """With scales of one and whole inputs, nothing is rounded: every instruction set gives the integers."""
    torch.manual_seed(0)
    for bits, zero in ((4, 8), (7, 16), (8, 128), (8, 0)):
        top = {4: 15, 7: 127, 8: 255}[bits]
        extreme = torch.stack((torch.zeros(32), torch.full((32,), top), torch.randint(0, top + 1, (32,)))).to(
            torch.uint8
        )
        matrix = lay_out(Codes(extreme, torch.ones(3, 1), None, zero), bits, 32, 32)
        x = torch.randint(-127, 128, (64, 32)).float()
        x[0], x[1], x[2:, 0] = 127, -127, 127
        with forced(level):
            assert torch.equal(steps.linear(x, matrix), x @ (extreme.float() - zero).T), (bits, zero)


@every_level
def test_what_is_not_finite_stays_so(level: str) -> None:
    matrix = random_matrix(20, 64, 4, 32, 1, minima=False, half=True)
    x = torch.randn(3, 64)
    x[1, 40] = torch.inf
    x[2, 3] = torch.nan
    with forced(level):
        out, nothing = steps.linear(x, matrix), steps.linear(torch.zeros(2, 64), matrix)
    assert out[0].isfinite().all() and out[1:].isnan().all() and torch.equal(out.isnan(), product(x, matrix).isnan())
    assert torch.equal(nothing, torch.zeros(2, 20))


@every_level
def test_threads_share_the_work_and_change_nothing(level: str) -> None:
    matrix, x = random_matrix(333, 96, 4, 32, 2, minima=True, half=True), torch.randn(5, 96)
    before = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with forced(level):
                found.append(steps.linear(x, matrix))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_a_level_that_is_not_there_is_refused() -> None:
    assert not steps.use_level("avx1024")


@every_level
@pytest.mark.parametrize("name", steps.ACTIVATIONS)
def test_activations(level: str, name: str) -> None:
    """Beside the formula in float64; what is no number stays none, and infinity goes where the formula sends it."""
    matrix = lay_out(Codes(torch.eye(32, dtype=torch.uint8), torch.ones(32, 1), None, 0), 7, 32, 32)
    x = torch.randn(60, 32) * 6
    x[0, 3], buffers = torch.nan, steps.Buffers()
    codes, out = buffers.codes(60, 32, 32, 2), torch.empty(60, 32)
    norm = steps.Norm(source=x.data_ptr(), columns=32, source_stride=32, codes=codes)
    weight, activation = steps.described(matrix, None), steps.ACTIVATIONS.index(name)
    linear = steps.Linear(weight, codes, out.data_ptr(), stride=32, activation=activation)
    with forced(level):
        steps.Program([norm, linear]).run(60)
    known = x.double() if name == "none" else ACTIVATIONS[name](x.double())
    assert out[0].isnan().all() and torch.allclose(out[1:].double(), known[1:], atol=2e-3, rtol=1e-3)


@pytest.mark.fault("Q13")
def test_a_library_of_other_sources_is_not_used() -> None:
    """Its structs are of other sizes, or it does not say which: a step read with another layout writes anywhere."""
    lib = native.library()
    if lib is not None:
        assert native.fits(lib)
    sizes = [ctypes.sizeof(struct) for struct in steps.STRUCTS]

    class Other:
        def __init__(self, told: list[int]) -> None:
            self._told = (ctypes.c_int64 * len(told))(*told)
            self.hw_sizes = ctypes.CFUNCTYPE(ctypes.c_void_p)(lambda: ctypes.addressof(self._told))

    assert native.fits(Other([*sizes, 0]))
    assert not native.fits(Other([*sizes, 8, 0])) and not native.fits(Other([*sizes[:-1], sizes[-1] + 8, 0]))
    assert not native.fits(object())


@every_level
@settings(deadline=None)
@given(matrices(), st.integers(0, 40))
def test_rows_of_a_table_are_its_twin_to_the_last_bit(level: str, matrix: CodedMatrix, count: int) -> None:
    ids = torch.randint(matrix.shape[0], (count,))
    with forced(level):
        found = steps.rows(matrix, ids)
        with pytest.raises(IndexError, match=f"of {matrix.shape[0]}"):
            steps.rows(matrix, torch.tensor([0, matrix.shape[0]]))
        assert torch.equal(steps.unpacked(matrix), matrix.weights())
    assert torch.equal(found, matrix.rows(ids))
    assert torch.equal(found, matrix.weights()[ids])


@pytest.mark.parametrize("asked", ["off", "portable", "sse9"])
def test_the_environment_says_which_kernels(asked: str) -> None:
    """The same product in a process of its own: by the twin, by the portable kernel, or refused by name."""
    script = (
        "import torch; torch.manual_seed(0); from headway.kernels import native, steps\n"
        "from headway.kernels.codes import from_blocks, product\n"
        "from headway.kernels.ggml import quantize\n"
        "x, w = torch.randn(2, 64), from_blocks('Q8_0', quantize('Q8_0', torch.randn(32, 64)))\n"
        "gap = (steps.linear(x, w) - product(x, w)).abs().max().item()\n"
        "print(native.library() is None, gap == 0, gap < 1e-4)\n"
    )
    env = {**os.environ, "HEADWAY_KERNELS": asked}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    if asked == "sse9" and built.files():
        assert "HEADWAY_KERNELS: 'sse9'; expected off, portable" in done.stderr
    else:
        is_off, is_twin, is_near = done.stdout.split()
        assert is_near == "True" and (is_off == "True") is (asked == "off" or not built.files())
        assert is_twin == "True" or asked != "off"
