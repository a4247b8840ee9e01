"""The compiled library's file, and the instruction sets in it. Without torch, for those who only want to know."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

FORCED = os.environ.get("HEADWAY_KERNELS", "")
"""An instruction set to keep to, or `off`; without it the best one that the machine has."""


def files() -> list[Path]:
    """Where setup.py has put it; none where there was no compiler."""
    return sorted(Path(__file__).parent.glob("_native*.so"))


def levels(lib: ctypes.CDLL) -> list[str]:
    """The instruction sets that it can use on this machine, from the least."""
    lib.hw_levels.restype = ctypes.c_char_p
    names: bytes = lib.hw_levels()
    return names.decode().split()
