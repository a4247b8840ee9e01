"""Peak memory of one training pass, forward and backward: with all logits or in pieces, with blocks kept or run twice.

    python benchmarks/step_memory.py [--layers 4] [--width 256] [--vocab 32768] [--context 512] [--rows 8]

Each way has a process of its own, which builds the model, makes a tiny pass so that libraries and threads are there,
and tells how far its peak (ru_maxrss) then rises over what was resident: activations, the loss, and the gradients,
which are the size of the weights and alike for all. The last line is JSON.
"""

from __future__ import annotations

import subprocess
import sys

from common import options, report

from headway.config import ModelConfig
from headway.cost import parameters
from headway.training.recipe import ARCHITECTURE

WAYS = {
    "all logits": ("whole", False),
    "all logits, blocks run twice": ("whole", True),
    "in pieces": ("pieces", False),
    "in pieces, blocks run twice": ("pieces", True),
}
PASS = """
import resource, torch
from headway.config import ModelConfig
from headway.nn import Transformer
from headway.training.recipe import ARCHITECTURE
from headway.training.throughput import resident_bytes

torch.set_num_threads({threads})
torch.manual_seed(0)
model = Transformer(ModelConfig(**ARCHITECTURE, **{fields}))
model.decoder.recompute = {recompute}


def step(rows, length):
    ids = torch.randint({vocab}, (rows, length))
    loss = model(ids, labels=ids).loss if {form!r} == "whole" else model.loss(ids, input_ids=ids)
    loss.backward()
    return loss.item()


step(1, 2)
model.zero_grad()
before = resident_bytes()
loss = step({rows}, {context})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before, loss)
"""


def main() -> None:
    args = options(__doc__ or "", layers=4, width=256, vocab=32768, context=512, rows=8)
    fields = {"d_model": args.width, "n_layers": args.layers, "n_heads": max(args.width // 64, 1)}
    fields |= {"vocab_size": args.vocab, "max_len": args.context}
    peaks, losses = {}, []
    for name, (form, recompute) in WAYS.items():
        code = PASS.format(
            threads=args.threads,
            fields=fields,
            recompute=recompute,
            vocab=args.vocab,
            form=form,
            rows=args.rows,
            context=args.context,
        )
        said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
        peaks[name] = round(int(said[0]) / 2**20)
        losses.append(float(said[1]))
        print(f"{name:29} {peaks[name]:5} MiB", flush=True)
    assert max(losses) - min(losses) < 1e-4 * losses[0], losses  # one pass, four ways
    weights = sum(parameters(ModelConfig(**ARCHITECTURE, **fields)).values()) * 4
    shape = {**fields, "rows": args.rows, "weights_mib": round(weights / 2**20)}
    logits = round(args.rows * args.context * args.vocab * 4 / 2**20)
    saved = round(peaks["all logits"] / peaks["in pieces, blocks run twice"], 2)
    report({"benchmark": "step_memory", "shape": shape, "logits_mib": logits, "peak_mib": peaks, "ratio": saved})


if __name__ == "__main__":
    main()
