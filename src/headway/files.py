"""Every change Headway makes to the disk, and the one safe way to open a file it reads.

A change is one of six primitives: `make_dir`, `write`, `sync`, `rename`, `remove`, `append`. Each calls the
module's `hook` first, so that a test can fail or kill the process at the k-th of them:

    files.hook = lambda name, path: ...     # may raise OSError, sleep, or os._exit

`write` calls it once when it creates the file and once per chunk, so half-written files happen in tests too.
An OSError of a primitive, real or injected, becomes one MachineError with path, reason and free space.

Left out: network file systems without rename or fsync, and Windows (fcntl locks, fsync of a folder).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from io import BufferedReader
from pathlib import Path
from types import TracebackType

from headway.errors import InputError, MachineError, nearest

Chunk = bytes | memoryview
Content = Chunk | Iterable[Chunk]


def _no_hook(name: str, path: Path) -> None:
    return None


hook: Callable[[str, Path], None] = _no_hook
"""Called as hook(primitive's name, path) before each primitive acts; tests replace it."""

TEMPORARY_PREFIX = ".tmp-"
_FIXES = {
    errno.ENOSPC: "free space on that disk or write elsewhere with --output",
    errno.EDQUOT: "free some of your quota or write elsewhere with --output",
    errno.EACCES: "choose a folder you may write to with --output",
    errno.EPERM: "choose a folder you may write to with --output",
    errno.EROFS: "choose a folder you may write to with --output",
    errno.EFBIG: "raise the file size limit (ulimit -f) or write elsewhere with --output",
    errno.ENAMETOOLONG: "use a shorter name",
    errno.ENOENT: "create the folder first",
}


def free_space(path: Path) -> int:
    """Bytes free on the disk that holds `path` or its nearest existing parent; -1 when unknown."""
    for place in (path, *path.parents):
        with contextlib.suppress(OSError, ValueError):
            return shutil.disk_usage(place).free
    return -1


@contextlib.contextmanager
def _converted(action: str, path: Path) -> Iterator[None]:
    """OSError, or a path the system cannot even name (ValueError), becomes MachineError."""
    try:
        yield
    except (OSError, ValueError) as error:
        code = error.errno if isinstance(error, OSError) else None
        reason = os.strerror(code) if code else str(error)
        free = free_space(path)
        room = f" ({free / 1e9:.2f} GB free on that disk)" if free >= 0 else ""
        found = f"cannot {action}: {reason}{room}"
        raise MachineError(str(path), found, "", _FIXES.get(code or 0, "")) from error


@contextlib.contextmanager
def _primitive(name: str, path: Path) -> Iterator[None]:
    with _converted(name.replace("_", " "), path):
        hook(name, path)
        yield


def make_dir(path: Path) -> None:
    """Make a folder and its missing parents; an existing folder is fine. Raises MachineError."""
    with _converted("make dir", path):
        missing = [place for place in (path, *path.parents) if not place.exists()]
        if not missing and not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    for place in reversed(missing):
        with _primitive("make_dir", place), contextlib.suppress(FileExistsError):
            os.mkdir(place)


def chunks(data: Content) -> Iterable[Chunk]:
    """`data` as an iterable of chunks."""
    return (data,) if isinstance(data, bytes | memoryview) else data


def _write_all(fd: int, chunk: Chunk) -> None:
    rest = memoryview(chunk).cast("B")
    while rest:
        rest = rest[os.write(fd, rest) :]


def write(path: Path, data: Content) -> None:
    """Create or truncate a file and write `data`, bytes or chunks of them; no fsync. Raises MachineError."""
    with _primitive("write", path):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        for chunk in chunks(data):
            with _primitive("write", path):
                _write_all(fd, chunk)
    finally:
        os.close(fd)


def sync(path: Path) -> None:
    """Force a file, or a folder's list of names, to the disk (fsync). Raises MachineError."""
    with _primitive("sync", path):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def rename(source: Path, target: Path) -> None:
    """Put `source` in the place of `target` in one step. Raises MachineError."""
    with _primitive("rename", target):
        os.replace(source, target)


def remove(path: Path) -> None:
    """Remove a file, a link or an empty folder; a missing one is fine. Raises MachineError."""
    with _primitive("remove", path), contextlib.suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            os.rmdir(path)
        else:
            os.unlink(path)


def remove_tree(path: Path) -> None:
    """Remove a file or a folder with all it holds, one `remove` each; links are not followed."""
    if path.is_dir() and not path.is_symlink():
        with _converted("list", path):
            inside = sorted(path.iterdir())
        for entry in inside:
            remove_tree(entry)
    remove(path)


def append(path: Path, data: bytes) -> None:
    """Add `data` at the end of a file in one write, creating it if need be. Raises MachineError."""
    with _primitive("append", path):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            _write_all(fd, data)
        finally:
            os.close(fd)


def append_line(path: Path, text: str) -> None:
    """Append `text` as a line; a line that an earlier crash cut short is ended first. Raises MachineError."""
    torn = b""
    with _converted("read", path), contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            torn = b"" if file.read(1) == b"\n" else b"\n"
    append(path, torn + text.encode() + b"\n")


def temporary_sibling(path: Path) -> Path:
    """A fresh name beside `path` that readers ignore; short, so a 250-character name still fits."""
    return path.parent / f"{TEMPORARY_PREFIX}{os.getpid()}-{secrets.token_hex(4)}"


def atomic_write(path: Path, data: Content) -> None:
    """Replace a file's content so that a crash leaves the old or the new, never a mixture.

    Temporary sibling, fsync, rename, fsync of the folder. A link is followed and stays a link; a device such
    as /dev/stdout is written directly. A reader that has mapped the old file keeps it intact (S12).
    Raises MachineError; whatever `data` raises while it is iterated passes through, the old file untouched.
    """
    with _converted("write", path):
        target = Path(os.path.realpath(path))
        special = target.exists() and not target.is_file()
    if special:
        return write(target, data)
    temporary = temporary_sibling(target)
    try:
        write(temporary, data)
        sync(temporary)
        rename(temporary, target)
    except BaseException:
        with contextlib.suppress(MachineError):
            remove(temporary)
        raise
    sync(target.parent)


@contextlib.contextmanager
def replacing_folder(target: Path, marks: tuple[str, ...]) -> Iterator[Path]:
    """A new folder to fill, which then takes the place of `target`: complete or not there at all.

    A link is followed and stays a link. An older folder stays until the new one is complete and goes as a whole, so
    what is written may come from it (S12); killed between two renames, it stands beside as `.tmp-*`. The files inside
    are the caller's to sync.

    Args:
        marks: a folder that holds files is replaced only if one of these names is among them.

    Raises MachineError: no such name; the disk. Whatever the caller raises passes through, the old folder untouched.
    """
    target = Path(os.path.realpath(target)) if target.is_symlink() else target.absolute()
    if target.is_dir() and any(target.iterdir()) and not any((target / name).exists() for name in marks):
        missing = f"neither {' nor '.join(marks)}" if len(marks) > 1 else f"no {marks[0]}"
        raise MachineError(
            str(target), f"holds files but {missing}", "a folder of a model to overwrite", "another name"
        )
    temporary, old = temporary_sibling(target), temporary_sibling(target)
    try:
        make_dir(temporary)
        yield temporary
        sync(temporary)
        if target.exists():
            rename(target, old)
        rename(temporary, target)
    except BaseException:
        with contextlib.suppress(MachineError):
            if old.exists() and not target.exists():
                rename(old, target)
        with contextlib.suppress(MachineError):
            remove_tree(temporary)
        raise
    sync(target.parent)
    remove_tree(old)


def check_writable(folder: Path, need: int = 0) -> None:
    """Prove before long work that `folder` can be written and has `need` bytes free (S4).

    Makes the folder, writes, syncs and removes a probe file. Raises MachineError.
    """
    make_dir(folder)
    probe = temporary_sibling(folder / "probe")
    try:
        write(probe, b"headway")
        sync(probe)
    finally:
        with contextlib.suppress(MachineError):
            remove(probe)
    free = free_space(folder)
    if 0 <= free < need:
        found = f"{free / 1e9:.2f} GB free on that disk"
        raise MachineError(str(folder), found, f"at least {need / 1e9:.2f} GB", _FIXES[errno.ENOSPC])


def check_target(path: Path, overwrite: bool = False) -> None:
    """Refuse to write into something that is already there and not empty (S13). Raises MachineError."""
    with _converted("read", path):
        taken = path.exists() and (not path.is_dir() or any(path.iterdir()))
    if taken and not overwrite:
        raise MachineError(str(path), "exists and is not empty", "a new or empty place", "add --overwrite")


def open_regular(path: Path) -> BufferedReader:
    """Open a file for reading; anything but a regular file is refused without waiting on it.

    Raises InputError: missing (with the nearest name in that folder), folder, fifo, device, socket, link
    loop, unreadable. O_NONBLOCK keeps a fifo that appears between the check and the opening from hanging us.
    """
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISREG(mode):
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            mode = os.fstat(fd).st_mode
            if stat.S_ISREG(mode):
                return open(fd, "rb")
            os.close(fd)
    except FileNotFoundError as error:
        siblings: list[str] = []
        with contextlib.suppress(OSError):
            siblings = os.listdir(path.parent)
        found = f"no such file{nearest(path.name, siblings)}"
        raise InputError(str(path), found, "", "check the path") from error
    except (OSError, ValueError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        raise InputError(str(path), f"cannot be read: {reason}", "a readable file") from error
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a fifo", stat.S_IFSOCK: "a socket"}
    raise InputError(str(path), kinds.get(stat.S_IFMT(mode), "a device"), "a regular file")


def read_bytes(path: Path, limit: int | None = None) -> bytes:
    """A regular file's content, at most `limit` bytes. Raises InputError (see open_regular; too large)."""
    with open_regular(path) as file:
        try:
            # Asked for more than there is, Python takes the memory first: ask for what the file has, and one byte.
            size = os.fstat(file.fileno()).st_size
            data = file.read() if limit is None else file.read(min(limit, size) + 1)
        except OSError as error:
            raise InputError(str(path), f"cannot be read: {error.strerror}", "a readable file") from error
    if limit is not None and len(data) > limit:
        raise InputError(str(path), f"more than {limit} bytes", f"at most {limit} bytes")
    return data


def _say_on_stderr(line: str) -> None:
    print(line, file=sys.stderr)


class RunLock:
    """One process per run folder: a context manager around `folder/run.lock`.

    The truth is the kernel's record lock (fcntl.lockf): it ends with the process, however that dies, and a
    forked worker does not carry it on. The file's text, `pid host since`, tells people who holds it. A text
    left without a lock is stale and is taken over with a line to `say`; one from another host, whose lock the
    local kernel may not see, needs `force` (S6).

    Raises MachineError `locked by pid P on host H since T` on entry when another holder lives (S5).
    """

    _held: set[Path] = set()  # noqa: RUF012  record locks do not exclude the same process, so we remember

    def __init__(self, folder: Path, force: bool = False, say: Callable[[str], None] = _say_on_stderr) -> None:
        self._folder, self._force, self._say = folder, force, say
        self._fd, self._pid = -1, 0

    def __enter__(self) -> RunLock:
        make_dir(self._folder)
        self.path = Path(os.path.realpath(self._folder)) / "run.lock"
        if self.path in self._held:
            raise self._locked(f"{os.getpid()} {socket.gethostname()} now")
        while not self._acquire():
            continue  # the holder removed the file between our opening and our locking it
        self._pid = os.getpid()
        self._held.add(self.path)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pid != os.getpid():  # a forked child leaves the parent's lock alone
            return
        with contextlib.suppress(MachineError):  # a lock file left behind is stale, which is harmless
            remove(self.path)
        os.close(self._fd)
        self._held.discard(self.path)
        self._pid = 0

    def _acquire(self) -> bool:
        with _primitive("write", self.path):
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            return self._claim()
        except BaseException:
            os.close(self._fd)
            raise

    def _claim(self) -> bool:
        host = socket.gethostname()
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise self._locked(self._owner(patience=50)) from None
            if not self._force:  # a file system without locks
                found, fix = f"cannot lock: {error.strerror}", "add --force if nothing else uses it"
                raise MachineError(str(self.path), found, "", fix) from error
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(self._fd), os.stat(self.path)):
                owner = self._owner()
                if owner and owner.split()[1:2] != [host] and not self._force:
                    raise self._locked(owner)
                if owner:
                    self._say(f"taking over the lock left by {self._holder(owner)}")
                since = datetime.now().astimezone().isoformat(timespec="seconds")
                with _primitive("write", self.path):
                    os.ftruncate(self._fd, 0)
                    os.pwrite(self._fd, f"{os.getpid()} {host} {since}\n".encode(), 0)
                return True
        os.close(self._fd)
        return False

    def _owner(self, patience: int = 0) -> str:
        """The lock file's text; a holder that has only just locked it gets `patience` x 10 ms to write it."""
        for _ in range(patience):
            if os.fstat(self._fd).st_size:
                break
            time.sleep(0.01)
        return os.pread(self._fd, 4096, 0).decode("utf-8", "replace")

    @staticmethod
    def _holder(owner: str) -> str:
        pid, host, since = [*owner.split()[:3], "?", "?", "?"][:3]
        return f"pid {pid} on host {host} since {since}"

    def _locked(self, owner: str) -> MachineError:
        fix = "wait for that process or stop it; add --force if it runs on a host that is gone"
        return MachineError(str(self._folder), f"locked by {self._holder(owner)}", "", fix)
