"""Hugging Face folders that are damaged or hostile: refused in one line, or read with a note. Nothing of them runs."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_toys import (
    DROP,
    EMBEDDING,
    NORM,
    Q_PROJ,
    SIZES,
    T5,
    contents,
    edit,
    halves,
    refused,
    saved,
    store,
    store_shards,
    stored,
)

from headway.checkpoints.hub_folder import CONFIG, INDEX, WEIGHTS, read_folder, write_folder
from headway.errors import InputError
from headway.families import families

# --- F8: nothing of a config runs --------------------------------------------------------------------------------

CODE = {
    "auto_map": {"AutoConfig": "modeling_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"},
    "_attn_implementation": "someone/kernel",
    "_attn_implementation_internal": "someone/kernel",
    "custom_pipelines": {"x": {"impl": "modeling_evil.Evil"}},
}


@pytest.mark.fault("F8")
def test_code_keys_are_ignored_listed_and_not_written(folder: Path, tmp_path: Path) -> None:
    edit(folder, **CODE)
    checkpoint = read_folder(folder)
    (note,) = [note for note in checkpoint.notes if "ignored" in note]
    assert all(key in note for key in CODE)
    write_folder(tmp_path / "out", contents(checkpoint))
    assert not CODE.keys() & json.loads((tmp_path / "out" / CONFIG).read_text()).keys()


@pytest.mark.fault("F8")
@pytest.mark.parametrize(
    ("model_type", "hint"), [("lama", "did you mean 'llama'"), ("evil_v2", ""), (DROP, ""), (7, "")]
)
def test_unknown_model_type(folder: Path, model_type: object, hint: str) -> None:
    edit(folder, model_type=model_type, **CODE)
    refused(folder, hint, *families())


CHILD = """
import json, sys
from pathlib import Path
from headway.checkpoints.hub_folder import read_folder
from headway.errors import InputError
whole, *places = sys.argv[1:]
read_folder(Path(whole))  # what is loaded on first use is loaded now
ran, opened = [], []
def watch(event, arguments):
    if event == "open" and isinstance(arguments[0], str):  # a number is a file already open
        opened.append(arguments[0])
    if event.partition(".")[0] in (
        "import", "exec", "compile", "subprocess", "socket", "marshal", "pickle", "ctypes", "urllib", "webbrowser"
    ) or event in ("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.spawn"):
        ran.append(f"{event} {arguments!r:.80}")
sys.addaudithook(watch)
for place in places:
    said = ""
    try:
        read_folder(Path(place))
    except InputError as error:
        said = str(error)
    print(json.dumps([said, ran, opened]))
    ran, opened = [], []
