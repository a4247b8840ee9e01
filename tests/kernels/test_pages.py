"""Memory in large pages: no two tensors in one place, aligned, and given back with the last of them."""

from __future__ import annotations

import gc
import itertools
import mmap
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from headway.kernels import pages
from headway.kernels.codes import from_blocks
from headway.kernels.ggml import quantize


def test_tensors_lie_apart_and_hold_what_was_put_in_them() -> None:
    wanted = [torch.randn(size) for size in (1, 1000, 3, pages.REGION // 4 + 1, 7, pages.REGION // 2, 1000)]
    kept = [pages.settled(one) for one in wanted]
    assert all(torch.equal(one, other) for one, other in zip(wanted, kept, strict=True))
    spans = sorted((one.data_ptr(), one.data_ptr() + one.nbytes) for one in kept)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
    assert all(one.data_ptr() % 64 == 0 for one in kept)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32])
def test_kind_and_shape_are_those_asked_for(dtype: torch.dtype) -> None:
    found = pages.empty((3, 5), torch.empty(0, dtype=dtype))
    assert found.dtype == dtype and found.shape == (3, 5) and found.is_contiguous()
    assert pages.empty((0, 5), torch.empty(0, dtype=dtype)).shape == (0, 5)
    assert pages.empty((2,), torch.empty(0, device="meta")).is_meta


def test_without_such_memory_it_is_any(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(pages, "_region", pages._Region())
    monkeypatch.setattr(mmap, "mmap", refuse)
    numbers = torch.randn(100)
    with pytest.raises(OSError, match="allocate"):
        pages._region.take(400)
    assert torch.equal(pages.settled(numbers), numbers)


def test_threads_never_get_the_same_memory() -> None:
    kept: list[Tensor] = []

    def fill(value: int) -> None:
        kept.extend(pages.settled(torch.full((97,), value)) for _ in range(300))

    threads = [threading.Thread(target=fill, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(kept) == 1200 and all(bool((one == one[0]).all()) for one in kept)
    assert sum(int(one[0]) for one in kept) == 300 * (0 + 1 + 2 + 3)


def _mapped() -> int:
    """kB of memory that this process has to itself."""
    return sum(
        int(line.split()[1])
        for line in Path("/proc/self/smaps").read_text().splitlines()
        if line[:14] == "Private_Dirty:"
    )


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no large pages on this system")
def test_memory_goes_back_with_the_last_tensor() -> None:
    one = torch.ones(1 << 20)
    gc.collect()
    before = _mapped()
    kept = [pages.settled(one) for _ in range(32)]  # 128 MB
    held = _mapped()
    del kept
    gc.collect()
    assert held - before > 120 * 1024
    assert _mapped() - before < 20 * 1024


def test_matrices_in_codes_lie_there(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = quantize("Q8_0", torch.randn(32, 64))
    taken: list[int] = []
    take = pages._region.take
    monkeypatch.setattr(pages._region, "take", lambda size: (taken.append(size), take(size))[1])
    matrix = from_blocks("Q8_0", raw)
    assert taken == ([matrix.codes.nbytes, matrix.scales.nbytes] if hasattr(mmap, "MADV_HUGEPAGE") else [])
