"""Checkpoints that several processes write their shares of, and one or any number of others read.

    step-00000100/shard-00001-model-00001-of-00001.safetensors     what rank 0 holds of every tensor
                  shard-00002-...                                  what rank 1 holds
                  state.json, manifest.json                        as always

torch.distributed.checkpoint writes them, in safetensors with each share's place in the header, and never a pickle; the
manifest and the protocol around them are folder.py's, so a process that dies while saving leaves nothing that looks
like a checkpoint (D5). They are read by our own strict reader, tensor by tensor.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from headway.checkpoints.tensors import DTYPES, TensorFile, read_tensors
from headway.errors import InputError
from headway.strict import strict_json

PATTERN = "shard-*.safetensors"
SHARED_HASH = "shares:"
"""Begins the manifest's hash of weights that no process holds whole: it tells steps apart, and proves nothing else."""
_PLACES, _OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"  # torch's names in the header


def write_shares(folder: Path, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write this process's share of every tensor, {file: {name: tensor or DTensor}}; every process calls this."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    tensors = {f"{file}/{name}": tensor.detach() for file, group in groups.items() for name, tensor in group.items()}
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
    save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))


class Shares(Mapping[str, Tensor]):
    """The tensors of one file of a checkpoint whose shares lie in `folder`; each is put together when it is asked for.

    Raises InputError for shares that do not make whole tensors.
    """

    def __init__(self, folder: Path, file: str, ties: Mapping[str, str]) -> None:
        self.folder = folder
        self._pieces: dict[str, list[tuple[TensorFile, str, tuple[int, ...]]]] = {}
        for path in sorted(folder.glob(PATTERN)):
            source = TensorFile(path)
            places = strict_json(source.metadata.get(_PLACES, "{}"), f"{path} ({_PLACES})")
            for key in source.entries:
                group, _, name = key.partition("/")
                if group == file:
                    offsets = _offsets(path, key, places, len(source.entries[key].shape))
                    self._pieces.setdefault(name, []).append((source, key, offsets))
        self._pieces |= {name: self._pieces[owner] for name, owner in ties.items() if owner in self._pieces}
        self.shapes = {name: self._shape(name) for name in self._pieces}

    def _shape(self, name: str) -> tuple[int, ...]:
        """The sizes that the shares reach to. They must fill them: DTensor's shares never overlap."""
        shapes = [(source.entries[key].shape, offsets) for source, key, offsets in self._pieces[name]]
        out = tuple(max(o[i] + s[i] for s, o in shapes) for i in range(len(shapes[0][0])))
        if len({len(s) for s, _ in shapes}) > 1 or sum(math.prod(s) for s, _ in shapes) != math.prod(out):
            raise InputError(
                str(self.folder), f"the shares of {name[:80]} leave holes or overlap", "all of every tensor"
            )
        return out

    def __getitem__(self, name: str) -> Tensor:
        """The whole tensor."""
        pieces = self._pieces[name]
        if len(pieces) == 1:
            return pieces[0][0][pieces[0][1]]
        whole = torch.empty(self.shapes[name], dtype=DTYPES[pieces[0][0].entries[pieces[0][1]].dtype])
        for source, key, offsets in pieces:
            piece = source[key]
            whole[tuple(slice(o, o + s) for o, s in zip(offsets, piece.shape, strict=True))] = piece
            source.release(key)
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)


def _offsets(path: Path, key: str, places: object, dims: int) -> tuple[int, ...]:
    entry = places.get(key) if isinstance(places, dict) else None
    found = entry.get(_OFFSETS) if isinstance(entry, dict) else None
    if not isinstance(found, list) or len(found) != dims or not all(type(o) is int and 0 <= o < 1 << 40 for o in found):
        raise InputError(str(path), f"tensor {key[:80]!r} has no place", "where its share begins, in the header")
    return tuple(found)


def read_group(
    folder: Path, file: str, *, copy: bool = False, ties: Mapping[str, str] | None = None
) -> Mapping[str, Tensor]:
    """The tensors of a checkpoint's file, from the file or from the shares that stand for it.

    `ties` {name: the name it is stored under}: shares hold a tied tensor once. Raises InputError.
    """
    if (folder / file).exists() or not any(folder.glob(PATTERN)):
        return read_tensors(folder / file, copy=copy)
    return Shares(folder, file, ties or {})
