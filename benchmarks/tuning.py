"""A step of LoRA on SmolLM2-135M beside peft + transformers: the same weights, data, ranks and layers, in turn.

    python benchmarks/tuning.py [--rounds 7] [--batch 4] [--length 128] [--rank 8] [--data text|rows]

Of `text` every token is learned; `rows` are questions with their type (TREC), of which the type alone is learned, 4
times as many to a batch. Both train adapters on every linear layer inside the blocks, in float32 with AdamW; ours also
on the file's own codes (QLoRA). Peaks are of processes of their own (VmHWM). The last line is JSON.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import as_tensor, options, report, wikitext

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "real"))

from real_data import smollm2
from task_data import questions

import headway
from headway import saving
from headway.machine import peak_bytes
from headway.tuning.tuned import tuned
from headway.tuning_config import LowRankTuning

Batch = dict[str, torch.Tensor]  # input_ids and attention_mask; labels, which are not shifted
Step = Callable[[Batch], float]
KINDS = ("headway", "headway, codes", "peft")


def ours(rank: int, dtype: str | None) -> Step:
    base = headway.load(smollm2(), dtype=dtype)
    model = tuned(base.model.float(), base.config, LowRankTuning(rank=rank), "")
    trained = [p for p in model.parameters() if p.requires_grad]

    def loss(batch: Batch) -> torch.Tensor:
        # transformers shifts its labels itself, and computes the last place for nothing.
        # Padding stands behind a decoder's rows, where no token looks: as the library's own batches they have no mask.
        return model.loss(batch["labels"][:, 1:].contiguous(), input_ids=batch["input_ids"][:, :-1])

    return stepping(loss, trained)


def theirs(rank: int, folder: Path) -> Step:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    if not folder.exists():
        saving.save(headway.load(smollm2(), dtype="float32"), folder, "hf")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    how = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, how).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    return stepping(lambda batch: model(**batch).loss, trained)


def stepping(loss_of: Callable[[Batch], torch.Tensor], trained: list[torch.nn.Parameter]) -> Step:
    print(f"{sum(p.numel() for p in trained):,} parameters are trained", flush=True)
    moves = torch.optim.AdamW(trained, lr=5e-4, fused=True)

    def step(batch: Batch) -> float:
        loss = loss_of(batch)
        loss.backward()
        moves.step()
        moves.zero_grad()
        return float(loss.detach())

    return step


def text(count: int, length: int) -> Callable[[], Batch]:
    data = as_tensor(wikitext("train")).long() % 49152

    def batch() -> Batch:
        starts = torch.randint(len(data) - length, (count,))
        ids = torch.stack([data[start : start + length] for start in starts.tolist()])
        return {"input_ids": ids, "labels": ids}

    return batch


def rows(count: int) -> Callable[[], Batch]:
    words = headway.load(smollm2()).words
    asked = [(words.encode(f"Question: {row['text']}\nType:"), words.encode(f" {row['label']}")) for row in questions()]

    def batch() -> Batch:
        some = [asked[number] for number in torch.randint(len(asked), (count,)).tolist()]
        longest = max(len(one) + len(other) for one, other in some)
        ids = torch.zeros(count, longest, dtype=torch.long)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for place, (prompt, answer) in enumerate(some):
            end = len(prompt) + len(answer)
            ids[place, :end], mask[place, :end] = torch.tensor(prompt + answer), 1
            labels[place, len(prompt) : end] = torch.tensor(answer)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    return batch


def make(kind: str, rank: int, folder: Path) -> Step:
    return theirs(rank, folder) if kind == "peft" else ours(rank, None if "codes" in kind else "float32")


def ratio(seconds: dict[str, list[float]], kind: str) -> float:
    """Both have the same batch in a round, and batches differ in length."""
    return statistics.median(p / o for p, o in zip(seconds["peft"], seconds[kind], strict=True))


def main() -> None:
    args = options(__doc__ or "", rounds=7, batch=4, length=128, rank=8, data="text", alone="", folder="")
    place = Path(args.folder or tempfile.mkdtemp(prefix="headway-tuning-")) / "hf"
    batch = rows(args.batch * 4) if args.data == "rows" else text(args.batch, args.length)

    if args.alone:
        step = make(args.alone, args.rank, place)
        for _ in range(3):
            step(batch())
        print(peak_bytes())
        return
    steps = {kind: make(kind, args.rank, place) for kind in KINDS}
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for round_ in range(args.rounds + 1):  # the first warms up
        given = batch()
        for kind, step in steps.items():
            began = time.perf_counter()
            loss = step(given)
            if round_:
                seconds[kind].append(time.perf_counter() - began)
            print(f"{kind}: {loss:.4f}", flush=True)
    peaks = {}
    for kind in KINDS:
        words = {"alone": kind, "folder": place.parent, "threads": args.threads, "batch": args.batch}
        words |= {"length": args.length, "rank": args.rank, "data": args.data}
        command = [sys.executable, __file__, *(f"--{name}={value}" for name, value in words.items())]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks[kind] = round(int(done.stdout.split()[-1]) / 1e6)
    middle = {kind: statistics.median(some) for kind, some in seconds.items()}
    spread = {kind: [round(x, 3) for x in (middle[kind], min(some), max(some))] for kind, some in seconds.items()}
    report(
        {
            "benchmark": f"tuning, {args.data}",
            "seconds_per_step": spread,
            "ratio to peft, median of rounds": {kind: round(ratio(seconds, kind), 2) for kind in KINDS},
            "peak, MB": peaks,
        }
    )


if __name__ == "__main__":
    main()
