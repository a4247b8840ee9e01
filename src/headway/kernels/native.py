"""The compiled library: found, loaded, and switched off by one call.

It is built at installation where a C++ compiler exists (setup.py). Without it every operation runs as its PyTorch twin:
slower, same results within float32 rounding.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from headway.errors import ConfigError
from headway.kernels.built import FORCED, files, levels

_enabled = True


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, None where they were not built, or from sources whose structs are others than Python's.

    Raises ConfigError for an instruction set in HEADWAY_KERNELS that is not there.
    """
    if FORCED == "off":
        return None
    for path in files():
        with contextlib.suppress(OSError):
            lib = ctypes.CDLL(str(path))
            if fits(lib):
                return _kept_to(lib)
    return None


def _kept_to(lib: ctypes.CDLL) -> ctypes.CDLL:
    if not lib.hw_use_level(FORCED.encode()):
        raise ConfigError("HEADWAY_KERNELS", repr(FORCED)[:80], ", ".join(["off", *levels(lib)]))
    return lib


def fits(lib: ctypes.CDLL) -> bool:
    """Whether the structs of a library are as large as those of kernels/steps.py.

    A checkout that moves on leaves its last build behind, and a step read with another layout writes anywhere.
    """
    from headway.kernels.steps import STRUCTS  # which calls this module

    try:
        sizes = lib.hw_sizes
    except AttributeError:
        return False
    sizes.restype = ctypes.POINTER(ctypes.c_int64)
    found, wanted = sizes(), [ctypes.sizeof(struct) for struct in STRUCTS]
    told = itertools.takewhile(bool, (found[place] for place in itertools.count()))
    return list(itertools.islice(told, len(wanted) + 1)) == wanted


@contextlib.contextmanager
def twins_only() -> Iterator[None]:
    """Run the PyTorch twins inside, also where the library exists (tests, bisecting)."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before


def usable(*tensors: Tensor) -> bool:
    """Whether the native path can take these tensors: float32 on CPU, outside of tracing."""
    if torch.compiler.is_compiling() or not _enabled or library() is None:
        return False
    return all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)


def address(tensor: Tensor) -> ctypes.c_void_p:
    """The tensor's memory; the caller keeps the tensor alive for the duration of the call."""
    return ctypes.c_void_p(tensor.data_ptr())
