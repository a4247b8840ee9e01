"""The same loop on text, questions and translations that people wrote: each model ends far below chance."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from real_data import is_held_out, questions, translations, wikitext
from torch import Tensor

import headway
from headway.config import ModelConfig
from headway.evaluation import TextTokens, perplexity
from headway.nn import Transformer
from headway.run_config import Train
from headway.text import train_tokenizer
from headway.training.loop import Trainer
from headway.training.objectives import IGNORED, ShuffledExamples

pytestmark = pytest.mark.real


def padded(rows: list[list[int]], fill: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [fill] * (longest - len(row)) for row in rows])


def fit(folder: Path, model: dict[str, Any], source: Any, test: Any, steps: int, **train: Any) -> tuple[Any, float]:
    torch.manual_seed(0)
    sizes = {"d_model": 64, "n_layers": 2, "n_heads": 4, "norm": "layernorm", **model}
    built = Transformer(ModelConfig(**sizes))
    settings = {"lr": 0.004, "muon_lr": 0.02, "warmup": 20, "batch_size": 32, **train}
    result = Trainer(built, source, Train(steps=steps, **settings), folder, lambda: [test]).fit()
    assert result.evaluation is not None and result.evaluation.loss is not None
    return built.eval(), result.evaluation.loss


def entropy(counts: Counter[int]) -> float:
    """What a model reaches that knows how often each label comes and nothing else."""
    total = sum(counts.values())
    return -sum(n / total * math.log(n / total) for n in counts.values())


def test_an_encoder_sorts_questions(tmp_path: Path) -> None:
    rows = questions()
    train, test = ([row for row in rows if is_held_out(row[0]) == side] for side in (False, True))
    tokenizer = train_tokenizer((text for text, _ in train), "wordpiece", 2000, special_tokens=["[CLS]"])
    first = tokenizer.special_id("[CLS]")

    def collate(examples: list[tuple[str, int]], rng: np.random.Generator) -> dict[str, Tensor]:
        ids = [[first, *tokenizer.encode(text)][:40] for text, _ in examples]
        real = padded([[1] * len(row) for row in ids], 0)
        labels = torch.tensor([label for _, label in examples])
        return {"input_ids": padded(ids, 0), "attention_mask": real, "labels": labels}

    source = ShuffledExamples(train, collate, 32, 0, {"data": "trec"})
    held_out = ShuffledExamples(test, collate, len(test), 0, {}).batch(0)
    head = {"type": "sequence-classification", "labels": 6, "pooling": "mean"}
    model = {"kind": "encoder", "vocab_size": tokenizer.vocab_size, "max_len": 40, "head": head, "dropout": 0.1}
    built, loss = fit(tmp_path, model, source, held_out, 250)
    labels = held_out.inputs["labels"]
    with torch.no_grad():
        right = built(**held_out.inputs).logits.argmax(-1) == labels
    assert loss < 0.6 * entropy(Counter(labels.tolist())), loss
    assert right.float().mean() > 0.7  # the most common class is 23 %


def test_an_encoder_decoder_translates(tmp_path: Path) -> None:
    pairs = translations(30)
    train, test = ([pair for pair in pairs if is_held_out(pair[0]) == side] for side in (False, True))
    texts = [text for pair in train for text in pair]
    tokenizer = train_tokenizer(texts, "bpe", 1500, special_tokens=["<|start|>", "<|endoftext|>"])
    start, end = tokenizer.special_id("<|start|>"), tokenizer.eos_id

    def collate(examples: list[tuple[str, str]], rng: np.random.Generator) -> dict[str, Tensor]:
        sources, targets = (tokenizer.encode_batch(list(side)) for side in zip(*examples, strict=True))
        real = padded([[1] * len(row) for row in sources], 0)
        labels = padded([[*row, end] for row in targets], IGNORED)
        return {"input_ids": padded(sources, 0), "attention_mask": real, "labels": labels}

    source = ShuffledExamples(train, collate, 64, 0, {"data": "tatoeba"})
    held_out = ShuffledExamples(test[:500], collate, 500, 0, {}).batch(0)
    tokens = {"decoder_start": start, "eos": end, "pad": 0}
    model = {"kind": "encoder-decoder", "vocab_size": tokenizer.vocab_size, "max_len": 64, "tokens": tokens}
    built, loss = fit(tmp_path, model, source, held_out, 350, batch_size=64, label_smoothing=0.1)
    chance = entropy(Counter(x for x in held_out.inputs["labels"].flatten().tolist() if x != IGNORED))
    assert loss < 0.55 * chance, (loss, chance)
    # It reads its source: other people's sentences explain a translation far worse.
    with torch.no_grad():
        own = built(**held_out.inputs).loss.item()
        swapped = {**held_out.inputs, **{k: held_out.inputs[k].roll(1, 0) for k in ("input_ids", "attention_mask")}}
        other = built(**swapped).loss.item()
    assert own < other - 0.3, (own, other)


def test_a_decoder_reads_and_writes_wikipedia(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The main job through the front door: a file, a run, a figure with its interval, a text."""
    monkeypatch.setenv("HEADWAY_CACHE", str(tmp_path / "cache"))
    (tmp_path / "wiki.txt").write_text(wikitext("train")[:1_500_000])
    run = headway.train(
        {
            "data": {"path": str(tmp_path / "wiki.txt"), "context": 64},
            "tokenizer": {"vocab_size": 1000},
            "model": {"depth": 1},
            "train": {"steps": 250, "batch_size": 32, "threads": 1, "dtype": "float32", "sample_tokens": 0},
            "output": str(tmp_path / "run"),
        }
    )
    loaded = headway.load(run.folder)
    articles = [f" = {part}" for part in wikitext("test")[:120_000].split("\n = ") if len(part) > 200]
    found = perplexity(loaded.model, [TextTokens.of(loaded.tokenizer.encode(a), loaded.tokenizer) for a in articles])
    # gzip -9 needs 2.88 bits per byte on this text, and the entropy of single bytes is 4.60.
    assert found.bits_per_byte.high < 2.88 and found.units == "documents", found
    assert found.bits_per_byte.low < found.bits_per_byte.value < found.bits_per_byte.high
    text = headway.generate(loaded, "The city", max_tokens=30, seed=0)[0].text
    assert len(text.split()) > 5
