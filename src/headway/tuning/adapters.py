"""The walk that puts adapters of every method on a model, chooses among them, and takes them into the weights.

A layer is one inside the blocks: `decoder.blocks.0.attention.qkv`. What is chosen are its parts, by role (`attention`,
`feed_forward`, `all`), by name (`q`, `k`, `v`, `output`, `gate`, `up`, `down`) or by a pattern of full names
(`decoder.blocks.1?.attention.q`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor, nn

from headway.config import ModelConfig
from headway.errors import ConfigError
from headway.nn import Transformer
from headway.nn.attention import Attention
from headway.nn.fused import adapters_changed
from headway.nn.packed import PackedEmbedding, PackedLinear
from headway.training.parts import fused_rows
from headway.tuning.beside import Adapted, Addition, OnLayer, Rows, Site, plain, shape_of, weight_of
from headway.tuning.low_rank import LowRank
from headway.tuning.small import Bottleneck, Prefix, Prefixes, Prompt, Prompts, Scaling
from headway.tuning_config import Added, BottleneckTuning, LowRankTuning, PrefixTuning, PromptTuning, ScalingTuning

DEFAULT = "default"
_NAMES = {"qkv": ("q", "k", "v"), "kv": ("k", "v"), "up": ("gate", "up")}
# Where a method's additions can stand: what they are factors of, or what puts out the states.
_AMONG: Mapping[str, tuple[str, ...]] = {"ia3": ("k", "v", "down"), "bottleneck": ("output", "down")}
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


def chosen(
    model: Transformer, targets: Sequence[str], among: Sequence[str] = ()
) -> list[tuple[Layer, dict[str, Rows]]]:
    """The layers and parts that the targets name, of the parts `among` (all).

    Raises ConfigError for a target that names nothing, with what there is.
    """
    known, missed = list(layers(model)), set(targets)
    found: list[tuple[Layer, dict[str, Rows]]] = []
    for layer in known:
        parts: dict[str, Rows] = {}
        for part, rows in layer.parts.items():
            if among and part not in among:
                continue
            fitting = {t for t in targets if t in ("all", layer.role, part) or fnmatchcase(layer.full(part), t)}
            missed -= fitting
            if fitting:
                parts[part] = rows
        if parts:
            found.append((layer, parts))
    if missed:
        names = [part for layer in known for part in layer.parts if not among or part in among]
        example = next((layer.full(part) for layer in known for part in layer.parts if part in names), "")
        there = f"all, attention, feed_forward, {', '.join(dict.fromkeys(names))}, or a pattern such as {example}"
        raise ConfigError("tuning.targets", f"{sorted(missed)[0]!r}, which is in no layer", there)
    return found


def check_targets(model: Transformer, tuning: object) -> None:
    """Raise ConfigError where a method's targets name nothing, before anything long begins."""
    if isinstance(tuning, LowRankTuning | ScalingTuning | BottleneckTuning):
        chosen(model, tuning.targets, _AMONG.get(tuning.type, ()))


def attach(model: Transformer, tuning: Added, name: str = DEFAULT) -> None:
    """Put new adapters of a method on the model and use them: they change nothing, or nearly, until they are trained.

    All other weights are frozen. Raises ConfigError for targets that name nothing, or a name that is taken.
    """
    if name in names(model):
        raise ConfigError("adapter", f"{name!r} again", "another name")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if isinstance(tuning, PrefixTuning):
        for attention in [one for one in model.modules() if isinstance(one, Attention) and not one.is_cross]:
            prefixes = attention.prefix if isinstance(attention.prefix, Prefixes) else Prefixes()
            attention.prefix = prefixes
            _stand(prefixes, Prefix(tuning.tokens, attention.K, attention.H), name, plain(attention.output))
    elif isinstance(tuning, PromptTuning):
        prompts = model.prompt if isinstance(model.prompt, Prompts) else Prompts()
        model.prompt = prompts
        like = next(iter([*model.parameters(), *model.buffers()]))
        _stand(prompts, Prompt(_vectors(model, tuning.tokens)), name, like)
    else:
        for layer, parts in chosen(model, tuning.targets, _AMONG.get(tuning.type, ())):
            put(model, layer.path, _new(tuning, layer, parts), name)
    use(model, {name: 1.0})


def _new(tuning: LowRankTuning | ScalingTuning | BottleneckTuning, layer: Layer, parts: Mapping[str, Rows]) -> OnLayer:
    """One method's addition to a layer."""
    rows, columns = shape_of(layer.module)
    if isinstance(tuning, ScalingTuning):
        return Scaling(columns, rows, parts, of_inputs="down" in parts)
    if isinstance(tuning, BottleneckTuning):
        return Bottleneck(rows, tuning.size)
    ranks = {part: int(_by_pattern(tuning.rank_pattern, layer.full(part), tuning.rank)) for part in parts}
    alphas = {part: _by_pattern(tuning.alpha_pattern, layer.full(part), tuning.scale) for part in parts}
    scales = {part: alphas[part] / (ranks[part] ** 0.5 if tuning.rslora else ranks[part]) for part in parts}
    adapter = LowRank(columns, rows, parts, ranks, scales, tuning.dropout, dora=tuning.dora)
    if tuning.dora or tuning.start == "svd":
        adapter.begin(weight_of(layer.module), svd=tuning.start == "svd")
    return adapter


