"""WAV against the standard library's writer and scipy's, resampling against sines, log-mel against transformers."""

from __future__ import annotations

import io
import math
import random
import struct
import wave
from pathlib import Path

import numpy as np
import pytest
import scipy.io.wavfile
import scipy.signal
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import WhisperFeatureExtractor

from headway import files
from headway.data.audio import decode_wav, log_mel, mel_filters, read_wav, resample
from headway.errors import ConfigError, InputError


def wav(content: bytes, *, tag: int = 1, channels: int = 1, rate: int = 16000, bits: int = 16, **other: int) -> bytes:
    """A WAV file; `block`, `data_size`, `riff_size` replace what is true."""
    block = other.get("block", channels * bits // 8)
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, tag, channels, rate, rate * block & 0xFFFFFFFF, block, bits)
    body = b"WAVE" + form + struct.pack("<4sI", b"data", other.get("data_size", len(content))) + content
    return b"RIFF" + struct.pack("<I", other.get("riff_size", len(body))) + body


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_pcm_of_the_standard_library(tmp_path: Path, width: int, channels: int) -> None:
    rng = random.Random(width)
    low, high = (0, 255) if width == 1 else (-(1 << 8 * width - 1), (1 << 8 * width - 1) - 1)
    numbers = [low, high, (low + high + 1) // 2, *(rng.randint(low, high) for _ in range(9 * channels - 3))]
    with wave.open(str(tmp_path / "f.wav"), "wb") as file:
        file.setparams((channels, width, 16000, 0, "NONE", ""))
        file.writeframes(b"".join(n.to_bytes(width, "little", signed=width > 1) for n in numbers))
    zero = 128 if width == 1 else 0
    wanted = ((torch.tensor(numbers, dtype=torch.float64) - zero) / (1 << 8 * width - 1)).reshape(-1, channels).mean(1)
    found = read_wav(tmp_path / "f.wav")
    assert found.dtype == torch.float32 and found.shape == (9,)
    assert torch.allclose(found.double(), wanted, rtol=0, atol=2**-23)  # float32 rounds what 24 bits cannot hold


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int16, np.int32, np.uint8])
def test_files_of_scipy(tmp_path: Path, kind: type) -> None:
    values = np.random.default_rng(0).uniform(-1, 1, (50, 2))
    scale = {np.int16: 2**15, np.int32: 2**31, np.uint8: 128}.get(kind, 1)
    stored = (values * (scale - 1) + (128 if kind is np.uint8 else 0)).astype(kind)
    scipy.io.wavfile.write(tmp_path / "f.wav", 16000, stored)
    wanted = (stored.astype(np.float64) - (128 if kind is np.uint8 else 0)) / scale
    assert np.allclose(read_wav(tmp_path / "f.wav").numpy(), wanted.mean(1), rtol=0, atol=2**-22)


def test_extensible_chunks_before_and_bytes_behind() -> None:
    samples = np.array([0.5, -0.25], "<f4").tobytes()
    guid = struct.pack("<H", 3) + bytes.fromhex("000000001000800000aa00389b71")
    form = struct.pack("<HHIIHHHHI", 0xFFFE, 1, 16000, 64000, 4, 32, 22, 32, 4) + guid
    body = b"WAVE" + b"LIST" + struct.pack("<I", 3) + b"odd\0" + b"fmt " + struct.pack("<I", len(form)) + form
    body += b"data" + struct.pack("<I", len(samples)) + samples
    data = b"RIFF" + struct.pack("<I", len(body)) + body
    assert decode_wav(data, "x").tolist() == [0.5, -0.25]
    assert decode_wav(data + b"an ID3 tag, say", "x").tolist() == [0.5, -0.25]


