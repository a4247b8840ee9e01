"""From what a run config names to what the recipe and the loop ask for: text, examples, images or sound, as `Material`.

    data.path --> running text --> corpus, tokenizer, token stores   --> windows     (training/windows.py)
              --> rows         --> examples, tokenizer, columns      --> examples    (training/tasks.py)
              --> images       --> pixels and labels                 --> pictures    (training/pictures.py)
              --> recordings   --> spectrograms and labels           --> recordings  (training/recordings.py)
    data.mixture: text or rows of one form from several such places, in shares  (data/mixture.py)

Everything that can be wrong with the data is found here, before anything long begins. Tokens and columns are kept by
content hash under machine.cache_folder()/data, so that another run on the same files begins at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from torch import Tensor

from headway import loading, machine
from headway import run_config as rc
from headway.checkpoints.folder import TOKENIZER, list_checkpoints
from headway.config import ModelConfig, with_fields
from headway.data import Corpus, PackedBatches, Prepared, ReadOptions, ReadReport, open_corpus, prepare
from headway.data.batches import Windows
from headway.data.corpus import fingerprint
from headway.data.encode import Coder, Losses
from headway.data.examples import Examples, Sides, encode_all, gather, prepare_examples
from headway.data.forms import Example, Labelled, Text, examples, split
from headway.data.images import find_images, is_images
from headway.data.mixture import MixedBatches, MixedRows, Mixture
from headway.data.recordings import find_recordings, is_recordings
from headway.data.rows import find_tables, is_table, read_rows
from headway.data.sources import is_rows
from headway.errors import ConfigError, InputError, MachineError
from headway.run_config import Data, RunConfig
from headway.text import Tokenizer, train_tokenizer
from headway.training.objectives import (
    BatchSource,
    CausalLM,
    TrainingBatch,
    by_source,
    causal_evaluation,
    token_byte_lengths,
)
from headway.training.pictures import ImageBatches, SignalBatches, patch_of
from headway.training.recipe import Facts, Trial, random_windows
from headway.training.recordings import RecordingBatches
from headway.training.tasks import Classes, ExampleBatches, Task, choose, classes_of, head_fields
from headway.training.windows import (
    CorruptedWindows,
    check_objective,
    corrupted_evaluation,
    corruption,
    head_for,
    special_tokens_for,
    target_of,
    window_of,
)

Say = Callable[[str], None]
Progress = Callable[[str, int, int], None]  # what, done, total
CONTEXT = 512
"""Longest input of a new model for examples, where nobody says another."""


class Share(NamedTuple):
    """One source of several: its name, its share of all rows, and how many rows it has itself."""

    name: str
    share: float
    rows: int

    def line(self, rows: int) -> str:
        """How often a run of so many rows goes through it."""
        return f"{self.name}, {self.share:.1%} of the rows, {rows * self.share / max(self.rows, 1):.2g} passes"


@dataclass(frozen=True)
class Material:
    """What a run is made of.

    Attributes:
        run: the run with objective and class names filled in.
        tokenizer: None for images and recordings.
        facts: for the recipe.
        sizes: (training, held-out) tokens, rows, images or recordings; `unit` says which.
        bytes: of the training side's text.
        source, evaluation: the batches, once model and run are settled.
        trial: a batch of the given rows for timing a step.
        base: the published model that is trained further.
        prepared: both token stores of each source of running text.
        lines: what the user should know.
        shares: of each source, where there are several.
    """

    run: RunConfig
    tokenizer: Tokenizer | None
    facts: Facts
    sizes: tuple[int, int]
    unit: str
    source: Callable[[ModelConfig, RunConfig], BatchSource]
    evaluation: Callable[[ModelConfig, RunConfig], Iterable[TrainingBatch]]
    trial: Trial
    bytes: int = 0
    base: loading.Loaded | None = None
    prepared: tuple[Prepared, ...] = ()
    lines: list[str] = field(default_factory=list)
    shares: Callable[[RunConfig], Sequence[Share]] = lambda run: ()


def material(run: RunConfig, folder: Path, resuming: bool, dry_run: bool, say: Say, progress: Progress) -> Material:
    """Read what `run` names.

    Args:
        folder: the run folder; when `resuming`, its own tokenizer is used. dry_run: nothing may be written into it.
        say, progress: told what is found, and how far long work is.

    Raises ConfigError, InputError, MachineError.
    """
    where = _Where(run, folder, resuming and bool(list_checkpoints(folder)), dry_run, say, progress)
    made = _material(where)
    if run.train.batch_tokens is not None and made.facts.batches is None:
        kind = {"tokens": "windows"}.get(made.unit, made.unit)
        found = f"{run.train.batch_tokens} tokens of {kind}, which are all of one length"
        raise ConfigError("train.batch_tokens", found, "examples of different lengths", "train.batch_size=32")
    return made


def _material(where: _Where) -> Material:
    for what, is_signal, read in (("images", is_images, _pictures), ("recordings", is_recordings, _recordings)):
        found = [path for path in where.weights if is_signal(path)]
        if found and where.run.data.mixture:
            raise InputError(
                f"data.mixture.{found[0]}", what, "text or rows", f"a run of its own: data.path={found[0]}"
            )
        if found:
            return read(where)
    (first, example), *others = [(path, _first_example(where, path)) for path in where.weights]
    for path, other in others:
        if _form(other) != _form(example):
            expected = f"{_form(example)}, as in {first}"
            raise InputError(f"data.mixture.{path}", _form(other), expected, "sources of one form, or a run for each")
    return _running_text(where) if example is None else _rows(where, type(example))


@dataclass(frozen=True)
class _Where:
    run: RunConfig
    folder: Path
    resuming: bool
    dry_run: bool
    say: Say
    progress: Progress

    @property
    def weights(self) -> Mapping[str, float]:
        """Every source and its weight."""
        return self.run.data.mixture or {str(self.run.data.path): 1.0}

    @property
    def mixture(self) -> Mixture:
        """The sources' shares."""
        return Mixture(self.weights, self.run.train.seed)

    @property
    def cache(self) -> Path:
        """Where tokens are kept: the user's cache, or the run folder if that cannot be written."""
        place = machine.cache_folder() / "data"
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError:
            if self.dry_run:
                raise MachineError(str(place), "cannot be made", "a cache folder", "HEADWAY_CACHE=FOLDER") from None
            return self.folder / "data"
        return place

    @property
    def base(self) -> loading.Loaded | None:
        """The model that is trained further; a resumed run has its own weights, but still asks for its shape."""
        return None if self.run.base is None else _load_base(self.run.base)


