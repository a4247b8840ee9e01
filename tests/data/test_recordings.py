"""Recordings in folders: found, of one length, split, and refused by name where they are not sound."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from headway.data.audio import log_mel, read_wav, seconds_of
from headway.data.recordings import (
    find_recordings,
    held_out_recordings,
    is_recordings,
    shifted,
    spectrogram,
)
from headway.errors import InputError

from recording_toys import PITCHES, folder, tone, write_wav  # isort: skip

RNG = np.random.default_rng(1)


def found(place: Path, valid: Path | None = None, seconds: float | None = None, bins: int = 20):  # type: ignore[no-untyped-def]
    return find_recordings(place, valid, seconds, bins, 0.3)


def test_a_folder_of_folders_of_wav_is_recordings(tmp_path: Path) -> None:
    assert is_recordings(folder(tmp_path / "a", 2))
    assert is_recordings(folder(tmp_path / "b" / "train", 2).parent)
    assert not is_recordings(tmp_path) and not is_recordings(tmp_path / "nowhere")
    (tmp_path / "a" / "notes").mkdir()
    assert not is_recordings(tmp_path / "a")


def test_every_recording_is_its_spectrogram_on_one_side(tmp_path: Path) -> None:
    place = folder(tmp_path / "all", 12)
    train, valid = found(place)
    assert train.names == valid.names == tuple(PITCHES)
    assert len(train.labels) + len(valid.labels) == 36 and len(valid.labels)
    longest = max(seconds_of(file) for file in place.rglob("*.wav"))
    frames = train.features.shape[2]
    assert train.features.shape[1:] == valid.features.shape[1:] and frames - 1 < longest * 100 <= frames
    expected = {}
    for file in sorted(place.rglob("*.wav")):
        expected[log_mel(read_wav(file), bins=20, frames=frames).numpy().tobytes()] = file.parent.name
    seen = {
        one.tobytes(): side.names[label]
        for side in (train, valid)
        for one, label in zip(side.features, side.labels, strict=True)
    }
    assert seen == expected
    # Another file moves none of the others, and a name or place is no part of the data.
    write_wav(place / "high" / "more.wav", tone(2000, 0.1, 16_000, RNG))
    again, held = found(place, seconds=frames / 100)
    assert {one.tobytes() for one in train.features} <= {one.tobytes() for one in again.features}
    assert {one.tobytes() for one in valid.features} <= {one.tobytes() for one in held.features}
    (place / "high" / "more.wav").unlink()
    assert found(place.rename(tmp_path / "moved"))[0].hash == train.hash


def test_sides_of_their_own(tmp_path: Path) -> None:
    """Whole voices are held out by folders: train and test, or another path."""
    folder(tmp_path / "set" / "train", 3)
    folder(tmp_path / "set" / "test", 2, seed=1)
    train, valid = found(tmp_path / "set", seconds=0.2)
    assert (len(train.labels), len(valid.labels)) == (9, 6)
    other, same = found(tmp_path / "set" / "train", tmp_path / "set" / "test", 0.2)
    assert (other.hash, same.hash) == (train.hash, valid.hash)
    assert held_out_recordings(tmp_path / "set", 20, 20, tuple(PITCHES)).hash == valid.hash


def test_another_rate_is_resampled(tmp_path: Path) -> None:
    """The same sound at 8 and 44.1 kHz: nearly the same spectrogram, in as many frames."""
    features = []
    for rate in (8_000, 16_000, 44_100):
        time = np.arange(rate // 5) / rate
        path = write_wav(tmp_path / f"{rate}.wav", 0.5 * np.sin(2 * np.pi * 700 * time), rate)
        assert seconds_of(path) == 0.2
        features.append(spectrogram(path, 40, 20))
    loud = features[1] > features[1].max() - 0.5  # 20 dB below the loudest and above: the tone itself
    assert all((one - features[1])[loud].abs().max() < 0.05 for one in features)


@pytest.mark.fault("R19")
@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.zeros(1600), r"x\.wav: silence: no sample above 0; expected a sound"),
        (np.full(1600, 5e-5), r"x\.wav: silence: no sample above 3e-05"),
        (np.zeros(0), r"x\.wav: 0 bytes of samples"),
        (tone(500, 0.8, 16_000, RNG), r"x\.wav: 0\.80 s; expected at most 0\.5 s.*data\.seconds=0\.8"),
    ],
)
def test_what_is_no_sound_for_this_set_is_refused(tmp_path: Path, samples: np.ndarray, message: str) -> None:
    place = folder(tmp_path / "all", 2)
    write_wav(place / "low" / "x.wav", samples)
    with pytest.raises(InputError, match=message):
        found(place, seconds=0.5)


@pytest.mark.fault("R19")
def test_half_a_minute_is_the_longest_unless_said(tmp_path: Path) -> None:
    place = folder(tmp_path / "all", 2)
    write_wav(place / "low" / "long.wav", tone(500, 31, 8_000, RNG), 8_000)
    with pytest.raises(InputError, match=r"long\.wav: 31\.00 s; expected at most 30 s.*data\.seconds=31, or cut it"):
        found(place)
    assert found(place, seconds=31.0)[0].features.shape[2] == 3100


@pytest.mark.fault("R19")
def test_files_and_classes_that_do_not_fit(tmp_path: Path) -> None:
    place = folder(tmp_path / "all", 2)
    broken = place / "low" / "x.wav"
    broken.write_bytes(b"ID3 not a wav at all")
    with pytest.raises(InputError, match=r"x\.wav: begins with b'ID3 '; expected a WAV file"):
        found(place)
    broken.unlink()
    strange = folder(tmp_path / "other", 1)
    (strange / "low").rename(strange / "lower")
    with pytest.raises(InputError, match=r"the class 'lower'; expected one of high, low, middle"):
        found(place, strange)
    with pytest.raises(InputError, match="expected recordings on both sides"):
        find_recordings(place, None, None, 20, 1e-9)
    one = tmp_path / "one"
    write_wav(one / "only" / "a.wav", tone(500, 0.1, 16_000, RNG))
    with pytest.raises(InputError, match="1 recordings of 1 classes"):
        found(one)


def test_shifting_repeats_the_edge_and_nothing_else() -> None:
    features = torch.arange(2 * 3 * 8, dtype=torch.float32).reshape(2, 3, 8)
    moved = shifted(features, 2, np.random.default_rng(0))
    steps = np.random.default_rng(0).integers(0, 5, size=(2, 1))[:, 0] - 2
    for one, before, step in zip(moved, features, steps, strict=True):
        for frame in range(8):
            assert torch.equal(one[:, frame], before[:, min(max(frame + step, 0), 7)])
    assert torch.equal(shifted(features, 0, np.random.default_rng(0)), features)
