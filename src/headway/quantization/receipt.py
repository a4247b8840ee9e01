"""What quantizing cost, measured on text that calibration did not see: both models read the same windows.

Of a decoder: nats a token before and after, their difference, KL(before || after) of what they predict, and how often
both find the same token most likely. Of any other model: the cosine of outputs. Intervals resample windows.
"""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headway import machine
from headway.evaluation import Interval
from headway.evaluation.interval import ratio_interval
from headway.generation.session import inference
from headway.generation.speed import measure
from headway.nn import Transformer
from headway.quantization.walk import size_of
from headway.text import Tokenizer

Batch = Mapping[str, Tensor]


class Receipt(NamedTuple):
    """Both models side by side.

    Attributes:
        figures: `loss_before`, `loss_after`, `loss_change` (nats a token), `kl`, `top1`; of other models `cosine`.
        bytes_before, bytes_after: of the weights in memory. scheme, method, data: how it was made, measured on what.
        machine: whose arithmetic it was. speed: {`read` or `write`: (before, after)}, see `speeds`.
    """

    figures: dict[str, Interval]
    bytes_before: int
    bytes_after: int
    scheme: str
    method: str
    data: str
    machine: str
    speed: Mapping[str, tuple[float, float]] = MappingProxyType({})

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> Receipt:
        """What `as_json` wrote."""
        return cls(**{**said, "figures": {name: Interval(**one) for name, one in said["figures"].items()}})

    def as_json(self) -> dict[str, Any]:
        """JSON values, intervals with value, low, high and n."""
        figures = {name: one._asdict() for name, one in self.figures.items()}
        return {**self._asdict(), "figures": figures, "speed": {name: list(both) for name, both in self.speed.items()}}

    def lines(self) -> list[tuple[str, str, str]]:
        """(name, value, interval) of each figure, perplexities beside losses."""
        out = []
        for name, one in self.figures.items():
            out.append((name.replace("_", " "), *_cells(one)))
            if name in ("loss_before", "loss_after"):
                out.append((name.replace("loss_", "perplexity "), *_cells(one.map(math.exp))))
        speeds = [(f"{name}s", f"{a:.1f} a second", f"{b:.1f} after") for name, (a, b) in self.speed.items()]
        return out + speeds


def _cells(one: Interval) -> tuple[str, str]:
    bounds = "" if one.low is None or one.high is None else f"{one.low:.4f} to {one.high:.4f}"
    return f"{one.value:.4f}", bounds


@torch.no_grad()
def compare(
    before: Transformer,
    after: Transformer,
    batches: Sequence[Batch],
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Interval]:
    """The figures of a receipt; a batch is one window, inputs of `forward` by name."""
    writes = before.config.head.type == "causal-lm" and before.config.kind == "decoder"
    rows = []
    for done, batch in enumerate(batches, 1):
        a, b = (model(**batch).logits.float() for model in (before, after))
        rows.append(_of_text(a[0, :-1], b[0, :-1], batch["input_ids"][0, 1:]) if writes else _of_outputs(a, b))
        progress(done)
    names = ("loss_before", "loss_after", "loss_change", "kl", "top1") if writes else ("cosine",)
    *sums, counts = zip(*rows, strict=True)
    return {name: ratio_interval(some, counts) for name, some in zip(names, sums, strict=True)}


def speeds(
    before: Transformer, after: Transformer, batches: Sequence[Batch], words: Tokenizer | None, rounds: int = 3
) -> dict[str, tuple[float, float]]:
    """{`read`: tokens or images a second of both in turn, medians; `write`: new tokens of a decoder, one by one}."""
    some = batches[:rounds]
    taken: list[list[float]] = [[], []]
    with inference(before), inference(after):
        for batch in [some[0], *some]:
            for model, seconds in zip((before, after), taken, strict=True):
                begin = time.perf_counter()
                model(**batch)
                seconds.append((time.perf_counter() - begin) / max(_count(batch), 1))
    out = {"read": (1 / statistics.median(taken[0][1:]), 1 / statistics.median(taken[1][1:]))}
    if words is not None and before.config.kind == "decoder" and before.config.max_len >= 2 * _WRITTEN:
        rates = [
            measure(model, words, prompt_tokens=_WRITTEN, new_tokens=_WRITTEN, rounds=2) for model in (before, after)
        ]
        out["write"] = (rates[0].decode_tokens_per_second, rates[1].decode_tokens_per_second)
    return out


_WRITTEN = 16  # tokens


def _count(batch: Batch) -> int:
    return batch["input_ids"].numel() if "input_ids" in batch else len(batch["pixel_values"])


def _of_text(a_TV: Tensor, b_TV: Tensor, next_T: Tensor) -> tuple[float, ...]:
    a, b = a_TV.log_softmax(-1), b_TV.log_softmax(-1)
    own = -torch.stack((a, b)).gather(2, next_T[None, :, None].expand(2, -1, 1)).double().sum((1, 2))
    kl = float((a.exp() * (a - b)).sum(dtype=torch.float64))
    same = float((a.argmax(-1) == b.argmax(-1)).sum())
    return float(own[0]), float(own[1]), float(own[1] - own[0]), kl, same, float(len(next_T))


def _of_outputs(a: Tensor, b: Tensor) -> tuple[float, ...]:
    cosine = torch.cosine_similarity(a.flatten(1), b.flatten(1), 1)
    return float(cosine.sum()), float(len(cosine))


def receipt(
    before: Transformer,
    after: Transformer,
    figures: dict[str, Interval],
    *,
    scheme: str,
    method: str,
    data: str,
    speed: Mapping[str, tuple[float, float]] = MappingProxyType({}),
) -> Receipt:
    """Figures with sizes and the machine they were taken on."""
    where = f"{machine.cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {platform.system()}"
    return Receipt(figures, size_of(before), size_of(after), scheme, method, data, where, speed)