def _load_base(name: str) -> loading.Loaded:
    import torch

    from headway.checkpoints.fetch import resolve

    return loading.load(resolve(name), dtype=torch.float32)


def read_options(data: Data) -> ReadOptions:
    """How the files of a run become text."""
    return ReadOptions(data.encoding_errors, data.newline, data.skip_bad_rows, max_bytes=data.max_bytes)


def default_vocab_size(size: int) -> int:
    """A power of two near the square root of the text's bytes, 512 to 32,768.

    Types grow about as the square root of the text (Heaps' law); a table much larger than that has rows that training
    hardly ever visits.
    """
    return min(max(1 << round(math.log2(max(size, 1)) / 2), 512), 32768)


def _tokenizer(
    where: _Where, base: loading.Loaded | None, texts: Callable[[], Iterable[str]], size: int, objective: rc.Objective
) -> Tokenizer:
    """The run's own when resuming, the base's, the one that is named, or a new one from the training side."""
    run, own = where.run, where.folder / TOKENIZER
    if where.resuming and own.is_file():
        return Tokenizer.load(own)
    if run.tokenizer.path is not None:
        return Tokenizer.load(run.tokenizer.path)
    if base is not None:
        return base.words
    wanted = run.tokenizer.vocab_size or default_vocab_size(size)
    tokenizer = train_tokenizer(
        texts(),
        run.tokenizer.kind or "bpe",
        wanted,
        special_tokens=special_tokens_for(objective, run.tokenizer.special_tokens),
        progress=lambda what, done: where.progress(f"tokenizer ({what})", done if what == "read" else size, size),
    )
    if run.tokenizer.vocab_size is not None and tokenizer.vocab_size != wanted:
        found = f"tokenizer has {tokenizer.vocab_size} tokens: the text gives no more ({wanted} wanted)"
        where.say(f"note: {found}")
    return tokenizer


