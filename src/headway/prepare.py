"""From what a run config names to what the recipe and the loop ask for: text, examples or images, one `Material` each.

    data.path --> running text --> corpus, tokenizer, token stores   --> windows     (training/windows.py)
              --> rows         --> examples, tokenizer, columns      --> examples    (training/tasks.py)
              --> images       --> pixels and labels                 --> pictures    (training/pictures.py)

Everything that can be wrong with the data is found here, before anything long begins. Tokens and columns are kept by
content hash under machine.cache_folder()/data, so that another run on the same files begins at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor

from headway import loading, machine
from headway import run_config as rc
from headway.checkpoints.folder import TOKENIZER, list_checkpoints
from headway.config import ModelConfig, Patch, with_fields
from headway.data import Corpus, PackedBatches, Prepared, ReadOptions, ReadReport, open_corpus, prepare
from headway.data.corpus import fingerprint
from headway.data.encode import Coder, Losses
from headway.data.examples import Sides, encode_all, gather, prepare_examples
from headway.data.forms import Example, Text, examples, split
from headway.data.images import ImageSet, find_images, is_images
from headway.data.rows import find_tables, is_table, read_rows
from headway.data.sources import is_rows
from headway.errors import ConfigError, InputError, MachineError
from headway.families._preset import preset_family
from headway.run_config import Data, RunConfig
from headway.text import Tokenizer, train_tokenizer
from headway.training.objectives import BatchSource, CausalLM, TrainingBatch, causal_evaluation, token_byte_lengths
from headway.training.pictures import ImageBatches, patch_of
from headway.training.recipe import Facts, Trial, random_windows
from headway.training.tasks import Classes, ExampleBatches, Task, choose, classes_of, head_fields
from headway.training.teaching import Teacher
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


@dataclass(frozen=True)
class Material:
    """What a run is made of.

    Attributes:
        run: the run with objective and class names filled in.
        tokenizer: None for images.
        facts: for the recipe.
        sizes: (training, held-out) tokens, rows or images; `unit` says which. bytes: of the training side's text.
        source, evaluation: the batches, once model and run are settled.
        trial: a batch of the given rows for timing a step.
        base: the published model that is trained further. teacher: the model that is learned from.
        prepared: both token stores of running text.
        lines: what the user should know.
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
    teacher: Teacher | None = None
    prepared: Prepared | None = None
    lines: list[str] = field(default_factory=list)


def material(run: RunConfig, folder: Path, resuming: bool, dry_run: bool, say: Say, progress: Progress) -> Material:
    """Read what `run` names.

    Args:
        folder: the run folder; when `resuming`, its own tokenizer is used. dry_run: nothing may be written into it.
        say, progress: told what is found, and how far long work is.

    Raises ConfigError, InputError, MachineError.
    """
    where = _Where(run, folder, resuming and bool(list_checkpoints(folder)), dry_run, say, progress)
    path = str(run.data.path)
    if is_images(path):
        return _pictures(where)
    first = _first_example(where)
    return _running_text(where) if first is None else _rows(where, type(first))


@dataclass(frozen=True)
class _Where:
    run: RunConfig
    folder: Path
    resuming: bool
    dry_run: bool
    say: Say
    progress: Progress

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
        return None if self.run.base is None else _load_base(self.run.base, "base")

    @property
    def teacher(self) -> Teacher | None:
        """The model that is learned from. Raises ConfigError where it cannot read the run's sequences."""
        how = self.run.distill
        if how is None:
            return None
        loaded = _load_base(how.teacher, "distill.teacher")
        classes = loading.class_names(loaded) if hasattr(loaded.config.head, "labels") else ()
        teacher = Teacher(how, loaded.model, loaded.tokenizer, classes, loaded.weights_sha256)
        if loaded.config.vocab_size:
            teacher.check_length(self.run.data.context, "data.context")
            teacher.check_length(self.run.data.target, "data.target")
        return teacher


