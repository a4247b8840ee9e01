"""Time to quality on WikiText-2 bytes: the hand-written baseline and its recipe against Headway's recipe.

The baseline trains its 2,000 steps; Headway's recipe, at the same layers, width and context and with no more
parameters, trains as many steps as it takes to reach the baseline's final loss (a run of its own per length, since the
schedule ends with the run), and so does a shape of its own choice, which is smaller; then both train for the baseline's
whole time. Only training steps are timed, on the same machine, in slices that take turns, so that a busy
minute hits all.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from common import as_tensor, clock, options, report, wikitext
from nanogpt_loop import SMALL, Loop, Shape, Windows
from torch import Tensor

from headway.nn import Transformer
from headway.run_config import RunConfig
from headway.training.optimizers import make_optimizer
from headway.training.recipe import Facts, resolve
from headway.training.schedules import scale

SLICE = 20
# Grouped keys and values pay for the untied head, so that the parameters stay below the baseline's.
MODEL = {"n_layers": SMALL.n_layers, "d_model": SMALL.d_model, "n_heads": SMALL.n_heads, "n_kv_heads": 2}
# A shape of its own: what is learned in seconds fits one layer, and a step of it costs a sixth.
FREE = {"n_layers": 1, "d_model": 96, "n_heads": 3, "n_kv_heads": 1}


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
        shape: Shape = SMALL,
    ) -> None:
        numbers = {"steps": steps, "batch_size": batch, "seed": seed, "dtype": "float32", **(train or {})}
        run = RunConfig(model={**MODEL, **(model or {})}, data={"context": shape.context}, train=numbers)
        config, run = resolve(run, Facts(len(data), {"vocab_size": shape.vocab}), None)
        torch.manual_seed(seed)
        self.train, self.model = run.train, Transformer(config)
        self.updater = make_optimizer(self.model, config, run.train)
        self.windows = Windows(replace(shape, batch=batch), data)
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
    size: int = SLICE
    seconds: float = 0.0
    slices: list[float] = field(default_factory=list)

    def slice(self) -> bool:
        count = min(self.size, self.steps - self.loop.done)
        if count <= 0:
            return False
        self.slices.append(clock(lambda: [self.loop.step() for _ in range(count)]))
        self.seconds += self.slices[-1]
        return True


def bits_per_byte(loss: object, valid: Tensor, windows: int = 1000, T: int = SMALL.context) -> float:
    """Mean over fixed random windows of T bytes of the validation text, as nanoGPT evaluates."""
    generator = torch.Generator().manual_seed(1)
    starts = torch.randint(len(valid) - T - 1, (windows,), generator=generator)
    total = 0.0
    with torch.no_grad():
        for chunk in starts.split(50):
            rows = torch.stack([valid[i : i + T + 1] for i in chunk.tolist()]).long()
            total += float(loss(rows[:, :-1], rows[:, 1:])) * len(chunk)  # type: ignore[operator]
    return total / windows / math.log(2)


def short_runs(data: Tensor, steps: int, batch: int, seeds: int, model: Mapping[str, object]) -> list[Timed]:
    return [Timed(Ours(data, steps, batch, seed, model), steps) for seed in range(seeds)]


def take_turns(base: Timed, runs: list[Timed]) -> None:
    """The baseline's slices are spread over those of the short runs."""
    per_turn = max(1, base.steps // sum(run.steps for run in runs))
    waiting = list(runs)
    while waiting or base.loop.done < base.steps:
        for _ in range(per_turn):
            base.slice()
        if waiting and not waiting[0].slice():
            waiting.pop(0)


def judged(runs: list[Timed], base: Timed, target: float, valid: Tensor) -> dict[str, object]:
    """Seconds and bits per byte of each seed, and the ratio to the baseline."""
    bits = [bits_per_byte(run.loop.loss, valid) for run in runs]
    seconds = [run.seconds for run in runs]
    return {
        "seconds": [round(value, 2) for value in seconds],
        "bits_per_byte": [round(value, 4) for value in bits],
        "parameters": sum(p.numel() for p in runs[0].loop.model.parameters()),
        "steps": runs[0].steps,
        "reached_baseline": all(value <= target for value in bits),
        "ratio": round(base.seconds / statistics.median(seconds), 2),
    }


def whole_time(data: Tensor, batch: int, runs: list[Timed], seconds: float, model: Mapping[str, object]) -> Timed:
    """As many steps as fit into the baseline's time."""
    step = statistics.median(t / SLICE for run in runs for t in run.slices)
    long = Timed(Ours(data, int(seconds / step), batch, 0, model), int(seconds / step))
    while long.slice():
        pass
    return long


def main() -> None:
    args = options(
        __doc__ or "", baseline_steps=2000, steps=220, free_steps=440, batch=12, free_batch=12, seeds=3, times=1
    )
    data, valid = as_tensor(wikitext("train")), as_tensor(wikitext("valid"))
    base = Timed(Loop(SMALL, data, args.baseline_steps * args.times), args.baseline_steps * args.times)
    shapes = {"same shape": (MODEL, args.steps, args.batch), "free shape": (FREE, args.free_steps, args.free_batch)}
    runs = {n: short_runs(data, steps, batch, args.seeds, model) for n, (model, steps, batch) in shapes.items()}
    take_turns(base, [run for some in runs.values() for run in some])
    target = bits_per_byte(base.loop.model, valid)
    count = sum(p.numel() for p in base.loop.model.parameters())
    out: dict[str, object] = {
        "benchmark": "time_to_loss",
        "baseline": {"seconds": round(base.seconds, 2), "bits_per_byte": round(target, 4), "parameters": count},
    }
    print(out["baseline"], flush=True)
    for name, (model, _, batch) in shapes.items():
        found = judged(runs[name], base, target, valid)
        print(f"{name}: {found}", flush=True)
        long = whole_time(data, batch, runs[name], base.seconds, model)
        equal = {"seconds": round(long.seconds, 2), "bits_per_byte": round(bits_per_byte(long.loop.loss, valid), 4)}
        print(f"{name} at equal time: {equal}", flush=True)
        out[name] = {**found, "equal_time": equal}
    report(out)


if __name__ == "__main__":
    main()
