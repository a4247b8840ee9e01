"""`headway inspect`: the parts add up, the shapes are those of a real forward, the schema describes the config."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
from test_loading import published, theirs
from torch import nn

import headway
from headway.checkpoints.folder import newest_good
from headway.cli.inspect import shapes
from headway.config import ModelConfig
from headway.nn import Transformer
from headway.nn.attention import Attention
from headway.nn.feed_forward import FeedForward, MixtureOfExperts

BASE = {"d_model": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 50, "max_len": 16}
CONFIGS = [
    {},
    {"n_kv_heads": 2, "feed_forward": "swiglu"},
    {"n_kv_heads": 1, "embeddings": {"tied": True}, "placement": "post", "norm": "layernorm"},
    {"feed_forward": {"activation": "gelu", "experts": {"experts": 4, "top_k": 2}}},
    {"kind": "encoder-decoder"},
    {"kind": "encoder"},
    {"kind": "vision", "vocab_size": 0, "max_len": 5, "embeddings": {"patch": {"size": 4, "image": 8}}},
]


@pytest.mark.parametrize("fields", CONFIGS[:5], ids=str)
def test_shapes_are_those_of_a_forward(fields):
    """Hooks on the modules of a real model see the shapes that `inspect` states."""
    config = ModelConfig(**{**BASE, **fields})
    B, T = 3, 7
    stated = {name: shape for name, _, shape, _ in shapes(config, B, T)}
    model = Transformer(config).eval()
    block = (model.decoder or model.encoder).blocks[0]
    seen: dict[str, tuple[int, ...]] = {}

    def watch(name: str, module: nn.Module, index: int | None = None) -> None:
        def hook(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
            seen.setdefault(name, tuple((inputs[0] if index == 0 else output).shape))

        module.register_forward_hook(hook)

    watch("x", block, 0)
    watch("attention input", block.attention, 0)
    watch("attention output", block.attention)
    watch("feed-forward output", block.feed_forward)
    watch("logits", model.head)
    ids = torch.randint(50, (B, T))
    model(ids, decoder_input_ids=ids) if model.is_pair else model(ids)
    assert {name: stated[name] for name in seen} == seen
    attention = block.attention
    assert isinstance(attention, Attention)
    assert stated["qkv weight"] == tuple(attention.qkv.weight.shape)
    assert stated["output weight"] == tuple(attention.output.weight.shape)
    q, k, v = (
        attention.qkv(torch.zeros(B, T, 32))
        .unflatten(-1, (-1, attention.H))
        .split((attention.N, attention.K, attention.K), 2)
    )
    assert (stated["q"], stated["k"], stated["v"]) == (q.shape, k.shape, v.shape)
    first = block.feed_forward
    if isinstance(first, MixtureOfExperts):
        assert stated["up weight"][0] == len(first.experts)
        first = first.experts[0]
    assert isinstance(first, FeedForward)
    assert stated["up weight"][-2:] == tuple(first.up.weight.shape) and stated["down weight"][-2:] == tuple(
        first.down.weight.shape
    )


def test_a_run_folder(command, trained):
    shown = command("inspect", trained, "--json").json
    assert shown["kind"] == "decoder" and shown["family"] == "headway"
    assert shown["weights_sha256"] == newest_good(trained).manifest.weights
    assert shown["parameters"] == sum(p.numel() for p in headway.load(trained).model.parameters())
    text = command("inspect", trained, "-B", 2, "-T", 5).out
    assert shown["weights_sha256"] in text and "2 x 5 x 32" in text and "step 40" in text


def test_fields_files_and_changes(command, tmp_path, trained):
    words = [f"{key}={value}" for key, value in BASE.items()]
    shown = command("inspect", *words, "--json").json
    assert shown["weights_sha256"] is None and shown["config"]["d_ff"] == 128
    (tmp_path / "model.yaml").write_text("\n".join(f"{key}: {value}" for key, value in BASE.items()))
    assert command("inspect", "model.yaml", "--json").json["parameters"] == shown["parameters"]
    (tmp_path / "run.yaml").write_text("model:\n" + "\n".join(f"  {key}: {value}" for key, value in BASE.items()))
    more = command("inspect", "run.yaml", "model.n_layers=4", "--json").json
    assert more["parameters"] > shown["parameters"] and more["config"]["n_layers"] == 4
    assert command("inspect", trained, "n_layers=3", "--json").json["weights_sha256"] is None


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["d_modle=3"], "did you mean 'd_model'"),
        (["d_model=30", *[f"{k}={v}" for k, v in BASE.items() if k != "d_model"]], "28 or 32"),
    ],
)
@pytest.mark.fault("F1", "F2")
def test_wrong_fields(command, words, part):
    said = command("inspect", *words)
    assert said.code == 2 and part in said.error


def test_a_depth_has_no_sizes_yet(command, tmp_path):
    (tmp_path / "run.yaml").write_text("model:\n  depth: 4\n")
    said = command("inspect", "run.yaml")
    assert said.code == 2 and "--dry-run" in said.error


def test_schema_describes_the_config(command):
    said = command("inspect", "--schema")
    schema = json.loads(said.out)
    assert set(schema["properties"]) == set(ModelConfig.model_fields) and schema["additionalProperties"] is False
    assert "RunConfig" in schema["$defs"] and "Train" in schema["$defs"]
    assert set(schema["$defs"]["Rope"]["properties"]) == {
        "type", "theta", "fraction", "layout", "scaling", "layers", "window_theta"
    }  # fmt: skip


WATCH = """
import sys
def watch(event, arguments):
    if event in ("subprocess.Popen", "os.system", "os.exec", "socket.connect", "socket.getaddrinfo"):
        print("AUDIT", event, file=sys.stderr)
    if event == "import" and str(arguments[0]).startswith("modeling_evil"):
        print("AUDIT import", file=sys.stderr)
