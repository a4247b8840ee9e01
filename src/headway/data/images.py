"""Images with labels: IDX files as MNIST and its successors come in, and folders with one sub-folder per class.

    FOLDER/train-images-idx3-ubyte.gz, train-labels-..., t10k-images-..., t10k-labels-...
    FOLDER/class/*.png, or FOLDER/train/class/*.png and FOLDER/{valid,val,test}/class/*.png  (needs pillow)

Pixels are kept as bytes, (N, channels, side, side), all of a set of one size: images from folders are scaled so that
the shorter side fits and cut to the centre. Augmentations are pure functions of a batch and a generator.
Left out: a camera's note on how to turn an image (EXIF), transparency, and frames of an animation after the first.
"""

from __future__ import annotations

import math
import struct
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headway.data.class_folders import (
    class_names,
    content_hash,
    has_classes,
    held_out_side,
    is_held_out,
    labelled_files,
)
from headway.data.sources import ReadOptions, ReadReport, blocks
from headway.errors import InputError, MachineError
from headway.files import open_regular

SIDE = 64
"""Pixels a side of images from folders, where nobody says another."""
MAX_PIXELS = 1 << 26  # of one image before it is scaled; pillow's own limit only warns from 1.3 times that on
MAX_BYTES = 1 << 33  # of a whole set
# What pillow may open, whatever a file is called: it knows formats that start other programs (EPS, Ghostscript).
_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".bmp": "BMP", ".webp": "WEBP", ".gif": "GIF"}
_GREY = ("1", "L", "LA")
_DEEP = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")  # pillow cuts these off at 255 rather than scale them
_UNSIGNED_BYTE = 8


class ImageSet(NamedTuple):
    """pixels: uint8 (N, C, H, W), C is 1 or 3 and H equals W. labels: int64 (N,), numbers into names, the classes.

    hash: sha256 of all three; where the files lie and what they are called does not count.
    """

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    names: tuple[str, ...]
    hash: str


def is_images(path: str | Path) -> bool:
    """Whether a folder holds images: IDX files, or nothing but sub-folders with pictures in each."""
    place = Path(path)
    try:
        return _idx(place, "train") is not None or has_classes(place, _FORMATS)
    except InputError:  # no folder, or one that cannot be read: the readers of text say so
        return False


def find_images(
    path: str | Path, valid_path: str | Path | None, side: int | None, fraction: float
) -> tuple[ImageSet, ImageSet]:
    """(training, held-out) images with the same classes.

    Held out is what `valid_path` holds, else the set's own test side, else a `fraction` of the images by their hash,
    so that equal images stand on one side and each keeps its own whatever is added.

    Args:
        path: a folder. valid_path: another, or None.
        side: pixels a side; None: as IDX files have it, SIDE for folders.
        fraction: 0 to 1.

    Raises:
        InputError: cut or wrong files, classes that differ, images of several sizes, nothing on one side.
        MachineError: pillow is missing.
    """
    place = Path(path)
    train = _read(place, "train", side)
    size = side or train.pixels.shape[-1]
    valid = held_out_images(valid_path or place, size, valid_path is not None, train.names)
    if valid is None:
        is_held = is_held_out(train.pixels, fraction)
        train, valid = (_set(train.pixels[chosen], train.labels[chosen], train.names) for chosen in (~is_held, is_held))
    if valid.pixels.shape[1] != train.pixels.shape[1]:
        found = f"held-out images with {valid.pixels.shape[1]} channels"
        raise InputError(
            str(valid_path or place), found, f"{train.pixels.shape[1]}, as in training", "one kind of image"
        )
    if not len(train.labels) or not len(valid.labels):
        sizes = f"{len(train.labels)} images to train on, {len(valid.labels)} held out"
        raise InputError(str(path), sizes, "images on both sides", "data.val_fraction=0.2, or data.valid_path=FOLDER")
    return train, valid


