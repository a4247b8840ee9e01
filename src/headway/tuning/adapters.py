"""The walk that puts adapters on a model's layers, chooses among them, and takes them into the weights.

A layer is one inside the blocks: `decoder.blocks.0.attention.qkv`. What is chosen are its parts, by role (`attention`,
`feed_forward`, `all`), by name (`q`, `k`, `v`, `output`, `gate`, `up`, `down`) or by a pattern of full names
(`decoder.blocks.1?.attention.q`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import nn

from headway.config import ModelConfig
from headway.errors import ConfigError
from headway.nn import Transformer
from headway.nn.packed import PackedLinear
from headway.run_config import LowRankTuning
from headway.training.parts import fused_rows
from headway.tuning.low_rank import Adapted, LowRank, Rows, shape_of, weight_of

DEFAULT = "default"
_NAMES = {"qkv": ("q", "k", "v"), "kv": ("k", "v"), "up": ("gate", "up")}
_ROLES = {"attention": "attention", "cross_attention": "attention", "feed_forward": "feed_forward"}


class Layer(NamedTuple):
    """A layer that can have adapters: where it stands, its role, itself or what holds it, and its parts."""

    path: str
    role: str
    module: nn.Module
    parts: dict[str, Rows]

    def full(self, part: str) -> str:
        """The full name of a part."""
        return f"{self.path.rpartition('.')[0]}.{part}"


def layers(model: Transformer) -> Iterator[Layer]:
    """Every linear layer inside the blocks, with or without adapters, in the order of the module tree."""
    for path, module in model.named_modules():
        parent, _, leaf = path.rpartition(".")
        if not isinstance(module, nn.Linear | PackedLinear | Adapted) or ".blocks." not in f".{path}":
            continue
        if leaf == "base" or leaf == "router":
            continue
        rows, _ = shape_of(module)
        role = next((_ROLES[name] for name in reversed(parent.split(".")) if name in _ROLES), "")
        yield Layer(path, role, module, _parts(leaf, rows, model.config))


def _parts(leaf: str, rows: int, config: ModelConfig) -> dict[str, Rows]:
    counts = fused_rows(config).get(leaf, (rows,))
    names = _NAMES[leaf] if len(counts) > 1 else (leaf,)
    starts = [sum(counts[:number]) for number in range(len(counts))]
    return {name: Rows(start, count) for name, start, count in zip(names, starts, counts, strict=True)}


def chosen(model: Transformer, targets: Sequence[str]) -> list[tuple[Layer, dict[str, Rows]]]:
    """The layers and parts that the targets name. Raises ConfigError for one that names nothing, with what there is."""
    known, missed = list(layers(model)), set(targets)
    found: list[tuple[Layer, dict[str, Rows]]] = []
    for layer in known:
        parts: dict[str, Rows] = {}
        for part, rows in layer.parts.items():
            fitting = {t for t in targets if t in ("all", layer.role, part) or fnmatchcase(layer.full(part), t)}
            missed -= fitting
            if fitting:
                parts[part] = rows
        if parts:
            found.append((layer, parts))
    if missed:
        names = list(dict.fromkeys(part for layer in known for part in layer.parts))
        example = known[0].full(next(iter(known[0].parts))) if known else ""
        there = f"all, attention, feed_forward, {', '.join(names)}, or a pattern such as {example}"
        raise ConfigError("tuning.targets", f"{sorted(missed)[0]!r}, which is in no layer", there)
    return found


def attach(model: Transformer, tuning: LowRankTuning, name: str = DEFAULT) -> None:
    """Put a new adapter on the chosen layers and use it: it changes nothing until it is trained.

    All other weights are frozen. Raises ConfigError for targets that name nothing, or a name that is taken.
    """
    if name in names(model):
        raise ConfigError("adapter", f"{name!r} again", "another name")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for layer, parts in chosen(model, tuning.targets):
        ranks = {part: int(_by_pattern(tuning.rank_pattern, layer.full(part), tuning.rank)) for part in parts}
        alphas = {part: _by_pattern(tuning.alpha_pattern, layer.full(part), tuning.scale) for part in parts}
        scales = {part: alphas[part] / (ranks[part] ** 0.5 if tuning.rslora else ranks[part]) for part in parts}
        rows, columns = shape_of(layer.module)
        adapter = LowRank(columns, rows, parts, ranks, scales, tuning.dropout, dora=tuning.dora)
        if tuning.dora:
            adapter.begin(weight_of(layer.module))
        put(model, layer.path, adapter, name)
    use(model, {name: 1.0})


def put(model: Transformer, path: str, adapter: LowRank, name: str) -> None:
    """An adapter on one layer, whose device it takes, and whose dtype where its weights are floats."""
    parent_path, _, leaf = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    layer = getattr(parent, leaf)
    if not isinstance(layer, Adapted):
        layer = Adapted(layer).train(layer.training)
        setattr(parent, leaf, layer)
    like = next(iter([*layer.base.parameters(), *layer.base.buffers()]))
    adapter.to(like.device, like.dtype if like.is_floating_point() else torch.float32).train(layer.training)
    layer.low_rank[name] = adapter


def _by_pattern(patterns: Mapping[str, float], name: str, otherwise: float) -> float:
    return next((value for pattern, value in patterns.items() if fnmatchcase(name, pattern)), otherwise)


def adapted(model: nn.Module) -> dict[str, Adapted]:
    """The layers with adapters, by their path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Adapted)}


def names(model: nn.Module) -> list[str]:
    """The adapters that the model has, in the order in which they came."""
    return list(dict.fromkeys(name for layer in adapted(model).values() for name in layer.low_rank))


def use(model: nn.Module, strengths: Mapping[str, float]) -> None:
    """Which adapters count from now on and how much: {} is the model without them.

    Raises ConfigError for a name that is not there, and for magnitudes (DoRA) beside another adapter.
    """
    known = names(model)
    for name in strengths:
        if name not in known:
            raise ConfigError("adapter", repr(name)[:80], ", ".join(known) or "a model with adapters")
    for layer in adapted(model).values():
        layer.strengths = dict(strengths)
        found = layer.active()
        if any(adapter.magnitude for adapter, _ in found.values()) and (
            len(found) > 1 or {*strengths.values()} != {1.0}
        ):
            raise ConfigError("adapter", "one with magnitudes (DoRA), weighted or beside others", "it alone, at 1.0")


def merge(model: Transformer) -> int:
    """Take the adapters in use into the weights and leave plain layers; how many layers changed.

    Raises ConfigError where a weight is in codes: adding to it would round it again.
    """
    found = adapted(model)
    for path, layer in found.items():
        if isinstance(layer.base, PackedLinear) and layer.active():
            kinds = "+".join(layer.base.kinds)
            raise ConfigError("adapter", f"{path} is in codes ({kinds})", "weights in floats", "--dtype float32")
    for path, layer in found.items():
        parent, _, leaf = path.rpartition(".")
        if isinstance(layer.base, nn.Linear) and layer.active():
            with torch.no_grad():
                layer.base.weight.copy_(layer.merged())
        setattr(model.get_submodule(parent), leaf, layer.base)
    return len(found)