GOOD = wav(bytes(range(200)))
MALFORMED: list[tuple[str, bytes, str]] = [
    ("empty", b"", "begins with b''; expected a WAV file. Fix: ffmpeg"),
    ("text", b"hello, this is no sound at all", "begins with b'hell'"),
    ("big-endian", b"RIFX" + GOOD[4:], "begins with b'RIFX'"),
    ("another RIFF", GOOD.replace(b"WAVE", b"AVI "), "expected a WAV file"),
    ("cut", GOOD[:-1], "cut short: 235 bytes after the header; expected 236"),
    ("data beyond the file", wav(bytes(8), data_size=10), "chunk b'data' of 10 bytes with 8 left"),
    ("streamed without a size", wav(bytes(8), data_size=0xFFFFFFFF, riff_size=0xFFFFFFFF), "cut short"),
    ("RIFF too small", wav(bytes(8), riff_size=40), "chunk b'data' of 8 bytes with 4 left"),
    ("no samples", wav(b""), "0 bytes of samples"),
    ("half a frame", wav(bytes(6), channels=2), "6 bytes of samples; expected one or more frames of 4"),
    ("no data", b"RIFF" + struct.pack("<I", 4) + b"WAVE", "no samples"),
    ("data before fmt", b"RIFF\x10\0\0\0WAVEdata\x04\0\0\0\0\0\0\0", "before their format"),
    ("short fmt", b"RIFF\x10\0\0\0WAVEfmt \x04\0\0\0\0\0\0\0", "a 'fmt ' chunk of 4 bytes"),
    ("zero channels", wav(bytes(8), channels=0), "0 channels"),
    ("65,535 channels", wav(bytes(8), channels=65535, block=2), "65535 channels"),
    ("block that does not fit", wav(bytes(8), block=4), "1 channels in frames of 4 bytes"),
    ("rate 0", wav(bytes(8), rate=0), "0 samples per second; expected 4000 to 768000"),
    ("rate 2^32 - 1", wav(bytes(8), rate=0xFFFFFFFF), "4294967295 samples per second"),
    ("mu-law", wav(bytes(8), tag=7, bits=8), "encoding 7 with 8 bits"),
    ("MP3 inside", wav(bytes(8), tag=85, bits=0), "encoding 85"),
    ("12 bits", wav(bytes(8), bits=12), "encoding 1 with 12 bits"),
    ("float of 16 bits", wav(bytes(8), tag=3, bits=16), "encoding 3 with 16 bits"),
    ("NaN", wav(np.array([0, np.nan], "<f4").tobytes(), tag=3, bits=32), "sample 1 is nan"),
    ("infinity", wav(np.array([np.inf], "<f4").tobytes(), tag=3, bits=32), "sample 0 is inf"),
    ("beyond float32", wav(np.array([1e300], "<f8").tobytes(), tag=3, bits=64), "sample 0 is inf"),
    ("beyond all sense", wav(np.array([3e38], "<f4").tobytes(), tag=3, bits=32), "sample 0 is"),
    ("a million chunks", b"RIFF" + struct.pack("<I", 8_000_004) + b"WAVE" + b"junk\0\0\0\0" * 1_000_000, "no samples"),
]


@pytest.mark.fault("K1", "K2")
@pytest.mark.parametrize(("data", "found"), [row[1:] for row in MALFORMED], ids=[row[0] for row in MALFORMED])
def test_malformed(tmp_path: Path, data: bytes, found: str) -> None:
    files.write(tmp_path / "f.wav", data)
    with pytest.raises(InputError, match=found) as caught:
        read_wav(tmp_path / "f.wav")
    assert str(caught.value).startswith(str(tmp_path / "f.wav"))
    assert len(decode_wav(GOOD, "control")) == 100


