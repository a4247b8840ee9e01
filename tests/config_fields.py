"""Every field of a config at every depth, and what its JSON Schema says of a value: the material of the sweeps."""

from __future__ import annotations

import copy
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel

from headway.config import ModelConfig
from headway.errors import ConfigError, HeadwayError
from headway.generation import GenerationOptions
from headway.run_config import RunConfig

MODEL: dict[str, Any] = {"d_model": 8, "n_layers": 1, "n_heads": 2, "vocab_size": 10, "max_len": 8}
VISION: dict[str, Any] = {
    "kind": "vision",
    "vocab_size": 0,
    "max_len": 5,
    "embeddings": {"patch": {"size": 4, "image": 8}},
}
PAIR: dict[str, Any] = {"kind": "encoder-decoder"}
ENCODER: dict[str, Any] = {"kind": "encoder"}
BASES: dict[type[BaseModel], dict[str, Any]] = {ModelConfig: MODEL, RunConfig: {}, GenerationOptions: {}}
# A value for each required field of a nested object.
REQUIRED: dict[str, Any] = {"factor": 2.0, "original_len": 8, "short": [1.0, 1.0], "long": [2.0, 2.0]}
REQUIRED |= {"experts": 4, "size": 2, "image": 4, "teacher": "runs/teacher"}


class Place(NamedTuple):
    """One field: the class that declares it, its path, a whole config around it, and its JSON Schema."""

    owner: type[BaseModel]
    path: tuple[str, ...]
    base: dict[str, Any]
    schema: dict[str, Any]
    defs: dict[str, Any]

    @property
    def dotted(self) -> str:
        return ".".join(self.path)

    def with_value(self, value: object) -> dict[str, Any]:
        """The config around this field with `value` in it."""
        return planted(self.base, self.path, value)

    def misspelt(self, name: str) -> dict[str, Any]:
        """The config around this field with the field's name replaced by `name`."""
        out = planted(self.base, self.path, REQUIRED.get(self.path[-1], 1))
        parent = inside(out, self.path[:-1])
        parent[name] = parent.pop(self.path[-1])
        return out


def inside(tree: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    for name in path:
        tree = tree.setdefault(name, {})
    return tree


def planted(tree: dict[str, Any], path: tuple[str, ...], value: object) -> dict[str, Any]:
    """A copy of `tree` with `value` at `path`."""
    out = copy.deepcopy(tree)
    inside(out, path[:-1])[path[-1]] = value
    return out


def classes(annotation: Any) -> list[type[BaseModel]]:
    """The config classes of an annotation, unions and Optional included."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Annotated, typing.Union, types.UnionType):
        return [found for part in typing.get_args(annotation) for found in classes(part)]
    return []


def sample(cls: type[BaseModel]) -> dict[str, Any]:
    """The smallest object of this class: its tag, and a value for every field without a default."""
    tag = {"type": cls.model_fields["type"].default} if "type" in cls.model_fields else {}
    return tag | {name: REQUIRED[name] for name, info in cls.model_fields.items() if info.is_required()}


def places(root: type[BaseModel]) -> list[Place]:
    """Every field of `root` and of every class that can stand inside it."""
    whole = root.model_json_schema()
    defs = {root.__name__: whole, **whole.get("$defs", {})}

    def walk(cls: type[BaseModel], base: dict[str, Any], path: tuple[str, ...]) -> Iterator[Place]:
        for name, info in cls.model_fields.items():
            here = (*path, name)
            yield Place(cls, here, base, defs[cls.__name__]["properties"][name], defs)
            for member in classes(info.annotation):
                yield from walk(member, planted(base, here, sample(member)), here)

    return list(walk(root, BASES[root], ()))


def accepts(schema: Mapping[str, Any], value: Any, defs: Mapping[str, Any]) -> bool:
    """Whether a JSON Schema (the part of it that pydantic writes) accepts a value. NaN and infinity are no JSON."""
    if "$ref" in schema:
        return accepts(defs[schema["$ref"].rpartition("/")[2]], value, defs)
    for word in ("anyOf", "oneOf"):
        if word in schema:
            return any(accepts(part, value, defs) for part in schema[word])
    if "const" in schema or "enum" in schema:
        return any(type(value) is type(one) and value == one for one in schema.get("enum", [schema.get("const")]))
    match schema.get("type"):
        case "null":
            return value is None
        case "boolean":
            return type(value) is bool
        case "integer":
            return type(value) is int and _within(schema, value)
        case "number":
            return type(value) in (int, float) and math.isfinite(value) and _within(schema, value)
        case "string":
            fits = isinstance(value, str) and schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", 2**31)
            return fits and re.search(schema.get("pattern", ""), value) is not None
        case "array":
            fits = isinstance(value, list) and schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", 2**31)
            return fits and all(accepts(schema["items"], one, defs) for one in value)
        case "object":
            return isinstance(value, dict) and _object(schema, value, defs)
    return not schema  # the empty schema takes anything


def _object(schema: Mapping[str, Any], value: dict[str, Any], defs: Mapping[str, Any]) -> bool:
    known, rest = schema.get("properties", {}), schema.get("additionalProperties", True)
    if not all(name in value for name in schema.get("required", ())):
        return False
    for name, one in value.items():
        if name not in known and rest is False:
            return False
        here = known.get(name, rest)
        if isinstance(here, Mapping) and not accepts(here, one, defs):
            return False
    return True


def _within(schema: Mapping[str, Any], value: float) -> bool:
    return schema.get("minimum", -math.inf) <= value <= schema.get("maximum", math.inf) and schema.get(
        "exclusiveMinimum", -math.inf
    ) < value < schema.get("exclusiveMaximum", math.inf)


def error_of(cls: type[BaseModel], fields: dict[str, Any]) -> ConfigError | None:
    """What is wrong with these fields; any exception but a ConfigError goes through."""
    try:
        cls(**fields)
    except HeadwayError as error:
        assert isinstance(error, ConfigError) and error.exit_code == 2, repr(error)
        assert "\n" not in str(error)
        return error
    return None
