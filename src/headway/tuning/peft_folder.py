"""Adapters as peft keeps them: adapter_config.json and adapter_model.safetensors.

A published model's adapters go by its family's names (families/), a run's by ours. Where the file has one layer for
what are parts of a layer here (GPT-2's c_attn), its A belongs to each of them and its B is cut; what was trained apart
is written back as one adapter of all their ranks. B's rows move as the weight's rows do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headway import files
from headway.checkpoints.tensors import read_header, read_tensors, write_tensors
from headway.errors import ConfigError, InputError
from headway.families._table import Op, chosen
from headway.families._translate import Plan, Rule
from headway.nn import Transformer
from headway.strict import field, strict_json
from headway.tuning.adapters import DEFAULT, Layer, adapted, layers, names, put, use
from headway.tuning.beside import Adapted, shape_of
from headway.tuning.low_rank import LowRank

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
BASE = "base_sha256"
_PREFIX = "base_model.model."
TASKS = {"causal-lm": "CAUSAL_LM", "sequence-classification": "SEQ_CLS", "token-classification": "TOKEN_CLS"}
TASKS |= {"span": "QUESTION_ANS"}
# What changes the answer and is not done here: a file that asks for it is refused, not read as if it did not.
_PLAIN = {
    "bias": ("none",),
    "layer_replication": (None,),
    "use_qalora": (None, False),
    "alora_invocation_tokens": (None,),
}
_PLAIN |= {"trainable_token_indices": (None,), "lora_bias": (None, False), "megatron_config": (None,)}


class Place(NamedTuple):
    """One of the file's layers: its name as a module and as its tensors say it, ours, which of our parts are in it, and
    the rule of its rows if they move."""

    name: str
    older: str
    layer: Layer
    parts: tuple[str, ...]
    rule: Rule | None
    transposed: bool

    def ours(self, B: Tensor) -> Tensor:
        """(R, r) as the file's rows stand -> as ours do."""
        if self.rule is None:
            return B
        rule = self._for(B)
        return rule.gather(lambda _: B.T if self.transposed else B).contiguous()

    def theirs(self, B: Tensor) -> Tensor:
        """The inverse."""
        if self.rule is None:
            return B
        ((_, found),) = self._for(B).scatter(B)
        return (found.T if self.transposed else found).contiguous()

    def _for(self, B: Tensor) -> Rule:
        assert self.rule is not None
        return Rule(self.rule.names, tuple(B.shape), self.rule.node, self.rule.config, self.rule.is_bias)


def places(model: Transformer, plan: Plan | None) -> Iterator[Place]:
    """Every layer inside the blocks as the file has it; without a plan under our own names."""
    rules = {} if plan is None else {name: rule for rule in plan.rules for name in rule.names}
    for layer in layers(model):
        if plan is None:
            for part in layer.parts:
                yield Place(layer.full(part), layer.full(part), layer, (part,), None, False)
            continue
        rule = rules[f"{layer.path}.weight"]
        node, inner = chosen(rule.node, rule.config), rule.leaves()
        columns = rule.shape[1]
        if isinstance(node, Op) and node.stacks and len(inner) == len(layer.parts):
            for (name, shape), part in zip(inner, layer.parts, strict=True):
                yield Place(*_called(name, plan), layer, (part,), None, shape[1] != columns)
        else:
            name, shape = inner[0]
            transposed = isinstance(node, Op) and shape == rule.shape[::-1] and not node.stacks and _turns(node)
            yield Place(*_called(name, plan), layer, tuple(layer.parts), rule, transposed)


def _called(tensor: str, plan: Plan) -> tuple[str, str]:
    """A layer's name as a module and as its tensor says it."""
    name = older = tensor.removesuffix(".weight")
    for before, now in plan.modules.items():
        name = name.replace(before, now)
    return name, older


def _turns(node: Op) -> bool:
    """Whether a step turns a matrix round."""
    return node.shapes((2, 3), None)[0] == (3, 2)  # type: ignore[arg-type]  # which asks no config


