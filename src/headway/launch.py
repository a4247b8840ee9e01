"""From a run config to a trained model: material -> recipe -> model -> loop.

Everything that can be wrong is looked at before anything long begins: the folder and its lock, the data (prepare.py),
the sizes, the config. `resume` starts from the run folder's own config.yaml.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from headway import files, machine
from headway.checkpoints.folder import CONFIG, MODEL, TOKENIZER, list_checkpoints
from headway.checkpoints.tensors import tensor_hash
from headway.config import ModelConfig
from headway.cost import forward_flops, parameters, training_flops
from headway.errors import ConfigError, HeadwayError, InputError
from headway.material import Material, training_device
from headway.nn import Transformer
from headway.nn.preferences import Preferences
from headway.plain_yaml import dump_yaml
from headway.prepare import material
from headway.run_config import Preference, RunConfig, Train, flatten
from headway.strict import dump_json, strict_json
from headway.text import Tokenizer
from headway.training.events import Event, Listener, ResumeEvent
from headway.training.first_look import look
from headway.training.forecast import Forecast, Probe, forecast
from headway.training.loggers import TENSORBOARD, WANDB, WANDB_RUN, check_loggers
from headway.training.loop import Hooks, Result, Resume, Trainer
from headway.training.proof import Proof, prove
from headway.training.recipe import resolve, time_step
from headway.training.teaching import check_teaching
from headway.training.throughput import resident_bytes
from headway.training.world import ALONE, World, joined
from headway.tuning.tuned import tuned
from headway.tuning_config import Frugal

_OWN = (MODEL, CONFIG, TOKENIZER, "checkpoints", "metrics.jsonl", "loss.svg", "loss.png", TENSORBOARD, WANDB, WANDB_RUN)


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
    """What will be trained: the resolved run, the model, what it is made of, and the machine's choice."""

    run: RunConfig
    model: ModelConfig
    parameters: int
    material: Material
    threads: int
    reason: str
    world: World = ALONE

    def lines(self) -> list[str]:
        """The plan in sentences."""
        m, t, made = self.model, self.run.train, self.material
        n_train, n_valid = made.sizes
        objective = self.run.objective
        if made.facts.rows is None:
            seen = (t.steps or 0) * (t.batch_size or 1) * (self.run.data.context or 1)
            ratio = f" ({made.bytes / max(n_train, 1):.2f} bytes per token)"
            rows = f"{t.batch_size} x {self.run.data.context} tokens"
        else:
            seen, ratio = round((t.steps or 0) * made.facts.rows_of_batch(t)), ""
            rows = f"{t.batch_size} {made.unit}"
            if t.batch_tokens is not None:
                rows = f"up to {t.batch_tokens:,} tokens, {made.facts.rows_of_batch(t):.1f} {made.unit} on average"
        words = made.tokenizer
        return [
            f"data: {n_train:,} {made.unit} to train, {n_valid:,} held out{ratio}",
            *([f"tokenizer: {words.kind}, {words.vocab_size:,} tokens"] if words is not None else []),
            *([f"classes: {', '.join(self.run.data.labels)[:100]}"] if self.run.data.labels else []),
            f"model: {m.kind}, {self.parameters:,} parameters, {m.n_layers} layers, d_model {m.d_model}, "
            f"{m.n_heads} heads, context {self.run.data.context}"
            + (f", from {self.run.base}" if self.run.base else ""),
            *([made.teacher.line] if made.teacher is not None else []),
            *(f"source: {share.line((t.steps or 0) * (t.batch_size or 1))}" for share in made.shares(self.run)),
            f"training: {objective.type if objective else ''}, {t.steps:,} steps of {rows}, {t.optimizer}, "
            f"{seen / max(n_train, 1):.1f} passes over the data, {self.threads} "
            f"thread{'s' * (self.threads != 1)}, {t.dtype}",
            *self._shares(),
        ]

    def _shares(self) -> list[str]:
        """How the rows of a batch are shared out among processes: none is dropped, none comes twice (D6)."""
        world, t = self.world, self.run.train
        if world.size == 1:
            return []
        rows, less = divmod(t.batch_size or 0, world.data_size)
        share = f"{rows}" if not less else f"{rows + 1} in {less} of them, {rows} in the others"
        share = share if t.batch_size else "as many as in the others, or one less"
        how = f"{t.strategy if world.tensor == 1 else 'fsdp'}" + (f", {world.tensor} to a row" * (world.tensor > 1))
        return [f"processes: {world.size} ({how}), rows of a batch in each: {share}; none dropped or padded"]


RunEvent = Event | Note | Phase | Plan | Started
OnEvent = Callable[[RunEvent], None]


@dataclass(frozen=True)
class RunResult:
    """A finished run: its folder, what was trained on what, how it ended. `result` is None after a dry run.

    `trained` counts the parameters that learn.
    """

    folder: Path
    plan: Plan
    result: Result | None
    proof: Proof | None = None
    trained: int = 0


