"""From a run config to a trained model: corpus -> tokenizer -> tokens -> recipe -> model -> loop.

Everything that can be wrong is looked at before anything long begins: the folder and its lock, the corpus, the
tokenizer, the sizes, the config. Tokens are kept by content hash under machine.cache_folder()/data, so another run on
the same text begins at once. `resume` starts from the run folder's own config.yaml.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from headway import files, machine
from headway.checkpoints.folder import CONFIG, MODEL, TOKENIZER, list_checkpoints
from headway.config import ModelConfig
from headway.cost import parameters, training_flops
from headway.data import Corpus, PackedBatches, Prepared, ReadOptions, open_corpus, prepare
from headway.errors import ConfigError, HeadwayError, InputError, MachineError
from headway.nn import Transformer
from headway.plain_yaml import dump_yaml
from headway.run_config import Data, RunConfig
from headway.text import Tokenizer, train_tokenizer
from headway.training.events import Event, Listener, ResumeEvent
from headway.training.loop import Hooks, Result, Resume, Trainer
from headway.training.objectives import CausalLM, causal_evaluation, token_byte_lengths
from headway.training.recipe import resolve, time_step

_OWN = (MODEL, CONFIG, TOKENIZER, "checkpoints", "metrics.jsonl", "loss.svg", "loss.png")


@dataclass(frozen=True)
class Note:
    """A sentence for the user."""

    text: str


@dataclass(frozen=True)
class Phase:
    """Progress of what comes before training, in its own unit."""

    name: str
    done: int
    total: int


@dataclass(frozen=True)
class Started:
    """Training begins: so many steps in all."""

    steps: int


@dataclass(frozen=True)
class Plan:
    """What will be trained: the resolved run, the model, the data's sizes, and the machine's choice."""

    run: RunConfig
    model: ModelConfig
    parameters: int
    train_tokens: int
    valid_tokens: int
    data_bytes: int
    tokenizer: Tokenizer
    threads: int
    reason: str

    def lines(self) -> list[str]:
        """The plan in sentences."""
        m, t = self.model, self.run.train
        seen = (t.steps or 0) * (t.batch_size or 1) * (self.run.data.context or 1)
        epochs = seen / max(self.train_tokens, 1)
        return [
            f"data: {self.train_tokens:,} tokens to train, {self.valid_tokens:,} held out "
            f"({self.data_bytes / max(self.train_tokens, 1):.2f} bytes per token)",
            f"tokenizer: {self.tokenizer.kind}, {self.tokenizer.vocab_size:,} tokens",
            f"model: {m.kind}, {self.parameters:,} parameters, {m.n_layers} layers, d_model {m.d_model}, "
            f"{m.n_heads} heads, context {self.run.data.context}",
            f"training: {t.steps:,} steps of {t.batch_size} x {self.run.data.context} tokens, {t.optimizer}, "
            f"{epochs:.1f} passes over the data, {self.threads} thread{'s' * (self.threads != 1)}, {t.dtype}",
        ]


RunEvent = Event | Note | Phase | Plan | Started
OnEvent = Callable[[RunEvent], None]


@dataclass(frozen=True)
class RunResult:
    """A finished run: its folder, what was trained on what, how it ended. `result` is None after a dry run."""

    folder: Path
    plan: Plan
    data: Prepared
    result: Result | None


@dataclass(frozen=True)
class Launch:
    """How to start a run.

    Attributes:
        resume: `must` goes on from the newest good checkpoint, `auto` does so if there is one.
        override: allow changes to keys that may change when resuming.
        overwrite: throw away a run that is in the folder. force: take over a lock held on another host.
        dry_run: stop when the plan stands; nothing is written into the run folder.
    """

    resume: Resume = "never"
    override: bool = False
    overwrite: bool = False
    force: bool = False
    dry_run: bool = False


def default_output(run: RunConfig) -> Path:
    """Where a run goes that names no output: runs/ and the name of its data."""
    name = Path(run.data.path or "run").name.removesuffix(".gz")
    return Path("runs") / (Path(name).stem or "run")


def train(run: RunConfig | Mapping[str, Any], how: Launch | None = None, on_event: OnEvent | None = None) -> RunResult:
    """Train a model and leave a run folder that says everything about it.

    Args:
        run: a run config or its nested fields; what is None is chosen from data, budget and machine.
        how: resuming, overwriting, dry run.
        on_event: gets every event; see training.events and the dataclasses above.

    Raises:
        ConfigError, InputError, MachineError, DivergedError, Interrupted: see training.loop and data.
    """
    run = run if isinstance(run, RunConfig) else RunConfig(**run)
    how, say = how or Launch(), on_event or (lambda event: None)
    folder = Path(run.output) if run.output else default_output(run)
    if run.data.path is None:
        raise ConfigError("data.path", "missing", "a file or folder of text", "data.path=FILE")
    if how.dry_run:
        return _train(run, folder, how, say)
    is_new = not folder.exists()
    _claim(folder, how)
    try:
        with files.RunLock(folder, how.force, lambda line: say(Note(line))):
            if how.overwrite and how.resume == "never":
                _clear(folder)
            return _train(run, folder, how, say)
    except HeadwayError:
        if is_new and not any(folder.iterdir()):
            files.remove(folder)  # a corpus that cannot be read leaves no empty run behind
        raise


def _claim(folder: Path, how: Launch) -> None:
    """The folder can be written and holds nothing that would be lost. Raises MachineError (S4, S13)."""
    if how.resume == "never":
        # Only a lock in it: a run that was stopped before it began, or one that is running; RunLock knows.
        if not folder.is_dir() or any(entry.name != "run.lock" for entry in folder.iterdir()):
            files.check_target(folder, how.overwrite)
    elif how.resume == "must" and not list_checkpoints(folder):
        raise InputError(
            str(folder), "no checkpoint to resume from", "the folder of a run", "--resume auto starts afresh"
        )
    files.check_writable(folder)


def _clear(folder: Path) -> None:
    """Remove the files of an earlier run, and nothing else."""
    for name in _OWN:
        if (folder / name).exists():
            files.remove_tree(folder / name)


def _train(run: RunConfig, folder: Path, how: Launch, say: OnEvent) -> RunResult:
    tokenizer, data = _tokens(run, folder, how, say)
    device = torch.device(_device(run.train.device))
    limits = machine.probe(device.type)
    choice = machine.choose(limits)
    threads = run.train.threads or choice.threads
    torch.set_num_threads(threads)
    clock = partial(time_step, device=str(device), isolate=run.data.isolate)
    config, run = resolve(run, tokenizer.vocab_size, len(data.train.tokens), limits, clock)
    # What the budget bought is in train.steps now; a config that states both would be refused when it is read again.
    settled = {"budget": None, "train": run.train.model_copy(update={"threads": threads})}
    run = run.model_copy(update=settled)
    context, t = run.data.context, run.train
    assert context is not None and t.batch_size is not None and t.steps is not None
    torch.manual_seed(t.seed)
    model = Transformer(config).to(device)
    sizes = (len(data.train.tokens), len(data.valid.tokens), data.train.bytes)
    plan = Plan(run, config, sum(parameters(config).values()), *sizes, tokenizer, threads, choice.reason)
    say(plan)
    if how.dry_run:
        return RunResult(folder, plan, data, None)
    is_begun = how.resume != "never" and bool(list_checkpoints(folder))
    if not is_begun:
        _describe(folder, plan)

    def listen(event: Event) -> None:
        if isinstance(event, ResumeEvent):  # only now is it known that the changed config was accepted
            _describe(folder, plan, only_config=True)
        say(event)

    trainer = _trainer(plan, model, data, folder, listen, limits)
    say(Started(t.steps))
    return RunResult(folder, plan, data, trainer.fit(how.resume, how.override))


def _tokens(run: RunConfig, folder: Path, how: Launch, say: OnEvent) -> tuple[Tokenizer, Prepared]:
    """The corpus, its tokenizer (the run's own when resuming, loaded, or trained on the training side), its tokens."""
    d = run.data
    corpus = open_corpus(str(d.path), d.valid_path, d.val_fraction, read_options(d))
    say(Note(f"{corpus.path}: {len(corpus.files)} file{'s' * (len(corpus.files) != 1)}, {corpus.split}"))
    size = sum(file.stat().st_size for file in (*corpus.files, *corpus.valid_files))
    own = folder / TOKENIZER
    if how.resume != "never" and own.is_file() and list_checkpoints(folder):
        tokenizer = Tokenizer.load(own)
    elif run.tokenizer.path is not None:
        tokenizer = Tokenizer.load(run.tokenizer.path)
    else:
        tokenizer = _new_tokenizer(run, corpus, size, say)
    progress = partial(_phase, say, "tokens")
    place = machine.cache_folder() / "data"
    try:
        data = prepare(corpus, tokenizer, place, d.context or 1, progress)
    except MachineError:
        if how.dry_run or place.parent.exists():
            raise
        data = prepare(corpus, tokenizer, folder / "data", d.context or 1, progress)
    for line in data.lines:
        say(Note(f"note: {line}"))
    return tokenizer, data


def read_options(data: Data) -> ReadOptions:
    """How the files of a run become text."""
    return ReadOptions(data.encoding_errors, data.newline, data.skip_bad_rows, max_bytes=data.max_bytes)


def _new_tokenizer(run: RunConfig, corpus: Corpus, size: int, say: OnEvent) -> Tokenizer:
    wanted = run.tokenizer.vocab_size
    if wanted is None:
        wanted = default_vocab_size(size)
    kind = run.tokenizer.kind or "bpe"
    tokenizer = train_tokenizer(
        corpus.texts(),
        kind,
        wanted,
        special_tokens=run.tokenizer.special_tokens,
        progress=lambda what, done: say(Phase(f"tokenizer ({what})", done if what == "read" else size, size)),
    )
    if run.tokenizer.vocab_size is not None and tokenizer.vocab_size != wanted:
        say(Note(f"note: tokenizer has {tokenizer.vocab_size} tokens: the text gives no more ({wanted} wanted)"))
    return tokenizer


def default_vocab_size(size: int) -> int:
    """A power of two near the square root of the text's bytes, 512 to 32,768.

    Types grow about as the square root of the text (Heaps' law); a table much larger than that has rows that training
    hardly ever visits.
    """
    return min(max(1 << round(math.log2(max(size, 1)) / 2), 512), 32768)


def _phase(say: OnEvent, name: str, done: int, total: int) -> None:
    say(Phase(name, done, total))


def _device(wanted: str) -> str:
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted != "cpu" and not torch.cuda.is_available():
        raise MachineError("train.device", f"{wanted}, but this torch sees no GPU", "cpu", "train.device=cpu")
    return wanted


def _describe(folder: Path, plan: Plan, *, only_config: bool = False) -> None:
    """Write what the run is beside what it makes."""
    resolved = plan.run.model_copy(update={"output": str(folder)})
    texts = {CONFIG: dump_yaml(resolved.model_dump(mode="json"))}
    if not only_config:
        texts |= {MODEL: plan.model.to_json() + "\n", TOKENIZER: plan.tokenizer.to_json()}
    for name, text in texts.items():
        files.atomic_write(folder / name, text.encode())


def _trainer(
    plan: Plan, model: Transformer, data: Prepared, folder: Path, listen: Listener, limits: machine.Probe
) -> Trainer:
    run, t, tokenizer = plan.run, plan.run.train, plan.tokenizer
    assert run.data.context is not None and t.batch_size is not None
    special = tokenizer.special_ids
    sizes = token_byte_lengths(
        b"" if number in special else tokenizer.token_bytes(number) for number in range(tokenizer.vocab_size)
    )
    source = CausalLM(
        PackedBatches(data.train, run.data.context, t.batch_size, t.seed, run.data.isolate), tokenizer.hash
    )
    evaluation = partial(
        causal_evaluation,
        data.valid,
        run.data.context,
        t.batch_size,
        t.eval_windows,
        isolate=run.data.isolate,
        token_bytes=sizes,
    )
    hooks = Hooks(
        listener=listen,
        sample=partial(_sample, model, tokenizer, run) if t.sample_tokens else None,
        flops_per_token=training_flops(plan.model, run.data.context),
        peak_flops=limits.peak(t.dtype, plan.threads),
    )
    return Trainer(model, source, t, folder, evaluation, run.model_dump(mode="json"), hooks)


def _sample(model: Transformer, tokenizer: Tokenizer, run: RunConfig) -> str:
    """A continuation of train.sample_prompt, the same seed every time, so that samples show the model and not luck."""
    from headway.generation import GenerationOptions, generate

    t = run.train
    options = GenerationOptions(max_tokens=t.sample_tokens, seed=t.seed, echo=True, truncate="left")
    return generate(model, tokenizer, t.sample_prompt, options, on_error="return")[0].text
