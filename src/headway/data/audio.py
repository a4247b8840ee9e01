"""The audio front end: WAV file -> mono samples at 16 kHz -> Whisper's log-mel spectrogram.

The reader trusts no size before it fits the bytes that are there. The resampler is a windowed sinc, one filter per
output phase (Smith, "Digital Audio Resampling", ccrma.stanford.edu/~jos/resample); the spectrogram is Whisper's
(arXiv:2212.04356, section 2.2), on the mel scale of Slaney's Auditory Toolbox. Left out: compressed WAV, other
containers.
"""

from __future__ import annotations

import math
import struct
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headway.errors import ConfigError, InputError
from headway.files import read_bytes

RATE = 16_000  # samples per second; Whisper's, and what the functions below expect unless told otherwise
WINDOW, HOP = 400, 160  # 25 ms and 10 ms
MAX_BYTES = 1 << 30
MIN_RATE, MAX_RATE, MAX_CHANNELS, MAX_CHUNKS = 4_000, 768_000, 64, 1024
MAX_SAMPLE = 2.0**31  # some write floats at the scale of integers; beyond that, sums of samples could overflow
_ZEROS, _ROLLOFF = 24, 0.95  # zero crossings on each side of the sinc; cutoff as a share of the lower Nyquist rate
_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
_PRODUCTS = 1 << 20  # made at once: bounds the copy of the samples that the filters are multiplied with
_KEPT = 1 << 20  # numbers of a rate's filters that are kept
_Format = tuple[int, int, int, int]  # tag, channels, rate, bits
_Samples = np.ndarray[Any, np.dtype[np.float32]]


def read_wav(path: Path, *, rate: int = RATE) -> Tensor:
    """The samples of a WAV file, (samples,) float32 in -1 to 1, channels averaged, at `rate` samples per second.

    PCM of 8, 16, 24 or 32 bits and IEEE float of 32 or 64. Raises InputError naming the file: not a WAV file, cut
    short, sizes that contradict each other, an unsupported encoding, non-finite samples.
    """
    return decode_wav(read_bytes(path, MAX_BYTES), str(path), rate=rate)


def decode_wav(data: bytes, where: str, *, rate: int = RATE) -> Tensor:
    """`read_wav` of a file's bytes; `where` names them in errors."""
    (tag, channels, its_rate, bits), content = _chunks(data, where)
    frame = channels * bits // 8
    if not content or len(content) % frame:
        raise InputError(where, f"{len(content)} bytes of samples", f"one or more frames of {frame} bytes")
    samples = _samples(content, tag, bits)
    sound = np.abs(samples) < MAX_SAMPLE  # False for NaN too
    if not sound.all():
        bad = int(sound.argmin())
        raise InputError(where, f"sample {bad} is {samples[bad]}", "a finite number, full scale = 1")
    mono = samples.reshape(-1, channels).mean(1, dtype=np.float32)
    return resample(torch.from_numpy(mono), its_rate, rate)