def _load_base(name: str, key: str) -> loading.Loaded:
    import torch

    from headway.checkpoints.fetch import resolve

    loaded = loading.load(resolve(name), dtype=torch.float32)
    loading.check_pixels(loaded, key)
    return loaded


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
    where: _Where,
    base: loading.Loaded | None,
    teacher: Teacher | None,
    texts: Callable[[], Iterable[str]],
    size: int,
    objective: rc.Objective,
) -> Tokenizer:
    """The run's own when resuming, the one that is named, the base's, the teacher's, or a new one from the training
    side. Raises ConfigError where a teacher has another."""
    found = _given_tokenizer(where, base, teacher)
    if found is None:
        return _new_tokenizer(where, texts, size, objective)
    if teacher is not None:
        teacher.check_words(found[0], found[1])
    return found[0]


def _given_tokenizer(
    where: _Where, base: loading.Loaded | None, teacher: Teacher | None
) -> tuple[Tokenizer, str] | None:
    """The tokenizer that need not be trained, and whose it is."""
    named, own = where.run.tokenizer.path, where.folder / TOKENIZER
    if where.resuming and own.is_file():
        return Tokenizer.load(own), str(own)
    if named is not None:
        return Tokenizer.load(named), named
    if base is not None:
        return base.words, str(where.run.base)
    return None if teacher is None or teacher.tokenizer is None else (teacher.tokenizer, teacher.how.teacher)


def _new_tokenizer(where: _Where, texts: Callable[[], Iterable[str]], size: int, objective: rc.Objective) -> Tokenizer:
    run = where.run
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


def _kind(where: _Where, base: loading.Loaded | None, teacher: Teacher | None) -> str | None:
    """The model's kind as far as anybody says it: the base, a preset, the user, a teacher."""
    said = where.run.model.get("kind")
    if base is not None:
        return base.config.kind
    if where.run.preset is not None:
        return str(preset_family(where.run.preset).fixed["kind"])
    return said if said is not None or teacher is None else teacher.model.config.kind


def _has_types(preset: str | None) -> bool:
    """Whether a model of this form tells the two texts of a pair apart."""
    keys = preset_family(preset).keys.values() if preset is not None else ()
    return any(key.ours == "embeddings.token_types" and key.default != 1 for key in keys)


def _special(tokenizer: Tokenizer, kind: str) -> dict[str, int | None]:
    """The ids with a meaning of their own that a new model's config carries."""
    out = {name: getattr(tokenizer, f"{name}_id") for name in ("bos", "eos", "pad", "mask")}
    # A target begins with what ended the last one, as BART's does.
    return {**out, "decoder_start": tokenizer.eos_id if kind == "encoder-decoder" else None}


# --- running text ----------------------------------------------------------------------------------------------


def _running_text(where: _Where) -> Material:
    run, d, base, teacher = where.run, where.run.data, where.base, where.teacher
    corpus = open_corpus(str(d.path), d.valid_path, d.val_fraction, read_options(d))
    files = len(corpus.files)
    where.say(f"{corpus.path}: {files} file{'s' * (files != 1)}, {corpus.split}")
    size = sum(file.stat().st_size for file in (*corpus.files, *corpus.valid_files))
    objective = run.objective or _text_objective(_kind(where, base, teacher))
    tokenizer = _tokenizer(where, base, teacher, corpus.texts, size, objective)
    data = _tokens(where, corpus, tokenizer, d.context or 1)
    corrupt = corruption(objective, tokenizer)
    isolate = d.isolate and not isinstance(objective, rc.SpanCorruption | rc.Denoising)
    new_kind = {"causal-lm": "decoder", "masked-lm": "encoder"}.get(objective.type, "encoder-decoder")
    fields = {"vocab_size": _rows_of(tokenizer, teacher), "kind": new_kind, "head": {"type": head_for(objective)}}
    if new_kind != "decoder" or run.preset is not None:
        fields["tokens"] = _special(tokenizer, new_kind)
    config = None if base is None else base.config
    if config is not None:
        check_objective(objective, config)
    sizes = _byte_lengths(tokenizer)

    def source(model: ModelConfig, run: RunConfig) -> BatchSource:
        check_objective(objective, model)
        window = window_of(objective, _context(run))
        batches = PackedBatches(data.train, window, run.train.batch_size or 1, run.train.seed, isolate)
        return (
            CausalLM(batches, tokenizer.hash) if corrupt is None else CorruptedWindows(batches, corrupt, tokenizer.hash)
        )

    def evaluation(model: ModelConfig, run: RunConfig) -> Iterable[TrainingBatch]:
        window, rows, limit = window_of(objective, _context(run)), run.train.batch_size or 1, run.train.eval_windows
        if corrupt is None:
            return causal_evaluation(data.valid, window, rows, limit, isolate=isolate, token_bytes=sizes)
        return corrupted_evaluation(data.valid, window, rows, limit, isolate, corrupt)

    def trial(model: ModelConfig, rows: int, context: int) -> Mapping[str, Tensor]:
        found = random_windows(model, rows, context, isolate=isolate)
        if model.kind == "encoder-decoder":
            found["labels"] = found["labels"][:, : target_of(objective, context)]
        return found

    return Material(
        run.model_copy(update={"objective": objective}),
        tokenizer,
        Facts(
            len(data.train.tokens),
            fields,
            base=config,
            longest=teacher.model.config.max_len if teacher is not None else None,
        ),
        (len(data.train.tokens), len(data.valid.tokens)),
        "tokens",
        source,
        evaluation,
        trial,
        data.train.bytes,
        base,
        teacher,
        data,
        data.lines,
    )


