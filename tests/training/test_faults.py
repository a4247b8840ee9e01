"""What goes wrong in a step: NaN, spikes, memory, fp16 overflow, a log that cannot be written, a closed display."""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fault_injection import in_child
from tiny_runs import Run, checkpoint_bytes, model_config, source, train_config, weights
from torch import Tensor

from headway.checkpoints.folder import list_checkpoints, verify
from headway.checkpoints.tensors import read_tensors
from headway.cost import parameters as parameters_of
from headway.errors import DivergedError, MachineError
from headway.nn import Transformer
from headway.nn.heads import LOGIT_BYTES
from headway.strict import strict_json
from headway.training import guards, loop
from headway.training.events import CheckpointEvent, StepEvent, WarningEvent
from headway.training.guards import LossScale, SpikeWatch
from headway.training.loop import Trainer

BAD_STEP = 4


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "write_loss_curve", lambda folder: None)


def poison(trainer: Trainer, what: str, steps: range = range(BAD_STEP, BAD_STEP + 1)) -> None:
    """Put a NaN or infinity into the loss, a gradient or the hidden states of the given steps (from 1)."""
    original = trainer.model.loss

    def wrong(**inputs: Tensor) -> Tensor:
        loss = original(**inputs)
        if trainer.progress.step + 1 not in steps or not trainer.model.training:
            return loss
        if what == "gradient":
            weight = next(trainer.model.parameters())
            return loss + (weight - weight.detach()).sum().clamp(min=0).sqrt()  # 0, but its gradient is inf
        return loss * {"loss": math.nan, "infinity": math.inf}[what]

    trainer.model.loss = wrong  # type: ignore[assignment]


def poison_input(trainer: Trainer) -> None:
    handle = trainer.model.embeddings.register_forward_hook(
        lambda module, args, out: out * math.nan if trainer.progress.step + 1 == BAD_STEP else out
    )
    assert handle is not None


@pytest.mark.fault("R1")
@pytest.mark.parametrize("what", ["loss", "infinity", "gradient", "input"])
def test_a_number_that_is_none_stops_before_the_update(tmp_path: Path, what: str) -> None:
    run = Run(tmp_path, train_config(checkpoint_every=2))
    trainer = run.trainer()
    poison_input(trainer) if what == "input" else poison(trainer, what)
    seen: dict[int, dict[str, Tensor]] = {}
    run.on_event = lambda event: seen.update({event.step: weights(trainer.model)})
    with pytest.raises(DivergedError) as stopped:
        trainer.fit()
    text = str(stopped.value)
    assert stopped.value.exit_code == 5 and f"step {BAD_STEP}" in text and "gradient norm" in text
    ids = source().batch(BAD_STEP - 1).sample_ids
    assert f"samples {', '.join(map(str, ids))}" in text
    origin = {"input": "first in embeddings;", "gradient": "first in the gradient of embeddings.tokens.weight;"}
    assert origin.get(what, "") in text
    assert "the weights are those of step 3" in text and "step-00000002" in text
    assert all(torch.equal(seen[3][name], now) for name, now in trainer.model.state_dict().items())
    assert [step for step, _ in list_checkpoints(tmp_path)] == [2]
    assert [row for row in metrics(tmp_path) if row.get("kind") == "diverged"]


@pytest.mark.fault("R1")
@pytest.mark.parametrize("what", ["loss", "infinity", "gradient"])
def test_it_can_be_skipped_and_is_counted(tmp_path: Path, what: str) -> None:
    run = Run(tmp_path, train_config(on_nonfinite="skip"))
    trainer = run.trainer()
    poison(trainer, what)
    result = trainer.fit()
    assert result.skipped == 1 and result.step == 6
    assert [e.step for e in run.said(StepEvent) if not e.applied] == [BAD_STEP]
    assert [(e.step, e.kind) for e in run.said(WarningEvent)] == [(BAD_STEP, "nonfinite")]
    assert all(tensor.isfinite().all() for tensor in trainer.model.state_dict().values())


@pytest.mark.fault("R1")
def test_skipping_does_not_go_on_for_ever(tmp_path: Path) -> None:
    run = Run(tmp_path, train_config(steps=50, on_nonfinite="skip"))
    trainer = run.trainer()
    poison(trainer, "loss", range(3, 99))
    with pytest.raises(DivergedError, match="20 updates in a row"):
        trainer.fit()
    assert trainer.progress.step == 2 + guards.STREAK - 1


