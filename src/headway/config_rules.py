"""Which configs cannot be, and how a wrong one is reported.

A rule is a row: the two fields that collide, a test that returns what was found (or None), what was expected and
the fix. The test suite walks the same table, so a rule without a test cannot exist.
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import BaseModel, ValidationError

from headway.errors import ConfigError, nearest

if TYPE_CHECKING:
    from headway.config import ModelConfig


class Rule(NamedTuple):
    """One impossible combination: `broken(config)` is True when it is present."""

    fields: tuple[str, str]
    broken: Callable[[Any], bool]
    found: Callable[[Any], str]
    expected: str
    fix: Callable[[Any], str]


def check_rules(config: BaseModel, rules: Sequence[Rule]) -> None:
    """Raise ConfigError for the first rule that `config` breaks."""
    for rule in rules:
        if rule.broken(config):
            where = " and ".join(rule.fields)
            raise ConfigError(where, rule.found(config), rule.expected, rule.fix(config))


def nearest_multiples(value: int, step: int) -> str:
    """`370 or 380` for value 373 and step 10: what a size could have been."""
    low = value // step * step
    return f"{low} or {low + step}" if low else str(low + step)


def nearest_divisors(value: int, whole: int) -> str:
    """The divisors of `whole` on either side of `value`."""
    small = [d for d in range(1, math.isqrt(whole) + 1) if whole % d == 0]
    divisors = sorted({*small, *(whole // d for d in small)})
    below = [d for d in divisors if d < value][-1:]
    above = [d for d in divisors if d > value][:1]
    return " or ".join(str(d) for d in below + above)


def _is(config: ModelConfig, field: str, *types_: str) -> bool:
    return getattr(config, field).type in types_


def _hears(c: ModelConfig) -> bool:
    """An encoder of sound alone: no side of it reads or writes text."""
    return c.kind == "encoder" and c.embeddings.audio is not None


def _rotary(c: ModelConfig) -> int:
    return int(c.d_head * getattr(c.positions, "fraction", 1.0))


def _scaled(c: ModelConfig, scaling: str) -> bool:
    return _is(c, "positions", "rope") and bool(getattr(c.positions, "scaling").type == scaling)  # noqa: B009


def _nearest_head(c: ModelConfig, least: int = 2) -> str:
    """The head sizes on either side of the given one whose rotary part is even and at least `least`."""
    fraction = getattr(c.positions, "fraction", 1.0)

    def fits(size: int) -> bool:
        return int(size * fraction) >= least and int(size * fraction) % 2 == 0

    reach = math.ceil(least / fraction) + 1
    below = next((size for size in range(c.d_head - 1, max(c.d_head - reach, 0), -1) if fits(size)), None)
    above = next((size for size in range(c.d_head + 1, c.d_head + 2 * reach) if fits(size)), None)
    return " or ".join(str(size) for size in (below, above) if size is not None)


IMAGE_HEADS = ("image-classification", "masked-patches")
TEXT_HEADS = ("causal-lm", "masked-lm", "token-classification", "span")

MODEL_RULES: tuple[Rule, ...] = (
    Rule(
        ("n_heads", "n_kv_heads"),
        lambda c: c.n_heads % c.n_kv_heads != 0,
        lambda c: f"{c.n_heads} query heads cannot share {c.n_kv_heads} key-value heads",
        "n_kv_heads that divides n_heads",
        lambda c: f"n_kv_heads={nearest_divisors(c.n_kv_heads, c.n_heads)}",
    ),
    Rule(
        ("positions.fraction", "d_head"),
        lambda c: _is(c, "positions", "rope") and (_rotary(c) % 2 == 1 or _rotary(c) < 2),
        lambda c: f"rotary dimension {_rotary(c)} of d_head {c.d_head} is odd or zero",
        "an even rotary dimension",
        lambda c: f"d_head={_nearest_head(c)} or another positions.fraction",
    ),
    Rule(
        ("positions", "d_model"),
        lambda c: _is(c, "positions", "sinusoidal") and c.d_model % 2 == 1,
        lambda c: f"sinusoidal positions pair the {c.d_model} dimensions as sines and cosines",
        "an even d_model",
        lambda c: f"d_model={nearest_multiples(c.d_model, 2)}",
    ),
    Rule(
        ("positions.scaling", "d_head"),
        lambda c: (
            _is(c, "positions", "rope")
            and c.positions.scaling.type == "longrope"
            and {len(c.positions.scaling.short), len(c.positions.scaling.long)} != {_rotary(c) // 2}
        ),
        lambda c: f"{len(c.positions.scaling.short)} short and {len(c.positions.scaling.long)} long divisors",
        "one divisor per pair of rotary dimensions",
        lambda c: f"give {_rotary(c) // 2} of each",
    ),
    Rule(
        ("positions.scaling.type", "positions.fraction"),
        lambda c: _is(c, "positions", "rope") and c.positions.scaling.type in ("ntk", "dynamic") and _rotary(c) < 4,
        lambda c: f"scaling {c.positions.scaling.type} stretches between frequencies, and there is only one",
        "a rotary dimension of at least 4",
        lambda c: f"d_head={_nearest_head(c, 4)} or positions.scaling={{type: linear, factor: 2}}",
    ),
    Rule(
        ("positions.scaling.low_freq_factor", "positions.scaling.high_freq_factor"),
        lambda c: _scaled(c, "llama3") and c.positions.scaling.low_freq_factor >= c.positions.scaling.high_freq_factor,
        lambda c: f"{c.positions.scaling.low_freq_factor} and {c.positions.scaling.high_freq_factor}",
        "a low factor below the high one: the ramp lies between them",
        lambda c: "positions.scaling.low_freq_factor=1.0 positions.scaling.high_freq_factor=4.0",
    ),
    Rule(
        ("positions.scaling.beta_fast", "positions.scaling.beta_slow"),
        lambda c: _scaled(c, "yarn") and c.positions.scaling.beta_fast <= c.positions.scaling.beta_slow,
        lambda c: f"{c.positions.scaling.beta_fast} and {c.positions.scaling.beta_slow}",
        "more turns for beta_fast than for beta_slow",
        lambda c: "positions.scaling.beta_fast=32.0 positions.scaling.beta_slow=1.0",
    ),
    Rule(
        ("positions.scaling.type", "positions.theta"),
        lambda c: _scaled(c, "yarn") and c.positions.theta <= 1,
        lambda c: f"scaling yarn with theta {c.positions.theta}: no frequency is lower than another",
        "theta above 1",
        lambda c: "positions.theta=10000.0",
    ),
    Rule(
        ("positions.buckets", "positions.max_distance"),
        lambda c: (
            _is(c, "positions", "relative")
            and (
                c.positions.buckets < 4
                or c.positions.buckets % 2 == 1
                or c.positions.max_distance <= c.positions.buckets // 2
            )
        ),
        lambda c: f"{c.positions.buckets} buckets for distances up to {c.positions.max_distance}",
        "an even number of at least 4 buckets, and max_distance above half of it",
        lambda c: "positions.buckets=32 positions.max_distance=128",
    ),
    Rule(
        ("kind", "embeddings.patch"),
        lambda c: (c.kind == "vision") != (c.embeddings.patch is not None),
        lambda c: f"kind {c.kind} {'with' if c.embeddings.patch else 'without'} a patch front end",
        "kind vision with embeddings.patch, other kinds without",
        lambda c: "embeddings.patch={size: 4, image: 28, channels: 1}" if c.kind == "vision" else "kind=vision",
    ),
    Rule(
        ("embeddings.patch.image", "embeddings.patch.size"),
        lambda c: c.embeddings.patch is not None and c.embeddings.patch.image % c.embeddings.patch.size != 0,
        lambda c: f"image {c.embeddings.patch.image} is not a whole number of patches of {c.embeddings.patch.size}",
        "an image that the patches tile",
        lambda c: f"embeddings.patch.image={nearest_multiples(c.embeddings.patch.image, c.embeddings.patch.size)}",
    ),
    Rule(
        ("kind", "embeddings.audio"),
        lambda c: c.embeddings.audio is not None and c.kind in ("decoder", "vision"),
        lambda c: f"kind {c.kind} with an audio front end",
        "an encoder that hears, alone or before a decoder that writes",
        lambda c: "kind=encoder-decoder",
    ),
    Rule(
        ("embeddings.audio", "head"),
        lambda c: _hears(c) and _is(c, "head", "causal-lm", "masked-lm", "span"),
        lambda c: f"an encoder of sound with head {c.head.type}",
        "a head that asks for no text",
        lambda c: "head=sequence-classification",
    ),
    Rule(
        ("embeddings.audio", "max_len"),
        lambda c: _hears(c) and c.max_len < c.embeddings.audio.count,
        lambda c: f"{c.embeddings.audio.count} positions of a recording with max_len {c.max_len}",
        "room for a whole recording",
        lambda c: f"max_len={c.embeddings.audio.count}",
    ),
    Rule(
        ("embeddings.audio", "embeddings.width"),
        lambda c: (
            (c.embeddings.audio is not None or c.embeddings.patch is not None)
            and c.embeddings.width not in (None, c.d_model)
        ),
        lambda c: f"width {c.embeddings.width} beside a front end that gives vectors of d_model {c.d_model}",
        "tables as wide as the model",
        lambda c: f"embeddings.width={c.d_model}",
    ),
    Rule(
        ("embeddings.leads", "embeddings.norm"),
        lambda c: c.embeddings.leads and not (c.embeddings.norm and c.placement in ("pre", "sandwich")),
        lambda c: f"no norm to stand for the first block's (norm {c.embeddings.norm}, placement {c.placement})",
        "embeddings.norm before a block that begins with a norm",
        lambda c: "embeddings.norm=true placement=pre",
    ),
    Rule(
        ("kind", "vocab_size"),
        lambda c: (c.kind == "vision" or _hears(c)) != (c.vocab_size == 0),
        lambda c: f"kind {c.kind}{' of sound' * _hears(c)} with vocab_size {c.vocab_size}",
        "a vocabulary for text, none for images and sound alone",
        lambda c: "vocab_size=256" if c.vocab_size == 0 else "vocab_size=0",
    ),
    Rule(
        ("kind", "head"),
        lambda c: (
            (c.kind == "vision" and c.head.type in TEXT_HEADS) or (c.kind != "vision" and c.head.type in IMAGE_HEADS)
        ),
        lambda c: f"kind {c.kind} with head {c.head.type}",
        "a head that reads what this kind produces",
        lambda c: "head=image-classification" if c.kind == "vision" else "head=causal-lm (or another text head)",
    ),
    Rule(
        ("kind", "head.type"),
        lambda c: (
            (c.kind in ("decoder", "encoder-decoder") and _is(c, "head", "masked-lm"))
            or (c.kind == "encoder-decoder" and not _is(c, "head", "causal-lm"))
        ),
        lambda c: f"kind {c.kind} with head {c.head.type}",
        "causal-lm for an encoder-decoder, masked-lm for an encoder only",
        lambda c: "head=causal-lm",
    ),
    Rule(
        ("kind", "attention.pattern"),
        lambda c: c.kind == "decoder" and "full" in c.attention.pattern,
        lambda c: f"kind {c.kind} with a full mask: a cached decoder cannot look ahead",
        "causal or sliding layers in a decoder",
        lambda c: "attention.pattern=[causal], or kind=encoder",
    ),
    Rule(
        ("head", "attention.pattern"),
        lambda c: c.kind == "encoder" and _is(c, "head", "causal-lm") and set(c.attention.pattern) != {"causal"},
        lambda c: "a causal-lm head over a mask that shows the next token",
        "attention.pattern=[causal] under a causal-lm head",
        lambda c: "kind=decoder, or head=masked-lm",
    ),
    Rule(
        ("attention.pattern", "attention.window"),
        lambda c: ("sliding" in c.attention.pattern) != (c.attention.window is not None),
        lambda c: f"pattern {'/'.join(c.attention.pattern)} with window {c.attention.window}",
        "a window exactly where a layer slides",
        lambda c: "attention.window=128" if "sliding" in c.attention.pattern else "attention.pattern=[sliding]",
    ),
    Rule(
        ("kind", "attention.cross_every"),
        lambda c: (c.kind == "encoder-decoder") != (c.attention.cross_every > 0),
        lambda c: f"kind {c.kind} with cross_every {c.attention.cross_every}",
        "cross-attention exactly in an encoder-decoder",
        lambda c: "attention.cross_every=1" if c.kind == "encoder-decoder" else "attention.cross_every=0",
    ),
    Rule(
        ("kind", "n_decoder_layers"),
        lambda c: (c.kind == "encoder-decoder") != (c.n_decoder_layers > 0),
        lambda c: f"kind {c.kind} with n_decoder_layers {c.n_decoder_layers}",
        "a second depth exactly in an encoder-decoder",
        lambda c: f"n_decoder_layers={c.n_layers if c.kind == 'encoder-decoder' else 0}",
    ),
    Rule(
        ("placement", "residual"),
        lambda c: c.residual == "parallel" and c.placement != "pre",
        lambda c: f"residual parallel with placement {c.placement}",
        "placement pre: both branches read the same input",
        lambda c: "placement=pre",
    ),
    Rule(
        ("kind", "residual"),
        lambda c: c.residual == "parallel" and c.kind == "encoder-decoder",
        lambda c: "residual parallel with kind encoder-decoder: cross-attention reads what self-attention wrote",
        "sequential residuals",
        lambda c: "residual=sequential",
    ),
    Rule(
        ("embeddings.tied", "head"),
        lambda c: c.embeddings.tied and not _is(c, "head", "causal-lm", "masked-lm"),
        lambda c: f"tied embeddings with head {c.head.type}, which has no vocabulary to share",
        "a language-modelling head",
        lambda c: "embeddings.tied=false",
    ),
    Rule(
        ("kind", "embeddings.token_types"),
        lambda c: c.embeddings.token_types > 0 and c.kind != "encoder",
        lambda c: f"kind {c.kind} with {c.embeddings.token_types} token types",
        "token types in an encoder",
        lambda c: "embeddings.token_types=0",
    ),
    Rule(
        ("feed_forward.experts.top_k", "feed_forward.experts.experts"),
        lambda c: c.feed_forward.experts is not None and c.feed_forward.experts.top_k > c.feed_forward.experts.experts,
        lambda c: f"top_k {c.feed_forward.experts.top_k} of {c.feed_forward.experts.experts} experts",
        "top_k at most the number of experts",
        lambda c: f"feed_forward.experts.top_k={c.feed_forward.experts.experts}",
    ),
    Rule(
        ("head.pooling", "embeddings.patch.first_token"),
        lambda c: (
            c.embeddings.patch is not None
            and not c.embeddings.patch.first_token
            and getattr(c.head, "pooling", None) == "first"
        ),
        lambda c: "pooling first without a first token",
        "a first token to read, or mean pooling",
        lambda c: "head.pooling=mean",
    ),
    Rule(
        ("head.pooling", "attention.pattern"),
        lambda c: (
            getattr(c.head, "pooling", None) == "first" and set(c.masks(decoder=c.kind == "decoder")) == {"causal"}
        ),
        lambda c: "pooling first under causal masks: the first token has seen no other",
        "the last token, or the mean",
        lambda c: "head.pooling=last",
    ),
    Rule(
        ("head.labels", "head.problem"),
        lambda c: getattr(c.head, "labels", 2) == 1 and getattr(c.head, "problem", "single") == "single",
        lambda c: "one label of which one is right: nothing to learn",
        "two labels or more, or a regression",
        lambda c: "head.labels=2" + (" or head.problem=regression" if hasattr(c.head, "problem") else ""),
    ),
    Rule(
        ("embeddings.patch", "max_len"),
        lambda c: c.embeddings.patch is not None and c.max_len < c.embeddings.patch_count,
        lambda c: f"{c.embeddings.patch_count} patches with max_len {c.max_len}",
        "room for every patch",
        lambda c: f"max_len={c.embeddings.patch_count}",
    ),
    *(
        Rule(
            (f"tokens.{name}", "vocab_size"),
            lambda c, name=name: (getattr(c.tokens, name) or 0) >= max(c.vocab_size, 1),  # type: ignore[misc]
            lambda c, name=name: f"id {getattr(c.tokens, name)} with vocab_size {c.vocab_size}",  # type: ignore[misc]
            "an id below vocab_size",
            lambda c, name=name: f"tokens.{name}={max(c.vocab_size - 1, 0)}",  # type: ignore[misc]
        )
        for name in ("bos", "eos", "pad", "mask", "decoder_start")
    ),
)


# --- pydantic's findings in our words --------------------------------------------------------------------------


def members(annotation: Any) -> list[type[BaseModel]]:
    """The config classes inside an annotation (through Annotated, unions and Optional)."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Annotated, typing.Union, types.UnionType):
        return [cls for part in typing.get_args(annotation) for cls in members(part)]
    return []


