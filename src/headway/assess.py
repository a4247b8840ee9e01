"""A trained model measured on labelled data: rows, images or recordings -> predictions -> metrics with intervals.

What is measured follows from the model's head and the rows' form: classes, tags, answers, translations, neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from headway import loading
from headway.data.encode import Coder, Losses, filler
from headway.data.examples import Examples, encode_all, gather
from headway.data.forms import Example, Labelled, Pair, Preference, Question, Tagged, examples
from headway.data.images import held_out_images
from headway.data.recordings import held_out_recordings
from headway.data.rows import find_tables, is_table, read_rows
from headway.data.sources import ReadOptions, ReadReport, is_rows
from headway.errors import ConfigError, InputError
from headway.evaluation.embed import embed
from headway.evaluation.interval import Measured
from headway.evaluation.metrics import METRICS, measure
from headway.evaluation.predict import answers, in_order, outputs, ranks_of
from headway.run_config import AudioClassification, ImageClassification
from headway.training.pictures import ImageBatches, SignalBatches
from headway.training.recordings import RecordingBatches
from headway.training.references import log_likelihoods
from headway.training.tasks import TASKS, ExampleBatches
from headway.tuning import adapters

DEFAULTS: Mapping[str, tuple[str, ...]] = {
    "labels": ("accuracy", "f1_macro", "mcc"),
    "multilabel": ("multilabel_f1_micro", "multilabel_f1_macro", "subset_accuracy"),
    "numbers": ("pearson", "spearman", "mean_squared_error"),
    "tags": ("span_f1", "token_accuracy"),
    "answers": ("squad_exact_match", "squad_f1"),
    "texts": ("bleu", "chrf"),
    "ranks": ("recall_at_k", "mrr"),
    "preferences": ("accuracy",),
}
"""What is measured where nobody names a metric, by what there is to measure."""


class Predicted(NamedTuple):
    """What metrics are given: the kind of `data` (a key of DEFAULTS), and metrics' arguments."""

    kind: str
    data: tuple[object, ...]


@dataclass(frozen=True)
class How:
    """How to read and predict.

    Attributes:
        read: how files become text. columns: field -> column. labels: the classes' names, else the model's.
        beams, max_tokens: for texts. rows: of a batch. limit: examples, spread over the file; None: all.
        progress: told (done, total).
    """

    read: ReadOptions = field(default_factory=ReadOptions)
    columns: Mapping[str, str] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    beams: int = 1
    max_tokens: int = 128
    rows: int = 32
    limit: int | None = None
    progress: Callable[[int, int], None] = lambda done, total: None


def assess(loaded: loading.Loaded, data: str, metrics: Sequence[str] = (), how: How | None = None) -> list[Measured]:
    """Measure a model on a file of rows, or a folder of images or recordings.

    Raises ConfigError for a metric that does not go with the data, InputError for data that do not go with the model.
    """
    found = predicted(loaded, data, how or How())
    takes = {"answers": "texts", "preferences": "labels"}.get(found.kind, found.kind)
    chosen = metrics or DEFAULTS[found.kind]
    for name in chosen:
        if name in METRICS and METRICS[name].takes != takes:
            fitting = [one for one, metric in METRICS.items() if metric.takes == takes]
            raise ConfigError("metrics", f"{name} of {found.kind}", ", ".join(fitting))
    return [one for name in chosen for one in measure(name, *found.data)]


def form_of_rows(data: str, read: ReadOptions) -> type | None:
    """The form of the first row, None for files of plain text. Raises InputError for what cannot be read."""
    file, report = find_tables(data, read, ReadReport())[0], ReadReport()
    if not is_table(file) and not is_rows(file):
        return None
    first = next(examples(read_rows(file, read, report)), None)
    return None if first is None else type(first)