exec("open(whole + '/config.json').close()")
print(json.dumps(["the control", ran, opened]))
"""


def watched(whole: Path, places: list[Path]) -> list[tuple[str, list[str], list[str]]]:
    """For each folder read in a child the error, what ran, and what was opened; then the same of a control."""
    command = [sys.executable, "-c", CHILD, str(whole), *map(str, places)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def with_code(whole: Path, place: Path, model_type: str | None) -> Path:
    """A folder whose config names code that lies in it."""
    shutil.copytree(whole, place)
    edit(place, model_type=model_type, **CODE)
    (place / "modeling_evil.py").write_text("raise SystemExit('the canary ran')")
    return place


HOSTILE = [
    *("../out.safetensors", "../../etc/passwd", "/etc/passwd", "a/b.safetensors", "./a.safetensors", "..", ".", ""),
    *("a\0.safetensors", "C:\\x.safetensors", "..\\out.safetensors", "x" * 300, ".hidden.safetensors"),
]


def with_shard(whole: Path, place: Path, name: str) -> Path:
    """A folder whose index names a shard so, and a good file wherever the name may point."""
    shutil.copytree(whole, place)
    store_shards(place, halves(stored(place)))
    (place / "a").mkdir()
    for spot in ("../out.safetensors", "a/b.safetensors", "a.safetensors", ".hidden.safetensors"):
        shutil.copy(place / "part-1.safetensors", place / spot)
    index = json.loads((place / INDEX).read_text())
    names = {"part-0.safetensors": "part-0.safetensors", "part-1.safetensors": name}
    index["weight_map"] = {key: names[shard] for key, shard in index["weight_map"].items()}
    (place / INDEX).write_text(json.dumps(index))
    return place


@pytest.mark.fault("F8", "K12")
def test_nothing_runs_and_nothing_outside_is_opened(whole: Path, tmp_path: Path) -> None:
    code = [with_code(whole, tmp_path / f"code-{name}", name) for name in ("llama", "evil", None)]
    shards = [with_shard(whole, tmp_path / f"{i}" / "model", name) for i, name in enumerate(HOSTILE)]
    *found, (_, ran, opened) = watched(whole, [*code, *shards])
    assert ran and opened, "the hook sees nothing at all"
    assert len(found) == 3 + len(HOSTILE)
    assert [bool(message) for message, _, _ in found[:3]] == [False, True, True]
    for place, (message, ran, opened) in zip([*code, *shards], found, strict=True):
        assert not ran and opened and {Path(path).parent for path in opened} == {place}, (message, ran, opened)
        if place in shards:
            assert message.startswith(f"{place / INDEX} weight_map: shard ") and "a bare file name" in message


# --- F9: config and weights disagree -----------------------------------------------------------------------------

ONE_NUMBER = [
    ("hidden_size", 40, (EMBEDDING, "(61, 32)", "(61, 40)")),
    ("intermediate_size", 64, ("mlp.gate_proj.weight", "(48, 32)", "(64, 32)")),
    ("num_attention_heads", 8, ("self_attn.q_proj.weight", "(32, 32)", "(64, 32)")),
    ("num_attention_heads", 3, ("3 query heads cannot share 2", "num_key_value_heads")),
    ("num_key_value_heads", 4, ("self_attn.k_proj.weight", "(16, 32)", "(32, 32)")),
    ("num_key_value_heads", 3, ("4 query heads cannot share 3", "num_key_value_heads")),
    ("head_dim", 16, ("self_attn.q_proj.weight", "(32, 32)", "(64, 32)")),
    ("head_dim", 7, ("rotary dimension 7", "head_dim")),
    ("vocab_size", 64, (EMBEDDING, "(61, 32)", "(64, 32)")),
    ("num_hidden_layers", 2, ("9 unexpected", "model.layers.2.")),
    ("num_hidden_layers", 4, ("9 missing", "model.layers.3.")),
    ("num_hidden_layers", 1999, ("1999 layers", "at most 30")),
    ("num_hidden_layers", 1 << 40, ("num_hidden_layers", "a number from 1 to 2000")),
    ("hidden_size", 1 << 40, ("self_attn.q_proj.weight", EMBEDDING)),
]


@pytest.mark.fault("F9")
@pytest.mark.parametrize(("key", "value", "parts"), ONE_NUMBER[:-1], ids=[f"{k}={v}" for k, v, _ in ONE_NUMBER[:-1]])
def test_one_number_edited(folder: Path, key: str, value: int, parts: tuple[str, ...]) -> None:
    edit(folder, **{key: value})
    refused(folder, *parts)


@pytest.mark.fault("F9")
def test_sizes_beyond_any_memory(folder: Path) -> None:
    edit(folder, hidden_size=1 << 40, intermediate_size=1 << 40)
    refused(folder, "sizes beyond any memory")


@pytest.mark.fault("F9")
def test_a_longest_sequence_is_no_size_of_rotary_weights(folder: Path) -> None:
    edit(folder, max_position_embeddings=64)
    assert read_folder(folder).config.max_len == 64


OTHERS: list[tuple[str, str, dict[str, Any], dict[str, tuple[int, str, str, str]]]] = [
    (
        "GPT2", "LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 61, "n_positions": 24},
        {"n_positions": (30, "transformer.wpe.weight", "(24, 32)", "(30, 32)"),
         "n_embd": (64, "transformer.wte.weight", "(61, 32)", "(61, 64)"),
         "n_inner": (96, "h.0.mlp.c_fc.weight", "(32, 128)", "(32, 96)")},
    ),
    (
        "ViT", "ForImageClassification",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
         "image_size": 16, "patch_size": 4, "num_labels": 5},
        {"image_size": (32, "position_embeddings", "(1, 17, 32)", "(1, 65, 32)"),
         "patch_size": (8, "patch_embeddings.projection.weight", "(32, 3, 4, 4)", "(32, 3, 8, 8)"),
         "num_channels": (1, "patch_embeddings.projection.weight", "(32, 3, 4, 4)", "(32, 1, 4, 4)")},
    ),
    (
        "T5", "ForConditionalGeneration", T5,
        {"d_kv": (16, "SelfAttention.q.weight", "(32, 32)", "(64, 32)"),
         "num_heads": (8, "SelfAttention.q.weight", "(32, 32)", "(64, 32)"),
         "relative_attention_num_buckets": (16, "relative_attention_bias.weight", "(32, 4)", "(16, 4)"),
         "num_decoder_layers": (3, "missing", "decoder.block.2.", "the")},
    ),
]  # fmt: skip


@pytest.mark.fault("F9")
@pytest.mark.parametrize(("kind", "head", "sizes", "edits"), OTHERS, ids=[other[0] for other in OTHERS])
def test_one_number_edited_in_other_architectures(
    tmp_path: Path, kind: str, head: str, sizes: dict[str, Any], edits: dict[str, tuple[int, str, str, str]]
) -> None:
    saved(tmp_path, kind, head, **sizes)
    config = (tmp_path / CONFIG).read_text()
    for key, (value, *parts) in edits.items():
        (tmp_path / CONFIG).write_text(config)
        read_folder(tmp_path)
        edit(tmp_path, **{key: value})
        refused(tmp_path, *parts)


# --- K7: dtypes --------------------------------------------------------------------------------------------------


@pytest.mark.fault("K7")
def test_a_dtype_other_than_the_configs_is_said_and_kept(folder: Path) -> None:
    assert not read_folder(folder).notes
    edit(folder, dtype=DROP, torch_dtype="bfloat16")
    checkpoint = read_folder(folder)
    (note,) = checkpoint.notes
    assert "bfloat16" in note and "float32" in note and "--dtype" in note
    assert {tensor.dtype for tensor in checkpoint.weights.values()} == {torch.float32}
    cast = read_folder(folder, dtype=torch.bfloat16)
    assert not cast.notes and {tensor.dtype for tensor in cast.weights.values()} == {torch.bfloat16}
    for name, tensor in checkpoint.weights.items():
        assert torch.equal(cast.weights[name], tensor.bfloat16())


@pytest.mark.fault("K7")
@pytest.mark.parametrize("name", ["F4", "Q4_K", "F128", "float32", ""])
def test_unknown_dtypes(folder: Path, name: str) -> None:
    data = (folder / WEIGHTS).read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header[Q_PROJ]["dtype"] = name
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    refused(folder, Q_PROJ, f"unknown dtype {name!r}", "F64", "F32", "BF16", "F8_E4M3")


@pytest.mark.fault("K7")
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.complex64])
@pytest.mark.parametrize("name", [Q_PROJ, NORM])
def test_dtypes_that_are_no_weights(folder: Path, dtype: torch.dtype, name: str) -> None:
    store(folder, stored(folder) | {name: stored(folder)[name].to(dtype)})
    for options in ({}, {"dtype": torch.float32}, {"allow_nonfinite": True}):
        refused(folder, name, str(dtype).removeprefix("torch."), "float64, float32, float16, bfloat16", **options)


@pytest.mark.fault("K7")
def test_float64_and_mixed_dtypes(folder: Path) -> None:
    tensors = {name: tensor.double() for name, tensor in stored(folder).items()}
    store(folder, tensors)
    assert {tensor.dtype for tensor in read_folder(folder).weights.values()} == {torch.float64}
    # What is joined takes the wider dtype of its parts, so nothing is lost.
    store(folder, {name: t if ".k_proj." in name else t.bfloat16() for name, t in tensors.items()})
    checkpoint = read_folder(folder)
    joined = checkpoint.weights["decoder.blocks.1.attention.qkv.weight"]
    assert joined.dtype is torch.float64
    assert torch.equal(joined[32:48], tensors["model.layers.1.self_attn.k_proj.weight"])
    assert "bfloat16 and float64" in checkpoint.notes[0]


# --- K8: missing, unexpected, misshapen --------------------------------------------------------------------------


@pytest.mark.fault("K8")
def test_dropped_renamed_transposed(folder: Path) -> None:
    tensors = stored(folder)
    dropped = [name for name in tensors if ".mlp." in name][:7]
    store(folder, {name: tensor for name, tensor in tensors.items() if name not in dropped})
    text = refused(folder, "7 missing (")
    assert sum(name in text for name in dropped) == 5 and "unexpected" not in text and "look like" not in text
    store(folder, {name.replace("self_attn", "attention"): tensor for name, tensor in tensors.items()})
    text = refused(folder, "12 missing (", "12 unexpected (")
    assert text.count(".self_attn.") == 5 and text.count(".attention.") == 5
    store(folder, tensors | {"extra.weight": torch.zeros(3)})
    assert "missing" not in refused(folder, "1 unexpected (extra.weight)")
    store(folder, {name: t.T if ".mlp." in name else t for name, t in tensors.items()})
    refused(folder, "mlp.gate_proj.weight has shape (32, 48)", "8 others do not fit", "(48, 32)")


FOREIGN: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("ForCausalLM", SIZES),
    "qwen3": ("ForCausalLM", SIZES),
    "gemma2": ("ForCausalLM", SIZES),
    "phi3": ("ForCausalLM", SIZES),
    "gpt2": ("LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 61}),
    "bert": ("ForMaskedLM", SIZES),
    "t5": ("ForConditionalGeneration", T5),
}  # fmt: skip
NAMES = {
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma2": "Gemma2",
    "phi3": "Phi3",
    "gpt2": "GPT2",
    "bert": "Bert",
    "t5": "T5",
}


@pytest.mark.fault("K8")
@pytest.mark.parametrize("model_type", FOREIGN)
def test_weights_of_another_family_are_recognised(folder: Path, tmp_path: Path, model_type: str) -> None:
    head, sizes = FOREIGN[model_type]
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}
    saved(tmp_path / "other", NAMES[model_type], head, **(sizes | ids))
    shutil.copy(tmp_path / "other" / WEIGHTS, folder / WEIGHTS)
    refused(folder, f'the names look like {model_type}: "model_type": "{model_type}"')


# --- K9: pickles -------------------------------------------------------------------------------------------------


class Canary:
    """Runs a command when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.path}",)