@pytest.mark.fault("R1")
def test_control_without_the_guard_the_weights_are_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Run(tmp_path).trainer()
    poison(trainer, "gradient")
    monkeypatch.setattr(Trainer, "_judge", lambda self, loss, norm, batch: True)
    with pytest.raises(DivergedError, match="is not finite"):  # the second guard: no save of broken weights
        trainer.fit()
    assert not all(tensor.isfinite().all() for tensor in trainer.model.state_dict().values())
    assert list_checkpoints(tmp_path) == []


# --- R2 ------------------------------------------------------------------------------------------------------------


def spikes(losses: list[float]) -> list[int]:
    watch = SpikeWatch()
    return [index for index, loss in enumerate(losses) if watch.see(loss) is not None]


@pytest.mark.fault("R2")
def test_six_sigma_and_not_less() -> None:
    noise = torch.randn(400, generator=torch.Generator().manual_seed(0)).tolist()
    calm = [3 + 0.1 * x for x in noise]
    assert spikes(calm) == []
    window = calm[36:100]
    mean = sum(window) / 64
    sigma = math.sqrt(sum((x - mean) ** 2 for x in window) / 64)
    for factor, found in ((5.9, []), (6.1, [100]), (1e6, [100])):
        assert spikes([*calm[:100], mean + factor * sigma, *calm[101:]]) == found
    falling = [9 * math.exp(-i / 50) + 2 + 0.05 * x for i, x in enumerate(noise)]
    assert spikes(falling) == []
    assert spikes([2.0] * 30 + [2.0 + 1e-9] + [2.0] * 9) == [] and spikes([2.0] * 30 + [3.0]) == [30]
    assert spikes([5.0] * guards.WARM)[:1] == [] and spikes([1.0] * (guards.WARM - 1) + [99.0]) == []


@pytest.mark.fault("R2")
def test_a_level_that_has_risen_is_accepted_in_the_end() -> None:
    assert 0 < len(spikes([2.0] * 64 + [4.0] * 200)) < 64


@pytest.mark.fault("R2")
@pytest.mark.parametrize("policy", ["warn", "skip"])
def test_a_spike_is_recorded_and_skipped_only_on_demand(tmp_path: Path, policy: str) -> None:
    run = Run(tmp_path, train_config(steps=22, on_spike=policy, lr=1e-5, muon_lr=1e-5))
    trainer = run.trainer()
    loss = trainer.model.loss

    def spiking(**inputs: Tensor) -> Tensor:
        return loss(**inputs) * (9 if trainer.progress.step + 1 == 20 else 1)

    trainer.model.loss = spiking  # type: ignore[assignment]
    result = trainer.fit()
    assert (result.spikes, result.skipped) == (1, int(policy == "skip"))
    warning = run.said(WarningEvent)[0]
    assert (warning.step, warning.kind) == (20, "spike") and "six sigma" in warning.text
    assert [event.applied for event in run.said(StepEvent)] == [not (policy == "skip" and s == 19) for s in range(22)]
    assert [row["step"] for row in metrics(tmp_path) if row.get("kind") == "spike"] == [20]


# --- R3 ------------------------------------------------------------------------------------------------------------


def fail_at(trainer: Trainer, step: int, make: Callable[[], BaseException]) -> None:
    loss = trainer.model.loss

    def failing(**inputs: Tensor) -> Tensor:
        if trainer.progress.step + 1 == step and trainer.model.training:
            raise make()
        return loss(**inputs)

    trainer.model.loss = failing  # type: ignore[assignment]


@pytest.mark.fault("R3")
@pytest.mark.parametrize(
    "make",
    [
        MemoryError,
        lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        lambda: RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"
        ),
    ],
)
def test_out_of_memory_names_an_estimate_and_a_fix(tmp_path: Path, make: Callable[[], BaseException]) -> None:
    run = Run(tmp_path, train_config(checkpoint_every=2, batch_size=8, accumulation=2))
    trainer = run.trainer()
    fail_at(trainer, 4, make)
    with pytest.raises(MachineError) as stopped:
        trainer.fit()
    text = str(stopped.value)
    assert stopped.value.exit_code == 4 and text.startswith("step 4: out of memory; the update needs about")
    assert "activations" in text and "train.accumulation=4" in text
    assert [step for step, _ in list_checkpoints(tmp_path)] == [2]
    verify(list_checkpoints(tmp_path)[0][1])
    straight = Run(tmp_path / "b", run.train).fit().checkpoint
    resumed = Run(tmp_path, run.train).fit("must").checkpoint
    assert checkpoint_bytes(straight) == checkpoint_bytes(resumed)


