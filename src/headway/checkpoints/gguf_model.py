"""A whole model from a GGUF file and into one; see gguf.py for the container and families/_gguf.py for the names."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headway.checkpoints.gguf import Gguf, Source, read_gguf, write_gguf
from headway.checkpoints.hub_folder import Tensors, check
from headway.config import ModelConfig
from headway.errors import ConfigError, InputError
from headway.families import Family, families
from headway.families._gguf import FACTORS, HAS, dialect
from headway.families._table import Op, chosen, gather
from headway.families._translate import Rule, plan, read_config, write_config
from headway.files import Chunk
from headway.kernels.ggml import BLOCKS, FLOATS, dequantize, quantize
from headway.machine import return_memory
from headway.nn.packed import Packed

FORMATS = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "BF16": 32}
"""What can be written, with the number that `general.file_type` has for it (llama.h, llama_ftype)."""
MANY = 1 << 24
"""Weights read, after which what their bytes took in passing is given back."""


# Fields that stand in the tokenizer's metadata, or that change nothing there.
_ELSEWHERE = ("norm.offset", "tokens.", "head.normalize")


class GgufModel:
    """A model in a GGUF file.

    Attributes: `config`; `family`, whose dialect the file is in; `architecture`, its class in transformers; `metadata`;
    `weights`, ours by name, quantized matrices as Packed unless a dtype was asked for; `notes`.
    """

    def __init__(self, source: Path | Gguf, dtype: torch.dtype | None = None) -> None:
        self.notes: list[str] = []
        with contextlib.nullcontext(source) if isinstance(source, Gguf) else read_gguf(source) as file:
            where = str(file.path)
            self.metadata = file.metadata
            raw = _described(file)
            self.family = _family(file, raw, where)
            self.architecture = next(iter(self.family.heads))
            names = dialect(self.family)
            self.config = read_config(names, raw, where).config
            wanted = plan(names, names.heads[names.model_type], self.config)
            shapes = {name: torch.empty(shape, device="meta") for name, shape in _shapes(file).items()}
            check(wanted, names, Tensors(where, shapes), where)
            # The largest first: the room that its bytes leave behind is enough for what the others need in passing.
            rules = sorted(wanted.rules, key=lambda rule: -math.prod(rule.shape))
            self.weights: dict[str, Tensor | Packed] = {}
            passed = 0
            for rule in rules:
                self.weights |= dict.fromkeys(rule.names, _weight(rule, file, dtype))
                passed += math.prod(rule.shape)
                if passed >= MANY:
                    return_memory()
                    passed = 0


def _family(file: Gguf, raw: Mapping[str, Any], where: str) -> Family:
    """Of the families that share an architecture's name the one with experts if the file has some, else the first."""
    arch = raw["architectures"][0]
    known = [family for family in families().values() if family.gguf == arch]
    if not known:
        names = sorted({family.gguf for family in families().values() if family.gguf})
        raise InputError(f"{where} general.architecture", repr(arch)[:80], f"one of {', '.join(names)}")
    has_experts = bool(raw.get(f"{arch}.expert_count"))
    fitting = [f for f in known if any(name.startswith("feed_forward.experts") for name in f.weights) == has_experts]
    return min(fitting or known, key=lambda family: family.model_type != arch)


def _described(file: Gguf) -> dict[str, Any]:
    """The metadata with what only the tensors say; float32 numbers in their shortest form (1e-05, not 9.99...e-06)."""
    metadata = {
        key: float(str(np.float32(value))) if isinstance(value, float) else value
        for key, value in file.metadata.items()
    }
    tensors = file.tensors
    arch = str(metadata.get("general.architecture", ""))
    ids = {name: metadata.get(f"tokenizer.ggml.{theirs}_token_id") for name, theirs in _IDS.items()}
    embedding = tensors.get("token_embd.weight")
    out: dict[str, Any] = {**metadata, "architectures": [arch], **ids}
    out["vocab_size"] = embedding.shape[0] if embedding else metadata.get(f"{arch}.vocab_size")
    out["has no output.weight"] = "output.weight" not in tensors
    for part, others in {"attn_q": ("attn_qkv",), "attn_output": (), "ffn_up": ()}.items():
        out[f"has {part}.bias"] = any(f"blk.0.{one}.bias" in tensors for one in (part, *others))
    for name in FACTORS:
        if name in tensors:
            out[name] = dequantize(tensors[name].kind, file.raw(name)).flatten().tolist()
    heads = out.get(f"{arch}.attention.head_count_kv")
    if isinstance(heads, list) and len(set(heads)) == 1:
        out[f"{arch}.attention.head_count_kv"] = heads[0]
    return out


