"""`headway convert`: every form from every form, what was loaded is what is written, pickles only on demand."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_injection import in_child
from test_loading import MODES, inputs, logits, published, sentence_transformer, theirs
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

import headway
from headway.checkpoints.folder import newest_good
from headway.checkpoints.tensors import read_header, read_tensors, write_tensors
from headway.loading import Loaded

KEYS = {"path", "form", "family", "bytes"}


def same(one: Loaded, other: Loaded) -> None:
    left, right = one.model.state_dict(), other.model.state_dict()
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    assert torch.equal(logits(one), logits(other))


@pytest.mark.parametrize("to", ["hf", "gguf", "headway"])
@pytest.mark.parametrize("source", ["hf", "gguf", "headway"])
def test_every_form_from_every_form(command, tmp_path: Path, source: str, to: str) -> None:
    published(tmp_path / "model", "LlamaForCausalLM-tied")
    first = headway.load("model")
    if source != "hf":
        assert command("convert", "model", "source", "--to", source).code == 0
        shutil.rmtree("model")
        Path("source").rename("model")
    said = command("convert", "model", "out", "--to", to, "--json").json
    assert said.keys() == KEYS and (said["path"], said["form"], said["family"]) == ("out", to, "llama")
    place = Path("out")
    parts = [place] if place.is_file() else [file for file in place.rglob("*") if file.is_file()]
    assert said["bytes"] == sum(file.stat().st_size for file in parts) > 10_000
    again = headway.load("out")
    same(again, first)
    assert again.weights_sha256 == first.weights_sha256 and again.words.chat_template == first.words.chat_template


def test_what_is_said_to_people(command, tmp_path: Path) -> None:
    published(tmp_path / "in", "LlamaForCausalLM")
    said = command("convert", "in", "model.gguf")  # the suffix alone is enough
    assert said.code == 0 and said.out.startswith("model.gguf: gguf, ") and said.out.count("\n") == 1
    assert headway.load("model.gguf").form == "gguf" and Path("model.gguf").read_bytes()[:4] == b"GGUF"
    assert command("convert", "in", "folder.gguf", "--to", "hf").code == 0 and Path("folder.gguf").is_dir()
    assert command("convert", "in", "by-name", "to=headway", "dtype=float16").code == 0
    assert headway.load("by-name").model.decoder.norm.weight.dtype is torch.float16


@pytest.mark.parametrize(
    ("to", "dtype"),
    [(to, dtype) for to in ("hf", "headway") for dtype in ("float32", "float16", "bfloat16")]
    + [("gguf", dtype) for dtype in ("float32", "float16", "bfloat16", "q8_0", "q4_0", "q4_1", "Q8_0")],
)
def test_dtypes(command, tmp_path: Path, to: str, dtype: str) -> None:
    published(tmp_path / "in", "LlamaForCausalLM")
    assert command("convert", "in", "out", "--to", to, "--dtype", dtype).code == 0
    first, again = headway.load("in"), headway.load("out", dtype=torch.float32)
    name = "decoder.blocks.0.attention.output.weight"
    one, other = (loaded.model.state_dict()[name] for loaded in (first, again))
    if dtype in ("float32", "float16", "bfloat16"):
        assert torch.equal(other, one.to(getattr(torch, dtype)).float())
    else:
        steps = {"q8_0": 254, "q4_0": 15, "q4_1": 15}[dtype.lower()]
        assert 0 < (one - other).abs().max() <= 2 * one.abs().max() / steps


@pytest.mark.parametrize(
    ("words", "code", "parts"),
    [
        ([], 2, ["0 paths", "SRC and DST"]),
        (["in"], 2, ["1 paths", "SRC and DST"]),
        (["in", "out", "more", "--to", "hf"], 2, ["3 paths"]),
        (["in", "out"], 2, ["--to: missing", "hf, gguf or headway"]),
        (["in", "out", "--to", "onnx"], 2, ["'onnx'", "hf, gguf, headway"]),
        (["in", "out", "--to", "hf", "--dtype", "q8_0"], 2, ["'q8_0'", "float16"]),
        (["in", "out.gguf", "--dtype", "q2_k"], 2, ["'q2_k'", "q4_0"]),
        (["in", "out", "--to", "hf", "--family", "lama"], 2, ["'lama'", "llama"]),
        (["in", "out", "--to", "hf", "--family", "bert"], 2, ["bert has no decoder with head causal-lm"]),
        (["in", "out", "--to", "hf", "--fmaily", "bert"], 2, ["--family"]),
        (["in", "out", "--to", "hf", "dytpe=float16"], 2, ["did you mean 'dtype'"]),
        (["inn", "out", "--to", "hf"], 3, ["no such file", "did you mean 'in'"]),
        (["text", "out", "--to", "hf"], 3, ["text"]),
        (["in", "taken", "--to", "hf"], 4, ["exists", "--overwrite"]),
        (["in", "taken", "--to", "headway"], 4, ["exists", "--overwrite"]),
        (["in", "taken", "--to", "gguf"], 4, ["exists", "--overwrite"]),
        (["in", "taken", "--to", "hf", "--overwrite"], 4, ["holds files but no config.json"]),
        (["in", "/proc/out", "--to", "headway"], 4, ["/proc"]),
        (["x" * 300, "out", "--to", "hf"], 3, ["cannot be read"]),
        (["in", "y" * 300, "--to", "headway"], 4, ["yyy"]),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else str(value),
)
@pytest.mark.fault("S4", "S13", "K15")
def test_wrong_usage(command, tmp_path: Path, words: list[str], code: int, parts: list[str]) -> None:
    published(tmp_path / "in", "LlamaForCausalLM")
    Path("text").write_text("hello")
    Path("taken").mkdir()
    Path("taken/thesis.txt").write_text("precious")
    said = command("convert", *words)
    assert said.code == code and said.out == "" and all(part in said.error for part in parts), said.err
    assert Path("taken/thesis.txt").read_text() == "precious" and not Path("out").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".tmp-")]


@pytest.mark.fault("S13")
@pytest.mark.parametrize("to", ["hf", "gguf", "headway"])
def test_overwrite(command, tmp_path: Path, to: str) -> None:
    published(tmp_path / "in", "LlamaForCausalLM")
    assert command("convert", "in", "out", "--to", to, "--dtype", "float16").code == 0
    assert command("convert", "in", "out", "--to", to).code == 4
    assert headway.load("out").model.embeddings.tokens.weight.dtype is torch.float16
    assert command("convert", "in", "out", "--to", to, "--overwrite").code == 0
    same(headway.load("out"), headway.load("in"))


def test_family(command, tmp_path: Path) -> None:
    published(tmp_path / "in", "LlamaForCausalLM")
    assert command("convert", "in", "run", "--to", "headway", "--json").json["family"] == "llama"
    said = command("convert", "in", "out", "--to", "hf", "--family", "mistral", "--json").json
    assert said["family"] == "mistral" == json.loads(Path("out/config.json").read_text())["model_type"]
    same(headway.load("out"), headway.load("in"))


def test_notes_are_said_beside_the_result(command, tmp_path: Path) -> None:
    folder = sentence_transformer(tmp_path / "in", [MODES["last"]], True, "LlamaForCausalLM")
    said = command("convert", folder, "out", "--to", "hf", "--json")
    assert said.json["form"] == "hf" and "note: " in said.err and "1_Pooling" in said.err


# --- a run that was trained here ---------------------------------------------------------------------------------


def test_a_trained_run_goes_where_it_can(command, trained: Path) -> None:
    """As a run always, to the bit, with its step; as another's only where a family has what it is made of."""
    said = command("convert", trained, "again", "--to", "headway", "--json").json
    assert said["family"] == "" and said["form"] == "headway"
    first, again = headway.load(trained), headway.load("again")
    same(again, first)
    assert again.step == first.step == 40 and again.weights_sha256 == newest_good(trained).manifest.weights
    for to in ("hf", "gguf"):
        refused = command("convert", trained, f"as-{to}", "--to", to)
        if refused.code:
            assert refused.code == 2 and "cannot express" in refused.error and " against " in refused.error
            assert not Path(f"as-{to}").exists()
        else:
            same(headway.load(f"as-{to}"), first)