def write(
    model: Transformer,
    target: Path,
    plan: Plan | None,
    *,
    name: str = DEFAULT,
    base: str = "",
    base_sha256: str = "",
    overwrite: bool = False,
) -> Path:
    """Write an adapter as a folder that peft loads on the same base.

    Args:
        plan: of the model's family without adapters, None for a run of ours. name: which adapter.
        base, base_sha256: where its base lies and the hash of that model's weights.

    Raises ConfigError for a name that is not there, MachineError: the target exists; the disk.
    """
    if name not in names(model):
        raise ConfigError("adapter", repr(name)[:80], ", ".join(names(model)) or "a model with adapters")
    _check_kind(model, name)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    dropout, turned, has_lengths = 0.0, False, False
    for place in places(model, plan):
        adapter = _adapter(place.layer, name)
        parts = [] if adapter is None else [part for part in place.parts if part in adapter.parts]
        if adapter is None or not parts:
            continue
        A, B, scale = _joined(adapter, place, parts)
        ranks[place.name], alphas[place.name] = len(A), scale * len(A)
        tensors[_key(place.name, "A")] = A.contiguous()
        tensors[_key(place.name, "B")] = place.theirs(B).contiguous()
        if adapter.magnitude:
            has_lengths = True
            lengths = torch.cat([adapter.magnitude[part] for part in parts]).detach()
            tensors[f"{_PREFIX}{place.name}.lora_magnitude_vector"] = place.theirs(lengths[:, None])[:, 0].contiguous()
        dropout, turned = adapter.dropout, turned or place.transposed
    config = {
        "peft_type": "LORA",
        "task_type": _task(model),
        "base_model_name_or_path": base,
        "r": max(ranks.values()),
        "lora_alpha": max(alphas.values()),
        "rank_pattern": {key: value for key, value in ranks.items() if value != max(ranks.values())},
        "alpha_pattern": {key: value for key, value in alphas.items() if value != max(alphas.values())},
        "target_modules": sorted(ranks),
        "lora_dropout": dropout,
        "fan_in_fan_out": turned,
        "bias": "none",
        "use_rslora": False,
        "use_dora": has_lengths,
        "inference_mode": True,
    }
    files.check_target(target, overwrite)
    with files.replacing_folder(target, (CONFIG, WEIGHTS)) as folder:
        files.write(folder / CONFIG, json.dumps(config, indent=2).encode())
        files.write(folder / WEIGHTS, write_tensors(tensors, {"format": "pt", BASE: base_sha256}))
    return target


def _check_kind(model: Transformer, name: str) -> None:
    kinds = {type(site.added[name]) for site in adapted(model).values() if name in site.added}
    if kinds != {LowRank}:
        found = ", ".join(sorted(kind.__name__.lower() for kind in kinds))
        raise ConfigError("--to peft", f"an adapter of the kind {found}", "lora", "--to headway keeps the run")


def _task(model: Transformer) -> str | None:
    """peft's name of what the model is for; None, which suits any model, where it has no name or another input."""
    if model.config.embeddings.audio is not None:
        return None
    return "SEQ_2_SEQ_LM" if model.is_pair else TASKS.get(model.config.head.type)


def _adapter(layer: Layer, name: str) -> LowRank | None:
    found = layer.module.added[name] if isinstance(layer.module, Adapted) and name in layer.module.added else None
    return found if isinstance(found, LowRank) else None


def _joined(adapter: LowRank, place: Place, parts: Sequence[str]) -> tuple[Tensor, Tensor, float]:
    """A, B and the scale of several parts as one layer's; rows without a part are zero."""
    As, Bs = ([kind[part].detach() for part in parts] for kind in (adapter.A, adapter.B))
    scales = [adapter.scales[part] for part in parts]
    if len(parts) == len(place.parts) == 1:
        return As[0], Bs[0], scales[0]
    is_one = all(torch.equal(A, As[0]) for A in As) and len(parts) == len(place.parts) and len({*scales}) == 1
    if is_one:
        return As[0], torch.cat(Bs), scales[0]
    scale = scales[0] if len({*scales}) == 1 else 1.0
    first = min(rows.start for rows in place.layer.parts.values())
    out, at = Bs[0].new_zeros(sum(rows.size for rows in place.layer.parts.values()), sum(map(len, As))), 0
    for part, A, B, own in zip(parts, As, Bs, scales, strict=True):
        rows = place.layer.parts[part]
        out[rows.start - first : rows.start - first + rows.size, at : at + len(A)] = B * (own / scale)
        at += len(A)
    return torch.cat(As), out, scale


def read(model: Transformer, source: Path, plan: Plan | None, *, name: str = DEFAULT, base_sha256: str = "") -> None:
    """Put the adapter of a folder on a model and use it, beside those that it has.

    Its base is never fetched. Raises InputError: no such folder, a pickle, a kind that is not LoRA, another base (by
    hash or shapes), tensors that fit nowhere.
    """
    where = str(source / CONFIG)
    config = _config(source)
    path = source / WEIGHTS
    metadata, _, _ = read_header(path)
    made_for = metadata.get(BASE)
    if made_for and base_sha256 and made_for != base_sha256:
        base = str(config.get("base_model_name_or_path"))[:80]
        found = f"an adapter of {base} with weights {made_for[:12]}"
        raise InputError(where, found, f"the base in use, {base_sha256[:12]}", "load that base, or tune this one")
    tensors = read_tensors(path, copy=True)
    used: set[str] = set()
    ready: list[tuple[str, LowRank]] = []
    by_layer: dict[str, list[Place]] = {}
    for place in places(model, plan):
        by_layer.setdefault(place.layer.path, []).append(place)
    for layer_path, some in by_layer.items():
        adapter = _read_layer(some, tensors, config, used, str(path))
        if adapter is not None:
            ready.append((layer_path, adapter))
    left = sorted(set(tensors) - used)
    if left or not ready:
        found = f"{len(left)} tensors of no layer here, {left[0]}" if left else "no tensor of an adapter"
        raise InputError(str(path), found, "an adapter of this model", "load its own base")
    if name in names(model):
        raise ConfigError("adapter", f"{name!r} again", "another name")
    for layer_path, adapter in ready:
        put(model, layer_path, adapter, name)
    for layer in adapted(model).values():
        layer.requires_grad_(False)
    use(model, {name: 1.0})


