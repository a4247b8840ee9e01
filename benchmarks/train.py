"""Training throughput beside a hand-written PyTorch loop of the same shape and beside the machine's GEMM peak.

Both loops run in turn, A B A B, on WikiText-2 bytes; the median of the rounds counts, and the peak is measured between
the rounds. FLOPs are 6 per weight of a matrix and token, for both alike: scores of attention and elementwise work are
time spent, not work done.
"""

from __future__ import annotations

import statistics

import torch
from common import as_tensor, clock, gemm_peak, options, report, wikitext
from nanogpt_loop import MEDIUM, SMALL, Loop, Shape

from headway.config import ModelConfig
from headway.nn import Transformer
from headway.run_config import Train
from headway.training.optimizers import make_optimizer
from headway.training.recipe import ARCHITECTURE


class Headway(Loop):
    """The recipe's architecture at the baseline's shape, batches and clipping; `optimizer` adamw or muon."""

    def __init__(self, shape: Shape, data: torch.Tensor, optimizer: str) -> None:
        super().__init__(shape, data, steps=1000)
        fields = {"d_model": shape.d_model, "n_layers": shape.n_layers, "n_heads": shape.n_heads}
        config = ModelConfig(**ARCHITECTURE, **fields, vocab_size=shape.vocab, max_len=shape.context)
        self.model = Transformer(config)
        self.updater = make_optimizer(self.model, config, Train(optimizer=optimizer, lr=1e-3, muon_lr=1e-3))
        self.parameters = list(self.model.parameters())

    def step(self) -> torch.Tensor:
        ids, labels = self.batch()
        loss = self.model(ids, labels=labels).loss
        loss.backward()
        norms = torch._foreach_norm([p.grad for p in self.parameters])
        norm = torch.linalg.vector_norm(torch.stack(norms)).item()
        if norm > 1.0:
            torch._foreach_mul_([p.grad for p in self.parameters], 1.0 / norm)
        self.updater.step(1.0)
        self.updater.zero_grad()
        return loss.detach()


def measure(shape: Shape, data: torch.Tensor, rounds: int, steps: int) -> dict[str, object]:
    loops = {
        "pytorch": Loop(shape, data, 1000),
        "headway": Headway(shape, data, "adamw"),
        "headway_muon": Headway(shape, data, "muon"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    peaks = []
    for round_ in range(rounds + 1):  # the first warms up
        peaks.append(gemm_peak(repeats=3))
        for name, loop in loops.items():
            taken = clock(lambda loop=loop: [loop.step() for _ in range(steps)]) / steps
            if round_:
                seconds[name].append(taken)
    matrices = 12 * shape.n_layers * shape.d_model**2 + shape.vocab * shape.d_model
    tokens = shape.batch * shape.context
    peak = statistics.median(peaks)
    rows = {}
    for name, times in seconds.items():
        median = statistics.median(times)
        rate = 6 * matrices * tokens / median
        rows[name] = {
            "ms_per_step": round(1e3 * median, 2),
            "tokens_per_second": round(tokens / median),
            "gflops": round(rate / 1e9, 1),
            "share_of_peak": round(rate / peak, 3),
        }
        print(f"d {shape.d_model:4} {name:13} {rows[name]}", flush=True)
    pairs = [a / b for a, b in zip(seconds["pytorch"], seconds["headway"], strict=True)]
    return {"peak_gflops": round(peak / 1e9, 1), "speedup": round(statistics.median(pairs), 3), **rows}


def main() -> None:
    args = options(__doc__ or "", rounds=7, small_steps=20, medium_steps=2)
    data = as_tensor(wikitext("train"))
    small = measure(SMALL, data, args.rounds, args.small_steps)
    medium = measure(MEDIUM, data, args.rounds, args.medium_steps)
    report({"benchmark": "train", "0.8M": small, "10.65M": medium})


if __name__ == "__main__":
    main()