def seconds_of(path: Path) -> float:
    """How long a WAV file sounds, in seconds. Raises InputError as `read_wav`, but looks at no sample."""
    (_, channels, rate, bits), content = _chunks(read_bytes(path, MAX_BYTES), str(path))
    return len(content) / (channels * bits // 8) / rate


def _chunks(data: bytes, where: str) -> tuple[_Format, memoryview]:
    """The format and the bytes of the samples (Microsoft, "Multimedia Programming Interface", 1991)."""
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        raise InputError(where, f"begins with {data[:4]!r}", "a WAV file", "ffmpeg -i FILE -ar 16000 -ac 1 OUT.wav")
    size, present = int.from_bytes(data[4:8], "little"), len(data) - 8
    if size > present:
        raise InputError(where, f"cut short: {present} bytes after the header", f"{size} by its header")
    view = memoryview(data)[: 8 + size]  # what follows the RIFF chunk is not part of it
    place, found = 12, None
    for _ in range(MAX_CHUNKS):
        if place + 8 > len(view):
            break
        name, length = bytes(view[place : place + 4]), int.from_bytes(view[place + 4 : place + 8], "little")
        content, left = view[place + 8 : place + 8 + length], len(view) - place - 8
        if length > left:
            raise InputError(where, f"chunk {name!r} of {length} bytes with {left} left", "a whole file")
        if name == b"fmt ":
            found = _format(content, where)
        elif name == b"data":
            if found is None:
                raise InputError(where, "samples before their format", "a 'fmt ' chunk before 'data'")
            return found, content
        place += 8 + length + length % 2
    raise InputError(where, "no samples", "a 'fmt ' chunk and a 'data' chunk")


def _format(content: memoryview, where: str) -> _Format:
    if len(content) < 16:
        raise InputError(where, f"a 'fmt ' chunk of {len(content)} bytes", "16 or more")
    tag, channels, rate, _, block, bits = struct.unpack("<HHIIHH", content[:16])
    if tag == _EXTENSIBLE and len(content) >= 40:
        tag = int.from_bytes(content[24:26], "little")  # the GUID of the encoding begins with its old number
    if (tag, bits) not in ((_PCM, 8), (_PCM, 16), (_PCM, 24), (_PCM, 32), (_FLOAT, 32), (_FLOAT, 64)):
        raise InputError(where, f"encoding {tag} with {bits} bits", "PCM of 8, 16, 24, 32 bits or float of 32, 64")
    if not 1 <= channels <= MAX_CHANNELS or block != channels * bits // 8:
        raise InputError(where, f"{channels} channels in frames of {block} bytes", f"1 to {MAX_CHANNELS} channels")
    if not MIN_RATE <= rate <= MAX_RATE:
        raise InputError(where, f"{rate} samples per second", f"{MIN_RATE} to {MAX_RATE}")
    return tag, channels, rate, bits


def _samples(content: memoryview, tag: int, bits: int) -> _Samples:
    """Interleaved samples, full scale = 1."""
    if bits == 24:  # into the upper three bytes of 32 bits, sign included
        wide = np.zeros((len(content) // 3, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(content, np.uint8).reshape(-1, 3)
        content, bits = wide.data, 32
    kind = "f" if tag == _FLOAT else "u" if bits == 8 else "i"  # 8 bits are the only unsigned width
    with np.errstate(over="ignore"):  # a double beyond float32 becomes infinite, which the caller refuses
        samples: _Samples = np.frombuffer(content, f"<{kind}{bits // 8}").astype(np.float32)
    if kind != "f":
        samples = (samples - np.float32(128 * (bits == 8))) / np.float32(2 ** (bits - 1))
    return samples


def resample(samples: Tensor, rate: int, new_rate: int) -> Tensor:
    """Samples at another rate by band-limited interpolation, (samples,) -> (ceil(samples * new_rate / rate),).

    Output n lies at input place n * rate / new_rate. Its weights are a sinc with its cutoff at 95 % of the lower of
    the two Nyquist rates, under a Hann window of 24 zero crossings a side. They repeat with period
    new_rate / gcd(rate, new_rate), so they are made once for all files of a rate, unless there are too many.
    """
    if rate == new_rate or not len(samples):
        return samples
    step, phases = (value // math.gcd(rate, new_rate) for value in (rate, new_rate))
    reach = _reach(step, phases)
    windows = torch.nn.functional.pad(samples.float(), (reach - 1, reach + step)).unfold(0, 2 * reach, 1)
    made = torch.empty(-(-len(samples) * phases // step))
    filters = _filters(step, phases) if phases * reach <= _KEPT else None
    rows = max(_PRODUCTS // (2 * reach), 1)
    for start in range(0, len(made), rows):
        places = torch.arange(start, min(start + rows, len(made))) * step
        parts = places % phases
        weights = _filter(parts, step, phases) if filters is None else filters[parts]
        made[start : start + rows] = (windows[places // phases] * weights).sum(1)
    return made


def _reach(step: int, phases: int) -> int:
    """Input samples on each side of an output that have a weight."""
    return math.ceil(_ZEROS / (_ROLLOFF * min(1.0, phases / step)))


def _filter(parts: Tensor, step: int, phases: int) -> Tensor:
    """The weights of outputs that lie `parts` / phases behind an input sample, (outputs, 2 reach) float32."""
    cutoff = _ROLLOFF * min(1.0, phases / step)  # in units of the input's Nyquist rate
    reach = _reach(step, phases)
    crossings = (torch.arange(1 - reach, reach + 1, dtype=torch.float64) - parts[:, None] / phases) * cutoff
    window = torch.cos(crossings.clamp(-_ZEROS, _ZEROS) * (math.pi / 2 / _ZEROS)).square()
    return (torch.sinc(crossings) * window * cutoff).float()


@lru_cache(maxsize=4)
def _filters(step: int, phases: int) -> Tensor:
    """One filter per phase: files of one rate share them."""
    return _filter(torch.arange(phases), step, phases)


def mel_filters(bins: int = 80, *, rate: int = RATE, window: int = WINDOW) -> Tensor:
    """Triangular filters of equal area from 0 Hz to rate / 2, evenly spaced on Slaney's mel scale.

    Returns (bins, window // 2 + 1) float32, the weight of each frequency of the Fourier transform in each filter.
    The scale (Slaney, "Auditory Toolbox", 1998): linear below 1,000 Hz with 15 mels there, then 27 mels for each
    factor of 6.4.
    """
    per_octave = math.log(6.4) / 27
    top = rate / 2
    top_mel = 15 + math.log(top / 1000) / per_octave if top >= 1000 else top * 15 / 1000
    mels = torch.linspace(0, top_mel, bins + 2, dtype=torch.float64)
    edges = torch.where(mels < 15, mels * 1000 / 15, 1000 * torch.exp((mels - 15) * per_octave))[:, None]
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    hertz = torch.linspace(0, top, window // 2 + 1, dtype=torch.float64)
    rising, falling = (hertz - low) / (centre - low), (high - hertz) / (high - centre)
    return (torch.minimum(rising, falling).clamp(min=0) * 2 / (high - low)).float()


def log_mel(samples: Tensor, *, bins: int = 80, frames: int = 3000) -> Tensor:
    """Whisper's input: (samples,) at 16 kHz -> (bins, frames) float32, one frame each 10 ms.

    The samples are cut or padded with silence to frames * 160, which is 30 s for 3,000 frames. The base-10 logarithm
    of the power is floored at 8 below the loudest and mapped by (x + 4) / 4 (github.com/openai/whisper, audio.py).
    Raises ConfigError when `samples` is not one row of them or `frames` is below 2.
    """
    if samples.dim() != 1 or frames < 2:
        found = f"samples of shape {list(samples.shape)}, {frames} frames"
        raise ConfigError("log_mel", found, "one row of samples and 2 frames or more")
    wanted = frames * HOP
    padded = torch.nn.functional.pad(samples[:wanted].float(), (0, max(0, wanted - len(samples))))
    window = torch.hann_window(WINDOW, device=samples.device)
    power = torch.stft(padded, WINDOW, HOP, window=window, return_complex=True)[:, :-1].abs().square()
    log = (mel_filters(bins).to(samples.device) @ power).clamp(min=1e-10).log10()
    return (log.maximum(log.max() - 8) + 4) / 4
