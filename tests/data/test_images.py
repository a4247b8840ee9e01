"""Images from IDX files and folders; bad files are named; augmentation is a function of its numbers."""

from __future__ import annotations

import gzip
import io
import struct
import sys
import time
import tracemalloc
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from headway.data import images as module
from headway.data import sources
from headway.data.images import find_images, held_out_images, is_images, mirrored, moved, normalize, read_idx
from headway.errors import InputError, MachineError

RNG = np.random.default_rng(0)
BEGIN = RNG.bit_generator.state


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    """What a test draws, and so which images its hash holds out, does not depend on the tests before it."""
    RNG.bit_generator.state = BEGIN


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


def bomb(side: int = 60_000) -> bytes:
    """A PNG that says 60,000 x 60,000 and holds a few bytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
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


def test_idx_sizes_are_held_against_the_bytes_before_memory_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(struct.pack(">BBBB3I", 0, 0, 8, 3, 2**32 - 1, 2**32 - 1, 2**32 - 1) + bytes(100))
    tracemalloc.start()
    with pytest.raises(InputError, match="100 bytes of data; expected 792281"):
        read_idx(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20
    path.write_bytes(struct.pack(">BBBB1I", 0, 0, 8, 1, 10) + bytes(64 << 20))  # far more than it says: not read on
    tracemalloc.start()
    with pytest.raises(InputError, match="bytes of data or more; expected 10,"):
        read_idx(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


@pytest.mark.fault("C15")
def test_a_packed_idx_file_has_the_caps_of_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = idx(np.zeros((500, 64, 64), np.uint8))
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(whole))
    assert read_idx(path).shape == (500, 64, 64)
    monkeypatch.setattr(sources, "RATIO_FREE", 1 << 16)
    with pytest.raises(InputError, match="at most 200 times"):
        read_idx(path)
    monkeypatch.undo()
    monkeypatch.setattr(module, "MAX_BYTES", 1 << 16)
    with pytest.raises(InputError, match="after decompression"):
        read_idx(path)


@pytest.mark.parametrize(
    ("labels", "images", "message"),
    [
        (np.zeros(4, np.uint8), np.zeros((4, 3, 5), np.uint8), "images of 3 x 5; expected square ones"),
        (np.zeros(0, np.uint8), np.zeros((0, 3, 3), np.uint8), "as many images as labels"),
        (np.zeros(4, np.uint8), np.zeros((4, 0, 0), np.uint8), "as many images as labels"),
        (np.zeros((4, 1), np.uint8), np.zeros((4, 3, 3), np.uint8), "as many images as labels"),
        (np.zeros(4, np.uint8), np.zeros((4, 9), np.uint8), "as many images as labels"),
    ],
)
def test_idx_files_of_another_kind_are_named(tmp_path: Path, labels: object, images: object, message: str) -> None:
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(images))  # type: ignore[arg-type]
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(labels))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=f"train-images.*{message}"):
        find_images(tmp_path, None, None, 0.5)


def test_idx_sides_share_size_and_classes(tmp_path: Path) -> None:
    place = idx_set(tmp_path / "set")
    with pytest.raises(InputError, match=r"images of 8 x 8; expected 16 x 16. Fix: data.image=8"):
        find_images(place, None, 16, 0.1)
    labels = place / "t10k-labels-idx1-ubyte"
    labels.write_bytes(idx(np.full(50, 2, np.uint8)))  # a class fewer is no other set
    assert find_images(place, None, 8, 0.1)[1].names == ("0", "1", "2", "3")
    labels.write_bytes(idx(np.full(50, 4, np.uint8)))
    with pytest.raises(InputError, match=r"t10k-labels.*the class 4; expected 0 to 3"):
        find_images(place, None, 8, 0.1)
    (place / "t10k-labels-idx1-ubyte").unlink()
    assert held_out_images(place, 8, whole=False) is None and len(held_out_images(place, 8).labels) == 50  # type: ignore[union-attr]


def test_the_hash_is_of_the_content(tmp_path: Path) -> None:
    place = folder(tmp_path / "set", ("train", "test"))
    train, valid = find_images(place, None, 8, 0.1)
    place.rename(tmp_path / "moved")
    place = tmp_path / "moved"
    assert find_images(place, None, 8, 0.1)[0].hash == train.hash != valid.hash
    (place / "train" / "dog").rename(place / "train" / "cow")
    (place / "test" / "dog").rename(place / "test" / "cow")
    (place / "train" / "cat").rename(place / "train" / "axe")
    (place / "test" / "cat").rename(place / "test" / "axe")
    renamed, _ = find_images(place, None, 8, 0.1)
    assert renamed.hash != train.hash and np.array_equal(renamed.pixels, train.pixels)


def test_sides_are_split_by_content_and_more_images_move_none(tmp_path: Path) -> None:
    place = folder(tmp_path / "set", ("train",))
    for number in range(40):
        name = place / "train" / ("cat", "dog")[number % 2] / f"more{number}.png"
        Image.fromarray(np.full((9, 9, 3), number * 6, np.uint8)).save(name)
        Image.fromarray(np.full((9, 9, 3), number * 6, np.uint8)).save(name.with_name(f"same{number}.png"))
    before = [{image.tobytes() for image in side.pixels} for side in find_images(place, None, 8, 0.5)]
    assert before[0].isdisjoint(before[1]) and len(before[0]) > 8 < len(before[1])
    Image.fromarray(np.full((9, 9, 3), 251, np.uint8)).save(place / "train" / "dog" / "0new.png")
    after = [{image.tobytes() for image in side.pixels} for side in find_images(place, None, 8, 0.5)]
    assert before[0] <= after[0] and before[1] <= after[1]


def test_held_out_classes_are_those_of_training(tmp_path: Path) -> None:
    place = folder(tmp_path / "set", ("train", "valid", "test"))
    for file in (place / "valid" / "cat").iterdir():
        file.unlink()
    (place / "valid" / "cat").rmdir()
    train, valid = find_images(place, None, 8, 0.1)
    assert valid.labels.tolist() == [1, 1, 1] and train.names == valid.names  # valid comes before test
    found = held_out_images(place, 8)
    assert found is not None and found.labels.tolist() == [1, 1, 1]  # numbers of the training side's classes
    (place / "valid" / "dog").rename(place / "valid" / "dig")
    with pytest.raises(InputError, match="the class 'dig'; expected one of cat, dog"):
        find_images(place, None, 8, 0.1)
    other = folder(tmp_path / "other", ("",))
    assert len(find_images(place, other, 8, 0.1)[1].labels) == 6
    grey = folder(tmp_path / "grey", ("",), "L")
    with pytest.raises(InputError, match="held-out images with 1 channels; expected 3"):
        find_images(place, grey, 8, 0.1)


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_a_side_without_images_is_refused(tmp_path: Path, fraction: float) -> None:
    with pytest.raises(InputError, match=r"images to train on, .* held out; expected images on both sides"):
        find_images(folder(tmp_path / "set", ("train",)), None, 8, fraction)


def test_text_with_pictures_is_no_set_of_images(tmp_path: Path) -> None:
    place = folder(tmp_path / "set", ("",))
    assert is_images(place) and not is_images(tmp_path / "missing")
    (place / "src").mkdir()
    (place / "src" / "main.py").write_text("x = 1")
    assert not is_images(place)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "iterdir", lambda path: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
        assert not is_images(place)
    (tmp_path / "a.png").write_bytes(b"")
    assert not is_images(tmp_path / "a.png")
    with pytest.raises(InputError, match="missing: cannot be read"):
        find_images(tmp_path / "missing", None, 8, 0.5)


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "webp", "gif"])
def test_pixels_are_those_of_scaling_and_then_cutting(tmp_path: Path, suffix: str) -> None:
    y, x = np.mgrid[0:60, 0:90]
    smooth = np.stack([x * 2, y * 3, (x + y)], -1).astype(np.uint8)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.fromarray(smooth).save(tmp_path / name / f"x.{suffix}", **({"quality": 95} if suffix == "jpg" else {}))
    found = held_out_images(tmp_path, 20)
    assert found is not None
    wanted = Image.fromarray(smooth).resize((30, 20), Image.Resampling.BICUBIC).crop((5, 0, 25, 20))
    difference = np.abs(found.pixels[0].transpose(1, 2, 0).astype(int) - np.asarray(wanted).astype(int))
    assert difference.mean() < (6 if suffix in ("gif", "webp", "jpg") else 1)


def test_grey_and_colour_together_are_colour(tmp_path: Path) -> None:
    pixels = RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    for name, mode in (("a", "L"), ("b", "RGBA"), ("c", "1"), ("d", "P")):
        (tmp_path / name).mkdir()
        Image.fromarray(pixels).convert(mode).save(tmp_path / name / "x.png")
    found = held_out_images(tmp_path, 8)
    assert found is not None and found.pixels.shape == (4, 3, 8, 8) and found.pixels.flags.writeable
    grey = np.asarray(Image.fromarray(pixels).convert("L"))
    assert all(np.array_equal(channel, grey) for channel in found.pixels[0])
    assert np.array_equal(found.pixels[1].transpose(1, 2, 0), pixels)


def test_a_strip_takes_no_more_memory_than_its_pixels(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("L", (2_000_000, 1)).save(tmp_path / name / "x.png")
    start = time.monotonic()
    assert held_out_images(tmp_path, 64).pixels.shape == (2, 1, 64, 64)  # type: ignore[union-attr]
    assert time.monotonic() - start < 20  # scaled before it is cut, a strip has 8 GB


@pytest.mark.fault("C15")
def test_an_image_bomb_is_refused_before_it_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = folder(tmp_path / "set", ("",))
    bad = place / "cat" / "1.png"
    for side, message in ((60_000, "decompression bomb"), (30_000, "decompression bomb"), (12_000, "could be deco")):
        bad.write_bytes(bomb(side))
        tracemalloc.start()
        with warnings.catch_warnings(record=True) as said, pytest.raises(InputError, match=f"cat/1.png.*{message}"):
            find_images(place, None, 16, 0.5)
        assert not said and tracemalloc.get_traced_memory()[1] < 16 << 20
        tracemalloc.stop()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # somebody switched pillow's own guard off
    bad.write_bytes(bomb(30_000))
    with pytest.raises(InputError, match="30000 x 30000 pixels; expected at most 67108864"):
        find_images(place, None, 16, 0.5)
    Image.new("L", (40, 40)).save(bad)
    monkeypatch.setattr(module, "MAX_PIXELS", 40 * 40 - 1)
    with pytest.raises(InputError, match="40 x 40 pixels"):
        find_images(place, None, 16, 0.5)
    monkeypatch.setattr(module, "MAX_PIXELS", 40 * 40)
    assert find_images(place, None, 16, 0.5)


def saved(image: Image.Image, kind: str) -> bytes:
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_cut_image_is_never_filled_up(tmp_path: Path, kind: str) -> None:
    place = folder(tmp_path / "set", ("",))
    bad = place / "cat" / f"1.{kind.lower()}"
    whole = saved(Image.fromarray(RNG.integers(0, 256, (40, 40, 3), dtype=np.uint8)), kind)
    for end in [*range(0, len(whole) - 20, 97), len(whole) // 2]:
        bad.write_bytes(whole[:end])
        with pytest.raises(InputError, match=r"cat/1.*a whole image"):
            find_images(place, None, 16, 0.5)
    bad.write_bytes(whole)
    assert find_images(place, None, 16, 0.5)


def test_a_wrong_checksum_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = folder(tmp_path / "set", ("",))
    bad = place / "cat" / "1.png"
    data = bytearray(saved(Image.new("RGB", (40, 40)), "PNG"))
    data[data.index(b"IEND") - 5] ^= 1  # of the pixels
    bad.write_bytes(data)
    with pytest.raises(InputError, match=r"cat/1.png: cannot be read"):
        find_images(place, None, 16, 0.5)
    monkeypatch.setattr(PngImageFile, "verify", lambda image: None)
    assert find_images(place, None, 16, 0.5)  # loading alone does not look at it


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "cannot identify image file"),
        (saved(Image.new("RGB", (9, 9)), "TIFF"), "cannot identify image file"),
        (saved(Image.fromarray(np.full((9, 9), 60_000, np.uint16)), "PNG"), "8 bits a channel"),
    ],
    ids=["a program", "TIFF", "16 bits"],
)
def test_other_formats_stay_shut(tmp_path: Path, data: bytes, message: str) -> None:
    place = folder(tmp_path / "set", ("",))
    (place / "cat" / "1.png").write_bytes(data)
    with pytest.raises(InputError, match=f"cat/1.png: .*{message}"):
        find_images(place, None, 16, 0.5)


def test_without_pillow_one_line_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = folder(tmp_path / "set", ("",))
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MachineError, match=r"pip install 'headway\[data\]'"):
        find_images(place, None, 16, 0.5)


def test_a_set_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = folder(tmp_path / "set", ("",))
    monkeypatch.setattr(module, "MAX_BYTES", 6 * 3 * 16 * 16 - 1)
    with pytest.raises(InputError, match="6 images, 4608 bytes; expected at most 4607"):
        find_images(place, None, 16, 0.5)
    assert find_images(place, None, 15, 0.5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_augmentation_is_a_function_of_pixels_and_generator(dtype: torch.dtype) -> None:
    pixels = torch.randint(0, 256, (6, 3, 5, 7)).to(dtype)
    before = pixels.clone()
    for change in (lambda rng: moved(pixels, 2, rng), lambda rng: mirrored(pixels, rng)):
        first, again, other = (change(np.random.default_rng(seed)) for seed in (1, 1, 2))
        assert torch.equal(first, again) and not torch.equal(first, other)
        assert first.dtype == dtype and first.shape == pixels.shape and torch.equal(pixels, before)
    assert torch.equal(moved(pixels, 0, np.random.default_rng(0)), pixels)


def test_normalizing_is_per_channel() -> None:
    pixels = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    out = normalize(pixels, mean, std)
    wanted = (pixels.numpy().astype(np.float64) / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    assert out.dtype == torch.float32 and np.allclose(out.numpy(), wanted, atol=1e-6)
    assert torch.equal(out, normalize(pixels.float(), mean, std))
