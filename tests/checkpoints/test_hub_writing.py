"""Writing Hugging Face folders when disks fail, processes die or a target is taken; the memory that reading takes."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
from fault_injection import count_primitives, failing, hooked, killed_at
from hub_toys import (
    EMBEDDING,
    OUTPUT,
    contents,
    same,
    store,
)

from headway import files
from headway.checkpoints.hub_folder import CONFIG, INDEX, WEIGHTS, read_folder, write_folder
from headway.errors import MachineError

# --- S1, S12, S13: writing ---------------------------------------------------------------------------------------

FAULTS = [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EACCES, errno.EROFS]


def listing(place: Path) -> dict[str, bytes] | None:
    """Every file of a folder with its bytes, None where there is none."""
    return {path.name: path.read_bytes() for path in place.iterdir()} if place.is_dir() else None


@pytest.mark.fault("S13")
def test_a_target_that_is_taken(whole: Path, tmp_path: Path) -> None:
    checkpoint, target = read_folder(whole), tmp_path / "out"
    target.mkdir()
    write_folder(target, contents(checkpoint))  # empty: fine
    before = listing(target)
    with pytest.raises(MachineError) as caught:
        write_folder(target, contents(checkpoint))
    assert caught.value.exit_code == 4 and str(target) in str(caught.value) and "--overwrite" in str(caught.value)
    assert listing(target) == before
    (target / "stale.txt").touch()
    write_folder(target, contents(checkpoint), overwrite=True)
    assert listing(target) == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(MachineError):
        write_folder(tmp_path / "file", contents(checkpoint))
    write_folder(tmp_path / "file", contents(checkpoint), overwrite=True)
    assert listing(tmp_path / "file") == before


@pytest.mark.fault("S13")
def test_only_folders_of_models_are_overwritten(whole: Path, tmp_path: Path) -> None:
    """`--overwrite` replaces a folder as a whole, so a wrong path must not cost somebody's documents."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(MachineError, match="holds files but no config"):
        write_folder(tmp_path / "home", contents(read_folder(whole)), overwrite=True)
    assert listing(tmp_path / "home") == {"letter.txt": b"dear"}


@pytest.mark.fault("S13")
@pytest.mark.parametrize("name", ["two words", "模型 é", "x" * 250, "-dash", "a/b/c", "'quoted'"])
def test_unusual_names(whole: Path, tmp_path: Path, name: str) -> None:
    checkpoint = read_folder(whole)
    for _ in range(2):
        write_folder(tmp_path / name, contents(checkpoint), overwrite=True)
        assert same(read_folder(tmp_path / name).weights, checkpoint.weights)


@pytest.mark.fault("S13")
@pytest.mark.parametrize("place", ["x" * 300, "nul\0", "file/below"])
def test_impossible_names(whole: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MachineError):
        write_folder(tmp_path / place, contents(read_folder(whole)))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.fault("S13")
def test_a_link_is_followed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    write_folder(tmp_path / "link", contents(read_folder(folder), shard_bytes=20_000), overwrite=True)
    assert (tmp_path / "link").is_symlink() and (folder / INDEX).exists() and not (folder / WEIGHTS).exists()


def test_folders_inside(whole: Path, tmp_path: Path) -> None:
    write_folder(tmp_path / "out", [*contents(read_folder(whole)), ("1_Pooling/config.json", b"{}")])
    assert (tmp_path / "out" / "1_Pooling" / "config.json").read_bytes() == b"{}"


@pytest.mark.fault("S12")
@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_writing_over_the_folder_that_the_weights_are_mapped_from(folder: Path, shard_bytes: int) -> None:
    checkpoint = read_folder(folder)
    before = {name: tensor.clone() for name, tensor in checkpoint.weights.items()}
    write_folder(folder, contents(checkpoint, shard_bytes=shard_bytes), overwrite=True)
    assert same(checkpoint.weights, before)  # the old file lives as long as it is mapped
    assert same(read_folder(folder).weights, before)
    write_folder(folder, contents(checkpoint, dtype=torch.bfloat16), overwrite=True)
    assert same(checkpoint.weights, before)
    assert same(read_folder(folder).weights, {name: tensor.bfloat16() for name, tensor in before.items()})


Parts = Iterable[tuple[str, files.Content]]


def in_place(target: Path, parts: Parts) -> None:
    """Control: the old files go first, the new ones are written where readers look."""
    if target.exists():
        files.remove_tree(target)
    files.make_dir(target)
    for name, content in parts:
        files.write(target / name, content)


def replaced(target: Path, parts: Parts) -> None:
    write_folder(target, parts, overwrite=True)


