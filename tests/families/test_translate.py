"""Published configs into ours and back: old spellings, hostile ones, and what a family must refuse to write."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from old_configs import FACTORS, OLD, PHI3
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from headway.checkpoints.hub_folder import choose_family, folder_files, read_folder, write_folder
from headway.config import ModelConfig, Rope, with_fields
from headway.errors import ConfigError, HeadwayError, InputError
from headway.families import families, family_of
from headway.families._translate import differences, plan, read_config, write_config
from headway.nn import Transformer
from headway.run_config import flatten, put

ROWS = [row for row in reference.rows() if row.model_type in CONFIG_MAPPING]
FIRST = {row.model_type: row for row in reversed(ROWS) if not row.variant}


def read(raw: dict[str, Any]) -> ModelConfig:
    return read_config(family_of(raw, "config.json"), raw, "config.json").config


def theirs(raw: dict[str, Any]) -> dict[str, Any]:
    """What transformers' own class makes of a config.json, written by it in its newest spelling."""
    config = CONFIG_MAPPING[raw["model_type"]].from_dict(json.loads(json.dumps(raw)))
    return json.loads(json.dumps(config.to_dict())) | {"architectures": raw["architectures"]}


def described(row: reference.Reference) -> dict[str, Any]:
    """The config of a row of the parity table, without building the model."""
    config = CONFIG_MAPPING[row.model_type](**reference.config_keys(row)).to_dict()
    return json.loads(json.dumps(config)) | {"model_type": row.model_type, "architectures": [row.architecture]}


# --- old spellings -----------------------------------------------------------------------------------------------

ASPECTS = {
    "llama-1": {"tokens.pad": None, "max_len": 2048, "positions.theta": 10000.0},
    "llama-2": {"positions.theta": 10000.0, "positions.scaling.type": "none", "norm.eps": 1e-5},
    "llama-3.1": {"tokens.eos": 128001, "tokens.ends": [128008, 128009], "positions.scaling.original_len": 8192},
    "llama-dynamic": {"positions.scaling.type": "dynamic", "positions.scaling.original_len": 4096},
    "phi-3-128k": {"positions.scaling.type": "longrope", "positions.scaling.original_len": 4096, "max_len": 131072},
    "phi-4-mini": {"positions.fraction": 0.75, "attention.window": None, "embeddings.tied": True},
    "mistral-v0.1": {"attention.window": 4096, "attention.pattern": ["sliding"]},
    "mistral-v0.3": {"attention.window": None, "attention.pattern": ["causal"]},
    "qwen2.5": {"attention.window": None, "attention.bias": True, "attention.output_bias": False},
    "qwen2.5-yarn": {"attention.window": 4096, "positions.scaling.original_len": 32768},
    "qwen3-coder": {"feed_forward.experts.experts": 160, "d_ff": 2560, "d_head": 128},
    "gemma-2": {"attention.window": 4096, "attention.pattern": ["sliding", "causal"], "attention.softcap": 50.0},
    "gemma-3-1b": {"attention.window": 512, "attention.pattern": ["sliding"] * 5 + ["causal"],
                   "positions.theta": 1e6, "positions.window_theta": 10000.0, "tokens.ends": [106]},
    "gemma-3-4b": {"positions.scaling.type": "linear", "positions.window_theta": 10000.0},
    "smollm3": {"positions.layers": [True, True, True, False], "attention.window": None},
    "smollm3-windows": {"attention.pattern": ["causal", "causal", "causal", "sliding"], "attention.window": 512},
    "pythia": {"positions.fraction": 0.25, "positions.theta": 10000.0, "residual": "parallel"},
    "gpt-neox-scaled": {"positions.fraction": 0.5, "positions.theta": 500.0, "residual": "sequential"},
    "falcon-40b": {"d_ff": 32768, "n_kv_heads": 8, "d_head": 64, "embeddings.tied": True},
    "roberta": {"max_len": 512, "positions.offset": 2},
    "modernbert": {"positions.theta": 160000.0, "positions.window_theta": 10000.0, "attention.window": 65,
                   "attention.pattern": ["full", "sliding", "sliding"]},
    "modernbert-other": {"positions.theta": 80000.0, "positions.window_theta": 500.0, "attention.window": 33},
    "t5-small": {"positions.buckets": 32, "positions.max_distance": 128, "embeddings.tied": True,
                 "feed_forward.activation": "relu", "head.scale": 512**-0.5},
    "flan-t5": {"feed_forward.activation": "gelu-tanh", "feed_forward.gated": True, "head.scale": 1.0},
    "whisper-tiny.en": {"embeddings.audio.frames": 3000, "vocab_size": 51864, "tokens.eos": 50256},
    "vit": {"head.labels": 1000, "max_len": 197},
}  # fmt: skip


