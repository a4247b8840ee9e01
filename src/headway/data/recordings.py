"""Recordings with labels: folders with one sub-folder per class, WAV files in each.

    FOLDER/class/*.wav, or FOLDER/train/class/*.wav and FOLDER/{valid,val,test}/class/*.wav

Each becomes a log-mel spectrogram at 16 kHz (data/audio.py), all of a set of one length: what is shorter is followed by
silence, what is longer is refused, never cut. Left out: several labels a recording, and longer ones in windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headway.data.audio import HOP, RATE, log_mel, read_wav, seconds_of
from headway.data.class_folders import (
    class_names,
    content_hash,
    has_classes,
    held_out_side,
    is_held_out,
    labelled_files,
    training_side,
)
from headway.errors import InputError

LONGEST = 30.0
"""Seconds of a recording, where nobody says another: Whisper's window."""
MAX_BYTES = 1 << 33  # of a whole set
_SILENT = 1e-4  # of full scale: three steps of 16 bits
_SUFFIXES = (".wav",)
_WHAT = "recordings"


class RecordingSet(NamedTuple):
    """features: float32 (N, bins, frames). labels: int64 (N,), numbers into names, the classes.

    hash: sha256 of all three; where the files lie and what they are called does not count.
    """

    features: NDArray[np.float32]
    labels: NDArray[np.int64]
    names: tuple[str, ...]
    hash: str


def is_recordings(path: str | Path) -> bool:
    """Whether a folder holds nothing but sub-folders with WAV files in each."""
    try:
        return has_classes(Path(path), _SUFFIXES)
    except InputError:  # no folder, or one that cannot be read: the readers of text say so
        return False


def find_recordings(
    path: str | Path,
    valid_path: str | Path | None,
    seconds: float | None,
    bins: int,
    fraction: float,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[RecordingSet, RecordingSet]:
    """(training, held-out) recordings with the same classes.

    Held out is what `valid_path` holds, else the set's own valid, val or test side (whole voices, for instance), else a
    `fraction` of the recordings by the hash of their spectrogram.

    Args:
        path, valid_path: folders.
        seconds: of every recording; None: as long as the longest, at most LONGEST.
        bins: of the spectrogram. fraction: 0 to 1. progress: told (done, total).

    Raises InputError: no WAV file or a broken one, silence, one that is too long, classes that differ, nothing on one
    side.
    """
    place = Path(path)
    names = class_names(place, _SUFFIXES)
    train_files = labelled_files(training_side(place), _SUFFIXES, names, _WHAT)
    side = Path(valid_path) if valid_path is not None else place / (held_out_side(place) or "")
    valid_files = labelled_files(_side(side), _SUFFIXES, names, _WHAT) if side != place else []
    frames = _frames([file for _, file in (*train_files, *valid_files)], seconds)
    total = len(train_files) + len(valid_files)
    train = _heard(train_files, bins, frames, names, lambda done: progress(done, total))
    if valid_files:
        valid = _heard(valid_files, bins, frames, names, lambda done: progress(len(train_files) + done, total))
    else:
        held = is_held_out(train.features, fraction)
        train, valid = (_set(train.features[chosen], train.labels[chosen], names) for chosen in (~held, held))
    if not len(train.labels) or not len(valid.labels):
        sizes = f"{len(train.labels)} recordings to train on, {len(valid.labels)} held out"
        fix = "data.val_fraction=0.2, or data.valid_path=FOLDER"
        raise InputError(str(path), sizes, "recordings on both sides", fix)
    return train, valid


def held_out_recordings(path: str | Path, bins: int, frames: int, names: tuple[str, ...]) -> RecordingSet:
    """The held-out side of a set, all of one without sides, for a model of these sizes. Raises as find_recordings."""
    files = labelled_files(_side(Path(path)), _SUFFIXES, names, _WHAT)
    _frames([file for _, file in files], frames * HOP / RATE)
    return _heard(files, bins, frames, names, lambda done: None)


def _side(place: Path) -> Path:
    """What is held out of a folder that is named for it."""
    return place / (held_out_side(place) or "")


def _frames(files: Sequence[Path], seconds: float | None) -> int:
    """Frames of 10 ms that hold every file. Raises InputError naming one that is longer than it may be."""
    lengths = [seconds_of(file) for file in files]
    longest = max(range(len(files)), key=lengths.__getitem__)
    limit = LONGEST if seconds is None else seconds
    if lengths[longest] > limit + HOP / RATE:
        found, expected = f"{lengths[longest]:.2f} s", f"at most {limit:g} s"
        fix = f"data.seconds={math.ceil(lengths[longest] * 100) / 100:g}, or cut it"
        raise InputError(str(files[longest]), found, expected, fix)
    return max(math.ceil((seconds or lengths[longest]) * RATE / HOP), 2)


def _heard(
    files: Sequence[tuple[int, Path]], bins: int, frames: int, names: tuple[str, ...], progress: Callable[[int], None]
) -> RecordingSet:
    size = len(files) * bins * frames * 4
    if size > MAX_BYTES:
        found = f"{len(files)} recordings of {frames * HOP / RATE:g} s, {size} bytes"
        raise InputError(str(files[0][1].parent.parent), found, f"at most {MAX_BYTES}", "fewer, or a smaller data.bins")
    features = np.empty((len(files), bins, frames), np.float32)
    for number, (_, file) in enumerate(files):
        features[number] = spectrogram(file, bins, frames)
        progress(number + 1)
    return _set(features, np.array([label for label, _ in files], dtype=np.int64), names)


def spectrogram(file: Path, bins: int, frames: int) -> Tensor:
    """One recording as (bins, frames), see audio.log_mel. Raises InputError for silence, else as audio.read_wav."""
    samples = read_wav(file)
    loudest = float(samples.abs().max())
    if loudest < _SILENT:
        raise InputError(str(file), f"silence: no sample above {loudest:.1g}", "a sound", "leave it out")
    return log_mel(samples, bins=bins, frames=frames)


def _set(features: NDArray[np.float32], labels: NDArray[np.int64], names: tuple[str, ...]) -> RecordingSet:
    return RecordingSet(features, labels, names, content_hash(features, labels, names))


def shifted(features_BMT: Tensor, reach: int, rng: np.random.Generator) -> Tensor:
    """Each spectrogram moved by up to `reach` frames to either side, its edge repeated behind it; one number of `rng`
    for each. Any dtype, the same shape."""
    count, _, frames = features_BMT.shape
    steps = torch.from_numpy(rng.integers(0, 2 * reach + 1, size=(count, 1))) - reach
    places_BT = (steps + torch.arange(frames)).clamp(0, frames - 1)
    return features_BMT.gather(2, places_BT[:, None].expand_as(features_BMT))