def predicted(loaded: loading.Loaded, data: str, how: How) -> Predicted:
    """A model's answers beside the true ones."""
    head, kind = loaded.config.head.type, loaded.config.kind
    if not loaded.config.vocab_size:
        return _signals(loaded, data, how)
    report = ReadReport()
    files = find_tables(data, how.read, report)
    rows = (row for file in files for row in read_rows(file, how.read, report, how.columns))
    found = list(examples(rows, skipped=report if how.read.skip_bad_rows else None))
    if how.limit is not None:
        count = min(how.limit, len(found))
        found = [found[place * len(found) // count] for place in range(count)]
    if not found:
        raise InputError(data, "0 rows", "rows to measure on")
    form, name = type(found[0]), "seq2seq" if kind == "encoder-decoder" else head
    if (name, form) not in _BY_TASK:
        known = ", ".join(f"{shape.__name__} for {task}" for task, shape in _BY_TASK)
        raise InputError(data, f"rows of the form {form.__name__} for a model with the head {head}", known)
    return _BY_TASK[name, form](loaded, found, how)


def _coder(loaded: loading.Loaded, how: How) -> Coder:
    types = loaded.config.embeddings.token_types > 1
    return Coder(
        loaded.words, loaded.config.max_len, loaded.config.max_len, how.labels or loading.class_names(loaded), types
    )


def _encoded(loaded: loading.Loaded, task: str, found: Sequence[Example], how: How) -> tuple[Examples, ExampleBatches]:
    coder, losses = _coder(loaded, how), Losses()
    encoded = gather(encode_all(found, TASKS[task].encode[type(found[0])], coder, losses))
    return encoded, ExampleBatches(encoded, TASKS[task], filler(loaded.words))


def _outputs(loaded: loading.Loaded, task: str, found: Sequence[Example], how: How) -> tuple[dict[int, Any], Any]:
    encoded, batches = _encoded(loaded, task, found, how)
    some = batches.in_order(how.rows, len(encoded))
    return outputs(loaded.model, some, lambda done: how.progress(done, len(encoded))), encoded


def _classes(loaded: loading.Loaded, found: Sequence[Labelled], how: How) -> Predicted:
    logits, encoded = _outputs(loaded, "sequence-classification", found, how)
    table = in_order(logits)
    labels = encoded.columns["labels"]
    true = np.stack([labels[number] for number in range(len(labels))])
    problem = getattr(loaded.config.head, "problem", "single")
    if problem == "single":
        return Predicted("labels", (table.argmax(1), true[:, 0]))
    if problem == "multi":
        return Predicted("multilabel", ((table > 0).astype(int), true))
    return Predicted("numbers", (table[:, 0], true[:, 0]))


def _tags(loaded: loading.Loaded, found: Sequence[Tagged], how: How) -> Predicted:
    logits, encoded = _outputs(loaded, "token-classification", found, how)
    names = how.labels or loading.class_names(loaded)
    ours, theirs = [], []
    for number in range(len(encoded)):
        labels = encoded.columns["labels"][number]
        at = np.flatnonzero(labels >= 0)
        ours.append([names[best] for best in logits[number][at].argmax(1)])
        theirs.append([names[label] for label in labels[at]])
    return Predicted("tags", (ours, theirs))


def _answers(loaded: loading.Loaded, found: Sequence[Question], how: How) -> Predicted:
    said = answers(loaded.model, found, _coder(loaded, how), lambda done: how.progress(done, len(found)))
    return Predicted("answers", (said, [[answer.text for answer in one.answers] for one in found]))


def _texts(loaded: loading.Loaded, found: Sequence[Pair], how: How) -> Predicted:
    from headway.generation import GenerationOptions, generate

    greedy: dict[str, Any] = {"temperature": 0.0} if how.beams == 1 else {}
    options = GenerationOptions(max_tokens=how.max_tokens, beams=how.beams, truncate="left", **greedy)
    order = sorted(range(len(found)), key=lambda number: len(found[number].source))
    said = [""] * len(found)
    for begin in range(0, len(order), how.rows):
        some = order[begin : begin + how.rows]
        done = generate(loaded.model, loaded.words, [found[number].source for number in some], options)
        for number, one in zip(some, done, strict=True):
            said[number] = one.text
        how.progress(begin + len(some), len(order))
    return Predicted("texts", (said, [[one.target] for one in found]))


def _neighbours(loaded: loading.Loaded, found: Sequence[Pair], how: How) -> Predicted:
    """Each source looks for its target among all different targets."""
    documents = list(dict.fromkeys(one.target for one in found))
    places = {text: place for place, text in enumerate(documents)}
    both = [one.source for one in found], documents
    total = sum(map(len, both))
    queries, known = (
        embed(loaded.model, loaded.words, texts, progress=lambda done: how.progress(done, total)).numpy()
        for texts in both
    )
    return Predicted("ranks", (ranks_of(queries, known, [places[one.target] for one in found]),))


def _preferences(loaded: loading.Loaded, found: Sequence[Preference], how: How) -> Predicted:
    """Whether the chosen completion is the likelier one; with adapters, whether they make it more so than the other."""
    encoded, batches = _encoded(loaded, "preference", found, how)
    read = partial(log_likelihoods, loaded.model, batches, how.rows, lambda done: how.progress(done, len(encoded)))
    said = read()
    if adapters.names(loaded.model):
        with adapters.unused(loaded.model):
            said = said - read()
    ahead = (said[:, 0] - said[:, 1]).numpy()
    return Predicted("preferences", ((ahead > 0).astype(int), np.ones(len(encoded), int)))


def _signals(loaded: loading.Loaded, data: str, how: How) -> Predicted:
    """Images or recordings: the held-out side of a set, or all of one without sides."""
    patch, audio = loaded.config.embeddings.patch, loaded.config.embeddings.audio
    batches: SignalBatches
    if patch is not None:
        if loaded.config.head.type != "image-classification":
            fix = f"headway train base={loaded.path} data.path=IMAGES"
            raise ConfigError("head", f"{loaded.config.head.type} tells no classes", "image-classification", fix)
        images = held_out_images(data, patch.image)
        assert images is not None
        labels, batches = images.labels, ImageBatches(images, ImageClassification(), patch.size)
    else:
        assert audio is not None
        recordings = held_out_recordings(data, audio.bins, audio.frames, how.labels or loading.class_names(loaded))
        labels, batches = recordings.labels, RecordingBatches(recordings, AudioClassification())
    count, seen = how.limit or len(labels), list[int]()
    some = _noted(batches.in_order(how.rows, count), seen)
    table = in_order(outputs(loaded.model, some, lambda done: how.progress(done, count)))
    return Predicted("labels", (table.argmax(1), labels[np.array(sorted(seen))]))


def _noted(batches: Any, seen: list[int]) -> Any:
    for batch in batches:
        seen.extend(batch.sample_ids)
        yield batch


_BY_TASK: Mapping[tuple[str, type], Callable[[Any, Any, How], Predicted]] = {
    ("sequence-classification", Labelled): _classes,
    ("token-classification", Tagged): _tags,
    ("span", Question): _answers,
    ("seq2seq", Pair): _texts,
    ("pooled-embedding", Pair): _neighbours,
    ("causal-lm", Preference): _preferences,
}