def held_out_images(
    path: str | Path, side: int, whole: bool = True, names: tuple[str, ...] | None = None
) -> ImageSet | None:
    """The held-out side of a set; of one without such a side all of it if `whole`, else None.

    Args:
        path: a folder. side: pixels a side.
        names: the classes that labels are numbers of; None: of folders those in `train`, else the set's own.

    Raises as find_images; also for a class that is not in `names`.
    """
    place = Path(path)
    own = held_out_side(place)
    if own or _idx(place, "t10k"):
        return _read(place, own or "t10k", side, names)
    return _read(place, "train", side, names) if whole else None


def _read(place: Path, part: str, side: int | None, names: tuple[str, ...] | None = None) -> ImageSet:
    """One side of a set: `part` is train or t10k of IDX files, or a folder's name where there are several."""
    if found := _idx(place, part) or _idx(place, "train"):
        return _from_idx(*found, side, names)
    names = names or class_names(place, _FORMATS)
    return _from_folder(place / part if (place / part).is_dir() else place, side or SIDE, names)


def _set(pixels: NDArray[np.uint8], labels: NDArray[np.int64], names: tuple[str, ...]) -> ImageSet:
    return ImageSet(pixels, labels, names, content_hash(pixels, labels, names))


# --- IDX -------------------------------------------------------------------------------------------------------


def _idx(place: Path, part: str) -> tuple[Path, Path] | None:
    """The two files of one side of an IDX set."""
    found = []
    for what in ("images-idx3-ubyte", "labels-idx1-ubyte"):
        names = [place / f"{part}-{what}{end}" for end in ("", ".gz")]
        found += [name for name in names if name.is_file()][:1]
    return (found[0], found[1]) if len(found) == 2 else None


def read_idx(path: Path) -> NDArray[np.uint8]:
    """The array of bytes in an IDX file (yann.lecun.com/exdb/mnist), its sizes as the file says.

    Memory is taken for bytes that are there, never for what the header promises.

    Raises InputError for another type of number, or sizes that are not those of the bytes present.
    """
    stream = blocks(path, ReadOptions(max_bytes=MAX_BYTES), ReadReport())
    data = bytearray(next(stream, b""))  # a block holds the longest header, or the file ends in it
    if len(data) < 4 or data[:3] != bytes([0, 0, _UNSIGNED_BYTE]):
        found = f"begins with {data[:4].hex(' ') or 'nothing'}"
        raise InputError(str(path), found, "an IDX file of bytes: 00 00 08, and the number of dimensions")
    head = 4 + 4 * data[3]
    if len(data) < head:
        raise InputError(str(path), f"{len(data)} bytes", f"a header of {head}", "fetch it again")
    sizes = struct.unpack(f">{data[3]}I", data[4:head])
    count = math.prod(sizes)
    for block in stream:
        data += block
        if len(data) > head + count:
            break
    if len(data) != head + count:
        more = " or more" if len(data) > head + count else ""
        found = f"{len(data) - head} bytes of data{more}"
        raise InputError(str(path), found, f"{count}, by its sizes {sizes}", "fetch it again")
    return np.frombuffer(data, np.uint8, count, head).reshape(sizes)


def _from_idx(images: Path, labels: Path, side: int | None, names: tuple[str, ...] | None) -> ImageSet:
    pixels, numbers = read_idx(images), read_idx(labels)
    if pixels.ndim != 3 or numbers.ndim != 1 or len(pixels) != len(numbers) or not pixels.size:
        found = f"shape {pixels.shape} with labels {numbers.shape} in {labels.name}"
        raise InputError(str(images), found, "as many images as labels, (N, height, width) and (N,)")
    height, width = pixels.shape[1:]
    if height != width or side not in (None, width):
        fix = f"data.image={width}" if height == width else ""
        raise InputError(
            str(images), f"images of {height} x {width}", f"{side} x {side}" if side else "square ones", fix
        )
    last = int(numbers.max())
    if names is not None and last >= len(names):
        raise InputError(str(labels), f"the class {last}", f"0 to {len(names) - 1}, the classes of the training side")
    return _set(pixels[:, None], numbers.astype(np.int64), names or tuple(map(str, range(last + 1))))


# --- folders ---------------------------------------------------------------------------------------------------


