"""Images from IDX files and folders; bad files are named; augmentation is a function of its numbers."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from headway.data.images import find_images, held_out_images, is_images, mirrored, moved, read_idx
from headway.errors import InputError

RNG = np.random.default_rng(0)


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def idx_set(place: Path, sides: tuple[str, ...] = ("train", "t10k"), count: int = 50, packed: bool = False) -> Path:
    place.mkdir(exist_ok=True)
    for side in sides:
        for name, array in (
            ("images-idx3-ubyte", RNG.integers(0, 256, (count, 8, 8), dtype=np.uint8)),
            ("labels-idx1-ubyte", (np.arange(count) % 4).astype(np.uint8)),
        ):
            data = idx(array)
            (place / f"{side}-{name}{'.gz' * packed}").write_bytes(gzip.compress(data) if packed else data)
    return place


@pytest.mark.parametrize("packed", [False, True])
def test_idx_gives_both_sides(tmp_path: Path, packed: bool) -> None:
    place = idx_set(tmp_path / "set", packed=packed)
    assert is_images(place)
    train, valid = find_images(place, None, None, 0.1)
    assert train.pixels.shape == valid.pixels.shape == (50, 1, 8, 8) and train.names == ("0", "1", "2", "3")
    assert train.hash != valid.hash == held_out_images(place, 8).hash
    assert find_images(place, None, None, 0.1)[0].hash == train.hash


def test_without_a_held_out_side_images_are_split_by_their_hash(tmp_path: Path) -> None:
    place = idx_set(tmp_path / "set", ("train",), 400)
    train, valid = find_images(place, None, None, 0.25)
    assert len(train.labels) + len(valid.labels) == 400 and 60 < len(valid.labels) < 140
    again = find_images(place, None, None, 0.25)
    assert again[0].hash == train.hash


def test_a_cut_idx_file_is_named_at_every_byte(tmp_path: Path) -> None:
    whole = idx(np.arange(24, dtype=np.uint8).reshape(2, 3, 4))
    path = tmp_path / "x"
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        with pytest.raises(InputError, match=str(path)):
            read_idx(path)
    path.write_bytes(whole)
    assert read_idx(path).shape == (2, 3, 4)
    for wrong in (
        whole + b"x",
        b"\1" + whole[1:],
        whole[:2] + b"\x0d" + whole[3:],
        whole[:4] + b"\xff" * 4 + whole[8:],
    ):
        path.write_bytes(wrong)
        with pytest.raises(InputError, match=r"IDX|bytes of data"):
            read_idx(path)
    (tmp_path / "x.gz").write_bytes(gzip.compress(whole)[:-9])
    with pytest.raises(InputError, match="cannot be read"):
        read_idx(tmp_path / "x.gz")


def test_labels_and_images_must_agree(tmp_path: Path) -> None:
    place = idx_set(tmp_path / "set", ("train",))
    (place / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(49, np.uint8)))
    with pytest.raises(InputError, match="as many images as labels"):
        find_images(place, None, None, 0.1)


def folder(place: Path, sides: tuple[str, ...], mode: str = "RGB", size: tuple[int, int] = (20, 12)) -> Path:
    for side in sides:
        for name in ("cat", "dog"):
            where = place / side / name
            where.mkdir(parents=True)
            for number in range(3):
                pixels = RNG.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
                Image.fromarray(pixels).convert(mode).save(where / f"{number}.png")
    return place


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1)])
def test_folders_of_classes(tmp_path: Path, mode: str, channels: int) -> None:
    place = folder(tmp_path / "set", ("train", "test"), mode)
    assert is_images(place)
    train, valid = find_images(place, None, 16, 0.1)
    assert train.pixels.shape == valid.pixels.shape == (6, channels, 16, 16)
    assert train.names == ("cat", "dog") and train.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_the_centre_is_kept(tmp_path: Path) -> None:
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 255
    for name in ("a", "b"):
        (tmp_path / "s" / name).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "s" / name / "x.png")
    found = held_out_images(tmp_path / "s", 10)
    assert (found.pixels == 255).all()


def bomb() -> bytes:
    """A PNG that says 60,000 x 60,000 and holds a few bytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"x")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("name", ["a bomb", "cut", "no image"])
def test_a_bad_image_is_named(tmp_path: Path, name: str) -> None:
    place = folder(tmp_path / "set", ("train",))
    bad = place / "train" / "cat" / "1.png"
    bad.write_bytes({"a bomb": bomb(), "cut": bad.read_bytes()[:200], "no image": b"hello"}[name])
    with pytest.raises(InputError, match=r"cat/1.png"):
        find_images(place, None, 16, 0.5)


def test_one_class_is_refused(tmp_path: Path) -> None:
    place = folder(tmp_path / "set", ("train",))
    for file in (place / "train" / "dog").iterdir():
        file.unlink()
    with pytest.raises(InputError, match="of 1 classes"):
        find_images(place, None, 16, 0.1)


def test_moving_is_a_crop_of_the_repeated_edge() -> None:
    pixels = torch.arange(2 * 3 * 5 * 5, dtype=torch.float32).view(2, 3, 5, 5)
    out = moved(pixels, 2, np.random.default_rng(4))
    steps = np.random.default_rng(4).integers(0, 5, size=(2, 2))
    wide = np.pad(pixels.numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)), mode="edge")
    for row, (down, right) in enumerate(steps):
        assert np.array_equal(out[row].numpy(), wide[row, :, down : down + 5, right : right + 5])
    assert torch.equal(moved(pixels, 2, np.random.default_rng(4)), out)


def test_mirroring_is_half_of_the_images() -> None:
    pixels = torch.rand(200, 1, 4, 4)
    out = mirrored(pixels, np.random.default_rng(0))
    same, other = (
        [torch.equal(a, b) for a, b in zip(out, pixels, strict=True)],
        [torch.equal(a, b.flip(-1)) for a, b in zip(out, pixels, strict=True)],
    )
    assert all(a != b for a, b in zip(same, other, strict=True)) and 70 < sum(other) < 130
