"""What each choice of the recipe is worth: change one, and count steps and time to the same loss (docs/recipe.md).

    python benchmarks/ablation.py --rounds 0             steps, several seeds; the machine's load does not matter
    python benchmarks/ablation.py --seeds 0 --rounds 5   milliseconds a step, rows in turn, on a quiet machine
    python benchmarks/ablation.py --table 1              the table of docs/recipe.md from what was measured

WikiText-2 bytes at the small shape (4 layers, d 128, context 64). The loss to reach is what the recipe reaches with
`steps`. A schedule ends with its run, so each length is a run of its own: they grow by a quarter, and between the two
that enclose the loss the number of steps is interpolated. Figures go to results/ablation.json.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path

from common import as_tensor, options, report, wikitext
from time_to_loss import SLICE, Ours, Timed, bits_per_byte

RESULTS = Path(__file__).parent / "results" / "ablation.json"
GROWTH, LONGEST = 1.25, 9  # times the recipe's steps at most: 1.25^9 = 7.5
STUDENT = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}  # the 97.5 % point for so many seeds

Fields = dict[str, object]
ROWS: dict[str, tuple[Fields, Fields]] = {
    "the recipe": ({}, {}),
    "AdamW for all, lr 0.004": ({}, {"optimizer": "adamw"}),
    "AdamW for all, lr 0.008": ({}, {"optimizer": "adamw", "lr": 0.008}),
    "Lion for all": ({}, {"optimizer": "lion"}),
    "Adafactor for all": ({}, {"optimizer": "adafactor"}),
    "no QK-norm": ({"attention": {"qk_norm": "none"}}, {}),
    "LayerNorm": ({"norm": "layernorm"}, {}),
    "learned positions": ({"positions": "learned"}, {}),
    "GELU": ({"feed_forward": "gelu"}, {}),
    "SwiGLU of as many weights": ({"feed_forward": "swiglu", "d_ff": 341}, {}),
    "projections begin scaled, not zero": ({"init": {"std": None, "residual": "scaled"}}, {}),
    "weights begin at 0.02": ({"init": {"std": 0.02, "residual": "zero"}}, {}),
    "tied embeddings": ({"embeddings": {"tied": True}}, {}),
    "as many key-value heads as heads": ({"n_kv_heads": 4}, {}),
    "biases everywhere": ({"attention": {"bias": True, "output_bias": True}}, {}),
    "cosine to zero": ({}, {"schedule": "cosine"}),
    "WSD": ({}, {"schedule": "wsd"}),
    "linear to a tenth": ({}, {"final_lr": 0.1}),
    "warmup of 50 steps": ({}, {"warmup": 50}),
    "table rate halved": ({}, {"lr": 0.02}),
    "table rate doubled": ({}, {"lr": 0.08}),
    "Muon rate halved": ({}, {"muon_lr": 0.015}),
    "Muon rate doubled": ({}, {"muon_lr": 0.06}),
    "weight decay 0.1": ({}, {"weight_decay": 0.1}),
}


def steps_to(target: float, begin: int, bits_after: Callable[[int], float]) -> float | None:
    """Steps to a loss, interpolated in their logarithm; None: not within the longest run."""

    def after(power: int) -> float:
        return bits_after(round(begin * GROWTH**power))

    power = 0
    while after(power) > target:
        power += 1
        if power > LONGEST:
            return None
    while after(power - 1) <= target:
        power -= 1
    above, below = after(power - 1), after(power)
    return begin * GROWTH ** (power - 1 + (above - target) / (above - below))


def interval(values: list[float]) -> list[float]:
    """Geometric mean and Student's 95 % interval of it."""
    logs = [math.log(value) for value in values]
    middle = statistics.mean(logs)
    wide = STUDENT[len(logs)] * statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else 0.0
    return [round(math.exp(middle + side * wide), 1) for side in (0, -1, 1)]


class Rows:
    """What is known of each row, kept in a file after each."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.data, self.valid = as_tensor(wikitext("train")), as_tensor(wikitext("valid"))
        self.known: dict[str, dict] = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else {}
        self.seen: dict[tuple[str, int, int], float] = {}

    def run(self, name: str, steps: int, seed: int) -> Timed:
        model, train = ROWS[name]
        return Timed(Ours(self.data, steps, self.batch, seed, model, train), steps)

    def bits(self, name: str, steps: int, seed: int) -> float:
        if (name, steps, seed) not in self.seen:
            run = self.run(name, steps, seed)
            while run.slice():
                pass
            self.seen[name, steps, seed] = bits_per_byte(run.loop.loss, self.valid)
            self.known.setdefault(name, {})["parameters"] = sum(p.numel() for p in run.loop.model.parameters())
        return self.seen[name, steps, seed]

    def count(self, steps: int, seeds: int) -> None:
        """Steps of every row to what the recipe's seeds reach in the mean."""
        target = statistics.mean(self.bits("the recipe", steps, seed) for seed in range(seeds))
        for name in ROWS:
            found = [steps_to(target, steps, lambda n, s=seed, r=name: self.bits(r, n, s)) for seed in range(seeds)]
            bits = [self.bits(name, steps, seed) for seed in range(seeds)]
            reached = [value for value in found if value is not None]
            self.known[name] |= {
                "steps": interval(reached) if len(reached) == seeds else None,
                "bits_per_byte": [round(value, 4) for value in bits],
            }
            self.write(target=round(target, 4), steps=steps, seeds=seeds)
            print(f"{name:36} {self.known[name]}", flush=True)

    def time(self, rounds: int) -> None:
        runs = {name: self.run(name, SLICE * (rounds + 1), 0) for name in ROWS}
        for _ in range(rounds + 1):  # the first warms up
            for run in runs.values():
                run.slice()
        for name, run in runs.items():
            self.known.setdefault(name, {})["ms"] = round(1e3 * statistics.median(run.slices[1:]) / SLICE, 1)
        self.write()

    def write(self, **facts: object) -> None:
        before = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        RESULTS.write_text(json.dumps({**before, **facts, "rows": self.known}, indent=1) + "\n")

    def table(self) -> None:
        own = self.known["the recipe"]
        print(
            "| changed | steps | of the recipe's | ms per step | time, of the recipe's | bits per byte, equal steps |"
        )
        print("|---|---|---|---|---|---|")
        for name, row in self.known.items():
            steps = row["steps"] or [math.inf] * 3
            share, pace = steps[0] / own["steps"][0], row["ms"] / own["ms"]
            bits = statistics.mean(row["bits_per_byte"]) - statistics.mean(own["bits_per_byte"])
            told = (
                f"{steps[0]:.0f} ({steps[1]:.0f} to {steps[2]:.0f}) | {share:.2f}" if row["steps"] else "not reached |"
            )
            print(f"| {name} | {told} | {row['ms']} | {share * pace:.2f} | {bits:+.3f} |")


def main() -> None:
    args = options(__doc__ or "", steps=200, batch=12, seeds=3, rounds=5, table=0)
    rows = Rows(args.batch)
    if args.table:
        return rows.table()
    if args.seeds:
        rows.count(args.steps, args.seeds)
    if args.rounds:
        rows.time(args.rounds)
    report({"benchmark": "ablation", "rows": rows.known})


if __name__ == "__main__":
    main()