@pytest.mark.parametrize("name", OLD)
def test_an_old_spelling_means_what_transformers_makes_of_it(name: str) -> None:
    """The file as it lies there, and the same rewritten by their config class, are one config here."""
    raw = OLD[name]
    found, rewritten = read(raw), read(theirs(raw))
    if name == "flan-t5":  # transformers 5 says that it ties; the weights, which differ, say that it does not
        assert differences(found, rewritten) == ["embeddings.tied (False against True)"]
    else:
        assert found == rewritten, differences(found, rewritten)
    flat = flatten(found.model_dump(mode="json"))
    assert {field: flat[field] for field in ASPECTS.get(name, {})} == ASPECTS.get(name, {})


@pytest.mark.parametrize("name", OLD)
def test_an_old_spelling_is_written_anew_and_read_there(name: str) -> None:
    """Old keys that stay beside ours (`global_rope_theta`, `rotary_pct`) must not win over what we write."""
    raw = OLD[name]
    if raw.get("num_hidden_layers", 0) > 6:
        raw = raw | {"num_hidden_layers": 6} | {key: raw[key][:6] for key in ("no_rope_layers",) if key in raw}
    config, family = read(raw), family_of(raw, name)
    architecture = raw["architectures"][0]
    tables = {name: torch.empty(tensor.shape, device="meta") for name, tensor in meta(config).items()}
    kept = dict(folder_files(config, tables, family=family, architecture=architecture, raw=raw))["config.json"]
    assert isinstance(kept, bytes)
    tree = json.loads(kept)
    assert read(tree) == config
    again = read(theirs(tree))
    assert again == config or name == "flan-t5", differences(again, config)
    # And where a field has changed since: what we say counts.
    if isinstance(config.positions, Rope):
        other = config.model_copy(update={"positions": config.positions.model_copy(update={"theta": 77.0})})
        changed = dict(folder_files(other, tables, family=family, architecture=architecture, raw=raw))["config.json"]
        assert isinstance(changed, bytes)
        assert read(theirs(json.loads(changed))) == read(json.loads(changed)) == other


def meta(config: ModelConfig) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return dict(Transformer(config).state_dict())


def test_su_is_the_first_name_of_longrope() -> None:
    """transformers 5 no longer reads it; thousands of files have it."""
    assert read(PHI3 | {"rope_scaling": {"type": "su", **FACTORS}}) == read(OLD["phi-3-128k"])


