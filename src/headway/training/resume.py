"""The state of a run as files, and the checks before a run goes on from them.

    step-00000100/model.safetensors       weights, with train.ema their running average
    step-00000100/optimizer.safetensors   the optimizer's tensors and the random generators' states, with train.ema
                                          the weights of the last step
    step-00000100/state.json              where those belong, the progress, the config, the data's identity

Everything that the next step depends on is here, and the data cursor is one number, so that resuming replays
nothing and k + (2k - k) steps give the bytes of 2k steps (R7). What differs from the saved run is refused,
allowed on demand, or reported, by `FREE` and `OVERRIDABLE` below (R9, R10, R11).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Unpack, cast

import torch
from torch import Tensor

from headway import files
from headway.checkpoints.folder import WEIGHTS, Found, SaveOptions, checkpoint_path, save_checkpoint
from headway.checkpoints.shards import SHARED_HASH, read_group, write_shares
from headway.checkpoints.state import flatten_state, unflatten_state
from headway.checkpoints.tensors import tensor_hash
from headway.errors import ConfigError, InputError
from headway.nn import Transformer
from headway.run_config import WHOLE
from headway.strict import dump_json, strict_json
from headway.training.averaging import Average, shown
from headway.training.guards import LossScale, SpikeWatch
from headway.training.parallel import Parallel
from headway.training.parts import local, part

OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"

# Where a file lies does not matter, what it holds and its share are compared by hash; threads, dtype, device are R11's.
FREE = {"output", "data.path", "data.mixture", "tokenizer.path", "distill.teacher"}
FREE |= {"train.threads", "train.dtype", "train.device"}
FREE |= {"train.checkpoint_activations"}  # memory for time, to the same bits
FREE |= {"train.loggers"}
FREE |= {"train.strategy", "train.tensor_parallel", "train.collective_timeout"}  # how processes share the work
# Changing these gives another run than the one begun, but a meaningful one; hence only on demand.
OVERRIDABLE = {"budget", "data.valid_path"} | {
    f"train.{name}"
    for name in (
        *("steps", "epochs", "warmup", "schedule", "decay", "final_lr", "lr", "muon_lr", "weight_decay", "clip"),
        *("accumulation", "eval_every", "eval_windows", "eval_rows", "checkpoint_every", "keep_checkpoints"),
        *("early_stop", "on_nonfinite", "on_spike", "sample_prompt", "sample_tokens"),
    )
}


class Optimizer(Protocol):
    """What the loop asks of an optimizer; see optimizers.Optimizer."""

    def step(self, scale: float) -> None:
        """Update every parameter at `scale` times its peak rate."""

    def zero_grad(self) -> None:
        """Forget the gradients."""

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on, as nested tensors and numbers."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""


@dataclass
class Progress:
    """How far a run is, in numbers that are the same in every run of the same config.

    Attributes:
        step: updates done or skipped; also the data cursor.
        tokens: supervised tokens seen.
        skipped, streak: updates thrown away, in all and in a row.
        spikes: losses above six sigma.
        evaluated: the step of the last complete evaluation, -1 before the first.
        best_loss, best_step, stale: the best evaluation so far, and evaluations since.
        moved: whether updates since the last checkpoint can have changed the weights.
    """

    step: int = 0
    tokens: int = 0
    skipped: int = 0
    streak: int = 0
    spikes: int = 0
    evaluated: int = -1
    best_loss: float | None = None
    best_step: int | None = None
    stale: int = 0
    moved: bool = False
    watch: SpikeWatch = field(default_factory=SpikeWatch)
    scale: LossScale = field(default_factory=LossScale)


@dataclass(frozen=True)
class RunState:
    """The parts of a run that a checkpoint takes in; `config` is plain JSON, `identity` the data's hashes.

    With an `average` the model's file holds that and not the weights of the last step.
    """

    parallel: Parallel
    optimizer: Optimizer
    config: Mapping[str, object]
    identity: Mapping[str, str]
    dtype: torch.dtype
    device: torch.device
    average: Average | None = None

    @property
    def environment(self) -> dict[str, object]:
        """What decides the last bits of a sum besides the config."""
        return {
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
            "processes": self.parallel.world.size,
        }

    def capture(
        self, progress: Progress
    ) -> tuple[dict[str, dict[str, Tensor]], dict[str, files.Content], dict[str, object]]:
        """Tensors by file, other files, and the manifest's meta, for folder.save_checkpoint; all processes at once."""
        random = random_state(self.device)
        parts = {"optimizer": self.optimizer.state(), "random": random}
        if self.average is not None:
            parts["average"] = self.average.state()
        tensors, tree = flatten_state(parts)
        state = {
            "tree": tree,
            "progress": flatten_state({**asdict(progress), "moved": False})[1],
            "config": self.config,
            "identity": dict(self.identity),
        }
        meta = {
            "config": hashlib.sha256(dump_json(self.config, sort_keys=True).encode()).hexdigest(),
            "identity": dict(self.identity),
            "random": {name: hashlib.sha256(bytes(value.tolist())).hexdigest() for name, value in random.items()},
            "cursor": progress.step,
            "preset": self.config.get("preset"),
            **self.environment,
        }
        with shown(self.average):
            weights = self.parallel.state()
            if self.parallel.is_sharded and self.average is not None:
                weights = {name: tensor.clone() for name, tensor in weights.items()}
            groups = {WEIGHTS: weights, OPTIMIZER: tensors}
        return groups, {STATE: dump_json(state).encode()}, meta

    def save(self, run: Path, progress: Progress, **options: Unpack[SaveOptions]) -> Path:
        """A checkpoint of this moment; where processes share the tensors out, each writes its own.

        Raises what save_checkpoint raises, in the first process.
        """
        tensors, others, meta = self.capture(progress)
        world, step = self.parallel.world, progress.step
        if not self.parallel.is_sharded:
            if world.is_first:
                save_checkpoint(run, step, tensors, meta, others=others, **options)
        elif world.is_first:
            shares = partial(self._write_shares, tensors)
            save_checkpoint(run, step, {}, meta, others=others, shares=shares, **options)
        else:
            self._write_shares(tensors, None)
        world.wait()
        return checkpoint_path(run, step)

    def _write_shares(self, groups: Mapping[str, Mapping[str, Tensor]], folder: Path | None) -> str:
        """Every process's shares, into the first one's folder; what stands for the hash of the weights."""
        world = self.parallel.world
        write_shares(Path(world.told(lambda: str(folder))), groups)
        own = tensor_hash({name: local(tensor) for name, tensor in groups[WEIGHTS].items()})
        return SHARED_HASH + hashlib.sha256("".join(world.texts(own)).encode()).hexdigest()

    def restore(self, found: Found, override: bool) -> tuple[Progress, list[str]]:
        """Put a verified checkpoint back; the progress, and what a person should know.

        Raises ConfigError for a changed config (R9), InputError for other data (R10) or a foreign folder.
        """
        where = str(found.path / STATE)
        state = strict_json(files.read_bytes(found.path / STATE), where)
        if not isinstance(state, dict) or {"tree", "progress", "config", "identity"} - set(state):
            raise InputError(where, "not the state of a training run", "a checkpoint that train wrote")
        said = check_config(state["config"], self.config, override)
        check_identity(state["identity"], self.identity)
        said += compare_environment(found.manifest.meta, self.environment)
        model = self.parallel.model
        with shown(self.average):
            weights = read_group(found.path, WEIGHTS, ties=model.ties)
            load_weights(model, weights, str(found.path / WEIGHTS))
        tensors = read_group(found.path, OPTIMIZER, copy=True)
        tree = cast(dict[str, Any], unflatten_state(tensors, state["tree"], where))
        self.optimizer.load_state(tree["optimizer"])
        if self.average is not None:
            self.average.load_state(tree["average"])
        restore_random(tree["random"], self.device)
        saved = cast(dict[str, Any], unflatten_state({}, state["progress"], where))
        watch, scale = SpikeWatch(**saved.pop("watch")), LossScale(**saved.pop("scale"))
        if scale.fixed != (self.dtype is not torch.float16):  # resumed in another dtype (R11)
            scale = LossScale.for_dtype(self.dtype)
        return Progress(**saved, watch=watch, scale=scale), said


