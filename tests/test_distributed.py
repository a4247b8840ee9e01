"""Rows D1 to D9 and R13: what two processes survive, by the command, over real gloo."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pytest import CaptureFixture

from headway.checkpoints.folder import list_checkpoints, verify
from headway.cli.main import main

pytestmark = pytest.mark.xdist_group("processes")
SOURCE = Path(__file__).resolve().parents[1] / "src"
TEXT = "".join(f"{n} green birds sing in {n * 7 % 31} old trees while the fox jumps over dog {n}\n" for n in range(400))
TINY = "model.d_model=16 model.n_layers=1 model.n_heads=2 data.context=16 tokenizer.kind=byte train.batch_size=7"
TINY += " train.threads=1 train.dtype=float32 train.sample_tokens=0 train.eval_windows=4 train.collective_timeout=20"
TINY += " train.schedule=constant train.warmup=0"


@pytest.fixture
def place(tmp_path: Path, cache: object) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def command(place: Path, *words: str, plain: bool = False, **environment: str) -> subprocess.Popen[str]:
    """`headway train` on the text; `environment` on top, such as a PYTHONPATH that holds a sitecustomize."""
    keys = [] if plain else [*TINY.split(), f"data.path={place / 'text.txt'}"]
    env = {**os.environ, "PYTHONPATH": str(SOURCE), **environment}
    arguments = [sys.executable, "-m", "headway", "train", *keys, *words]
    return subprocess.Popen(
        arguments, env=env, cwd=place, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )


def ended(running: subprocess.Popen[str], timeout: float = 120) -> tuple[int, str]:
    out, said = running.communicate(timeout=timeout)
    return running.returncode, out + said


def steps(run: Path) -> dict[int, float]:
    """The loss of each step so far."""
    file = run / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return {row["step"]: row["loss"] for row in rows if row["event"] == "step"}


def once(place: Path, *words: str) -> None:
    """The same in this process, which need not start first."""
    places = [f"output={place / word[7:]}" if word.startswith("output=") else word for word in words]
    assert main(["train", *TINY.split(), f"data.path={place / 'text.txt'}", *places]) == 0


def wait_for(true: Callable[[], object], running: subprocess.Popen[str], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def ranks(launcher: int) -> dict[int, int]:
    """{rank: process number} of the workers of a launcher."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            environment = (folder / "environ").read_bytes()
        except (OSError, ValueError):
            continue
        if parent == launcher and (match := re.search(rb"(?:^|\0)RANK=(\d+)", environment)):
            found[int(match[1])] = int(folder.name)
    return found


def is_running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


