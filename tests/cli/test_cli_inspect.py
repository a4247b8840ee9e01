"""`headway inspect`: the parts add up, the shapes are those of a real forward, the schema describes the config."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
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
    tree = {"auto_map": {"AutoConfig": "modeling_evil.Evil"}, "_attn_implementation_internal": "x/y", "hidden_size": 8}
    (tmp_path / "config.json").write_text(json.dumps({**tree, "model_type": model_type}))
    done = subprocess.run(
        [sys.executable, "-c", WATCH, "inspect", "config.json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3 and "config.json: a Hugging Face config" in done.stderr, done.stderr
    assert str(model_type) in done.stderr and "AUDIT" not in done.stderr and not canary.exists()
