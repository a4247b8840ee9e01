"""A published config into ours and back, and the list of tensors that a file of a family must hold."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor

from headway.config import CausalLM, MaskedLM, ModelConfig, PooledEmbedding
from headway.errors import ConfigError, InputError
from headway.families._table import (
    Choice,
    Family,
    Fetch,
    Head,
    Node,
    Op,
    Shape,
    gather,
    leaves,
    prefixed,
    scatter,
    spares,
)
from headway.nn import Transformer
from headway.run_config import flatten, put

Raw = Mapping[str, Any]
_NUMBERED = re.compile(r"\b(blocks|experts)\.(\d+)")
# What names code to be fetched and run: never followed, never written.
CODE_KEYS = ("auto_map", "_attn_implementation", "_attn_implementation_internal", "custom_pipelines")


class Described(NamedTuple):
    """A config.json understood: our config, whose architecture it is, and what was left aside."""

    config: ModelConfig
    family: Family
    architecture: str
    notes: list[str]


# --- configs -----------------------------------------------------------------------------------------------------

MAX_LAYERS, MAX_SIZE = 2_000, 1 << 40
_SIZES = frozenset(
    ["d_model", "n_layers", "n_decoder_layers", "n_heads", "n_kv_heads", "d_head", "vocab_size", "max_len"]
)
_WHOLE, _REAL = (int,), (int, float)
# What codecs calculate with before our own config checks it, besides the sizes.
_KINDS: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("rope_parameters", "rope_scaling", "id2label"), (dict,)),
    **dict.fromkeys(("layer_types", "no_rope_layers"), (list,)),
    **dict.fromkeys(("problem_type", "feed_forward_proj"), (str,)),
    **dict.fromkeys(("mlp_ratio", "query_pre_attn_scalar"), _REAL),
    **dict.fromkeys(("global_attn_every_n_layers", "sliding_window_pattern", "no_rope_layer_interval"), _WHOLE),
    **dict.fromkeys(("sliding_window", "local_attention", "max_window_layers", "max_source_positions"), _WHOLE),
}
_NAMES = {dict: "an object", list: "an array", str: "a string", int: "a whole number", float: "a number"}


def _usable(family: Family, raw: Raw, where: str) -> Raw:
    """The config with this family's defaults, fit to be calculated with. Raises InputError."""
    ours = {theirs: key.ours for theirs, key in family.keys.items()}
    kinds = {**_KINDS, **{theirs: _WHOLE for theirs, field in ours.items() if field in _SIZES}}
    for key, types in kinds.items():
        if (value := raw.get(key)) is None:
            continue
        if type(value) not in types:
            raise InputError(f"{where} {key}", repr(value)[:80], _NAMES[types[-1]])
        most = MAX_LAYERS if ours.get(key) in ("n_layers", "n_decoder_layers") else MAX_SIZE
        if type(value) in _REAL and not (0 < value <= most or (value == 0 and key == "max_window_layers")):
            raise InputError(f"{where} {key}", repr(value)[:80], f"a number from 1 to {most}")
    # Null means that a key is missing, but no window where it is the width of one.
    idle = {key for key in kinds if raw.get(key) is None} - {"sliding_window", "local_attention"}
    defaults = {theirs: key.default for theirs, key in family.keys.items() if key.default is not None}
    return defaults | {key: value for key, value in raw.items() if key not in idle}


def read_config(family: Family, raw: Raw, where: str) -> Described:
    """Our config of a published one. Raises InputError naming file, key, what was found and what is known."""
    architecture = _architecture(family, raw, where)
    for key, known in family.only.items():
        if raw.get(key) is not None and raw[key] != known:
            raise InputError(f"{where} {key}", repr(raw[key])[:80], f"{known!r}: the only form of it known here")
    tree: dict[str, Any] = {}
    values: dict[str, object] = {**family.fixed}
    # What the file says goes before the default of another key with the same meaning.
    for theirs, entry in sorted(family.keys.items(), key=lambda item: item[0] in raw):
        value = raw.get(theirs, entry.default)
        if entry.names is not None and isinstance(value, str):
            if value not in entry.names:
                raise InputError(f"{where} {theirs}", repr(value)[:80], f"one of {', '.join(entry.names)}")
            value = entry.names[value]
        if value is not None:
            values |= dict.fromkeys((entry.ours, *entry.also), value)
    usable = _usable(family, raw, where)
    try:
        for special in family.special:
            values |= special.read(usable)
    except InputError as error:
        raise InputError(f"{where} {error.where}", error.found, error.expected) from None
    except KeyError as error:
        raise InputError(f"{where} {error.args[0]}", "missing", "a value") from None
    head = dict(family.heads[architecture].fields)
    if head["head.type"] not in ("causal-lm", "masked-lm"):
        values.pop("embeddings.tied", None)  # there is no output to share the table with
    values = {name: value for name, value in values.items() if not name.startswith("head.")} | _of_head(values, head)
    for dotted, value in values.items():
        put(tree, dotted, value)
    try:
        config = ModelConfig(**tree)
    except ConfigError as error:
        back = {key.ours: theirs for theirs, key in family.keys.items()}
        place = " and ".join(back.get(part, part) for part in error.where.split(" and "))
        raise InputError(f"{where} {place}", error.found, error.expected) from None
    ours = flatten(config.model_dump(mode="json"))
    for name, value in family.heads[architecture].needs.items():
        if ours[name] != value:
            raise InputError(f"{where} {architecture}", f"{name} {ours[name]}", f"{value}, which its head always has")
    ignored = [key for key in CODE_KEYS if key in raw]
    notes = [f"{where}: {', '.join(ignored)} ignored: no code is taken from a file"] if ignored else []
    return Described(config, family, architecture, notes)