def pickled(form: str, path: Path, canary: Path) -> None:
    if form in ("zip", "legacy"):
        torch.save({"a": Canary(canary)}, path, _use_new_zipfile_serialization=form == "zip")
    else:
        path.write_bytes(pickle.dumps({"a": Canary(canary)}, int(form)))


@pytest.mark.fault("K9")
@pytest.mark.parametrize("form", ["zip", "legacy", "2", "4", "5"])
@pytest.mark.parametrize("place", ["file", "shard"])
def test_a_pickle_named_safetensors(folder: Path, tmp_path: Path, form: str, place: str) -> None:
    canary, path = tmp_path / "canary", folder / WEIGHTS
    if place == "shard":
        path = folder / "part-1.safetensors"
        store_shards(folder, halves(stored(folder)))
    pickled(form, path, canary)
    refused(folder, path.name, "pickle", "headway convert --unsafe-pickle")
    assert not canary.exists()
    path = path.rename(tmp_path / "pickle")  # torch goes by the name
    torch.load(path, weights_only=False) if form in ("zip", "legacy") else pickle.loads(path.read_bytes())
    assert canary.exists()  # and it would have run


@pytest.mark.fault("K9")
@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_only_pickles_there(folder: Path, name: str) -> None:
    (folder / WEIGHTS).rename(folder / name)
    refused(folder, name, "pickle", f"headway convert --unsafe-pickle {folder} DST")
    (folder / name).unlink()
    assert "--unsafe-pickle" not in refused(folder, WEIGHTS, "no such file")