@pytest.mark.fault("K1")
def test_cut_at_any_byte() -> None:
    for cut in range(len(GOOD)):
        with pytest.raises(InputError):
            decode_wav(GOOD[:cut], "x")


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.binary(max_size=4)), min_size=1, max_size=4))
def test_mutants_give_our_error_or_samples(edits: list[tuple[int, bytes]]) -> None:
    raw = bytearray(GOOD)
    for place, data in edits:
        raw[place : place + len(data)] = data
    try:
        assert decode_wav(bytes(raw), "x").isfinite().all()
    except InputError as error:
        assert str(error).startswith("x: ")


def sine(hertz: float, rate: int, seconds: float = 1.0) -> torch.Tensor:
    return torch.sin(torch.arange(round(rate * seconds), dtype=torch.float64) * 2 * math.pi * hertz / rate)


RATES = [8000, 11025, 12000, 22050, 24000, 32000, 44100, 48000, 96000, 15999, 16001]


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("hertz", [50.0, 440.0, 2500.0])
def test_a_sine_stays_the_same_sine(rate: int, hertz: float) -> None:
    """The formula itself is the oracle. The Hann window's ripple is below 2e-4 away from the band's edge."""
    found = resample(sine(hertz, rate).float(), rate, 16000)
    assert found.shape == (16000,) and found.dtype == torch.float32
    inner = slice(200, -200)  # at the ends the sine begins and stops, which no filter can know
    assert (found.double() - sine(hertz, 16000))[inner].abs().max() < 2e-4


