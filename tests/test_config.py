"""Every field and key of the three configs: what is refused, in which words, and what comes back from a file."""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from config_fields import BASES, ENCODER, MODEL, PAIR, VISION, Place, accepts, error_of, places, planted
from config_grid import grid
from pydantic import BaseModel, ValidationError

from headway.config import FEED_FORWARD_NAMES, ModelConfig, with_fields
from headway.errors import ConfigError
from headway.plain_yaml import dump_yaml, parse_yaml
from headway.run_config import flatten

CONFIGS = pytest.mark.parametrize("cls", BASES, ids=lambda cls: cls.__name__)

# --- F3: values of the wrong type or range -------------------------------------------------------------------------

WRONG: dict[str, Any] = {
    "negative": -1,
    "zero": 0,
    "NaN": float("nan"),
    "infinity": float("inf"),
    "1e400": parse_yaml("1e400", "a number"),
    "a boolean": True,
    "a number as text": "3",
    "null": None,
    "a list": [],
    "an object": {},
}
# Left out or null, these follow from the other sizes.
DERIVED = {"n_kv_heads", "d_head", "d_ff"}
# Below zero and yet right: penalties that reward, and the size whose minimum only the kind of tokenizer knows (T1).
MAY_BE_NEGATIVE = {"presence_penalty", "frequency_penalty", "length_penalty", "tokenizer.vocab_size"}


def is_valid(place: Place, value: object) -> bool:
    """The rule that leaves a value out of the sweep: the field's JSON Schema takes it, with three house rules.

    Null means "derive it" for derived sizes; one string stands for a list of one; a tag is never left out.
    """
    if value is None and place.dotted in DERIVED:
        return True
    if isinstance(value, str) and place.schema.get("type") == "array":
        value = [value]
    # A union that may also be left out stands one level deeper in the schema.
    tagged = any("discriminator" in part for part in (place.schema, *place.schema.get("anyOf", ())))
    if tagged and isinstance(value, dict) and "type" not in value:
        return False
    return accepts(place.schema, value, place.defs)


def named(place: Place) -> str:
    """Where an error of this field points: at the field, or for a tag at the object that it names."""
    return ".".join(place.path[:-1]) if len(place.path) > 1 and place.path[-1] == "type" else place.dotted


def complaint(place: Place, value: object) -> str | None:
    """What is wrong with the way this field answers this value; None when nothing is."""
    error = error_of(BASES_OF[place.owner], place.with_value(value))
    if is_valid(place, value):
        # A rule between two fields may object, the field itself must not.
        return None if error is None or " and " in error.where else f"valid, but {error}"
    if error is None:
        return "taken"
    where = named(place)
    if error.where != where and not error.where.startswith(f"{where}."):
        return f"another field is named: {error}"
    if not error.expected or "should" in error.expected:
        return f"no range or type: {error}"
    if error.where == where and where == place.dotted and value != [] and not error.found.startswith(repr(value)):
        return f"another value is shown: {error}"
    return None


PLACES: dict[type[BaseModel], list[Place]] = {cls: places(cls) for cls in BASES}
BASES_OF = {place.owner: cls for cls, found in PLACES.items() for place in found}


def test_the_sweep_sees_every_field_and_variant():
    assert sum(map(len, PLACES.values())) > 150
    seen = {place.dotted for place in PLACES[ModelConfig]}
    assert {name for config in grid() for name in flatten(config.model_dump())} <= seen
    assert {"positions.scaling.low_freq_factor", "feed_forward.experts.top_k", "embeddings.patch.first_token"} <= seen


@pytest.mark.fault("F3")
@CONFIGS
def test_every_field_refuses_every_wrong_value(cls: type[BaseModel]):
    said = {
        f"{place.dotted} = {name} ({place.owner.__name__})": complaint(place, value)
        for place in PLACES[cls]
        for name, value in WRONG.items()
    }
    assert {case: text for case, text in said.items() if text} == {}