LLAMA = ("model.norm=rmsnorm", "model.feed_forward=swiglu", "model.positions=rope", "model.placement=pre")


def test_a_run_made_of_llamas_parts_becomes_one(command, corpus: Path) -> None:
    """Trained by `headway train`, then in transformers' class the same answers, and in both other forms to the bit."""
    from transformers import LlamaForCausalLM

    sizes = ("data.context=32", "model.d_model=32", "model.n_layers=1", "model.n_heads=2", "model.d_ff=64")
    settings = ("train.batch_size=4", "train.sample_tokens=0", "train.steps=3", "tokenizer.vocab_size=300")
    parts = (*LLAMA, "model.attention.qk_norm=none", "model.attention.bias=false")
    made = command("train", f"data.path={corpus}", *sizes, *settings, *parts, "--output", "run")
    assert made.code == 0, made.err
    said = command("convert", "run", "hf", "--to", "hf")
    assert said.code == 0, said.err
    run, hf = headway.load("run"), headway.load("hf")
    same(hf, run)
    assert hf.family == "llama" and hf.words.hash == run.words.hash
    model, loading = LlamaForCausalLM.from_pretrained("hf", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    ids = torch.tensor([run.words.encode("the cat sat on a mat")])
    with torch.no_grad():
        expected = model.eval()(ids).logits
        assert (run.model(ids).logits - expected).abs().max() < 1e-5 * expected.abs().max()
    assert command("convert", "run", "m.gguf").code == 0
    same(headway.load("m.gguf"), run)


# --- other containers --------------------------------------------------------------------------------------------


def pickled(place: Path, form: str = "zip") -> Path:
    """A folder as libraries wrote it before safetensors."""
    folder = published(place, "LlamaForCausalLM")
    weights = read_tensors(folder / "model.safetensors", copy=True)
    torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=form == "zip")
    (folder / "model.safetensors").unlink()
    return folder


