"""Exact resume (R7), and what a resumed run may not, or may with a word, differ in (R9 to R12)."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from logger_fakes import install
from tiny_runs import TEXT, Run, checkpoint_bytes, model_config, source, train_config

from headway.checkpoints import folder
from headway.errors import ConfigError, HeadwayError, InputError, MachineError
from headway.training import guards, loop, resume
from headway.training.events import CheckpointEvent, EvalEvent, ResumeEvent, StepEvent, WarningEvent
from headway.training.metrics import read_metrics

STEPS = 20
WIDE = 128  # enough numbers per pass for torch to share them between two threads


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "write_loss_curve", lambda folder: None)


@pytest.fixture
def threads() -> object:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


VARIANTS: dict[str, dict[str, object]] = {
    **{name: {"optimizer": name} for name in ("muon", "adamw", "lion", "adafactor")},
    "ema": {"ema": 0.8, "z_loss": 1e-3},
    "recomputed": {"checkpoint_activations": True, "schedule": "inverse-sqrt"},
}


def long_run(folder: Path, variant: str = "muon", d_model: int = 16) -> Run:
    """Twenty steps with dropout and two passes each; two evaluations on the way, with early stopping armed."""
    fields = {"eval_every": 7, "checkpoint_every": 1, "early_stop": 9, "on_spike": "skip", **VARIANTS[variant]}
    config = train_config(steps=STEPS, batch_size=d_model // 4, **fields)
    return Run(folder, config, model_config(d_model=d_model))


def straight(tmp_path: Path, variant: str, d_model: int = 16) -> tuple[Path, dict[int, Path]]:
    """One uninterrupted run, and a copy of its folder as it stood after each step."""
    run = tmp_path / "straight"
    copies: dict[int, Path] = {}
    original = resume.save_checkpoint

    def keep(folder: Path, step: int, *args: object, **options: object) -> Path:
        path = original(folder, step, *args, **options)  # type: ignore[arg-type]
        copies[step] = shutil.copytree(folder, tmp_path / f"copy-{step}")
        return path

    resume.save_checkpoint = keep  # type: ignore[assignment]
    try:
        final = long_run(run, variant, d_model).fit().checkpoint
    finally:
        resume.save_checkpoint = original
    return final, copies


@pytest.mark.fault("R7")
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_resume_ends_in_the_bytes_of_the_straight_run(tmp_path: Path, variant: str) -> None:
    final, copies = straight(tmp_path, variant)
    expected = checkpoint_bytes(final)
    assert set(expected) == {"model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"}
    assert sorted(copies) == list(range(1, STEPS + 1))
    for step, copy in copies.items():
        run = long_run(copy, variant)
        result = run.fit("must")
        assert [event.step for event in run.said(ResumeEvent)] == [step]
        assert [event.step for event in run.said(StepEvent)] == list(range(step + 1, STEPS + 1))  # nothing replayed
        assert result.checkpoint.name == final.name and checkpoint_bytes(result.checkpoint) == expected, step


@pytest.mark.fault("R7")
def test_with_two_threads_each_step_after_a_resume_has_the_straight_runs_bytes(
    tmp_path: Path, threads: Callable[[int], None]
) -> None:
    """All k by induction: from the straight run's step k, one resumed step gives its step k + 1."""
    threads(2)
    _, copies = straight(tmp_path, "muon", WIDE)

    def stop(event: object) -> None:
        if isinstance(event, CheckpointEvent):
            raise KeyboardInterrupt

    for step in range(1, STEPS):
        run = long_run(copies[step], "muon", WIDE)
        run.on_event = stop
        with contextlib.suppress(KeyboardInterrupt):
            run.fit("must")
        assert run.said(StepEvent)[-1].step == step + 1
        one, other = (folder.checkpoint_path(copies[place], step + 1) for place in (step, step + 1))
        assert checkpoint_bytes(one) == checkpoint_bytes(other), step