@pytest.mark.fault("F3")
@CONFIGS
def test_what_no_number_can_be_is_refused_whatever_the_schema_says(cls: type[BaseModel]):
    """The sweep's rule comes from the same declarations as the check; this one knows only `it is a number`."""
    never = {name: value for name, value in WRONG.items() if name not in ("zero", "null")}
    numbers = taken = 0
    for place in PLACES[cls]:
        kinds = {part.get("type") for part in [place.schema, *place.schema.get("anyOf", [])]}
        if not kinds & {"integer", "number"} or kinds - {"integer", "number", "null", None}:
            continue
        numbers += 1
        for name, value in never.items():
            if name == "negative" and place.dotted in MAY_BE_NEGATIVE:
                taken += error_of(cls, place.with_value(value)) is None
                continue
            error = error_of(cls, place.with_value(value))
            assert error is not None and error.where == place.dotted, (place.dotted, name)
    assert numbers >= 15 and taken <= len(MAY_BE_NEGATIVE)


@pytest.mark.fault("F3")
@pytest.mark.parametrize("path", ["positions.scaling.short", "positions.scaling.long", "attention.pattern"])
def test_members_of_lists_are_checked_and_named_by_their_place(path: str):
    place = next(place for place in PLACES[ModelConfig] if place.dotted == path)
    good: Any = "causal" if path == "attention.pattern" else 1.0
    for name, value in WRONG.items():
        error = error_of(ModelConfig, place.with_value([good, value]))
        assert error is not None and error.where == f"{path}.1" and error.expected, (name, error)


@pytest.mark.fault("F3")
def test_a_boolean_is_no_integer_even_where_only_0_and_1_are_allowed():
    """True == 1, so a config that kept it would be equal to another with a different hash."""
    for value in (True, False, 1.0):
        error = error_of(ModelConfig, {**MODEL, "norm": {"type": "rmsnorm", "offset": value}})
        assert error is not None and error.where == "norm.offset"
    assert '"offset":1' in ModelConfig(**MODEL, norm={"type": "rmsnorm", "offset": 1}).to_json()


@pytest.mark.fault("F3")
@pytest.mark.parametrize("value", [0, False, None, "", [], ()])
def test_an_empty_attention_is_wrong_and_not_the_default(value: object):
    error = error_of(ModelConfig, {**MODEL, "attention": value})
    assert error is not None and error.where.startswith("attention")


def test_sizes_end_where_no_machine_could_hold_them():
    for value in (2**40 + 1, 2**63, 10**300):
        error = error_of(ModelConfig, {**MODEL, "d_ff": value})
        assert error is not None and error.where == "d_ff" and len(str(error)) < 200
    assert error_of(ModelConfig, {**MODEL, "d_ff": 2**40}) is None


# --- F1: unknown keys and names ------------------------------------------------------------------------------------


def edits(word: str) -> list[str]:
    """Words one edit away: a letter left out, put in, doubled, replaced, or swapped with the next one."""
    out = {word + "z", "z" + word}
    for i in range(len(word)):
        before, letter, after = word[:i], word[i], word[i + 1 :]
        out |= {before + after, before + letter + letter + after, f"{before}z{after}", f"{before}z{letter}{after}"}
        out.add(before + after[:1] + letter + after[1:])
    return sorted(out - {word, ""})


def distance(left: str, right: str) -> int:
    """Levenshtein's: insertions, deletions and replacements."""
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        above, row = row, [i]
        for j, b in enumerate(right, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (a != b)))
    return row[-1]


def suggested(error: ConfigError) -> str | None:
    match = re.search(r"; did you mean '(.*)'\?$", error.found)
    return match[1] if match else None