def _of_head(values: Mapping[str, object], head: Mapping[str, object]) -> dict[str, object]:
    """The fields of this head: what the config says of labels concerns only heads that have labels."""
    known = HEAD_FIELDS[str(head["head.type"])]
    said = {name: value for name, value in values.items() if name.startswith("head.") and name[5:] in known}
    return said | dict(head)


HEAD_FIELDS: dict[str, frozenset[str]] = {
    "causal-lm": frozenset(["bias", "softcap", "scale"]),
    "masked-lm": frozenset(["transform", "transform_bias", "bias"]),
    "sequence-classification": frozenset(["labels", "problem", "pooling"]),
    "token-classification": frozenset(["labels"]),
    "image-classification": frozenset(["labels"]),
    "pooled-embedding": frozenset(["projection", "pooling"]),
    "span": frozenset(),
}


def _architecture(family: Family, raw: Raw, where: str) -> str:
    named = raw.get("architectures") or [next(iter(family.heads))]
    first = named[0] if isinstance(named, list) and named else named
    if not isinstance(first, str) or first not in family.heads:
        raise InputError(f"{where} architectures", repr(first)[:80], f"one of {', '.join(family.heads)}")
    return str(first)


def write_config(
    family: Family, architecture: str, config: ModelConfig, raw: Raw | None = None, ignoring: tuple[str, ...] = ()
) -> dict[str, object]:
    """The config.json of a model of this family; a name in `raw` that means the same stays as it is spelt there.

    Fields that begin with one of `ignoring` may be lost: they stand elsewhere.

    Raises ConfigError naming the fields that the family cannot express.
    """
    ours = flatten(config.model_dump(mode="json"))
    out: dict[str, object] = {"model_type": family.model_type, "architectures": [architecture], **family.only}
    is_language = isinstance(config.head, CausalLM | MaskedLM)
    for theirs, key in family.keys.items():
        if key.ours not in ours or (key.ours == "embeddings.tied" and not is_language):
            continue
        value = ours[key.ours]
        if key.least and value < key.least:
            raise ConfigError(key.ours, f"{family.model_type} cannot express {value}", f"at least {key.least}")
        if key.names is not None:
            spelt = (raw or {}).get(theirs)
            same = [name for name, meant in key.names.items() if meant == value]
            value = spelt if spelt in same else next(iter(same), None)
        out[theirs] = value
    try:
        for special in family.special:
            out |= special.write(config)
        again = read_config(family, out, "config.json").config
    except (InputError, AssertionError, AttributeError, KeyError) as error:
        raise ConfigError("model", f"{family.model_type} cannot express it ({error})", "another family") from None
    said = (raw or {}).get("id2label")
    if isinstance(said, Mapping) and len(said) == getattr(config.head, "labels", None):  # their names, not numbers
        numbers = (raw or {}).get("label2id") or {str(name): i for i, name in enumerate(said.values())}
        out |= {"id2label": said, "label2id": numbers}
    if config.kind == "encoder" and isinstance(config.head, PooledEmbedding):
        # A bare encoder's config is silent on pooling: files beside it say that.
        ignoring = (*ignoring, "head.pooling", "head.normalize", "head.transform", "head.max_len")
    different = [one for one in differences(config, again) if not one.startswith(ignoring)]
    if different:
        raise ConfigError(
            "model", f"{family.model_type} cannot express {', '.join(different[:5])}", "a family that has them"
        )
    return out


# What a config says of training, not of the function that the weights compute.
_TRAINING = ("init.", "dropout", "attention.dropout", "feed_forward.experts.balance", "head.temperature", "layer_scale")