@pytest.mark.parametrize(
    ("name", "keys", "part"),
    [
        ("llama-2", {"rope_scaling": {"factor": 2.0}}, "config.json rope_parameters: rope_type 'default'"),
        ("llama-2", {"rope_scaling": {"type": "magic", "factor": 2.0}}, "rope_type 'magic'; expected one of default"),
        ("llama-2", {"partial_rotary_factor": 0.5}, "config.json partial_rotary_factor: 0.5; expected 1.0"),
        ("llama-2", {"hidden_act": "mish"}, "config.json hidden_act: 'mish'; expected one of gelu"),
        ("llama-2", {"architectures": ["LlamaModel"]}, "architectures: 'LlamaModel'; expected one of LlamaForCausalLM"),
        ("gemma-2", {"layer_types": ["full_attention"] * 25}, "config.json layer_types: 25 of 26 layers"),
        ("gemma-2", {"layer_types": ["linear_attention"] * 26}, "config.json layer_types: 'linear_attention'"),
        ("gemma-3-1b", {"use_bidirectional_attention": True}, "config.json use_bidirectional_attention: True"),
        ("falcon-40b", {"alibi": True}, "config.json alibi: True; expected False"),
        ("falcon-40b", {"new_decoder_architecture": False}, "config.json new_decoder_architecture: False"),
        ("roberta", {"pad_token_id": 600}, "config.json pad_token_id: 600; expected an id below 514"),
        ("roberta", {"hidden_act": "relu"}, "RobertaForMaskedLM: feed_forward.activation relu; expected gelu"),
        ("modernbert", {"classifier_activation": "relu"}, "config.json classifier_activation: 'relu'; expected 'gelu'"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "config.json no_rope_layers: 2 layers; expected 36"),
        ("whisper-tiny.en", {"decoder_ffn_dim": 99}, "config.json decoder_ffn_dim: 99; expected 1536"),
        ("qwen3-coder", {"mlp_only_layers": [3]}, "config.json mlp_only_layers: [3]; expected []"),
    ],
)
def test_what_is_not_known_here_is_refused_by_name(name: str, keys: dict[str, Any], part: str) -> None:
    with pytest.raises(InputError) as caught:
        read(OLD[name] | keys)
    assert part in str(caught.value)


def test_null_is_a_missing_key_where_the_architecture_has_a_default() -> None:
    assert read(OLD["falcon-40b"] | {"num_ln_in_parallel_attn": None}) == read(OLD["falcon-40b"])
    assert read(OLD["gemma-3-1b"] | {"layer_types": None, "sliding_window_pattern": None}) == read(OLD["gemma-3-1b"])


def test_layer_types_count_only_where_the_class_reads_them() -> None:
    """Mistral's class slides everywhere or nowhere, whatever the list says (transformers warns)."""
    types = ["full_attention", "sliding_attention"] * 16
    assert read(OLD["mistral-v0.1"] | {"layer_types": types}) == read(OLD["mistral-v0.1"])


# --- hostile configs ---------------------------------------------------------------------------------------------

BAD: list[Any] = [
    *(None, True, -1, 0, 1, 1.5, 1e308, 2**40, 10**30, "", "x", "5", [], [1], ["x"], [[]], {}, {"a": 1}),
    *({"rope_type": []}, {"rope_type": "yarn"}, {"rope_type": "longrope", "short_factor": 3}, {"full_attention": 3}),
    *({"full_attention": {"rope_type": "linear", "factor": "2"}}, {"sliding_attention": {"rope_type": "yarn"}}),
]
SPOKEN = ["rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "layer_types", "sliding_window",
          "num_labels", "id2label", "problem_type", "global_attn_every_n_layers", "sliding_window_pattern",
          "max_window_layers", "no_rope_layers", "no_rope_layer_interval", "use_sliding_window", "global_rope_theta",
          "architectures", "dtype"]  # fmt: skip


def hostile(raw: dict[str, Any], keys: set[str]) -> Iterator[dict[str, Any]]:
    """Every key with every bad value, without the newer keys that would hide an older one."""
    short = {key: value for key, value in raw.items() if key not in ("layer_types", "rope_parameters")}
    for key in sorted(keys):
        for bad in BAD:
            yield short | {key: bad}
    yield from (raw | {"rope_parameters": bad} for bad in BAD)


@pytest.mark.parametrize("model_type", FIRST)
def test_only_our_errors_and_quickly(model_type: str) -> None:
    row = FIRST[model_type]
    raw, count, started = described(row), 0, time.process_time()
    mapped = set(row.family.keys) | {*SPOKEN, "mlp_ratio", "feed_forward_proj", "query_pre_attn_scalar"}
    for damaged in hostile(raw, mapped):
        count += 1
        try:
            read_config(row.family, damaged, "config.json")
        except InputError as error:
            text = str(error)
            assert text.startswith("config.json") and "\n" not in text and len(text) < 700, text
    assert count > 500
    print(f"{model_type}: {count} configs in {time.process_time() - started:.2f} s")


