"""A step of LoRA on SmolLM2-135M beside peft + transformers: the same weights, data, ranks and layers, in turn.

    python benchmarks/tuning.py [--rounds 7] [--batch 4] [--length 128] [--rank 8]

Both train adapters on every linear layer inside the blocks, in float32 with AdamW; ours also on the file's own codes
(QLoRA). Peaks are of processes of their own (VmHWM). The last line is JSON.
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

import headway
from headway import saving
from headway.machine import peak_bytes
from headway.tuning.tuned import tuned
from headway.tuning_config import LowRankTuning

Step = Callable[[torch.Tensor], float]
KINDS = ("headway", "headway, codes", "peft")


def ours(rank: int, dtype: str | None) -> Step:
    base = headway.load(smollm2(), dtype=dtype)
    model = tuned(base.model.float(), base.config, LowRankTuning(rank=rank), "")
    trained = [p for p in model.parameters() if p.requires_grad]
    # transformers shifts its labels itself, and computes the last place for nothing.
    return stepping(lambda ids: model.loss(ids[:, 1:].contiguous(), input_ids=ids[:, :-1]), trained)


def theirs(rank: int, folder: Path) -> Step:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    if not folder.exists():
        saving.save(headway.load(smollm2(), dtype="float32"), folder, "hf")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    how = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, how).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    return stepping(lambda ids: model(input_ids=ids, labels=ids).loss, trained)


def stepping(loss_of: Callable[[torch.Tensor], torch.Tensor], trained: list[torch.nn.Parameter]) -> Step:
    print(f"{sum(p.numel() for p in trained):,} parameters are trained", flush=True)
    moves = torch.optim.AdamW(trained, lr=5e-4, fused=True)

    def step(ids: torch.Tensor) -> float:
        loss = loss_of(ids)
        loss.backward()
        moves.step()
        moves.zero_grad()
        return float(loss.detach())

    return step


def make(kind: str, rank: int, folder: Path) -> Step:
    return theirs(rank, folder) if kind == "peft" else ours(rank, None if "codes" in kind else "float32")


def main() -> None:
    args = options(__doc__ or "", rounds=7, batch=4, length=128, rank=8, alone="", folder="")
    data = as_tensor(wikitext("train")).long() % 49152
    place = Path(args.folder or tempfile.mkdtemp(prefix="headway-tuning-")) / "hf"

    def batch() -> torch.Tensor:
        starts = torch.randint(len(data) - args.length, (args.batch,))
        return torch.stack([data[start : start + args.length] for start in starts.tolist()])

    if args.alone:
        step = make(args.alone, args.rank, place)
        for _ in range(3):
            step(batch())
        print(peak_bytes())
        return
    steps = {kind: make(kind, args.rank, place) for kind in KINDS}
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for round_ in range(args.rounds + 1):  # the first warms up
        ids = batch()
        for kind, step in steps.items():
            began = time.perf_counter()
            loss = step(ids)
            if round_:
                seconds[kind].append(time.perf_counter() - began)
            print(f"{kind}: {loss:.4f}", flush=True)
    peaks = {}
    for kind in KINDS:
        words = {"alone": kind, "folder": place.parent, "threads": args.threads, "batch": args.batch}
        words |= {"length": args.length, "rank": args.rank}
        command = [sys.executable, __file__, *(f"--{name}={value}" for name, value in words.items())]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks[kind] = round(int(done.stdout.split()[-1]) / 1e6)
    middle = {kind: statistics.median(some) for kind, some in seconds.items()}
    spread = {kind: [round(x, 3) for x in (middle[kind], min(some), max(some))] for kind, some in seconds.items()}
    report(
        {
            "benchmark": "tuning",
            "seconds_per_step": spread,
            "ratio to peft": {kind: round(middle["peft"] / middle[kind], 2) for kind in KINDS},
            "peak, MB": peaks,
        }
    )


if __name__ == "__main__":
    main()
