"""What each choice of the recipe is worth: change one, train as long, compare bits per byte (docs/recipe.md).

WikiText-2 bytes at the small shape (4 layers, d 128, context 64), the same windows for every row, several seeds; the
milliseconds per step are medians over slices. A row that is better per step but slower per step shows both.
"""

from __future__ import annotations

import statistics

from common import as_tensor, options, report, wikitext
from time_to_loss import SLICE, Ours, Timed, bits_per_byte

Fields = dict[str, object]
ROWS: dict[str, tuple[Fields, Fields]] = {
    "the recipe": ({}, {}),
    "AdamW for all, lr 0.004": ({}, {"optimizer": "adamw"}),
    "AdamW for all, lr 0.008": ({}, {"optimizer": "adamw", "lr": 0.008}),
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


def main() -> None:
    args = options(__doc__ or "", steps=200, batch=12, seeds=2)
    data, valid = as_tensor(wikitext("train")), as_tensor(wikitext("valid"))
    table: dict[str, dict[str, float]] = {}
    for name, (model, train) in ROWS.items():
        bits, slices = [], []
        for seed in range(args.seeds):
            run = Timed(Ours(data, args.steps, args.batch, seed, model, train), args.steps)
            while run.slice():
                pass
            bits.append(bits_per_byte(run.loop.loss, valid))
            slices += [seconds / SLICE for seconds in run.slices]
        table[name] = {
            "bits_per_byte": round(statistics.mean(bits), 4),
            "spread": round(max(bits) - min(bits), 4),
            "ms_per_step": round(1e3 * statistics.median(slices), 1),
            "parameters": sum(p.numel() for p in run.loop.model.parameters()),
        }
        print(f"{name:36} {table[name]}", flush=True)
    report({"benchmark": "ablation", "steps": args.steps, "rows": table})


if __name__ == "__main__":
    main()
