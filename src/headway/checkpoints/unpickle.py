"""Pickled weights (`.bin`, `.pt`), read in a confined child process that hands back a safetensors file.

A pickle is a program. torch's `weights_only` reader runs only the few calls that build tensors, and has had holes
(CVE-2025-32434), so it runs where a hole gains little (row K10): its own process with limits on memory, CPU time and
what it may write, without network where the kernel lets us, with an audit hook (PEP 578) that ends the process when
code in it opens a socket, starts a program, or touches a file outside the output folder for writing. An audit hook
is no sandbox against native code; reading pickles stays something the user has to ask for.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

import headway
from headway import files
from headway.checkpoints.raw import looks_like_pickle
from headway.checkpoints.tensors import read_tensors, write_tensors
from headway.errors import InputError

WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Keys under which training programs keep the weights beside other things."""
MAX_PICKLE = 1 << 36
_ROOM = 1 << 30  # bytes of memory beside four times the file: torch's own working space
_BROKE_OUT = 97
_WEIGHTS, _ERROR = "weights.safetensors", "error"
__all__ = ["WRAPPERS", "child", "looks_like_pickle", "read_pickle"]

# CLONE_NEWNET, which root may do, or else with CLONE_NEWUSER, while there is one thread: no network from here on.
_CHILD = """
import ctypes, sys
unshare = getattr(ctypes.CDLL(None), "unshare", lambda flags: 0)
unshare(0x40000000) and unshare(0x50000000)
sys.path.append(sys.argv[1])
from headway.checkpoints.unpickle import child
child()
"""
_FORBIDDEN = (
    *("socket.", "subprocess.", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "os.fork", "os.kill", "pty."),
    *("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown"),
    *("shutil.", "ctypes.", "os.putenv", "os.startfile", "urllib.", "http.", "ftplib.", "smtplib.", "webbrowser."),
)


def read_pickle(path: Path, timeout: float = 120) -> dict[str, Tensor]:
    """The tensors of a pickled state dict, by name, read in a child process.

    Args:
        path: what `torch.save` wrote, zip or legacy form: names with tensors, or such a dict under one of WRAPPERS.
        timeout: seconds after which the child is killed.

    Raises:
        InputError: not a pickle, damaged, too slow, too large in memory, or it holds or does anything else.
    """
    with files.open_regular(path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        if not looks_like_pickle(file.read(64)) or size > MAX_PICKLE:
            raise InputError(str(path), f"{size} bytes that begin like no pickle", "weights saved by torch")
    root = str(Path(headway.__file__).parents[1])
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    with tempfile.TemporaryDirectory(prefix="headway-") as folder:
        command = [sys.executable, "-I", "-B", "-c", _CHILD, root, str(path.absolute()), folder, str(int(timeout) + 1)]
        try:
            done = subprocess.run(
                command,
                cwd=folder,
                env=kept | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise InputError(str(path), f"not read within {timeout:g} s", "a pickle of weights") from None
        if done.returncode:
            raise InputError(str(path), _reason(done.returncode, Path(folder)), "a pickle of tensors by name")
        return read_tensors(Path(folder) / _WEIGHTS)  # mapped: the data outlive the folder's names


def _reason(code: int, folder: Path) -> str:
    if code == _BROKE_OUT:
        return "the pickle tries to do more than build tensors"
    if (folder / _ERROR).exists():
        said = files.read_bytes(folder / _ERROR, 4096).decode("utf-8", "replace")
        return "".join(letter if letter.isprintable() else " " for letter in said)  # it may quote the pickle
    return f"the confined reader was stopped by signal {-code}" if code < 0 else f"the confined reader failed ({code})"


def child() -> None:
    """The child's whole life: confine, read, write, end. Arguments: see `read_pickle`. Never call it elsewhere."""
    path, folder, seconds = Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
    try:
        torch.set_num_threads(1)
        _confine(folder, path.stat().st_size, seconds)
        with open(path, "rb") as file:
            mapped = file.read(4) == b"PK\x03\x04" and path.suffix != ".safetensors"  # torch goes by that name
            file.seek(0)
            found = torch.load(str(path) if mapped else file, map_location="cpu", mmap=mapped, weights_only=True)
        files.write(folder / _WEIGHTS, write_tensors(_state_dict(found)))
    except Exception as error:
        # torch says that it failed, how to read the file unconfined, what was wrong, and where its documentation is.
        said = str(error).split("\n\n")
        text = (said[-2] if len(said) > 2 else said[0].split(". ")[0]).strip(" .\n") or type(error).__name__
        files.write(folder / _ERROR, text.encode("utf-8", "replace")[:300])
        os._exit(InputError.exit_code)
    os._exit(0)


def _state_dict(found: object) -> dict[str, Tensor]:
    if isinstance(found, Mapping):
        for key in WRAPPERS:
            if isinstance(found.get(key), Mapping):
                return _state_dict(found[key])
        if found and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items()):
            return {str(name): tensor for name, tensor in found.items()}
    raise InputError("", f"holds a {type(found).__name__} that is not names with tensors")


def _confine(folder: Path, size: int, seconds: int) -> None:
    """Give up what reading weights does not need."""
    limits = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_FSIZE: 4 * size + _ROOM,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_CORE: 0,
    }
    memory = Path("/proc/self/statm")
    if memory.exists():
        limits[resource.RLIMIT_AS] = int(memory.read_text().split()[0]) * resource.getpagesize() + 4 * size + _ROOM
    for limit, value in limits.items():
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))
    outputs = {os.path.realpath(folder / name) for name in (_WEIGHTS, _ERROR)}

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open":
            place, _, flags = arguments
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            allowed = not writes or (isinstance(place, str | bytes) and os.path.realpath(os.fsdecode(place)) in outputs)
        else:
            allowed = not event.startswith(_FORBIDDEN)
        if not allowed:
            os._exit(_BROKE_OUT)  # an exception could be caught

    sys.addaudithook(watch)
