"""Kill a training run at every file operation and at random times; resume; compare bytes (row S2, promise P3).

    python tools/kill_campaign.py [--random 200] [--stride 1] [--folder DIR]
    python tools/kill_campaign.py --objectives [NAME ...] [--random 20]     a run of every objective, or of those named,
                                                                            with two passes, dropout, EMA

One process imports torch and forks a child per kill. At the k-th file primitive (or after a random time) the child
dies by SIGKILL; then the run is resumed, sometimes to be killed again, and its last checkpoint, all files of it, must
equal that of an uninterrupted run. A run killed after a checkpoint stood must go on from it or a later one, and
nothing temporary may be left. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

import torch  # noqa: E402
from fault_injection import at_call, hooked  # noqa: E402
from objective_cases import CASES, SIGNALS, rows_file  # noqa: E402
from objective_cases import config as objective_config  # noqa: E402
from tiny_runs import Run, checkpoint_bytes, model_config, train_config  # noqa: E402

from headway import files  # noqa: E402
from headway.checkpoints.folder import list_checkpoints, newest_good  # noqa: E402
from headway.errors import HeadwayError, InputError  # noqa: E402
from headway.launch import Launch, train  # noqa: E402
from headway.run_config import RunConfig, load_run  # noqa: E402
from headway.strict import dump_json, strict_json  # noqa: E402
from headway.training import plot  # noqa: E402
from headway.training.events import ResumeEvent  # noqa: E402

OBJECTIVES = (*CASES, *SIGNALS)
STEPS = 6
DEADLINE = 60
Fit = Callable[[Path], list[int]]


@dataclass
class Figures:
    """What a campaign counts; `equal` = `kills` and nothing in `wrong` is the promise kept."""

    primitives: int = 0
    kills: int = 0
    finished: int = 0  # random times that fell after the end
    resumes: int = 0
    from_checkpoint: int = 0  # of them, those that found one; the others began again
    equal: int = 0
    killed_again: int = 0
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)


def make_run(folder: Path) -> Run:
    """Six steps with dropout and two passes each, saved every second step, evaluated every third."""
    config = train_config(steps=STEPS, checkpoint_every=2, eval_every=3)
    return Run(folder, config, model_config(d_model=8))


def fit(folder: Path) -> list[int]:
    """Begin or go on, as `headway train --resume auto` does: under the lock. The steps it was resumed at."""
    run = make_run(folder)
    with files.RunLock(folder, say=lambda line: None):
        run.fit("auto")
    return [event.step for event in run.said(ResumeEvent)]


def fit_objective(config: dict[str, Any], folder: Path) -> list[int]:
    """The same for a whole run: its data, its tokenizer, its batches."""
    begun: list[int] = []

    def listen(event: object) -> None:
        if isinstance(event, ResumeEvent):
            begun.append(event.step)

    run = RunConfig(**config, output=str(folder))
    if list_checkpoints(folder):
        run = load_run([folder / "config.yaml"], [], {}).run
    train(run, Launch(resume="auto"), listen)
    return begun


class Campaign:
    """Kills runs below a folder and counts what comes of it."""

    def __init__(self, folder: Path, again: float = 0.25, seed: int = 0, fit: Fit = fit) -> None:
        self.folder, self.again, self.figures, self.fit = folder, again, Figures(), fit
        self.rng = random.Random(seed)
        plot.draw = lambda *a, **k: {"svg": b"svg", "png": b"png"}  # slower than the run; its file operations stay
        floors: list[int] = []

        def newest(name: str, path: Path) -> None:
            try:
                floors.append(newest_good(folder / "whole").manifest.step)
            except InputError:
                floors.append(0)

        folder.mkdir(exist_ok=True)
        fit(folder / "warm")
        with hooked(newest):
            fit(folder / "whole")
        saved: list[float] = []

        def note(name: str, path: Path) -> None:
            if not saved and list_checkpoints(folder / "timed"):
                saved.append(time.monotonic())

        began = time.monotonic()
        with hooked(note):
            fit(folder / "timed")
        self.duration = time.monotonic() - began
        self.first_saved = saved[0] - began
        self.floors = floors
        self.figures.primitives = len(floors)
        self.expected = self.final(folder / "whole")

    def final(self, folder: Path) -> dict[str, str]:
        """Hashes of the last checkpoint's files; empty if none verifies."""
        try:
            found = newest_good(folder)
        except InputError:
            return {}
        # Where the run lies is in its config, and so in two of the files.
        files_ = {n: b for n, b in checkpoint_bytes(found.path).items() if n not in ("state.json", "manifest.json")}
        state = strict_json((found.path / "state.json").read_bytes(), "state")
        assert isinstance(state, dict)
        rest = dump_json({key: state[key] for key in ("tree", "progress", "identity")}, sort_keys=True)
        return {"step": str(found.manifest.step), "state": rest, **files_}

    def at_primitive(self, k: int) -> None:
        """Kill at the k-th file primitive (from 1), resume, compare."""
        folder = self.folder / f"at-{k}"
        self._kill(folder, k=k)
        self._check(folder, f"primitive {k}", self.floors[k - 1])

    def at_random(self, number: int) -> None:
        """Kill at a random moment, resume, compare.

        Every other moment is one after the first checkpoint stood: where reading the data takes most of a run, few of
        all moments are, and a run that begins again proves less.
        """
        folder = self.folder / f"random-{number}"
        self._kill(folder, after=self.rng.uniform(self.first_saved if number % 2 else 0, self.duration))
        self._check(folder, f"random {number}", 0)

    def _kill(self, folder: Path, k: int = 0, after: float | None = None) -> None:
        def die() -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        pid = fork(lambda: self._hooked_fit(folder, at_call(k, die)))
        if after is not None:
            time.sleep(after)
            os.kill(pid, signal.SIGKILL)
        code = wait(pid)
        if code == -signal.SIGKILL:
            self.figures.kills += 1
        elif code == 0 and after is not None:
            self.figures.finished += 1
        else:
            self.figures.wrong.append(f"{folder.name}: the run ended with {code} before it was killed")

    def _check(self, folder: Path, what: str, floor: int) -> None:
        figures = self.figures
        if self.rng.random() < self.again:  # lightning strikes twice
            before = figures.kills
            self._kill(folder, after=self.rng.uniform(0, self.duration))
            figures.killed_again += figures.kills - before
            figures.kills = before
        try:
            begun = self.fit(folder)
        except HeadwayError as error:
            figures.wrong.append(f"{what}: cannot be resumed: {error}")
            return
        figures.resumes += 1
        figures.from_checkpoint += bool(begun)
        if (begun or [0])[0] < floor:
            figures.wrong.append(f"{what}: resumed at step {(begun or [0])[0]} though step {floor} had been saved")
        left = sorted(path.name for path in folder.rglob(f"{files.TEMPORARY_PREFIX}*"))
        if left:
            figures.wrong.append(f"{what}: left {left}")
        if self.final(folder) == self.expected:
            figures.equal += 1
        else:
            figures.wrong.append(f"{what}: other final bytes")
        shutil.rmtree(folder)

    def _hooked_fit(self, folder: Path, hook: Callable[[str, Path], None]) -> None:
        with hooked(hook):
            self.fit(folder)


