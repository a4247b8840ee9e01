"""What a run is: data, tokenizer, objective, model and training, from files, environment and command line.

Precedence, lowest first: defaults, config files in order, environment (`HEADWAY__TRAIN__LR=0.01` is `train.lr`),
command line (`train.lr=0.01`). The origin of every value is kept and shown by `--print-config`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import BeforeValidator, Field

from headway.config import (
    Checked,
    Count,
    Frozen,
    ModelConfig,
    Positive,
    PositiveReal,
    Probability,
    as_attention,
    as_feed_forward,
    as_tagged,
    as_tuple,
)
from headway.config_rules import Rule, nearest_multiples
from headway.errors import ConfigError, nearest
from headway.plain_yaml import parse_yaml, read_yaml
from headway.tuning_config import Frugal, FullTuning, Tuning

ENV_PREFIX = "HEADWAY__"
Share = Annotated[float, Field(gt=0, lt=1)]
Names = Annotated[tuple[str, ...], BeforeValidator(as_tuple)]


class Data(Frozen):
    """Where the text comes from and how it is cut.

    `context` is the length of a training window in tokens. `val_fraction` of the documents (chosen by hash) is held
    out when there is no `valid_path`. `isolate` keeps packed documents from attending to each other. For examples
    `context` is the longest input and `target` the longest target of an encoder-decoder; `columns` says which column
    of the file holds a field (`data.columns.text=sentence`), and `labels` names the classes (default: those found).
    Images are brought to `image` pixels a side and cut into patches of `patch`; recordings have `seconds` each and
    `bins` of pitch. `mixture` stands for `path` where there are several sources: a file, folder or glob and its weight
    among the rows of training, each.
    """

    path: str | None = None
    mixture: dict[str, PositiveReal] = Field(default_factory=dict)
    valid_path: str | None = None
    context: Positive | None = None
    target: Positive | None = None
    columns: dict[str, str] = Field(default_factory=dict)
    labels: Names = ()
    image: Positive | None = None
    patch: Positive | None = None
    seconds: PositiveReal | None = None
    bins: Positive = 80
    val_fraction: Share = 0.05
    isolate: bool = True
    encoding_errors: Literal["strict", "replace", "skip"] = "strict"
    newline: Literal["keep", "lf"] = "keep"
    skip_bad_rows: bool = False
    max_bytes: Positive = 2**36


class CausalLM(Frozen):
    """The next token: of text in packed windows, or of the answers in prompts and conversations."""

    type: Literal["causal-lm"] = "causal-lm"


class MaskedLM(Frozen):
    """Hidden tokens (arXiv:1810.04805). `replace` bert: of those hidden 80 % are the mask, 10 % others, 10 % stay.

    `static` hides the same ones of a window whenever it comes back (arXiv:1907.11692, section 4.1).
    """

    type: Literal["masked-lm"] = "masked-lm"
    rate: Share = 0.15
    whole_words: bool = False
    replace: Literal["bert", "all"] = "bert"
    static: bool = False


class SpanCorruption(Frozen):
    """T5's: spans of `mean_span` tokens, `rate` of the text, become sentinels (arXiv:1910.10683)."""

    type: Literal["span-corruption"] = "span-corruption"
    rate: Share = 0.15
    mean_span: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 3.0


class Denoising(Frozen):
    """BART's: sentences change places, spans become one mask, the target is the text (arXiv:1910.13461)."""

    type: Literal["denoising"] = "denoising"
    rate: Share = 0.3
    mean_span: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 3.0
    shuffle: bool = True


class Seq2Seq(Frozen):
    """The target given the source, by teacher forcing."""

    type: Literal["seq2seq"] = "seq2seq"


class SequenceClassification(Frozen):
    """One class, several, or a number for a text or two; which, the labels tell."""

    type: Literal["sequence-classification"] = "sequence-classification"


class TokenClassification(Frozen):
    """One class per word."""

    type: Literal["token-classification"] = "token-classification"


class Span(Frozen):
    """Where in a context the answer stands."""

    type: Literal["span"] = "span"


