"""A run's description: which layer wins, where an error points, what its model may leave open, and its file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from config_fields import MODEL
from config_grid import grid

from headway.config import ModelConfig
from headway.errors import ConfigError
from headway.plain_yaml import dump_yaml, parse_yaml
from headway.run_config import RunConfig, flatten, load_run, parse_overrides, put

NO_ENVIRONMENT: dict[str, str] = {}


def file(folder: Path, content: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return path


# --- F10: which layer wins -----------------------------------------------------------------------------------------

KEYS: dict[str, tuple[str, list[tuple[str, object]]]] = {
    # key -> its environment variable, and what file, environment and command line say: text and value
    "train.seed": ("HEADWAY__TRAIN__SEED", [("1", 1), ("2", 2), ("3", 3)]),
    "train.lr": ("HEADWAY__TRAIN__LR", [("1e-3", 0.001), ("0.5", 0.5), ("2", 2.0)]),
    "train.schedule": ("HEADWAY__TRAIN__SCHEDULE", [("wsd", "wsd"), ("cosine", "cosine"), ("constant", "constant")]),
    "data.path": ("HEADWAY__DATA__PATH", [("a.txt", "a.txt"), ("b.txt", "b.txt"), ("on", "on")]),
    "data.isolate": ("HEADWAY__DATA__ISOLATE", [("false", False), ("true", True), ("false", False)]),
    "tokenizer.special_tokens": (
        "HEADWAY__TOKENIZER__SPECIAL_TOKENS",
        [("[<a>, <b>]", ("<a>", "<b>")), ("[<c>]", ("<c>",)), ("[]", ())],
    ),
    "base": ("HEADWAY__BASE", [("a", "a"), ("b", "b"), ("c", "c")]),
}
DEFAULTS = flatten(RunConfig().model_dump())


def test_an_objective_is_a_name_or_a_name_with_numbers(tmp_path: Path):
    path = file(tmp_path, "objective: masked-lm\n")
    for keys, rate in (([], 0.15), (["objective.rate=0.3"], 0.3)):
        objective = load_run([path], keys, {}).run.objective
        assert objective is not None and (objective.type, objective.rate) == ("masked-lm", rate)
    assert load_run([path], ["objective=seq2seq"], {}).run.objective.type == "seq2seq"
    with pytest.raises(ConfigError, match="objective"):
        load_run([path], ["objective=masked"], {})
    with pytest.raises(ConfigError, match="objective"):
        load_run([path], ["objective.mean_span=2"], {})  # span-corruption's


def test_when_to_stop_is_said_once():
    with pytest.raises(ConfigError, match=r"budget and train\.epochs"):
        RunConfig(budget="3m", train={"epochs": 2.0})
    with pytest.raises(ConfigError, match="base and model"):
        RunConfig(base="runs/a", model={"d_model": 64})


def test_the_sources_of_a_mixture_keep_their_names(tmp_path: Path):
    """Keys with dots in them are paths, not sections, wherever they are read."""
    path = file(tmp_path, "data:\n  mixture: {books/: 3, a.b/*.txt: 0.5}\n")
    expected = {"books/": 3, "a.b/*.txt": 0.5}
    resolved = load_run([path], [], {})
    assert resolved.run.data.mixture == expected and resolved.origins == {"data.mixture": str(path)}
    assert load_run([], ["data.mixture={books/: 3, a.b/*.txt: 0.5}"], {}).run.data.mixture == expected
    again = load_run([path], ["data.mixture={c.txt: 1}"], {}).run
    assert again.data.mixture == {"c.txt": 1}
    assert load_run([file(tmp_path, dump_yaml(resolved.run.model_dump()), "out.yaml")], [], {}).run == resolved.run


@pytest.mark.fault("F10")
@pytest.mark.parametrize("layers", range(8))
@pytest.mark.parametrize("key", KEYS)
def test_later_layers_win_and_the_origin_is_kept(tmp_path: Path, key: str, layers: int):
    variable, said = KEYS[key]
    *section, leaf = key.split(".")
    path = file(tmp_path, f"{section[0]}:\n  {leaf}: {said[0][0]}\n" if section else f"{leaf}: {said[0][0]}\n")
    resolved = load_run(
        [path] if layers & 1 else [],
        [f"{key}={said[2][0]}"] if layers & 4 else [],
        {variable: said[1][0], "OTHER__TRAIN__SEED": "9"} if layers & 2 else {"HEADWAY_TRAIN_SEED": "9"},
    )
    origins = [str(path), "environment", "command line"]
    expected: tuple[object, str | None] = (DEFAULTS[key], None)
    for layer in range(3):
        if layers >> layer & 1:
            expected = said[layer][1], origins[layer]
    assert (flatten(resolved.run.model_dump())[key], resolved.origins.get(key)) == expected
    assert set(resolved.origins) <= {key}


@pytest.mark.fault("F10")
def test_layers_are_merged_key_by_key(tmp_path: Path):
    first = file(tmp_path, "train:\n  lr: 0.1\n  seed: 1\n  steps: 5\nmodel:\n  depth: 2\n", "first.yaml")
    second = file(tmp_path, "train:\n  seed: 2\n", "second.yaml")
    run, origins = load_run([first, second], ["train.eps=1e-6", "train.eps=1e-5"], {"HEADWAY__TRAIN__STEPS": "6"})
    assert (run.train.lr, run.train.seed, run.train.steps, run.train.eps) == (0.1, 2, 6, 1e-5)
    assert run.model == {"depth": 2}
    assert origins == {
        "train.lr": str(first),
        "train.seed": str(second),
        "train.steps": "environment",
        "model.depth": str(first),
        "train.eps": "command line",
    }


@pytest.mark.fault("F10")
def test_an_empty_section_takes_nothing_away(tmp_path: Path):
    first = file(tmp_path, "train:\n  seed: 1\nmodel:\n  depth: 2\n", "first.yaml")
    second = file(tmp_path, "train: {}\nmodel: {}\n", "second.yaml")
    run = load_run([first, second], [], NO_ENVIRONMENT).run
    assert run.train.seed == 1 and run.model == {"depth": 2}


def test_the_environment_of_the_process_is_the_default(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HEADWAY__TRAIN__SEED", "4")
    assert load_run().run.train.seed == 4
    assert load_run([], [], {}).run.train.seed == 0


# --- F1: where an error points -------------------------------------------------------------------------------------


@pytest.mark.fault("F1")
@pytest.mark.parametrize(
    ("content", "line", "key", "hint"),
    [
        ("trian:\n  lr: 1\n", 1, "trian", "did you mean 'train'"),
        ("train:\n  seed: 1\n\n  # why\n  lrr: 1\n", 5, "train.lrr", "did you mean 'lr'"),
        ("data: {path: a,\n  contxt: 3}\n", 2, "data.contxt", "did you mean 'context'"),
        ("train.batch_sise: 3\n", 1, "train.batch_sise", "did you mean 'batch_size'"),
        ("model:\n  n_headz: 3\n", 2, "model.n_headz", "did you mean 'n_heads'"),
        ("model:\n  positions:\n    type: rope\n    thta: 3.0\n", 4, "model.positions.thta", "did you mean 'theta'"),
        ("model:\n  positions:\n    type: rpoe\n", 2, "model.positions", "did you mean 'rope'"),
        ("model:\n  feed_forward: swglu\n", 2, "model.feed_forward", "swiglu"),
        ("train:\n  lr: fast\n", 2, "train.lr", "'fast' (str)"),
        ("train:\n  schedule: cosin\n", 2, "train.schedule", "did you mean 'cosine'"),
        ("model:\n  depth: true\n", 2, "model.depth", "True (bool)"),
        ("train: 3\n", 1, "train", "3 (int)"),
        ("train:\n", 1, "train", "None"),
    ],
)
def test_a_mistake_in_a_file_is_named_with_its_line(tmp_path: Path, content: str, line: int, key: str, hint: str):
    with pytest.raises(ConfigError) as caught:
        load_run([file(tmp_path, content)], [], NO_ENVIRONMENT)
    assert caught.value.where == f"{tmp_path}/run.yaml, line {line}: {key}" and hint in str(caught.value)


@pytest.mark.fault("F1")
def test_the_line_is_that_of_the_layer_that_said_it(tmp_path: Path):
    good = file(tmp_path, "train:\n  lr: 0.1\n", "good.yaml")
    bad = file(tmp_path, "# a line before\ntrain:\n  lr: fast\n", "bad.yaml")
    with pytest.raises(ConfigError) as caught:
        load_run([good, bad], [], NO_ENVIRONMENT)
    assert caught.value.where == f"{bad}, line 3: train.lr"
    assert load_run([bad, good], [], NO_ENVIRONMENT).run.train.lr == 0.1, "what is overridden is not judged"
    for overrides, environment in ((["train.lr=quick"], {}), ([], {"HEADWAY__TRAIN__LR": "quick"})):
        with pytest.raises(ConfigError) as caught:
            load_run([good], overrides, environment)
        assert caught.value.where == "train.lr" and "'quick'" in caught.value.found


# --- overrides -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["train.lr", "=3", "a..b=1", ".a=1", "a.=1", "1a=2", "a b=1", "--a=1", "a.!b=1", ""])
def test_a_word_that_is_no_override(word: str):
    with pytest.raises(ConfigError) as caught:
        parse_overrides([word])
    assert "dotted.key=value" in caught.value.expected


def test_overrides_are_yaml_values():
    said = parse_overrides(
        ["a=1", "b.c=[1, x]", "d.batch-size={e: 1e-3}", "f=", "g=x=y", "h=on", "i='1'", "j=a.txt#1", "k=1:30"]
    )
    expected = {"a": 1, "b.c": [1, "x"], "d.batch_size": {"e": 0.001}, "f": None, "g": "x=y", "h": "on", "i": "1"}
    assert said == {**expected, "j": "a.txt#1", "k": "1:30"}


@pytest.mark.parametrize(
    ("before", "dotted", "value", "after"),
    [
        ({}, "a", 1, {"a": 1}),
        ({}, "a.b.c", 1, {"a": {"b": {"c": 1}}}),
        ({"a": {"b": 1}}, "a.c", 2, {"a": {"b": 1, "c": 2}}),
        ({"a": {"b": 1}}, "a", 2, {"a": 2}),
        ({"a": {"b": 1}}, "a.b", None, {"a": {"b": None}}),
        ({"positions": "rope"}, "positions.theta", 5.0, {"positions": {"type": "rope", "theta": 5.0}}),
        ({"a": None}, "a.b", 1, {"a": {"b": 1}}),
    ],
)
def test_put(before: dict[str, Any], dotted: str, value: object, after: dict[str, Any]):
    put(before, dotted, value)
    assert before == after


@pytest.mark.parametrize(
    ("short", "override", "expected"),
    [
        ("positions: rope", "model.positions.theta=5.0", {"positions": {"type": "rope", "theta": 5.0}}),
        ("norm: layernorm", "model.norm.bias=false", {"norm": {"type": "layernorm", "bias": False}}),
        ("attention: causal", "model.attention.dropout=0.1", {"attention": {"pattern": ["causal"], "dropout": 0.1}}),
        (
            "feed_forward: swiglu",
            "model.feed_forward.bias=true",
            {"feed_forward": {"activation": "silu", "gated": True, "bias": True}},
        ),
    ],
)
def test_a_shorthand_in_a_file_and_one_of_its_fields_on_the_command_line(
    tmp_path: Path, short: str, override: str, expected: dict[str, Any]
):
    run = load_run([file(tmp_path, f"model:\n  {short}\n")], [override], NO_ENVIRONMENT).run
    assert ModelConfig(**MODEL, **run.model) == ModelConfig(**MODEL, **expected)


def test_a_section_that_is_a_number_is_an_error_whatever_is_set_inside_it(tmp_path: Path):
    with pytest.raises(ConfigError, match="train: 3"):
        load_run([file(tmp_path, "train: 3\n")], ["train.lr=0.1"], NO_ENVIRONMENT)


# --- the model inside a run ----------------------------------------------------------------------------------------


@pytest.mark.fault("F5")
@pytest.mark.parametrize(
    ("fields", "where", "fix"),
    [
        ({"kind": "encoder", "head": "causal-lm"}, "model.head and model.attention.pattern", "model.kind=decoder"),
        ({"d_model": 10, "n_heads": 4}, "model.d_model and model.n_heads", "model.d_model=8 or 12"),
        ({"n_heads": 4, "n_kv_heads": 3}, "model.n_heads and model.n_kv_heads", "model.n_kv_heads=2 or 4"),
        ({"residual": "parallel", "placement": "post"}, "model.placement and model.residual", "model.placement=pre"),
        ({"depth": 0}, "model.depth", ""),
        ({"depth": 2.0}, "model.depth", ""),
        ({"depth": None}, "model.depth", ""),
    ],
)
def test_the_models_rules_hold_before_the_model_can_be_built(fields: dict[str, Any], where: str, fix: str):
    with pytest.raises(ConfigError) as caught:
        RunConfig(model=fields)
    assert caught.value.where == where and caught.value.fix.startswith(fix)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"depth": 4},
        {"depth": 4, "n_kv_heads": 2},
        {"n_kv_heads": 2},
        {"d_model": 128, "n_kv_heads": 2},
        {"n_layers": 6, "n_heads": 6},
        {"n_layers": 6, "n_heads": 6, "n_kv_heads": 3},
        {"depth": 4, "positions": {"type": "rope", "fraction": 0.25, "scaling": {"type": "ntk", "factor": 2.0}}},
        {"depth": 4, "tokens": {"eos": 300}},
        {"d_model": 96},
    ],
)
def test_sizes_left_open_are_not_held_against_the_run(fields: dict[str, Any]):
    """They follow from depth, data and budget: only what the user gave can be wrong yet."""
    assert RunConfig(model=fields).model == fields


def test_every_model_of_the_grid_is_a_model_of_a_run():
    for made in grid():
        fields = made.model_dump(mode="json")
        assert RunConfig(model=fields).model == fields


@pytest.mark.parametrize(
    ("budget", "seconds"), [(None, None), ("90s", 90.0), ("3m", 180.0), ("2h", 7200.0), ("1.5m", 90.0)]
)
def test_budget_in_seconds(budget: str | None, seconds: float | None):
    assert RunConfig(budget=budget).budget_seconds == seconds


@pytest.mark.fault("F3")
@pytest.mark.parametrize("budget", ["3", "m", "-3m", "3 m", "3d", "1e3s", "3m\n", 3, 3.0, True])
def test_budgets_that_are_none(budget: object):
    with pytest.raises(ConfigError, match=r"^budget: "):
        RunConfig(budget=budget)


@pytest.mark.fault("F3")
@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "cuda:-1", "CPU", "", "cpu\n"])
def test_devices_that_are_none(device: str):
    with pytest.raises(ConfigError, match=r"^train\.device: "):
        RunConfig(train={"device": device})


# --- back to a file ------------------------------------------------------------------------------------------------

RUNS: list[dict[str, Any]] = [
    {},
    {"train": {"lr": 1e-3, "eps": 1e-10, "eval_every": 3, "device": "cuda:1"}, "budget": "1.5h"},
    {"tokenizer": {"special_tokens": ["<|endoftext|>", "[X]", "- x", "a: b", "#"]}},
    {
        "model": {
            "depth": 3,
            "positions": {"type": "rope", "theta": 1e6},
            "attention": {"window": 4, "pattern": ["sliding", "causal"]},
        }
    },
    {"data": {"path": "a b/ü.txt", "context": 7, "val_fraction": 0.01}, "output": "runs/x"},
]


@pytest.mark.parametrize("fields", RUNS)
def test_a_written_run_reads_back(tmp_path: Path, fields: dict[str, Any]):
    run = RunConfig(**fields)
    path = file(tmp_path, dump_yaml(run.model_dump(mode="json")))
    again = load_run([path], [], NO_ENVIRONMENT)
    assert again.run == run and set(again.origins.values()) == {str(path)}
    assert set(parse_yaml(path.read_text(), "x")) == set(RunConfig.model_fields)


def test_keys_keep_their_order():
    dumped = dump_yaml(RunConfig().model_dump(mode="json"))
    assert [line.split(":")[0] for line in dumped.splitlines() if line[0] not in " -"] == list(RunConfig.model_fields)
