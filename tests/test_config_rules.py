"""Every rule of the three configs against the table of its examples, and the fixes that they offer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from config_fields import BASES, ENCODER, MODEL, PAIR, VISION, error_of, inside, planted
from pydantic import BaseModel

from headway.config import ModelConfig
from headway.config_rules import MODEL_RULES
from headway.generation import GenerationOptions
from headway.generation.options import OPTION_RULES
from headway.plain_yaml import parse_yaml
from headway.run_config import RUN_RULES, RunConfig

CONFIGS = pytest.mark.parametrize("cls", BASES, ids=lambda cls: cls.__name__)

# --- F5: combinations that cannot be -------------------------------------------------------------------------------


def rope(**scaling: Any) -> dict[str, Any]:
    return {"type": "rope", "scaling": {"factor": 2.0, **scaling}}


LONG = {"type": "longrope", "original_len": 8, "short": [1.0] * 3, "long": [1.0] * 2}
LLAMA = {"type": "llama3", "original_len": 8, "low_freq_factor": 4.0, "high_freq_factor": 4.0}
YARN = {"type": "yarn", "original_len": 8}
SOUND = {**ENCODER, "vocab_size": 0, "max_len": 10, "embeddings": {"audio": {"frames": 20}}}
# The two fields of a rule, and fields that break this rule and no earlier one.
MODEL_EXAMPLES: list[tuple[tuple[str, str], dict[str, Any]]] = [
    (("n_heads", "n_kv_heads"), {"n_heads": 8, "n_kv_heads": 3}),
    (("n_heads", "n_kv_heads"), {"n_heads": 4, "n_kv_heads": 8}),
    (("positions.fraction", "d_head"), {"d_head": 5}),
    (("positions.fraction", "d_head"), {"d_head": 6, "positions": {"type": "rope", "fraction": 0.5}}),
    (("positions.fraction", "d_head"), {"d_head": 4, "positions": {"type": "rope", "fraction": 0.1}}),
    (("positions", "d_model"), {"d_model": 9, "d_head": 4, "positions": "sinusoidal"}),
    (("positions.scaling", "d_head"), {"d_head": 4, "positions": {"type": "rope", "scaling": LONG}}),
    (("positions.scaling.type", "positions.fraction"), {"d_head": 2, "positions": rope(type="ntk")}),
    (
        ("positions.scaling.type", "positions.fraction"),
        {"d_head": 4, "positions": {**rope(type="dynamic", original_len=8), "fraction": 0.5}},
    ),
    (("positions.scaling.low_freq_factor", "positions.scaling.high_freq_factor"), {"positions": rope(**LLAMA)}),
    (("positions.scaling.beta_fast", "positions.scaling.beta_slow"), {"positions": rope(**YARN, beta_fast=0.5)}),
    (("positions.scaling.type", "positions.theta"), {"positions": {**rope(**YARN), "theta": 1.0}}),
    *(
        (("positions.buckets", "positions.max_distance"), {"positions": {"type": "relative", **sizes}})
        for sizes in ({"buckets": 2}, {"buckets": 5}, {"buckets": 32, "max_distance": 16})
    ),
    (("kind", "embeddings.patch"), {"embeddings": VISION["embeddings"]}),
    (("kind", "embeddings.patch"), {"kind": "vision", "vocab_size": 0}),
    (
        ("embeddings.patch.image", "embeddings.patch.size"),
        {**VISION, "embeddings": {"patch": {"size": 4, "image": 10}}},
    ),
    (("kind", "embeddings.audio"), {"embeddings": {"audio": {}}}),
    (("embeddings.audio", "head"), {**SOUND, "head": "masked-lm"}),
    (("embeddings.audio", "head"), {**SOUND, "head": "span"}),
    (("embeddings.audio", "max_len"), {**SOUND, "max_len": 9}),
    (("embeddings.audio", "embeddings.width"), {**PAIR, "embeddings": {"audio": {}, "width": 4}}),
    (("embeddings.leads", "embeddings.norm"), {**ENCODER, "embeddings": {"leads": True}}),
    (("kind", "vocab_size"), {"vocab_size": 0}),
    (("kind", "vocab_size"), {**VISION, "vocab_size": 10}),
    (("kind", "vocab_size"), {**SOUND, "vocab_size": 10}),
    (("kind", "head"), {"head": "image-classification"}),
    (("kind", "head"), {**ENCODER, "head": "masked-patches"}),
    (("kind", "head"), {**VISION, "head": "span"}),
    (("kind", "head.type"), {"head": "masked-lm"}),
    (("kind", "head.type"), {**PAIR, "head": "pooled-embedding"}),
    (("kind", "attention.pattern"), {"attention": {"pattern": ["causal", "full"]}}),
    (("head", "attention.pattern"), {**ENCODER, "head": "causal-lm"}),
    (("attention.pattern", "attention.window"), {"attention": {"pattern": ["sliding"]}}),
    (("attention.pattern", "attention.window"), {"attention": {"window": 4}}),
    (("kind", "attention.cross_every"), {"attention": {"cross_every": 1}}),
    (("kind", "attention.cross_every"), {**PAIR, "attention": {"cross_every": 0}}),
    (("kind", "n_decoder_layers"), {"n_decoder_layers": 2}),
    (("kind", "n_decoder_layers"), {**PAIR, "n_decoder_layers": 0}),
    (("placement", "residual"), {"residual": "parallel", "placement": "post"}),
    (("kind", "residual"), {**PAIR, "residual": "parallel"}),
    (("embeddings.tied", "head"), {**ENCODER, "head": "span", "embeddings": {"tied": True}}),
    (("kind", "embeddings.token_types"), {"embeddings": {"token_types": 2}}),
    (
        ("feed_forward.experts.top_k", "feed_forward.experts.experts"),
        {"feed_forward": {"experts": {"experts": 2, "top_k": 3}}},
    ),
    (
        ("head.pooling", "embeddings.patch.first_token"),
        {**VISION, "embeddings": {"patch": {"size": 4, "image": 8, "first_token": False}}},
    ),
    (("head.pooling", "attention.pattern"), {"head": {"type": "sequence-classification", "pooling": "first"}}),
    (("head.labels", "head.problem"), {**ENCODER, "head": {"type": "token-classification", "labels": 1}}),
    (("head.labels", "head.problem"), {**ENCODER, "head": {"type": "sequence-classification", "labels": 1}}),
    (("embeddings.patch", "max_len"), {**VISION, "max_len": 4}),
    *(
        ((f"tokens.{name}", "vocab_size"), {"tokens": {name: 10}})
        for name in ("bos", "eos", "pad", "mask", "decoder_start")
    ),
]
RUN_EXAMPLES: list[tuple[tuple[str, str], dict[str, Any]]] = [
    (("data.path", "data.mixture"), {"data": {"path": "a", "mixture": {"b.txt": 1.0}}}),
    (("data.mixture", "data.valid_path"), {"data": {"valid_path": "a", "mixture": {"b.txt": 1.0}}}),
    (("train.warmup", "train.steps"), {"train": {"warmup": 11, "steps": 10}}),
    (("train.batch_size", "train.accumulation"), {"train": {"batch_size": 7, "accumulation": 2}}),
    (("train.batch_size", "train.accumulation"), {"train": {"batch_size": 1, "accumulation": 2}}),
    (("train.batch_size", "train.batch_tokens"), {"train": {"batch_size": 8, "batch_tokens": 512}}),
    (("data.mixture", "train.batch_tokens"), {"data": {"mixture": {"a": 1.0}}, "train": {"batch_tokens": 512}}),
    (("budget", "train.steps"), {"budget": "3m", "train": {"steps": 10}}),
    (("budget", "train.epochs"), {"budget": "3m", "train": {"epochs": 2.0}}),
    (("base", "model"), {"base": "a", "model": {"d_model": 64, "n_heads": 1}}),
    (("base", "preset"), {"base": "a", "preset": "gpt2"}),
    (("tuning", "base"), {"tuning": {"rank": 4}}),
    (("tuning", "train.tensor_parallel"), {"base": "a", "tuning": {"rank": 4}, "train": {"tensor_parallel": 2}}),
    (("tokenizer.path", "tokenizer.kind"), {"tokenizer": {"path": "tokenizer.json", "kind": "bpe"}}),
    (("model.depth", "model"), {"model": {"depth": 4, "d_model": 64}}),
    (("model.depth", "model"), {"model": {"depth": 4, "n_layers": 4}}),
]
OPTION_EXAMPLES: list[tuple[tuple[str, str], dict[str, Any]]] = [
    (("min_tokens", "max_tokens"), {"min_tokens": 5, "max_tokens": 4}),
    (("n", "beams"), {"n": 3, "beams": 2}),
    *((("beams", "sampling"), {"beams": 2, name: 0.5}) for name in ("temperature", "top_p", "min_p", "typical_p")),
    (("beams", "sampling"), {"beams": 2, "top_k": 5}),
    (("beams", "stop"), {"beams": 2, "stop": ["."]}),
    (("beams", "logprobs"), {"beams": 2, "logprobs": 1}),
    (("beams", "lookup"), {"beams": 2, "lookup": 3}),
    (("beams", "context_shift"), {"beams": 2, "context_shift": True}),
    (("length_penalty", "beams"), {"length_penalty": 0.5}),
    (("length_penalty", "beams"), {"early_stopping": True}),
]
TABLES: dict[type[BaseModel], tuple[Any, list[tuple[tuple[str, str], dict[str, Any]]]]] = {
    ModelConfig: (MODEL_RULES, MODEL_EXAMPLES),
    RunConfig: (RUN_RULES, RUN_EXAMPLES),
    GenerationOptions: (OPTION_RULES, OPTION_EXAMPLES),
}


@pytest.mark.fault("F5")
@CONFIGS
def test_every_rule_has_an_example(cls: type[BaseModel]):
    rules, examples = TABLES[cls]
    wanted, had = Counter(tuple(rule.fields) for rule in rules), Counter(fields for fields, _ in examples)
    assert wanted.keys() == had.keys(), "a rule without an example, or an example without a rule"
    assert all(had[fields] >= count for fields, count in wanted.items())


@pytest.mark.fault("F5")
@CONFIGS
def test_every_rule_is_broken_by_its_example_and_names_both_fields(cls: type[BaseModel]):
    for fields, example in TABLES[cls][1]:
        error = error_of(cls, {**BASES[cls], **example})
        assert error is not None and error.where == " and ".join(fields), (fields, example, error)
        assert error.found and error.expected and error.fix and error.exit_code == 2
        assert all(field in str(error) for field in fields)


def mended(fields: dict[str, Any], fix: str) -> Iterator[dict[str, Any]]:
    """`fields` after each alternative that a fix offers; assignments with only a space between them go together."""
    for name in re.findall(r"^leave out ([\w.]+)$", fix):
        *parents, leaf = name.split(".")
        section = dict(inside(fields, tuple(parents)))
        del section[leaf]
        yield planted(fields, tuple(parents), section) if parents else section
    assignment = r"[\w.]+=(?:\{[^}]*\}|\[[^\]]*\]|[\w.-]+)"
    for group in re.findall(rf"{assignment}(?: {assignment})*(?: or \d+\b)?", fix):
        words = group.split(" or ")
        variants = [words[0], *(re.sub(r"=.*", f"={other}", words[0]) for other in words[1:])]
        for variant in variants:
            out = fields
            for part in re.findall(assignment, variant):
                name, _, value = part.partition("=")
                out = planted(out, tuple(name.split(".")), parse_yaml(value, name))
            yield out


@pytest.mark.fault("F5", "F2")
@CONFIGS
def test_every_fix_mends_what_it_is_offered_for(cls: type[BaseModel]):
    """Each assignment in a fix is made: the same finding must not come back (another one may follow)."""
    for fields, example in TABLES[cls][1]:
        given = {**BASES[cls], **example}
        error = error_of(cls, given)
        assert error is not None
        if error.fix.startswith("give "):
            continue  # the longrope lists, whose values no message can know
        attempts = list(mended(given, error.fix))
        assert attempts, error.fix
        for attempt in attempts:
            again = error_of(cls, attempt)
            assert again is None or again.where != error.where, (fields, error.fix, attempt, again)


def test_negative_control_a_rule_that_is_off_lets_its_example_through(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ModelConfig, "rules", ())
    through = [error_of(ModelConfig, {**MODEL, **example}) is None for _, example in MODEL_EXAMPLES]
    assert all(through)


# --- F2: sizes that do not divide ----------------------------------------------------------------------------------

ROPE = {"positions": "rope"}
DIVISIONS: list[tuple[str, str, Callable[[int], dict[str, Any]], int]] = [
    # the field that the fix sets, the finding, a config for each of its values, the largest value tried
    ("d_model", "d_model and n_heads", lambda n: {"d_model": n, "n_heads": 7, "positions": "none"}, 50),
    ("n_kv_heads", "n_heads and n_kv_heads", lambda n: {"d_model": 48, "n_heads": 12, "n_kv_heads": n}, 20),
    ("d_model", "positions and d_model", lambda n: {"d_model": n, "d_head": 4, "positions": "sinusoidal"}, 30),
    *(
        (
            "d_head",
            "positions.fraction and d_head",
            lambda n, share=share: {"d_head": n, "positions": {"type": "rope", "fraction": share}},
            40,
        )
        for share in (1.0, 0.5, 0.25, 0.3, 0.1)
    ),
    (
        "embeddings.patch.image",
        "embeddings.patch.image and embeddings.patch.size",
        lambda n: {**VISION, "max_len": 10**6, "embeddings": {"patch": {"size": 7, "image": n}}},
        50,
    ),
]


@pytest.mark.fault("F2")
@pytest.mark.parametrize("case", range(len(DIVISIONS)))
def test_sizes_that_do_not_divide_get_the_nearest_that_do(case: int):
    """The values in the fix are the ones that trying every size finds on either side."""
    field, where, make, limit = DIVISIONS[case]
    errors = {n: error_of(ModelConfig, {**MODEL, **make(n)}) for n in range(1, 3 * limit)}
    broken = {n: error for n, error in errors.items() if error is not None and error.where == where}
    good = [n for n in errors if n not in broken]
    assert good and [n for n in broken if n <= limit]
    for n, error in broken.items():
        if n > limit:
            continue
        nearest = {*[g for g in good if g < n][-1:], *[g for g in good if g > n][:1]}
        match = re.search(rf"\b{re.escape(field)}=(\d+)(?: or (\d+))?", error.fix)
        assert match and {int(number) for number in match.groups() if number} == nearest, (n, error.fix, nearest)