class Preference(Frozen):
    """Of two completions the chosen one becomes likelier than the rejected (nn/preferences.py).

    By default DPO (arXiv:2305.18290) against the model as it is at the start. `by_length` counts nats per token; with
    `reference` none and a `margin` that is SimPO (arXiv:2405.14734). `smoothing` is the share of pairs labelled wrong.
    """

    type: Literal["preference"] = "preference"
    beta: PositiveReal = 0.1
    reference: Literal["base", "none"] = "base"
    by_length: bool = False
    margin: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0


class Contrastive(Frozen):
    """Vectors of texts that belong together come together; the batch's other pairs are the negatives."""

    type: Literal["contrastive"] = "contrastive"


class ImageClassification(Frozen):
    """One class per image; training images are moved by up to `shift` pixels and mirrored if `flip`."""

    type: Literal["image-classification"] = "image-classification"
    shift: Count = 2
    flip: bool = True


class MaskedPatches(Frozen):
    """Pixels of hidden patches, `rate` of each image; no labels are used (SimMIM, arXiv:2111.09886)."""

    type: Literal["masked-patches"] = "masked-patches"
    rate: Share = 0.6
    shift: Count = 2
    flip: bool = True


class AudioClassification(Frozen):
    """One class per recording; training recordings are moved by up to `shift` frames of 10 ms."""

    type: Literal["audio-classification"] = "audio-classification"
    shift: Count = 10


Objective = Annotated[
    CausalLM
    | MaskedLM
    | SpanCorruption
    | Denoising
    | Seq2Seq
    | SequenceClassification
    | TokenClassification
    | Span
    | Contrastive
    | Preference
    | ImageClassification
    | MaskedPatches
    | AudioClassification,
    Field(discriminator="type"),
    BeforeValidator(as_tagged),
]


class Distill(Frozen):
    """Learn from a teacher's answers besides the labels (arXiv:1503.02531).

    `teacher` is a path or name as `headway.load` takes it; `weight` is its share of the loss, that of the labels is
    what is left; both sides' logits are divided by `temperature`.
    """

    teacher: str
    weight: Annotated[float, Field(gt=0, le=1)] = 0.5
    temperature: PositiveReal = 2.0


class TokenizerConfig(Frozen):
    """A tokenizer to train (`kind`, `vocab_size`) or to load (`path`). None means: chosen from data and budget."""

    kind: Literal["bpe", "wordpiece", "unigram", "byte", "char"] | None = None
    vocab_size: int | None = None
    special_tokens: Names = ("<|endoftext|>",)
    path: str | None = None


class Train(Frozen):
    """The optimization. None means: derived by the recipe and written into the resolved config.

    `batch_size` is sequences per update, split into `accumulation` passes; `batch_tokens` instead is the most tokens of
    an update of examples: input, target and padding. `lr` is the peak rate and `muon_lr` that of Muon's matrices;
    `beta1` and `beta2` are AdamW's and Lion's. `warmup` counts steps; `schedule` wsd decays over its last `decay`
    share. `z_loss` weighs log^2 Z (arXiv:2204.02311), `ema` is the decay of the averaged weights,
    `checkpoint_activations` runs blocks twice for less memory, to the same bits. Of several
    processes each holds the whole model (`strategy` ddp) or a share of it (fsdp), and `tensor_parallel` of them share
    the work on the same rows; one that hears nothing of the others for `collective_timeout` seconds gives up.
    `loggers` get the run's events besides metrics.jsonl; each is an extra of its own.
    """

    steps: Count | None = None
    epochs: PositiveReal | None = None
    batch_size: Positive | None = None
    batch_tokens: Positive | None = None
    accumulation: Positive = 1
    optimizer: Literal["adamw", "muon", "lion", "adafactor"] = "muon"
    lr: PositiveReal | None = None
    muon_lr: PositiveReal | None = None
    schedule: Literal["constant", "linear", "cosine", "wsd", "inverse-sqrt"] = "linear"
    warmup: Count | None = None
    decay: Annotated[float, Field(gt=0, le=1)] = 0.2
    final_lr: Annotated[float, Field(ge=0, le=1)] = 0.0
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    beta1: Probability = 0.9
    beta2: Probability = 0.95
    eps: PositiveReal = 1e-8
    clip: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    label_smoothing: Probability = 0.0
    z_loss: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    ema: Share | None = None
    checkpoint_activations: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    eval_every: Positive | None = None
    eval_windows: Positive = 64
    eval_rows: Positive = 2048
    checkpoint_every: Positive | None = None
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    early_stop: Positive | None = None
    on_nonfinite: Literal["stop", "skip"] = "stop"
    on_spike: Literal["warn", "skip"] = "warn"
    sample_prompt: str = ""
    sample_tokens: Count = 64
    strategy: Literal["ddp", "fsdp"] = "ddp"
    tensor_parallel: Positive = 1
    collective_timeout: PositiveReal = 1800.0
    loggers: Annotated[tuple[Literal["tensorboard", "wandb"], ...], BeforeValidator(as_tuple)] = ()
    threads: Positive | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$")] = "auto"


