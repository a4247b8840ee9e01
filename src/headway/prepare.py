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

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from headway import loading
from headway import run_config as rc
from headway.checkpoints.folder import list_checkpoints
from headway.config import ModelConfig, with_fields
from headway.data import Corpus, PackedBatches, Prepared, ReadReport, open_corpus, prepare
from headway.data.batches import Windows
from headway.data.corpus import fingerprint
from headway.data.encode import Coder, Losses, filler
from headway.data.examples import Examples, Sides, encode_all, gather, prepare_examples
from headway.data.forms import Example, Labelled, Text, examples, split
from headway.data.images import is_images
from headway.data.mixture import MixedBatches, MixedRows, Mixture
from headway.data.recordings import is_recordings
from headway.data.rows import find_tables, is_table, read_rows
from headway.data.sources import is_rows
from headway.errors import ConfigError, InputError
from headway.material import (
    Material,
    Progress,
    Say,
    Share,
    Where,
    has_types,
    kind_of,
    read_options,
    special_ids,
    tokenizer_for,
    training_device,
)
from headway.run_config import RunConfig
from headway.signals import pictures, recordings
from headway.text import Tokenizer
from headway.training.objectives import (
    BatchSource,
    CausalLM,
    TrainingBatch,
    by_source,
    causal_evaluation,
    token_byte_lengths,
)
from headway.training.recipe import Facts, random_windows
from headway.training.references import referenced
from headway.training.tasks import Classes, ExampleBatches, Task, choose, classes_of, head_fields
from headway.training.teaching import Teacher
from headway.training.windows import (
    Corrupt,
    CorruptedWindows,
    check_objective,
    corrupted_evaluation,
    corruption,
    head_for,
    target_of,
    window_of,
)
from headway.tuning.adapters import check_targets

Evaluation = Callable[[ModelConfig, RunConfig], Iterable[TrainingBatch]]
CONTEXT = 512
"""Longest input of a new model for examples, where nobody says another."""


def material(run: RunConfig, folder: Path, resuming: bool, dry_run: bool, say: Say, progress: Progress) -> Material:
    """Read what `run` names.

    Args:
        folder: the run folder; when `resuming`, its own tokenizer is used. dry_run: nothing may be written into it.
        say, progress: told what is found, and how far long work is.

    Raises ConfigError, InputError, MachineError.
    """
    where = Where(run, folder, resuming and bool(list_checkpoints(folder)), dry_run, say, progress)
    if run.tuning is not None and where.base is not None:
        check_targets(where.base.model, run.tuning)
    made = _material(where)
    if run.train.batch_tokens is not None and made.facts.batches is None:
        kind = {"tokens": "windows"}.get(made.unit, made.unit)
        found = f"{run.train.batch_tokens} tokens of {kind}, which are all of one length"
        raise ConfigError("train.batch_tokens", found, "examples of different lengths", "train.batch_size=32")
    return made


def _material(where: Where) -> Material:
    for what, is_signal, read in (("images", is_images, pictures), ("recordings", is_recordings, recordings)):
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


# --- running text ----------------------------------------------------------------------------------------------