def test_a_header_whose_length_looks_like_a_pickle_is_none(folder: Path) -> None:
    """A header of 640 or 17,792 bytes begins with 80 02 or 80 45."""
    data = (folder / WEIGHTS).read_bytes()
    size = int.from_bytes(data[:8], "little")
    for length in (0x1280, 0x0280 + (1 << 16)):
        text = data[8 : 8 + size].ljust(length)
        (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
        assert (folder / WEIGHTS).read_bytes()[:1] == b"\x80" and len(text) == length
        assert len(read_folder(folder).weights) > 3


# --- K11: NaN and infinity ---------------------------------------------------------------------------------------


@pytest.mark.fault("K11")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [Q_PROJ, NORM])
def test_one_value_that_is_no_number(folder: Path, dtype: torch.dtype, value: float, name: str) -> None:
    tensors = {key: tensor.to(dtype) for key, tensor in stored(folder).items()}
    tensors[name].view(-1)[5] = value
    store(folder, tensors)
    refused(folder, f"tensor {name} holds 1 values that are NaN or infinite", "--allow-nonfinite")
    checkpoint = read_folder(folder, allow_nonfinite=True)
    assert sum(int((~tensor.isfinite()).sum()) for tensor in checkpoint.weights.values()) == 1


@pytest.mark.fault("K11")
def test_counted_where_infinities_cancel_and_none_where_only_the_sum_overflows(folder: Path) -> None:
    tensors = stored(folder)
    tensors[NORM][:3] = torch.tensor([float("inf"), float("-inf"), float("nan")])
    store(folder, tensors)
    refused(folder, f"tensor {NORM} holds 3 values")
    tensors[NORM] = torch.full_like(tensors[NORM], 3e38)
    store(folder, tensors)
    assert read_folder(folder).weights["decoder.blocks.2.attention_residual.before.weight"].max() == 3e38


