"""What one more token costs at length L, with the cache and without it: flat, and growing with L.

One model with random weights (speed does not depend on them), batch 1, float32. With the cache a step is one token
through the model; without it, the whole sequence. The two are measured in turn at every length, medians of several
rounds, and drawn in docs/figures/decode.svg and .png.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import torch
from common import clock, options, report

from headway.config import ModelConfig
from headway.nn import Transformer
from headway.training.plot import BLUE, ORANGE, Series, draw
from headway.training.recipe import ARCHITECTURE

LENGTHS = (100, 200, 300, 400, 500, 600, 700, 800, 900, 1000)
FIGURES = Path(__file__).resolve().parent.parent / "docs" / "figures"


def cached_step(model: Transformer, ids: torch.Tensor, length: int, steps: int) -> float:
    """Seconds per token of `steps` cached steps that begin at `length`."""
    cache = model.new_cache(1, length + steps)
    cache.last_only = True
    model(ids[:, :length], cache=cache)
    return clock(lambda: [model(ids[:, length + i : length + i + 1], cache=cache) for i in range(steps)]) / steps


def full_step(model: Transformer, ids: torch.Tensor, length: int) -> float:
    """Seconds of the whole sequence of `length` for its next token."""
    return clock(lambda: model(ids[:, :length]))


def main() -> None:
    args = options(__doc__ or "", rounds=7, steps=20, d_model=384, layers=6)
    heads = args.d_model // 64
    sizes = {"d_model": args.d_model, "n_layers": args.layers, "n_heads": heads, "vocab_size": 4096, "max_len": 1100}
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**ARCHITECTURE, **sizes)).eval()
    ids = torch.randint(4096, (1, 1100))
    times: dict[str, dict[int, list[float]]] = {name: {n: [] for n in LENGTHS} for name in ("cached", "full")}
    with torch.inference_mode():
        for round_ in range(args.rounds + 1):  # the first warms up
            for length in LENGTHS:
                pair = {"cached": cached_step(model, ids, length, args.steps), "full": full_step(model, ids, length)}
                for name, seconds in pair.items():
                    if round_:
                        times[name][length].append(seconds)
    ms = {name: {n: 1e3 * statistics.median(row) for n, row in rows.items()} for name, rows in times.items()}
    for length in LENGTHS:
        print(
            f"{length:5} tokens: {ms['cached'][length]:8.2f} ms cached  {ms['full'][length]:8.2f} ms without",
            flush=True,
        )
    lines = [
        Series("without the cache", list(ms["full"].items()), ORANGE, dots=True),
        Series("with the cache", list(ms["cached"].items()), BLUE, dots=True),
    ]
    FIGURES.mkdir(parents=True, exist_ok=True)
    for kind, data in draw(lines, "cost of one more token", "tokens so far", "milliseconds").items():
        (FIGURES / f"decode.{kind}").write_bytes(data)
    report(
        {
            "benchmark": "decode",
            "ms": {name: {str(n): round(x, 3) for n, x in rows.items()} for name, rows in ms.items()},
            "cached_1000_over_100": round(ms["cached"][1000] / ms["cached"][100], 3),
            "full_1000_over_100": round(ms["full"][1000] / ms["full"][100], 3),
        }
    )


if __name__ == "__main__":
    main()