@pytest.mark.parametrize("rate", [22050, 44100, 48000])
@pytest.mark.parametrize("hertz", [9000.0, 10500.0])
def test_what_16_khz_cannot_hold_is_taken_out(rate: int, hertz: float) -> None:
    assert resample(sine(hertz, rate).float(), rate, 16000)[200:-200].abs().max() < 1e-3
    skipped = sine(hertz, 48000)[::3]  # control: leaving samples out folds the tone back at full strength
    assert skipped.abs().max() > 0.9


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_like_scipy_on_noise_within_the_band(rate: int) -> None:
    """Another filter design, so equal only where both pass everything: noise below 3 kHz."""
    taps = scipy.signal.firwin(801, 3000, fs=rate)
    noise = scipy.signal.lfilter(taps, 1, np.random.default_rng(0).standard_normal(rate))
    up, down = (n // math.gcd(rate, 16000) for n in (16000, rate))
    theirs = scipy.signal.resample_poly(noise, up, down, window=("kaiser", 12.0))
    ours = resample(torch.tensor(noise, dtype=torch.float32), rate, 16000).numpy()
    assert ours.shape == theirs.shape
    # What is left is at the edges of the two filters: 2.3e-3 for 8 kHz, whose edge is nearest, else 2.4e-5.
    assert np.abs(ours - theirs)[800:-800].max() < 3e-3 * np.abs(theirs).max()


def test_resampling_is_the_formula() -> None:
    """Sum over samples of sinc times window, in float64, for an irregular rate and a short signal."""
    x = torch.randn(120, dtype=torch.float64)
    rate, new, zeros = 44100, 16000, 24
    cutoff = 0.95 * new / rate
    n = torch.arange(math.ceil(len(x) * new / rate), dtype=torch.float64)[:, None]
    t = (torch.arange(len(x)) - n * rate / new) * cutoff
    window = torch.where(t.abs() < zeros, torch.cos(t * math.pi / 2 / zeros) ** 2, 0.0)
    wanted = (x * torch.sinc(t) * window * cutoff).sum(1)
    assert torch.allclose(resample(x.float(), rate, new).double(), wanted, rtol=0, atol=2e-6)  # float32 sums of 135


def test_lengths_and_the_same_rate() -> None:
    x = torch.randn(7)
    assert resample(x, 16000, 16000) is x and resample(torch.empty(0), 8000, 16000).shape == (0,)
    assert [len(resample(torch.ones(n), 44100, 16000)) for n in (1, 2, 3, 441)] == [1, 1, 2, 160]
    assert torch.allclose(resample(torch.ones(3000), 44100, 16000)[100:-100], torch.ones(889), atol=1e-3)


def test_a_file_at_another_rate(tmp_path: Path) -> None:
    tone = (sine(440, 44100) * 20000).short()
    both = torch.stack([tone, tone], 1)
    files.write(tmp_path / "f.wav", wav(both.numpy().tobytes(), channels=2, rate=44100))
    found = read_wav(tmp_path / "f.wav")
    assert (found.double() - sine(440, 16000) * 20000 / 32768)[200:-200].abs().max() < 1e-4
    assert len(read_wav(tmp_path / "f.wav", rate=44100)) == 44100


# --- the spectrogram of Whisper -------------------------------------------------------------------------------------

SOUNDS = {
    "noise": torch.randn(16000, generator=torch.Generator().manual_seed(0)) * 0.1,
    "a minute": torch.randn(960_000, generator=torch.Generator().manual_seed(1)) * 0.01,
    "tones": (sine(220, 16000, 2) + 0.1 * sine(3000, 16000, 2)).float(),
    "click": torch.nn.functional.one_hot(torch.tensor(500), 1000).float(),
    "silence": torch.zeros(100),
    "nothing": torch.empty(0),
}


@pytest.mark.parametrize("bins", [80, 128])
def test_filters_are_those_of_transformers(bins: int) -> None:
    theirs = WhisperFeatureExtractor(feature_size=bins).mel_filters.T
    assert np.abs(mel_filters(bins).numpy() - theirs).max() < 1e-8  # float32 of values up to 0.04


@pytest.mark.parametrize("bins", [80, 128])
@pytest.mark.parametrize("sound", SOUNDS)
def test_log_mel_is_that_of_transformers(bins: int, sound: str) -> None:
    extractor, samples = WhisperFeatureExtractor(feature_size=bins), SOUNDS[sound]
    found = log_mel(samples, bins=bins)
    assert found.shape == (bins, 3000) and found.dtype == torch.float32
    padded = np.zeros(480_000, np.float32)
    padded[: len(samples)] = samples[:480_000].numpy()
    if len(samples):
        theirs = extractor(samples.numpy(), sampling_rate=16000, return_tensors="np").input_features[0]
        assert np.abs(found.numpy() - theirs).max() < 1e-6
    # Their second way of computing it, in numpy and float64; ours is float32, which shows in the quietest bins.
    theirs = extractor._np_extract_fbank_features(padded[None], "cpu")[0]
    assert np.abs(found.numpy() - theirs).max() < 1e-4


def test_frames_and_their_limits() -> None:
    short = log_mel(SOUNDS["tones"], frames=150)
    assert short.shape == (80, 150)
    # Only the last frame's window reaches beyond the cut.
    assert torch.equal(log_mel(SOUNDS["tones"][:24_000], frames=150), short)
    assert torch.allclose(short[:, :148], log_mel(SOUNDS["tones"], frames=200)[:, :148], atol=1e-5)
    for bad, frames in ((torch.ones(2, 400), 3000), (torch.ones(400), 1), (torch.tensor(1.0), 5)):
        with pytest.raises(ConfigError, match="one row of samples and 2 frames"):
            log_mel(bad, frames=frames)


def test_a_spoken_file_goes_all_the_way(tmp_path: Path) -> None:
    memory = io.BytesIO()
    with wave.open(memory, "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes((sine(1000, 8000, 2) * 30000).short().numpy().tobytes())
    files.write(tmp_path / "f.wav", memory.getvalue())
    spectrum = log_mel(read_wav(tmp_path / "f.wav"))
    centres = np.linspace(0, 15 + math.log(8) / (math.log(6.4) / 27), 82)[1:-1]  # in mels; 1,000 Hz is mel 15
    loudest = int(spectrum[:, 50:150].mean(1).argmax())
    assert abs(centres[loudest] - 15) < 0.6 and spectrum[:, 300:].max() < spectrum[:, 50:150].max() - 1