def _byte_lengths(tokenizer: Tokenizer) -> Tensor:
    special = tokenizer.special_ids
    return token_byte_lengths(b"" if i in special else tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size))


def _rows_of(tokenizer: Tokenizer, teacher: Teacher | None) -> int:
    """Of a new model's table; a published one may have more than its tokenizer has ids."""
    return max(tokenizer.vocab_size, teacher.model.config.vocab_size if teacher is not None else 0)


def _context(run: RunConfig) -> int:
    assert run.data.context is not None  # the recipe filled it in
    return run.data.context


def _text_objective(kind: str | None) -> rc.Objective:
    found: dict[str | None, rc.Objective] = {"encoder": rc.MaskedLM(), "encoder-decoder": rc.SpanCorruption()}
    return found.get(kind, rc.CausalLM())


def _tokens(where: _Where, corpus: Corpus, tokenizer: Tokenizer, context: int) -> Prepared:
    return prepare(corpus, tokenizer, where.cache, context, partial(where.progress, "tokens"))


# --- examples --------------------------------------------------------------------------------------------------


def _first_example(where: _Where) -> Example | None:
    """The first row's example, None for running text: files of plain text, or rows with nothing but a text."""
    d = where.run.data
    files = find_tables(str(d.path), read_options(d), ReadReport())
    if not is_table(files[0]) and not is_rows(files[0]):
        return None
    first = next(_examples(where, files[:1], ReadReport()), None)
    if first is None:
        raise InputError(str(d.path), "0 rows", "rows to learn from")
    return None if isinstance(first, Text) else first


def _examples(where: _Where, files: Iterable[Path], report: ReadReport) -> Iterator[Example]:
    d = where.run.data
    rows = chain.from_iterable(read_rows(file, read_options(d), report, d.columns) for file in files)
    return examples(rows, skipped=report if d.skip_bad_rows else None)


def _both_sides(where: _Where) -> tuple[list[Example], list[Example], str, list[str]]:
    """(training examples, held-out examples, hash of the files, sentences)."""
    d, report = where.run.data, ReadReport()
    files = find_tables(str(d.path), read_options(d), report)
    valid_files = find_tables(d.valid_path, read_options(d), report) if d.valid_path is not None else []
    found = list(_examples(where, files, report))
    if valid_files:
        train, valid = found, list(_examples(where, valid_files, report))
    else:
        train, valid = split(found, d.val_fraction)
    if not train or not valid:
        sizes = f"{len(train)} examples to train on, {len(valid)} held out"
        raise InputError(str(d.path), sizes, "examples on both sides", "data.val_fraction=0.2, or data.valid_path=FILE")
    share = d.valid_path or f"{d.val_fraction:.3g} of them, by hash"
    where.say(f"{d.path}: {len(found):,} examples of the form {type(found[0]).__name__}, held out: {share}")
    return train, valid, fingerprint(tuple(files), tuple(valid_files)), report.lines()