@pytest.mark.fault("F1")
@CONFIGS
def test_every_key_with_one_edit_gets_the_nearest_name(cls: type[BaseModel]):
    """No known key is nearer than the one suggested; a key too short to guess gets the list of all."""
    tried = 0
    for place in PLACES[cls]:
        *parents, name = place.path
        known = set(place.owner.model_fields)
        for word in edits(name):
            if word in known:
                continue
            tried += 1
            error = error_of(cls, place.misspelt(word))
            assert error is not None and error.where == ".".join([*parents, word]), (place.dotted, word, error)
            assert error.found.startswith(f"unknown key {word!r}"), error
            guess = suggested(error)
            if guess is None:
                assert len(name) <= 2 and all(key in error.expected for key in known), (place.dotted, error)
            else:
                assert guess in known and distance(word, guess) <= distance(word, name), (place.dotted, word, guess)
    assert tried > 1000


@pytest.mark.fault("F1")
@CONFIGS
def test_an_unknown_key_is_the_finding_even_beside_other_mistakes(cls: type[BaseModel]):
    for place in PLACES[cls]:
        if place.path[-1] == "type":
            continue  # which keys are known depends on it
        error = error_of(cls, planted(place.with_value(-1), (*place.path[:-1], "zzzzzzzz"), 1))
        assert error is not None and error.where.endswith("zzzzzzzz"), (place.dotted, error)
        assert not suggested(error) and place.path[-1] in error.expected


def choices() -> Iterator[tuple[Place, str]]:
    """Every field of the model that is one of several words, with each of the words."""
    for place in PLACES[ModelConfig]:
        words = [*place.schema.get("enum", ()), *place.schema.get("discriminator", {}).get("mapping", ())]
        yield from ((place, word) for word in words if isinstance(word, str))


@pytest.mark.fault("F1")
def test_every_choice_with_one_edit_gets_the_nearest_name():
    known = Counter(place.dotted for place, _ in choices())
    assert known["positions"] == 6 and known["head"] == 8 and known["kind"] == 4
    for place, word in choices():
        for wrong in (word[1:], word[:-1], word + "z", word[1] + word[0] + word[2:]):
            if (place.dotted, wrong) in {(other.dotted, name) for other, name in choices()}:
                continue
            error = error_of(ModelConfig, place.with_value(wrong))
            assert error is not None and error.where == place.dotted
            guess = suggested(error)
            assert guess is not None and distance(wrong, guess) <= distance(wrong, word), (place.dotted, wrong, error)
            assert word in error.expected


@pytest.mark.fault("F1")
@pytest.mark.parametrize("name", FEED_FORWARD_NAMES)
def test_a_misspelt_feed_forward_gets_the_name_a_user_writes(name: str):
    """`swglu` is meant to be swiglu, which is no activation but shorthand for one."""
    for wrong in (name + "z", name[:2] + name[3:]):
        if wrong in FEED_FORWARD_NAMES:
            continue
        error = error_of(ModelConfig, {**MODEL, "feed_forward": wrong})
        assert error is not None and error.where.startswith("feed_forward") and f"{name!r}" in str(error), error


@pytest.mark.fault("F1")
def test_an_object_without_its_tag_says_which_there_are():
    for field, tags in (("positions", "alibi, rope"), ("norm", "layernorm, rmsnorm"), ("head", "causal-lm")):
        error = error_of(ModelConfig, {**MODEL, field: {}})
        assert error is not None and error.where == field and tags in error.expected, error


# --- what follows from other fields --------------------------------------------------------------------------------