@dataclass(frozen=True)
class Launch:
    """How to start a run.

    Attributes:
        resume: `must` goes on from the newest good checkpoint, `auto` does so if there is one.
        override: allow changes to keys that may change when resuming.
        overwrite: throw away a run that is in the folder. force: take over a lock held on another host.
        dry_run: stop when the plan stands; nothing is written into the run folder.
        prove: do so many steps again from the checkpoint before the newest, compare, and stop.
    """

    resume: Resume = "never"
    override: bool = False
    overwrite: bool = False
    force: bool = False
    dry_run: bool = False
    prove: int = 0


def default_output(run: RunConfig) -> Path:
    """Where a run goes that names no output: runs/ and the name of its data."""
    name = Path(run.data.path or ("mixture" if run.data.mixture else "run")).name.removesuffix(".gz")
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
    with joined(run.train.tensor_parallel, training_device(run.train.device), run.train.collective_timeout) as world:
        say = on_event if on_event is not None and world.is_first else (lambda event: None)
        world.check_same(partial(_facts, run))
        return _in_world(run, how or Launch(), say, world)


def _facts(run: RunConfig) -> dict[str, object]:
    """What must be the same in all processes before they read anything (D3)."""
    sources = sorted(Path(__file__).parent.rglob("*.py"))
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    return {**flatten(run.model_dump(mode="json")), "headway": code, "torch": torch.__version__}


def _in_world(run: RunConfig, how: Launch, say: OnEvent, world: World) -> RunResult:
    folder = Path(run.output) if run.output else default_output(run)
    if run.data.path is None and not run.data.mixture:
        raise ConfigError("data.path", "missing", "a file or folder of text", "data.path=FILE")
    if world.is_first:
        check_loggers(run.train.loggers)  # before the data, which may take long
    if how.dry_run or not world.is_first:
        return _train(run, folder, how, say, world)
    is_new = not folder.exists()
    _claim(folder, how)
    try:
        with files.RunLock(folder, how.force, lambda line: say(Note(line))):
            if how.overwrite and how.resume == "never":
                _clear(folder)
            return _train(run, folder, how, say, world)
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


def _train(run: RunConfig, folder: Path, how: Launch, say: OnEvent, world: World) -> RunResult:
    made = world.in_turn(
        lambda: material(
            run,
            folder,
            how.resume != "never",
            how.dry_run,
            lambda text: say(Note(text)),
            lambda name, done, total: say(Phase(name, done, total)),
        )
    )
    for line in made.lines:
        say(Note(f"note: {line}"))
    device = torch.device(training_device(run.train.device))
    if made.teacher is not None:
        made = replace(made, teacher=made.teacher.on(device))
    limits = machine.probe(device.type) if world.is_first else None
    config, run, reason = _settle(made, limits, world)
    torch.set_num_threads(run.train.threads or 1)
    machine.keep_memory()
    if made.teacher is not None:
        check_teaching(made.teacher.model.config, config)
    assert run.data.context is not None and run.train.steps is not None
    torch.manual_seed(run.train.seed)
    model = _model(config, made, run).to(device)
    world.check_same(lambda: {"weights": tensor_hash(model.state_dict())})
    plan = Plan(run, config, sum(parameters(config).values()), made, run.train.threads or 1, reason, world)
    say(plan)
    if how.dry_run:
        return RunResult(folder, plan, None)
    if how.prove:
        make = partial(_trainer, plan, model, limits=limits, world=world)
        return RunResult(folder, plan, None, prove(folder, make, how.prove))
    is_begun = how.resume != "never" and bool(list_checkpoints(folder))
    if not is_begun and world.is_first:
        _describe(folder, plan)

    def listen(event: Event) -> None:
        if isinstance(event, ResumeEvent):  # only now is it known that the changed config was accepted
            _describe(folder, plan, only_config=True)
        say(event)

    trainer = _trainer(plan, model, folder, listen, limits, world)
    world.check_same(lambda: trainer.source.identity)
    say(Started(run.train.steps))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return RunResult(folder, plan, trainer.fit(how.resume, how.override), trained=trained)


