"""Folders as Hugging Face's libraries write them: config.json and safetensors, one file or shards with an index.

Reading is strict: config and weights must agree to the last tensor (rows F8, F9, K8, K11-K13, K17). Names and layouts
come from the family's table; writing reads the same table backwards. Tensors that only change their name stay views of
the mapped file, those that are joined are copied once and their pages given back.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headway import files
from headway.checkpoints.raw import looks_like_pickle
from headway.checkpoints.tensors import DTYPES, TensorFile, check_finite, count_nonfinite, write_tensors
from headway.config import ModelConfig, PooledEmbedding, with_fields
from headway.errors import ConfigError, InputError
from headway.families import Family, families, family_of
from headway.families._translate import CODE_KEYS, Plan, is_unread, plan, read_config, write_config
from headway.strict import strict_json

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
MAX_JSON = 1 << 26
SHARD_BYTES = 5_000_000_000
_BARE = re.compile(r"[^./\\\0:][^/\\\0:]{0,254}")
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Checkpoint:
    """A published model in our terms.

    Attributes:
        config: ours. weights: ours by name, tied ones shared. family, architecture: whose it is.
        raw: the config.json as found. notes: what the reader should know.
        unread: tensors of the file that this model has no use for, kept to be written back.
    """

    config: ModelConfig
    weights: dict[str, Tensor]
    family: Family
    architecture: str
    raw: Mapping[str, Any]
    notes: list[str] = field(default_factory=list)
    unread: dict[str, Tensor] = field(default_factory=dict)


# --- the files ---------------------------------------------------------------------------------------------------


class Tensors:
    """The tensors of one or several safetensors files, or of a dict, under one roof: shapes at once, data on demand."""

    def __init__(self, where: str, held: Mapping[str, Tensor | TensorFile]) -> None:
        self.where = where
        self._held = {name: (name, one) for name, one in held.items()}  # with the name that it has there

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, name: str) -> bool:
        return name in self._held

    def renamed(self, names: Mapping[str, str]) -> Tensors:
        """The same tensors, some under other names: {old: new}."""
        out = Tensors(self.where, {})
        out._held = {names.get(name, name): held for name, held in self._held.items()}
        return out

    def only(self, names: Mapping[str, str]) -> Tensors:
        """These tensors and no others, under other names: {old: new}."""
        out = Tensors(self.where, {})
        out._held = {new: self._held[old] for old, new in names.items()}
        return out

    def place(self, name: str) -> str:
        """The file that holds a tensor."""
        _, held = self._held[name]
        return str(held.path) if isinstance(held, TensorFile) else self.where

    def shape(self, name: str) -> tuple[int, ...]:
        """Without reading the data."""
        own, held = self._held[name]
        return held.entries[own].shape if isinstance(held, TensorFile) else tuple(held.shape)

    def dtype(self, name: str) -> torch.dtype:
        """Without reading the data."""
        own, held = self._held[name]
        return DTYPES[held.entries[own].dtype] if isinstance(held, TensorFile) else held.dtype

    def __getitem__(self, name: str) -> Tensor:
        own, held = self._held[name]
        return held[own] if isinstance(held, TensorFile) else held

    def release(self, names: Iterable[str]) -> None:
        """The data of these tensors stands elsewhere now."""
        for own, held in (self._held[name] for name in names):
            if isinstance(held, TensorFile):
                held.release(own)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a folder. Raises InputError."""
    tree = strict_json(files.read_bytes(path, MAX_JSON), str(path))
    if not isinstance(tree, dict):
        raise InputError(str(path), f"a {type(tree).__name__}", "an object")
    return tree


def open_tensors(folder: Path) -> Tensors:
    """The weights of a folder; one file goes before shards, as elsewhere.

    Raises InputError: none there, pickles only, an index that does not fit its shards.
    """
    if os.path.lexists(folder / WEIGHTS) or not os.path.lexists(folder / INDEX):
        pickled = next((name for name in PICKLES if (folder / name).exists()), None)
        if pickled and not os.path.lexists(folder / WEIGHTS):
            raise _pickled(folder / pickled)
        file = _open(folder / WEIGHTS)
        return Tensors(str(folder / WEIGHTS), dict.fromkeys(file.entries, file))
    return Tensors(str(folder / INDEX), _shards(folder))


def _open(path: Path) -> TensorFile:
    with files.open_regular(path) as file:
        if looks_like_pickle(file.read(64)):
            raise _pickled(path)
    return TensorFile(path)


def _pickled(path: Path) -> InputError:
    fix = f"headway convert --unsafe-pickle {path.parent} DST"
    return InputError(str(path), "pickled weights, which can run code", f"safetensors in {WEIGHTS}", fix)