def _running_text(where: Where) -> Material:
    run, d, base, teacher, mixture = where.run, where.run.data, where.base, where.teacher, where.mixture
    corpora = [open_corpus(path, d.valid_path, d.val_fraction, read_options(d)) for path in where.weights]
    for corpus in corpora:
        files = len(corpus.files)
        where.say(f"{corpus.path}: {files} file{'s' * (files != 1)}, {corpus.split}")
    sizes = [sum(file.stat().st_size for file in (*corpus.files, *corpus.valid_files)) for corpus in corpora]
    objective = run.objective or _text_objective(kind_of(where))
    texts = partial(mixture.texts, [corpus.texts for corpus in corpora], sizes)
    tokenizer = tokenizer_for(where, texts, sum(sizes), objective)
    data = [_tokens(where, corpus, tokenizer, d.context or 1) for corpus in corpora]
    corrupt = corruption(objective, tokenizer)
    isolate = d.isolate and not isinstance(objective, rc.SpanCorruption | rc.Denoising)
    config = None if base is None else base.config
    if config is not None:
        check_objective(objective, config)

    def source(model: ModelConfig, run: RunConfig) -> BatchSource:
        check_objective(objective, model)
        sizes = window_of(objective, _context(run)), run.train.batch_size or 1, run.train.seed
        parts = [PackedBatches(one.train, *sizes, isolate) for one in data]
        batches: Windows = MixedBatches(parts, Mixture(where.weights, run.train.seed)) if len(parts) > 1 else parts[0]
        return (
            CausalLM(batches, tokenizer.hash) if corrupt is None else CorruptedWindows(batches, corrupt, tokenizer.hash)
        )

    def trial(model: ModelConfig, rows: int, context: int) -> Mapping[str, Tensor]:
        found = random_windows(model, rows, context, isolate=isolate)
        if model.kind == "encoder-decoder":
            found["labels"] = found["labels"][:, : target_of(objective, context)]
        return found

    tokens, held = (sum(len(getattr(one, side).tokens) for one in data) for side in ("train", "valid"))
    return Material(
        run.model_copy(update={"objective": objective}),
        tokenizer,
        Facts(
            tokens,
            _text_fields(where, objective, tokenizer),
            base=config,
            longest=teacher.model.config.max_len if teacher is not None else None,
        ),
        (tokens, held),
        "tokens",
        source,
        _held_out_text(mixture, data, objective, isolate, corrupt or _byte_lengths(tokenizer)),
        trial,
        sum(one.train.bytes for one in data),
        base,
        teacher,
        tuple(data),
        [line for one in data for line in one.lines],
        lambda run: _shares(mixture, [-(-len(p.train.tokens) // window_of(objective, _context(run))) for p in data]),
    )


def _held_out_text(
    mixture: Mixture, data: Sequence[Prepared], objective: rc.Objective, isolate: bool, how: Corrupt | Tensor
) -> Evaluation:
    """The held-out windows of each source, as many of each as its share says.

    `how`: what is done to a window, or, where it is the example itself, the bytes that each id stands for.
    """

    def evaluation(model: ModelConfig, run: RunConfig) -> Iterable[TrainingBatch]:
        window, rows = window_of(objective, _context(run)), run.train.batch_size or 1
        found: dict[str, Iterable[TrainingBatch]] = {}
        for name, one, limit in zip(mixture.names, data, mixture.split(run.train.eval_windows), strict=True):
            if isinstance(how, Tensor):
                found[name] = causal_evaluation(one.valid, window, rows, limit, isolate=isolate, token_bytes=how)
            else:
                found[name] = corrupted_evaluation(one.valid, window, rows, limit, isolate, how)
        return by_source(found)

    return evaluation


def _byte_lengths(tokenizer: Tokenizer) -> Tensor:
    special = tokenizer.special_ids
    return token_byte_lengths(b"" if i in special else tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size))


def _rows_of(tokenizer: Tokenizer, teacher: Teacher | None) -> int:
    """Of a new model's table; a published one may have more than its tokenizer has ids."""
    return max(tokenizer.vocab_size, teacher.model.config.vocab_size if teacher is not None else 0)


def _text_fields(where: Where, objective: rc.Objective, tokenizer: Tokenizer) -> dict[str, Any]:
    """What running text and an objective decide about a new model."""
    kind = {"causal-lm": "decoder", "masked-lm": "encoder"}.get(objective.type, "encoder-decoder")
    fields = {"vocab_size": _rows_of(tokenizer, where.teacher), "kind": kind, "head": {"type": head_for(objective)}}
    needs_special = kind != "decoder" or where.run.preset is not None
    return {**fields, "tokens": special_ids(tokenizer, kind)} if needs_special else fields


def _shares(mixture: Mixture, rows: Sequence[int]) -> list[Share]:
    found = zip(mixture.names, map(float, mixture.shares), rows, strict=True)
    return [Share(*one) for one in found] if len(rows) > 1 else []


def _context(run: RunConfig) -> int:
    assert run.data.context is not None  # the recipe filled it in
    return run.data.context


def _text_objective(kind: str | None) -> rc.Objective:
    found: dict[str | None, rc.Objective] = {"encoder": rc.MaskedLM(), "encoder-decoder": rc.SpanCorruption()}
    return found.get(kind, rc.CausalLM())


def _tokens(where: Where, corpus: Corpus, tokenizer: Tokenizer, context: int) -> Prepared:
    return prepare(corpus, tokenizer, where.cache, context, partial(where.progress, "tokens"))


# --- examples --------------------------------------------------------------------------------------------------


def _first_example(where: Where, path: str) -> Example | None:
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


def _examples(where: Where, files: Iterable[Path], report: ReadReport) -> Iterator[Example]:
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


def _both_sides(where: Where, path: str) -> _Source:
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


def _rows(where: Where, form: type) -> Material:
    run, d, base, teacher, mixture = where.run, where.run.data, where.base, where.teacher, where.mixture
    kind = kind_of(where)
    named = None if run.objective is None else run.objective.type
    name, task = choose(form, named, kind, d.path or ", ".join(d.mixture))
    objective: Any = run.objective or RunConfig(objective=name).objective  # type: ignore[arg-type]  # a name is a tag
    sources = [_both_sides(where, path) for path in where.weights]
    known = d.labels or (teacher.names if teacher is not None else ())
    classes = classes_of(chain.from_iterable(chain(one.train, one.valid) for one in sources), known)
    if teacher is not None:
        teacher.check_classes(classes.names)
    sizes = [sum(map(len, one.texts())) for one in sources]
    texts = partial(mixture.texts, [one.texts for one in sources], sizes)
    tokenizer = tokenizer_for(where, texts, sum(sizes), objective)
    readers = [one for one in (base and base.config, teacher and teacher.model.config) if one]
    longest = d.context or min([CONTEXT, *(config.max_len for config in readers)])
    typed = any(config.embeddings.token_types > 1 for config in readers) or has_types(run.preset)
    coder = Coder(tokenizer, longest, d.target or longest, classes.names, typed)
    pad = filler(tokenizer)
    refer = _reference(where, objective, task, pad)
    found = [_encoded(where, one, task, form, coder, name, refer) for one in sources]
    train, valid = (Examples.joined(side) for side in zip(*((one.train, one.valid) for one in found), strict=True))
    batches = ExampleBatches(train, task, pad), ExampleBatches(valid, task, pad)
    fields, config = _shape(task, classes, base, kind)
    fields |= {"vocab_size": _rows_of(tokenizer, teacher), "tokens": special_ids(tokenizer, fields["kind"])}
    run = run.model_copy(update={"objective": objective, "data": d.model_copy(update={"labels": classes.names})})
    counts = [len(one.train) for one in found]

    def source(model: ModelConfig, run: RunConfig) -> BatchSource:
        t = run.train
        if t.batch_tokens is not None:
            return batches[0].budgeted(t.batch_tokens, t.seed, tokenizer.hash)
        mixed = MixedRows(Mixture(where.weights, t.seed), counts) if len(found) > 1 else None
        return batches[0].shuffled(t.batch_size or 1, t.seed, tokenizer.hash, mixed)

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
            batches=lru_cache(lambda budget: batches[0].budgeted(budget, 0, "").batches),
        ),
        (len(train), len(valid)),
        "examples",
        source,
        _held_out_rows(mixture, batches[1], [len(one.valid) for one in found]),
        trial,
        sum(sizes),
        base,
        teacher,
        lines=[line for one, sides in zip(sources, found, strict=True) for line in (*one.lines, *sides.lines)],
        shares=lambda run: _shares(mixture, counts),
    )