def _tag(cls: type[BaseModel]) -> object:
    return cls.model_fields["type"].default if "type" in cls.model_fields else None


def resolve(cls: type[BaseModel], loc: Sequence[int | str]) -> tuple[list[str], list[type[BaseModel]]]:
    """The user's path of pydantic's `loc` (without union tags), and the classes at its parent."""
    path: list[str] = []
    parents: list[type[BaseModel]] = [cls]
    here: list[type[BaseModel]] = [cls]
    for part in loc:
        tagged = [c for c in here if path and _tag(c) == part]
        if tagged:
            here = tagged
            continue
        path.append(str(part))
        parents = here
        here = [found for c in here if part in c.model_fields for found in members(_annotation(c, str(part)))]
    return path, parents


def _annotation(cls: type[BaseModel], name: str) -> Any:
    return cls.model_fields[name].annotation


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _unknown_key(where: str, key: str, known: Sequence[str]) -> ConfigError:
    """With the nearest name where one is near, else with all names."""
    hint = nearest(key, known)
    return ConfigError(where, f"unknown key {key!r}{hint}", "" if hint else f"one of {', '.join(dict.fromkeys(known))}")


# What pydantic words as an order to "the value", as something that one can expect.
_EXPECTED = {
    "too_short": "at least {min_length} values",
    "too_long": "at most {max_length} values",
    "string_too_short": "at least {min_length} characters",
    "string_too_long": "at most {max_length} characters",
    "string_pattern_mismatch": "text of the form {pattern}",
}