def _shards(folder: Path) -> dict[str, TensorFile]:
    """Every tensor's shard by the index, checked both ways."""
    where = str(folder / INDEX)
    tree = read_json(folder / INDEX)
    index, metadata = tree.get("weight_map"), tree.get("metadata")
    if not isinstance(index, dict) or not index or not all(isinstance(name, str) for name in index.values()):
        raise InputError(f"{where} weight_map", "missing or malformed", "names of tensors with names of files")
    shards = sorted(set(index.values()))
    for shard in shards:
        if not _BARE.fullmatch(shard):
            raise InputError(f"{where} weight_map", f"shard {shard[:80]!r}", "a bare file name in the same folder")
    opened: dict[str, TensorFile] = {}
    for shard in shards:
        opened[shard] = _open(folder / shard)
        for name in opened[shard].entries:
            if index.get(name) != shard:
                owner = index.get(name, "no shard")
                raise InputError(f"{folder / shard}", f"holds tensor {name[:80]!r}", f"it in {owner} by the index")
    missing = [name for name, shard in index.items() if name not in opened[shard].entries]
    if missing:
        found = f"tensor {missing[0][:80]!r} is not in it"
        raise InputError(str(folder / index[missing[0]]), found, f"it by {where}")
    said = metadata.get("total_size") if isinstance(metadata, dict) else None
    total = sum(entry.end - entry.begin for file in opened.values() for entry in file.entries.values())
    if said is not None and said != total:
        sizes = ", ".join(
            f"{name} {sum(e.end - e.begin for e in file.entries.values())}" for name, file in opened.items()
        )
        raise InputError(f"{where} metadata.total_size", repr(said)[:80], f"{total} bytes of data ({sizes[:400]})")
    return {name: opened[shard] for name, shard in index.items()}


# --- reading -----------------------------------------------------------------------------------------------------


def read_folder(folder: Path, *, dtype: torch.dtype | None = None, allow_nonfinite: bool = False) -> Checkpoint:
    """A Hugging Face folder as our config and weights.

    Args:
        dtype: cast the weights to it; by default they stay as stored.
        allow_nonfinite: accept NaN and infinity among them.

    Raises InputError naming file and key or tensor.
    """
    raw = read_json(folder / CONFIG)
    return translate(raw, open_tensors(folder), str(folder / CONFIG), dtype=dtype, allow_nonfinite=allow_nonfinite)


def translate(
    raw: Mapping[str, Any],
    tensors: Tensors,
    where: str,
    *,
    dtype: torch.dtype | None = None,
    allow_nonfinite: bool = False,
    pooling: PooledEmbedding | None = None,
) -> Checkpoint:
    """Published config and tensors in our terms; a bare encoder with this `pooling` in place of its own.

    Raises InputError; see `read_folder`.
    """
    family = family_of(raw, where)
    config, _, architecture, notes = read_config(family, raw, where)
    if pooling is not None and config.kind == "encoder" and isinstance(config.head, PooledEmbedding):
        config = with_fields(config, head=pooling)
    layers, networks = config.n_layers + config.n_decoder_layers, getattr(config.feed_forward.experts, "experts", 1)
    if layers * networks > len(tensors):  # said before so many modules are made
        found = f"{layers} layers of {networks} feed-forward networks"
        raise InputError(where, found, f"at most {len(tensors)}, as many as there are tensors in {tensors.where}")
    wanted = fitting_plan(family, architecture, config, tensors)
    # Of tied tensors a file may hold any one (the first by name in some of huggingface.co's conversions).
    other = {kept: one for one, kept in wanted.spare.items() if one in tensors and kept not in tensors}
    tensors = tensors.renamed({one: kept for kept, one in other.items()})
    check(wanted, family, tensors, where)
    if config.embeddings.tied and _differing(wanted, tensors):
        # Both tables are there and differ: the config's word for it is wrong (T5 1.1 as transformers 5 saves it).
        notes.append(f"{tensors.where}: output and embedding differ although {where} ties them; they stay apart")
        untied = config.embeddings.model_copy(update={"tied": False})
        config = with_fields(config, embeddings=untied)
        wanted = fitting_plan(family, architecture, config, tensors)
    for one in _differing(wanted, tensors):
        raise InputError(tensors.place(one), f"tensor {one} differs from {wanted.spare[one]}", "one table for both")
    unread = check(wanted, family, tensors, where)
    tensors.release(one for one in wanted.spare if one in tensors)
    weights: dict[str, Tensor] = {}
    # Joined ones first: while their pages are there twice, those of the others need not be there yet.
    for rule in sorted(wanted.rules, key=lambda rule: len(rule.leaves()) == 1):
        names = [name for name, _ in rule.leaves()]
        for name in names:
            if tensors.dtype(name) not in _FLOATS:
                raise InputError(tensors.place(name), f"tensor {name} is {_said(tensors.dtype(name))}", _KNOWN)
        tensor = rule.gather(tensors.__getitem__)
        if not allow_nonfinite and count_nonfinite(tensor):
            for name in names:
                check_finite(tensors[name], name, tensors.place(name))
        if dtype is not None:
            tensor = tensor.to(dtype)
        if len(names) != 1 or tensor.data_ptr() != tensors[names[0]].data_ptr():
            tensors.release(names)
        weights |= dict.fromkeys(rule.names, tensor)
    if dtype is None:
        notes += _dtype_note(raw, weights, tensors.where, where)
    if unread:
        notes.append(f"{tensors.where}: {len(unread)} tensors are not read by this model ({', '.join(unread[:3])})")
    return Checkpoint(config, weights, family, architecture, raw, notes, {name: tensors[name] for name in unread})