RUN_RULES: tuple[Rule, ...] = (
    Rule(
        ("data.path", "data.mixture"),
        lambda r: r.data.path is not None and bool(r.data.mixture),
        lambda r: f"one source ({r.data.path}) and a mixture of {len(r.data.mixture)}",
        "one of the two",
        lambda r: "leave out data.path",
    ),
    Rule(
        ("data.mixture", "data.valid_path"),
        lambda r: bool(r.data.mixture) and r.data.valid_path is not None,
        lambda r: f"{r.data.valid_path} to be held out beside a mixture",
        "a share of each source held out, data.val_fraction",
        lambda r: "leave out data.valid_path",
    ),
    Rule(
        ("train.warmup", "train.steps"),
        lambda r: r.train.warmup is not None and r.train.steps is not None and r.train.warmup > r.train.steps,
        lambda r: f"{r.train.warmup} steps of warmup in a run of {r.train.steps}",
        "warmup within the run",
        lambda r: f"train.warmup={max(r.train.steps // 20, 0)}",
    ),
    Rule(
        ("train.batch_size", "train.accumulation"),
        lambda r: r.train.batch_size is not None and r.train.batch_size % r.train.accumulation != 0,
        lambda r: f"batch of {r.train.batch_size} in {r.train.accumulation} passes",
        "a batch that the passes divide",
        lambda r: f"train.batch_size={nearest_multiples(r.train.batch_size, r.train.accumulation)}",
    ),
    Rule(
        ("train.batch_size", "train.batch_tokens"),
        lambda r: r.train.batch_size is not None and r.train.batch_tokens is not None,
        lambda r: f"batches of {r.train.batch_size} rows and of {r.train.batch_tokens} tokens",
        "one of the two",
        lambda r: "leave out train.batch_size",
    ),
    Rule(
        ("data.mixture", "train.batch_tokens"),
        lambda r: bool(r.data.mixture) and r.train.batch_tokens is not None,
        lambda r: f"batches of {r.train.batch_tokens} tokens of a mixture, whose shares count rows",
        "batches of so many rows",
        lambda r: "leave out train.batch_tokens",
    ),
    Rule(
        ("budget", "train.steps"),
        lambda r: r.budget is not None and r.train.steps is not None,
        lambda r: f"budget {r.budget} and {r.train.steps} steps both say when to stop",
        "one of the two",
        lambda r: "leave out train.steps",
    ),
    Rule(
        ("budget", "train.epochs"),
        lambda r: r.train.epochs is not None and r.budget is not None,
        lambda r: f"{r.train.epochs:g} epochs and budget {r.budget} both say when to stop",
        "one of the two",
        lambda r: "leave out budget",
    ),
    Rule(
        ("base", "model"),
        lambda r: r.base is not None and "kind" not in r.model and bool(r.model),
        lambda r: f"a model to train further ({r.base}) and sizes of a new one ({', '.join(r.model)})",
        "one of the two",
        lambda r: "leave out base",
    ),
    Rule(
        ("tuning", "base"),
        lambda r: r.tuning is not None and r.base is None,
        lambda r: "adapters, and no model to put them on",
        "a model that exists",
        lambda r: "base=MODEL",
    ),
    Rule(
        ("tuning", "train.tensor_parallel"),
        lambda r: r.tuning is not None and r.train.tensor_parallel > 1,
        lambda r: f"adapters, and layers shared out among {r.train.tensor_parallel} processes",
        "whole layers in each process",
        lambda r: "train.tensor_parallel=1",
    ),
    Rule(
        ("base", "preset"),
        lambda r: r.base is not None and r.preset is not None,
        lambda r: f"a model to train further ({r.base}) and the form of a new one ({r.preset})",
        "one of the two",
        lambda r: "leave out preset",
    ),
    Rule(
        ("tokenizer.path", "tokenizer.kind"),
        lambda r: r.tokenizer.path is not None and r.tokenizer.kind is not None,
        lambda r: f"a tokenizer to load ({r.tokenizer.path}) and one to train ({r.tokenizer.kind})",
        "one of the two",
        lambda r: "leave out tokenizer.kind",
    ),
    Rule(
        ("model.depth", "model"),
        lambda r: "depth" in r.model and bool(set(r.model) & {"d_model", "n_layers", "n_heads"}),
        lambda r: "the dial model.depth and explicit sizes",
        "the dial or the sizes",
        lambda r: "leave out model.depth",
    ),
)


