"""Small data for every objective, rows, images and recordings, and runs that train on them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import image_toys
import recording_toys

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "seven",
    "green",
    "birds",
    "sing",
    "in",
    "old",
    "trees",
]
SMALL: dict[str, Any] = {"steps": 6, "batch_size": 4, "checkpoint_every": 3, "eval_every": 3, "threads": 1}
TINY: dict[str, Any] = {"d_model": 32, "n_layers": 1, "n_heads": 2}


def sentence(rng: random.Random, longest: int = 9) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(3, longest)))


def labelled(rng: random.Random) -> dict[str, object]:
    text = sentence(rng)
    return {"text": text, "label": "bird" if "birds" in text else "none"}


def several(rng: random.Random) -> dict[str, object]:
    text = sentence(rng)
    return {"text": text, "labels": [word for word in ("fox", "dog", "birds") if word in text]}


def number(rng: random.Random) -> dict[str, object]:
    text = sentence(rng)
    return {"text": text, "label": float(len(text.split())) / 3}


def tagged(rng: random.Random) -> dict[str, object]:
    tokens = sentence(rng).split()
    return {"tokens": tokens, "tags": ["B-ANIMAL" if word in ("fox", "dog", "birds") else "O" for word in tokens]}


def question(rng: random.Random) -> dict[str, object]:
    context = sentence(rng, 30) + " fox"
    return {
        "question": "which animal",
        "context": context,
        "answers": [{"text": "fox", "answer_start": context.index("fox")}],
    }


def pair(rng: random.Random) -> dict[str, object]:
    text = sentence(rng)
    return {"source": text, "target": " ".join(reversed(text.split()))}


def chat(rng: random.Random) -> dict[str, object]:
    turns = [{"role": "user", "content": sentence(rng)}, {"role": "assistant", "content": sentence(rng)}]
    return {"messages": turns}


def preference(rng: random.Random) -> dict[str, object]:
    chosen, rejected = sentence(rng), sentence(rng)
    return {"prompt": sentence(rng), "chosen": f"{chosen} fox", "rejected": f"{rejected} dog dog"}


def text(rng: random.Random) -> dict[str, object]:
    return {"text": ". ".join(sentence(rng) for _ in range(8)) + "."}


# name: (rows, fields of the run beside its data, the metric that `assess` gives or None)
CASES: dict[str, tuple[Callable[[random.Random], dict[str, object]], dict[str, Any], str | None]] = {
    "classes": (labelled, {}, "accuracy"),
    "classes of a decoder": (labelled, {"model": {"kind": "decoder", **TINY}}, "accuracy"),
    "several classes": (several, {}, "multilabel_f1_micro"),
    "a number": (number, {}, "mean_squared_error"),
    "tags": (tagged, {}, "span_f1"),
    "an answer's place": (question, {}, "squad_f1"),
    "sequence to sequence": (pair, {}, "bleu"),
    "prompt and completion": (pair, {"objective": "causal-lm"}, None),
    "a conversation": (chat, {}, None),
    "preferences": (
        preference,
        {"objective": {"type": "preference", "reference": "none", "by_length": True}},
        "accuracy",
    ),
    "contrastive": (pair, {"objective": "contrastive"}, "recall_at_k"),
    "text": (text, {"data": {"context": 16}}, None),
    "masked": (text, {"objective": "masked-lm", "data": {"context": 16}}, None),
    "masked words, static": (
        text,
        {"objective": {"type": "masked-lm", "whole_words": True, "static": True}, "data": {"context": 16}},
        None,
    ),
    "spans": (text, {"objective": "span-corruption", "data": {"context": 16}}, None),
    "denoising": (text, {"objective": "denoising", "data": {"context": 16}}, None),
}

# The same for data that is not rows: (what makes the folder, fields of the run).
SIGNALS: dict[str, tuple[Callable[[Path], Path], dict[str, Any]]] = {
    "images": (image_toys.folder, {"data": {"patch": 2}}),
    "masked patches": (image_toys.folder, {"objective": "masked-patches", "data": {"patch": 2}}),
    "sound": (lambda place: recording_toys.folder(place, 12), {}),
}


def rows_file(place: Path, make: Callable[[random.Random], dict[str, object]], count: int = 60) -> Path:
    rng = random.Random(0)
    path = place / "rows.jsonl"
    path.write_text("".join(json.dumps(make(rng)) + "\n" for _ in range(count)))
    return path


def config(path: Path, fields: dict[str, Any], **train_fields: Any) -> dict[str, Any]:
    return {
        "model": TINY,
        **fields,
        "data": {"path": str(path), "val_fraction": 0.2, **fields.get("data", {})},
        "train": {**SMALL, **train_fields},
        "tokenizer": {"vocab_size": 400},
    }