@pytest.fixture
def long_run(place: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Two processes in the middle of a run that would take hours, with a checkpoint behind them."""
    run = place / "run"
    running = command(place, "train.steps=200000", "train.checkpoint_every=20", "--nproc", "2", "output=run")
    try:
        wait_for(lambda: len(list_checkpoints(run)) >= 2, running)
        yield running, run
    finally:
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)
            running.communicate()


def customized(place: Path, code: str) -> str:
    """A PYTHONPATH on which rank 1 first runs `code`."""
    folder = place / "custom"
    folder.mkdir()
    body = "\n".join(f"    {line}" for line in code.splitlines())
    (folder / "sitecustomize.py").write_text(f"import os\nif os.environ.get('RANK') == '1':\n{body}\n")
    return f"{folder}{os.pathsep}{SOURCE}"


@pytest.mark.fault("D1", "D8")
@pytest.mark.parametrize("rank", [1])
def test_a_killed_rank_ends_all_and_the_last_checkpoint_stands(
    long_run: tuple[subprocess.Popen[str], Path], rank: int
) -> None:
    running, run = long_run
    pids = ranks(running.pid)
    assert sorted(pids) == [0, 1]
    listening = {address for pid in pids.values() for address in listened(pid)}
    assert listening and listening <= {"127.0.0.1", "::1"}, listening
    began = time.monotonic()
    os.kill(pids[rank], signal.SIGKILL)
    code, said = ended(running, 60)
    assert time.monotonic() - began < 30
    assert code == 6 and f"rank {rank}: killed by SIGKILL" in said, said
    assert not any(is_running(pid) for pid in pids.values())
    verify(list_checkpoints(run)[-1][1])


def listened(pid: int) -> set[str]:
    """Local addresses that a process listens on (state 0A of /proc/net/tcp)."""
    held = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            held.add(os.readlink(entry))
        except OSError:
            continue
    found = set()
    for name, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in held:
                raw = bytes.fromhex(fields[1].partition(":")[0])
                words = b"".join(raw[i : i + 4][::-1] for i in range(0, len(raw), 4))
                found.add(socket.inet_ntop(family, words))
    return found


@pytest.mark.fault("D9")
def test_a_signal_to_the_launcher_saves_once_and_ends_all(long_run: tuple[subprocess.Popen[str], Path]) -> None:
    running, run = long_run
    pids = ranks(running.pid)
    before = max(step for step, _ in list_checkpoints(run))
    wait_for(lambda: max(steps(run)) > before, running)  # in that very step there would be nothing new to save
    os.kill(running.pid, signal.SIGTERM)
    code, said = ended(running, 60)
    assert code == 143, said
    assert not any(is_running(pid) for pid in pids.values())
    saved = list_checkpoints(run)[-1][0]
    assert saved > before and saved == max(steps(run)) and said.count("saved in") == 1, said
    again = command(place_of(run), "--resume", "run", "--override", f"train.steps={saved + 2}", plain=True)
    code, said = ended(again)
    assert code == 0 and f"resumed at step {saved}" in said, said
    assert "processes 2 -> 1: not byte-equal" in said


def place_of(run: Path) -> Path:
    return run.parent


@pytest.mark.fault("D2")
@pytest.mark.parametrize("code", [0, 9])
def test_a_rank_that_never_comes(place: Path, code: int) -> None:
    path = customized(place, f"os._exit({code})")
    began = time.monotonic()
    running = command(
        place, "train.steps=4", "train.collective_timeout=4", "--nproc", "2", "output=run", PYTHONPATH=path
    )
    found, said = ended(running)
    assert found == 6 and time.monotonic() - began < 60, said
    assert ("rank 1: ended with code 9" if code else "rank 0: lost the others") in said, said


def by_hand(place: Path, words: list[list[str]], *paths: str) -> list[tuple[int, str]]:
    """Two processes as another launcher would start them, each with words of its own."""
    both = []
    for rank in range(2):
        env = {"RANK": str(rank), "WORLD_SIZE": "2", "HEADWAY_STORE": str(place / "store"), "LOCAL_RANK": str(rank)}
        path = paths[rank] if paths else str(SOURCE)
        both.append(command(place, "train.steps=2", *words[rank], PYTHONPATH=path, **env))
    return [ended(one) for one in both]


@pytest.mark.fault("D3")
def test_ranks_that_differ_are_refused_by_name(place: Path) -> None:
    shutil.copytree(SOURCE / "headway", place / "other" / "headway")
    with open(place / "other" / "headway" / "cost.py", "a") as file:
        file.write("# changed\n")
    (place / "text2.txt").write_text(TEXT.replace("green", "blue"))
    cases: list[tuple[str, list[str], tuple[str, ...]]] = [
        ("train.seed: 5 on rank 1, 0 on rank 0", ["train.seed=5"], ()),
        ("headway: ", [], (str(SOURCE), str(place / "other"))),
        ("data: ", ["data.path=text2.txt"], ()),
    ]
    for wanted, extra, paths in cases:
        (place / "store").unlink(missing_ok=True)
        found = by_hand(place, [["output=run", "--overwrite"], ["output=run", "--overwrite", *extra]], *paths)
        for code, said in found:
            assert code == 2, (wanted, said)
            assert wanted in said or ("data.path" in said and wanted == "data: "), (wanted, said)
            assert "rank 1" in said and "rank 0" in said


@pytest.mark.fault("D4", "D6")
def test_one_process_two_and_one_again_are_one_run(place: Path) -> None:
    """Seven rows a batch, so that shares are uneven. Losses in float32: within 1e-5 of those of one process."""
    once(place, "train.steps=8", "output=straight")
    once(place, "train.steps=2", "output=run")
    for stop, strategy in ((4, "ddp"), (6, "fsdp")):
        words = ["--resume", "run", "--override", f"train.steps={stop}", f"train.strategy={strategy}", "--nproc", "2"]
        code, said = ended(command(place, *words, plain=True))
        assert code == 0, said
        assert "rows of a batch in each: 4 in 1 of them, 3 in the others; none dropped or padded" in said, said
    once(place, "--resume", "--override", "train.steps=8", "output=run")
    straight, found = steps(place / "straight"), steps(place / "run")
    assert sorted(found) == sorted(straight) == list(range(1, 9))
    assert found == pytest.approx(straight, abs=1e-5)


@pytest.mark.fault("D5")
def test_a_rank_that_dies_while_it_saves_leaves_nothing_half(place: Path, capsys: CaptureFixture[str]) -> None:
    code = (
        "import headway.checkpoints.shards as shards\n"
        "write, calls = shards.write_shares, []\n"
        "def dying(folder, groups):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 2: os.kill(os.getpid(), 9)\n"
        "    write(folder, groups)\n"
        "shards.write_shares = dying"
    )
    words = ("train.steps=6", "train.checkpoint_every=2", "train.strategy=fsdp", "--nproc", "2", "output=run")
    found, said = ended(command(place, *words, PYTHONPATH=customized(place, code)))
    assert found == 6 and "rank 1: killed by SIGKILL" in said, said
    standing = list_checkpoints(place / "run")
    assert [step for step, _ in standing] == [2]
    verify(standing[0][1])
    found, said = ended(command(place, "--resume", "run", "--nproc", "2", plain=True))
    assert found == 0 and "resumed at step 2" in said, said
    assert not list((place / "run" / "checkpoints").glob(".tmp-*"))
    assert main(["train", "--resume", str(place / "run"), "--prove", "2"]) == 3
    assert "the shares of several processes" in capsys.readouterr().err


@pytest.mark.fault("R13")
def test_a_rank_whose_data_raises_ends_the_run_with_its_error(place: Path) -> None:
    """There are no data workers: each process makes its own rows, and its error is the run's."""
    code = (
        "import headway.data.batches as batches\n"
        "rows = batches.PackedBatches.rows\n"
        "def broken(self, first, count):\n"
        "    if first >= 21: raise OSError('the disk is gone')\n"
        "    return rows(self, first, count)\n"
        "batches.PackedBatches.rows = broken"
    )
    running = command(place, "train.steps=9", "--nproc", "2", "output=run", PYTHONPATH=customized(place, code))
    wait_for(lambda: len(steps(place / "run")) >= 1 or running.poll() is not None, running)
    began = time.monotonic()
    found, said = ended(running)
    assert found == 6 and "rank 1" in said and "the disk is gone" in said, said
    assert time.monotonic() - began < 10