@pytest.mark.fault("R3")
def test_the_first_fix_is_more_passes_then_recomputing_then_a_shorter_context() -> None:
    def fix(passes: int, recompute: bool = False) -> str:
        train = train_config(batch_size=12, accumulation=passes, checkpoint_activations=recompute)
        return guards.out_of_memory(1, {"weights": 1}, train).fix.split(" ")[0]

    assert fix(12, True) == "a" and fix(6, True) == fix(6)
    assert {passes: fix(passes) for passes in (1, 2, 4, 5, 6, 12)} == {
        1: "train.accumulation=2",
        2: "train.accumulation=4",
        4: "train.accumulation=12",
        5: "train.accumulation=12",
        6: "train.accumulation=12",
        12: "train.checkpoint_activations=true",
    }


@pytest.mark.fault("R3")
def test_the_estimate_knows_what_saves_memory() -> None:
    config = model_config(d_model=64, n_layers=4, vocab_size=50_000)
    parameters = list(Transformer.blank(config).parameters())
    plain = guards.estimate_memory(config, train_config(batch_size=64, accumulation=2), parameters, 512)
    assert set(plain) == {"weights", "gradients", "optimizer", "activations", "loss"}
    assert plain["weights"] == 4 * sum(parameters_of(config).values())
    assert plain["loss"] < 3 * LOGIT_BYTES < 32 * 512 * 50_000 * 4  # the logits of a pass
    fields = {"checkpoint_activations": True, "ema": 0.9, "optimizer": "lion"}
    less = guards.estimate_memory(config, train_config(batch_size=64, accumulation=2, **fields), parameters, 512)
    assert 3 * less["activations"] < plain["activations"] == 32 * 512 * 4 * 4 * (10 * 64 + 4 * 256)
    assert less["average"] == less["optimizer"] == less["weights"]


@pytest.mark.fault("R3")
def test_other_errors_of_torch_keep_their_name(tmp_path: Path) -> None:
    trainer = Run(tmp_path).trainer()
    fail_at(trainer, 2, lambda: RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1"):
        trainer.fit()


@pytest.mark.fault("R3")
def test_memory_that_really_runs_out(tmp_path: Path) -> None:
    """RLIMIT_AS in a child: a batch that does not fit ends with exit code 4 and without a checkpoint."""

    def train() -> None:
        config = train_config(batch_size=4096, accumulation=1)
        run = Run(tmp_path, config, model_config(d_model=256), source(0, 4096), valid=None)
        trainer = run.trainer()
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), used + (64 << 20)))
        trainer.fit()

    assert in_child(train) == MachineError.exit_code
    assert list_checkpoints(tmp_path) == []


# --- R16 -----------------------------------------------------------------------------------------------------------


@pytest.mark.fault("R16")
def test_the_loss_scale_halves_on_overflow_and_grows_back() -> None:
    scale = LossScale.for_dtype(torch.float16)
    assert scale.value == 65536 and LossScale.for_dtype(torch.bfloat16) == LossScale()
    scale.overflowed()
    assert scale.value == 32768
    for _ in range(2000):
        scale.held()
    assert scale.value == 65536
    for _ in range(40):
        scale.overflowed()
    assert scale.value == 1.0
    fixed = LossScale()
    for _ in range(5000):
        fixed.held()
    assert fixed.value == 1.0


@pytest.mark.fault("R16")
def test_overflows_are_skipped_and_counted_and_the_scale_does_not_change_the_update(tmp_path: Path) -> None:
    run = Run(tmp_path / "a", train_config(dtype="float16"))
    trainer = run.trainer()
    poison(trainer, "gradient", range(1, 4))
    result = trainer.fit()
    assert result.skipped == 3 and trainer.progress.scale.value == 2.0**13
    assert [event.kind for event in run.said(WarningEvent)] == ["overflow"] * 3
    norms = []
    for scaled in (2.0**16, 2.0**4):
        other = Run(tmp_path / f"b{scaled}", train_config(steps=1, warmup=1, dtype="float16"), valid=None)
        trainer = other.trainer()
        trainer.progress.scale.value = scaled
        trainer.fit()
        norms.append(other.said(StepEvent)[0].grad_norm)
    assert norms[0] == pytest.approx(norms[1], rel=1e-2)


@pytest.mark.fault("R16")
def test_a_streak_of_overflows_ends_the_run(tmp_path: Path) -> None:
    trainer = Run(tmp_path, train_config(steps=90, dtype="float16")).trainer()
    poison(trainer, "gradient", range(5, 99))
    with pytest.raises(DivergedError, match="20 updates in a row skipped, 20 in all") as stopped:
        trainer.fit()
    assert stopped.value.exit_code == 5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_trains_like_single(tmp_path: Path, dtype: str) -> None:
    losses = []
    for name in ("float32", dtype):
        run = Run(tmp_path / name, train_config(steps=30, dtype=name), model_config(dropout=0.0), valid=None)
        run.fit()
        losses.append(run.said(StepEvent)[-1].loss)
    assert losses[1] == pytest.approx(losses[0], rel=0.03)


