"""`headway embed`: texts from flags, a file or a pipe; vectors as JSON lines, one object, or a .npy file."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_loading import MODES, published, sentence_transformer

import headway
from headway import api

TEXTS = ["the quick brown fox", "dog", "", "the dog sleeps in the sun until the evening comes"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return sentence_transformer(tmp_path / "st", [MODES["mean"]], True)


def expected(folder: Path, texts: list[str] = TEXTS) -> np.ndarray:
    return headway.embed(headway.load(folder), texts).numpy()


def pipe(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def flags(texts: list[str]) -> list[str]:
    return [word for text in texts for word in ("--text", text)]


def test_lines_of_json(command, folder: Path) -> None:
    said = command("embed", folder, *flags(TEXTS))
    assert said.code == 0, said.err
    lines = [json.loads(line) for line in said.out.splitlines()]
    assert np.array_equal(np.array(lines, np.float32), expected(folder))


def test_one_object(command, folder: Path) -> None:
    found = command("embed", folder, *flags(TEXTS), "--json").json
    assert (found["texts"], found["size"]) == (4, 32) and found["seconds"] > 0
    assert np.array_equal(np.array(found["embeddings"], np.float32), expected(folder))


@pytest.mark.parametrize("as_json", [True, False])
def test_an_npy_file(command, folder: Path, as_json: bool) -> None:
    said = command("embed", folder, *flags(TEXTS), "--output", "v.npy", *(["--json"] if as_json else []))
    assert said.code == 0
    if as_json:
        assert "embeddings" not in said.json and said.json["texts"] == 4
    else:
        assert said.out.startswith("v.npy: 4 x 32 in ")
    found = np.load("v.npy", allow_pickle=False)
    assert found.dtype == np.float32 and np.array_equal(found, expected(folder))
    assert [path.name for path in Path().iterdir() if path.name.startswith((".tmp", "v"))] == ["v.npy"]


@pytest.mark.parametrize(
    ("data", "texts"),
    [
        (b"the fox\ndog\n", ["the fox", "dog"]),
        (b"the fox\ndog", ["the fox", "dog"]),
        (b"the fox\r\ndog\r\n", ["the fox", "dog"]),
        (b"a\n\nb\n", ["a", "", "b"]),
        ("one\u2028line\x0chere\x85too\n".encode(), ["one\u2028line\x0chere\x85too"]),
        ("\ufeffthe fox\n".encode(), ["the fox"]),
    ],
    ids=["lines", "no end", "CRLF", "an empty one", "other separators", "BOM"],
)
@pytest.mark.fault("C5", "C6")
@pytest.mark.parametrize("way", ["file", "pipe"])
def test_one_text_a_line(
    command, folder: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, texts: list[str], way: str
) -> None:
    """From a file or a pipe; only line breaks break lines, so the vectors have the numbers of the lines."""
    seen: list[list[str]] = []
    real = api.embed
    monkeypatch.setattr(api, "embed", lambda loaded, given, **more: seen.append(given) or real(loaded, given, **more))
    Path("lines.txt").write_bytes(data)
    pipe(monkeypatch, data if way == "pipe" else b"something else\n")
    found = command("embed", folder, *(["--input", "lines.txt"] if way == "file" else []), "--json").json
    assert seen == [texts] and found["texts"] == len(texts)
    assert np.allclose(found["embeddings"], expected(folder, texts), atol=1e-6)


def test_nothing_in_a_pipe_is_no_texts(command, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe(monkeypatch, b"")
    found = command("embed", folder, "--json").json
    assert found["texts"] == 0 and found["embeddings"] == [] and found["size"] == 32
    pipe(monkeypatch, b"")
    assert command("embed", folder, "--output", "none.npy").code == 0 and np.load("none.npy").shape == (0, 32)


def test_a_terminal_is_asked_for_no_texts(command, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for stdin in (SimpleNamespace(isatty=lambda: True), None):
        monkeypatch.setattr(sys, "stdin", stdin)
        said = command("embed", folder)
        assert said.code == 2 and "--text" in said.error and "--input FILE" in said.error


@pytest.mark.parametrize(
    ("words", "code", "parts"),
    [
        (["embed", "-t", "x"], 2, ["PATH", "no path"]),
        (["embed", "st", "st", "-t", "x"], 2, ["2 paths"]),
        (["embed", "sst", "-t", "x"], 3, ["no such file", "did you mean 'st'"]),
        (["embed", "st", "--input", "missing.txt"], 3, ["missing.txt", "no such file"]),
        (["embed", "st", "--input", "st"], 3, ["a folder"]),
        (["embed", "st", "--input", "latin"], 3, ["latin", "invalid UTF-8 at byte 3"]),
        (["embed", "st", "-t", "x", "--dtype", "int8"], 2, ["'int8'", "bfloat16"]),
        (["embed", "st", "-t", "x", "--device", "tpu9"], 2, ["'tpu9'", "cpu or cuda"]),
        (["embed", "st", "-t", "x", "--device", "cuda:77"], 4, ["cuda:77", "--device cpu"]),
        (["embed", "st", "-t", "x", "--threads", "0"], 2, ["--threads"]),
        (["embed", "st", "-t", "x", "--output", "/proc/v.npy"], 4, ["/proc"]),
        (["embed", "st", "-t", "caf\udce9"], 3, ["not valid Unicode"]),
        (["embed", "vit", "-t", "x"], 2, ["vision gives no vector of a text"]),
        (["embed", "t5", "-t", "x"], 2, ["encoder-decoder gives no vector of a text"]),
        (["embed", "st", "txt=x"], 2, ["did you mean 'text'"]),
    ],
    ids=lambda value: " ".join(value)[6:40].encode("ascii", "replace").decode() if isinstance(value, list) else "",
)
@pytest.mark.fault("C4", "T10")
def test_wrong_usage(command, folder: Path, words: list[str], code: int, parts: list[str]) -> None:
    published(Path("vit"), "ViTForImageClassification", None)
    published(Path("t5"), "T5ForConditionalGeneration")
    Path("latin").write_bytes(b"ok\n\xff")
    said = command(*words)
    assert said.code == code and said.out == "" and all(part in said.error for part in parts), said.err


def test_dtype_threads_and_names(command, folder: Path) -> None:
    """bfloat16 is near float32 and not equal; options go by name too; the number of threads changes nothing here."""
    exact = command("embed", folder, "-t", TEXTS[0], "--json", "--threads", 1).json["embeddings"]
    half = command("embed", folder, "-t", TEXTS[0], "json=true", "dtype=bfloat16").json["embeddings"]
    difference = np.abs(np.array(exact) - np.array(half)).max()
    assert 0 < difference < 0.03
    assert torch.get_num_threads() == 1


def test_progress_goes_to_stderr(command, folder: Path) -> None:
    said = command("embed", folder, *flags(TEXTS * 40), "--json")
    assert len(said.json["embeddings"]) == 160 and "Traceback" not in said.err


def test_a_decoder_and_a_trained_run(command, trained: Path) -> None:
    """The mean of the last states over the text's tokens, of length one."""
    found = command("embed", trained, "-t", "the cat sat on a mat", "-t", "birds", "--json").json
    loaded = headway.load(trained)
    for vector, text in zip(found["embeddings"], ("the cat sat on a mat", "birds"), strict=True):
        with torch.no_grad():
            states = loaded.model(torch.tensor([loaded.words.encode(text)])).hidden[0]
        mean = states.mean(0)
        assert np.allclose(vector, mean / mean.norm(), atol=1e-5)


@pytest.mark.parametrize("form", ["hf", "gguf", "headway"])
def test_every_form_gives_the_same_vectors(command, folder: Path, form: str) -> None:
    assert command("convert", folder, "other", "--to", form).code == 0
    one, other = (command("embed", path, *flags(TEXTS), "--json").json["embeddings"] for path in (folder, "other"))
    assert one == other
