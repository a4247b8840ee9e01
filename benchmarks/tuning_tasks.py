"""What tuning is worth on real models and data, measured on held-out rows with 95 % intervals.

    python benchmarks/tuning_tasks.py TASK [--steps N] [--rows N] [--bases B ...] [--threads N] [--folder F]

    trec         SmolLM2-135M in its file's 4 bits: TREC's types of question by prompting, by tuning on the codes, and
                 with `float32` by LoRA and full fine-tuning
    movies       the same of movie sentences, for or against
    minilm       all-MiniLM on movie sentences: LoRA against full fine-tuning, on the same held-out rows
    vision       a small ViT that knows clothes (Fashion-MNIST) learns digits (scikit-learn's), by LoRA and whole
    pair         a small translator of Tatoeba's short sentences learns its long ones, by LoRA and whole
    preferences  SmolLM2-135M learns to prefer praise to blame: pairs of movie sentences, DPO with LoRA on the codes

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
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
from task_data import movies, questions, tatoeba

import headway
from headway.assess import How, assess, predicted
from headway.cli.display import Display
from headway.compare import compare
from headway.evaluation.interval import mean_of
from headway.launch import Launch, train
from headway.machine import peak_bytes
from headway.run_config import RunConfig

# Form of the base, method, and what its run is told: full fine-tuning learns at a rate of its own.
ASKED: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("stored", "zero-shot", ()),
    ("stored", "few-shot", ()),
    ("stored", "lora", ("tuning.rank=4", "train.lr=0.002", "train.accumulation=2")),
    ("float32", "lora", ("tuning.rank=4", "train.lr=0.002", "train.accumulation=2")),
    ("float32", "full", ("train.lr=0.0001", "train.accumulation=2")),
)

TYPES = ("description", "thing", "abbreviation", "person", "number", "place")
"""TREC's coarse types by their numbers in the file."""


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
    """Prompting, LoRA on the file's codes and on float32, full fine-tuning: each on the same rows and steps."""
    path, test = sides(rows, args.folder, last)
    run = RunConfig(data={"path": str(path), "valid_path": str(test)})
    common = ("train.batch_size=8", f"train.steps={args.steps}", f"train.eval_every={args.steps}")
    common += ("train.eval_rows=64", f"train.threads={args.threads}")
    out: list[dict[str, Any]] = []
    for form, method, more in [asked for asked in ASKED if asked[0] in args.bases]:
        place = args.folder / form
        place.mkdir(exist_ok=True)
        words = [*common, *more, *([f"tuning.base_dtype={form}"] if method == "lora" else [])]
        [row] = compare(str(smollm2()), run, words, place, [method], args.rows, lambda text: print(text, flush=True))
        out.append({"base": form, **asdict(row)})
        print(out[-1], flush=True)
    return {"rows": out}


def trec(args: argparse.Namespace) -> dict[str, Any]:
    rows = [{"text": row["text"], "label": TYPES[int(row["label"])]} for row in questions()]
    return prompted(rows, args, 500)


def for_or_against(args: argparse.Namespace) -> dict[str, Any]:
    return prompted(opinions(), args)


def opinions() -> list[dict[str, Any]]:
    names = {"positive": "praise", "negative": "blame"}
    return [{"text": row["text"], "label": names.get(row["label"], row["label"])} for row in movies()]


def fit(folder: Path, **fields: Any) -> tuple[headway.Loaded, int, float]:
    """A trained model, the parameters that learned, the seconds."""
    began = time.perf_counter()
    with Display() as display:
        done = train({**fields, "output": str(folder)}, Launch(overwrite=True), display)
    return headway.load(done.folder), done.trained, time.perf_counter() - began


