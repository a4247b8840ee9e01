"""Was it worth it? Prompting against tuning on the same held-out rows (`headway tune MODEL --compare prompting`).

    zero-shot   the classes' names, the text, and where its class stands
    few-shot    before them the training rows most like the text, with their classes
    prompt, lora, full, ...   the zero-shot prompt, after tuning by that method (tuning_config.py)

The answer of each is the class whose name is likeliest behind the prompt. Each tuned model is trained in a process of
its own, so its peak of memory is its own; what is done already is not done again.
"""

from __future__ import annotations

import hashlib
import math
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headway import files, loading, machine
from headway.data.encode import beginning
from headway.data.forms import Labelled, examples, split
from headway.data.rows import find_tables, read_rows
from headway.data.sources import ReadReport
from headway.errors import ConfigError, InputError, WorkerError
from headway.evaluation.interval import mean_of
from headway.evaluation.metrics import accuracy
from headway.material import read_options
from headway.nn import Transformer
from headway.run_config import RunConfig
from headway.strict import dump_json, strict_json
from headway.text import Tokenizer
from headway.tuning_config import METHODS

PROMPTED = ("zero-shot", "few-shot")
TUNED = tuple(METHODS)
DEFAULT = (*PROMPTED, "prompt", "lora", "full")
SHOTS = 8
Say = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """What one method came to.

    Attributes:
        value, low, high: accuracy and its interval. nats, nats_low, nats_high: the right class's surprise and its
            interval. answers: held-out rows. trained: parameters.
        peak: bytes of the process that trained, None where none did. seconds: of training. per_answer: seconds of one.
    """

    method: str
    value: float
    low: float | None
    high: float | None
    nats: float
    nats_low: float | None
    nats_high: float | None
    answers: int
    trained: int
    peak: int | None
    seconds: float
    per_answer: float


class Task:
    """Texts with a class each: both sides, the classes, and how they are put to a model."""

    def __init__(self, train: Sequence[Labelled], held: Sequence[Labelled]) -> None:
        self.train, self.held = train, held
        self.names = sorted({str(row.label) for row in (*train, *held)})
        self._like = Likeness([row.text for row in train])

    def zero_shot(self, row: Labelled) -> str:
        """The classes, the text and the place of the answer, which begins with a space."""
        return f"Classes: {', '.join(self.names)}.\n\nText: {_flat(row)}\nClass:"

    def few_shot(self, row: Labelled, shots: int = SHOTS) -> str:
        """The rows most like it before it, the nearest last."""
        near = [self.train[place] for place in self._like.nearest(row.text, shots)]
        shown = "".join(f"Text: {_flat(one)}\nClass: {one.label}\n\n" for one in reversed(near))
        return f"Classes: {', '.join(self.names)}.\n\n{shown}Text: {_flat(row)}\nClass:"


def _flat(row: Labelled) -> str:
    return " ".join(" ".join(row.texts()).split())


