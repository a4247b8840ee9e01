"""What a run is made of, and where it comes from: the types that prepare.py fills, and the choice of a tokenizer."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch

from headway import loading, machine
from headway import run_config as rc
from headway.checkpoints.folder import TOKENIZER
from headway.config import ModelConfig
from headway.data import Prepared, ReadOptions
from headway.data.mixture import Mixture
from headway.errors import MachineError
from headway.families._preset import preset_family
from headway.run_config import Data, RunConfig
from headway.text import Tokenizer, train_tokenizer
from headway.training.objectives import BatchSource, TrainingBatch
from headway.training.recipe import Facts, Trial
from headway.training.teaching import Teacher
from headway.training.windows import special_tokens_for

Say = Callable[[str], None]
Progress = Callable[[str, int, int], None]  # what, done, total


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
        base: the published model that is trained further. teacher: the model that is learned from.
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
    teacher: Teacher | None = None
    prepared: tuple[Prepared, ...] = ()
    lines: list[str] = field(default_factory=list)
    shares: Callable[[RunConfig], Sequence[Share]] = lambda run: ()


@dataclass(frozen=True)
class Where:
    """A run's config, its folder, and whom to tell; what it names is read once, when it is first asked for."""

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

    @cached_property
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

    @cached_property
    def base(self) -> loading.Loaded | None:
        """The model that is trained further; a resumed run has its own weights, but still asks for its shape."""
        if self.run.base is None:
            return None
        tuning = self.run.frugal
        return _load_base(self.run.base, "base", "float32" if tuning is None else tuning.base_dtype)

    @cached_property
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


def _load_base(name: str, key: str, dtype: str = "float32") -> loading.Loaded:
    loaded = loading.load_base(name, dtype)
    loading.check_pixels(loaded, key)
    return loaded


def training_device(wanted: str) -> str:
    """The device that `train.device` means here. Raises MachineError for a GPU that is not there."""
    local = f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else "cuda"
    if wanted in ("auto", "cuda") and torch.cuda.is_available():
        return local
    if wanted == "auto":
        return "cpu"
    if wanted != "cpu" and not torch.cuda.is_available():
        raise MachineError("train.device", f"{wanted}, but this torch sees no GPU", "cpu", "train.device=cpu")
    return wanted


def read_options(data: Data) -> ReadOptions:
    """How the files of a run become text."""
    return ReadOptions(data.encoding_errors, data.newline, data.skip_bad_rows, max_bytes=data.max_bytes)


def default_vocab_size(size: int) -> int:
    """A power of two near the square root of the text's bytes, 512 to 32,768.

    Types grow about as the square root of the text (Heaps' law); a table much larger than that has rows that training
    hardly ever visits.
    """
    return min(max(1 << round(math.log2(max(size, 1)) / 2), 512), 32768)


def tokenizer_for(where: Where, texts: Callable[[], Iterable[str]], size: int, objective: rc.Objective) -> Tokenizer:
    """The run's own when resuming, the one that is named, the base's, the teacher's, or a new one from the training
    side. Raises ConfigError where a teacher has another."""
    found = _given_tokenizer(where)
    if found is None:
        return _new_tokenizer(where, texts, size, objective)
    if where.teacher is not None:
        where.teacher.check_words(found[0], found[1])
    return found[0]


def _given_tokenizer(where: Where) -> tuple[Tokenizer, str] | None:
    """The tokenizer that need not be trained, and whose it is."""
    base, teacher = where.base, where.teacher
    named, own = where.run.tokenizer.path, where.folder / TOKENIZER
    if where.resuming and own.is_file():
        return Tokenizer.load(own), str(own)
    if named is not None:
        return Tokenizer.load(named), named
    if base is not None:
        return base.words, str(where.run.base)
    return None if teacher is None or teacher.tokenizer is None else (teacher.tokenizer, teacher.how.teacher)


def _new_tokenizer(where: Where, texts: Callable[[], Iterable[str]], size: int, objective: rc.Objective) -> Tokenizer:
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


def kind_of(where: Where) -> str | None:
    """The model's kind as far as anybody says it: the base, a preset, the user, a teacher."""
    said, teacher = where.run.model.get("kind"), where.teacher
    if where.base is not None:
        return where.base.config.kind
    if where.run.preset is not None:
        return str(preset_family(where.run.preset).fixed["kind"])
    return said if said is not None or teacher is None else teacher.model.config.kind


def has_types(preset: str | None) -> bool:
    """Whether a model of this form tells the two texts of a pair apart."""
    keys = preset_family(preset).keys.values() if preset is not None else ()
    return any(key.ours == "embeddings.token_types" and key.default != 1 for key in keys)


def special_ids(tokenizer: Tokenizer, kind: str) -> dict[str, int | None]:
    """The ids with a meaning of their own that a new model's config carries."""
    out = {name: getattr(tokenizer, f"{name}_id") for name in ("bos", "eos", "pad", "mask")}
    # A target begins with what ended the last one, as BART's does.
    return {**out, "decoder_start": tokenizer.eos_id if kind == "encoder-decoder" else None}