_IDS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}


def _shapes(file: Gguf) -> dict[str, tuple[int, ...]]:
    """Shapes by name; a stack of experts (E, ...) is E matrices `name[e].weight`."""
    out: dict[str, tuple[int, ...]] = {}
    for name, tensor in file.tensors.items():
        if "_exps." in name and len(tensor.shape) > 1:
            head, _, suffix = name.rpartition(".")
            out |= {f"{head}[{e}].{suffix}": tensor.shape[1:] for e in range(tensor.shape[0])}
        else:
            out[name] = tensor.shape
    return out


def _raw(file: Gguf, name: str) -> tuple[str, Tensor]:
    """Format and bytes of one matrix; `name[e]` is expert e of a stack."""
    whole = _stack(name)
    part = None if whole == name else int(name.partition("[")[2].partition("]")[0])
    return file.tensors[whole].kind, file.raw(whole, part=part)


def _stack(name: str) -> str:
    """The stack that `name[e].weight` is in: `name.weight`."""
    head, _, rest = name.partition("[")
    return head + rest.partition("]")[2]


def _weight(rule: Rule, file: Gguf, dtype: torch.dtype | None) -> Tensor | Packed:
    """One of our tensors: in blocks if the file has it in blocks and no dtype was asked for."""
    names = [name for name, _ in rule.leaves()]
    kinds = {file.tensors[_stack(name)].kind for name in names}
    if dtype is None and not kinds & FLOATS.keys() and len(rule.shape) == 2:
        return Packed.of_blocks(tuple(_blocks(rule, file)))

    def fetch(name: str) -> Tensor:
        kind, raw = _raw(file, name)
        if kind in FLOATS and dtype is None:
            return raw.view(FLOATS[kind])
        values = dequantize(kind, raw)
        return values if dtype is None else values.to(dtype)

    return rule.gather(fetch).contiguous()


def _blocks(rule: Rule, file: Gguf) -> Iterator[tuple[str, Tensor]]:
    """The groups of rows of a packed matrix: one where all has one format, else one for each matrix that was joined.

    All operations on matrices in GGUF files move whole rows, so they act on the rows' bytes as they would on weights.
    """
    node = chosen(rule.node, rule.config)
    formats = {name: _raw(file, name) for name, _ in rule.leaves()}

    def fetch(name: str) -> Tensor:
        return formats[name][1]

    if len({kind for kind, _ in formats.values()}) == 1:
        yield next(iter(formats.values()))[0], rule.gather(fetch)
        return
    assert isinstance(node, Op) and node.stacks
    for one, shape in zip(node.inner, node.shapes(rule.shape, rule.config), strict=True):
        leaf = Rule((), shape, one, rule.config, rule.is_bias)
        yield formats[leaf.leaves()[0][0]][0], gather(one, shape, rule.config, fetch)


# --- writing -----------------------------------------------------------------------------------------------------


def gguf_metadata(config: ModelConfig, family: Family) -> tuple[dict[str, object], dict[str, Tensor]]:
    """What a GGUF file says of this config, and the factors of its rotary frequencies, which stand in tensors.

    Raises ConfigError: the family has no GGUF form, or its form cannot express this config.
    """
    if family.gguf is None:
        raise ConfigError("--to gguf", f"llama.cpp has no architecture for {family.model_type}", "--to hf")
    names = dialect(family)
    # These two become factors per frequency, in tensors of their own.
    factored = getattr(getattr(config.positions, "scaling", None), "type", "") in ("llama3", "longrope")
    ignoring = (*_ELSEWHERE, "positions.scaling") if factored else _ELSEWHERE
    said = write_config(names, names.model_type, config, ignoring=ignoring)
    factors = {key: torch.tensor(said.pop(key)) for key in FACTORS if key in said}
    dropped = {"model_type", "architectures", "vocab_size", *HAS}
    metadata = {key: value for key, value in said.items() if key not in dropped and value is not None}
    return metadata | {f"{names.model_type}.vocab_size": config.vocab_size}, factors


