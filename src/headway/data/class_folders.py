"""Folders with one sub-folder per class, as collections of images and recordings come.

FOLDER/class/file, or FOLDER/train/class/file and FOLDER/{valid,val,test}/class/file
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headway.data.corpus import place_of_bytes
from headway.errors import InputError

_HELD_OUT = ("valid", "val", "test")


def entries(folder: Path) -> list[Path]:
    """What lies in a folder, sorted, hidden entries left out. Raises InputError where it cannot be read."""
    try:
        return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise InputError(str(folder), f"cannot be read: {error.strerror}", "a folder", "check the path") from None


def folders(place: Path) -> list[Path]:
    """The folders in a folder."""
    return [entry for entry in entries(place) if os.path.isdir(entry)]  # Path's raises where a folder is shut


def within(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """The files in a folder whose names end so."""
    return [file for file in entries(folder) if file.suffix.lower() in suffixes]


def training_side(place: Path) -> Path:
    """`train` in a folder that has sides, else the folder itself."""
    return place / "train" if (place / "train").is_dir() else place


def held_out_side(place: Path) -> str | None:
    """The name of a folder's held-out side, if it has one beside `train`."""
    found = [name for name in _HELD_OUT if (place / "train").is_dir() and (place / name).is_dir()]
    return found[0] if found else None


def has_classes(place: Path, suffixes: Collection[str]) -> bool:
    """Whether there is nothing but sub-folders with such files in each. Raises InputError where it cannot be read."""
    classes = folders(training_side(place))
    return bool(classes) and all(within(folder, suffixes) for folder in classes)


def class_names(place: Path, suffixes: Collection[str]) -> tuple[str, ...]:
    """The classes of a collection's training side."""
    return tuple(folder.name for folder in folders(training_side(place)) if within(folder, suffixes))


def labelled_files(place: Path, suffixes: Collection[str], names: tuple[str, ...], what: str) -> list[tuple[int, Path]]:
    """(class, file) of one side, `names` giving the classes. Raises InputError for a class that is not among them."""
    found = [(folder.name, file) for folder in folders(place) for file in within(folder, suffixes)]
    strange = sorted({name for name, _ in found} - {*names})
    if strange:
        expected = f"one of {', '.join(names)[:200]}"
        raise InputError(str(place), f"the class {strange[0]!r}", expected, "one set of classes")
    if not found or len(names) < 2:
        raise InputError(str(place), f"{len(found)} {what} of {len(names)} classes", f"a folder of {what} per class")
    return [(names.index(name), file) for name, file in found]


def is_held_out(signals: NDArray[Any], fraction: float) -> NDArray[np.bool_]:
    """(N,) bool: a `fraction` of the signals by their bytes, so that equal ones stand on one side."""
    return np.array([place_of_bytes(one.tobytes()) < fraction for one in signals])


def content_hash(signals: NDArray[Any], labels: NDArray[np.int64], names: tuple[str, ...]) -> str:
    """sha256 of signals, their labels and the classes; where files lie and what they are called does not count."""
    digest = hashlib.sha256(repr((signals.shape, names)).encode())
    for part in (signals, labels):
        digest.update(np.ascontiguousarray(part).data)
    return digest.hexdigest()