def differences(one: ModelConfig, other: ModelConfig) -> list[str]:
    """`field (value against value)` of each field in which two configs compute different functions."""
    left, right = _by_layer(one), _by_layer(other)
    names = [name for name in sorted(left.keys() | right.keys()) if left.get(name) != right.get(name)]
    # Of two different types the parameters say nothing more.
    tagged = [name.removesuffix("type") for name in names if name.endswith(".type")]
    return [
        f"{name} ({left.get(name)} against {right.get(name)})"
        for name in names
        if not name.startswith(_TRAINING) and not any(name.startswith(tag) and name != f"{tag}type" for tag in tagged)
    ]


def _by_layer(config: ModelConfig) -> dict[str, Any]:
    """Every field by its dotted name, patterns of layers written out: they can be said in several ways."""
    out = flatten(config.model_dump(mode="json"))
    depth = max(config.n_layers, config.n_decoder_layers)
    for name in out.keys() & {"attention.pattern", "positions.layers"}:
        out[name] = [out[name][layer % len(out[name])] for layer in range(depth)]
    return out


# --- weights -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """One of our tensors, all its names (tied ones share it), its shape, and where it stands in the file."""

    names: tuple[str, ...]
    shape: Shape
    node: Node
    config: ModelConfig
    is_bias: bool

    def leaves(self) -> list[tuple[str, Shape]]:
        """(name, shape) in the file."""
        return list(leaves(self.node, self.shape, self.config, is_bias=self.is_bias))

    def gather(self, fetch: Fetch) -> Tensor:
        """Our tensor; `fetch` gives the file's by name."""
        return gather(self.node, self.shape, self.config, fetch, is_bias=self.is_bias)

    def scatter(self, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The file's tensors by name."""
        return scatter(self.node, tensor, self.config, is_bias=self.is_bias)


@dataclass(frozen=True)
class Plan:
    """Every tensor of a model in a family's file. `spare` are second names of tied tensors that a file may hold too,
    `modules` the family's."""

    rules: list[Rule]
    spare: dict[str, str]
    modules: Mapping[str, str]


def plan(family: Family, head: Head, config: ModelConfig, prefix: str | None = None) -> Plan:
    """Where each tensor of a model with this config stands in a file; `prefix` in place of the head's.

    Raises ConfigError: the family has no place for a tensor, or one has more bytes than 64 bits can count.
    """
    try:
        state = Transformer.blank(config).state_dict(keep_vars=True)
    except (RuntimeError, TypeError) as error:  # torch's words for such a size
        raise ConfigError("model", f"sizes beyond any memory ({error})"[:200], "those of the weights") from None
    owners: dict[int, list[str]] = {}
    for name, tensor in state.items():
        owners.setdefault(id(tensor), []).append(name)
    used = head.prefix if prefix is None else prefix
    table = {name: prefixed(used, node) for name, node in family.weights.items()} | dict(head.weights)
    rules: list[Rule] = []
    spare: dict[str, str] = {}
    for names in owners.values():
        found = [(node, bias) for name in names for node, bias in _lookup(table, name)]
        if not found:
            raise ConfigError("model", f"{family.model_type} has no place for {names[0]}", "a family that has one")
        node, is_bias = found[0]
        rule = Rule(tuple(names), tuple(state[names[0]].shape), node, config, is_bias)
        rules.append(rule)
        spare |= dict.fromkeys(spares(node, config), next((name for name, _ in rule.leaves()), ""))
        for other, _ in found[1:]:
            for (again, _), (kept, _) in zip(leaves(other, rule.shape, config), rule.leaves(), strict=False):
                spare[again] = kept
    return Plan(rules, spare, family.modules)


def _lookup(table: Mapping[str, Node], name: str) -> Iterator[tuple[Node, bool]]:
    """The node of one of our names, with the numbers of layer and expert put in."""
    numbers = {kind[0] if kind == "experts" else "i": number for kind, number in _NUMBERED.findall(name)}
    general = _NUMBERED.sub(lambda m: f"{m[1]}.{{{'e' if m[1] == 'experts' else 'i'}}}", name)
    if general in table:
        yield _filled(table[general], numbers, ""), False
        return
    module, _, suffix = general.rpartition(".")
    if module in table:
        yield _filled(table[module], numbers, f".{suffix}"), suffix == "bias"


def _filled(node: Node, numbers: Mapping[str, str], suffix: str) -> Node:
    if isinstance(node, Choice):
        return Choice(node.field, {value: _filled(one, numbers, suffix) for value, one in node.nodes.items()})
    if isinstance(node, Op):
        return replace(node, inner=tuple(_filled(one, numbers, suffix) for one in node.inner))
    return type(node)(node.format(**numbers) + suffix)


def is_unread(family: Family, name: str) -> bool:
    """Whether a tensor of this name is known to be read by no forward."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in family.unread)