def both(args: argparse.Namespace, base: str, test: str, data: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """LoRA and full fine-tuning with the same rows and steps, each at a rate of its own.

    On the same held-out rows their difference has an interval of its own.
    """
    right, out = {}, {}
    for name, tuning in (("full", None), ("lora", {"rank": 8})):
        more = {"threads": args.threads, **fields.get("train", {}), **fields.get(name, {})}
        loaded, trained, seconds = fit(args.folder / name, base=base, tuning=tuning, data=data, train=more)
        found, true = predicted(loaded, test, How()).data[:2]
        right[name] = np.asarray(found) == np.asarray(true)
        [measured] = assess(loaded, test, ("accuracy",))
        out[name] = {"accuracy": measured.interval._asdict(), "trained": trained, "seconds": seconds}
        print(name, out[name], flush=True)
    gain = right["lora"].astype(float) - right["full"].astype(float)
    return {**out, "lora over full": mean_of("gain", "gain|units:examples", gain, 0).interval._asdict()}


def low_rank_or_all(args: argparse.Namespace) -> dict[str, Any]:
    path, test = sides(movies(), args.folder)
    return both(args, str(minilm()), str(test), {"path": str(path)}, train={"epochs": 3.0, "batch_size": 32})


def vision(args: argparse.Namespace) -> dict[str, Any]:
    from packages import debian
    from sklearn.datasets import load_digits

    place = debian("dataset-fashion-mnist", "usr/share/datasets/fashion-mnist")
    how = {"type": "image-classification", "shift": 0, "flip": False}
    shape = {"model": {"depth": 2}, "objective": how, "data": {"path": str(place), "patch": 7}}
    base, _, seconds = fit(args.folder / "clothes", **shape, budget="3m", train={"lr": 0.01, "threads": args.threads})
    [known] = assess(base, str(place), ("accuracy",), How(rows=256))
    digits = load_digits()
    images = np.pad(np.kron(digits.images, np.ones((3, 3))) * 15.9, ((0, 0), (2, 2), (2, 2))).astype(np.uint8)
    folder = args.folder / "digits"
    folder.mkdir(exist_ok=True)
    for name, part in (("train", slice(0, 1300)), ("t10k", slice(1300, None))):
        for kind, values in (
            ("images-idx3-ubyte", images[part]),
            ("labels-idx1-ubyte", digits.target[part].astype(np.uint8)),
        ):
            header = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
            (folder / f"{name}-{kind}").write_bytes(header + values.tobytes())
    tuned = both(
        args, str(args.folder / "clothes"), str(folder), {"path": str(folder), "patch": 7},
        train={"epochs": 30.0, "batch_size": 32}, full={"lr": 1e-3}, lora={"lr": 5e-3},
    )  # fmt: skip
    return {"clothes": {"accuracy": known.interval._asdict(), "seconds": seconds}, **tuned}


def pair(args: argparse.Namespace) -> dict[str, Any]:
    """Of the long sentences the base has never seen one; BLEU of both and of the base on 300 held out."""
    rows = [{"text": row["source"], **row} for row in tatoeba()]
    files: dict[str, tuple[Path, Path]] = {}
    for name, some in (
        ("short", [r for r in rows if len(r["source"]) < 30]),
        ("long", [r for r in rows if len(r["source"]) >= 45]),
    ):
        (args.folder / name).mkdir(exist_ok=True)
        files[name] = sides([{key: r[key] for key in ("text", "source", "target")} for r in some], args.folder / name)
        for path in files[name]:
            kept = [json.loads(line) for line in path.read_text().splitlines()]
            path.write_text("".join(json.dumps({k: r[k] for k in ("source", "target")}) + "\n" for r in kept))
    common = {"threads": args.threads, "batch_size": 64}
    words = {"kind": "bpe", "vocab_size": 4096}
    data: dict[str, Any] = {"path": str(files["short"][0]), "val_fraction": 0.01}
    sizes = {"depth": 3, "max_len": 128}
    place = args.folder / "base"
    base, _, seconds = fit(place, model=sizes, budget="4m", tokenizer=words, data=data, train=common)
    how = How(limit=300, max_tokens=64, rows=64)

    def figures(loaded: headway.Loaded) -> dict[str, Any]:
        return {one.name: one.interval._asdict() for one in assess(loaded, str(files["long"][1]), how=how)}

    out: dict[str, Any] = {"base": {**figures(base), "seconds": seconds}}
    for name, tuning, lr in (("full", None, 1e-3), ("lora", {"rank": 16}, 5e-3)):
        more = {**common, "steps": 150, "lr": lr}
        data = {"path": str(files["long"][0]), "val_fraction": 0.01}
        loaded, trained, spent = fit(
            args.folder / name, base=str(args.folder / "base"), tuning=tuning, data=data, train=more
        )
        out[name] = {**figures(loaded), "trained": trained, "seconds": spent}
        print(name, out[name], flush=True)
    return out


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
    most = {False: 16 * args.steps, True: args.rows}  # two passes; the reference reads every pair once
    for held in pairs:
        pairs[held] = pairs[held][:: max(len(pairs[held]) // most[held], 1)][: most[held]]
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
TASKS |= {"vision": vision, "pair": pair}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=list(TASKS))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--bases", nargs="+", choices=["stored", "float32"], default=["stored", "float32"])
    parser.add_argument("--folder", type=Path, default=None)
    args = parser.parse_args()
    args.folder = args.folder or Path(tempfile.mkdtemp(prefix="headway-tuning-"))
    args.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    report({"benchmark": f"tuning tasks: {args.task}", "steps": args.steps, **TASKS[args.task](args)})


if __name__ == "__main__":
    main()
