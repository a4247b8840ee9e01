"""Signals: once means finish the step and save, twice means stop now; wherever they arrive (R4, R5, R6)."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from fault_injection import at_call, count_primitives, hooked
from tiny_runs import Run, checkpoint_bytes, train_config, valid
from torch import Tensor

from headway.checkpoints.folder import list_checkpoints, newest_good
from headway.errors import HeadwayError, Interrupted
from headway.training import loop
from headway.training.events import StepEvent
from headway.training.objectives import TrainingBatch
from headway.training.signals import StopSignals

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "write_loss_curve", lambda folder: None)


def send(number: int, times: int = 1) -> None:
    for _ in range(times):
        os.kill(os.getpid(), number)


def run_of(folder: Path, steps: int = 4, every: int = 2) -> Run:
    return Run(folder, train_config(steps=steps, eval_every=every, checkpoint_every=every))


@pytest.fixture
def expected(tmp_path: Path) -> dict[str, str]:
    return checkpoint_bytes(run_of(tmp_path / "whole").fit().checkpoint)


def temporaries(folder: Path) -> list[Path]:
    return list(folder.rglob(".tmp-*"))


@pytest.mark.fault("R4", "R5", "R6")
@pytest.mark.parametrize("number", CODES)
def test_once_finishes_the_step_and_saves(tmp_path: Path, expected: dict[str, str], number: int) -> None:
    run = run_of(tmp_path)
    trainer = run.trainer()
    loss = trainer.model.loss

    def loss_and_send(**inputs: Tensor) -> Tensor:
        if trainer.progress.step == 2 and trainer.model.training:  # in the middle of the third update
            send(number)
            trainer.model.loss = loss  # type: ignore[method-assign]
        return loss(**inputs)

    trainer.model.loss = loss_and_send  # type: ignore[assignment]
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as stopped:
        trainer.fit()
    assert signal.getsignal(number) is before
    assert stopped.value.exit_code == CODES[signal.Signals(number)] and "after step 3 of 4" in str(stopped.value)
    assert newest_good(tmp_path).manifest.step == 3
    assert checkpoint_bytes(run_of(tmp_path).fit("must").checkpoint) == expected


@pytest.mark.fault("R4", "R5")
@pytest.mark.parametrize("number,times", [(signal.SIGTERM, 1), (signal.SIGINT, 1), (signal.SIGINT, 2)])
def test_at_every_file_operation(tmp_path: Path, expected: dict[str, str], number: int, times: int) -> None:
    """So also in the middle of a save: the save is finished (once) or taken back (twice)."""
    count = count_primitives(lambda: run_of(tmp_path / "count").fit())
    stopped = 0
    for k in range(1 + times, count + 1, 3):
        folder = tmp_path / f"at-{k}"
        code = 0
        with hooked(at_call(k, lambda: send(number, times))):
            try:
                run_of(folder).fit()
            except Interrupted as error:
                code = error.exit_code
        assert code in (0, CODES[signal.Signals(number)])
        stopped += code != 0
        assert not temporaries(folder), k
        result = run_of(folder).fit("auto")
        assert checkpoint_bytes(result.checkpoint) == expected, k
    assert stopped > count // 6


@pytest.mark.fault("R5")
def test_during_an_evaluation_it_is_broken_off(tmp_path: Path, expected: dict[str, str]) -> None:
    begun = []

    def slow() -> Iterable[TrainingBatch]:
        for batch in valid():
            begun.append(batch)
            if len(begun) == 1:
                send(signal.SIGTERM)
            yield batch

    run = Run(tmp_path, run_of(tmp_path).train, valid=slow)
    with pytest.raises(Interrupted, match="after step 2 of 4"):
        run.fit()
    assert len(begun) == 1 < len(list(valid()))
    assert checkpoint_bytes(run_of(tmp_path).fit("must").checkpoint) == expected


@pytest.mark.fault("R4")
def test_twice_stops_at_once_and_the_last_checkpoint_is_good(tmp_path: Path) -> None:
    run = run_of(tmp_path, steps=40)

    def twice(event: object) -> None:
        if isinstance(event, StepEvent) and event.step == 5:
            send(signal.SIGINT, 2)

    run.on_event = twice
    with pytest.raises(Interrupted, match=r"stopped at once; checkpoint .*step-00000004") as stopped:
        run.fit()
    assert stopped.value.exit_code == 130 and newest_good(tmp_path).manifest.step == 4


@pytest.mark.fault("R4", "R5")
def test_which_second_signal_stops_at_once() -> None:
    table = [
        ((signal.SIGTERM, signal.SIGTERM), 143),
        ((signal.SIGTERM, signal.SIGINT), 130),
        ((signal.SIGHUP, signal.SIGTERM), 0),  # a closing terminal and its service manager send both
        ((signal.SIGINT, signal.SIGTERM), 0),
    ]
    for numbers, code in table:
        got = 0
        with StopSignals(lambda: "nothing") as signals:
            try:
                for number in numbers:
                    send(number)
            except Interrupted as error:
                got = error.exit_code
        assert (got, signals.caught) == (code, numbers[0])


@pytest.mark.fault("R6")
def test_what_was_ignored_stays_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        run = run_of(tmp_path)
        run.on_event = lambda event: send(signal.SIGHUP)
        assert run.fit().step == 4
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_in_another_thread_training_works_without_handlers(tmp_path: Path) -> None:
    results = []
    thread = threading.Thread(target=lambda: results.append(run_of(tmp_path).fit()))
    thread.start()
    thread.join()
    assert results[0].step == 4


# --- from outside, at random times ---------------------------------------------------------------------------------


def child(action: Callable[[Callable[[], None]], object]) -> tuple[int, int]:
    """Fork; (pid, a pipe that becomes readable when the child calls its `ready`)."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 99
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # not pytest's: after the run, the child just ends
        try:
            action(lambda: os.write(writer, b"r") and None)
            code = 0
        except HeadwayError as error:
            code = error.exit_code
        finally:
            os._exit(code)
    os.close(writer)
    return pid, reader