# --- writing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS, ids=[row.id for row in ROWS])
def test_a_family_is_found_for_every_row(row: reference.Reference, tmp_path: Path) -> None:
    """Chosen by the config alone, it holds the same weights and is read back as the same config."""
    config = read(described(row))
    family, architecture = choose_family(config)
    print(f"{row.id} -> {family.model_type} {architecture}")
    torch.manual_seed(0)
    weights = Transformer(config).state_dict()
    write_folder(tmp_path / "out", folder_files(config, weights, family=family, architecture=architecture))
    again = read_folder(tmp_path / "out")
    assert not differences(again.config, config)
    assert again.weights.keys() == weights.keys()
    assert all(torch.equal(again.weights[name], weights[name]) for name in weights)
    assert choose_family(config, row.model_type)[0] is row.family


def test_nobody_can_express_it() -> None:
    base = read(OLD["llama-2"] | {"num_hidden_layers": 2})
    for fields, names in (
        ({"positions": Rope(layout="interleaved")}, ["positions.layout"]),
        ({"placement": "post", "norm": base.norm}, ["placement"]),
        ({"attention": base.attention.model_copy(update={"cross_every": 0, "scale": 0.3})}, ["attention.scale"]),
        ({"layer_scale": 0.1}, ["scale"]),
    ):
        with pytest.raises(ConfigError) as caught:
            choose_family(with_fields(base, **fields))
        text = str(caught.value)
        assert caught.value.exit_code == 2 and "\n" not in text and all(name in text for name in names), text
    pooled = with_fields(read(OLD["vit"]), head={"type": "sequence-classification"})
    with pytest.raises(ConfigError, match="no family has kind vision with head sequence-classification"):
        choose_family(pooled)


REFUSED: list[tuple[str, dict[str, Any], list[str]]] = [
    ("llama-2", {"positions": {"type": "learned"}}, ["positions.type (learned against rope)"]),
    ("llama-2", {"positions.fraction": 0.5}, ["positions.fraction (0.5 against 1.0)"]),
    ("llama-2", {"positions.scaling": {"type": "ntk", "factor": 2.0}}, ["positions.scaling.type (ntk against none)"]),
    ("llama-dynamic", {"positions.scaling.original_len": 99}, ["positions.scaling.original_len (99 against 4096)"]),
    ("llama-2", {"feed_forward.gated": False}, ["feed_forward.gated"]),
    ("llama-2", {"attention.qk_norm": "rmsnorm"}, ["attention.qk_norm (rmsnorm against none)"]),
    ("qwen2.5", {"attention.bias": False}, ["attention.bias (False against True)"]),
    ("mistral-v0.1", {"attention.pattern": ["sliding", "causal"]}, ["attention.pattern"]),
    ("gemma-2", {"embeddings.scale": 2.0}, ["embeddings.scale"]),
    ("bert", {"embeddings.token_types": 0}, ["embeddings.token_types: bert cannot express 0", "at least 1"]),
    ("bert", {"placement": "pre"}, ["placement (pre against post)"]),
    ("roberta", {"feed_forward.activation": "relu"}, ["feed_forward.activation relu"]),
    ("t5-small", {"positions": {"type": "alibi"}}, ["positions.type (alibi against relative)"]),
    ("vit", {"embeddings.patch.registers": 2, "max_len": 199}, ["embeddings.patch.registers (2 against 0)"]),
]


@pytest.mark.parametrize(("name", "fields", "parts"), REFUSED, ids=[f"{n}-{next(iter(f))}" for n, f, _ in REFUSED])
def test_what_a_family_cannot_write_is_named(name: str, fields: dict[str, Any], parts: list[str]) -> None:
    raw = OLD[name]
    tree = read(raw).model_dump(mode="json")
    for field, value in fields.items():
        put(tree, field, value)
    with pytest.raises(ConfigError) as caught:
        write_config(family_of(raw, name), raw["architectures"][0], ModelConfig(**tree))
    for part in parts:
        assert part in str(caught.value), str(caught.value)