def random_state(device: torch.device) -> dict[str, Tensor]:
    """States of the generators that a step draws from: torch's own, and the GPU's."""
    states = {"cpu": torch.get_rng_state()}
    return states if device.type == "cpu" else {**states, "cuda": torch.cuda.get_rng_state(device)}


def restore_random(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Put back what random_state gave."""
    torch.set_rng_state(states["cpu"])
    if device.type != "cpu" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


@torch.no_grad()
def load_weights(model: Transformer, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copy tensors into a model, or this process's parts. Raises InputError for a missing or misshaped one too many."""
    own = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    wanted = {name: tuple(tensor.shape) for name, tensor in model.own_state().items()}
    given = getattr(tensors, "shapes", None) or {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = [name for name in sorted({*wanted, *given}) if wanted.get(name) != given.get(name)]
    if wrong:
        first = f"{wrong[0]} {given.get(wrong[0], 'missing')} for {wanted.get(wrong[0], 'no such tensor')}"
        raise InputError(where, f"{len(wrong)} tensors do not fit, {first}", "the tensors of this model's config")
    for name in wanted:
        local(own[name]).copy_(part(tensors[name], own[name]))


# --- what may differ -------------------------------------------------------------------------------------------


def _flat(value: object, path: str = "") -> dict[str, object]:
    if isinstance(value, Mapping) and (value or not path) and path not in WHOLE:
        inner = [_flat(item, f"{path}.{key}".lstrip(".")) for key, item in value.items()]
        return {key: item for part in inner for key, item in part.items()}
    return {path: value}


def config_changes(saved: object, now: object) -> dict[str, str]:
    """{dotted key: `old -> new`} for each value that differs."""
    old, new = _flat(saved), _flat(now)
    return {
        key: f"{old.get(key, 'unset')} -> {new.get(key, 'unset')}"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key) or (key in old) != (key in new)
    }


def check_config(saved: object, now: object, override: bool) -> list[str]:
    """Compare configs (R9). Returns what was overridden.

    Raises ConfigError with the whole diff when a key differs that may not, or may only with `override`.
    """
    changes = {key: change for key, change in config_changes(saved, now).items() if key not in FREE}
    barred = [key for key in changes if key not in OVERRIDABLE]
    if changes and (barred or not override):
        diff = "; ".join(f"{key}: {change}" for key, change in changes.items())
        fix = f"undo {', '.join(barred)}, or start another run with another --output" if barred else "add --override"
        raise ConfigError("--resume", f"the config has changed: {diff}", "the saved run's config", fix)
    return [f"{key} overridden: {change}" for key, change in changes.items()]


def check_identity(saved: Mapping[str, object], now: Mapping[str, str]) -> None:
    """Refuse other data or another tokenizer (R10). Raises InputError with both hashes."""
    for name in sorted({*saved, *now}):
        if saved.get(name) != now.get(name):
            fix = f"restore the {name} of the saved run, or start another run with another --output"
            raise InputError(name, f"hash {now.get(name)}", f"{saved.get(name)}, that of the saved run", fix)


def compare_environment(saved: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """One sentence if the resumed run need not give the same bytes as the uninterrupted one (R11)."""
    differ = [f"{name} {saved.get(name)} -> {now[name]}" for name in now if saved.get(name) != now[name]]
    return [f"resumed with {', '.join(differ)}: not byte-equal to an uninterrupted run"] if differ else []