def _held_out_rows(mixture: Mixture, batches: ExampleBatches, held: Sequence[int]) -> Evaluation:
    """The held-out rows of each source, of which there are `held`, as many of each as its share says."""

    def evaluation(model: ModelConfig, run: RunConfig) -> Iterable[TrainingBatch]:
        ends, limits, t = np.cumsum(held).tolist(), mixture.split(run.train.eval_rows), run.train
        among = [range(end - count, end) for end, count in zip(ends, held, strict=True)]
        some = zip(limits, among, strict=True)
        passes = (batches.in_order(t.batch_size or 1, *one, t.batch_tokens) for one in some)
        return by_source(dict(zip(mixture.names, passes, strict=True)))

    return evaluation


class _Refer(NamedTuple):
    """Who the reference of a preference is, and what adds its answers to examples."""

    name: str
    add: Callable[[Examples], Examples]


def _reference(where: Where, objective: rc.Objective, task: Task, pad: int) -> _Refer | None:
    if not isinstance(objective, rc.Preference):
        return None
    if where.teacher is not None:
        found = f"{where.teacher.how.teacher} and preferences, which have a reference instead"
        raise ConfigError("distill and objective", found, "one of the two", "leave out distill")
    base = where.base if objective.reference == "base" else None
    if base is None and objective.reference == "base":
        found = "preferences against the model as it is at the start, and no model"
        raise ConfigError("objective.reference and base", found, "a model", "base=MODEL, or objective.reference=none")

    def add(examples: Examples) -> Examples:
        model = None if base is None else base.model.to(training_device(where.run.train.device))
        return referenced(examples, task, pad, model, lambda done: where.progress("reference", done, len(examples)))

    tuning = where.run.frugal
    return _Refer("" if base is None else f"{base.weights_sha256} {tuning.base_dtype if tuning else 'float32'}", add)


def _encoded(
    where: Where, source: _Source, task: Task, form: type, coder: Coder, name: str, refer: _Refer | None
) -> Sides:
    """One source as columns: opened if they were made before, else made."""
    d, total = where.run.data, len(source.train) + len(source.valid)

    def build() -> Sides:
        losses, both = Losses(), []
        for side in (source.train, source.valid):
            encoded = encode_all(side, task.encode[form], coder, losses)
            both.append(gather(_watched(encoded, total, losses, where.progress)))
        both = both if refer is None else list(map(refer.add, both))
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
        "reference": refer and refer.name,
    }
    return prepare_examples(made_of, where.cache, build)


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
    task: Task, classes: Classes, base: loading.Loaded | None, kind: str | None
) -> tuple[dict[str, Any], ModelConfig | None]:
    """(what the data decides about a new model, the base's config with the head that the task needs)."""
    old = None if base is None else base.config.model_dump(mode="json")["head"]
    head = head_fields(task, classes, old)
    fields: dict[str, Any] = {"kind": kind or task.kinds[0]}
    if base is None:
        return {**fields, **({"head": head} if head is not None else {})}, None
    return fields, base.config if head is None else with_fields(base.config, head=head)