def outcomes(whole: Path, tmp_path: Path, write: Callable[..., None], *, old: bool, kill: bool) -> set[str]:
    """What a reader finds after each failed, or killed, primitive: `old`, `new`, `none`, `aside` or `partial`."""
    parts = [(CONFIG, b"{}"), (WEIGHTS, [b"one", b"two"])]
    count = count_primitives(lambda: write(tmp_path / "clean", parts))
    new, seen, before = listing(tmp_path / "clean"), set(), None
    for k in range(1, 3 * count):
        place = tmp_path / f"{k}"
        place.mkdir()
        target = place / "model"
        if old:
            shutil.copytree(whole, target)
            (target / "mark").touch()
            before = listing(target)
        failed = False
        if kill:
            failed = killed_at(k, lambda target=target: write(target, parts))
        else:
            try:
                with hooked(failing(k, FAULTS[k % len(FAULTS)])):
                    write(target, parts)
            except MachineError as error:
                failed = True
                assert str(place) in str(error) and "GB free" in str(error)
        found = listing(target)
        aside = [listing(path) for path in place.iterdir() if path != target]
        if found is None and before is not None and before in aside:
            seen.add("aside")
        else:
            seen.add("new" if found == new else "none" if found is None else "old" if found == before else "partial")
        if not failed:
            assert found == new and not aside
            return seen
        if not kill and found != new:
            assert not aside, "what was begun is gone again"
        shutil.rmtree(place)
    raise AssertionError("never a clean run")


@pytest.mark.fault("S1")
def test_any_primitive_that_fails_leaves_the_old_folder_or_none(whole: Path, tmp_path: Path) -> None:
    assert outcomes(whole, tmp_path / "a", write_folder, old=False, kill=False) == {"none", "new"}
    assert outcomes(whole, tmp_path / "b", replaced, old=True, kill=False) == {"old", "new"}
    # The control is seen through.
    assert "partial" in outcomes(whole, tmp_path / "c", in_place, old=True, kill=False)


@pytest.mark.fault("S1")
def test_killed_at_any_primitive(whole: Path, tmp_path: Path) -> None:
    """Between the two renames of an overwritten folder the old one stands beside, complete, under a temporary name."""
    assert outcomes(whole, tmp_path / "a", write_folder, old=False, kill=True) == {"none", "new"}
    assert outcomes(whole, tmp_path / "b", replaced, old=True, kill=True) <= {"old", "aside", "new"}


@pytest.mark.fault("S1")
def test_weights_that_fail_on_the_way_leave_nothing(folder: Path) -> None:
    def broken() -> Iterator[tuple[str, files.Content]]:
        yield CONFIG, b"{}"
        raise RuntimeError("no more")

    before = listing(folder)
    with pytest.raises(RuntimeError, match="no more"):
        write_folder(folder, broken(), overwrite=True)
    assert listing(folder) == before and [path.name for path in folder.parent.iterdir()] == [folder.name]


# --- memory ------------------------------------------------------------------------------------------------------

MEASURE = """
import sys
import torch
from pathlib import Path
from headway.checkpoints import tensors
from headway.checkpoints.hub_folder import read_folder
from headway.nn import Transformer
torch.set_num_threads(1)
def memory(line):
    return int(next(text for text in open("/proc/self/status") if text.startswith(line)).split()[1]) * 1024
compilers = [name for name in sys.modules if name.startswith("torch._dynamo")]
for _ in range(2):
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts from here (man 5 proc)
    before = memory("VmRSS")
    checkpoint = read_folder(Path(sys.argv[1]))
    print(memory("VmHWM") - before)
    del checkpoint
    print(len([name for name in sys.modules if name.startswith("torch._dynamo")]) - len(compilers))
    tensors.TensorFile.release = lambda self, name: None  # the control
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_loading_takes_the_memory_of_the_file(tmp_path: Path) -> None:
    """Most of a decoder's matrices are joined, hence copied: the file's pages must go as the copies come (qkv, gate
    and product), and nothing but the file may be in memory at any time. Beyond `import torch` and headway."""
    D, F, V = 1536, 4096, 1000
    layer = {"self_attn.q_proj": (D, D), "self_attn.k_proj": (D // 4, D), "self_attn.v_proj": (D // 4, D),
             "self_attn.o_proj": (D, D), "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F),
             "input_layernorm": (D,), "post_attention_layernorm": (D,)}  # fmt: skip
    shapes = {f"model.layers.{i}.{name}.weight": shape for i in range(2) for name, shape in layer.items()}
    shapes |= {EMBEDDING: (V, D), OUTPUT: (V, D), "model.norm.weight": (D,)}
    store(tmp_path, {name: torch.full(shape, 0.5) for name, shape in shapes.items()})
    config = {"model_type": "llama", "hidden_size": D, "intermediate_size": F, "num_hidden_layers": 2,
              "num_attention_heads": 24, "num_key_value_heads": 6, "vocab_size": V}  # fmt: skip
    (tmp_path / CONFIG).write_text(json.dumps(config))
    size = (tmp_path / WEIGHTS).stat().st_size
    assert size > 200e6
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True)
    peak, modules, control, _ = map(int, done.stdout.split())
    assert not modules, "shapes alone need no compiler, which would cost 80 MB and a second"
    taken, kept = peak / size, control / size
    print(f"{size / 1e6:.0f} MB: peak {taken:.3f} times the file, {kept:.3f} where no page is given back")
    assert taken <= 1.1 < 1.3 < kept
