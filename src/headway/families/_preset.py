"""A family's own form at sizes of one's choice: what a new model must be for the family's runtimes to load it.

Nothing about an architecture is said here: sizes go out as keys of its config.json, and what its table makes of such a
file comes back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headway.config import ModelConfig
from headway.errors import ConfigError, InputError, nearest
from headway.families import Family, families
from headway.families._translate import read_config, write_config

KEY = "preset"
_ROUND = 8  # rows of a feed-forward network where the family's share of the width gives no whole number


def preset_family(name: str) -> Family:
    """The family of a preset. Raises ConfigError with the nearest name."""
    known = families()
    if name not in known:
        raise ConfigError(KEY, f"{name[:80]!r}{nearest(name, known)}", f"one of {', '.join(known)}")
    return known[name]


def architecture_for(family: Family, head: str) -> str:
    """The family's usual class with a head of this type. Raises ConfigError with those it has."""
    for architecture, one in family.heads.items():
        if one.fields["head.type"] == head:
            return architecture
    having = sorted({str(one.fields["head.type"]) for one in family.heads.values()})
    raise ConfigError("preset and objective", f"{family.model_type} with head {head}", f"head {' or '.join(having)}")


def preset_fields(family: Family, head: str, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a model of this family; `sizes` are dotted fields of ours, d_model and n_heads among them.

    What nobody says is proportioned as in the family's published model: the feed-forward network by its share of the
    width, heads by theirs. Ids of special tokens are left open, and so is what concerns training alone.

    Raises ConfigError: no such head, or sizes that the family does not have.
    """
    defaults = {key.ours: key.default for key in family.keys.values()}
    given = {"n_kv_heads": sizes["n_heads"], "d_head": sizes["d_model"] // sizes["n_heads"], **sizes}
    if "d_ff" not in given and defaults.get("d_ff") is not None:
        share = float(str(defaults["d_ff"])) / float(str(defaults["d_model"]))
        given["d_ff"] = round(share * sizes["d_model"] / _ROUND) * _ROUND
    numbers = {theirs: key.ours for theirs, key in family.keys.items() if key.names is None}
    raw: dict[str, Any] = {theirs: given[ours] for theirs, ours in numbers.items() if ours in given}
    raw["architectures"] = [architecture_for(family, head)]
    try:
        tree = read_config(family, raw, family.model_type).config.model_dump(mode="json")
    except InputError as error:
        raise ConfigError(KEY, f"{error.where}: {error.found}", error.expected) from None
    if tree["embeddings"]["audio"] is not None:
        raise ConfigError(KEY, f"{family.model_type} reads sound", "a family that reads text or images")
    del tree["tokens"], tree["init"]
    tree["dropout"] = tree["attention"]["dropout"] = 0.0
    return tree


def check_preset(name: str, config: ModelConfig) -> None:
    """Whether the family can hold a model after all that was changed in it. Raises ConfigError with the fields."""
    family = preset_family(name)
    try:
        write_config(family, architecture_for(family, config.head.type), config)
    except ConfigError as error:
        fix = "leave out those, or the preset"
        raise ConfigError("preset and model", error.found, f"what {name} has", fix) from None
