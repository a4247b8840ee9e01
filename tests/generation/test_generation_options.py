"""Every field of GenerationOptions: what is accepted, what is refused, and in which words."""

from __future__ import annotations

import json
import math

import pytest

from headway.errors import ConfigError
from headway.generation import GenerationOptions
from headway.generation.options import OPTION_RULES

NAN, INF = float("nan"), float("inf")

REFUSED = {
    "temperature": [-1, -1e-9, NAN, INF, -INF, float("1e400"), "0.5", None, True, [], 101],
    "top_k": [-1, 1.5, "3", True, None, 2**63, NAN],
    "top_p": [-0.1, 1.1, NAN, INF, "1", None, True],
    "min_p": [-0.1, 1.1, NAN, INF, None, True],
    "typical_p": [0, -0.1, 1.1, NAN, INF, None],
    "repetition_penalty": [0, -1, NAN, INF, 1e9, "1", None, True],
    "presence_penalty": [-2.1, 2.1, NAN, INF, "0", None, True],
    "frequency_penalty": [-2.1, 2.1, NAN, INF, "0", None, True],
    "max_tokens": [0, -1, 2**63, 2**31, 1.0, "5", None, True, NAN],
    "min_tokens": [-1, 2**63, 1.0, "5", None, True],
    "n": [0, -1, 10**9, 129, 1.0, None, True],
    "logprobs": [-1, 21, 10**9, 1.0, "5", True],
    "seed": [-1, 2**63, 1.0, "5", True],
    "beams": [0, -1, 257, 10**9, 2.0, None, True],
    "logit_bias": [{5: NAN}, {5: 1e9}, {5: INF}, {-1: 0}, {"x": 0}, {1.5: 0}, {"-3": 0}, {5: True}, [5], None, "5"],
    "stop": [[""], ["x"] * 17, ["x" * 257], [5], None, 7],
    "stop_ids": [[-1], [1.5], [True], None],
    "length_penalty": [NAN, INF, 11, None],
    "truncate": ["right", None, True],
    "batch_size": [0, -1, 10**9, None],
}


@pytest.mark.fault("G5", "G6", "G7", "G8", "G9", "G10")
@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in REFUSED.items() for value in values])
def test_refused(field: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        GenerationOptions(**{field: value, **({"beams": 2} if field == "length_penalty" else {})})
    assert caught.value.exit_code == 2
    assert caught.value.where.startswith(field)
    assert "\n" not in str(caught.value)
    json.dumps(str(caught.value), allow_nan=False)


@pytest.mark.fault("G5", "G6")
@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0},
        {"temperature": 1e-9},
        {"temperature": 5e-324},
        {"top_p": 0},
        {"top_p": 1},
        {"top_k": 0},
        {"top_k": 10**6},
        {"min_p": 1},
        {"logit_bias": {"5": -100, 7: 100}},
        {"stop": "one"},
        {"stop": ["a", "b"]},
        {"seed": None},
        {"seed": 2**63 - 1},
        {"logprobs": 20},
        {"early_stopping": "never", "beams": 2},
    ],
)
def test_accepted(fields: dict[str, object]) -> None:
    GenerationOptions(**fields)


def test_openai_spelling_of_logit_bias() -> None:
    assert GenerationOptions(logit_bias={"5": -100.0, 7: 1}).logit_bias == {5: -100.0, 7: 1.0}


@pytest.mark.fault("G5")
def test_tiny_temperatures_are_greedy() -> None:
    assert [GenerationOptions(temperature=t).is_greedy for t in (0, 1e-9, 9e-6, 1e-4, 1)] == [True] * 3 + [False] * 2


BROKEN: dict[tuple[str, str], dict[str, object]] = {
    ("min_tokens", "max_tokens"): {"min_tokens": 9, "max_tokens": 8},
    ("n", "beams"): {"n": 5, "beams": 4},
    ("beams", "sampling"): {"beams": 4, "temperature": 0.7, "top_k": 5},
    ("beams", "stop"): {"beams": 4, "stop": "x"},
    ("beams", "logprobs"): {"beams": 4, "logprobs": 0},
    ("beams", "lookup"): {"beams": 4, "lookup": 3},
    ("beams", "context_shift"): {"beams": 4, "context_shift": True},
    ("length_penalty", "beams"): {"length_penalty": 2.0},
}


@pytest.mark.fault("G10")
def test_every_rule_is_tested() -> None:
    assert {rule.fields for rule in OPTION_RULES} == set(BROKEN)


@pytest.mark.fault("G10")
@pytest.mark.parametrize("fields", list(BROKEN))
def test_impossible_combinations_name_both_fields(fields: tuple[str, str]) -> None:
    with pytest.raises(ConfigError) as caught:
        GenerationOptions(**BROKEN[fields])
    assert caught.value.where == " and ".join(fields)


def test_unknown_key_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'temprature'; did you mean 'temperature'\?"):
        GenerationOptions(temprature=1.0)


def test_frozen_and_serialisable() -> None:
    options = GenerationOptions(stop=["x"], logit_bias={3: 1.5}, seed=4)
    with pytest.raises(ValueError, match="frozen"):
        options.seed = 5  # type: ignore[misc]
    again = GenerationOptions(**json.loads(options.model_dump_json(exclude_unset=True)))
    assert again == options
    assert all(math.isfinite(v) for v in options.model_dump().values() if isinstance(v, float))