class RunConfig(Checked):
    """Everything that decides what a run does.

    `model` holds ModelConfig's fields, or the one dial `depth`. `objective` None is what the data's form asks for.
    `base` is a model to train further: a path or name as `headway.load` takes it; `distill` names one to learn from.
    `preset` is a family of published models whose form a new model has, `gpt2` or `llama`. With `tuning` the base stays
    as it is, and adapters are trained.
    """

    model: dict[str, Any] = Field(default_factory=dict)
    data: Data = Data()
    tokenizer: TokenizerConfig = TokenizerConfig()
    train: Train = Train()
    objective: Objective | None = None
    base: str | None = None
    distill: Distill | None = None
    tuning: Tuning | None = None
    preset: str | None = None
    budget: Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?[smh]$")] | None = None
    output: str | None = None

    rules: ClassVar = RUN_RULES

    def check(self) -> None:
        """The model's fields too, as far as they can be judged without the data."""
        check_model_fields(self.model)

    @property
    def frugal(self) -> Frugal | None:
        """How a base is adapted where its own files are left as they are; None where all weights are trained."""
        return None if isinstance(self.tuning, FullTuning) else self.tuning

    @property
    def budget_seconds(self) -> float | None:
        """The time budget in seconds: `90s`, `3m`, `2h`."""
        if self.budget is None:
            return None
        return float(self.budget[:-1]) * {"s": 1, "m": 60, "h": 3600}[self.budget[-1]]


# Enough of a model for the fields that a user gave to be checked before data and tokenizer are known.
_PROBE = {"d_model": 8, "n_layers": 1, "vocab_size": 2**40, "max_len": 8}


def check_model_fields(fields: Mapping[str, object]) -> None:
    """Check the `model.*` keys of a run long before the model can be built (its vocabulary is not known yet)."""
    known = [*ModelConfig.model_fields, "depth"]
    for key in fields:
        if key not in known:
            hint = nearest(key, known)
            raise ConfigError(f"model.{key}", f"unknown key {key!r}{hint}", "" if hint else ", ".join(known))
    depth = fields.get("depth")
    if "depth" in fields and (type(depth) is not int or not 0 < depth <= 1024):
        raise ConfigError("model.depth", f"{depth!r} ({type(depth).__name__})", "an integer from 1 to 1024")
    given = {key: value for key, value in fields.items() if key != "depth"}
    probe: dict[str, Any] = {**_PROBE, **({"vocab_size": 0} if given.get("kind") == "vision" else {}), **given}
    embeddings = given.get("embeddings")
    if given.get("kind") == "encoder" and isinstance(embeddings, dict) and embeddings.get("audio") is not None:
        probe = {**given, "d_model": given.get("d_model", 8), "n_layers": given.get("n_layers", 1)}
    probe.setdefault("n_heads", given.get("n_kv_heads", 1))
    if not {"d_model", "n_heads"} <= set(given):  # sizes left open are not held against those that are given
        probe.setdefault("d_head", 64)
    try:
        ModelConfig(**probe)
    except ConfigError as error:
        where = " and ".join(f"model.{name}" for name in error.where.split(" and "))
        # A model's own error says `kind=decoder`; in a run the key is `model.kind`.
        fix = re.sub(r"(?<![\w.])(?=[a-z_]+(\.[a-z_]+)*=)", "model.", error.fix)
        raise ConfigError(where, error.found, error.expected, fix) from None


