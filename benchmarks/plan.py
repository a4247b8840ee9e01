"""How far `headway plan` is from what is then measured: peak memory and seconds a step, for every kind of model, and
for SmolLM2 in its file's codes with adapters.

    python benchmarks/plan.py [--steps 30] [--threads N]

Each prediction and each run has a process of its own on the same machine, one after the other. The last line is JSON.
"""

from __future__ import annotations

import json
import random
import statistics
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "real"))

import numpy as np
from common import options, report, wikitext
from real_data import smollm2

CHILD = """
import json, resource, sys
from headway.cli.main import main
code = main(sys.argv[1:])
print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))
sys.exit(code)
"""


def files(place: Path) -> dict[str, list[str]]:
    """Data for each kind, and what is asked of it."""
    text = wikitext("train").decode()[:3_000_000]
    (place / "text.txt").write_text(text)
    rng = random.Random(0)
    words = text.split()
    rows = [
        {"source": " ".join(rng.choices(words, k=24)), "target": " ".join(rng.choices(words, k=24))}
        for _ in range(3000)
    ]
    (place / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    images = place / "images"
    images.mkdir()
    for side, count in (("train", 2000), ("t10k", 100)):
        generator = np.random.default_rng(0)
        for name, array in (
            ("images-idx3-ubyte", generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)),
            ("labels-idx1-ubyte", generator.integers(0, 10, count, dtype=np.uint8)),
        ):
            head = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            (images / f"{side}-{name}").write_bytes(head + array.tobytes())
    some = ["model.depth=4", "train.batch_size=32"]
    return {
        "decoder": [f"data.path={place}/text.txt", "data.context=256", "tokenizer.vocab_size=4096", *some],
        "encoder": [f"data.path={place}/text.txt", "data.context=256", "objective=masked-lm", *some],
        "encoder-decoder": [f"data.path={place}/pairs.jsonl", "tokenizer.vocab_size=4096", *some],
        "vision": [f"data.path={place}/images", *some],
        "adapters": [f"data.path={place}/pairs.jsonl", f"base={smollm2()}", "tuning.type=lora", "train.accumulation=4"],
    }


def called(arguments: list[str]) -> tuple[dict, int]:
    """The JSON of a verb, and the peak of its process in bytes."""
    said = subprocess.run([sys.executable, "-c", CHILD, *arguments], check=True, capture_output=True, text=True).stdout
    first, peak = said.strip().splitlines()[-2:]
    return json.loads(first), int(peak)


def main() -> None:
    args = options(__doc__ or "", steps=30)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind, keys in files(Path(folder)).items():
            keys = [*keys, "train.eval_every=100000", f"train.steps={args.steps}", "--threads", str(args.threads)]
            plan, _ = called(["plan", *keys, "--json"])
            run = f"{folder}/run-{kind}"
            _, peak = called(["train", *keys, "--output", run, "--json"])
            events = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
            # Steps are timed by the line's own clock where it has one, else by the rate it prints.
            steps = [event for event in events if event["event"] == "step"][3:]
            seconds = statistics.median(event["tokens"] / event["tokens_per_second"] for event in steps)
            found[kind] = {
                "peak_mb": [round(plan["peak_bytes"] / 1e6), round(peak / 1e6)],
                "peak_ratio": round(plan["peak_bytes"] / peak, 3),
                "seconds_per_step": [round(plan["seconds_per_step"], 4), round(seconds, 4)],
                "time_ratio": round(plan["seconds_per_step"] / seconds, 3),
            }
            print(kind, found[kind], flush=True)
    report({"benchmark": "plan", "kinds": found})


if __name__ == "__main__":
    main()
