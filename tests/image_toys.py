"""Small images: three shades of grey in noise, as the IDX files of MNIST."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np


def folder(place: Path, size: int = 8) -> Path:
    """80 images of `size` x `size` to train and 20 held out."""
    rng = np.random.default_rng(0)
    place.mkdir()
    for side, count in (("train", 80), ("t10k", 20)):
        labels = rng.integers(0, 3, count).astype(np.uint8)
        pixels = (rng.integers(0, 60, (count, size, size)) + 60 * labels[:, None, None]).astype(np.uint8)
        for what, array in (("images-idx3-ubyte", pixels), ("labels-idx1-ubyte", labels)):
            head = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            (place / f"{side}-{what}").write_bytes(head + array.tobytes())
    return place