def config(**fields: Any) -> ModelConfig:
    return ModelConfig(**{**MODEL, **fields})


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {"d_head": 4, "d_ff": 32, "n_kv_heads": 2, "n_decoder_layers": 0}),
        ({"d_head": 6, "d_ff": 5, "n_kv_heads": 1}, {"d_head": 6, "d_ff": 5, "n_kv_heads": 1}),
        ({"d_head": None, "d_ff": None, "n_kv_heads": None}, {"d_head": 4, "d_ff": 32, "n_kv_heads": 2}),
        ({"d_model": 10, "n_heads": 4, "d_head": 8}, {"d_head": 8, "d_ff": 40}),
        ({}, {"attention.pattern": ("causal",), "attention.cross_every": 0, "head.type": "causal-lm"}),
        (ENCODER, {"attention.pattern": ("full",), "attention.cross_every": 0, "head.type": "masked-lm"}),
        (PAIR, {"attention.pattern": ("full",), "attention.cross_every": 1, "n_decoder_layers": 1}),
        ({**PAIR, "n_layers": 3}, {"n_decoder_layers": 3}),
        ({**PAIR, "n_layers": 3, "n_decoder_layers": 1}, {"n_decoder_layers": 1, "head.type": "causal-lm"}),
        (VISION, {"head.type": "image-classification", "positions.type": "learned", "attention.pattern": ("full",)}),
        ({"head": "sequence-classification"}, {"head.pooling": "last"}),
        ({**ENCODER, "head": "sequence-classification"}, {"head.pooling": "first"}),
        ({"head": {"type": "sequence-classification", "pooling": "mean"}}, {"head.pooling": "mean"}),
    ],
)
def test_derived_values(fields: dict[str, Any], expected: dict[str, Any]):
    flat = flatten(config(**fields).model_dump())
    assert {name: flat[name] for name in expected} == expected


def test_an_encoder_of_sound_needs_no_text_sizes():
    sizes = {"d_model": 8, "n_layers": 1, "n_heads": 2, "kind": "encoder"}
    made = ModelConfig(**sizes, embeddings={"audio": {"bins": 20, "frames": 31}})
    assert (made.vocab_size, made.max_len, made.head.type) == (0, 16, "sequence-classification")
    assert made.positions.type == "learned"


def test_a_vision_model_needs_no_text_sizes():
    sizes = {"d_model": 8, "n_layers": 1, "n_heads": 2, "kind": "vision"}
    for first, count in ((True, 10), (False, 9)):
        patch = {"size": 4, "image": 12, "first_token": first}
        made = ModelConfig(
            **sizes, embeddings={"patch": patch}, head={"type": "image-classification", "pooling": "mean"}
        )
        assert (made.vocab_size, made.max_len, made.embeddings.patch_count) == (0, count, count)
        assert made.positions.type == "learned"


@pytest.mark.parametrize(
    ("pattern", "kind", "window", "encoder", "decoder"),
    [
        (["causal"], "decoder", None, "ccc", "ccc"),
        (["sliding", "causal"], "decoder", 4, "fcf", "ccc"),
        (["full", "causal"], "encoder", None, "fcf", "ccc"),
        (["full"], "encoder-decoder", None, "fff", "cc"),
        (["causal", "sliding"], "encoder-decoder", 2, "cfc", "cc"),
    ],
)
def test_the_pattern_repeats_over_the_depth(
    pattern: list[str], kind: str, window: int | None, encoder: str, decoder: str
):
    made = config(
        kind=kind,
        n_layers=3,
        attention={"pattern": pattern, "window": window},
        **({"n_decoder_layers": 2} if kind == "encoder-decoder" else {}),
    )
    assert "".join(mask[0] for mask in made.masks(decoder=False)) == encoder
    assert "".join(mask[0] for mask in made.masks(decoder=True)) == decoder
    assert [made.window(layer) for layer in range(3)] == [
        window if pattern[layer % len(pattern)] == "sliding" else None for layer in range(3)
    ]


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ({"positions": "alibi"}, {"positions": {"type": "alibi"}}),
        (
            {"positions": {"type": "rope", "scaling": "none"}},
            {"positions": {"type": "rope", "scaling": {"type": "none"}}},
        ),
        ({"norm": "layernorm"}, {"norm": {"type": "layernorm"}}),
        ({"head": "causal-lm"}, {"head": {"type": "causal-lm"}}),
        ({"attention": "causal"}, {"attention": {"pattern": ["causal"]}}),
        (
            {"kind": "encoder", "attention": ["full", "causal"]},
            {"kind": "encoder", "attention": {"pattern": ["full", "causal"]}},
        ),
        ({"attention": {"pattern": "causal"}}, {"attention": {"pattern": ["causal"]}}),
        *(
            ({"feed_forward": name}, {"feed_forward": {"activation": activation, "gated": gated}})
            for name, (activation, gated) in FEED_FORWARD_NAMES.items()
        ),
    ],
)
def test_shorthand(short: dict[str, Any], long: dict[str, Any]):
    assert config(**short) == config(**long) and config(**short).to_json() == config(**long).to_json()


