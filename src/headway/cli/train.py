"""`headway train`: a model from text. `headway train data.path=book.txt budget=3m` is enough."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from headway.cli import workers
from headway.cli.options import Common, arguments, option
from headway.cli.output import Printer, duration
from headway.errors import ConfigError

if TYPE_CHECKING:
    from headway.launch import RunResult
    from headway.run_config import Resolved
    from headway.training.proof import Proof

# Flags that set a key of the run config.
_KEYS = {
    **{name: f"data.{name}" for name in ("context", "val_fraction", "encoding_errors", "newline", "skip_bad_rows")},
    **{name: f"train.{name}" for name in ("seed", "device", "dtype", "threads")},
    "output": "output",
}
# What these two decided stands in the saved config as train.steps and the model's sizes; when the same command line is
# used to resume, they are not asked again.
_SETTLED = ("budget", "model.depth")


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """What `headway train` takes besides the keys of the run config."""

    config: Annotated[list[str] | None, option(help="A YAML file; repeat for several, later ones win.")] = None
    output: Annotated[str | None, option(help="The run folder [runs/ and the data's name].")] = None
    resume: Annotated[
        bool, option("--resume", help="Go on where the run stopped; `--resume auto`: if it ever began.")
    ] = False
    override: Annotated[bool, option("--override", help="Resume with changed keys that may change.")] = False
    overwrite: Annotated[bool, option("--overwrite", help="Throw away a run that is in the folder.")] = False
    force: Annotated[bool, option("--force", help="Take over a lock that another host left.")] = False
    dry_run: Annotated[bool, option("--dry-run", help="Show what would be trained, and stop.")] = False
    show_batch: Annotated[
        bool,
        option("--show-batch", help="Show the first batch and what is learned in it, and stop; FILE.html: as a page."),
    ] = False
    prove: Annotated[
        int | None, option(help="With --resume: do N steps again from the last checkpoint but one, compare, and stop.")
    ] = None
    print_config: Annotated[bool, option("--print-config", help="Show every key, its value and where it is from.")] = (
        False
    )
    context: Annotated[int | None, option(help="Tokens in a training window (data.context).")] = None
    val_fraction: Annotated[float | None, option(help="Share held out (data.val_fraction).")] = None
    encoding_errors: Annotated[str | None, option(help="strict, replace or skip (data.encoding_errors).")] = None
    newline: Annotated[str | None, option(help="keep or lf (data.newline).")] = None
    skip_bad_rows: Annotated[bool | None, option("--skip-bad-rows", help="Leave out broken JSONL rows.")] = None
    seed: Annotated[int | None, option(help="The same seed, the same run (train.seed).")] = None
    device: Annotated[str | None, option(help="auto, cpu or cuda (train.device).")] = None
    dtype: Annotated[str | None, option(help="auto, float32, bfloat16 or float16 (train.dtype).")] = None
    threads: Annotated[int | None, option(help="Threads of the CPU (train.threads).")] = None
    nproc: Annotated[int | None, option(help="Processes of this machine that train together.")] = None

    @property
    def keys(self) -> list[str]:
        """Overrides of the run config: free words, then flags."""
        flags = [(key, getattr(self, name)) for name, key in _KEYS.items()]
        return [*self.overrides, *(f"{key}={quoted(value)}" for key, value in flags if value is not None)]


def quoted(value: object) -> str:
    """A scalar as it stands behind `key=`."""
    from headway.strict import dump_json

    return dump_json(value)  # JSON scalars are YAML: a folder named 123 or `a: b` stays a string


def _places(options: Options) -> tuple[list[Path], str | None]:
    """Config files among the free words, and the run folder if one is named there."""
    configs = [Path(name) for name in options.config or []]
    folder = None
    for word in options.paths:
        if (word == "auto" and options.resume) or (word.endswith(".html") and options.show_batch):
            continue
        if word.endswith((".yaml", ".yml", ".json")):
            configs.append(Path(word))
        elif folder is None and options.resume:
            folder = word
        else:
            raise ConfigError(
                word, "neither an override nor a config file", "key=value or FILE.yaml", f"data.path={word}"
            )
    return configs, folder


def read_config(options: Options) -> tuple[Resolved, Literal["never", "auto", "must"]]:
    """The run config of a command line; when resuming, what the run folder says comes first.

    Raises ConfigError, InputError.
    """
    from headway.checkpoints.folder import CONFIG, list_checkpoints
    from headway.launch import default_output
    from headway.run_config import flatten, load_run

    configs, folder = _places(options)
    keys = options.keys + ([f"output={quoted(folder)}"] if folder else [])
    resolved = load_run(configs, keys)
    if not options.resume:
        return resolved, "never"
    place = Path(resolved.run.output) if resolved.run.output else default_output(resolved.run)
    if list_checkpoints(place) and (place / CONFIG).is_file():
        values = flatten(resolved.run.model_dump(mode="json"))
        given = [f"{key}={quoted(values[key])}" for key in resolved.origins if key in values and key not in _SETTLED]
        resolved = load_run([place / CONFIG], [*given, f"output={quoted(str(place))}"], {})
    return resolved, "auto" if "auto" in options.paths else "must"


def run(options: Options) -> int:
    """Resolve, train, and say what to do next; with several processes, start them. The exit code."""
    printer = Printer(json=options.json)
    resolved, resume = read_config(options)
    if options.nproc is not None and not workers.is_worker():
        return workers.start(["train", *arguments(replace(options, nproc=None))], options.nproc)
    if options.print_config:
        _print_config(printer, resolved)
        return 0
    from headway.cli.display import Display
    from headway.launch import Launch, train

    if options.prove is not None and (resume == "never" or options.prove < 1):
        raise ConfigError("--prove", f"{options.prove} steps of a new run", "steps of a run", "--resume RUN --prove 20")
    dry_run, prove = options.dry_run or options.show_batch, options.prove or 0
    how = Launch(resume, options.override, options.overwrite, options.force, dry_run, prove)
    with Display() as display:
        done = train(resolved.run, how, display)
    if not workers.is_first():
        return 0
    if options.show_batch:
        _show_batch(done, next((word for word in options.paths if word.endswith(".html")), ""), printer)
    printer.result(summary(done))
    if done.result is not None:
        _next(printer, done)
    elif done.proof is not None:
        printer.say(_proven(done.proof))
    else:
        printer.say("nothing was trained (--dry-run)")
    return 0


def _show_batch(done: RunResult, where: str, printer: Printer) -> None:
    from headway.cli.show_batch import show

    made, run, model = done.plan.material, done.plan.run, done.plan.model
    batch = made.source(model, run).batch(0)
    shifted = model.kind == "decoder" and model.head.type == "causal-lm"
    show(batch, made.tokenizer, run.data.labels, shifted, where, printer)


def summary(done: RunResult) -> dict[str, object]:
    """A run as JSON values."""
    from headway.machine import peak_bytes

    run, result, made = done.plan.run, done.result, done.plan.material
    out: dict[str, object] = {
        "run": str(done.folder),
        "parameters": done.plan.parameters,
        f"train_{made.unit}": made.sizes[0],
        f"valid_{made.unit}": made.sizes[1],
        "config": run.model_dump(mode="json"),
    }
    if done.proof is not None:
        out["proof"] = {**vars(done.proof), "checkpoint": done.proof.checkpoint and str(done.proof.checkpoint)}
    if result is not None:
        evaluation = result.evaluation
        out |= {
            "first_step": result.first,
            "step": result.step,
            "stopped": result.stopped,
            "loss": evaluation.loss if evaluation else None,
            "rewards": evaluation.rewards if evaluation else None,
            "bits_per_byte": evaluation.bits_per_byte if evaluation else None,
            "tokens": result.tokens,
            "skipped": result.skipped,
            "spikes": result.spikes,
            "seconds": result.seconds,
            "trained": done.trained,
            "peak_bytes": peak_bytes(),
            "checkpoint": str(result.checkpoint),
        }
    return out


def _proven(proof: Proof) -> str:
    steps = (
        f"steps {proof.first:,} to {proof.last:,} done again: loss and gradient norm of {proof.compared:,} are equal"
    )
    return steps + ("" if proof.checkpoint is None else f", and so are weights and optimizer of {proof.checkpoint}")


def _next(printer: Printer, done: RunResult) -> None:
    assert done.result is not None
    evaluation, folder = done.result.evaluation, done.folder
    bits = evaluation.bits_per_byte if evaluation else None
    measured = "" if bits is None else f", {bits:.3f} bits per byte on held-out text"
    if done.result.first == done.result.step:
        printer.say(f"nothing to do: all {done.result.step:,} steps of this run are done")
    else:
        steps = done.result.step - done.result.first
        printer.say(f"trained {steps:,} steps in {duration(done.result.seconds)}{measured}")
    printer.say(f"run folder {folder}, loss curve {folder / 'loss.svg'}")
    config, objective = done.plan.model, done.plan.run.objective
    if config.kind == "decoder" and config.head.type == "causal-lm":
        printer.say(f"next: headway generate {folder} --prompt 'The'")
    elif objective is not None and objective.type == "masked-lm":
        printer.say(f"next: headway generate {folder} --fill-mask, or headway train base={folder} data.path=ROWS")
    elif config.head.type == "masked-patches":
        printer.say(f"next: headway train base={folder} data.path=IMAGES")
    else:
        printer.say(f"next: headway eval {folder} --data FILE")


def _print_config(printer: Printer, resolved: Resolved) -> None:
    from headway.run_config import flatten

    tree = resolved.run.model_dump(mode="json")
    values = flatten(tree)
    rows = [(key, quoted(value), f"# {resolved.origins.get(key, 'default')}") for key, value in values.items()]
    printer.table(rows)
    printer.say("null: chosen from data, budget and machine (--dry-run shows what)")
    origins = {key: resolved.origins.get(key, "default") for key in values}
    printer.result({"config": tree, "origins": origins})