def _vectors(model: Transformer, count: int) -> Tensor:
    """Vectors to begin a prompt with: of tokens drawn from the table (arXiv:2104.08691, section 3.2), else small."""
    table, width = model.embeddings.tokens, model.config.d_model
    if not isinstance(table, nn.Embedding | PackedEmbedding) or model.config.embeddings.width:
        return torch.randn(count, width) * 0.02
    ids = torch.randint(model.config.vocab_size, (count,))
    found: Tensor = table(ids.to(next(iter([*table.parameters(), *table.buffers()])).device))
    return found.detach() * model.embeddings.scale


def put(model: Transformer, path: str, addition: OnLayer, name: str) -> None:
    """An addition to one layer, whose device it takes, and whose dtype where its weights are floats."""
    parent_path, _, leaf = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    layer = getattr(parent, leaf)
    if not isinstance(layer, Adapted):
        layer = Adapted(layer).train(layer.training)
        setattr(parent, leaf, layer)
    _stand(layer, addition, name, layer.base)


def _stand(site: Site, addition: Addition, name: str, beside: nn.Module | Tensor) -> None:
    like = beside if isinstance(beside, Tensor) else next(iter([*beside.parameters(), *beside.buffers()]))
    addition.to(like.device, like.dtype if like.is_floating_point() else torch.float32).train(site.training)
    site.added[name] = addition


def _by_pattern(patterns: Mapping[str, float], name: str, otherwise: float) -> float:
    return next((value for pattern, value in patterns.items() if fnmatchcase(name, pattern)), otherwise)


def adapted(model: nn.Module) -> dict[str, Site]:
    """Where adapters stand, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Site)}


def names(model: nn.Module) -> list[str]:
    """The adapters that the model has, in the order in which they came."""
    return list(dict.fromkeys(name for site in adapted(model).values() for name in site.added))


def use(model: nn.Module, strengths: Mapping[str, float]) -> None:
    """Which adapters count from now on and how much: {} is the model without them.

    Raises ConfigError for a name that is not there, and for what only counts whole and alone (magnitudes, prefixes,
    prompts) weighted or beside another.
    """
    known = names(model)
    for name in strengths:
        if name not in known:
            raise ConfigError("adapter", repr(name)[:80], ", ".join(known) or "a model with adapters")
    sites = adapted(model).values()
    for site in sites:
        here = {name: site.added[name] for name in strengths if name in site.added}
        single = [name for name, one in here.items() if isinstance(one, Addition) and one.is_single]
        if single and (len(here) > 1 or strengths[single[0]] != 1.0):
            found = "one with magnitudes (DoRA), a prefix or a prompt, weighted or beside others in its place"
            raise ConfigError("adapter", found, "it alone there, at 1.0")
    for site in sites:
        site.strengths = dict(strengths)
    adapters_changed()


@contextmanager
def unused(model: nn.Module) -> Iterator[None]:
    """Inside, the model answers as if it had no adapters."""
    before = {path: site.strengths for path, site in adapted(model).items()}
    use(model, {})
    try:
        yield
    finally:
        for path, site in adapted(model).items():
            site.strengths = before[path]
        adapters_changed()


def merge(model: Transformer) -> int:
    """Take the adapters in use into the weights and leave plain layers; how many places changed.

    Raises ConfigError where a weight is in codes: adding to it would round it again; and for what is part of no matrix.
    """
    found = adapted(model)
    for path, site in found.items():
        strange = next((one for one, _ in site.active(Addition) if not one.merges), None)
        if strange is not None:
            kind = type(strange).__name__.lower()
            raise ConfigError("adapter", f"{path} has a {kind}, which no weight can hold", "lora or ia3")
        if isinstance(site, Adapted) and isinstance(site.base, PackedLinear) and site.active(Addition):
            kinds = "+".join(site.base.kinds)
            raise ConfigError("adapter", f"{path} is in codes ({kinds})", "weights in floats", "--dtype float32")
    for path, site in found.items():
        parent_path, _, leaf = path.rpartition(".")
        parent = model.get_submodule(parent_path)
        if not isinstance(site, Adapted):
            setattr(parent, leaf, None)
            continue
        if isinstance(site.base, nn.Linear) and site.active(Addition):
            weight, bias = site.merged()
            with torch.no_grad():
                site.base.weight.copy_(weight)
                if bias is not None:
                    site.base.bias.copy_(bias)
        setattr(parent, leaf, site.base)
    return len(found)