# --- R17, R6 -------------------------------------------------------------------------------------------------------


def metrics(folder: Path) -> list[dict[str, object]]:
    """Every line, strictly parsed: NaN would raise."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [strict_json(line, "metrics") for line in lines]
    assert all(isinstance(row, dict) for row in rows)
    return rows  # type: ignore[return-value]


@pytest.fixture
def every_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write each event at once instead of once a second."""
    log = loop.MetricsLog
    monkeypatch.setattr(loop, "MetricsLog", lambda path, warn: log(path, warn, every=0.0))


@pytest.mark.fault("R17")
@pytest.mark.parametrize("harm", ["unlink", "directory", "never"])
def test_a_log_that_cannot_be_written_costs_one_warning(tmp_path: Path, harm: str, every_line: None) -> None:
    path = tmp_path / "metrics.jsonl"
    if harm == "never":
        path.mkdir()

    def spoil(event: object) -> None:
        if isinstance(event, StepEvent) and event.step in (2, 4) and harm != "never" and path.is_file():
            path.unlink()
            if harm == "directory":
                path.mkdir()

    run = Run(tmp_path)
    run.on_event = spoil
    assert run.fit().step == 6
    assert [event.kind for event in run.said(WarningEvent)] == ["metrics"]
    if harm == "unlink":
        assert [row["step"] for row in metrics(tmp_path) if row["event"] == "step"] == [5, 6]
    expected = Run(tmp_path / "whole").fit().checkpoint
    assert checkpoint_bytes(expected) == checkpoint_bytes(run.said(CheckpointEvent)[-1].path)


@pytest.mark.fault("R17")
def test_no_line_ever_holds_nan(tmp_path: Path, every_line: None) -> None:
    run = Run(tmp_path, train_config(on_nonfinite="skip"))
    trainer = run.trainer()
    poison(trainer, "loss")
    trainer.fit()
    rows = metrics(tmp_path)
    assert [row["loss"] for row in rows if row["event"] == "step"][BAD_STEP - 1] is None
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert json.dumps(math.nan) == "NaN"  # control: what the standard writer would have put there


@pytest.mark.fault("R6")
@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), ValueError("I/O operation on closed file.")])
def test_a_closed_display_is_dropped_and_the_run_goes_on(tmp_path: Path, error: Exception) -> None:
    calls = []

    def closed(event: object) -> None:
        calls.append(event)
        raise error

    run = Run(tmp_path)
    run.on_event = closed
    assert run.fit().step == 6 and len(calls) == 1
    assert [row for row in metrics(tmp_path) if row.get("kind") == "display"]


@pytest.mark.fault("R6")
def test_a_listeners_own_mistake_is_not_hidden(tmp_path: Path) -> None:
    def wrong(event: object) -> None:
        raise ValueError("no such column")

    run = Run(tmp_path)
    run.on_event = wrong
    with pytest.raises(ValueError, match="no such column"):
        run.fit()


@pytest.mark.fault("R6")
def test_piped_into_a_reader_that_leaves(tmp_path: Path) -> None:
    """`... | head -1` in a shell: the run finishes, without a traceback."""
    script = (
        "import sys, torch; torch.set_num_threads(1); from pathlib import Path; from tiny_runs import *\n"
        f"run = Run(Path({str(tmp_path)!r}), train_config(steps=30))\n"
        "run.on_event = lambda event: print(event, flush=True)\n"
        "print(run.fit().step, file=sys.stderr)\n"
        "sys.stdout = None\n"
    )
    here = Path(__file__).resolve().parents[1]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent / "src")])}
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -c '{script.replace(chr(39), chr(34))}' | head -1 >/dev/null"],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stderr.strip().splitlines()[-1:] == ["30"] and "Traceback" not in done.stderr
    assert list_checkpoints(tmp_path)[-1][0] == 30


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    trainer = Run(tmp_path, train_config(checkpoint_every=2)).trainer()
    step = trainer._updater.step

    def overflow(scale: float) -> None:
        step(scale)
        if trainer.progress.step == 3:
            with torch.no_grad():
                next(iter(trainer.model.parameters()))[0, 0] = math.inf

    trainer._updater.step = overflow  # type: ignore[method-assign]
    with pytest.raises(DivergedError, match=r"embeddings\.tokens\.weight"):
        trainer.fit()
    place = list_checkpoints(tmp_path)[-1][1]
    assert all(tensor.isfinite().all() for tensor in read_tensors(place / "model.safetensors").values())