def translate(error: ValidationError, cls: type[BaseModel], prefix: str = "") -> ConfigError:
    """The first of pydantic's findings as one line of ours."""
    # Unknown keys first: a misspelt key also shows up as a missing one, and the spelling is the cause.
    findings = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    first = findings[0]
    path, parents = resolve(cls, first["loc"])
    where = ".".join(([prefix] if prefix else []) + path)
    known = [name for parent in parents for name in parent.model_fields]
    if first["type"] == "extra_forbidden":
        return _unknown_key(where, path[-1], known)
    if first["type"] == "missing":
        return ConfigError(where, "missing", "a value", f"{where}=VALUE")
    if first["type"] in ("union_tag_invalid", "literal_error"):
        expected = str(first["ctx"].get("expected_tags", first["ctx"].get("expected", ""))).replace("'", "")
        given = first["input"]["type"] if first["type"] == "union_tag_invalid" else first["input"]
        return ConfigError(
            where, _shown(given) + nearest(str(given), expected.replace(" or ", ", ").split(", ")), expected
        )
    if first["type"] == "union_tag_not_found":
        choices = [cls for parent in parents for cls in members(_annotation(parent, path[-1]))]
        fields = [name for cls in choices for name in cls.model_fields]
        for key in first["input"]:
            if key not in fields:
                return _unknown_key(f"{where}.{key}", str(key), fields)
        tags = [str(_tag(cls)) for cls in choices]
        return ConfigError(where, _shown(first["input"]), f"a type: {', '.join(tags)}", f"{where}.type={tags[0]}")
    message = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    if first["type"] in _EXPECTED:
        message = _EXPECTED[first["type"]].format(**first["ctx"])
    return ConfigError(where, f"{_shown(first['input'])} ({type(first['input']).__name__})", message)