def _rows(where: _Where, form: type) -> Material:
    run, d, base, teacher = where.run, where.run.data, where.base, where.teacher
    kind = _kind(where, base, teacher)
    name, task = choose(form, run.objective.type if run.objective else None, kind, str(d.path))
    objective = run.objective or RunConfig(objective=name).objective  # type: ignore[arg-type]  # a name is a tag
    assert objective is not None
    train, valid, data_hash, lines = _both_sides(where)
    classes = classes_of(chain(train, valid), d.labels or (teacher.names if teacher is not None else ()))
    if teacher is not None:
        teacher.check_classes(classes.names)
    size = sum(len(text) for example in train for text in example.texts())
    tokenizer = _tokenizer(where, base, teacher, lambda: (t for e in train for t in e.texts()), size, objective)
    readers = [one for one in (base and base.config, teacher and teacher.model.config) if one]
    longest = d.context or min([CONTEXT, *(config.max_len for config in readers)])
    has_types = any(config.embeddings.token_types > 1 for config in readers) or _has_types(run.preset)
    coder = Coder(tokenizer, longest, d.target or longest, classes.names, has_types)

    def build(key: str) -> Sides:
        losses, both = Losses(), []
        for side in (train, valid):
            encoded = encode_all(side, task.encode[form], coder, losses)
            both.append(gather(_watched(encoded, len(train) + len(valid), losses, where.progress), key))
        return Sides(both[0], both[1], losses.lines(longest))

    made_of = {
        "data": data_hash,
        "tokenizer": tokenizer.hash,
        "objective": name,
        "classes": list(classes.names),
        "lengths": [coder.max_len, coder.max_target],
        "split": None if d.valid_path else d.val_fraction,
        "columns": dict(d.columns),
        "types": coder.token_types,
        "template": coder.tokenizer.chat_template,
        "options": [d.encoding_errors, d.newline, d.skip_bad_rows],
    }
    sides = prepare_examples(made_of, where.cache, build)
    pad = tokenizer.pad_id if tokenizer.pad_id is not None else tokenizer.eos_id or 0
    batches = ExampleBatches(sides.train, task, pad), ExampleBatches(sides.valid, task, pad)
    fields, config = _shape(task, classes, base, kind)
    fields |= {"vocab_size": _rows_of(tokenizer, teacher), "tokens": _special(tokenizer, fields["kind"])}
    run = run.model_copy(update={"objective": objective, "data": d.model_copy(update={"labels": classes.names})})

    def trial(model: ModelConfig, rows: int, context: int) -> Mapping[str, Tensor]:
        return batches[0].shuffled(rows, 0, "").batch(0).inputs

    return Material(
        run,
        tokenizer,
        Facts(sides.train.tokens, fields, len(sides.train), _longest(sides, task, longest), config),
        (len(sides.train), len(sides.valid)),
        "examples",
        lambda model, run: batches[0].shuffled(run.train.batch_size or 1, run.train.seed, tokenizer.hash),
        lambda model, run: batches[1].in_order(run.train.batch_size or 1, run.train.eval_rows),
        trial,
        size,
        base,
        teacher,
        lines=[*lines, *sides.lines],
    )


def _longest(sides: Sides, task: Task, longest: int) -> int:
    """Positions that a new model needs: the longest example's, in input and target."""
    lengths = [int(column.lengths.max()) for side in (sides.train, sides.valid) for column in side.columns.values()]
    return min(max(lengths), longest) if not task.sequence_labels else max(lengths)


def _watched(encoded: Iterable[Any], total: int, losses: Losses, progress: Progress) -> Iterator[Any]:
    for one in encoded:
        yield one
        if losses.examples % 1000 == 0:
            progress("examples", min(losses.examples, total), total)