def test_shorthand_covers_the_published_names():
    assert {
        "swiglu": ("silu", True),
        "geglu": ("gelu", True),
        "reglu": ("relu", True),
    }.items() <= FEED_FORWARD_NAMES.items()


# --- frozen, and the same after a file -----------------------------------------------------------------------------


@CONFIGS
def test_nothing_can_be_changed(cls: type[BaseModel]):
    made = cls(**BASES[cls])
    for name in cls.model_fields:
        for owner in (made, getattr(made, name)):
            for field in type(owner).model_fields if isinstance(owner, BaseModel) else ():
                with pytest.raises(ValidationError, match="frozen"):
                    setattr(owner, field, getattr(owner, field))
    with pytest.raises(ValidationError, match=r"frozen|no field"):
        made.surplus = 1  # type: ignore[attr-defined]


def test_with_fields_checks_like_a_new_config():
    made = config(n_kv_heads=1)
    assert with_fields(made, n_layers=2) == config(n_kv_heads=1, n_layers=2)
    assert with_fields(made) == made and made.n_layers == 1
    with pytest.raises(ConfigError, match="n_heads and n_kv_heads"):
        with_fields(made, n_kv_heads=3)
    with pytest.raises(ConfigError, match="did you mean 'n_layers'"):
        with_fields(made, n_layer=3)


def test_json_and_yaml_round_trip_over_the_grid():
    assert len(grid()) >= 200
    for made in grid():
        text = made.to_json()
        assert text == made.to_json() and text.isascii() and " " not in text
        tree = json.loads(text)
        for again in (
            ModelConfig(**tree),
            ModelConfig(**parse_yaml(dump_yaml(made.model_dump(mode="json")), "m.yaml")),
        ):
            assert again == made and again.to_json() == text


def test_json_is_canonical():
    """Two ways to write one config give one text; two configs give two."""
    made = config(d_ff=32, head="causal-lm", attention="causal")
    assert made.to_json() == config().to_json()
    assert len({each.to_json() for each in grid()}) == len(set(map(repr, grid())))
    assert ModelConfig(**dict(reversed(MODEL.items()))).to_json() == config().to_json()
    keys = list(json.loads(config().to_json()))
    assert keys == sorted(keys)


# --- the exported schema -------------------------------------------------------------------------------------------


def objects(schema: Any) -> Iterator[dict[str, Any]]:
    """Every part of a schema that describes an object with named fields."""
    if isinstance(schema, dict):
        if "properties" in schema:
            yield schema
        for part in schema.values():
            yield from objects(part)
    elif isinstance(schema, list):
        for part in schema:
            yield from objects(part)


@CONFIGS
def test_the_schema_closes_every_object(cls: type[BaseModel]):
    schema = cls.model_json_schema()
    found = list(objects(schema))
    assert len(found) == 1 + len(schema.get("$defs", {}))
    assert all(part["additionalProperties"] is False for part in found)
    for reference in re.findall(r'"\$ref": "([^"]*)"', json.dumps(schema)):
        assert reference.removeprefix("#/$defs/") in schema["$defs"]


def test_the_schema_accepts_the_grid_and_nothing_with_another_key():
    schema = ModelConfig.model_json_schema()
    defs = schema["$defs"]
    for made in grid():
        tree = json.loads(made.to_json())
        assert accepts(schema, tree, defs), tree
        for name in (letter * 3 for letter in string.ascii_lowercase[:2]):
            assert not accepts(schema, {**tree, name: 1}, defs)
            for field, value in tree.items():
                assert not isinstance(value, dict) or not accepts(schema, {**tree, field: {**value, name: 1}}, defs)
        assert not accepts(schema, {**tree, "d_model": -1}, defs)