def fork(action: Callable[[], None]) -> int:
    """Run `action` in a forked child; its pid. Exit code 0, or 99 with a traceback."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            action()
            code = 0
        except BaseException as error:
            print(f"child: {error!r}", file=sys.stderr)
        finally:
            os._exit(code)
    return pid


def wait(pid: int) -> int:
    """The child's exit code, negative for a signal; a child that hangs is an error."""
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise TimeoutError(f"a child ran longer than {DEADLINE} s")


def run_campaign(folder: Path, stride: int, randoms: int, seed: int = 0, fit: Fit = fit) -> Figures:
    """Kill at every `stride`-th primitive (0: at none) and at `randoms` random times below `folder`."""
    began = time.monotonic()
    campaign = Campaign(folder, seed=seed, fit=fit)
    for k in range(1, campaign.figures.primitives + 1, stride) if stride else ():
        campaign.at_primitive(k)
    wanted, number = campaign.figures.kills + randoms, 0
    while campaign.figures.kills < wanted and number < 4 * randoms:  # some times fall after the end
        campaign.at_random(number)
        number += 1
    campaign.figures.seconds = round(time.monotonic() - began, 1)
    return campaign.figures


def objective_run(name: str, place: Path, **fields: Any) -> dict[str, Any]:
    """A run of an objective on its small data below `place`: two passes, dropout, averaged weights."""
    if name in SIGNALS:
        make_folder, own = SIGNALS[name]
        data = make_folder(place / "data")
    else:
        make_row, own, _ = CASES[name]
        data = rows_file(place, make_row)
    numbers = {"accumulation": 2, "ema": 0.9, "dtype": "float32", "sample_tokens": 0}
    run = objective_config(data, own, **{**numbers, **fields})
    return {**run, "model": {**run["model"], "dropout": 0.1}}


def run_objectives(folder: Path, randoms: int, seed: int, names: Iterable[str] = OBJECTIVES) -> Figures:
    """`randoms` kills of a run of each objective, the figures of all together."""
    os.environ["HEADWAY_CACHE"] = str(folder / "cache")
    total = Figures()
    for number, name in enumerate(names):
        place = folder / f"case-{number}"
        place.mkdir()
        fit_this = partial(fit_objective, objective_run(name, place))
        found = run_campaign(place / "runs", 0, randoms, seed + number, fit_this)
        for key, value in asdict(found).items():
            setattr(total, key, getattr(total, key) + ([f"{name}: {w}" for w in value] if key == "wrong" else value))
        counts = f"{found.kills} kills, {found.killed_again} more while resuming, {found.resumes} resumes"
        print(f"{name:26} {counts} ({found.from_checkpoint} from a checkpoint), {found.equal} byte-equal", flush=True)
    return total


def main() -> int:
    """Run the campaign and print its figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--random", type=int, default=None, help="200; 20 of each objective")
    parser.add_argument("--objectives", nargs="*", choices=OBJECTIVES, default=None)
    parser.add_argument("--stride", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)  # a forked child would wait for ever for the threads of its parent
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        if options.objectives is not None:
            names = options.objectives or OBJECTIVES
            figures = run_objectives(Path(folder), options.random or 20, options.seed, names)
        else:
            figures = run_campaign(Path(folder), options.stride, options.random or 200, options.seed)
    for line in figures.wrong:
        print(f"WRONG {line}")
    print(
        f"{figures.primitives} file primitives in a run; {figures.kills} kills, {figures.killed_again} more while"
        f" resuming, {figures.finished} random times after the end; {figures.resumes} resumes,"
        f" {figures.from_checkpoint} of them from a checkpoint, {figures.equal} byte-equal; {figures.seconds} s"
    )
    print(json.dumps({name: value for name, value in asdict(figures).items() if name != "wrong"}))
    return 1 if figures.wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