def _shape(
    task: Task, classes: Classes, base: loading.Loaded | None, kind: str | None
) -> tuple[dict[str, Any], ModelConfig | None]:
    """(what the data decides about a new model, the base's config with the head that the task needs)."""
    old = None if base is None else base.config.model_dump(mode="json")["head"]
    head = head_fields(task, classes, old)
    fields: dict[str, Any] = {"kind": kind or task.kinds[0]}
    if base is None:
        return {**fields, **({"head": head} if head is not None else {})}, None
    return fields, base.config if head is None else with_fields(base.config, head=head)


# --- images ----------------------------------------------------------------------------------------------------


def _pictures(where: _Where) -> Material:
    run, d, base, teacher = where.run, where.run.data, where.base, where.teacher
    models = [config for config in (base and base.config, teacher and teacher.model.config) if config]
    sides = [patch.image for patch in (config.embeddings.patch for config in models) if patch]
    train, valid = find_images(str(d.path), d.valid_path, d.image or next(iter(sides), None), d.val_fraction)
    objective = run.objective or rc.ImageClassification()
    if not isinstance(objective, rc.ImageClassification | rc.MaskedPatches):
        found = f"{objective.type} for images ({d.path})"
        raise ConfigError("objective", found, "image-classification or masked-patches")
    names = train.names if isinstance(objective, rc.ImageClassification) else ()
    if teacher is not None:
        teacher.check_classes(names)
    where.say(f"{d.path}: {len(train.labels):,} images to train on, {len(valid.labels):,} held out")
    fields, config = _seeing(where, base, train, objective, len(names))
    patch = Patch(**fields["embeddings"]["patch"]) if config is None else config.embeddings.patch
    assert patch is not None

    def batches(side: ImageSet, model: ModelConfig) -> ImageBatches:
        return ImageBatches(side, objective, (model.embeddings.patch or patch).size)

    return Material(
        run.model_copy(update={"objective": objective, "data": d.model_copy(update={"labels": names})}),
        None,
        Facts(len(train.labels) * patch.count, fields, len(train.labels), patch.count, config),
        (len(train.labels), len(valid.labels)),
        "images",
        lambda model, run: batches(train, model).shuffled(run.train.batch_size or 1, run.train.seed),
        lambda model, run: batches(valid, model).in_order(run.train.batch_size or 1, run.train.eval_rows),
        lambda model, rows, context: batches(train, model).shuffled(rows, 0).batch(0).inputs,
        base=base,
        teacher=teacher,
    )


def _seeing(
    where: _Where,
    base: loading.Loaded | None,
    images: ImageSet,
    objective: rc.ImageClassification | rc.MaskedPatches,
    labels: int,
) -> tuple[dict[str, Any], ModelConfig | None]:
    """(what the images decide about a new model, the base's config with the head that the objective needs).

    Raises ConfigError for a base that sees other images.
    """
    _, channels, side, _ = images.pixels.shape
    is_class = isinstance(objective, rc.ImageClassification)
    head: dict[str, Any] = {"type": objective.type, **({"labels": labels, "pooling": "mean"} if is_class else {})}
    if base is None:
        size = where.run.data.patch or patch_of(side)
        patch = {"size": size, "image": side, "channels": channels, "first_token": False}
        vision = {"kind": "vision", "vocab_size": 0, "positions": "learned", "max_len": (side // size) ** 2}
        return {**vision, "embeddings": {"patch": patch}, "head": head}, None
    known, old = base.config.embeddings.patch, base.config.head
    name, found = str(where.run.base), f"images of {channels} x {side} x {side}"
    if known is None:
        raise ConfigError("base and data.path", f"{name} of kind {base.config.kind} for {found}", "a vision model")
    if (known.channels, known.image) != (channels, side) or where.run.data.patch not in (None, known.size):
        sees = f"{known.channels} x {known.image} x {known.image} in patches of {known.size}"
        fix = "leave out data.patch and data.image, or another base"
        raise ConfigError("base and data", f"{found} for {name}, which sees {sees}", "images of that size", fix)
    if is_class:
        head["pooling"] = getattr(old, "pooling", "first" if known.first_token else "mean")
    return {}, with_fields(base.config, head=head)