from headway.cli.main import main
sys.addaudithook(watch)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.fault("F8")
@pytest.mark.parametrize("model_type", ["llama", "evil", None])
def test_a_hugging_face_config_runs_no_code(tmp_path, model_type):
    """`auto_map` names code beside the config; reading the config must not touch it."""
    canary = tmp_path / "canary"
    (tmp_path / "modeling_evil.py").write_text(f"open({str(canary)!r}, 'w').close()")
    tree = {"auto_map": {"AutoConfig": "modeling_evil.Evil"}, "_attn_implementation_internal": "x/y", "hidden_size": 64}
    tree |= {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 40}
    (tmp_path / "config.json").write_text(json.dumps({**tree, "model_type": model_type}))
    done = subprocess.run(
        [sys.executable, "-c", WATCH, "inspect", "config.json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    if model_type == "llama":  # a family that is known is read, and the keys that name code are told of
        assert done.returncode == 0 and "decoder" in done.stdout and "auto_map" in done.stderr, done.stderr
    else:
        assert done.returncode == 3 and "model_type" in done.stderr and "llama" in done.stderr, done.stderr
    assert "AUDIT" not in done.stderr and not canary.exists()


# --- published models --------------------------------------------------------------------------------------------

PUBLISHED = ["LlamaForCausalLM-tied", "BertForMaskedLM", "T5ForConditionalGeneration", "ViTForImageClassification"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_hugging_face_folder(command, tmp_path, name):
    """Counted as transformers counts; the hash is that of `load`; every tensor with its shape."""
    published(tmp_path / "m", name, None)
    loaded, theirs_ = headway.load("m"), theirs(name)
    shown = command("inspect", "m", "--json").json
    assert (shown["family"], shown["kind"]) == (loaded.family, loaded.config.kind)
    assert shown["weights_sha256"] == loaded.weights_sha256
    assert shown["parameters"] == theirs_.num_parameters() == sum(shown["parameters_by_part"].values())
    tensors = {one: (tensor.dtype, tensor.shape) for one, tensor in loaded.model.named_parameters()}
    found = {one: (getattr(torch, kind), torch.Size(shape)) for one, (kind, *shape) in shown["tensors"].items()}
    assert found == tensors and sum(shape.numel() for _, shape in found.values()) == shown["parameters"]
    assert list(shown["runtimes"]) == ["transformers", "vLLM", "llama.cpp"] and shown["runtimes"]["transformers"] == ""


def test_tensors_of_equal_layers_are_one_line_unless_all_are_asked_for(command, tmp_path):
    published(tmp_path / "m", "LlamaForCausalLM", None)
    brief, whole = command("inspect", "m").out, command("inspect", "m", "--tensors").out
    assert "decoder.blocks.*.attention.qkv.weight" in brief and "3 times" in brief and "blocks.1." not in brief
    for number in range(3):
        assert re.search(rf"decoder\.blocks\.{number}\.attention\.qkv\.weight +float32 +64 x 32\n", whole)
    assert "times" not in whole and "embeddings.tokens.weight" in whole


def test_where_a_model_loads(command, tmp_path):
    published(tmp_path / "llama", "LlamaForCausalLM")
    published(tmp_path / "bert", "BertForMaskedLM", "wordpiece")
    shown = [re.findall(r"^(\S+) +(yes|no: .*)$", command("inspect", name).out, re.M) for name in ("llama", "bert")]
    assert shown[0] == [("transformers", "yes"), ("vLLM", "yes"), ("llama.cpp", "yes")]
    assert shown[1][0][1] == "yes" and "BertForMaskedLM" in shown[1][1][1] and "masked-lm" in shown[1][2][1]


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "q8_0", "q4_0"])
def test_a_gguf_file(command, tmp_path, kind):
    """The format of every tensor as it stands in the file, tied ones once; the same number of parameters."""
    published(tmp_path / "m", "LlamaForCausalLM-tied")
    assert command("convert", "m", "out.gguf", "--dtype", kind).code == 0
    shown, before = command("inspect", "out.gguf", "--json").json, command("inspect", "m", "--json").json
    assert shown["family"] == "llama" and shown["parameters"] == before["parameters"]
    assert shown["weights_sha256"] == headway.load("out.gguf").weights_sha256
    assert (shown["weights_sha256"] == before["weights_sha256"]) is (kind == "float32")
    said = kind.upper() if kind[0] == "q" else kind
    tensors = {name: (form, tuple(shape)) for name, (form, *shape) in shown["tensors"].items()}
    assert {name: shape for name, (_, shape) in tensors.items()} == {
        name: tuple(shape) for name, (_, *shape) in before["tensors"].items()
    }
    assert tensors["embeddings.tokens.weight"][0] == tensors["decoder.blocks.0.attention.qkv.weight"][0] == said
    assert tensors["decoder.norm.weight"][0] == "float32"  # vectors are F32 in such files
    assert said in command("inspect", "out.gguf").out


@pytest.mark.fault("F8")
@pytest.mark.parametrize("name", [*PUBLISHED, "WhisperForConditionalGeneration", "CLIPTextModelWithProjection"])
def test_a_published_config_alone(command, tmp_path, name):
    """Without weights: the same shapes and parts as the folder's, no hash, nothing said of runtimes."""
    published(tmp_path / "m", name, None)
    alone, whole = command("inspect", "m/config.json", "--json").json, command("inspect", "m", "--json").json
    assert alone["weights_sha256"] is None and alone["tensors"] == alone["runtimes"] == {}
    for key in ("kind", "parameters", "parameters_by_part", "shapes", "cost"):
        assert alone[key] == whole[key], key
    changed = command("inspect", "m/config.json", "n_layers=1", "--json").json
    assert changed["parameters"] < whole["parameters"]


@pytest.mark.fault("F8")
@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"model_type": "evil"}, ["model_type", "'evil'", "llama"]),
        ({"hidden_size": "wide"}, ["hidden_size", "'wide'"]),
        ({"hidden_size": -3}, ["hidden_size"]),
        ({"hidden_act": "evil"}, ["hidden_act", "'evil'", "silu"]),
        ({"num_attention_heads": 5}, ["num_attention_heads"]),
        ({"architectures": ["Evil"]}, ["architectures", "'Evil'", "LlamaForCausalLM"]),
        ({"rope_parameters": {"rope_type": "evil"}}, ["evil", "llama3"]),
    ],
    ids=str,
)
def test_a_wrong_published_config(command, tmp_path, change, parts):
    folder = published(tmp_path / "m", "LlamaForCausalLM", None)
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(tree | change))
    for path in ("m/config.json", "m"):
        said = command("inspect", path)
        assert said.code == 3 and all(part in said.error for part in parts), said.error


def test_places_that_are_no_model(command, tmp_path):
    (tmp_path / "text").write_text("hello")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.json").write_text("{")
    for path, part in (("text", "no GGUF"), ("empty", "not the folder"), ("emtpy", "did you mean 'empty'")):
        said = command("inspect", path)
        assert said.code == 3 and part in said.error
    assert command("inspect", "broken.json").code in (2, 3)
    assert command("inspect", "missing.json").code == 3
    assert command("inspect", "text", "empty").code == 2