def fitting_plan(family: Family, architecture: str, config: ModelConfig, tensors: Tensors) -> Plan:
    """The plan under whichever prefix the file's names have: libraries disagree on `model.` for a bare body."""
    head = family.heads[architecture]
    prefixes = dict.fromkeys([head.prefix, "", *(other.prefix for other in family.heads.values())])

    def found(prefix: str) -> int:
        return sum(name in tensors for name in _body_names(family, prefix))

    best = max(prefixes, key=lambda prefix: (found(prefix), prefix == head.prefix))
    try:
        return plan(family, head, config, best)
    except ConfigError as error:
        raise InputError(tensors.where, error.found, error.expected) from None


def _differing(wanted: Plan, tensors: Tensors) -> list[str]:
    """Second names of a table under which the file holds other values."""
    both = [(one, kept) for one, kept in wanted.spare.items() if one in tensors]
    return [one for one, kept in both if not torch.equal(tensors[one], tensors[kept])]


def _body_names(family: Family, prefix: str) -> list[str]:
    """The names of the first layer's and outer modules' weights that need no operation."""
    plain = [node for node in family.weights.values() if isinstance(node, str)]
    return [prefix + node.replace("{i}", "0").replace("{e}", "0") + end for node in plain for end in (".weight", "")]


def check(wanted: Plan, family: Family, tensors: Tensors, where: str) -> list[str]:
    """Names and shapes against the file. Returns the names that nobody reads.

    Raises InputError: the first misshapen tensor with both shapes and the number of others, or missing and unexpected
    ones counted, with five of them and the family whose names they are (K8, F9).
    """
    needed = dict(leaf for rule in wanted.rules for leaf in rule.leaves())
    wrong = [name for name, shape in needed.items() if name in tensors and tensors.shape(name) != shape]
    for name in wrong:
        more = f", and {len(wrong) - 1} others do not fit" if len(wrong) > 1 else ""
        found = f"tensor {name} has shape {tensors.shape(name)}{more}"
        raise InputError(tensors.place(name), found, f"{needed[name]} by {where}", _likely(family, tensors))
    missing = [name for name in needed if name not in tensors]
    doubles = {name: wanted.spare[name] for name in wanted.spare if name in tensors}
    for name, kept in doubles.items():
        if tensors.shape(name) != tensors.shape(kept):
            raise InputError(tensors.place(name), f"tensor {name} has shape {tensors.shape(name)}", f"that of {kept}")
    rest = [name for name in tensors if name not in needed]
    unread = [name for name in rest if is_unread(family, name) and name not in wanted.spare]
    surplus = [name for name in rest if name not in unread and name not in wanted.spare]
    if missing or surplus:
        parts = [f"{len(some)} {what} ({', '.join(some[:5])})" for what, some in
                 (("missing", missing), ("unexpected", surplus)) if some]  # fmt: skip
        raise InputError(
            tensors.where, f"tensors: {' and '.join(parts)}", f"the {len(needed)} of {where}", _likely(family, tensors)
        )
    return unread


def _likely(family: Family, tensors: Tensors) -> str:
    """Whose names these are, where they fit the usual names of another family better."""

    def fit(other: Family) -> float:
        prefix, known = _usual_names(other.model_type)
        names = {_unnumbered(name).removeprefix(prefix) for name in tensors}
        return len(names & known) / len(names | known)

    best = max(families().values(), key=fit)
    if fit(best) <= max(0.3, fit(family) if family.model_type in families() else 0.0):
        return ""
    return f'the names look like {best.model_type}: "model_type": "{best.model_type}" with its config'


def _unnumbered(name: str) -> str:
    return re.sub(r"\.\d+(?=\.)", ".0", name)


