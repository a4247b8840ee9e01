"""The one training loop: every kind of model, every objective.

    batch --> passes --> gradients --> finite? spike? --> clip --> update --> event
      ^                                                              |
      +------ every so often: evaluate, save; a signal: save, stop --+

An update sees one batch in `accumulation` passes, each pass weighted by its share of the supervised tokens, so the
gradient is that of the mean loss per token of the whole batch, however it is cut. A step costs one look at the
device (loss and gradient norm together) beyond the mathematics, and each pass of a language model one to count its
labels. The loop decides by step numbers alone, never by
the clock, so that a run is the same whenever it is interrupted and resumed.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from headway import files
from headway.checkpoints.folder import (
    Found,
    checkpoint_path,
    clean_temporary,
    list_checkpoints,
    newest_good,
)
from headway.errors import ConfigError, DivergedError, InputError, Interrupted, MachineError
from headway.nn import Transformer
from headway.nn.heads import LanguageModelHead
from headway.run_config import Train
from headway.training import guards
from headway.training.averaging import Average, shown
from headway.training.diagnosis import first_nonfinite
from headway.training.evaluate import DTYPES, Evaluation, evaluate, precision, resting
from headway.training.events import (
    CheckpointEvent,
    EvalEvent,
    Event,
    HealthEvent,
    Listener,
    ResumeEvent,
    StepEvent,
    WarningEvent,
    number,
)
from headway.training.gradients import backward
from headway.training.health import gradient_norms, measure
from headway.training.loggers import Begin, Loggers, check_loggers
from headway.training.metrics import METRICS, MetricsLog, last_steps
from headway.training.objectives import BatchSource, TrainingBatch
from headway.training.optimizers import make_optimizer
from headway.training.parallel import Parallel
from headway.training.parts import local
from headway.training.plot import write_loss_curve
from headway.training.resume import Optimizer, Progress, RunState
from headway.training.schedules import scale
from headway.training.signals import StopSignals
from headway.training.teaching import Teacher, check_teaching
from headway.training.throughput import Meter, memory_reader
from headway.training.world import ALONE, World

Resume = Literal["never", "auto", "must"]
# Below this rate weights of usual size need not change in float32, and the check against saving twice the same
# weights (S10) would accuse an honest run.
_MOVING_RATE = 1e-6


@dataclass(frozen=True)
class Result:
    """How a run ended. `stopped` early: evaluations no longer improved. `first`: the step it began or went on at."""

    first: int
    step: int
    stopped: Literal["done", "early"]
    evaluation: Evaluation | None
    best_step: int | None
    tokens: int
    skipped: int
    spikes: int
    seconds: float
    checkpoint: Path


@dataclass(frozen=True)
class Hooks:
    """What the composing layer injects; training imports neither a display nor generation.

    Attributes:
        listener: gets every event. One whose output is closed (`| head`) is dropped, and training goes on.
        sample: text from the model at this moment, shown with an evaluation; the random state is put back after.
        flops_per_token: forward and backward, from the cost model.
        peak_flops: FLOPs per second that this machine was measured to reach.
    """

    listener: Listener | None = None
    sample: Callable[[], str] | None = None
    flops_per_token: float | None = None
    peak_flops: float | None = None


def configure(model: Transformer, train: Train, teacher: Teacher | None = None) -> None:
    """Have the model do in training what `train` asks of it.

    Raises ConfigError for a z-loss without a vocabulary, and for a teacher of something else.
    """
    if teacher is not None:
        check_teaching(teacher.model.config, model.config)
    model.teaching = None if teacher is None else teacher.teaching
    if train.z_loss and not isinstance(model.head, LanguageModelHead):
        found = f"{train.z_loss:g} with head {model.config.head.type}"
        raise ConfigError("train.z_loss", found, "a head over a vocabulary", "train.z_loss=0")
    model.head.smoothing, model.head.z_loss = train.label_smoothing, train.z_loss
    for stack in (model.encoder, model.decoder):
        if stack is not None:
            stack.recompute = train.checkpoint_activations


@dataclass
class Trainer:
    """Trains a model in a run folder.

    Attributes:
        model: on its device already; it is trained in place. With `train.ema` evaluations, samples and checkpoints are
            those of its averaged weights, while it holds those of the last step.
        source: the batches, as `train` has them.
        train: with `steps` and the rates set; `eval_every` or `checkpoint_every` None means: at the end only.
        folder: the run folder; the caller holds its files.RunLock.
        valid: starts a pass over the evaluation batches.
        config: the whole resolved config as JSON values; a resume compares it. Default: train and model.
        hooks: listener, sampler, and what throughput is measured against.
        optimizer: default optimizers.make_optimizer.
        teacher: on the model's device; nothing of it is saved but the hash of its weights.
        world: the processes that train together. The first of them writes and speaks; it holds the lock.
    """

    model: Transformer
    source: BatchSource
    train: Train
    folder: Path
    valid: Callable[[], Iterable[TrainingBatch]] | None = None
    config: Mapping[str, object] | None = None
    hooks: Hooks = field(default_factory=Hooks)
    optimizer: Optimizer | None = None
    teacher: Teacher | None = None
    world: World = ALONE

    def __post_init__(self) -> None:
        if self.train.steps is None:
            raise ConfigError("train.steps", "not set", "a number of updates", "train.steps=1000")
        self.steps = self.train.steps
        if self.world.is_first:
            check_loggers(self.train.loggers)
        self.device = next(self.model.parameters()).device
        configure(self.model, self.train, self.teacher)
        dtype = DTYPES[self.train.dtype]
        self._precision = partial(precision, self.train.dtype, self.device)
        self._parallel = Parallel(self.model, self.world, self.train.strategy)
        self._updater = self.optimizer or make_optimizer(self.model, self.model.config, self.train)
        plain = {"train": self.train.model_dump(mode="json"), "model": self.model.config.model_dump(mode="json")}
        self._average = Average(self.model, self.train.ema) if self.train.ema is not None else None
        identity = {**self.source.identity, **({"teacher": self.teacher.hash} if self.teacher is not None else {})}
        identity |= {"base": self.model.base_sha256} if self.model.base_sha256 else {}
        self._state = RunState(
            self._parallel, self._updater, self.config or plain, identity, dtype, self.device, self._average
        )
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.progress = Progress(scale=guards.LossScale.for_dtype(dtype))
        self._listener = self.hooks.listener if self.world.is_first else None
        self._log = MetricsLog(self.folder / METRICS, partial(self._warn, "metrics"))
        self._meter = Meter(self.hooks.flops_per_token, self.hooks.peak_flops, memory_reader(self.device))
        self._is_stopped = False
        self._norms: dict[str, float] = {}  # of the last gradient before an evaluation, by part
        self._saved: tuple[int, int] | None = None  # (step, evaluated) of the newest checkpoint
        self._evaluation: Evaluation | None = None
        self._rows = self._length = 0  # of the last batch, for the estimate when memory runs out

    # --- a run from start to end ---------------------------------------------------------------------------------

    def fit(self, resume: Resume = "never", override: bool = False) -> Result:
        """Train to the last step, or until evaluations stop improving, and save.

        Args:
            resume: `never` begins at step 0 in a folder without checkpoints; `must` goes on from the newest
                checkpoint that verifies; `auto` does that where there is one and says so where there is none.
            override: allow the changes of config that resume.OVERRIDABLE lists.

        Raises:
            ConfigError: resumed with another config. InputError: with other data, or nothing to resume.
            MachineError: the folder cannot be written (before the first step), or memory runs out.
            DivergedError: a loss or gradient is not finite, or too many updates in a row were thrown away.
            Interrupted: a signal; the run is saved.
        """
        began = time.monotonic()
        with StopSignals(self._what_stands) as signals:
            self._begin(resume, override)
            first = self.progress.step
            self.model.train()
            try:
                self._loop(signals)
            except DivergedError as error:
                self._warn("diverged", str(error))
                raise
            finally:
                if self.world.is_first:
                    self._close_logs()
                    if signals.caught is None or self._is_saved():
                        self._draw()
                if self._is_stopped:
                    self.world.wait()  # who ends first must not look like a failure to what watches the others
        p = self.progress
        early = p.step < self.steps
        return Result(
            first=first,
            step=p.step,
            stopped="early" if early else "done",
            evaluation=self._evaluation,
            best_step=p.best_step,
            tokens=p.tokens,
            skipped=p.skipped,
            spikes=p.spikes,
            seconds=time.monotonic() - began,
            checkpoint=checkpoint_path(self.folder, p.step),
        )

    def replay(self, start: Found, last: int) -> dict[str, dict[str, Tensor]]:
        """Do the steps after a checkpoint again up to step `last`, saving nothing; the tensors a save would write."""
        self.progress, _ = self._state.restore(start, override=True)
        self.model.train()
        while self.progress.step < last:
            self._update()
        return self._state.capture(self.progress)[0]

    def _loop(self, signals: StopSignals) -> None:
        p = self.progress
        while True:
            if self._evaluation_due():
                with self._naming_memory():
                    self._evaluate(signals)
            is_over = p.step >= self.steps or self._is_stale()
            if is_over or self._save_due():
                self._save()
            if is_over:
                return
            caught = self._agreed(signals)
            if caught is not None:
                self._save()
                self._is_stopped = True
                name = f"signal {caught}"
                found = f"stopped after step {p.step} of {self.steps}, saved in {self._what_stands()}"
                raise Interrupted(caught, name, found, "--resume goes on from there")
            with self._naming_memory():
                self._update()

    def _begin(self, resume: Resume, override: bool) -> None:
        """Look before the leap: a folder that can be written, and the state to start from."""
        weights = sum(p.numel() * p.element_size() for p in self._parameters)
        if self.world.is_first:
            files.check_writable(self.folder, need=3 * weights)
            for orphan in clean_temporary(self.folder):
                self._warn("orphan", f"removed {orphan.name}, left unfinished by a killed run")
        self.world.wait()
        found = self._find(resume)
        seen = None if found is None else last_steps(self.folder / METRICS)
        if found is None:
            torch.manual_seed(self.train.seed)
            self._open_loggers(seen)
            return
        for reason in found.rejected:
            self._warn("rejected", f"passed over a broken checkpoint: {reason}")
        self.progress, said = self._state.restore(found, override)
        self._saved = (self.progress.step, self.progress.evaluated)
        self._open_loggers(seen)
        self._emit(ResumeEvent(self.progress.step, found.path))
        for line in said:
            self._warn("resume", line)

    def _open_loggers(self, seen: Mapping[str, int] | None) -> None:
        if self.world.is_first:
            begin = Begin(self.folder, self._state.config, self.progress.step, seen)
            self._loggers = Loggers(self.train.loggers, begin, partial(self._warn, "logger"))
            self._log.then = self._loggers.send

    def _close_logs(self) -> None:
        self._log.flush()
        self._loggers.close()
        self._log.flush()  # what closing had to say

    def _find(self, resume: Resume) -> Found | None:
        if resume == "never":
            there = list_checkpoints(self.folder)
            if there:
                found = f"holds checkpoints up to step {there[-1][0]}"
                raise MachineError(str(self.folder), found, "a new run folder", "--resume, or another --output")
            return None
        try:
            return newest_good(self.folder)
        except InputError as error:
            if resume == "must":
                raise
            self._warn("fresh", f"nothing to resume, starting at step 0 ({error.found})")
            return None

    # --- one update ----------------------------------------------------------------------------------------------

    def _update(self) -> None:
        p = self.progress
        self.world.seed(self.train.seed, p.step)
        batch = self.source.batch(p.step)
        tokens, loss, norm = self._gradients(batch)
        rate = scale(p.step, self.train)
        applied = tokens > 0 and self._judge(loss, norm, batch)
        if applied:
            self._apply(norm, rate)
            p.moved |= rate * max(self.train.lr or 1.0, self.train.muon_lr or 0.0) > _MOVING_RATE
        else:
            p.skipped += 1
        self._updater.zero_grad()
        p.step += 1
        p.tokens += tokens
        self._meter.add(tokens)
        self._emit(
            StepEvent(
                p.step,
                number(loss) if tokens else None,
                rate * (self.train.lr or 0.0),
                number(norm) if tokens else None,
                tokens,
                self._meter.tokens_per_second,
                self._meter.share_of_peak,
                self._meter.memory,
                self._meter.eta(self.steps - p.step),
                applied,
            )
        )

    def _gradients(self, batch: TrainingBatch) -> tuple[int, float, float]:
        """(supervised tokens, mean loss, gradient norm); gradients are left scaled by the loss scale."""
        world = self.world
        passes = batch.split(self.train.accumulation * world.data_size)
        self._length = batch.inputs["input_ids"].shape[1] if "input_ids" in batch.inputs else 0
        self._rows = len(batch.inputs["labels"])
        scale = None if self.progress.scale.fixed else self.progress.scale.value
        tokens, total = backward(self._parallel, passes, self._precision, scale)
        if total is None:
            return 0, 0.0, 0.0
        if self._evaluates(self.progress.step + 1) and not self._parallel.is_sharded:
            self._norms = gradient_norms(self.model, self.progress.scale.value)
        mean, square = world.sums(total / world.tensor, self._parallel.square())  # the step's one wait for the device
        return tokens, mean, math.sqrt(square) / self.progress.scale.value

    def _judge(self, loss: float, norm: float, batch: TrainingBatch) -> bool:
        """Whether the update may be made. Raises DivergedError if the run must not go on."""
        p = self.progress
        if math.isfinite(loss) and math.isfinite(norm):
            p.streak = 0
            limit = p.watch.see(loss)
            if limit is None:
                return True
            p.spikes += 1
            skips = self.train.on_spike == "skip"
            text = f"loss {loss:.4g} above {limit:.4g}, six sigma over its recent mean"
            self._warn("spike", text + (": update skipped" if skips else ""), p.step + 1)
            return not skips
        p.streak += 1
        what = guards.describe_nonfinite(loss, norm, batch.sample_ids)
        if p.scale.fixed:  # what overflows in float16 is no riddle
            _, own = self.world.share(batch.split(self.train.accumulation * self.world.data_size))
            what += first_nonfinite(self._parallel, [inputs for inputs, _ in own], self._precision)
        if p.scale.fixed and self.train.on_nonfinite == "stop":
            fix = "a lower train.lr, or --resume --override train.on_nonfinite=skip"
            found = f"{what}; the weights are those of step {p.step}, {self._what_stands()}"
            raise DivergedError(f"step {p.step + 1}", found, "finite numbers", fix)
        if p.streak >= guards.STREAK:
            found = f"{p.streak} updates in a row skipped, {p.skipped + 1} in all: {what}; {self._what_stands()}"
            raise DivergedError(f"step {p.step + 1}", found, "finite numbers", "a lower train.lr, or another dtype")
        kind = "nonfinite" if p.scale.fixed else "overflow"
        p.scale.overflowed()
        self._warn(kind, f"update skipped: {what}", p.step + 1)
        return False

    def _apply(self, norm: float, rate: float) -> None:
        p = self.progress
        factor = 1.0 / p.scale.value
        if self.train.clip and norm > self.train.clip:
            factor *= self.train.clip / norm
        if factor != 1.0:
            torch._foreach_mul_([local(p.grad) for p in self._parameters if p.grad is not None], factor)
        self._updater.step(rate)
        if self._average is not None:
            self._average.update()
        p.scale.held()

    @contextlib.contextmanager
    def _naming_memory(self) -> Iterator[None]:
        """Out of memory becomes one sentence (R3). Nothing is saved: the update may be half made."""
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not guards.is_out_of_memory(error):
                raise
            length = self._length or self.model.config.max_len
            train = self.train.model_copy(update={"batch_size": self.train.batch_size or self._rows})
            estimate = guards.estimate_memory(self.model.config, train, self._parameters, length)
            raise guards.out_of_memory(self.progress.step + 1, estimate, train) from error

    # --- between updates -----------------------------------------------------------------------------------------

    def _evaluation_due(self) -> bool:
        return self.progress.evaluated != self.progress.step and self._evaluates(self.progress.step)

    def _evaluates(self, step: int) -> bool:
        every = self.train.eval_every
        return self.valid is not None and (step == self.steps or (every is not None and step > 0 and step % every == 0))

    def _save_due(self) -> bool:
        p, every = self.progress, self.train.checkpoint_every
        keeps_best = self.train.early_stop is not None and p.best_step == p.step
        return keeps_best or (every is not None and p.step > 0 and p.step % every == 0)

    def _is_stale(self) -> bool:
        return self.train.early_stop is not None and self.progress.stale >= self.train.early_stop

    def _evaluate(self, signals: StopSignals) -> None:
        assert self.valid is not None
        p = self.progress
        with shown(self._average):
            found = evaluate(
                self._parallel, self.valid(), self.device, self._precision, lambda: self._agreed(signals) is not None
            )
            if found is None:
                return
            text = self._sample()
            health = self._health()
        loss = number(found.loss)
        is_best = loss is not None and (p.best_loss is None or loss < p.best_loss)
        if is_best:
            p.best_loss, p.best_step, p.stale = loss, p.step, 0
        else:
            p.stale += 1
        p.evaluated, self._evaluation = p.step, found
        sources = None if found.sources is None else {name: number(one) for name, one in found.sources.items()}
        bits = number(found.bits_per_byte)
        self._emit(EvalEvent(p.step, loss, bits, found.tokens, is_best, text, sources, found.rewards))
        if health is not None:
            self._emit(health)
        self._meter.restart()

    def _health(self) -> HealthEvent | None:
        """How the model is inside, from the first rows that are held out; not where processes share its weights out."""
        first = next(iter(self.valid()), None) if self.valid is not None else None
        if first is None or not self.world.is_first or self._parallel.is_sharded:
            return None
        norms, self._norms = self._norms, {}
        return HealthEvent(self.progress.step, norms, *measure(self.model, first.inputs, self._precision))

    def _sample(self) -> str | None:
        if self.hooks.sample is None or not self.world.is_first or self._parallel.is_sharded:
            return None
        with resting(self.model, self.device):
            return self.hooks.sample()

    def _is_saved(self) -> bool:
        return self._saved == (self.progress.step, self.progress.evaluated)

    def _save(self) -> None:
        """Save unless this very state stands already. A step that was saved before its evaluation is replaced."""
        p = self.progress
        if self._is_saved():
            return
        guards.check_finite_weights(self.model, p.step)
        began = time.monotonic()
        protected = [p.best_step] if self.train.early_stop is not None and p.best_step is not None else []
        path = self._state.save(
            self.folder,
            p,
            keep=self.train.keep_checkpoints,
            protect=protected,
            moved=p.moved,
            overwrite=self._saved is not None and self._saved[0] == p.step,
        )
        self._saved, p.moved = (p.step, p.evaluated), False
        self._emit(CheckpointEvent(p.step, path, time.monotonic() - began))
        if self.world.is_first:
            self._log.flush()
        self._meter.restart()

    def _agreed(self, signals: StopSignals) -> int | None:
        """The signal that any process caught; all of them stop at the same step. A missing launcher counts as one."""
        own = signals.caught or (signal.SIGTERM if self.world.is_deserted() else 0)
        return self.world.any(own) or None

    def _what_stands(self) -> str:
        if self._saved is None:
            return "no checkpoint yet"
        return f"checkpoint {checkpoint_path(self.folder, self._saved[0])}"

    def _draw(self) -> None:
        try:
            write_loss_curve(self.folder)
        except (MachineError, InputError) as error:
            self._warn("plot", f"no loss curve: {error}")

    def _warn(self, kind: str, text: str, step: int | None = None) -> None:
        self._emit(WarningEvent(self.progress.step if step is None else step, kind, text))

    def _emit(self, event: Event) -> None:
        if not self.world.is_first:
            return
        self._log.add(event)
        if self._listener is None:
            return
        try:
            self._listener(event)
        except (BrokenPipeError, ValueError) as error:
            if isinstance(error, ValueError) and "closed file" not in str(error):
                raise
            self._listener = None  # `headway train ... | head`: the reader has gone, the run has not
            self._warn("display", "the output was closed; training goes on without a display")
