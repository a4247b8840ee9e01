"""What going on costs: `headway train --resume` up to its first new step, against drawing all earlier batches again.

    python benchmarks/resume.py [--runs 5] [--threads 1]

WikiText-2 bytes in 12 windows of 64, a model of one layer of 16 (so that what is timed is the way to the step, not the
step), really trained to 200, 2,000 and 20,000 batches. Resuming: the whole command in a new process, imports, data and
weights included, until it tells of its first new step; there it is cut off, so that the checkpoint stays as it was and
the next run finds the same. Drawing again: the run's own batches from 0 on, in a process that stands already, which a
loop that keeps no data state would pay on top of the same resume; one that can skip the numbers of its samples without
making the batches pays less. CPU seconds stand beside, since on a shared machine they move less. The last line is JSON.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import options, report, wikitext

from headway.checkpoints.folder import CONFIG
from headway.launch import Launch, train
from headway.run_config import load_run
from headway.training.objectives import BatchSource

BATCHES = (200, 2_000, 20_000)
# The command as it is, but for its end.
RESUME = """
import os, sys
from headway.cli import display, main
from headway.training.events import StepEvent
show = display.Display.__call__
def until_a_step(self, event):
    show(self, event)
    if isinstance(event, StepEvent):
        os._exit(event.step - int(sys.argv.pop()) - 1)  # 0: the step after the last one saved
display.Display.__call__ = until_a_step
main.main(sys.argv[1:-1])
sys.exit("no step was made")
"""


def stopped_runs(place: Path, threads: int) -> dict[int, Path]:
    """A folder for each number of batches: one run, copied whenever it has come so far."""
    text = place / "wikitext.txt"
    text.write_bytes(wikitext("train"))
    run: dict[str, Any] = {
        "model": {"d_model": 16, "n_layers": 1, "n_heads": 2},
        "data": {"path": str(text), "context": 64},
        "tokenizer": {"kind": "byte"},
        "train": {"batch_size": 12, "schedule": "constant", "warmup": 0, "threads": threads, "sample_tokens": 0},
        "output": str(place / "run"),
    }
    stopped = {}
    for count in BATCHES:
        run["train"]["steps"] = count
        train(run, Launch("auto", override=True))
        stopped[count] = Path(shutil.copytree(place / "run", place / f"run-{count}"))
        print(f"trained to step {count:,}", flush=True)
    return stopped


def resumed(run: Path, count: int) -> tuple[float, float]:
    """Seconds, and those of CPU, from the command's start to its first new step."""
    words = ["train", "--resume", str(run), f"train.steps={count + 1}", "--override"]
    began, before = time.perf_counter(), os.times()
    subprocess.run([sys.executable, "-c", RESUME, *words, str(count)], check=True, capture_output=True)
    after = os.times()
    cpu = after.children_user - before.children_user + after.children_system - before.children_system
    return time.perf_counter() - began, cpu


def fresh_source(run: Path) -> BatchSource:
    """The batches of a stopped run, with nothing kept from earlier ones."""
    config = load_run([run / CONFIG], [f"output={run}"], {}).run
    plan = train(config, Launch("must", dry_run=True)).plan
    return plan.material.source(plan.model, plan.run)


def drawn(source: BatchSource, cursors: range) -> tuple[float, float]:
    """Seconds, and those of CPU, of making these batches."""
    began, before = time.perf_counter(), time.process_time()
    for cursor in cursors:
        source.batch(cursor)
    return time.perf_counter() - began, time.process_time() - before


def middle(times: list[tuple[float, float]]) -> dict[str, object]:
    """Medians, and the smallest and largest wall time."""
    wall, cpu = zip(*times, strict=True)
    spread = [round(min(wall), 3), round(max(wall), 3)]
    return {"wall": round(statistics.median(wall), 3), "cpu": round(statistics.median(cpu), 3), "wall_spread": spread}


def main() -> None:
    args = options(__doc__ or "", runs=5)
    names = ("resume", "draw_again", "next_batch_alone")
    times: dict[str, dict[int, list[tuple[float, float]]]] = {name: {n: [] for n in BATCHES} for name in names}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HEADWAY_CACHE"] = str(Path(folder) / "cache")
        stopped = stopped_runs(Path(folder), args.threads)
        resumed(stopped[BATCHES[0]], BATCHES[0])  # the first one compiles Python's files
        for _ in range(args.runs):  # interleaved
            for count, run in stopped.items():
                times["resume"][count].append(resumed(run, count))
                times["draw_again"][count].append(drawn(fresh_source(run), range(count)))
                times["next_batch_alone"][count].append(drawn(fresh_source(run), range(count, count + 1)))
                print(
                    f"step {count:,}: {', '.join(f'{n} {t[count][-1][0]:.2f} s' for n, t in times.items())}", flush=True
                )
    seconds = {name: {count: middle(some) for count, some in rows.items()} for name, rows in times.items()}
    report({"benchmark": "resume", "batch": "12 x 64 bytes", "runs": args.runs, "seconds": seconds})


if __name__ == "__main__":
    main()
