"""Examples on disk: columns of different lengths as flat arrays with offsets, encoded once and memory-mapped.

    folder/examples.safetensors    train.input_ids.values, train.input_ids.ends, ..., valid...
    folder/manifest.json           what it was made of (files, tokenizer, form, lengths), its hash, what was cut

The same files, tokenizer and lengths open what was built before. Files keep their side of the split: by `valid_path`,
or by the hash of what an example is about (forms.split_key), so that no question stands on both sides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headway import files
from headway.checkpoints.tensors import read_tensors, write_tensors
from headway.data.encode import SECOND, Coder, Encode, Encoded, Losses
from headway.errors import InputError
from headway.strict import dump_json, strict_json

_TOGETHER = 1024  # examples
TENSORS, META = "examples.safetensors", "manifest.json"
_VERSION = 2  # of how rows become columns and sides; raise it when that changes


class Column:
    """A list of sequences of different lengths: item i is values[ends[i-1]:ends[i]]."""

    def __init__(self, values: NDArray[Any], ends: NDArray[np.int64]) -> None:
        self.values, self.ends = values, ends

    @classmethod
    def of(cls, rows: Iterable[Sequence[int] | Sequence[float]]) -> Column:
        """Gather rows; floats stay floats."""
        kept = [np.asarray(row, dtype=np.float32 if row and isinstance(row[0], float) else np.int32) for row in rows]
        lengths = np.array([len(row) for row in kept], dtype=np.int64)
        return cls(np.concatenate(kept) if kept else np.zeros(0, np.int32), lengths.cumsum())

    @classmethod
    def joined(cls, parts: Sequence[Column]) -> Column:
        """The items of several columns, one behind the other."""
        begins = np.cumsum([0, *(len(part.values) for part in parts[:-1])])
        ends = [part.ends + begin for part, begin in zip(parts, begins, strict=True)]
        return cls(np.concatenate([part.values for part in parts]), np.concatenate(ends))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: int) -> NDArray[Any]:
        return self.values[(self.ends[number - 1] if number else 0) : self.ends[number]]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """How long each item is."""
        return np.diff(self.ends, prepend=0)


@dataclass(frozen=True)
class Examples:
    """One side of a data set, encoded.

    Attributes:
        columns: by name; all of one length.
        hash: of what they hold, so that another way to the same examples is the same data (R10).
    """

    columns: Mapping[str, Column]
    hash: str

    @classmethod
    def of(cls, columns: Mapping[str, Column]) -> Examples:
        """Examples known by their content."""
        digest = hashlib.sha256()
        for name, column in sorted(columns.items()):
            digest.update(dump_json([name, str(column.values.dtype), len(column)]).encode())
            digest.update(np.ascontiguousarray(column.values).data)
            digest.update(np.ascontiguousarray(column.ends).data)
        return cls(columns, digest.hexdigest())

    @classmethod
    def joined(cls, parts: Sequence[Examples]) -> Examples:
        """The examples of several sources, one behind the other; all have the same columns."""
        if len(parts) == 1:
            return parts[0]
        columns = {name: Column.joined([part.columns[name] for part in parts]) for name in parts[0].columns}
        return cls(columns, hashlib.sha256("".join(part.hash for part in parts).encode()).hexdigest())

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """The longest column of each example: what padding is measured by."""
        inputs = [column.lengths for name, column in self.columns.items() if name != "labels" or len(self.columns) == 1]
        return np.max(inputs, axis=0) if inputs else np.zeros(0, np.int64)

    @property
    def tokens(self) -> int:
        """Ids of all inputs."""
        return sum(
            int(self.columns[name].lengths.sum()) for name in ("input_ids", SECOND["input_ids"]) if name in self.columns
        )

    def batch(self, ids: Sequence[int], pads: Mapping[str, int]) -> dict[str, Tensor]:
        """The model's arguments for these examples.

        A column in `pads` is padded to its longest row with that value; the others have equal lengths, and length one
        loses its dimension. `attention_mask` is there if input_ids were padded.
        """
        out: dict[str, Tensor] = {}
        for name, column in self.columns.items():
            rows = [column[number] for number in ids]
            if name not in pads:
                stacked = torch.from_numpy(np.stack(rows))
                stacked = stacked if stacked.is_floating_point() else stacked.long()
                out[name] = stacked[:, 0] if stacked.shape[1] == 1 else stacked
                continue
            longest = max(map(len, rows))
            table = np.full((len(rows), longest), pads[name], dtype=np.int64)
            for place, row in enumerate(rows):
                table[place, : len(row)] = row
            out[name] = torch.from_numpy(table)
            if name == "input_ids" and min(map(len, rows)) < longest:
                sizes = torch.tensor([len(row) for row in rows])
                out["attention_mask"] = torch.arange(longest)[None] < sizes[:, None]
        return out


def encode_all(examples: Iterable[Any], encode: Encode, coder: Coder, losses: Losses) -> Iterator[Encoded]:
    """Every example through the encoder; what was cut is counted in `losses`. Texts of many examples go together."""
    waiting = iter(examples)
    while some := list(islice(waiting, _TOGETHER)):
        coder.ahead(some)
        for example in some:
            for one in encode(example, coder):
                losses.see(one)
                yield one


def gather(encoded: Iterable[Encoded]) -> Examples:
    """Encoded examples as columns."""
    rows = [one.columns for one in encoded]
    names = list(rows[0]) if rows else ["input_ids", "labels"]
    return Examples.of({name: Column.of(row[name] for row in rows) for name in names})


@dataclass(frozen=True)
class Sides:
    """Both sides and what the user should know about them."""

    train: Examples
    valid: Examples
    lines: list[str]


def prepare_examples(made_of: Mapping[str, object], folder: Path, build: Callable[[], Sides]) -> Sides:
    """Open the examples made of exactly this, or build and keep them.

    Args:
        made_of: JSON values that name everything the numbers depend on.
        folder: holds one sub-folder per `made_of`.
        build: makes both sides.

    Raises MachineError if the disk refuses, InputError from `build`.
    """
    key = hashlib.sha256(dump_json({"version": _VERSION, **made_of}, sort_keys=True).encode()).hexdigest()
    target = folder / key[:32]
    ready = _open(target, key)
    if ready is not None:
        return ready
    built = build()
    tensors = {
        f"{side}.{name}.{part}": torch.from_numpy(values)
        for side, examples in (("train", built.train), ("valid", built.valid))
        for name, column in examples.columns.items()
        for part, values in (("values", column.values), ("ends", column.ends))
    }
    with files.replacing_folder(target, (META,)) as place:
        files.write(place / TENSORS, write_tensors(tensors))
        contents = {"train": built.train.hash, "valid": built.valid.hash}
        files.write(place / META, [dump_json({"hash": key, "contents": contents, "lines": built.lines}).encode()])
    return built


def _open(target: Path, key: str) -> Sides | None:
    """What was built before, None if it is not there or not whole: then it is built again."""
    if not (target / META).is_file():
        return None
    try:
        said = strict_json(files.read_bytes(target / META), str(target / META))
        tensors = read_tensors(target / TENSORS)
        if not isinstance(said, dict) or said.get("hash") != key:
            return None
        sides = {}
        for side in ("train", "valid"):
            names = {name.split(".")[1] for name in tensors if name.startswith(f"{side}.")}
            parts = {n: (tensors[f"{side}.{n}.values"].numpy(), tensors[f"{side}.{n}.ends"].numpy()) for n in names}
            columns = {name: Column(*both) for name, both in sorted(parts.items())}
            sides[side] = Examples(columns, str(said["contents"][side]))
        return Sides(sides["train"], sides["valid"], [str(line) for line in said["lines"]])
    except (InputError, KeyError):
        return None