CHANGES: dict[str, list[Any]] = {
    "attention.pattern": [["causal"], ["full"], ["sliding"], ["sliding", "causal"], ["full", "sliding"]],
    "positions": [{"type": kind} for kind in ("none", "sinusoidal", "learned", "relative", "alibi", "rope")],
    "positions.offset": [2], "positions.layout": ["interleaved", "split"], "positions.fraction": [0.5],
    "positions.window_theta": [50.0], "positions.layers": [[True, False]],
    "positions.scaling": [{"type": "ntk", "factor": 2.0}, {"type": "dynamic", "factor": 2.0, "original_len": 8},
                          {"type": "llama3", "factor": 2.0, "original_len": 8}],
    "norm": [{"type": "layernorm"}, {"type": "rmsnorm"}, {"type": "layernorm", "bias": False}],
    "norm.offset": [0, 1], "norm.eps": [1e-3], "placement": ["pre", "post", "sandwich", "inside"],
    "residual": ["sequential", "parallel"], "feed_forward.activation": ["relu", "gelu", "gelu-tanh", "quick-gelu"],
    "feed_forward.gated": [True, False], "feed_forward.bias": [True, False], "attention.bias": [True, False],
    "attention.output_bias": [True, False], "attention.qk_norm": ["none", "rmsnorm"], "attention.softcap": [None, 5.0],
    "attention.qk_norm_over": ["head", "all"], "attention.scale": [None, 0.25], "embeddings.tied": [True, False],
    "embeddings.norm": [True, False], "embeddings.scale": [1.0, 3.0], "embeddings.width": [None, 24],
    "embeddings.token_types": [0, 2], "head.bias": [True, False], "head.softcap": [None, 4.0], "head.scale": [1.0, 0.5],
    "head.labels": [3], "head.transform": ["none", "tanh", True, False], "n_heads": [2], "n_kv_heads": [1, 4],
    "d_head": [16], "d_ff": [40], "max_len": [24], "tokens.ends": [[7, 8]], "tokens.pad": [None, 5],
}  # fmt: skip


@pytest.mark.parametrize("model_type", FIRST)
def test_what_is_written_is_read_back(model_type: str) -> None:
    """One field of a config changed: the family refuses to write it, or reads it back as it was."""
    row = FIRST[model_type]
    base = with_fields(read(described(row)), n_layers=2).model_dump(mode="json")
    written = 0
    for field, values in CHANGES.items():
        for value in values:
            tree = json.loads(json.dumps(base))
            try:
                put(tree, field, value)
                if field == "attention.pattern":
                    tree["attention"]["window"] = 5 if "sliding" in value else None
                config = ModelConfig(**tree)
                raw = write_config(row.family, row.architecture, config)
                plan(row.family, row.family.heads[row.architecture], config)
            except ConfigError:
                continue
            written += 1
            again = read_config(row.family, json.loads(json.dumps(raw)), "config.json").config
            assert not [one for one in differences(config, again) if not one.startswith("head.")], (field, value)
    assert written >= 8


def test_a_pattern_may_be_said_in_several_ways() -> None:
    """Twice the period, or a period longer than the depth, is the same model."""
    base = read(OLD["gemma-2"])
    for depth, pattern in ((26, ("sliding", "causal") * 2), (1, ("sliding", "causal")), (1, ("sliding", "sliding"))):
        attention = base.attention.model_copy(update={"pattern": pattern})
        config = with_fields(base, n_layers=depth, attention=attention)
        assert choose_family(config)[0].model_type == "gemma2"
        assert not differences(read(write_config(families()["gemma2"], "Gemma2ForCausalLM", config)), config)


def test_errors_are_ours_when_a_plan_cannot_be() -> None:
    config = with_fields(read(OLD["llama-2"]), d_model=1 << 40, d_ff=1 << 40)
    with pytest.raises(HeadwayError, match="sizes beyond any memory"):
        plan(families()["llama"], families()["llama"].heads["LlamaForCausalLM"], config)
