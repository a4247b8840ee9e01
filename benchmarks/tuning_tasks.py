"""What tuning is worth on real models and data, measured on held-out rows with 95 % intervals.

    python benchmarks/tuning_tasks.py TASK [--steps N] [--rows N] [--threads N] [--folder F]

    trec         SmolLM2-135M in its file's 4 bits: TREC's types of question by prompting, by tuning on the codes, and
                 with `float32` by LoRA and full fine-tuning
    movies       the same of movie sentences, for or against
    minilm       all-MiniLM on movie sentences: LoRA against full fine-tuning, on the same held-out rows
    preferences  SmolLM2-135M learns to prefer praise to blame: pairs of movie sentences, DPO with LoRA on the codes

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "real"))

import numpy as np
import torch
from common import report
from real_data import is_held_out, minilm, smollm2
from task_data import movies, questions

import headway
from headway.assess import How, assess, predicted
from headway.cli.display import Display
from headway.compare import compare
from headway.evaluation.interval import mean_of
from headway.launch import Launch, train
from headway.machine import peak_bytes
from headway.run_config import RunConfig

METHODS = {"codes": ("zero-shot", "few-shot", "prompt", "ia3", "lora"), "float32": ("lora", "full")}


def sides(rows: list[dict[str, Any]], folder: Path, last: int = 0) -> tuple[Path, Path]:
    """Training and held-out rows in files of their own: the `last` rows, or a tenth by the hash of the text."""
    held = [number >= len(rows) - last if last else is_held_out(row["text"]) for number, row in enumerate(rows)]
    paths = folder / "train.jsonl", folder / "test.jsonl"
    known = {row["text"] for row, is_test in zip(rows, held, strict=True) if is_test}
    parts: list[list[dict[str, Any]]] = [[row for row in rows if row["text"] not in known], []]
    parts[1] = [row for row, is_test in zip(rows, held, strict=True) if is_test]
    for path, part in zip(paths, parts, strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in part))
    return paths


def prompted(rows: list[dict[str, Any]], args: argparse.Namespace, last: int = 0) -> dict[str, Any]:
    """Prompting and every method, on the file's codes and on float32."""
    path, test = sides(rows, args.folder, last)
    run = RunConfig(data={"path": str(path), "valid_path": str(test)})
    words = [f"train.steps={args.steps}", "train.batch_size=16", f"train.threads={args.threads}", "train.eval_rows=256"]
    out: dict[str, Any] = {}
    for form, methods in METHODS.items():
        place = args.folder / form
        place.mkdir(exist_ok=True)
        more = [] if form == "codes" else ["tuning.base_dtype=float32"]
        found = compare(
            str(smollm2()), run, [*words, *more], place, methods, args.rows, lambda text: print(text, flush=True)
        )
        out[form] = [asdict(row) for row in found]
        for row in out[form]:
            print(form, row, flush=True)
    return out


def trec(args: argparse.Namespace) -> dict[str, Any]:
    names = {
        "ABBR": "abbreviation",
        "DESC": "description",
        "ENTY": "thing",
        "HUM": "person",
        "LOC": "place",
        "NUM": "number",
    }
    rows = [{"text": row["text"], "label": names.get(row["label"], row["label"])} for row in questions()]
    return prompted(rows, args, 500)


def for_or_against(args: argparse.Namespace) -> dict[str, Any]:
    return prompted(opinions(), args)


def opinions() -> list[dict[str, Any]]:
    names = {"positive": "praise", "negative": "blame"}
    return [{"text": row["text"], "label": names.get(row["label"], row["label"])} for row in movies()]


def low_rank_or_all(args: argparse.Namespace) -> dict[str, Any]:
    """all-MiniLM, the same rows and epochs; of the same held-out rows the difference has an interval of its own."""
    path, test = sides(movies(), args.folder)
    right, out = {}, {}
    for name, tuning in (("full", None), ("lora", {"rank": 8})):
        began = time.perf_counter()
        run = {
            "base": str(minilm()), "tuning": tuning, "data": {"path": str(path)}, "output": str(args.folder / name),
            "train": {"epochs": 3.0, "threads": args.threads, "batch_size": 32},
        }  # fmt: skip
        with Display() as display:
            done = train(run, Launch(overwrite=True), display)
        loaded = headway.load(done.folder)
        seconds = time.perf_counter() - began
        found, true = predicted(loaded, str(test), How()).data[:2]
        right[name] = np.asarray(found) == np.asarray(true)
        [measured] = assess(loaded, str(test), ("accuracy",))
        out[name] = {"accuracy": measured.interval._asdict(), "trained": done.trained, "seconds": seconds}
        print(name, out[name], flush=True)
    gain = right["lora"].astype(float) - right["full"].astype(float)
    return {**out, "lora over full": mean_of("gain", "gain|units:examples", gain, 0).interval._asdict()}


def preferences(args: argparse.Namespace) -> dict[str, Any]:
    """A sentence of praise before one of blame of about its length, behind one prompt."""
    by_label: dict[str, list[str]] = {"praise": [], "blame": []}
    for row in opinions():
        by_label[row["label"]].append(row["text"].strip())
    pairs: dict[bool, list[dict[str, str]]] = {False: [], True: []}
    for held in pairs:
        chosen, rejected = (
            sorted((t for t in by_label[n] if is_held_out(t) == held), key=len) for n in ("praise", "blame")
        )
        for one, other in zip(chosen, rejected, strict=False):
            pairs[held].append({"prompt": "A sentence about a movie:", "chosen": f" {one}", "rejected": f" {other}"})
    paths = {held: args.folder / f"pairs-{held}.jsonl" for held in pairs}
    for held, rows in pairs.items():
        paths[held].write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = {
        "base": str(smollm2()), "tuning": {"rank": 8}, "output": str(args.folder / "run"),
        "data": {"path": str(paths[False]), "valid_path": str(paths[True]), "context": 64},
        "train": {"steps": args.steps, "batch_size": 8, "threads": args.threads, "eval_rows": args.rows,
                  "eval_every": max(args.steps // 4, 1), "sample_tokens": 0},
    }  # fmt: skip
    how = How(limit=args.rows)
    [before] = assess(headway.load(smollm2()), str(paths[True]), how=how)
    began = time.perf_counter()
    with Display() as display:
        done = train(run, Launch(overwrite=True), display)
    seconds = time.perf_counter() - began
    [after] = assess(headway.load(done.folder), str(paths[True]), how=how)
    assert done.result is not None and done.result.evaluation is not None
    return {
        "pairs": [len(pairs[False]), len(pairs[True])],
        "likelier, before": before.interval._asdict(),
        "implied reward, after": after.interval._asdict(),
        "rewards": done.result.evaluation.rewards,
        "loss": done.result.evaluation.loss,
        "seconds": seconds,
        "trained": done.trained,
        "peak, MB": round(peak_bytes() / 1e6),
    }


TASKS = {"trec": trec, "movies": for_or_against, "minilm": low_rank_or_all, "preferences": preferences}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=list(TASKS))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=Path, default=None)
    args = parser.parse_args()
    args.folder = args.folder or Path(tempfile.mkdtemp(prefix="headway-tuning-"))
    args.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    report({"benchmark": f"tuning tasks: {args.task}", "steps": args.steps, **TASKS[args.task](args)})


if __name__ == "__main__":
    main()