class Likeness:
    """Which of some texts share the rarest words with another: cosine of vectors of inverse document frequencies."""

    def __init__(self, texts: Sequence[str]) -> None:
        bags = [set(_words(text)) for text in texts]
        counts = Counter(word for bag in bags for word in bag)
        self._weight = {word: math.log(1 + len(texts) / count) for word, count in counts.items()}
        places: dict[str, list[int]] = {}
        for number, bag in enumerate(bags):
            for word in bag:
                places.setdefault(word, []).append(number)
        self._places = {word: np.array(some) for word, some in places.items()}
        self._lengths = np.sqrt([sum(self._weight[word] ** 2 for word in bag) or 1.0 for bag in bags])

    def nearest(self, text: str, count: int) -> list[int]:
        """The numbers of the nearest texts, the nearest first."""
        scores = np.zeros(len(self._lengths))
        for word in set(_words(text)):
            if word in self._places:
                scores[self._places[word]] += self._weight[word] ** 2
        order = np.argsort(-scores / self._lengths, kind="stable")
        return [int(number) for number in order[:count]]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def read_task(run: RunConfig, limit: int) -> Task:
    """The rows of a run's data, `limit` of the held-out ones. Raises InputError for rows of another form."""
    d, report = run.data, ReadReport()
    if d.path is None:
        raise ConfigError("data.path", "missing", "rows with a text and a class", "data.path=FILE")

    def read(path: str) -> list[Any]:
        tables = find_tables(path, read_options(d), report)
        return list(examples(row for file in tables for row in read_rows(file, read_options(d), report, d.columns)))

    everything = read(d.path), read(d.valid_path) if d.valid_path else []
    if not everything[1]:
        everything = split(everything[0], d.val_fraction)
    train, held = (
        [row for row in side if isinstance(row, Labelled) and isinstance(row.label, str)] for side in everything
    )
    if len(train) + len(held) < sum(map(len, everything)):
        kinds = ", ".join(sorted({type(row).__name__ for side in everything for row in side}))
        found = f"rows of the form {kinds}, not all with one class"
        raise InputError(d.path, found, "a text with one class in each", "--compare prompting is for classes")
    if not train or not held:
        raise InputError(d.path, f"{len(train)} rows to train on, {len(held)} held out", "rows on both sides")
    count = min(limit, len(held))
    return Task(train, [held[place * len(held) // count] for place in range(count)])


@torch.inference_mode()
def likelihoods(model: Transformer, prompt: Sequence[int], names: Sequence[Sequence[int]]) -> Tensor:
    """log p of some continuations of a prompt, of one token at least, by a decoder; (number of names,)."""
    longest, count = max(map(len, names)), len(names)
    cache = model.new_cache(1, len(prompt) + longest)
    first = torch.log_softmax(model(torch.tensor([prompt]), cache=cache).logits[0, -1].float(), -1)
    found = first[[name[0] for name in names]]
    if longest > 1:
        cache.reorder(torch.zeros(count, dtype=torch.long))
        table = torch.tensor([[*name, *[name[-1]] * (longest - len(name))] for name in names])
        said = torch.log_softmax(model(table[:, :-1], cache=cache).logits.float(), -1)
        each = said.gather(2, table[:, 1:, None])[..., 0]
        sizes = torch.tensor([len(name) for name in names])
        found = found + each.masked_fill(torch.arange(1, longest)[None] >= sizes[:, None], 0.0).sum(1)
    return found


def answered(
    model: Transformer, words: Tokenizer, task: Task, prompt: Callable[[Labelled], str], progress: Callable[[int], None]
) -> Tensor:
    """log p of each class behind each held-out row's prompt, (rows, classes)."""
    names = [words.encode(f" {name}") for name in task.names]
    room = model.config.max_len - max(map(len, names))
    found = []
    for number, row in enumerate(task.held):
        # As rows are encoded for training (data/encode.py): the beginning is cut, never the question.
        ids = words.encode(prompt(row))
        found.append(likelihoods(model, [*beginning(words), *ids][-room:], names))
        progress(number + 1)
    return torch.stack(found)


def compare(
    base: str, run: RunConfig, words: Sequence[str], place: Path, methods: Sequence[str], limit: int, say: Say
) -> list[Row]:
    """Every method on one task, in turn.

    Args:
        base: the model. run: where the data are. words: overrides for the runs that tune. place: a folder for them.
        methods: names among PROMPTED and TUNED. limit: held-out rows that are asked.

    Raises ConfigError for another name or a model that writes no text, InputError for other rows, WorkerError for a run
    that failed.
    """
    for method in methods:
        if method not in (*PROMPTED, *TUNED):
            raise ConfigError("--methods", repr(method)[:40], ", ".join((*PROMPTED, *TUNED)))
    task = read_task(run, limit)
    loaded = loading.load_base(base, "stored")
    if loaded.config.kind != "decoder" or loaded.config.head.type != "causal-lm":
        other = f"{base} is of kind {loaded.config.kind} with head {loaded.config.head.type}"
        raise ConfigError("--compare prompting", other, "a decoder that writes text")
    sides = {"train": task.train, "valid": task.held}
    for side, rows in sides.items():
        lines = [dump_json({"prompt": task.zero_shot(row), "completion": f" {row.label}"}) for row in rows]
        files.atomic_write(place / f"{side}.jsonl", "".join(f"{line}\n" for line in lines).encode())
    data = hashlib.sha256(b"".join((place / f"{side}.jsonl").read_bytes() for side in sides)).hexdigest()
    found: list[Row] = []
    for method in methods:
        made_of = {"method": method, "base": loaded.weights_sha256, "words": [*words], "data": data, "shots": SHOTS}
        kept = place / f"{method}.json"
        row = _kept(kept, made_of)
        if row is None:
            row = _measured(method, loaded, base, words, place, task, say)
            files.atomic_write(kept, dump_json({"made_of": made_of, "row": asdict(row)}).encode())
        found.append(row)
    return found


def _kept(path: Path, made_of: Mapping[str, object]) -> Row | None:
    if not path.is_file():
        return None
    said = strict_json(files.read_bytes(path, 1 << 20), str(path))
    return Row(**said["row"]) if isinstance(said, dict) and said.get("made_of") == made_of else None


def _measured(
    method: str, loaded: loading.Loaded, base: str, words: Sequence[str], place: Path, task: Task, say: Say
) -> Row:
    trained, peak, seconds = 0, None, 0.0
    if method in TUNED:
        done = _tune(method, base, words, place, say)
        trained, peak, seconds = done["trained"], done["peak_bytes"], done["seconds"]
        loaded = loading.load(place / method)
    prompt = task.few_shot if method == "few-shot" else task.zero_shot
    began = time.perf_counter()
    every = max(len(task.held) // 4, 1)

    def progress(done: int) -> None:
        if done % every == 0:
            say(f"{method}: {done} of {len(task.held)} answered")

    scores = answered(loaded.model, loaded.words, task, prompt, progress)
    each = (time.perf_counter() - began) / len(task.held)
    true = torch.tensor([task.names.index(str(row.label)) for row in task.held])
    right = accuracy(scores.argmax(1), true).interval
    nats = mean_of("nats", "nats|units:examples", -scores.gather(1, true[:, None])[:, 0].double().numpy(), 0).interval
    figures = (right.value, right.low, right.high, nats.value, nats.low, nats.high)
    return Row(method, *figures, len(task.held), trained, peak, seconds, each)


def _tune(method: str, base: str, words: Sequence[str], place: Path, say: Say) -> dict[str, Any]:
    say(f"{method}: tuning")
    known = tuple(f"tuning.{name}" for name in METHODS[method].model_fields)
    fitting = [word for word in words if not word.startswith("tuning.") or word.startswith(known)]
    command = [sys.executable, "-m", "headway", "tune", base, f"tuning.type={method}", *fitting, "--json"]
    command += [f"data.path={dump_json(str(place / 'train.jsonl'))}", "objective=causal-lm", "train.sample_tokens=0"]
    command += [
        f"data.valid_path={dump_json(str(place / 'valid.jsonl'))}",
        "--output",
        str(place / method),
        "--overwrite",
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise WorkerError(method, f"its run ended with {done.returncode}", "a run that ends", "see its message above")
    said = strict_json(done.stdout.encode(), method)
    assert isinstance(said, dict)
    return said


def machine_line() -> str:
    """What the figures belong to."""
    return f"{machine.cpu_name()}, {machine.cores()} cores"