@functools.cache
def _usual_names(model_type: str) -> tuple[str, set[str]]:
    """What names begin with in a family's usual architecture, and without that and numbers those of its defaults."""
    family = families()[model_type]
    config = read_config(family, {}, model_type).config
    small = with_fields(config, n_layers=2, n_decoder_layers=min(config.n_decoder_layers, 2))
    head = next(iter(family.heads.values()))
    rules = plan(family, head, small, "").rules
    return head.prefix, {_unnumbered(name) for rule in rules for name, _ in rule.leaves()}


def _said(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_KNOWN = f"one of {', '.join(map(_said, _FLOATS))}"


def _dtype_note(raw: Mapping[str, Any], weights: Mapping[str, Tensor], held: str, where: str) -> list[str]:
    """Config and file may name two dtypes; the file's counts until --dtype says otherwise (K7)."""
    said = raw.get("dtype", raw.get("torch_dtype"))
    found = sorted({_said(tensor.dtype) for tensor in weights.values()})
    if said is None or found == [said]:
        return []
    return [
        f"{where} says dtype {said!r:.40}, the weights of {held} are {' and '.join(found)} and stay so (--dtype casts)"
    ]


# --- writing -----------------------------------------------------------------------------------------------------


def choose_family(config: ModelConfig, preferred: str | None = None) -> tuple[Family, str]:
    """The first family and architecture that can express a config; the preferred family first.

    Raises ConfigError with the reason of the nearest one when none can.
    """
    known = sorted(
        families().values(), key=lambda family: (family.model_type != preferred, family.model_type != "llama")
    )
    reasons = []
    for family in known:
        if family.fixed.get("kind") != config.kind:
            continue
        for architecture, head in family.heads.items():
            if head.fields["head.type"] != config.head.type:
                continue
            try:
                write_config(family, architecture, config)
                plan(family, head, config)
                return family, architecture
            except ConfigError as error:
                reasons.append(error)
    if not reasons:
        raise ConfigError("model", f"no family has kind {config.kind} with head {config.head.type}", "one that has")
    raise min(reasons, key=lambda error: max(str(error).count(" against "), 1))  # the fewest fields, the usual first


def folder_files(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    *,
    family: Family,
    architecture: str,
    raw: Mapping[str, Any] | None = None,
    unread: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Iterator[tuple[str, files.Content]]:
    """(name, content) of each file of a Hugging Face folder for these weights, written lazily.

    Args:
        raw: the config.json that the model came with; its other keys are kept.
        unread: tensors that came with it. dtype: cast the weights to it.
        shard_bytes: a file holds at most so many.

    Raises ConfigError when the family cannot express the config.
    """
    head = family.heads[architecture]
    body = write_config(family, architecture, config, raw)
    out: dict[str, Tensor] = {}
    for rule in plan(family, head, config).rules:
        tensor = weights[rule.names[0]].detach()
        out |= rule.scatter(tensor if dtype is None else tensor.to(dtype))
    name = _said(next(iter(out.values())).dtype)
    out = {**(unread or {}), **out}
    tree = {**_kept(raw, family), **body, "dtype": name, "torch_dtype": name}
    yield CONFIG, json.dumps(tree, indent=2, sort_keys=True).encode() + b"\n"
    shards = _split(out, shard_bytes)
    if len(shards) == 1:
        yield WEIGHTS, write_tensors(out, {"format": "pt"}, alias=False)
        return
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for shard_name, shard in zip(names, shards, strict=True):
        yield shard_name, write_tensors(shard, {"format": "pt"}, alias=False)
    where = {tensor: shard_name for shard_name, shard in zip(names, shards, strict=True) for tensor in shard}
    total = sum(tensor.nbytes for tensor in out.values())
    yield INDEX, json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2).encode() + b"\n"


def _kept(raw: Mapping[str, Any] | None, family: Family) -> dict[str, Any]:
    """Keys of the original config that we do not write ourselves and that still hold."""
    if not raw or raw.get("model_type") != family.model_type:
        return {}
    dropped = {*CODE_KEYS, "_name_or_path", "transformers_version", "rope_scaling", "quantization_config"}
    return {key: value for key, value in raw.items() if key not in dropped}


def _split(tensors: Mapping[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    """Tensors in order, a new shard where the limit would be passed."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def write_folder(target: Path, contents: Iterable[tuple[str, files.Content]], *, overwrite: bool = False) -> None:
    """A new folder with these files; see `files.replacing_folder`.

    Raises MachineError: it exists and is not empty (unless `overwrite`), it is no folder of a model, the disk refuses.
    """
    files.check_target(target, overwrite)
    with files.replacing_folder(target, (CONFIG,)) as folder:
        for name, content in contents:
            files.make_dir((folder / name).parent)
            files.write(folder / name, content)
            files.sync(folder / name)
            files.sync((folder / name).parent)