# --- K15: what is no file ----------------------------------------------------------------------------------------

NO_FILE: dict[str, Callable[[Path], object]] = {
    "fifo": os.mkfifo,
    "folder": Path.mkdir,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "loop": lambda path: path.symlink_to(path),
    "socket": lambda path: socket.socket(socket.AF_UNIX).bind(str(path)),
    "nothing": lambda path: None,
}


@pytest.mark.fault("K15")
@pytest.mark.parametrize("kind", NO_FILE)
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, INDEX, "part-1.safetensors"])
def test_what_is_no_file_is_not_waited_for(folder: Path, monkeypatch: Any, kind: str, name: str) -> None:
    if name in (INDEX, "part-1.safetensors"):
        store_shards(folder, halves(stored(folder)))
    (folder / name).unlink()
    monkeypatch.chdir(folder)  # the path of a socket is short
    NO_FILE[kind](Path(name))
    signal.alarm(5)
    try:
        refused(folder, WEIGHTS if kind == "nothing" and name == INDEX else name)
    finally:
        signal.alarm(0)


@pytest.mark.fault("K15")
def test_a_path_that_is_no_folder(whole: Path, tmp_path: Path) -> None:
    for place in (whole / CONFIG, tmp_path / "absent", tmp_path / ("x" * 300), Path("/dev/null")):
        with pytest.raises(InputError) as caught:
            read_folder(place)
        assert str(place) in str(caught.value)