def _special(tokenizer: Tokenizer, kind: str) -> dict[str, int | None]:
    """The ids with a meaning of their own that a new model's config carries."""
    out = {name: getattr(tokenizer, f"{name}_id") for name in ("bos", "eos", "pad", "mask")}
    # A target begins with what ended the last one, as BART's does.
    return {**out, "decoder_start": tokenizer.eos_id if kind == "encoder-decoder" else None}


# --- running text ----------------------------------------------------------------------------------------------


def _running_text(where: _Where) -> Material:
    run, d, base, mixture = where.run, where.run.data, where.base, where.mixture
    corpora = [open_corpus(path, d.valid_path, d.val_fraction, read_options(d)) for path in where.weights]
    for corpus in corpora:
        files = len(corpus.files)
        where.say(f"{corpus.path}: {files} file{'s' * (files != 1)}, {corpus.split}")
    sizes = [sum(file.stat().st_size for file in (*corpus.files, *corpus.valid_files)) for corpus in corpora]
    kind = base.config.kind if base is not None else str(run.model.get("kind", ""))
    objective = run.objective or _text_objective(kind)
    texts = partial(mixture.texts, [corpus.texts for corpus in corpora], sizes)
    tokenizer = _tokenizer(where, base, texts, sum(sizes), objective)
    data = [_tokens(where, corpus, tokenizer, d.context or 1) for corpus in corpora]
    corrupt = corruption(objective, tokenizer)
    isolate = d.isolate and not isinstance(objective, rc.SpanCorruption | rc.Denoising)
    config = None if base is None else base.config
    if config is not None:
        check_objective(objective, config)
    lengths = _byte_lengths(tokenizer)

    def source(model: ModelConfig, run: RunConfig) -> BatchSource:
        check_objective(objective, model)
        sizes = window_of(objective, _context(run)), run.train.batch_size or 1, run.train.seed
        parts = [PackedBatches(one.train, *sizes, isolate) for one in data]
        batches: Windows = MixedBatches(parts, Mixture(where.weights, run.train.seed)) if len(parts) > 1 else parts[0]
        return (
            CausalLM(batches, tokenizer.hash) if corrupt is None else CorruptedWindows(batches, corrupt, tokenizer.hash)
        )

    def evaluation(model: ModelConfig, run: RunConfig) -> Iterable[TrainingBatch]:
        window, rows = window_of(objective, _context(run)), run.train.batch_size or 1
        found: dict[str, Iterable[TrainingBatch]] = {}
        for name, one, limit in zip(mixture.names, data, mixture.split(run.train.eval_windows), strict=True):
            if corrupt is None:
                found[name] = causal_evaluation(one.valid, window, rows, limit, isolate=isolate, token_bytes=lengths)
            else:
                found[name] = corrupted_evaluation(one.valid, window, rows, limit, isolate, corrupt)
        return by_source(found)

    def trial(model: ModelConfig, rows: int, context: int) -> Mapping[str, Tensor]:
        found = random_windows(model, rows, context, isolate=isolate)
        if model.kind == "encoder-decoder":
            found["labels"] = found["labels"][:, : target_of(objective, context)]
        return found

    tokens, held = (sum(len(getattr(one, side).tokens) for one in data) for side in ("train", "valid"))
    return Material(
        run.model_copy(update={"objective": objective}),
        tokenizer,
        Facts(tokens, _text_fields(objective, tokenizer), base=config),
        (tokens, held),
        "tokens",
        source,
        evaluation,
        trial,
        sum(one.train.bytes for one in data),
        base,
        tuple(data),
        [line for one in data for line in one.lines],
        lambda run: _shares(mixture, [-(-len(p.train.tokens) // window_of(objective, _context(run))) for p in data]),
    )


def _byte_lengths(tokenizer: Tokenizer) -> Tensor:
    """Bytes of text that each id stands for."""
    pieces = (
        b"" if one in tokenizer.special_ids else tokenizer.token_bytes(one) for one in range(tokenizer.vocab_size)
    )
    return token_byte_lengths(pieces)


def _text_fields(objective: rc.Objective, tokenizer: Tokenizer) -> dict[str, Any]:
    """What running text and an objective decide about a new model."""
    kind = {"causal-lm": "decoder", "masked-lm": "encoder"}.get(objective.type, "encoder-decoder")
    fields = {"vocab_size": tokenizer.vocab_size, "kind": kind, "head": {"type": head_for(objective)}}
    return fields if kind == "decoder" else {**fields, "tokens": _special(tokenizer, kind)}


def _shares(mixture: Mixture, rows: Sequence[int]) -> list[Share]:
    found = zip(mixture.names, map(float, mixture.shares), rows, strict=True)
    return [Share(*one) for one in found] if len(rows) > 1 else []


def _context(run: RunConfig) -> int:
    assert run.data.context is not None  # the recipe filled it in
    return run.data.context


def _text_objective(kind: str) -> rc.Objective:
    found: dict[str, rc.Objective] = {"encoder": rc.MaskedLM(), "encoder-decoder": rc.SpanCorruption()}
    return found.get(kind, rc.CausalLM())


def _tokens(where: _Where, corpus: Corpus, tokenizer: Tokenizer, context: int) -> Prepared:
    return prepare(corpus, tokenizer, where.cache, context, partial(where.progress, "tokens"))


# --- examples --------------------------------------------------------------------------------------------------


def _first_example(where: _Where, path: str) -> Example | None:
    """The first row's example, None for running text: files of plain text, or rows with nothing but a text."""
    d = where.run.data
    files = find_tables(path, read_options(d), ReadReport())
    if not is_table(files[0]) and not is_rows(files[0]):
        return None
    first = next(_examples(where, files[:1], ReadReport()), None)
    if first is None:
        raise InputError(path, "0 rows", "rows to learn from")
    return None if isinstance(first, Text) else first


def _form(example: Example | None) -> str:
    """What sources must have in common to be mixed."""
    if example is None:
        return "running text"
    label = type(example.label) if isinstance(example, Labelled) else None
    kinds = {str: " with a class", tuple: " with classes", float: " with a number"}
    return f"rows of the form {type(example).__name__}{kinds.get(label, '') if label else ''}"


def _examples(where: _Where, files: Iterable[Path], report: ReadReport) -> Iterator[Example]:
    d = where.run.data
    rows = chain.from_iterable(read_rows(file, read_options(d), report, d.columns) for file in files)
    return examples(rows, skipped=report if d.skip_bad_rows else None)


class _Source(NamedTuple):
    """The examples of one source: both sides, the hash of its files, and sentences."""

    train: list[Example]
    valid: list[Example]
    hash: str
    lines: list[str]

    def texts(self) -> Iterator[str]:
        """What a tokenizer may learn from."""
        return (text for example in self.train for text in example.texts())


def _both_sides(where: _Where, path: str) -> _Source:
    d, report = where.run.data, ReadReport()
    files = find_tables(path, read_options(d), report)
    valid_files = find_tables(d.valid_path, read_options(d), report) if d.valid_path is not None else []
    found = list(_examples(where, files, report))
    if valid_files:
        train, valid = found, list(_examples(where, valid_files, report))
    else:
        train, valid = split(found, d.val_fraction)
    if not train or not valid:
        sizes = f"{len(train)} examples to train on, {len(valid)} held out"
        raise InputError(path, sizes, "examples on both sides", "data.val_fraction=0.2, or data.valid_path=FILE")
    share = d.valid_path or f"{d.val_fraction:.3g} of them, by hash"
    where.say(f"{path}: {len(found):,} examples of the form {type(found[0]).__name__}, held out: {share}")
    return _Source(train, valid, fingerprint(tuple(files), tuple(valid_files)), report.lines())


def _rows(where: _Where, form: type) -> Material:
    run, d, base, mixture = where.run, where.run.data, where.base, where.mixture
    kind = base.config.kind if base is not None else run.model.get("kind")
    named = run.objective.type if run.objective else None
    name, task = choose(form, named, kind, d.path or ", ".join(d.mixture))
    objective = run.objective or RunConfig(objective=name).objective  # type: ignore[arg-type]  # a name is a tag
    assert objective is not None
    sources = [_both_sides(where, path) for path in where.weights]
    classes = classes_of(chain.from_iterable(chain(one.train, one.valid) for one in sources), d.labels)
    sizes = [sum(map(len, one.texts())) for one in sources]
    texts = partial(mixture.texts, [one.texts for one in sources], sizes)
    tokenizer = _tokenizer(where, base, texts, sum(sizes), objective)
    longest = d.context or (min(base.config.max_len, CONTEXT) if base is not None else CONTEXT)
    coder = Coder(tokenizer, longest, d.target or longest, classes.names, _has_types(base))
    found = [_encoded(where, one, task, form, coder, name) for one in sources]
    train, valid = (Examples.joined(side) for side in zip(*((one.train, one.valid) for one in found), strict=True))
    pad = tokenizer.pad_id if tokenizer.pad_id is not None else tokenizer.eos_id or 0
    batches = ExampleBatches(train, task, pad), ExampleBatches(valid, task, pad)
    fields, config = _shape(task, tokenizer, classes, base, kind)
    run = run.model_copy(update={"objective": objective, "data": d.model_copy(update={"labels": classes.names})})
    counts, held = [len(one.train) for one in found], [len(one.valid) for one in found]

    def source(model: ModelConfig, run: RunConfig) -> BatchSource:
        t = run.train
        if t.batch_tokens is not None:
            return batches[0].budgeted(t.batch_tokens, t.seed, tokenizer.hash)
        mixed = MixedRows(Mixture(where.weights, t.seed), counts) if len(found) > 1 else None
        return batches[0].shuffled(t.batch_size or 1, t.seed, tokenizer.hash, mixed)

    def evaluation(model: ModelConfig, run: RunConfig) -> Iterable[TrainingBatch]:
        ends, limits, t = np.cumsum(held).tolist(), mixture.split(run.train.eval_rows), run.train
        among = [range(end - count, end) for end, count in zip(ends, held, strict=True)]
        some = zip(limits, among, strict=True)
        passes = (batches[1].in_order(t.batch_size or 1, *one, t.batch_tokens) for one in some)
        return by_source(dict(zip(mixture.names, passes, strict=True)))

    def trial(model: ModelConfig, rows: int, context: int) -> Mapping[str, Tensor]:
        return batches[0].shuffled(rows, 0, "").batch(0).inputs

    return Material(
        run,
        tokenizer,
        Facts(
            train.tokens,
            fields,
            len(train),
            _longest([train, valid], task, longest),
            config,
            lru_cache(lambda budget: batches[0].budgeted(budget, 0, "").batches),
        ),
        (len(train), len(valid)),
        "examples",
        source,
        evaluation,
        trial,
        sum(sizes),
        base,
        lines=[line for one, sides in zip(sources, found, strict=True) for line in (*one.lines, *sides.lines)],
        shares=lambda run: _shares(mixture, counts),
    )


def _encoded(where: _Where, source: _Source, task: Task, form: type, coder: Coder, name: str) -> Sides:
    """One source as columns: opened if they were made before, else made."""
    d, total = where.run.data, len(source.train) + len(source.valid)

    def build(key: str) -> Sides:
        losses, both = Losses(), []
        for side in (source.train, source.valid):
            encoded = encode_all(side, task.encode[form], coder, losses)
            both.append(gather(_watched(encoded, total, losses, where.progress), key))
        return Sides(both[0], both[1], losses.lines(coder.max_len))

    made_of = {
        "data": source.hash,
        "tokenizer": coder.tokenizer.hash,
        "objective": name,
        "classes": list(coder.labels),
        "lengths": [coder.max_len, coder.max_target],
        "split": None if d.valid_path else d.val_fraction,
        "columns": dict(d.columns),
        "types": coder.token_types,
        "template": coder.tokenizer.chat_template,
        "options": [d.encoding_errors, d.newline, d.skip_bad_rows],
    }
    return prepare_examples(made_of, where.cache, build)


def _has_types(base: loading.Loaded | None) -> bool:
    return base is not None and base.config.embeddings.token_types > 1


def _longest(sides: Sequence[Examples], task: Task, longest: int) -> int:
    """Positions that a new model needs: the longest example's, in input and target."""
    lengths = [int(column.lengths.max()) for side in sides for column in side.columns.values()]
    return min(max(lengths), longest) if not task.sequence_labels else max(lengths)


def _watched(encoded: Iterable[Any], total: int, losses: Losses, progress: Progress) -> Iterator[Any]:
    for one in encoded:
        yield one
        if losses.examples % 1000 == 0:
            progress("examples", min(losses.examples, total), total)


def _shape(
    task: Task, tokenizer: Tokenizer, classes: Classes, base: loading.Loaded | None, kind: str | None
) -> tuple[dict[str, Any], ModelConfig | None]:
    """(what the data decides about a new model, the base's config with the head that the task needs)."""
    old = None if base is None else base.config.model_dump(mode="json")["head"]
    head = head_fields(task, classes, old)
    new_kind = kind or task.kinds[0]
    fields: dict[str, Any] = {
        "vocab_size": tokenizer.vocab_size,
        "kind": new_kind,
        "tokens": _special(tokenizer, new_kind),
    }
    if base is None:
        return {**fields, **({"head": head} if head is not None else {})}, None
    return fields, base.config if head is None else with_fields(base.config, head=head)


# --- images and recordings -------------------------------------------------------------------------------------


def _pictures(where: _Where) -> Material:
    d, objective = where.run.data, _signal_objective(where, rc.ImageClassification())
    train, valid = find_images(str(d.path), d.valid_path, d.image, d.val_fraction)
    batches = ImageBatches(train, objective), ImageBatches(valid, objective)
    _, channels, side, _ = train.pixels.shape
    patch = d.patch or patch_of(side)
    positions = (side // patch) ** 2
    fields = {
        "kind": "vision",
        "embeddings": {"patch": {"size": patch, "image": side, "channels": channels, "first_token": False}},
        "head": {"type": "image-classification", "labels": len(train.names), "pooling": "mean"},
    }
    return _signals(where, objective, batches, train.names, (positions, fields))


def _recordings(where: _Where) -> Material:
    d, objective = where.run.data, _signal_objective(where, rc.AudioClassification())
    progress = partial(where.progress, "recordings")
    train, valid = find_recordings(str(d.path), d.valid_path, d.seconds, d.bins, d.val_fraction, progress)
    batches = RecordingBatches(train, objective), RecordingBatches(valid, objective)
    frames = train.features.shape[2]
    fields = {
        "kind": "encoder",
        "embeddings": {"audio": {"bins": d.bins, "frames": frames}},
        "head": {"type": "sequence-classification", "labels": len(train.names), "pooling": "mean"},
    }
    return _signals(where, objective, batches, train.names, ((frames + 1) // 2, fields))


_Signal = TypeVar("_Signal", rc.ImageClassification, rc.AudioClassification)


def _signal_objective(where: _Where, default: _Signal) -> _Signal:
    """The run's objective. Raises ConfigError for another than the data's, or a published model."""
    what = default.type.removesuffix("-classification")
    if where.run.base is not None:
        raise ConfigError("base", f"a published model for {what} data", "a new one", "leave out base")
    objective = where.run.objective or default
    if not isinstance(objective, type(default)):
        found = f"{objective.type} for {what} data ({where.run.data.path})"
        raise ConfigError("objective", found, default.type, f"objective={default.type}")
    return objective


def _signals(
    where: _Where,
    objective: rc.Objective,
    batches: tuple[SignalBatches, SignalBatches],
    names: tuple[str, ...],
    shape: tuple[int, dict[str, Any]],
) -> Material:
    """What images and recordings have in common; `shape` is a signal's positions and the fields of a new model."""
    run, (positions, fields) = where.run, shape
    n_train, n_valid = map(len, batches)
    unit = "images" if fields["kind"] == "vision" else "recordings"
    where.say(f"{run.data.path}: {n_train:,} {unit} to train on, {n_valid:,} held out")
    fields = {**fields, "vocab_size": 0, "positions": "learned", "max_len": positions}
    return Material(
        run.model_copy(update={"objective": objective, "data": run.data.model_copy(update={"labels": names})}),
        None,
        Facts(n_train * positions, fields, n_train, positions),
        (n_train, n_valid),
        unit,
        lambda model, run: batches[0].shuffled(run.train.batch_size or 1, run.train.seed),
        lambda model, run: batches[1].in_order(run.train.batch_size or 1, run.train.eval_rows),
        lambda model, rows, context: batches[0].shuffled(rows, 0).batch(0).inputs,
    )
