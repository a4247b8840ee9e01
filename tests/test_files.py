"""File primitives, the run lock, and opening what others wrote."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_injection import count_primitives, failing, hooked, in_child, killed_at

from headway import files
from headway.errors import InputError, MachineError

FAULTS = [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EACCES, errno.EROFS]
NAMES = ["with space", "тест-模型-é", "x" * 250, "-dash", "quote'\"$(x)", "new\nline"]


@pytest.fixture
def deadline() -> Iterator[None]:
    """Anything that would wait forever is a failed test after five seconds."""

    def stop(number: int, frame: object) -> None:
        raise TimeoutError("hung")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(5)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def temporaries(folder: Path) -> list[Path]:
    return list(folder.glob(f"{files.TEMPORARY_PREFIX}*"))


def test_primitives_change_the_disk_and_pass_the_hook(tmp_path: Path) -> None:
    seen: list[str] = []
    folder = tmp_path / "a" / "b"
    with hooked(lambda name, path: seen.append(f"{name} {path.name}")):
        files.make_dir(folder)
        files.make_dir(folder)
        files.write(folder / "f", [b"one ", memoryview(b"two")])
        files.sync(folder / "f")
        files.append(folder / "f", b" three")
        files.rename(folder / "f", folder / "g")
        assert (folder / "g").read_bytes() == b"one two three"
        files.remove(folder / "g")
        files.remove(folder / "g")
        files.remove_tree(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    assert seen == [
        *("make_dir a", "make_dir b", "write f", "write f", "write f", "sync f", "append f", "rename g"),
        *("remove g", "remove g", "remove b", "remove a"),
    ]


def test_remove_tree_does_not_follow_links(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("x")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "link").symlink_to(tmp_path / "kept")
    files.remove_tree(tmp_path / "tree")
    assert (tmp_path / "kept" / "file").read_text() == "x" and not (tmp_path / "tree").exists()


@pytest.mark.fault("S1")
@pytest.mark.parametrize("code", FAULTS)
def test_atomic_write_fails_whole_at_every_primitive(tmp_path: Path, code: int) -> None:
    target = tmp_path / "config.json"
    total = count_primitives(lambda: files.atomic_write(tmp_path / "probe", [b"a", b"b"]))
    assert total == 6  # create, two chunks, fsync, rename, fsync of the folder
    for k in range(1, total + 1):
        files.write(target, b"old")
        with hooked(failing(k, code)), pytest.raises(MachineError) as caught:
            files.atomic_write(target, [b"new ", b"content"])
        assert os.strerror(code) in str(caught.value) and "GB free" in str(caught.value)
        assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
        assert target.read_bytes() == (b"new content" if k == total else b"old")
        assert not temporaries(tmp_path)


@pytest.mark.fault("S2")
def test_atomic_write_killed_leaves_old_or_new(tmp_path: Path) -> None:
    target, k = tmp_path / "f", 1
    files.write(target, b"old")
    while killed_at(k, lambda: files.atomic_write(target, [b"new ", b"content"])):
        assert target.read_bytes() in (b"old", b"new content")
        k += 1
    assert k > 6 and target.read_bytes() == b"new content"


@pytest.mark.fault("S2")
def test_control_a_plain_write_killed_leaves_a_mixture(tmp_path: Path) -> None:
    target, found, k = tmp_path / "f", set(), 1
    files.write(target, b"old")
    while killed_at(k, lambda: files.write(target, [b"new ", b"content"])):
        found.add(target.read_bytes())
        k += 1
    assert b"new " in found  # neither old nor new: what atomic_write prevents


def test_atomic_write_keeps_a_link_and_passes_the_writers_own_error(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    files.atomic_write(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"

    def broken() -> Iterator[bytes]:
        yield b"half"
        raise KeyError("the producer's own error")

    with pytest.raises(KeyError):
        files.atomic_write(tmp_path / "real", broken())
    assert (tmp_path / "real").read_text() == "new" and not temporaries(tmp_path)


@pytest.mark.fault("S3")
@pytest.mark.parametrize("write", [files.write, files.atomic_write, files.append])
def test_full_disk(write: object) -> None:
    assert callable(write)
    with pytest.raises(MachineError, match=r"/dev/full: cannot .*No space left on device"):
        write(Path("/dev/full"), b"x")
    assert Path("/dev/full").is_char_device()


@pytest.mark.fault("S4")
def test_unwritable_output_is_found_before_work(tmp_path: Path) -> None:
    files.check_writable(tmp_path / "new" / "run")
    assert list((tmp_path / "new" / "run").iterdir()) == []
    with pytest.raises(MachineError, match="/proc/headway"):
        files.check_writable(Path("/proc/headway/run"))
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match="Not a directory"):
        files.check_writable(tmp_path / "file")
    with pytest.raises(MachineError, match=r"GB free.*expected at least 1000000000\.00 GB"):
        files.check_writable(tmp_path, need=10**18)


@pytest.mark.fault("S13")
def test_target_that_is_taken(tmp_path: Path) -> None:
    files.check_target(tmp_path / "absent")
    files.check_target(tmp_path)
    (tmp_path / "file").write_text("x")
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(MachineError, match=r"not empty.*--overwrite"):
            files.check_target(taken)
        files.check_target(taken, overwrite=True)


@pytest.mark.fault("S13")
@pytest.mark.parametrize("name", NAMES)
def test_names_just_work(tmp_path: Path, name: str) -> None:
    files.make_dir(tmp_path / name)
    files.atomic_write(tmp_path / name / name, b"content")
    files.append_line(tmp_path / name / name, "line")
    assert files.read_bytes(tmp_path / name / name) == b"content\nline\n"
    with files.RunLock(tmp_path / name):
        assert (tmp_path / name / "run.lock").exists()


def test_names_that_cannot_be(tmp_path: Path) -> None:
    for name in ("x" * 300, "nul\0", "\ud800"):
        with pytest.raises(MachineError):
            files.atomic_write(tmp_path / name, b"")
        with pytest.raises(InputError):
            files.read_bytes(tmp_path / name)


def test_append_line_ends_a_torn_line(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    files.append_line(log, '{"step": 1}')
    files.append(log, b'{"ste')
    files.append_line(log, '{"step": 2}')
    assert log.read_text() == '{"step": 1}\n{"ste\n{"step": 2}\n'


@pytest.mark.fault("K15")
def test_only_regular_files_are_opened(tmp_path: Path, deadline: None) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s"))
    table = {"fifo": "a fifo", "loop": "symbolic links", "s": "a socket", ".": "a folder"}
    for name, found in table.items():
        with pytest.raises(InputError, match=found):
            files.read_bytes(tmp_path / name)
    with pytest.raises(InputError, match="a device"):
        files.read_bytes(Path("/dev/zero"))
    with pytest.raises(InputError, match="did you mean 'fifo'"):
        files.read_bytes(tmp_path / "fifa")
    listener.close()


def test_read_limit(tmp_path: Path) -> None:
    files.write(tmp_path / "f", b"12345")
    assert files.read_bytes(tmp_path / "f", 5) == b"12345"
    with pytest.raises(InputError, match="more than 4 bytes"):
        files.read_bytes(tmp_path / "f", 4)


def contend(folder: Path, exclusive: bool = True) -> list[int]:
    """Two processes want the lock at once; each keeps it until both have tried. Their exit codes, sorted."""
    tries, done = os.pipe(), os.pipe()
    pids = []
    for _ in range(2):
        pid = os.fork()
        if pid == 0:
            code = 99
            try:
                if not exclusive:
                    fcntl.lockf = lambda *_: None
                with files.RunLock(folder, say=lambda line: None):
                    os.write(tries[1], b"x")
                    os.read(done[0], 1)
                    code = 0
            except MachineError as error:
                match = re.search(r"locked by pid (\d+) on host (\S+) since \d{4}-\d\d-\d\dT", str(error))
                other = match and int(match[1]) != os.getpid() and match[2] == socket.gethostname()
                code = 4 if other else 98
                os.write(tries[1], b"x")
            finally:
                os._exit(code)
        pids.append(pid)
    for _ in range(2):
        os.read(tries[0], 1)
    os.write(done[1], b"xx")
    codes = sorted(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids)
    for end in (*tries, *done):
        os.close(end)
    return codes


@pytest.mark.fault("S5")
def test_two_processes_one_folder(tmp_path: Path) -> None:
    for _ in range(20):
        assert contend(tmp_path) == [0, 4]
    assert not (tmp_path / "run.lock").exists()
    assert contend(tmp_path, exclusive=False) == [0, 0]  # control: without the kernel's lock both get in


@pytest.mark.fault("S5")
def test_one_process_twice_and_a_forked_worker(tmp_path: Path) -> None:
    with files.RunLock(tmp_path) as lock:
        with pytest.raises(MachineError, match=f"locked by pid {os.getpid()}"), files.RunLock(tmp_path):
            pass
        assert in_child(lambda: lock.__exit__(None, None, None)) == 0
        assert (tmp_path / "run.lock").exists()  # the worker's copy released nothing
    with files.RunLock(tmp_path):
        pass


@pytest.mark.fault("S6")
def test_stale_locks(tmp_path: Path) -> None:
    lock, lines, host = tmp_path / "run.lock", list[str](), socket.gethostname()
    lock.write_text(f"999999 {host} 2020-01-01T00:00:00\n")
    with files.RunLock(tmp_path, say=lines.append):
        assert lock.read_text().startswith(f"{os.getpid()} ")
    assert lines == [f"taking over the lock left by pid 999999 on host {host} since 2020-01-01T00:00:00"]
    lock.write_text("12 elsewhere 2020-01-01T00:00:00+00:00\n")
    with pytest.raises(MachineError, match=r"locked by pid 12 on host elsewhere.*--force"):
        files.RunLock(tmp_path, say=lines.append).__enter__()
    with files.RunLock(tmp_path, force=True, say=lines.append):
        assert "elsewhere" in lines[-1]
    lock.write_bytes(b"\xff\0garbled")
    with pytest.raises(MachineError, match="--force"):
        files.RunLock(tmp_path).__enter__()


@pytest.mark.fault("S5")
def test_the_holder_leaves_between_opening_and_locking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = fcntl.lockf, list[int]()

    def lockf(fd: int, command: int) -> None:
        calls.append(fd)
        if len(calls) == 1:  # the other process ends just now and removes its file: we hold a lock on nothing
            (tmp_path / "run.lock").unlink()
        real(fd, command)

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with files.RunLock(tmp_path):
        assert len(calls) == 2 and (tmp_path / "run.lock").read_text().startswith(f"{os.getpid()} ")


@pytest.mark.fault("S6")
def test_lock_ends_with_its_process_even_if_a_worker_lives_on(tmp_path: Path) -> None:
    ready, worker = os.pipe(), os.pipe()

    def holder() -> None:
        files.RunLock(tmp_path).__enter__()
        if os.fork() == 0:  # a data worker that survives its parent
            os.write(ready[1], b"x")
            os.read(worker[0], 1)
        os._exit(0)

    assert in_child(holder) == 0
    os.read(ready[0], 1)
    lines: list[str] = []
    with files.RunLock(tmp_path, say=lines.append):
        assert len(lines) == 1
    os.write(worker[1], b"x")


@pytest.mark.fault("S1")
def test_lock_on_a_failing_disk(tmp_path: Path) -> None:
    for k in (1, 2):
        with hooked(failing(k, errno.EROFS)), pytest.raises(MachineError, match="Read-only"):
            files.RunLock(tmp_path).__enter__()
        with files.RunLock(tmp_path, say=lambda line: None):
            pass