def gguf_chunks(
    config: ModelConfig,
    weights: Mapping[str, Tensor | Packed],
    family: Family,
    *,
    kind: str = "F32",
    name: str = "model",
    vocabulary: Mapping[str, object] | None = None,
    types: Mapping[str, str] | None = None,
) -> Iterator[Chunk]:
    """The bytes of a GGUF file that llama.cpp loads.

    Args:
        kind: format of the matrices (a name of FORMATS); vectors stay F32, and rows that its blocks do not divide too.
            A packed matrix keeps its own format where GGUF has it.
        name: `general.name`. vocabulary: the `tokenizer.*` metadata, `types` those of its values that
            are not what write_gguf takes them for.

    Raises ConfigError: the family has no GGUF form, or its form cannot express this config.
    """
    if kind not in FORMATS:
        raise ConfigError("--dtype", f"{kind!r}", f"one of {', '.join(FORMATS)}")
    said, factors = gguf_metadata(config, family)
    names = dialect(family)
    tensors = _sources(config, weights, names, kind)
    metadata: dict[str, object] = {
        "general.architecture": names.model_type,
        "general.type": "model",
        "general.name": name,
        "general.file_type": FORMATS[_commonest(tensors)],
        "general.quantization_version": 2,
    }
    tensors |= {key: Source("F32", tuple(value.shape), value) for key, value in factors.items()}
    yield from write_gguf(metadata | said | dict(vocabulary or {}), tensors, types)


def _commonest(tensors: Mapping[str, Source]) -> str:
    """The format of most weights."""
    counts: dict[str, int] = {}
    for tensor in tensors.values():
        counts[tensor.kind] = counts.get(tensor.kind, 0) + math.prod(tensor.shape)
    return max(counts, key=counts.__getitem__)


def _sources(
    config: ModelConfig, weights: Mapping[str, Tensor | Packed], names: Family, kind: str
) -> dict[str, Source]:
    """Every tensor of the file, made when its turn comes; experts as one stack."""
    out: dict[str, Source] = {}
    stacks: dict[str, list[tuple[Rule, str]]] = {}
    for rule in plan(names, names.heads[names.model_type], config).rules:
        held = weights[rule.names[0]]
        own = held.format if isinstance(held, Packed) else None
        for theirs, shape in rule.leaves():
            if "[" in theirs:
                stacks.setdefault(_stack(theirs), []).append((rule, theirs))
                continue
            if own is not None and len(shape) == 2:
                out[theirs] = Source(own, shape, partial(_as_they_are, rule, theirs, weights))
                continue
            fit = kind if len(shape) == 2 and shape[-1] % BLOCKS[kind].size == 0 and "_norm" not in theirs else "F32"
            out[theirs] = Source(fit, shape, partial(_written, [(rule, theirs)], weights, fit))
    for theirs, parts in stacks.items():
        shape = (len(parts), *dict(parts[0][0].leaves())[parts[0][1]])
        fit = kind if shape[-1] % BLOCKS[kind].size == 0 else "F32"
        out[theirs] = Source(fit, shape, partial(_written, parts, weights, fit))
    return dict(sorted(out.items(), key=lambda item: _order(item[0])))


def _as_they_are(rule: Rule, theirs: str, weights: Mapping[str, Tensor | Packed]) -> Tensor:
    """The rows of one tensor of the file, blocks of ours: operations on matrices move whole rows (`_blocks`)."""
    held = weights[rule.names[0]]
    assert isinstance(held, Packed)
    return dict(rule.scatter(held.blocks()))[theirs].contiguous()


def _order(name: str) -> tuple[int, int, str]:
    """Outer tensors first, then block by block."""
    parts = name.split(".")
    return (1, int(parts[1]), name) if parts[0] == "blk" else (0, 0, name)


def _written(parts: list[tuple[Rule, str]], weights: Mapping[str, Tensor | Packed], kind: str) -> Tensor:
    """The bytes of one tensor of the file."""
    found = [dict(rule.scatter(_plain(weights[rule.names[0]])))[theirs] for rule, theirs in parts]
    whole = found[0] if len(found) == 1 and "[" not in parts[0][1] else torch.stack(found)
    if not math.prod(whole.shape):
        raise InputError(parts[0][1], "no values", "a tensor that holds some")
    return quantize(kind, whole.contiguous(), parts[0][1])


def _plain(weight: Tensor | Packed) -> Tensor:
    return weight.unpack() if isinstance(weight, Packed) else weight.detach().float()
