"""The save protocol under every fault: rows S1 to S3, S9 to S13 and K14."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import resource
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fault_injection import count_primitives, failing, hooked, in_child, killed_at
from torch import Tensor

from headway import files
from headway.checkpoints.folder import (
    LATEST,
    MANIFEST,
    WEIGHTS,
    BackgroundSaver,
    checkpoint_path,
    clean_temporary,
    list_checkpoints,
    newest_good,
    read_manifest,
    save_checkpoint,
    verify,
)
from headway.checkpoints.tensors import read_tensors, tensor_hash, write_tensors
from headway.errors import BugError, InputError, MachineError

FAULTS = [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EACCES, errno.EROFS]
Save = Callable[[Path, int], object]


def weights(step: int, size: int = 300) -> dict[str, Tensor]:
    return {"embed": torch.full((size,), float(step)), "norm": torch.arange(7) + step}


def save(run: Path, step: int, **options: object) -> Path:
    groups = {WEIGHTS: weights(step), "optimizer.safetensors": {"moment": torch.full((9,), step / 3)}}
    meta = {"config": "c0ffee", "cursor": step * 10, "rng": [1, 2, 3]}
    others = {"state.json": [b"{}", b"\n"]}
    return save_checkpoint(run, step, groups, meta, others=others, **options)  # type: ignore[arg-type]


def naive_in_place(run: Path, step: int) -> None:
    """Control: no temporary folder, and the old ones go first."""
    for _, path in list_checkpoints(run)[:-1]:
        files.remove_tree(path)
    folder = checkpoint_path(run, step)
    files.make_dir(folder)
    data = b"".join(map(bytes, write_tensors(weights(step))))
    files.write(folder / WEIGHTS, [data[:100], data[100:]])
    record = {WEIGHTS: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}}
    files.write(folder / MANIFEST, json.dumps({"step": step, "files": record}).encode())


def run_at(folder: Path, *steps: int) -> Path:
    for step in steps:
        save(folder, step)
    return folder


def violations(run: Path, at_least: int = 2) -> list[str]:
    """What a reader would find wrong: anything visible that does not verify, or fewer than two good ones."""
    wrong, good = [], 0
    for _, path in list_checkpoints(run):
        try:
            verify(path)
            good += 1
        except InputError as error:
            wrong.append(str(error))
    return wrong + ([f"only {good} good"] if good < at_least else [])


def temporaries(run: Path) -> list[Path]:
    return [path for path in run.rglob("*") if path.name.startswith(files.TEMPORARY_PREFIX)]


def test_what_a_checkpoint_holds(tmp_path: Path) -> None:
    path = save(tmp_path, 12)
    assert path == tmp_path / "checkpoints" / "step-00000012"
    assert sorted(p.name for p in path.iterdir()) == [
        MANIFEST,
        WEIGHTS,
        "optimizer.safetensors",
        "state.json",
    ]
    assert (path.parent / LATEST).read_text() == "step-00000012\n"
    manifest = verify(path)
    for name, record in manifest.files.items():
        data = (path / name).read_bytes()
        assert record == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert manifest.tensors[WEIGHTS] == {"embed": ["F32", 300], "norm": ["I64", 7]}
    assert manifest.meta == {"config": "c0ffee", "cursor": 120, "rng": [1, 2, 3]}
    assert manifest.step == 12 and manifest.weights == tensor_hash(read_tensors(path / WEIGHTS))


@pytest.mark.fault("S1")
def test_the_order_of_the_protocol(tmp_path: Path) -> None:
    """A process kill cannot show a missing fsync (only a power cut can), so the order itself is the test."""
    run, events = run_at(tmp_path, 1, 2), list[tuple[str, str]]()

    def hook(name: str, path: Path) -> None:
        events.append((name, "TMP" if path.name.startswith(files.TEMPORARY_PREFIX) else path.name))

    with hooked(hook):
        save(run, 3)
    landed = events.index(("rename", "step-00000003"))
    for name in ("state.json", WEIGHTS, "optimizer.safetensors", MANIFEST):
        writes = [i for i, event in enumerate(events) if event == ("write", name)]
        assert max(writes) < events.index(("sync", name)) < landed
    assert events.index(("write", MANIFEST)) > events.index(("sync", "optimizer.safetensors"))
    assert events[landed - 1] == ("sync", "TMP") and events[landed + 1] == ("sync", "checkpoints")
    assert landed < events.index(("rename", LATEST)) < next(i for i, e in enumerate(events) if e[0] == "remove")


def test_the_same_state_gives_the_same_bytes(tmp_path: Path) -> None:
    one, two = save(tmp_path / "a", 5), save(tmp_path / "b", 5)
    for path in one.iterdir():
        assert path.read_bytes() == (two / path.name).read_bytes()


def test_pruning_keeps_two_that_verify_and_the_protected(tmp_path: Path) -> None:
    run = run_at(tmp_path, 1, 2, 3, 4)
    assert [step for step, _ in list_checkpoints(run)] == [3, 4]
    (checkpoint_path(run, 4) / WEIGHTS).write_bytes(b"broken")
    save(run, 5, protect=[3])
    assert [step for step, _ in list_checkpoints(run)] == [3, 5]  # 4 does not count, 3 stays as the second
    save(run, 6, keep=0)
    assert [step for step, _ in list_checkpoints(run)] == [5, 6]  # never below two
    save(run, 3)
    save(run, 7, protect=[3])
    assert [step for step, _ in list_checkpoints(run)] == [3, 6, 7]
    save(run, 5, protect=[3])  # back at an earlier step: the one just saved is never pruned
    assert [step for step, _ in list_checkpoints(run)] == [3, 5, 6, 7]
    save(run, 8, keep=3)
    assert [step for step, _ in list_checkpoints(run)] == [6, 7, 8]
    assert not violations(run) and not temporaries(run)


@pytest.mark.fault("R12", "K14")
def test_newest_good_says_why_others_are_not(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no usable checkpoint; expected"):
        newest_good(tmp_path)
    run = run_at(tmp_path, 1, 2)
    (run / "checkpoints" / LATEST).write_text("step-00000099\n")  # a hint, never the truth
    assert newest_good(run).manifest.step == 2 and newest_good(run).rejected == []
    (checkpoint_path(run, 2) / "state.json").unlink()
    found = newest_good(run)
    assert found.path == checkpoint_path(run, 1) and "step-00000002/state.json: no such file" in found.rejected[0]
    os.truncate(checkpoint_path(run, 1) / WEIGHTS, 100)
    with pytest.raises(InputError, match=r"tried 2: .*state\.json.* \| .*100 bytes.*by the manifest"):
        newest_good(run)


def test_readers_ignore_what_is_not_a_checkpoint(tmp_path: Path) -> None:
    run = run_at(tmp_path, 1)
    good = checkpoint_path(run, 1)
    for name in (".tmp-1-00000000", "step-1", "step-00000007x", "notes"):
        shutil.copytree(good, good.parent / name)
    assert list_checkpoints(run) == [(1, good)]
    shutil.copytree(good, checkpoint_path(run, 9))  # renamed by hand
    assert newest_good(run).path == good
    os.remove(checkpoint_path(run, 9) / MANIFEST)
    os.mkfifo(checkpoint_path(run, 9) / MANIFEST)
    assert "a fifo" in newest_good(run).rejected[0]


@pytest.mark.fault("K14")
def test_every_bit_flip_is_caught(tmp_path: Path) -> None:
    run, rng = run_at(tmp_path, 1, 2), random.Random(0)
    path = checkpoint_path(run, 2)
    names = sorted(p.name for p in path.iterdir())
    caught = 0
    for turn in range(200):
        target = path / names[turn % len(names)]
        before = target.read_bytes()
        flipped = bytearray(before)
        flipped[rng.randrange(len(before))] ^= 1 << rng.randrange(8)
        target.write_bytes(flipped)
        found = newest_good(run)
        caught += found.manifest.step == 1 and target.name in found.rejected[0]
        target.write_bytes(before)
    assert caught == 200 and newest_good(run).manifest.step == 2


@pytest.mark.parametrize(
    "change",
    [
        {"step": "2"},
        {"step": True},
        {"files": {"../../etc/passwd": {"size": 1, "sha256": ""}}},
        {"files": {"/etc/passwd": {"size": 1, "sha256": ""}}},
        {"files": {"a": {"size": "1", "sha256": ""}}},
        {"files": {"a": []}},
        {"weights": None},
        {"more": 1},
    ],
)
def test_a_manifest_with_a_right_hash_that_we_did_not_write(tmp_path: Path, change: dict[str, object]) -> None:
    path = save(tmp_path, 2)

    def seal(**fields: object) -> None:
        body = {**json.loads((path / MANIFEST).read_bytes()), **fields}
        body.pop("sha256")
        text = json.dumps(body, sort_keys=True, indent=1) + "\n"
        digest = hashlib.sha256(text.encode()).hexdigest()
        text = json.dumps({**body, "sha256": digest}, sort_keys=True, indent=1) + "\n"
        (path / MANIFEST).write_text(text)

    seal(meta={"changed": 1})
    assert read_manifest(path).meta == {"changed": 1}  # control: this is how to forge one
    seal(**change)
    with pytest.raises(InputError, match=MANIFEST):
        verify(path)


def failing_run(base: Path, run: Path, k: int, code: int, action: Save) -> bool:
    """Copy a run, save into it with the k-th primitive failing; True if the fault was reached."""
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(base, run)
    try:
        with hooked(failing(k, code)):
            action(run, 3)
    except MachineError as error:
        assert str(run) in str(error) and os.strerror(code) in str(error) and "GB free" in str(error)
        return True
    return False


@pytest.mark.fault("S1")
@pytest.mark.parametrize("code", FAULTS)
def test_every_primitive_fails_once(tmp_path: Path, code: int) -> None:
    base, run, k = run_at(tmp_path / "base", 1, 2), tmp_path / "run", 1
    while failing_run(base, run, k, code, save):
        assert violations(run) == []
        assert newest_good(run).manifest.step in (2, 3)
        clean_temporary(run)
        assert temporaries(run) == []
        if newest_good(run).manifest.step == 2:
            save(run, 3)  # the disk has room again
        assert newest_good(run).manifest.step == 3 and violations(run) == []
        k += 1
    assert k > 30 and [step for step, _ in list_checkpoints(run)] == [2, 3]


@pytest.mark.fault("S1")
def test_a_disk_that_stays_broken_leaves_the_last_checkpoints(tmp_path: Path) -> None:
    base, run = run_at(tmp_path / "base", 1, 2), tmp_path / "run"
    total = count_primitives(lambda: save(shutil.copytree(base, tmp_path / "count"), 3))
    for first in range(1, total + 1):
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(base, run)
        seen = 0

        def hook(name: str, path: Path, first: int = first) -> None:
            nonlocal seen
            seen += 1
            if seen >= first:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

        with hooked(hook), pytest.raises(MachineError, match="Input/output error"):
            save(run, 3)
        assert violations(run) == []
        clean_temporary(run)
        assert temporaries(run) == []


@pytest.mark.fault("S1", "S2")
def test_control_a_naive_save_is_caught_by_the_same_harness(tmp_path: Path) -> None:
    base, run = run_at(tmp_path / "base", 1, 2), tmp_path / "run"
    found: list[str] = []
    k = 1
    while failing_run(base, run, k, errno.ENOSPC, naive_in_place):
        found += violations(run)
        k += 1
    assert any("only 1 good" in line for line in found) and any(MANIFEST in line for line in found)
    after_kill: list[str] = []
    for j in range(1, k):
        shutil.rmtree(run)
        shutil.copytree(base, run)
        assert killed_at(j, lambda: naive_in_place(run, 3))
        after_kill += violations(run)
    assert any("only 1 good" in line for line in after_kill)


@pytest.mark.fault("S2", "S11")
def test_killed_at_every_primitive(tmp_path: Path) -> None:
    base, run, k, orphans = run_at(tmp_path / "base", 1, 2), tmp_path / "run", 1, 0
    while True:
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(base, run)
        if not killed_at(k, lambda: save(run, 3)):
            break
        assert violations(run) == []
        step = newest_good(run).manifest.step
        assert step in (2, 3)
        left = temporaries(run)
        top = [path for path in left if path.parent.name == "checkpoints"]
        orphans += bool(left)
        assert clean_temporary(run) == sorted(top) and temporaries(run) == []
        save(run, step + 1)  # resumed
        assert newest_good(run).manifest.step == step + 1 and violations(run) == []
        k += 1
    assert k > 30 and orphans > 10


@pytest.mark.fault("S2", "S13")
def test_killed_while_replacing_a_good_checkpoint(tmp_path: Path) -> None:
    base, run, k = run_at(tmp_path / "base", 1, 2), tmp_path / "run", 1
    fresh = {WEIGHTS: {"embed": torch.full((300,), 9.0)}}
    hashes = {tensor_hash(weights(2)), tensor_hash(fresh[WEIGHTS])}
    seen = set()
    while True:
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(base, run)
        ended = not killed_at(k, lambda: save_checkpoint(run, 2, fresh, {}, overwrite=True))
        found = newest_good(run)
        assert found.manifest.step == 2 and found.manifest.weights in hashes and violations(run) == []
        seen.add((found.path.name, found.manifest.weights))
        if ended:
            break
        clean_temporary(run)
        save_checkpoint(run, 2, fresh, {}, overwrite=True)
        assert newest_good(run).manifest.weights == tensor_hash(fresh[WEIGHTS])
        assert [path.name for _, path in list_checkpoints(run)] == ["step-00000001", "step-00000002"]
        k += 1
    assert len(seen) == 3  # the old one, the old one set aside, the new one


@pytest.mark.fault("S3")
def test_file_size_limit(tmp_path: Path) -> None:
    run = run_at(tmp_path, 1, 2)

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
        try:
            save_checkpoint(run, 3, {WEIGHTS: weights(3, 10_000)}, {})
        except MachineError as error:
            assert "File too large" in str(error) and "ulimit" in str(error)
            raise

    assert in_child(limited) == MachineError.exit_code
    assert violations(run) == [] and temporaries(run) == [] and newest_good(run).manifest.step == 2


def slow_writes(started: threading.Event, go_on: threading.Event) -> Callable[[str, Path], None]:
    def hook(name: str, path: Path) -> None:
        if name == "write" and path.name == WEIGHTS:
            started.set()
            assert go_on.wait(10)

    return hook


@pytest.mark.fault("S9")
@pytest.mark.parametrize("guard", [True, False])
def test_parameters_change_while_a_save_runs(tmp_path: Path, guard: bool) -> None:
    live, state = weights(1), bytearray(b"{}")
    tied = {**live, "head": live["embed"]}
    expected = tensor_hash({**weights(1), "head": weights(1)["embed"]})
    meta = {"cursor": [1]}
    started, go_on = threading.Event(), threading.Event()
    saver = BackgroundSaver()
    with hooked(slow_writes(started, go_on)):
        if guard:
            saver.save(tmp_path, 1, {WEIGHTS: tied}, meta, {"state.json": iter([bytes(state)])})
        else:  # control: the same save in a thread without the copy
            thread = threading.Thread(target=save_checkpoint, args=(tmp_path, 1, {WEIGHTS: tied}, meta))
            thread.start()
        assert started.wait(10)
        for tensor in live.values():
            tensor.add_(1)
        meta["cursor"].append(2)
        go_on.set()
        if guard:
            assert saver.join() == checkpoint_path(tmp_path, 1)
        else:
            thread.join()
    read = read_tensors(checkpoint_path(tmp_path, 1) / WEIGHTS)
    assert (tensor_hash(read) == expected) is guard
    if guard:
        assert verify(checkpoint_path(tmp_path, 1)).meta == {"cursor": [1]}
        assert read["head"].data_ptr() == read["embed"].data_ptr()


@pytest.mark.fault("S9")
def test_a_background_error_surfaces(tmp_path: Path) -> None:
    saver = BackgroundSaver()
    assert saver.join() is None
    with hooked(failing(3, errno.ENOSPC)):
        saver.save(tmp_path, 1, {WEIGHTS: weights(1)}, {})
        with pytest.raises(MachineError, match="No space left"):
            saver.save(tmp_path, 2, {WEIGHTS: weights(2)}, {})
    saver.save(tmp_path, 3, {WEIGHTS: weights(3)}, {})
    assert saver.join() == checkpoint_path(tmp_path, 3) and saver.join() is None


@pytest.mark.fault("S10")
def test_weights_that_did_not_move_are_our_bug(tmp_path: Path) -> None:
    frozen = {WEIGHTS: weights(1)}
    save_checkpoint(tmp_path, 1, frozen, {})
    with pytest.raises(BugError, match="step 2 has the very weights of step 1") as caught:
        save_checkpoint(tmp_path, 2, frozen, {})
    assert caught.value.exit_code == 70 and [step for step, _ in list_checkpoints(tmp_path)] == [1]
    save_checkpoint(tmp_path, 2, frozen, {}, moved=False)  # learning rate 0
    frozen[WEIGHTS]["embed"][0] += 1e-3
    save_checkpoint(tmp_path, 3, frozen, {})
    assert newest_good(tmp_path).manifest.step == 3


@pytest.mark.fault("S11")
def test_orphans_go_and_nothing_else(tmp_path: Path) -> None:
    run = run_at(tmp_path, 1, 2)
    orphan = run / "checkpoints" / ".tmp-7-deadbeef"
    shutil.copytree(checkpoint_path(run, 2), orphan)
    (run / ".tmp-8-deadbeef").write_text("half a file")
    before = sorted(set(run.rglob("*")) - {orphan, *orphan.rglob("*"), run / ".tmp-8-deadbeef"})
    assert clean_temporary(run) == sorted([orphan, run / ".tmp-8-deadbeef"])
    assert sorted(run.rglob("*")) == before and clean_temporary(run) == []
    assert clean_temporary(tmp_path / "absent") == []


@pytest.mark.fault("S12")
def test_saving_weights_that_are_mapped_from_the_checkpoint_replaced(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    mapped = read_tensors(path / WEIGHTS)
    save_checkpoint(tmp_path, 1, {WEIGHTS: mapped}, {}, overwrite=True)
    assert tensor_hash(mapped) == tensor_hash(weights(1)) == verify(path).weights


@pytest.mark.fault("S13")
def test_a_checkpoint_that_is_already_there(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    before = (path / MANIFEST).read_bytes()
    with pytest.raises(MachineError, match=r"step-00000001: exists.*--overwrite"):
        save(tmp_path, 1)
    assert (path / MANIFEST).read_bytes() == before and not temporaries(tmp_path)
    (path / WEIGHTS).write_bytes(b"broken")
    save(tmp_path, 1)  # a broken one is no obstacle
    assert verify(path).step == 1 and not temporaries(tmp_path)


@pytest.mark.fault("S13")
@pytest.mark.parametrize("name", ["with space", "тест-模型-é", "x" * 250, "quote'\"$(x)"])
def test_names_just_work(tmp_path: Path, name: str) -> None:
    run = tmp_path / name
    save_checkpoint(run, 1, {WEIGHTS: {name: torch.ones(2)}}, {name: name}, others={name: b"x"})
    assert newest_good(run).manifest.meta == {name: name}
    assert list(read_tensors(newest_good(run).path / WEIGHTS)) == [name]


def test_what_only_our_own_mistake_can_ask_for(tmp_path: Path) -> None:
    for others in ({MANIFEST: b""}, {"../x": b""}, {"": b""}, {".hidden": b""}):
        with pytest.raises(BugError, match="bare file name"):
            save_checkpoint(tmp_path, 1, {}, {}, others=others)
    for meta in ({"loss": float("nan")}, {"x": object()}):
        with pytest.raises(BugError, match="meta is not JSON"):
            save_checkpoint(tmp_path, 1, {}, meta)
    assert not temporaries(tmp_path)
