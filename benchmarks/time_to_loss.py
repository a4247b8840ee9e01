"""Time to quality on WikiText-2 bytes: the hand-written baseline and its recipe against Headway's recipe.

The baseline trains its 2,000 steps; Headway's recipe, at the same layers, width and context and with no more
parameters, trains as many steps as it takes to reach the baseline's final loss (a run of its own per length, since the
schedule ends with the run), and then for the baseline's whole time. Only training steps are timed, on the same
machine, and the runs are cut into slices that take turns, so that a busy minute hits both.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from common import as_tensor, clock, options, report, wikitext
from nanogpt_loop import SMALL, Loop
from torch import Tensor

from headway.nn import Transformer
from headway.run_config import RunConfig
from headway.training.optimizers import make_optimizer
from headway.training.recipe import Facts, resolve
from headway.training.schedules import scale

SLICE = 20
# Grouped keys and values pay for the untied head, so that the parameters stay below the baseline's.
MODEL = {"n_layers": SMALL.n_layers, "d_model": SMALL.d_model, "n_heads": SMALL.n_heads, "n_kv_heads": 2}


class Ours:
    """The recipe for `steps` updates, on the baseline's windows; `model` and `train` change fields of it."""

    def __init__(
        self,
        data: Tensor,
        steps: int,
        batch: int,
        seed: int,
        model: Mapping[str, object] | None = None,
        train: Mapping[str, object] | None = None,
    ) -> None:
        numbers = {"steps": steps, "batch_size": batch, "seed": seed, "dtype": "float32", **(train or {})}
        run = RunConfig(model={**MODEL, **(model or {})}, data={"context": SMALL.context}, train=numbers)
        config, run = resolve(run, Facts(len(data), {"vocab_size": SMALL.vocab}), None)
        torch.manual_seed(seed)
        self.train, self.model = run.train, Transformer(config)
        self.updater = make_optimizer(self.model, config, run.train)
        self.windows = Loop(SMALL, data, steps, seed)
        self.windows.shape = type(SMALL)(**{**SMALL.__dict__, "batch": batch})
        self.parameters, self.done = list(self.model.parameters()), 0

    def step(self) -> None:
        ids, labels = self.windows.batch()
        self.model(ids, labels=labels).loss.backward()
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm([p.grad for p in self.parameters]))).item()
        if norm > self.train.clip:
            torch._foreach_mul_([p.grad for p in self.parameters], self.train.clip / norm)
        self.updater.step(scale(self.done, self.train))
        self.updater.zero_grad()
        self.done += 1

    def loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        return self.model(ids, labels=labels).loss


@dataclass
class Timed:
    """A loop, how many steps it has to go, and the seconds it took."""

    loop: Loop | Ours
    steps: int
    seconds: float = 0.0
    slices: list[float] = field(default_factory=list)

    def slice(self) -> bool:
        count = min(SLICE, self.steps - self.loop.done)
        if count <= 0:
            return False
        self.slices.append(clock(lambda: [self.loop.step() for _ in range(count)]))
        self.seconds += self.slices[-1]
        return True


def bits_per_byte(loss: object, valid: Tensor, windows: int = 1000) -> float:
    """Mean over fixed random windows of the validation text, as nanoGPT evaluates."""
    T = SMALL.context
    generator = torch.Generator().manual_seed(1)
    starts = torch.randint(len(valid) - T - 1, (windows,), generator=generator)
    total = 0.0
    with torch.no_grad():
        for chunk in starts.split(50):
            rows = torch.stack([valid[i : i + T + 1] for i in chunk.tolist()]).long()
            total += float(loss(rows[:, :-1], rows[:, 1:])) * len(chunk)  # type: ignore[operator]
    return total / windows / math.log(2)


def main() -> None:
    args = options(__doc__ or "", baseline_steps=2000, steps=220, batch=12, seeds=3)
    data, valid = as_tensor(wikitext("train")), as_tensor(wikitext("valid"))
    base = Timed(Loop(SMALL, data, args.baseline_steps), args.baseline_steps)
    short = [Timed(Ours(data, args.steps, args.batch, seed), args.steps) for seed in range(args.seeds)]
    # Interleaved: the baseline's slices are spread over those of the short runs.
    per_turn = max(1, args.baseline_steps // (args.steps * args.seeds))
    waiting = list(short)
    while waiting or base.loop.done < base.steps:
        for _ in range(per_turn):
            base.slice()
        if waiting and not waiting[0].slice():
            waiting.pop(0)
    target = bits_per_byte(base.loop.model, valid)
    reached = [bits_per_byte(run.loop.loss, valid) for run in short]
    step = statistics.median(t / SLICE for run in short for t in run.slices)
    count = sum(p.numel() for p in base.loop.model.parameters())
    ours = sum(p.numel() for p in short[0].loop.model.parameters())
    print(f"baseline {base.seconds:.1f} s, {target:.4f} bits per byte, {count} parameters", flush=True)
    for run, value in zip(short, reached, strict=True):
        print(f"headway  {run.seconds:.1f} s, {value:.4f} bits per byte, {ours} parameters", flush=True)
    long = Timed(Ours(data, int(base.seconds / step), args.batch, 0), int(base.seconds / step))
    while long.slice():
        pass
    at_equal_time = bits_per_byte(long.loop.loss, valid)
    seconds = statistics.median(run.seconds for run in short)
    print(f"headway  {long.seconds:.1f} s, {at_equal_time:.4f} bits per byte", flush=True)
    report(
        {
            "benchmark": "time_to_loss",
            "baseline": {"seconds": round(base.seconds, 2), "bits_per_byte": round(target, 4), "parameters": count},
            "headway": {
                "seconds": [round(run.seconds, 2) for run in short],
                "bits_per_byte": [round(value, 4) for value in reached],
                "parameters": ours,
                "steps": args.steps,
            },
            "reached_baseline": all(value <= target for value in reached),
            "ratio": round(base.seconds / seconds, 2),
            "equal_time": {"seconds": round(long.seconds, 2), "bits_per_byte": round(at_equal_time, 4)},
        }
    )


if __name__ == "__main__":
    main()
