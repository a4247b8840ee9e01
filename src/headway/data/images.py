"""Images with labels: IDX files as MNIST and its successors come in, and folders with one sub-folder per class.

    FOLDER/train-images-idx3-ubyte.gz, train-labels-..., t10k-images-..., t10k-labels-...
    FOLDER/class/*.png, or FOLDER/train/class/*.png and FOLDER/{valid,val,test}/class/*.png  (needs pillow)

Pixels are kept as bytes, (N, channels, side, side), all of a set of one size: images from folders are scaled so that
the shorter side fits and cut to the centre. Augmentations are pure functions of a batch and a generator.
"""

from __future__ import annotations

import gzip
import hashlib
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headway.errors import InputError, MachineError
from headway.files import open_regular

SIDE = 64
"""Pixels a side of images from folders, where nobody says another."""
MAX_PIXELS = 1 << 26  # of one image before it is scaled
MAX_BYTES = 1 << 33  # of a whole set
_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif")
_HELD_OUT = ("valid", "val", "test")
_UNSIGNED_BYTE = 8


class ImageSet(NamedTuple):
    """pixels: uint8 (N, C, Y, X). labels: int64 (N,). names: of the classes. hash: of all three."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    names: tuple[str, ...]
    hash: str


def is_images(path: str | Path) -> bool:
    """Whether a folder holds images, by the names in it."""
    place = Path(path)
    return place.is_dir() and (bool(_idx(place, "train")) or next(_pictures(place), None) is not None)


def find_images(
    path: str | Path, valid_path: str | Path | None, side: int | None, fraction: float
) -> tuple[ImageSet, ImageSet]:
    """(training, held-out) images.

    Held out is what `valid_path` holds, else the set's own test side, else a `fraction` of the images by hash.

    Raises:
        InputError: cut or wrong files, classes that differ, images of several sizes. MachineError: pillow is missing.
    """
    place = Path(path)
    train = _read(place / "train" if _own_side(place) else place, "train", side)
    valid = held_out_images(valid_path or place, side or train.pixels.shape[-1], whole=valid_path is not None)
    if valid is None:
        return _split(train, fraction)
    if valid.pixels.shape[1:] != train.pixels.shape[1:] or valid.names != train.names:
        found = f"held-out images {valid.pixels.shape[1:]} of {len(valid.names)} classes"
        raise InputError(str(valid_path or place), found, f"{train.pixels.shape[1:]} of {len(train.names)}")
    return train, valid


def held_out_images(path: str | Path, side: int, whole: bool = True) -> ImageSet | None:
    """The held-out side of a set; of one without such a side all of it if `whole`, else None. Raises as find_images."""
    place = Path(path)
    own = _own_side(place)
    if own is not None:
        return _read(own, "train", side)
    if _idx(place, "t10k"):
        return _read(place, "t10k", side)
    return _read(place, "train", side) if whole else None


def _own_side(place: Path) -> Path | None:
    """The folder of held-out images beside `train`."""
    found = [place / name for name in _HELD_OUT if (place / name).is_dir()] if (place / "train").is_dir() else []
    return found[0] if found else None


def _split(images: ImageSet, fraction: float) -> tuple[ImageSet, ImageSet]:
    digests = (hashlib.blake2b(image.tobytes(), digest_size=6).digest() for image in images.pixels)
    held = np.array([int.from_bytes(digest) / 2**48 < fraction for digest in digests])
    return tuple(_set(images.pixels[side], images.labels[side], images.names) for side in (~held, held))  # type: ignore[return-value]  # two


def _set(pixels: NDArray[np.uint8], labels: NDArray[np.int64], names: tuple[str, ...]) -> ImageSet:
    digest = hashlib.sha256(repr((pixels.shape, names)).encode())
    for part in (np.ascontiguousarray(pixels), np.ascontiguousarray(labels)):
        digest.update(part.data)
    return ImageSet(pixels, labels, names, digest.hexdigest())


def _read(place: Path, side_of_set: str, side: int | None) -> ImageSet:
    found = _idx(place, side_of_set) or _idx(place, "train")
    return _from_idx(*found) if found else _from_folder(place, side or SIDE)


# --- IDX -------------------------------------------------------------------------------------------------------


def _idx(place: Path, side: str) -> tuple[Path, Path] | None:
    """The two files of one side of an IDX set."""
    found = []
    for what in ("images-idx3-ubyte", "labels-idx1-ubyte"):
        names = [place / f"{side}-{what}{end}" for end in ("", ".gz")]
        found += [name for name in names if name.is_file()][:1]
    return (found[0], found[1]) if len(found) == 2 else None


def read_idx(path: Path) -> NDArray[np.uint8]:
    """The array of bytes in an IDX file (yann.lecun.com/exdb/mnist), its sizes as the file says.

    Raises InputError for another type of number, or sizes that are not those of the bytes present.
    """
    with open_regular(path) as raw:
        try:
            data = gzip.GzipFile(fileobj=raw).read(MAX_BYTES + 1) if path.suffix == ".gz" else raw.read(MAX_BYTES + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(str(path), f"cannot be read: {error}", "a whole file") from error
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] != _UNSIGNED_BYTE:
        raise InputError(str(path), f"begins with {data[:4]!r}", "an IDX file of bytes: 00 00 08, and the dimensions")
    head = 4 + 4 * data[3]
    if len(data) < head:
        raise InputError(str(path), f"{len(data)} bytes", f"a header of {head}")
    sizes = struct.unpack(f">{data[3]}I", data[4:head])
    count = 1
    for size in sizes:
        count *= size
    if len(data) != head + count:
        raise InputError(str(path), f"{len(data) - head} bytes of data", f"{count}, by its sizes {sizes}")
    return np.frombuffer(data, np.uint8, count, head).reshape(sizes)


def _from_idx(images: Path, labels: Path) -> ImageSet:
    pixels, numbers = read_idx(images), read_idx(labels)
    if pixels.ndim != 3 or numbers.ndim != 1 or len(pixels) != len(numbers) or not len(pixels):
        found = f"shape {pixels.shape} with labels {numbers.shape} in {labels.name}"
        raise InputError(str(images), found, "as many images as labels, (N, height, width) and (N,)")
    if pixels.shape[1] != pixels.shape[2]:
        raise InputError(str(images), f"images of {pixels.shape[1]} x {pixels.shape[2]}", "square ones")
    names = tuple(str(number) for number in range(int(numbers.max()) + 1))
    return _set(pixels[:, None], numbers.astype(np.int64), names)


# --- folders ---------------------------------------------------------------------------------------------------


def _pictures(place: Path) -> Iterator[tuple[str, Path]]:
    """(class, file) of `place/class/file` and of `place/train/class/file`."""
    root = place / "train" if (place / "train").is_dir() else place
    for folder in sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")):
        for file in sorted(folder.iterdir()):
            if file.suffix.lower() in _SUFFIXES:
                yield folder.name, file


def _from_folder(place: Path, side: int) -> ImageSet:
    found = list(_pictures(place))
    names = tuple(sorted({name for name, _ in found}))
    if not found or len(names) < 2:
        raise InputError(str(place), f"{len(found)} images of {len(names)} classes", "a folder of images per class")
    images = [_picture(file, side) for _, file in found]
    grey = all(image.shape[0] == 1 for image in images)
    pixels = np.stack([image if grey else np.broadcast_to(image, (3, side, side)) for image in images])
    return _set(pixels, np.array([names.index(name) for name, _ in found]), names)


def _picture(file: Path, side: int) -> NDArray[np.uint8]:
    """One image as (1 or 3, side, side): scaled so that the shorter side fits, its centre cut out."""
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise MachineError(
            str(file), "pillow, which reads images, is not installed", "", "pip install 'headway[data]'"
        ) from None
    try:
        with open_regular(file) as raw, Image.open(raw) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise InputError(str(file), f"{width} x {height} pixels", f"at most {MAX_PIXELS}")
            mode = "L" if image.mode in ("1", "L", "I;16", "LA") else "RGB"
            fitted = ImageOps.fit(image.convert(mode), (side, side), Image.Resampling.BICUBIC)
            table: NDArray[Any] = np.asarray(fitted, dtype=np.uint8)
    except (OSError, SyntaxError, ValueError, struct.error, zlib.error, Image.DecompressionBombError) as error:
        raise InputError(str(file), f"cannot be read: {str(error)[:120]}", "a whole image") from error
    return table[None] if table.ndim == 2 else np.ascontiguousarray(table.transpose(2, 0, 1))


# --- augmentation ----------------------------------------------------------------------------------------------


def moved(pixels_BCYX: Tensor, reach: int, rng: np.random.Generator) -> Tensor:
    """Each image moved by up to `reach` pixels in both directions, its edge repeated behind it."""
    size = pixels_BCYX.shape[-1]
    wide = torch.nn.functional.pad(pixels_BCYX, (reach,) * 4, mode="replicate")
    steps = rng.integers(0, 2 * reach + 1, size=(len(pixels_BCYX), 2))
    places = torch.from_numpy(steps)[:, :, None] + torch.arange(size)
    rows = torch.arange(len(pixels_BCYX))[:, None, None]
    return wide.permute(0, 2, 3, 1)[rows, places[:, 0, :, None], places[:, 1, None, :]].permute(0, 3, 1, 2)


def mirrored(pixels_BCYX: Tensor, rng: np.random.Generator) -> Tensor:
    """Half of the images, at random, with left and right exchanged."""
    chosen = torch.from_numpy(rng.random(len(pixels_BCYX)) < 0.5)
    return torch.where(chosen[:, None, None, None], pixels_BCYX.flip(-1), pixels_BCYX)
