"""Presets: a run in the form of a published family loads in transformers with equal logits and equal words."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from headway import loading
from headway.config import ModelConfig
from headway.errors import ConfigError
from headway.families import families
from headway.families._preset import architecture_for, check_preset, preset_fields
from headway.families._translate import read_config
from headway.launch import Launch, train
from headway.run_config import RunConfig, flatten
from headway.saving import save
from headway.training import loop
from headway.training.recipe import Facts, resolve

from objective_cases import CASES, config, labelled, rows_file, text  # isort: skip

pytestmark = pytest.mark.usefixtures("cache")
FIVE = {
    "gpt2": "AutoModelForCausalLM",
    "llama": "AutoModelForCausalLM",
    "bert": "AutoModelForMaskedLM",
    "t5": "AutoModelForSeq2SeqLM",
    "vit": "AutoModelForImageClassification",
}
FEW: dict[str, Any] = {"steps": 3, "checkpoint_every": 3, "eval_every": 3, "batch_size": 4}
TEXT = "the quick brown fox. seven green birds sing in old trees"


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "write_loss_curve", lambda folder: None)


def images(place: Path) -> Path:
    rng = np.random.default_rng(0)
    for side, count in (("train", 40), ("t10k", 10)):
        arrays = {"images-idx3": rng.integers(0, 256, (count, 8, 8)), "labels-idx1": rng.integers(0, 3, count)}
        for what, array in arrays.items():
            head = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            (place / f"{side}-{what}-ubyte").write_bytes(head + array.astype(np.uint8).tobytes())
    return place


def run_of(tmp_path: Path, preset: str, **fields: Any) -> dict[str, Any]:
    """Two layers of width 128: the dial, which a preset leaves to the user."""
    where = images(tmp_path) if preset == "vit" else rows_file(tmp_path, text)
    data = {"patch": 4} if preset == "vit" else {"context": 16}
    run = config(where, {"output": str(tmp_path / "run"), "data": data}, **FEW)
    return {**run, "model": {"depth": 2}, "preset": preset, **fields}


def inputs(preset: str, model: ModelConfig) -> dict[str, torch.Tensor]:
    if preset == "vit":
        return {"pixel_values": torch.randn(2, 1, 8, 8)}
    ids = torch.randint(5, model.vocab_size, (2, 11))
    return {"input_ids": ids, **({"decoder_input_ids": ids[:, :7]} if preset == "t5" else {})}


@pytest.mark.parametrize(
    ("preset", "kind"), [*((preset, None) for preset in FIVE), ("bert", "wordpiece"), ("t5", "unigram")]
)
def test_a_run_loads_in_transformers_with_equal_logits_and_words(tmp_path: Path, preset: str, kind: str | None) -> None:
    """Logits of about 1 to 1e-5: float32 sums in another order."""
    run = run_of(tmp_path, preset)
    done = train({**run, "tokenizer": {"vocab_size": 200, "kind": kind} if kind else run["tokenizer"]})
    model = done.plan.model
    assert (model.d_model, model.n_layers, model.n_heads) == (128, 2, 2)
    loaded = loading.load(tmp_path / "run")
    assert loaded.family == preset
    place = save(loaded, tmp_path / "hf", "hf")
    theirs = getattr(transformers, FIVE[preset]).from_pretrained(place).eval()
    assert theirs.config.model_type == preset
    given = inputs(preset, model)
    with torch.no_grad():
        found, expected = loaded.model(**given).logits, theirs(**given).logits
    assert found.abs().max() > 0.01 and (found - expected).abs().max() < 1e-5
    again = loading.load(place)
    with torch.no_grad():
        assert torch.equal(again.model(**given).logits, found)
    if loaded.tokenizer is not None:
        words = transformers.AutoTokenizer.from_pretrained(place)
        assert words.encode(TEXT, add_special_tokens=False) == loaded.tokenizer.encode(TEXT)
        assert words.decode(loaded.tokenizer.encode(TEXT)) == TEXT
        assert again.words.hash == loaded.tokenizer.hash
    if preset == "t5":
        assert theirs.generation_config.decoder_start_token_id == loaded.tokenizer.eos_id  # type: ignore[union-attr]


@pytest.mark.parametrize("preset", ["gpt2", "llama"])
def test_a_run_goes_into_gguf(tmp_path: Path, preset: str) -> None:
    train(run_of(tmp_path, preset))
    loaded = loading.load(tmp_path / "run")
    file = loading.load(save(loaded, tmp_path / "run.gguf", "gguf"))
    ids = torch.randint(5, loaded.config.vocab_size, (2, 11))
    with torch.no_grad():
        assert (file.model(ids).logits - loaded.model(ids).logits).abs().max() < 1e-5
    assert file.family == preset and file.words.encode(TEXT) == loaded.words.encode(TEXT)


@pytest.mark.parametrize("preset", ["gpt2", "bert"])
def test_other_heads_of_the_family(tmp_path: Path, preset: str) -> None:
    run = config(rows_file(tmp_path, labelled), {"output": str(tmp_path / "run"), "preset": preset}, **FEW)
    done = train(run)
    assert done.plan.model.kind == families()[preset].fixed["kind"]
    loaded = loading.load(tmp_path / "run")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(save(loaded, tmp_path / "hf", "hf")).eval()
    ids = torch.randint(5, loaded.config.vocab_size, (1, 9))
    with torch.no_grad():
        found, expected = loaded.model(ids).logits, theirs(ids).logits
    assert found.shape == (1, 2) and (found - expected).abs().max() < 1e-5


@pytest.mark.fault("R7")
def test_a_run_with_a_preset_resumes(tmp_path: Path) -> None:
    run = {**run_of(tmp_path, "bert"), "output": str(tmp_path / "half")}
    how = {**run["train"], "schedule": "constant", "warmup": 0}
    train({**run, "train": {**how, "steps": 3}})
    resumed = train({**run, "train": {**how, "steps": 6}}, Launch(resume="must", override=True))
    straight = train({**run, "train": {**how, "steps": 6}, "output": str(tmp_path / "straight")})
    assert resumed.plan.model == straight.plan.model
    ours, theirs = (loading.load(tmp_path / name).model.state_dict() for name in ("half", "straight"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    # A config.yaml that has everything filled in asks for the same model.
    settled = train({**resumed.plan.run.model_dump(), "output": str(tmp_path / "x")}, Launch(dry_run=True))
    assert settled.plan.model == resumed.plan.model


@pytest.mark.parametrize("name", sorted(families()))
def test_every_family_is_a_preset_or_says_why_not(name: str) -> None:
    """At sizes of ours, every field that is no size is that of the family's published form, training's left aside."""
    family = families()[name]
    sizes = {"d_model": 128, "n_layers": 4, "n_heads": 4, "max_len": 64, "vocab_size": 500}
    image = {"embeddings.patch.image": 8, "embeddings.patch.size": 4, "vocab_size": 0}
    sizes |= image if family.fixed["kind"] == "vision" else {}
    head = str(next(iter(family.heads.values())).fields["head.type"])
    try:
        fields = preset_fields(family, head, sizes)
    except ConfigError as error:
        assert error.where == "preset" and name not in FIVE and "sound" in error.found, error
        return
    # RoBERTa's positions begin behind the id of its padding.
    model = ModelConfig(**fields, tokens={"pad": 1} if sizes["vocab_size"] else {})
    check_preset(name, model)
    assert (model.d_model, model.n_layers, model.n_heads) == (128, 4, 4)
    raw = {"architectures": [architecture_for(family, head)], "vocab_size": 500}
    published = flatten(read_config(family, raw, "").config.model_dump())
    ours = flatten(model.model_dump())
    for field in ("norm.type", "norm.eps", "positions.type", "placement", "residual", "feed_forward.activation"):
        assert ours[field] == published[field], field
    for field in ("feed_forward.gated", "attention.bias", "feed_forward.bias", "embeddings.tied", "embeddings.norm"):
        assert ours[field] == published[field], field


def resolved(preset: str | None, **model: Any) -> ModelConfig:
    kind = {"kind": "decoder", "head": {"type": "causal-lm"}}
    run = RunConfig(preset=preset, model=model, train={"steps": 1, "dtype": "float32"})
    return resolve(run, Facts(10**6, {"vocab_size": 512, **kind}), None, lambda *_: 1.0)[0]


def test_sizes_are_the_users() -> None:
    assert resolved("llama").d_ff == 688  # 11008 / 4096 of 256
    assert resolved("gpt2").d_ff == 4 * 256
    small = resolved("llama", d_model=96, n_layers=3, n_heads=4, n_kv_heads=2, d_ff=100, max_len=32)
    assert (small.d_model, small.n_layers, small.n_kv_heads, small.d_ff, small.max_len) == (96, 3, 2, 100, 32)
    assert resolved("llama", positions={"type": "rope", "theta": 500.0}).positions.theta == 500.0  # type: ignore[union-attr]
    assert resolved("gpt2", dropout=0.1).dropout == 0.1 and resolved("gpt2").dropout == 0.0
    assert resolved(None).norm.type == "rmsnorm" and resolved(None).feed_forward.activation == "relu2"


def rates(preset: str | None, kind: str, **model: Any) -> tuple[float | None, float | None]:
    head = {"encoder": "masked-lm"}.get(kind, "causal-lm")
    run = RunConfig(preset=preset, model={"depth": 2, **model}, train={"steps": 1, "dtype": "float32"})
    facts = Facts(10**6, {"vocab_size": 512, "kind": kind, "head": {"type": head}, "tokens": {"decoder_start": 0}})
    train = resolve(run, facts, None, lambda *_: 1.0)[1].train
    return train.lr, train.muon_lr


def test_rates_follow_the_form_and_only_of_presets() -> None:
    assert rates("gpt2", "decoder") == rates("llama", "decoder") == rates(None, "decoder") == (0.04, 0.03)
    assert rates("t5", "encoder-decoder") == (0.04, 0.01)
    assert rates("bert", "encoder") == (0.001, 0.01)
    assert rates(None, "encoder", placement="post") == (0.04, 0.03)


@pytest.mark.parametrize(
    ("preset", "model", "found"),
    [
        ("gtp2", {}, r"preset.*did you mean 'gpt2'"),
        ("gpt2", {"norm": "rmsnorm"}, r"preset and model.*norm\.type"),
        ("llama", {"attention": {"qk_norm": "rmsnorm"}}, r"preset and model.*qk_norm"),
        ("bert", {}, r"preset and objective: bert with head causal-lm.*masked-lm"),
        ("whisper", {}, r"preset: whisper reads sound"),
    ],
)
def test_what_the_family_does_not_have_is_refused_by_name(preset: str, model: dict[str, Any], found: str) -> None:
    with pytest.raises(ConfigError, match=found):
        resolved(preset, **model)


def test_a_base_has_its_own_form(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="base and preset"):
        RunConfig(base="runs/a", preset="gpt2")
    make, fields, _ = CASES["sequence to sequence"]
    run = config(rows_file(tmp_path, make), {**fields, "output": str(tmp_path / "run")})
    with pytest.raises(ConfigError, match="kind vision"):
        train({**run, "preset": "vit"}, Launch(dry_run=True))