@pytest.mark.fault("R7")
@pytest.mark.parametrize("forgotten", ["random", "optimizer", "cursor", "watch", "last weights", "average"])
def test_control_a_resume_that_forgets_one_part_is_seen(
    tmp_path: Path, forgotten: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    variant = "ema" if forgotten in ("last weights", "average") else "muon"
    final, copies = straight(tmp_path, variant)
    run = long_run(copies[10], variant)
    trainer = run.trainer()
    if forgotten == "random":
        monkeypatch.setattr(resume, "restore_random", lambda states, device: None)
    elif forgotten == "optimizer":
        trainer._updater.load_state = lambda state: None  # type: ignore[method-assign]
    elif forgotten == "last weights":
        trainer._average.load_state = lambda state: setattr(trainer._average, "updates", 10)  # type: ignore[union-attr]
    elif forgotten == "average":  # the model's file goes to the weights alone
        monkeypatch.setattr(resume, "shown", lambda average: contextlib.nullcontext())
    elif forgotten == "watch":
        monkeypatch.setattr(resume, "SpikeWatch", lambda window: guards.SpikeWatch())
    else:
        batch = trainer.source.batch
        trainer.source.batch = lambda cursor: batch(cursor - 10)  # type: ignore[method-assign]
    assert checkpoint_bytes(trainer.fit("must").checkpoint) != checkpoint_bytes(final)


def test_a_step_saved_before_its_evaluation_is_evaluated_first(tmp_path: Path) -> None:
    """What a signal during an evaluation leaves: the resumed run must not skip it."""
    final, _ = straight(tmp_path, "muon")
    copy = tmp_path / "interrupted"
    original = loop.evaluate
    try:
        loop.evaluate = lambda *args: None  # type: ignore[assignment]
        interrupted = long_run(copy)

        def stop(event: object) -> None:
            if isinstance(event, StepEvent) and event.step == 7:
                os.kill(os.getpid(), signal.SIGTERM)

        interrupted.on_event = stop
        with pytest.raises(HeadwayError, match="step 7"):
            interrupted.fit()
    finally:
        loop.evaluate = original
    again = long_run(copy)
    result = again.fit("must")
    assert [event.step for event in again.said(EvalEvent)] == [7, 14, 20]
    assert checkpoint_bytes(result.checkpoint) == checkpoint_bytes(final)


# --- R9 ------------------------------------------------------------------------------------------------------------

OTHER: dict[str, object] = {
    "steps": 9,
    "epochs": 2.0,
    "batch_size": 8,
    "batch_tokens": 512,
    "accumulation": 4,
    "optimizer": "adamw",
    "lr": 0.02,
    "muon_lr": 0.03,
    "strategy": "fsdp",
    "tensor_parallel": 2,
    "collective_timeout": 60.0,
    "loggers": ("tensorboard", "wandb"),
    "schedule": "cosine",
    "warmup": 3,
    "decay": 0.3,
    "final_lr": 0.5,
    "weight_decay": 0.1,
    "beta1": 0.8,
    "beta2": 0.9,
    "eps": 1e-6,
    "clip": 0.5,
    "label_smoothing": 0.1,
    "z_loss": 1e-3,
    "ema": 0.5,
    "checkpoint_activations": True,
    "seed": 7,
    "eval_every": 2,
    "eval_windows": 3,
    "eval_rows": 5,
    "checkpoint_every": 2,
    "keep_checkpoints": 3,
    "early_stop": 5,
    "on_nonfinite": "skip",
    "on_spike": "skip",
    "sample_prompt": "x",
    "sample_tokens": 3,
    "threads": 2,
    "dtype": "float32",
    "device": "cpu",
}


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps that says it has six."""
    path = tmp_path_factory.mktemp("begun")
    run = Run(path, train_config(checkpoint_every=3))

    def stop(event: object) -> None:
        if isinstance(event, StepEvent) and event.step == 4:
            raise KeyboardInterrupt

    run.on_event = stop
    with pytest.raises(KeyboardInterrupt):
        run.fit()
    return path


def test_the_table_of_keys_is_complete() -> None:
    assert set(OTHER) == set(type(train_config()).model_fields)
    assert {key for key in resume.OVERRIDABLE if key.startswith("train.")} <= {f"train.{key}" for key in OTHER}


@pytest.mark.fault("R9")
@pytest.mark.parametrize("key", sorted(OTHER))
def test_a_changed_key_is_refused_as_a_diff_or_overridden(
    begun: Path, tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch)  # the packages of loggers
    copy = shutil.copytree(begun, tmp_path / "run")
    changed = train_config(**{"checkpoint_every": 3, key: OTHER[key]})
    old = getattr(train_config(checkpoint_every=3), key)
    run = Run(copy, changed)
    name = f"train.{key}"
    if name in resume.FREE:
        assert run.fit("must").step == 6
        return
    with pytest.raises(ConfigError) as refused:
        run.fit("must")
    assert f"{name}: {old} -> {OTHER[key]}" in refused.value.found
    again = Run(copy, changed)
    if name in resume.OVERRIDABLE:
        assert "--override" in refused.value.fix
        assert again.fit("must", override=True).step == changed.steps
        assert any(f"{name} overridden" in event.text for event in again.said(WarningEvent))
    else:
        with pytest.raises(ConfigError, match=name):
            again.fit("must", override=True)


@pytest.mark.fault("R9")
def test_a_changed_model_is_refused_whatever_is_overridden(begun: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(begun, tmp_path / "run")
    run = Run(copy, train_config(checkpoint_every=3), model_config(d_ff=32, dropout=0.2))
    with pytest.raises(ConfigError) as refused:
        run.fit("must", override=True)
    assert "model.d_ff: 64 -> 32" in refused.value.found and "model.dropout: 0.1 -> 0.2" in refused.value.found
    assert refused.value.exit_code == 2


def test_paths_may_change_and_unknown_keys_may_not() -> None:
    saved = {"data": {"path": "/a", "context": 4}, "output": "x", "model": {}}
    assert resume.check_config(saved, {"data": {"path": "/b", "context": 4}, "output": "y", "model": {}}, False) == []
    with pytest.raises(ConfigError, match=r"data\.new: unset -> None"):
        resume.check_config(saved, {**saved, "data": {**saved["data"], "new": None}}, True)  # type: ignore[dict-item]


# --- R10, R11, R12 -------------------------------------------------------------------------------------------------


@pytest.mark.fault("R10")
@pytest.mark.parametrize("what", ["data", "tokenizer"])
def test_other_data_or_another_tokenizer_is_refused_with_both_hashes(begun: Path, tmp_path: Path, what: str) -> None:
    copy = shutil.copytree(begun, tmp_path / "run")
    before = source()
    other = source(text=TEXT + "One more line.\n") if what == "data" else source(tokenizer="words")
    with pytest.raises(InputError) as refused:
        Run(copy, train_config(checkpoint_every=3), data=other).fit("must", override=True)
    assert refused.value.where == what and refused.value.exit_code == 3
    for hash_ in (before.identity[what], other.identity[what]):
        assert hash_ in str(refused.value)


@pytest.mark.fault("R11")
@pytest.mark.parametrize(
    "name,value", [("threads", 64), ("torch", "1.0.0"), ("dtype", "bfloat16"), ("device", "cuda:7")]
)
def test_another_machine_is_reported_and_goes_on(
    begun: Path, tmp_path: Path, name: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(begun, tmp_path / "run")
    path = folder.newest_good(copy).path / folder.MANIFEST
    body = json.loads(path.read_text())
    body["meta"][name] = value
    del body["sha256"]
    path.write_bytes(folder._seal(body))
    run = Run(copy, train_config(checkpoint_every=3))
    assert run.fit("must").step == 6
    warnings = [event.text for event in run.said(WarningEvent) if event.kind == "resume"]
    assert len(warnings) == 1 and f"{name} {value} ->" in warnings[0] and "not byte-equal" in warnings[0]


@pytest.mark.fault("R11")
def test_a_resume_on_the_same_machine_warns_of_nothing(begun: Path, tmp_path: Path) -> None:
    run = Run(shutil.copytree(begun, tmp_path / "run"), train_config(checkpoint_every=3))
    run.fit("must")
    assert run.said(WarningEvent) == []


@pytest.mark.fault("R11")
def test_a_resume_in_half_precision_begins_with_a_loss_scale(begun: Path, tmp_path: Path) -> None:
    run = Run(shutil.copytree(begun, tmp_path / "run"), train_config(checkpoint_every=3, dtype="float16"))
    trainer = run.trainer()
    trainer.fit("must")
    assert not trainer.progress.scale.fixed and any("float16" in e.text for e in run.said(WarningEvent))


@pytest.mark.fault("R12")
def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no usable checkpoint") as refused:
        Run(tmp_path).fit("must")
    assert refused.value.exit_code == 3
    run = Run(tmp_path)
    assert run.fit("auto").step == 6
    assert [event.kind for event in run.said(WarningEvent)] == ["fresh"]
    assert "starting at step 0" in run.said(WarningEvent)[0].text


@pytest.mark.fault("R12", "K14")
def test_only_broken_checkpoints_and_a_broken_newest_one(tmp_path: Path) -> None:
    expected = checkpoint_bytes(Run(tmp_path / "whole", train_config(checkpoint_every=2)).fit().checkpoint)
    run = tmp_path / "run"
    Run(run, train_config(checkpoint_every=2)).fit()
    places = sorted((run / "checkpoints").glob("step-*"))
    assert [place.name for place in places] == ["step-00000004", "step-00000006"]

    def flip(place: Path) -> None:
        data = bytearray((place / "model.safetensors").read_bytes())
        data[-3] ^= 1
        (place / "model.safetensors").write_bytes(data)

    flip(places[1])
    passed = Run(run, train_config(checkpoint_every=2))
    assert checkpoint_bytes(passed.fit("must").checkpoint) == expected
    assert [event.kind for event in passed.said(WarningEvent)] == ["rejected"]
    assert passed.said(ResumeEvent)[0].step == 4

    for place in places:
        flip(place)
    with pytest.raises(InputError) as refused:
        Run(run, train_config(checkpoint_every=2)).fit("must")
    assert all(place.name in str(refused.value) for place in places) and "sha256" in str(refused.value)
    fresh = Run(run, train_config(checkpoint_every=2))
    assert checkpoint_bytes(fresh.fit("auto").checkpoint) == expected
    assert "sha256" in fresh.said(WarningEvent)[0].text and fresh.said(StepEvent)[0].step == 1


def test_a_new_run_does_not_run_over_an_old_one(begun: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(begun, tmp_path / "run")
    before = checkpoint_bytes(folder.newest_good(copy).path)
    with pytest.raises(MachineError, match="holds checkpoints up to step 3"):
        Run(copy).fit()
    assert checkpoint_bytes(folder.newest_good(copy).path) == before


@pytest.mark.fault("S4")
def test_an_unwritable_folder_is_refused_before_the_first_step(tmp_path: Path) -> None:
    run = Run(Path("/proc/headway-run"))
    with pytest.raises(MachineError):
        run.fit()
    (tmp_path / "file").write_text("x")
    other = Run(tmp_path / "file")
    with pytest.raises(MachineError):
        other.fit()
    assert run.said(StepEvent) == other.said(StepEvent) == []


@pytest.mark.fault("S11")
def test_orphans_go_at_the_next_start_with_a_line(begun: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(begun, tmp_path / "run")
    orphan = copy / "checkpoints" / ".tmp-1-abc"
    orphan.mkdir()
    (orphan / "model.safetensors").write_bytes(b"half")
    run = Run(copy, train_config(checkpoint_every=3))
    run.fit("must")
    assert not orphan.exists() and ".tmp-1-abc" in run.said(WarningEvent)[0].text


@pytest.mark.fault("S10")
def test_a_loop_that_does_not_move_the_weights_is_our_bug(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, train_config(checkpoint_every=2))
    trainer = run.trainer()
    trainer._updater.step = lambda scale: None  # type: ignore[method-assign]
    with pytest.raises(HeadwayError, match="very weights") as refused:
        trainer.fit()
    assert refused.value.exit_code == 70


def test_a_run_that_is_done_is_done(begun: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(begun, tmp_path / "run")
    first = Run(copy, train_config(checkpoint_every=3)).fit("must")
    before = checkpoint_bytes(first.checkpoint)
    again = Run(copy, train_config(checkpoint_every=3))
    assert again.fit("must").step == 6 and again.said(StepEvent) == []
    assert checkpoint_bytes(first.checkpoint) == before


def test_metrics_of_a_resumed_run_read_as_one(begun: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(begun, tmp_path / "run")
    Run(copy, train_config(checkpoint_every=3)).fit("must")
    rows = read_metrics(copy / "metrics.jsonl")
    assert [row["step"] for row in rows if row["event"] == "step"] == [1, 2, 3, 4, 5, 6]
