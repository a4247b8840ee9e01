"""Small recordings: tones of a few pitches in noise, as WAV files in folders of their class."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np

PITCHES = {"high": 2400.0, "low": 300.0, "middle": 900.0}


def tone(hertz: float, seconds: float, rate: int, rng: np.random.Generator) -> np.ndarray:
    time = np.arange(round(seconds * rate)) / rate
    sound = np.sin(2 * np.pi * (hertz * rng.uniform(0.95, 1.05) * time + rng.random())) + 0.3 * rng.normal(
        size=len(time)
    )
    return 0.2 * sound


def write_wav(path: Path, samples: np.ndarray, rate: int = 16_000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
    return path


def folder(place: Path, count: int, rate: int = 16_000, seed: int = 0) -> Path:
    """`count` recordings of 0.1 to 0.2 s of each pitch."""
    rng = np.random.default_rng(seed)
    for name, hertz in PITCHES.items():
        for number in range(count):
            write_wav(place / name / f"{number}.wav", tone(hertz, rng.uniform(0.1, 0.2), rate, rng), rate)
    return place