def _config(source: Path) -> Mapping[str, Any]:
    """Its adapter_config.json, with what cannot be done here refused."""
    where = str(source / CONFIG)
    if (source / PICKLE).exists() and not (source / WEIGHTS).exists():
        raise InputError(str(source / PICKLE), "a pickle, which may run code", WEIGHTS, "save it with safetensors")
    tree = strict_json(files.read_bytes(source / CONFIG, 1 << 24), where)
    if str(field(tree, "peft_type", str, where)) != "LORA":
        assert isinstance(tree, dict)
        raise InputError(f"{where} peft_type", repr(tree["peft_type"])[:40], "LORA")
    assert isinstance(tree, dict)
    for key, known in _PLAIN.items():
        if key in tree and tree[key] not in known:
            raise InputError(f"{where} {key}", repr(tree[key])[:80], f"{known[0]!r}")
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in field(tree, key, (dict, type(None)), where) or {} if key in tree else ():  # type: ignore[attr-defined]
            if not re.fullmatch(r"[\w.]+", pattern):
                raise InputError(f"{where} {key}", repr(pattern)[:80], "names of layers, no expressions")
    field(tree, "r", int, where)
    field(tree, "lora_alpha", (int, float), where)
    return tree


def _read_layer(
    some: Sequence[Place], tensors: Mapping[str, Tensor], config: Mapping[str, Any], used: set[str], where: str
) -> LowRank | None:
    """One layer's adapter from the file's layers for it; None where it has none."""
    layer = some[0].layer
    As: dict[str, Tensor] = {}
    Bs: dict[str, Tensor] = {}
    scales: dict[str, float] = {}
    lengths: dict[str, Tensor] = {}
    all_rows, columns = shape_of(layer.module)
    for place in some:
        named = (name for name in (place.name, place.older) for kind in "AB" if _key(name, kind) in tensors)
        name = next(named, None)
        if name is None:
            continue
        keys = [_key(name, kind) for kind in "AB"]
        rows = sum(layer.parts[part].size for part in place.parts)
        A, B = (tensors.get(key, torch.empty(0, 0)) for key in keys)
        rank = A.shape[0]
        if A.shape != (rank, columns) or B.shape != (rows, rank) or not rank:
            found = f"{name}: A {tuple(A.shape)}, B {tuple(B.shape)}"
            raise InputError(where, found, f"(r, {columns}) and ({rows}, r)", "load the adapter's own base")
        used.update(keys)
        alpha = _pattern(config.get("alpha_pattern"), name, config["lora_alpha"])
        ours = place.ours(B)
        key = f"{_PREFIX}{name}.lora_magnitude_vector"
        key = key if key in tensors else f"{key}.weight"
        long = place.ours(tensors[key].reshape(-1, 1))[:, 0] if key in tensors else None
        used.update({key} & set(tensors))
        at = 0
        for part in place.parts:
            count = layer.parts[part].size
            As[part], Bs[part] = A, ours[at : at + count]
            scales[part] = alpha / (rank**0.5 if config.get("use_rslora") else rank)
            if long is not None:
                lengths[part] = long[at : at + count]
            at += count
    if not As:
        return None
    parts = {part: layer.parts[part] for part in layer.parts if part in As}
    ranks = {part: len(As[part]) for part in parts}
    dropout = float(config.get("lora_dropout") or 0.0)
    adapter = LowRank(columns, all_rows, parts, ranks, scales, dropout, dora=bool(lengths))
    adapter.to(next(iter(As.values())).dtype)
    _fill(adapter, As, Bs, lengths)
    return adapter


@torch.no_grad()
def _fill(adapter: LowRank, As: Mapping[str, Tensor], Bs: Mapping[str, Tensor], lengths: Mapping[str, Tensor]) -> None:
    for part in adapter.parts:
        adapter.A[part].copy_(As[part])
        adapter.B[part].copy_(Bs[part])
        if part in lengths:
            adapter.magnitude[part].copy_(lengths[part])


def _key(name: str, kind: str) -> str:
    return f"{_PREFIX}{name}.lora_{kind}.weight"


def _pattern(patterns: object, name: str, otherwise: float) -> float:
    """The value of the first of these names that a layer's name ends with."""
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        if f".{name}".endswith(f".{pattern}"):
            return float(value)
    return otherwise