def _from_folder(place: Path, side: int, names: tuple[str, ...]) -> ImageSet:
    found = labelled_files(place, _FORMATS, names, "images")
    size = len(found) * 3 * side * side
    if size > MAX_BYTES:
        raise InputError(
            str(place), f"{len(found)} images, {size} bytes", f"at most {MAX_BYTES}", "a smaller data.image"
        )
    pixels, is_grey = np.empty((len(found), 3, side, side), np.uint8), True
    for number, (_, file) in enumerate(found):
        image = _picture(file, side)
        is_grey &= image.shape[0] == 1
        pixels[number] = image  # grey in colour: the same three times
    labels = np.array([label for label, _ in found], dtype=np.int64)
    return _set(pixels[:, :1].copy() if is_grey else pixels, labels, names)


def _picture(file: Path, side: int) -> NDArray[np.uint8]:
    """One image as (1 or 3, side, side): scaled so that the shorter side fits, its centre cut out."""
    try:
        from PIL import Image, ImageOps
    except ImportError:
        found = "pillow, which reads images, is not installed"
        raise MachineError(str(file), found, "", "pip install 'headway[data]'") from None
    try:
        with warnings.catch_warnings(), open_regular(file) as raw:
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            formats = tuple(sorted({*_FORMATS.values()}))
            with Image.open(raw, formats=formats) as image:  # reads the header only
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise InputError(str(file), f"{width} x {height} pixels", f"at most {MAX_PIXELS}", "leave it out")
                if image.mode in _DEEP:
                    raise InputError(str(file), f"pixels of the kind {image.mode}", "8 bits a channel", "convert it")
                image.verify()  # checksums, which loading leaves out; the image is used up by it
            raw.seek(0)
            with Image.open(raw, formats=formats) as image:
                # fit cuts before it scales: a strip of 1 x 60,000,000 pixels would grow by the square of the side.
                mode = "L" if image.mode in _GREY else "RGB"
                fitted = ImageOps.fit(image.convert(mode), (side, side), Image.Resampling.BICUBIC)
                table: NDArray[np.uint8] = np.asarray(fitted, dtype=np.uint8)
    except InputError:
        raise
    except Exception as error:  # a broken file may make its decoder raise whatever it likes
        raise InputError(str(file), f"cannot be read: {str(error)[:120]}", "a whole image", "leave it out") from error
    return table[None] if table.ndim == 2 else np.ascontiguousarray(table.transpose(2, 0, 1))


# --- augmentation ----------------------------------------------------------------------------------------------


def moved(pixels_BCYX: Tensor, reach: int, rng: np.random.Generator) -> Tensor:
    """Each image moved by up to `reach` pixels in both directions, its edge repeated behind it.

    A random crop after padding by `reach` (arXiv:1512.03385, which pads with zeros). Any dtype, the same shape; two
    numbers of `rng` for each image.
    """
    count, _, height, width = pixels_BCYX.shape
    steps = torch.from_numpy(rng.integers(0, 2 * reach + 1, size=(count, 2))) - reach
    rows_BY = (steps[:, :1] + torch.arange(height)).clamp(0, height - 1)
    columns_BX = (steps[:, 1:] + torch.arange(width)).clamp(0, width - 1)
    images = torch.arange(count)[:, None, None]
    moved_BYXC = pixels_BCYX.permute(0, 2, 3, 1)[images, rows_BY[:, :, None], columns_BX[:, None, :]]
    return moved_BYXC.permute(0, 3, 1, 2)


def mirrored(pixels_BCYX: Tensor, rng: np.random.Generator) -> Tensor:
    """Half of the images, at random, with left and right exchanged. Any dtype; one number of `rng` for each image."""
    chosen = torch.from_numpy(rng.random(len(pixels_BCYX)) < 0.5)
    return torch.where(chosen[:, None, None, None], pixels_BCYX.flip(-1), pixels_BCYX)


def normalize(pixels_BCYX: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Pixels from 0 to 255, of any dtype, as float32: (pixels / 255 - mean) / std, one of each for each channel."""
    mean_C, std_C = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (mean, std))
    return (pixels_BCYX.float() / 255 - mean_C) / std_C