def _settle(made: Material, limits: machine.Probe | None, world: World) -> tuple[ModelConfig, RunConfig, str]:
    """Model, run with nothing open, and why so many threads: decided by the first process, since it takes time."""

    def decide() -> str:
        assert limits is not None
        choice = machine.choose(limits)
        beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        threads = made.run.train.threads or max(choice.threads // beside, 1)
        torch.set_num_threads(threads)
        device = training_device(made.run.train.device)

        def clock(model: ModelConfig, train: Train, context: int) -> float:
            share = -(-(train.batch_size or 1) // (train.accumulation * world.data_size)) * train.accumulation
            return time_step(
                model,
                train.model_copy(update={"batch_size": share}),
                context,
                device=device,
                trial=made.trial,
                teacher=made.teacher,
                make=partial(_model, made=made, run=made.run),
            )

        config, run = resolve(made.run, made.facts, limits, clock)
        # What budget and epochs gave is in train.steps now; a config that states both is refused when read again.
        settled = {"budget": None, "train": run.train.model_copy(update={"threads": threads, "epochs": None})}
        run = run.model_copy(update=settled)
        found = {"model": config.model_dump(mode="json"), "run": run.model_dump(mode="json"), "reason": choice.reason}
        return dump_json(found)

    found: Any = strict_json(world.told(decide), "plan")
    return ModelConfig(**found["model"]), RunConfig(**found["run"]), found["reason"]


def foretell(plan: Plan) -> Forecast:
    """What a planned run will take; runs a few steps on its own data."""
    run, made = plan.run, plan.material
    assert run.data.context is not None
    context, device, make = run.data.context, training_device(run.train.device), partial(_model, made=made, run=run)
    rows = math.ceil(made.facts.rows_of_batch(run.train) / run.train.accumulation) * run.train.accumulation
    train = run.train.model_copy(update={"batch_size": rows})
    importlib.import_module("torch._dynamo")  # as torch's first optimizer does: some 100 MB that are not here yet
    machine.return_memory()
    before, counts = resident_bytes(), machine.forget_peak() and device == "cpu"
    step = time_step(plan.model, train, context, device, trial=made.trial, teacher=made.teacher, make=make)
    probe = Probe(step, before, machine.peak_bytes() if counts else 0)
    return forecast(plan.model, train, context, made.trial, probe, made.facts.tokens, make)


def _model(config: ModelConfig, made: Material, run: RunConfig) -> Transformer:
    """The model as it begins."""
    model = _fresh(config, made) if run.frugal is None else _adapted(config, made, run.frugal)
    if isinstance(run.objective, Preference):
        model.preferences = Preferences(**run.objective.model_dump(include=set(Preferences._fields)))
    return model


def _fresh(config: ModelConfig, made: Material) -> Transformer:
    """A fresh model, with the weights of the base it is trained from in all parts but a head of another type."""
    model = Transformer(config)
    if made.base is not None:
        weights = made.base.model.state_dict()
        if config.head.type != made.base.config.head.type:
            weights = {name: tensor for name, tensor in weights.items() if not name.startswith("head.")}
        wanted = model.state_dict()
        fitting = {
            name: tensor for name, tensor in weights.items() if name in wanted and wanted[name].shape == tensor.shape
        }
        model.load_state_dict(fitting, strict=False)
    return model


def _adapted(config: ModelConfig, made: Material, tuning: Frugal) -> Transformer:
    """The base as it is, with what is trained."""
    assert made.base is not None
    return tuned(made.base.model, config, tuning, made.base.weights_sha256)


def _describe(folder: Path, plan: Plan, *, only_config: bool = False) -> None:
    """Write what the run is beside what it makes."""
    resolved = plan.run.model_copy(update={"output": str(folder)})
    texts = {CONFIG: dump_yaml(resolved.model_dump(mode="json"))}
    if not only_config:
        texts[MODEL] = plan.model.to_json() + "\n"
        if plan.material.tokenizer is not None:
            texts[TOKENIZER] = plan.material.tokenizer.to_json()
    for name, text in texts.items():
        files.atomic_write(folder / name, text.encode())


def _trainer(
    plan: Plan, model: Transformer, folder: Path, listen: Listener, limits: machine.Probe | None, world: World
) -> Trainer:
    run, t, made = plan.run, plan.run.train, plan.material
    assert run.data.context is not None
    writes = made.tokenizer is not None and run.objective is not None and run.objective.type == "causal-lm"
    hooks = Hooks(
        listener=listen,
        sample=partial(_sample, model, made.tokenizer, run) if writes and made.tokenizer and t.sample_tokens else None,
        flops_per_token=_flops(plan) if made.facts.rows is None else None,
        peak_flops=None if limits is None else limits.peak(t.dtype, plan.threads) * world.size,
    )
    source, evaluation = made.source(plan.model, run), partial(made.evaluation, plan.model, run)
    look(source, plan.model, None if made.tokenizer is None else made.tokenizer.bos_id)
    config = run.model_dump(mode="json")
    return Trainer(model, source, t, folder, evaluation, config, hooks, teacher=made.teacher, world=world)


def _flops(plan: Plan) -> float:
    """Of one token, a teacher's forward pass included."""
    context, teacher = plan.run.data.context or 1, plan.material.teacher
    taught = forward_flops(teacher.model.config, context) if teacher is not None else 0.0
    return training_flops(plan.model, context) + taught


def _sample(model: Transformer, tokenizer: Tokenizer, run: RunConfig) -> str:
    """A continuation of train.sample_prompt, the same seed every time, so that samples show the model and not luck."""
    from headway.generation import GenerationOptions, generate

    t = run.train
    options = GenerationOptions(max_tokens=t.sample_tokens, seed=t.seed, echo=True, truncate="left")
    return generate(model, tokenizer, t.sample_prompt, options, on_error="return")[0].text
