"""Against transformers' Trainer: tokens a second and time to a quality, at 6 layers, d 384, context 256 (10.65 M).

    python benchmarks/trainer.py [--steps 1000] [--ours_steps 300] [--batch 8] [--seeds 1]

Both read random windows of WikiText-2 bytes, in float32. Trainer (a process of its own) trains its GPT-2 as people
configure it for such a run: fused AdamW at 1e-3, warmup, cosine, clipping, no dropout. Ours is the recipe at the same
layers, width and context, and for its pace also AdamW on everything, as Trainer has it. Slices of steps take turns, so
that a busy minute hits all; only they are timed. Needs the extra `bench`.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common import as_tensor, options, report, wikitext
from nanogpt_loop import MEDIUM
from time_to_loss import Ours, Timed, bits_per_byte

SLICE = 10
TARGET = 2.5  # bits per byte
MODEL = {"n_layers": MEDIUM.n_layers, "d_model": MEDIUM.d_model, "n_heads": MEDIUM.n_heads}


def child(steps: int, threads: int) -> None:
    """Trainer, a slice at a time: waits for a line before each, answers with its seconds; then bits per byte."""
    import time

    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    data, valid, T = as_tensor(wikitext("train")), as_tensor(wikitext("valid")), MEDIUM.context

    class Windows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return steps * MEDIUM.batch

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            start = int(torch.randint(len(data) - T, ()))
            ids = data[start : start + T].long()
            return {"input_ids": ids, "labels": ids}

    class Turns(TrainerCallback):
        began = 0.0

        def on_train_begin(self, *_: object, **__: object) -> None:
            self.wait()

        def on_step_end(self, args: object, state: object, control: object, **_: object) -> None:
            if state.global_step % SLICE == 0:  # type: ignore[attr-defined]
                say({"seconds": time.perf_counter() - self.began, "bits_per_byte": judged() if late(state) else None})
                if state.global_step < steps:  # type: ignore[attr-defined]
                    self.wait()

        def wait(self) -> None:
            sys.stdin.readline()
            self.began = time.perf_counter()

    def late(state: object) -> bool:
        return state.global_step % 50 == 0  # type: ignore[attr-defined]

    def judged() -> float:
        model.eval()
        found = bits_per_byte(loss, valid, 200, MEDIUM.context)
        model.train()
        return found

    def loss(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(ids).logits.flatten(0, 1), labels.flatten())

    def say(what: dict[str, object]) -> None:
        print(json.dumps(what), file=sys.__stdout__, flush=True)

    sizes = {"n_layer": MEDIUM.n_layers, "n_embd": MEDIUM.d_model, "n_head": MEDIUM.n_heads, "n_positions": T}
    dropped = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=MEDIUM.vocab, **sizes, **dropped))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=MEDIUM.batch,
            learning_rate=1e-3,
            adam_beta2=0.99,
            weight_decay=0.1,
            warmup_steps=min(100, steps // 10),
            lr_scheduler_type="cosine",
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        Trainer(model, arguments, train_dataset=Windows(), callbacks=[Turns()]).train()


class Theirs:
    """The child process: `slice()` lets it run and notes what it says; False when it is done."""

    def __init__(self, steps: int, threads: int) -> None:
        code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); "
        code += f"import trainer; trainer.child({steps}, {threads})"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.slices: list[float] = []
        self.curve: list[tuple[int, float, float]] = []  # steps, seconds until then, bits per byte
        self.left = steps // SLICE

    def slice(self) -> bool:
        if not self.left:
            return False
        self.left -= 1
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"transformers' Trainer stopped: {self.process.stderr.read()[-2000:]}")
        said = json.loads(line)
        self.slices.append(said["seconds"])
        if said["bits_per_byte"] is not None:
            self.curve.append((len(self.slices) * SLICE, sum(self.slices), said["bits_per_byte"]))
        return True


def first_below(curve: list[tuple[int, float, float]]) -> tuple[int, float, float] | None:
    return next((point for point in curve if point[2] <= TARGET), None)


def main() -> None:
    args = options(__doc__ or "", steps=1000, ours_steps=300, batch=MEDIUM.batch, seeds=1)
    data, valid = as_tensor(wikitext("train")), as_tensor(wikitext("valid"))
    theirs = Theirs(args.steps, args.threads)
    runs = [Timed(Ours(data, args.ours_steps, args.batch, seed, MODEL, shape=MEDIUM), args.ours_steps, SLICE)
            for seed in range(args.seeds)]  # fmt: skip
    adamw = Timed(Ours(data, 6 * SLICE, MEDIUM.batch, 0, MODEL, {"optimizer": "adamw"}, MEDIUM), 6 * SLICE, SLICE)
    waiting = [adamw, *runs]
    share = max(1, round(args.steps / (args.ours_steps * args.seeds)))
    going = True
    while going or waiting:
        for _ in range(share):
            going = theirs.slice()
        if waiting and not waiting[0].slice():
            waiting.pop(0)
    tokens = MEDIUM.batch * MEDIUM.context
    rates = {
        "trainer": statistics.median(tokens * SLICE / s for s in theirs.slices),
        "ours, AdamW": statistics.median(tokens * SLICE / s for s in adamw.slices),
        "ours": statistics.median(args.batch * MEDIUM.context * SLICE / s for run in runs for s in run.slices),
    }
    reached = first_below(theirs.curve)
    bits = [bits_per_byte(run.loop.loss, valid, 200, MEDIUM.context) for run in runs]
    seconds = [run.seconds for run in runs]
    report(
        {
            "benchmark": "trainer",
            "tokens_per_second": {name: round(rate) for name, rate in rates.items()},
            "ratio": {name: round(rate / rates["trainer"], 2) for name, rate in rates.items()},
            "trainer_curve": [(step, round(at, 1), round(value, 4)) for step, at, value in theirs.curve],
            "trainer_reached": reached,
            "ours": {"steps": args.ours_steps, "seconds": seconds, "bits_per_byte": bits},
            "time_ratio": round(reached[1] / statistics.median(seconds), 2)
            if reached and max(bits) <= TARGET
            else None,
        }
    )


if __name__ == "__main__":
    main()
