"""One loop, four kinds: each learns something real, and its loss falls far below chance.

Chance is the entropy of the labels, which is what a model reaches that knows their frequencies and nothing else.
The data: the standard library's documentation of Python, its bytes and its words, and handwritten digits.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from headway.config import ModelConfig
from headway.data.batches import PackedBatches
from headway.data.store import TokenStore
from headway.nn import Transformer
from headway.run_config import Train
from headway.training import loop
from headway.training.events import StepEvent
from headway.training.loop import Hooks, Trainer
from headway.training.objectives import IGNORED, BatchSource, CausalLM, ShuffledExamples, TrainingBatch

TEXT = "\n".join(topics[name] for name in sorted(topics))


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "write_loss_curve", lambda folder: None)


def train(
    folder: Path,
    model: Mapping[str, Any],
    source: BatchSource,
    held_out: list[TrainingBatch],
    steps: int,
    **fields: Any,
) -> tuple[Transformer, float, float]:
    """The trained model, its loss on held-out batches, and chance there."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"d_model": 64, "n_layers": 2, "n_heads": 4, **model}
    settings: dict[str, Any] = {"lr": 0.004, "muon_lr": 0.03, "warmup": 10, "batch_size": 32, **fields}
    built = Transformer(ModelConfig(**sizes))
    seen: list[StepEvent] = []
    hooks = Hooks(lambda event: seen.append(event) if isinstance(event, StepEvent) else None)
    valid: Iterable[TrainingBatch] = held_out
    trainer = Trainer(built, source, Train(steps=steps, **settings), folder, lambda: valid, hooks=hooks)
    result = trainer.fit()
    assert result.evaluation is not None and result.evaluation.loss is not None
    counts = Counter(int(x) for batch in held_out for x in batch.inputs["labels"].flatten() if x != IGNORED)
    total = sum(counts.values())
    chance = -sum(n / total * math.log(n / total) for n in counts.values())
    assert seen[0].loss is not None and seen[0].loss > 0.7 * chance  # it knew nothing at the start
    return built, result.evaluation.loss, chance


def test_decoder_learns_text(tmp_path: Path) -> None:
    data = TEXT.encode()[:300_000]
    documents = [[*data[i : i + 2000], 256] for i in range(0, len(data), 2000)]
    stores = [TokenStore.of(part) for part in (documents[:-5], documents[-5:])]
    source = CausalLM(PackedBatches(stores[0], 64, 16, 0), "bytes")
    held_out = [
        TrainingBatch({"input_ids": b.input_ids, "labels": b.labels}, b.sample_ids)
        for b in (PackedBatches(stores[1], 64, 16, 1).batch(i) for i in range(4))
    ]
    config = {"vocab_size": 257, "max_len": 64}
    _, loss, chance = train(tmp_path, config, source, held_out, 150, batch_size=16)
    assert loss < 0.75 * chance, (loss, chance)


def test_encoder_fills_gaps(tmp_path: Path) -> None:
    """Masked language modelling on words: one letter in six is hidden (arXiv:1810.04805 hides 15 %)."""
    words = [w for w in TEXT.lower().split() if w.isalpha() and w.isascii() and 5 < len(w) < 17]
    mask, pad = 0, 1

    def collate(examples: list[str], rng: np.random.Generator) -> dict[str, Tensor]:
        ids = torch.tensor([[ord(c) - 95 for c in word.ljust(16)] for word in examples]).clamp(min=pad)
        real = ids > pad
        hidden = (torch.from_numpy(rng.random(ids.shape)) < 0.15) & real
        labels = ids.masked_fill(~hidden, IGNORED)
        return {"input_ids": ids.masked_fill(hidden, mask), "attention_mask": real.long(), "labels": labels}

    source = ShuffledExamples(words[2000:], collate, 64, 0, {"data": "words"})
    tests = ShuffledExamples(words[:2000], collate, 256, 1, {})
    config = {"kind": "encoder", "vocab_size": 28, "max_len": 16, "n_layers": 1, "positions": "learned"}
    _, loss, chance = train(tmp_path, config, source, [tests.batch(i) for i in range(4)], 600, batch_size=64, lr=0.01)
    assert loss < 0.6 * chance, (loss, chance)


def test_encoder_decoder_copies_in_capitals(tmp_path: Path) -> None:
    """Sequence to sequence: a word in small letters becomes the word in capitals, reversed, and an end sign."""
    words = sorted({w for w in TEXT.lower().split() if w.isalpha() and w.isascii() and 2 < len(w) < 9})
    random.Random(0).shuffle(words)
    start, end, pad = 1, 2, 0

    def collate(examples: list[str], rng: np.random.Generator) -> dict[str, Tensor]:
        source_ids = torch.zeros(len(examples), 8, dtype=torch.int64)
        labels = torch.full((len(examples), 9), IGNORED)
        for row, word in enumerate(examples):
            source_ids[row, : len(word)] = torch.tensor([ord(c) - 94 for c in word])
            labels[row, : len(word) + 1] = torch.tensor([*(ord(c) - 94 + 26 for c in reversed(word)), end])
        return {"input_ids": source_ids, "attention_mask": (source_ids != pad).long(), "labels": labels}

    source = ShuffledExamples(words[300:], collate, 64, 0, {"data": "words"})
    tests = [ShuffledExamples(words[:300], collate, 300, 0, {}).batch(0)]
    config = {
        "kind": "encoder-decoder",
        "vocab_size": 55,
        "max_len": 16,
        "n_layers": 1,
        "positions": "learned",
        "tokens": {"decoder_start": start, "pad": pad, "eos": end},
    }
    model, loss, chance = train(tmp_path, config, source, tests, 200, batch_size=64)
    assert loss < 0.1 * chance, (loss, chance)
    inputs = tests[0].inputs
    model.eval()
    with torch.no_grad():
        guess = model(**inputs).logits.argmax(-1)
    right = (guess == inputs["labels"]) | (inputs["labels"] == IGNORED)
    assert right.float().mean() > 0.95  # words that were never seen in training


def test_vision_reads_digits(tmp_path: Path) -> None:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 (UCI, Alpaydin and Kaynak 1998), moved about in training."""
    digits = load_digits()
    pixels = torch.from_numpy(digits.images).float()[:, None] / 16 - 0.3
    labels = torch.from_numpy(digits.target).long()
    numbers = np.random.default_rng(0).permutation(len(labels)).tolist()

    def collate(examples: list[int], rng: np.random.Generator) -> dict[str, Tensor]:
        moved = [torch.roll(pixels[i], tuple(rng.integers(-1, 2, 2)), (1, 2)) for i in examples]
        return {"pixel_values": torch.stack(moved), "labels": labels[examples]}

    def as_they_are(examples: list[int], rng: np.random.Generator) -> dict[str, Tensor]:
        return {"pixel_values": pixels[examples], "labels": labels[examples]}

    source = ShuffledExamples(numbers[397:], collate, 64, 0, {"data": "digits"})
    tests = [ShuffledExamples(numbers[:397], as_they_are, 397, 1, {}).batch(0)]
    config = {
        "kind": "vision",
        "embeddings": {"patch": {"size": 2, "image": 8, "channels": 1}},
        "head": {"type": "image-classification", "labels": 10},
    }
    model, loss, chance = train(tmp_path, config, source, tests, 250, batch_size=64)
    assert loss < 0.15 * chance, (loss, chance)
    model.eval()
    with torch.no_grad():
        guess = model(pixel_values=tests[0].inputs["pixel_values"]).logits.argmax(-1)
    assert (guess == tests[0].inputs["labels"]).float().mean() > 0.9
