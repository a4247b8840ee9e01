"""CTranslate2: a file written by hand, every way to spoil it; Whisper under the names transformers writes."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from mutants import in_little_memory, mutant
from torch import Tensor
from transformers import WhisperConfig, WhisperForConditionalGeneration

from headway import files
from headway.checkpoints.ctranslate2 import DTYPES, Ct2File, read_ctranslate2
from headway.checkpoints.foreign import read_foreign
from headway.errors import InputError


def name(text: str | bytes, end: bytes = b"\0") -> bytes:
    content = (text.encode() if isinstance(text, str) else text) + end
    return struct.pack("<H", len(content)) + content


def variable(title: str | bytes, value: Tensor, **other: int) -> bytes:
    """`other` replaces what is written for rank, kind, size."""
    data = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    sizes = struct.pack(f"<{value.dim()}I", *value.shape)
    kind, size = other.get("kind", DTYPES.index(value.dtype)), other.get("size", len(data))
    head = title if isinstance(title, bytes) else name(title)
    return head + bytes([other.get("rank", value.dim())]) + sizes + struct.pack("<BI", kind, size) + data


def model(
    variables: list[bytes],
    aliases: Mapping[str, str] | None = None,
    spec: bytes = name("WhisperSpec"),
    version: int = 6,
) -> bytes:
    pairs = [name(alias) + name(owner) for alias, owner in (aliases or {}).items()]
    head = struct.pack("<I", version) + spec + struct.pack("<II", 3, len(variables))
    return head + b"".join(variables) + struct.pack("<I", len(pairs)) + b"".join(pairs)


def store(path: Path, data: bytes) -> Path:
    files.write(path, data)
    return path


@pytest.mark.parametrize("padding", range(4))
def test_every_type_wherever_it_lies(tmp_path: Path, padding: int) -> None:
    wanted = {f"{'p' * padding}x/{dtype}": torch.tensor([[1, -2], [3, 4]]).to(dtype) for dtype in DTYPES}
    wanted |= {"scalar": torch.tensor(7, dtype=torch.int16), "empty": torch.empty(0, 3), "é": torch.ones(1)}
    data = model([variable(title, value) for title, value in wanted.items()], {"also": "é"})
    found = read_ctranslate2(store(tmp_path / "model.bin", data))
    assert found == Ct2File(6, "WhisperSpec", 3, found.tensors, {"also": "é"}) and list(found.tensors) == list(wanted)
    for title, value in wanted.items():
        read = found.tensors[title]
        assert read.dtype == value.dtype and read.shape == value.shape and read.equal(value)
    found.tensors["é"].zero_()
    assert (tmp_path / "model.bin").read_bytes() == data  # the mapping is private


A = variable("a", torch.ones(2))
MALFORMED: list[tuple[str, bytes, str]] = [
    ("empty", b"", "0 bytes"),
    ("version 5", model([A], version=5), "version 5; expected a CTranslate2 model of version 6. Fix: convert"),
    ("a specification without a name", model([A], spec=name("")), "a name of 1 bytes"),
    ("K4 trailing", model([A]) + b"\0", "1 bytes that belong to nothing"),
    ("K6 twice", model([A, A]), "tensor 'a' again"),
    ("K6 name without end", model([variable(name("ab", b"c"), torch.ones(1))]), "closing NUL"),
    ("K6 NUL inside", model([variable("a\0b", torch.ones(1))]), "printable"),
    ("K6 not UTF-8", model([variable(name(b"\xff\xfe"), torch.ones(1))]), "not UTF-8"),
    ("K6 long name", model([variable("n" * 5000, torch.ones(1))]), "a name of 5001 bytes"),
    ("K7 type 6", model([variable("a", torch.ones(1), kind=6)]), "type 6 at byte 40; expected 0 to 5"),
    ("rank", model([variable("a", torch.ones(1), rank=200)]), "rank 200"),
    ("size too small", model([variable("a", torch.ones(2), size=4)]), r"4 bytes for torch.float32 \[2\]"),
    ("size beyond the file", model([variable("a", torch.ones(2), size=1 << 31)]), "2147483648 bytes for"),
    ("alias of nothing", model([A], {"b": "c"}), "alias 'b' of 'c'"),
    ("alias of an alias", model([A], {"b": "a", "c": "b"}), "alias 'c' of 'b'"),
    ("alias with a variable's name", model([A], {"a": "a"}), "alias 'a'"),
    ("aliases beyond the file", model([A])[:-4] + b"\xff" * 4, "the count of aliases 4294967295"),
]


@pytest.mark.fault("K4", "K6", "K7")
@pytest.mark.parametrize(("data", "found"), [row[1:] for row in MALFORMED], ids=[row[0] for row in MALFORMED])
def test_malformed(tmp_path: Path, data: bytes, found: str) -> None:
    with pytest.raises(InputError, match=found) as caught:
        read_ctranslate2(store(tmp_path / "f", data))
    assert str(caught.value).startswith(str(tmp_path / "f")) and len(str(caught.value)) < 400
    assert list(read_ctranslate2(store(tmp_path / "control", model([A]))).tensors) == ["a"]


@pytest.mark.fault("K1")
def test_cut_at_any_byte(tmp_path: Path) -> None:
    whole = model([A, variable("b", torch.ones(3, dtype=torch.float16))], {"c": "a"})
    for cut in range(len(whole)):
        with pytest.raises(InputError, match=f"{cut} bytes|in the .+ bytes left"):
            read_ctranslate2(store(tmp_path / "f", whole[:cut]))


@pytest.mark.fault("K2")
def test_counts_beyond_the_bytes_take_no_memory(tmp_path: Path) -> None:
    huge = struct.pack("<I", 0xFFFFFFFF)
    head = struct.pack("<I", 6) + name("WhisperSpec") + struct.pack("<I", 3)
    one = name("a") + b"\2" + huge * 2 + b"\0" + huge
    bombs = [head + huge + bytes(64), head + struct.pack("<I", 1) + one + bytes(64), model([A])[:-4] + huge + bytes(64)]
    for number, bomb in enumerate(bombs):
        path = store(tmp_path / f"{number}", bomb)
        assert in_little_memory(lambda path=path: read_ctranslate2(path)) == InputError.exit_code
    # control: who believes the count runs out of memory
    assert in_little_memory(lambda: np.empty(0xFFFFFFFF, np.uint8)) == 99


# --- Whisper ---------------------------------------------------------------------------------------------------------

TOKENS = {"<|endoftext|>": 40, "<|startoftranscript|>": 41, "<|notimestamps|>": 45}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[WhisperConfig, dict[str, Tensor]]:
    """A small model as transformers saves it."""
    config = WhisperConfig(
        vocab_size=60, num_mel_bins=8, d_model=12, encoder_layers=2, decoder_layers=1, encoder_attention_heads=3,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=20, max_source_positions=10,
        max_target_positions=9, bos_token_id=40, eos_token_id=40, pad_token_id=40, decoder_start_token_id=41,
        suppress_tokens=[1, 2], begin_suppress_tokens=[5, 40],
    )  # fmt: skip
    made = WhisperForConditionalGeneration(config).half()
    for parameter in made.parameters():
        parameter.data.normal_()
    folder = tmp_path_factory.mktemp("whisper")
    made.save_pretrained(folder)
    return config, safetensors.torch.load_file(folder / "model.safetensors")


def converted(state: Mapping[str, Tensor], heads: tuple[int, int] = (3, 2)) -> dict[str, Tensor]:
    """What CTranslate2's converter makes of it: projections of one input joined, zeros for the keys' bias."""
    scopes = {"self_attn.": "self_attention/", "encoder_attn.": "attention/"}
    made: dict[str, Tensor] = {}
    for title, value in state.items():
        side, *inner, leaf = title.removeprefix("model.").split(".")
        at = f"{side}/layer_{inner[1]}/" if inner[0] == "layers" else f"{side}/"
        here = ".".join(inner[2:]) if inner[0] == "layers" else inner[0]
        leaf = {"weight": "gamma", "bias": "beta"}[leaf] if "layer_norm" in here else leaf
        place = {
            "embed_positions": "position_encodings", "embed_tokens": "embeddings", "layer_norm": "layer_norm",
            "fc1": "ffn/linear_0", "fc2": "ffn/linear_1", "final_layer_norm": "ffn/layer_norm",
            "self_attn_layer_norm": "self_attention/layer_norm", "encoder_attn_layer_norm": "attention/layer_norm",
            "self_attn.out_proj": "self_attention/linear_1", "encoder_attn.out_proj": "attention/linear_2",
            "encoder_attn.q_proj": "attention/linear_0", "conv1": "conv1", "conv2": "conv2",
        }.get(here)  # fmt: skip
        if place:
            made[f"{at}{place}/{'encodings' if place == 'position_encodings' else leaf}"] = value
        elif here.endswith("v_proj"):
            base = title.rpartition(".v_proj")[0]
            key = state[f"{base}.k_proj.weight"] if leaf == "weight" else torch.zeros_like(value)
            parts = [key, value]
            if here.startswith("self_attn"):
                parts.insert(0, state[f"{base}.q_proj.{leaf}"])
            number = 0 if here.startswith("self_attn") else 1
            made[f"{at}{scopes[here.removesuffix('v_proj')]}linear_{number}/{leaf}"] = torch.cat(parts)
    for side, count in zip(("encoder", "decoder"), heads, strict=True):
        made[f"{side}/num_heads"] = torch.tensor(count, dtype=torch.int16)
    flags = {"activation": 3, "alibi": 0, "pre_norm": 1, "scale_embeddings": 0, "start_from_zero_embedding": 0}
    made |= {f"decoder/{flag}": torch.tensor(on, dtype=torch.int8) for flag, on in flags.items()}
    return made | {"decoder/alignment_layer": torch.tensor(-1, dtype=torch.int16)}


def folder_of(folder: Path, variables: Mapping[str, Tensor], **other: Any) -> Path:
    folder.mkdir(exist_ok=True)
    aliases = {"decoder/projection/weight": "decoder/embeddings/weight"}
    store(folder / "model.bin", model([variable(title, value) for title, value in sorted(variables.items())], aliases))
    tokens = other.get("tokens", [{"id": number, "content": text} for text, number in TOKENS.items()])
    store(folder / "tokenizer.json", json.dumps({"added_tokens": tokens, "model": {}}).encode())
    config = other.get("config", {"suppress_ids": [1, 2], "suppress_ids_begin": [5, 40], "lang_ids": [7]})
    store(folder / "config.json", json.dumps(config).encode())
    return folder


def test_whisper_as_transformers_saves_it(tmp_path: Path, published: tuple[WhisperConfig, dict[str, Tensor]]) -> None:
    config, state = published
    folder = folder_of(tmp_path / "w", converted(state))
    found, tensors, beside = read_foreign(folder)
    assert tensors.keys() == state.keys() and all(tensors[title].equal(state[title]) for title in state)
    assert all(found[key] == getattr(config, key) for key in found.keys() - {"architectures", "dtype"})
    assert found["dtype"] == "float16" and beside == {"tokenizer.json": folder / "tokenizer.json"}
    again, same, _ = read_foreign(folder / "model.bin")
    assert again == found and same.keys() == tensors.keys()
    assert "forced_decoder_ids" not in found  # only an English-only vocabulary forces a start


def test_whisper_of_english_only_starts_without_timestamps(
    tmp_path: Path, published: tuple[WhisperConfig, dict[str, Tensor]]
) -> None:
    variables = converted(published[1]) | {"decoder/embeddings/weight": torch.zeros(51864, 12, dtype=torch.float16)}
    assert read_foreign(folder_of(tmp_path / "w", variables))[0]["forced_decoder_ids"] == [[1, 45]]


Q = "decoder/layer_0/self_attention/linear_0"
WRONG: list[tuple[str, dict[str, Tensor | None], dict[str, Any], str]] = [
    ("keys with a bias", {f"{Q}/bias": torch.ones(36)}, {}, "biases the keys"),
    ("quantized", {f"{Q}/weight_scale": torch.ones(36)}, {}, "weight_scale.*--quantization float16"),
    ("unknown tensor", {"decoder/layer_0/moe/linear": torch.ones(2)}, {}, "moe"),
    ("unknown number", {"decoder/sliding_window": torch.tensor(3, dtype=torch.int16)}, {}, "sliding_window"),
    ("rows that do not part", {f"{Q}/weight": torch.ones(35, 12)}, {}, r"\[35, 12\]"),
    ("NaN for a number", {"decoder/alignment_layer": torch.tensor(float("nan"))}, {}, "alignment_layer"),
    ("number for a tensor", {f"{Q}/weight": torch.tensor(1.0)}, {}, "linear_0/weight"),
    ("number for a norm", {"decoder/layer_norm/gamma": torch.tensor(1.0)}, {}, "layer_norm/gamma"),
    ("no rows", {f"{Q}/weight": torch.empty(0, 12)}, {}, "linear_0/weight"),
    ("layer 0 twice", {"decoder/layer_00/ffn/linear_0/bias": torch.ones(20)}, {}, "layer_00"),
    ("post-norm", {"decoder/pre_norm": torch.tensor(0, dtype=torch.int8)}, {}, "decoder/pre_norm is 0; expected 1"),
    ("no heads", {"encoder/num_heads": None}, {}, "encoder/num_heads 0"),
    ("heads do not part", {"encoder/num_heads": torch.tensor(5, dtype=torch.int16)}, {}, "num_heads 5"),
    ("no convolution", {"encoder/conv1/weight": None}, {}, "no tensor model.encoder.conv1.weight"),
    ("flat convolution", {"encoder/conv1/weight": torch.ones(12, 8)}, {}, "3 sizes"),
    ("no tokens", {}, {"tokens": []}, "endoftext.*token id None"),
    (
        "token beyond the rows",
        {},
        {"tokens": [{"id": 60, "content": "<|endoftext|>"}]},
        "token id 60; expected 0 to 59",
    ),
    ("token id true", {}, {"tokens": [{"id": True, "content": "<|endoftext|>"}]}, "token id True"),
    ("tokens no list", {}, {"tokens": {}}, "added_tokens"),
    ("suppressed beyond", {}, {"config": {"suppress_ids": [-1]}}, "suppress_ids.*token id -1"),
    ("config no object", {}, {"config": []}, "config.json"),
]


@pytest.mark.fault("F9", "K8", "T6")
@pytest.mark.parametrize(("change", "other", "found"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG])
def test_a_file_that_is_no_whisper(
    tmp_path: Path,
    published: tuple[WhisperConfig, dict[str, Tensor]],
    change: dict[str, Tensor | None],
    other: dict[str, Any],
    found: str,
) -> None:
    variables = {t: v for t, v in (converted(published[1]) | change).items() if v is not None}
    with pytest.raises(InputError, match=found) as caught:
        read_foreign(folder_of(tmp_path / "w", variables, **other))
    assert str(caught.value).startswith(str(tmp_path / "w"))


def test_what_is_neither(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"a pickle, which can run code.*convert --unsafe-pickle"):
        read_foreign(tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="'TransformerSpec'; expected WhisperSpec"):
        read_foreign(store(tmp_path / "model.bin", model([A], spec=name("TransformerSpec"))))
    with pytest.raises(InputError, match="no such file"):
        read_foreign(tmp_path / "nothing.onnx")


@pytest.mark.fault("K18")
def test_mutants_give_our_error_or_tensors(tmp_path: Path, published: tuple[WhisperConfig, dict[str, Tensor]]) -> None:
    folder = folder_of(tmp_path / "w", converted(published[1]))
    whole = (folder / "model.bin").read_bytes()
    rng = random.Random(0)
    fine = 0
    for _ in range(300):
        store(folder / "model.bin", mutant(whole, rng))
        try:
            read_foreign(folder)
            fine += 1
        except InputError as error:
            assert str(folder) in str(error)
    assert 0 < fine < 300