# --- reading -----------------------------------------------------------------------------------------------------


class Resolved(NamedTuple):
    """A run config and, for each dotted key that somebody set, who did."""

    run: RunConfig
    origins: dict[str, str]


# What a word alone means where keys are expected.
SHORTHANDS: Mapping[str, Callable[[object], object]] = {"attention": as_attention, "feed_forward": as_feed_forward}
_SECTIONS = ("model", "data", "tokenizer", "train")
WHOLE = frozenset({"data.mixture"})
"""Mappings that are one value: their keys are the user's own, dots and all."""


def flatten(tree: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted keys."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        here = f"{path}.{key}" if path else str(key)
        below = flatten(value, here) if isinstance(value, dict) and value and here not in WHOLE else {here: value}
        twice = out.keys() & below.keys()
        if twice:
            raise ConfigError(min(twice), "stands twice, in two spellings", "one of the two")
        out.update(below)
    return out


def put(tree: dict[str, Any], dotted: str, value: object) -> None:
    """Set `a.b.c`; a scalar in the way is shorthand for its tag (`positions: rope` + `positions.theta`)."""
    *parents, leaf = dotted.split(".")
    for depth, name in enumerate(parents, 1):
        below = SHORTHANDS.get(name, as_tagged)(tree.get(name, {}))
        if below is not None and not isinstance(below, dict):
            found = f"{below!r:.60} ({type(below).__name__})"
            raise ConfigError(".".join(parents[:depth]), found, f"keys and values, as {dotted} is set too")
        tree[name] = below or {}
        tree = tree[name]
    tree[leaf] = value


def parse_overrides(words: Iterable[str]) -> dict[str, Any]:
    """`["train.lr=0.01"]` -> `{"train.lr": 0.01}`; values are YAML scalars, lists or maps."""
    out: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][\w-]*(\.[\w-]+)*", key):
            raise ConfigError(word, "not an override", "dotted.key=value", "for example train.lr=0.01")
        out[key.replace("-", "_")] = parse_yaml(value, key)
    return out


def load_run(
    files: Iterable[Path] = (), overrides: Iterable[str] = (), environment: Mapping[str, str] | None = None
) -> Resolved:
    """Merge config files, environment and overrides into one checked RunConfig.

    Raises:
        ConfigError: unknown key (with the nearest name and, from a file, its line), wrong value, impossible pair.
        InputError: a config file that cannot be read.
    """
    environment = os.environ if environment is None else environment
    layers: list[tuple[str, dict[str, Any]]] = []
    lines: dict[str, str] = {}
    for path in files:
        tree, numbers = read_yaml(path)
        layers.append((str(path), flatten(tree)))
        lines.update({key: f"{path}, line {number}: " for key, number in numbers.items()})
    env = [
        f"{k[len(ENV_PREFIX) :].replace('__', '.').lower()}={v}"
        for k, v in sorted(environment.items())
        if k.startswith(ENV_PREFIX)
    ]
    layers += [("environment", parse_overrides(env)), ("command line", parse_overrides(overrides))]
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for origin, values in layers:
        for key, value in values.items():
            if value == {} and key in _SECTIONS:
                continue  # an empty section takes nothing away
            put(merged, key, value)
            # A value that replaces a whole section takes the origins of its keys with it.
            origins = {name: who for name, who in origins.items() if not name.startswith(f"{key}.")} | {key: origin}
    try:
        return Resolved(RunConfig(**merged), origins)
    except ConfigError as error:
        raise ConfigError(
            _line_of(error.where, lines, origins) + error.where, error.found, error.expected, error.fix
        ) from None


def _line_of(where: str, lines: Mapping[str, str], origins: Mapping[str, str]) -> str:
    """`FILE, line N: ` of the key that an error names (of a pair, or inside a list: of what stands in a file)."""
    for key in where.split(" and "):
        while key:
            if origins.get(key) in ("environment", "command line"):
                break
            if key in lines:
                return lines[key]
            key = key.rpartition(".")[0]
    return ""
