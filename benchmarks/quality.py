"""What codes cost SmolLM2-135M-Instruct, its published file as full precision: WikiText-2 and two sets of questions.

    python benchmarks/quality.py [--windows 64] [--questions 200] [--threads N]

Loss and perplexity over `windows` windows of 512 tokens of the raw test text; both models read the same ones, so the
change has an interval of its own. ARC-Easy (arXiv:1803.05457) and HellaSwag (arXiv:1905.07830): of the answers, the one
with the highest log-likelihood per byte; `questions` of each, spread over the set. GPTQ looks at 16,384 tokens of the
validation text. Rounding to groups of 32 is what llama.cpp's Q4_0 is; "weights alone"
is INT8 unpacked, so that inputs keep all their bits. The last line is JSON.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "real"))

import numpy as np
import torch
from common import options, report
from real_data import smollm2, wikitext
from task_data import harness

import headway
from headway.evaluation.interval import ratio_interval
from headway.generation.session import inference
from headway.nn import Transformer
from headway.nn.packed import unpacked, weights_of
from headway.quantization.calibration import second_moments
from headway.quantization.receipt import compare
from headway.quantization.walk import SCHEMES, linear_layers, quantized

CONTEXT = 512


def windows(loaded: headway.Loaded, split: str, count: int) -> list[dict[str, torch.Tensor]]:
    ids = loaded.words.encode(wikitext(split)[: count * CONTEXT * 8])[: count * CONTEXT]
    return [{"input_ids": row} for row in torch.tensor(ids).view(-1, 1, CONTEXT)]


def forms(loaded: headway.Loaded, count: int) -> Iterator[tuple[str, Transformer]]:
    """Made when they are asked for: the first figures come early."""
    plain = loaded.model
    rounded = partial(quantized, plain)
    int8 = rounded(SCHEMES["int8"], "round")
    yield "int8", int8
    yield "int8, weights alone", Transformer.of(loaded.config, unpacked(weights_of(int8))).eval()
    yield "q4_0, rounded", rounded(SCHEMES["q4_0"], "round")
    moments = second_moments(plain, linear_layers(plain), windows(loaded, "valid", count))
    yield "q4_0, gptq", rounded(SCHEMES["q4_0"], "gptq", moments)


def right(model: Transformer, loaded: headway.Loaded, docs: list[dict[str, Any]]) -> list[bool]:
    """Whether the answer with the highest log-likelihood per byte is the right one, for each question."""
    out = []
    for doc in docs:
        begin = loaded.words.encode(doc["query"])
        rows = [begin + loaded.words.encode(" " + choice) for choice in doc["choices"]]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        real = torch.arange(longest)[None] < torch.tensor([[len(row)] for row in rows])
        log_p = model(input_ids=ids, attention_mask=real).logits.float().log_softmax(-1)
        scores = [
            float(log_p[place, len(begin) - 1 : len(row) - 1].gather(1, ids[place, len(begin) : len(row), None]).sum())
            / len(choice.encode())
            for place, (row, choice) in enumerate(zip(rows, doc["choices"], strict=True))
        ]
        out.append(int(np.argmax(scores)) == doc["gold"])
    return out


def share(figures: Iterable[float]) -> list[float]:
    """The mean with its interval."""
    some = list(figures)
    return [round(float(x or 0.0), 4) for x in ratio_interval(some, [1.0] * len(some))[:3]]


def main() -> None:
    args = options(__doc__ or "", windows=64, questions=200)
    loaded = headway.load(smollm2(), dtype="float32")
    some = windows(loaded, "test", args.windows)
    sets = {}
    for name in ("arc_easy", "hellaswag"):
        whole = list({str(doc.get("id", doc.get("ind"))): doc for doc in harness(name, 0, "rc")}.values())
        sets[name] = whole[:: max(len(whole) // args.questions, 1)][: args.questions]
    found: dict[str, Any] = {}
    with inference(loaded.model), contextlib.suppress(KeyboardInterrupt):
        known = {name: right(loaded.model, loaded, docs) for name, docs in sets.items()}
        found["float32"] = {name: share(map(float, hits)) for name, hits in known.items()}
        print(found, flush=True)
        for name, model in forms(loaded, 32):
            figures = compare(loaded.model, model, some)
            row: dict[str, Any] = {figure: [round(x, 4) for x in one[:3]] for figure, one in figures.items()}
            row["perplexity"] = [round(math.exp(figures[f"loss_{when}"].value), 4) for when in ("before", "after")]
            row["perplexity, %"] = [round(100 * math.expm1(x), 2) for x in figures["loss_change"][:3]]
            for task, docs in sets.items():
                now = right(model, loaded, docs)
                row[task] = share(map(float, now))
                row[f"{task}, change"] = share(float(b) - float(a) for a, b in zip(known[task], now, strict=True))
            found[name] = row
            print(name, row, flush=True)
    report({"benchmark": "quality", "tokens": args.windows * (CONTEXT - 1), "questions": args.questions, **found})


if __name__ == "__main__":
    main()