@pytest.mark.fault("R4", "R5")
def test_fifty_random_times(tmp_path: Path) -> None:
    """SIGINT once or twice, or SIGTERM, at 50 random moments: right code, valid checkpoint, the same final bytes."""
    steps, every = 9, 4
    run_of(tmp_path / "first", steps, every).fit()  # what a process does once is not part of a run's duration
    whole, reached = run_of(tmp_path / "whole", steps, every), list[float]()
    whole.on_event = lambda event: reached.append(time.monotonic())
    expected = checkpoint_bytes(whole.fit().checkpoint)
    pace = (reached[-1] - reached[0]) / steps
    rng = random.Random(5)
    codes = []
    for number in range(50):
        folder = tmp_path / str(number)
        # Anywhere in the run, however busy the machine is meanwhile: at a step that the child tells, and within it.
        moment = rng.randint(1, steps - 1)

        def train(ready: Callable[[], None], folder: Path = folder, moment: int = moment) -> None:
            run = run_of(folder, steps, every)
            run.on_event = lambda event: ready() if getattr(event, "step", 0) == moment else None
            run.fit()

        kind, times = rng.choice([(signal.SIGINT, 1), (signal.SIGINT, 2), (signal.SIGTERM, 1)])
        pid, reader = child(train)
        assert os.read(reader, 1) == b"r"
        time.sleep(rng.uniform(0, pace))
        for _ in range(times):
            os.kill(pid, kind)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.close(reader)
        # Two signals that arrive together count as one; a child may have finished, and before it is gone its
        # handlers are the default ones again.
        assert code in (0, CODES[kind], -kind), code
        if code == CODES[kind]:
            assert times == 2 or newest_good(folder).manifest.step >= 1
        codes.append(code)
        assert checkpoint_bytes(run_of(folder, steps, every).fit("auto").checkpoint) == expected, (number, kind, times)
        assert list_checkpoints(folder)[-1][0] == steps
    assert sum(code in (130, 143) for code in codes) >= 25


@pytest.mark.fault("R5")
def test_a_process_ends_with_143_within_its_grace_time(tmp_path: Path) -> None:
    """The whole process as a supervisor sees it, also with a second after which it would be killed."""
    script = (
        "import sys, torch; torch.set_num_threads(1); from pathlib import Path; from tiny_runs import *\n"
        "from headway.errors import HeadwayError\n"
        f"run = Run(Path({str(tmp_path)!r}), train_config(steps=100000))\n"
        "run.on_event = lambda event: print(event.step, flush=True)\n"
        "try: run.fit()\n"
        "except HeadwayError as error: sys.exit(error.exit_code)\n"
    )
    here = Path(__file__).resolve().parents[1]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent / "src")])}
    with subprocess.Popen([sys.executable, "-c", script], env=env, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"1\n"
        process.terminate()
        process.stdout.read()
        assert process.wait(timeout=30) == 143
    assert newest_good(tmp_path).manifest.step >= 1