@pytest.mark.fault("K9", "K10")
@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_pickled_weights(command, tmp_path: Path, form: str) -> None:
    """Not without the flag; with it, from the folder or the file, the very weights."""
    pickled(tmp_path / "old", form)
    published(tmp_path / "new", "LlamaForCausalLM")
    said = command("convert", "old", "out", "--to", "hf")
    assert (
        said.code == 3 and "pickled weights" in said.error and "headway convert --unsafe-pickle old DST" in said.error
    )
    source = "old" if form == "zip" else "old/pytorch_model.bin"
    said = command("convert", "--unsafe-pickle", source, "out", "--to", "hf", "--json")
    assert said.json["family"] == "llama"
    same(headway.load("out"), headway.load("new"))
    assert headway.load("out").words.hash == headway.load("new").words.hash
    said = command("convert", "old/pytorch_model.bin", "out2", "--to", "hf")
    assert said.code == 3 and "a pickle" in said.error


class Canary:
    """A pickle of it runs a command where it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.fault("K9", "K10")
@pytest.mark.parametrize(
    ("name", "form"),
    [("pytorch_model.bin", "zip"), ("pytorch_model.bin", "legacy"), ("model.safetensors", "zip"), ("model.bin", "zip")],
)
def test_a_hostile_pickle_does_not_run(command, tmp_path: Path, form: str, name: str) -> None:
    """Under any name, with the flag and without it; and the control, that it would."""
    folder = published(tmp_path / "evil", "LlamaForCausalLM")
    (folder / "model.safetensors").unlink()
    canary = tmp_path / "canary"
    hostile = {"a": torch.ones(1), "b": Canary(canary)}
    torch.save(hostile, folder / name, _use_new_zipfile_serialization=form == "zip")
    asked = "evil" if name == "pytorch_model.bin" else f"evil/{name}"
    for words in (["evil"], [f"evil/{name}"], ["--unsafe-pickle", asked]):
        for verb in ("convert", "inspect", "generate"):
            if verb != "convert" and "--unsafe-pickle" in words:
                continue
            more = {"convert": ["out", "--to", "hf"], "inspect": [], "generate": ["-p", "the"]}[verb]
            said = command(verb, *words, *more)
            assert said.code == 3 and not canary.exists() and not Path("out").exists(), (verb, words, said.err)
            assert "\n" not in said.error
    assert in_child(lambda: torch.load((folder / name).open("rb"), weights_only=False)) == 0 and canary.exists()


def rewritten(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    file = folder / "model.safetensors"
    weights = read_tensors(file, copy=True)
    change(weights)
    file.write_bytes(b"".join(map(bytes, write_tensors(weights, {"format": "pt"}))))


@pytest.mark.fault("K11")
def test_nonfinite_weights(command, tmp_path: Path) -> None:
    folder = published(tmp_path / "in", "LlamaForCausalLM")
    rewritten(folder, lambda weights: weights["model.norm.weight"].fill_(float("inf")))
    said = command("convert", "in", "out", "--to", "hf")
    assert said.code == 3 and "model.norm.weight" in said.error and "--allow-nonfinite" in said.error
    assert command("convert", "in", "out", "--to", "hf", "--allow-nonfinite").code == 0
    assert headway.load("out", allow_nonfinite=True).model.decoder.norm.weight.isinf().all()
    weights = read_tensors(folder / "model.safetensors", copy=True)
    torch.save(weights, folder / "pytorch_model.bin")
    assert command("convert", "--unsafe-pickle", "in", "out2", "--to", "hf", "--allow-nonfinite").code == 0


@pytest.mark.fault("F8", "F9", "K8", "K12")
@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"model_type": "evil"}, ["config.json", "'evil'", "llama"]),
        ({"hidden_size": 48}, ["shape", "by"]),
        ({"num_hidden_layers": 9_999}, ["num_hidden_layers", "9999"]),
        ({"num_hidden_layers": 10**9}, ["num_hidden_layers", "1000000000"]),
        ({"vocab_size": 2**39}, ["embed_tokens", "shape", "549755813888"]),
        ({"hidden_size": "x"}, ["hidden_size"]),
        ({"architectures": ["EvilForCausalLM"]}, ["architectures", "'EvilForCausalLM'"]),
        ({"num_hidden_layers": 2}, ["unexpected"]),
    ],
    ids=str,
)
def test_a_hostile_config(command, tmp_path: Path, change: dict[str, Any], parts: list[str]) -> None:
    folder = published(tmp_path / "in", "LlamaForCausalLM")
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(tree | change))
    said = command("convert", "in", "out", "--to", "hf")
    assert said.code == 3 and all(part in said.error for part in parts) and not Path("out").exists(), said.error


@pytest.mark.fault("F8")
def test_code_beside_a_config_is_ignored_and_not_passed_on(command, tmp_path: Path) -> None:
    folder = published(tmp_path / "in", "LlamaForCausalLM")
    (folder / "modeling_evil.py").write_text("open('canary', 'w').close()")
    tree = json.loads((folder / "config.json").read_text())
    tree |= {"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}, "_attn_implementation_internal": "x/y"}
    (folder / "config.json").write_text(json.dumps(tree))
    said = command("convert", "in", "out", "--to", "hf")
    assert said.code == 0 and "auto_map" in said.err and "ignored" in said.err
    assert not Path("canary").exists() and not list(Path("out").glob("*.py"))
    assert not {"auto_map", "_attn_implementation_internal"} & set(json.loads(Path("out/config.json").read_text()))


@pytest.mark.fault("K12")
@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "C:\\x", "x\0y"])
def test_a_hostile_index(command, tmp_path: Path, name: str) -> None:
    folder = published(tmp_path / "in", "LlamaForCausalLM")
    (folder / "model.safetensors").rename(tmp_path / "secret.safetensors")
    index = dict.fromkeys(read_header(tmp_path / "secret.safetensors")[1], name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    said = command("convert", "in", "out", "--to", "hf")
    assert said.code == 3 and "bare file name" in said.error and not Path("out").exists()


def test_a_ctranslate2_folder_is_named_for_what_it_is(command, tmp_path: Path) -> None:
    """Other verbs point to `convert`, which reads it and says what is wrong with this one."""
    (tmp_path / "ct2").mkdir()
    (tmp_path / "ct2" / "config.json").write_text("{}")
    (tmp_path / "ct2" / "model.bin").write_bytes(b"\6\0\0\0\x0c\0WhisperSpec\0" + bytes(20))
    said = command("generate", "ct2", "-p", "x")
    assert said.code == 3 and "CTranslate2" in said.error and "headway convert" in said.error
    said = command("convert", "ct2", "out", "--to", "hf")
    assert said.code == 3 and "model.bin" in said.error and not Path("out").exists()


def test_one_tower_of_two(command, tmp_path: Path) -> None:
    text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"vocab_size": 61, "max_position_embeddings": 12, "eos_token_id": 60, "bos_token_id": 1}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 4}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=10)).save_pretrained("clip")
    said = command("convert", "clip", "out", "--to", "hf")
    assert said.code == 3 and "--tower text" in said.error
    for tower in ("text", "vision"):
        assert command("convert", "clip", tower, "--to", "hf", "--tower", tower).code == 0
        same(headway.load(tower), headway.load("clip", tower=tower))
        name = json.loads(Path(tower, "config.json").read_text())["architectures"][0]
        import transformers

        model, loading = getattr(transformers, name).from_pretrained(tower, output_loading_info=True)
        assert not loading["missing_keys"] and not loading["unexpected_keys"], loading
        ours = headway.load(tower)
        with torch.no_grad():
            found = model.eval()(**inputs(ours))[0]
        assert (found - logits(ours)).abs().max() < 1e-5


def test_python_and_command_write_the_same(command, tmp_path: Path) -> None:
    from headway.saving import save

    published(tmp_path / "in", "LlamaForCausalLM")
    save(headway.load("in"), "by-python", "hf")
    assert command("convert", "in", "by-command", "--to", "hf").code == 0
    names = [sorted(file.name for file in Path(place).iterdir()) for place in ("by-python", "by-command")]
    assert names[0] == names[1]
    for name in names[0]:
        assert Path("by-python", name).read_bytes() == Path("by-command", name).read_bytes()
    with torch.no_grad():
        expected = theirs("LlamaForCausalLM")(**inputs(headway.load("in"))).logits
    assert (logits(headway.load("by-command")) - expected).abs().max() < 1e-5 * expected.abs().max()
