"""`headway train`: the run folder, what is refused before any work, resuming, where values come from."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import headway
from headway import material, prepare
from headway.checkpoints.folder import list_checkpoints, newest_good
from headway.files import RunLock
from headway.run_config import RunConfig
from headway.training.metrics import read_metrics

from conftest import SMALL  # isort: skip


def test_the_run_folder_describes_itself(trained):
    names = {path.name for path in trained.iterdir()}
    assert names == {
        "config.yaml",
        "model.json",
        "tokenizer.json",
        "checkpoints",
        "metrics.jsonl",
        "loss.svg",
        "loss.png",
    }
    run = RunConfig(**yaml.safe_load((trained / "config.yaml").read_text()))
    assert run.train.steps == 40 and run.train.lr and run.train.warmup is not None and run.output == str(trained)
    assert run.model == json.loads((trained / "model.json").read_text())
    assert newest_good(trained).manifest.step == 40
    evaluations = [row for row in read_metrics(trained / "metrics.jsonl") if row["event"] == "eval"]
    assert evaluations[-1]["bits_per_byte"] < 0.6 * evaluations[0]["bits_per_byte"], "it learns"
    assert evaluations[-1]["sample"]


def test_json_is_the_only_line_on_stdout(command, corpus, tmp_path):
    said = command("train", f"data.path={corpus}", *SMALL, "train.steps=2", "--output", tmp_path / "r", "--json")
    assert said.json["step"] == 2 and said.json["bits_per_byte"] > 0 and said.json["parameters"] > 0
    assert Path(said.json["checkpoint"]).is_dir() and "step 2/2" in said.err


def test_without_json_the_last_lines_say_what_to_do_next(command, corpus, tmp_path):
    said = command("train", f"data.path={corpus}", *SMALL, "train.steps=2", "--output", tmp_path / "r")
    assert "headway generate" in said.out and "loss.svg" in said.out


def test_dry_run_shows_the_plan_and_writes_nothing(command, corpus, tmp_path):
    said = command(
        "train", f"data.path={corpus}", *SMALL, "train.steps=2", "--output", tmp_path / "r", "--dry-run", "--json"
    )
    assert said.json["parameters"] and "step" not in said.json and "training: causal-lm, 2 steps" in said.err
    assert not (tmp_path / "r").exists()


def test_default_output_is_named_after_the_data(command, corpus, tmp_path):
    said = command("train", f"data.path={corpus}", *SMALL, "train.steps=1", "--json")
    assert said.json["run"] == "runs/text" and (tmp_path / "runs" / "text" / "config.yaml").is_file()


# --- what is refused before any work -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "parts"),
    [
        ([], 2, ["data.path: missing", "data.path=FILE"]),
        (["train.lrr=1"], 2, ["train.lrr", "did you mean 'lr'"]),
        (["model.n_headz=2"], 2, ["n_headz", "did you mean 'n_heads'"]),
        (["book.txt"], 2, ["book.txt", "data.path=book.txt"]),
        (["absent.yaml"], 3, ["absent.yaml"]),
        (["--val-fraction", "2"], 2, ["data.val_fraction"]),
        (["--encoding-errors", "perhaps"], 2, ["data.encoding_errors", "strict"]),
        (["--context", "0"], 2, ["data.context"]),
        (["train.warmup=9", "train.steps=3"], 2, ["train.warmup and train.steps"]),
        (["train.device=cuda"], 4, ["train.device", "train.device=cpu"]),
    ],
)
def test_mistakes_are_named(command, corpus, words, code, parts):
    given = [f"data.path={corpus}"] if words and "=" in words[-1] and "train" in words[0] else []
    said = command("train", *given, *words)
    assert said.code == code and all(part in said.error for part in parts), said.error


@pytest.mark.fault("C1")
def test_a_misspelt_corpus_gets_the_nearest_name(command, corpus):
    said = command("train", f"data.path={corpus.parent / 'texd.txt'}")
    assert said.code == 3 and "text.txt" in said.error and not list(Path("runs").iterdir())


@pytest.mark.fault("C9")
def test_a_corpus_shorter_than_the_context(command, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("ten words are not enough for a window of text " * 3)
    said = command("train", f"data.path={path}", "--context", "4096", "tokenizer.kind=byte")
    assert said.code == 3 and "4097" in said.error and "--context" in said.error


@pytest.mark.fault("S4")
def test_an_unwritable_output_is_refused_before_the_corpus_is_read(command, corpus, monkeypatch):
    monkeypatch.setattr(prepare, "open_corpus", lambda *_: pytest.fail("work began"))
    said = command("train", f"data.path={corpus}", "--output", "/proc/1/run")
    assert said.code == 4 and "/proc/1" in said.error


@pytest.mark.fault("S13")
def test_a_folder_in_use_is_refused_and_overwrite_replaces_it(command, corpus, own_run):
    (own_run / "mine.txt").write_text("keep")
    words = ["train", f"data.path={corpus}", *SMALL, "train.steps=1", "--output", own_run]
    said = command(*words)
    assert said.code == 4 and "--overwrite" in said.error and newest_good(own_run).manifest.step == 40
    assert command(*words, "--overwrite", "--json").json["step"] == 1
    assert [step for step, _ in list_checkpoints(own_run)] == [1] and (own_run / "mine.txt").read_text() == "keep"


@pytest.mark.fault("S13")
@pytest.mark.parametrize("name", ["with space", "naïve-日本語", "x" * 250, "-dash", "123", "a: b", "quo'te\"s"])
def test_unusual_names_just_work(command, corpus, tmp_path, name):
    folder = tmp_path / name
    said = command("train", f"data.path={corpus}", *SMALL, "train.steps=1", "--output", folder, "--json")
    assert said.json["run"] == str(folder)
    assert command("inspect", folder, "--json").json["parameters"] == said.json["parameters"]


@pytest.mark.fault("S5")
def test_a_second_process_is_refused(command, corpus, tmp_path):
    folder = tmp_path / "run"
    with RunLock(folder):
        said = command("train", f"data.path={corpus}", *SMALL, "train.steps=1", "--output", folder)
    assert said.code == 4 and f"locked by pid {os.getpid()} on host {socket.gethostname()} since" in said.error


@pytest.mark.fault("S6")
def test_a_lock_from_another_host_needs_force(command, corpus, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.lock").write_text("77 elsewhere 2020-01-01T00:00:00+00:00\n")
    words = ["train", f"data.path={corpus}", *SMALL, "train.steps=1", "--output", folder]
    said = command(*words)
    assert said.code == 4 and "pid 77 on host elsewhere" in said.error and "--force" in said.error
    assert command(*words, "--force").code == 0


# --- resuming ------------------------------------------------------------------------------------------------------


def test_resume_gives_the_bytes_of_a_straight_run(command, corpus, trained, tmp_path):
    folder = tmp_path / "run"
    code = (
        "import sys, headway.training.loop as loop, headway.cli.main as main, torch\n"
        "torch.set_num_threads(1)\n"
        "update = loop.Trainer._update\n"
        "def stop(self):\n"
        "    update(self)\n"
        "    if self.progress.step == 17: import os, signal; os.kill(os.getpid(), signal.SIGTERM)\n"
        "loop.Trainer._update = stop\n"
        "sys.exit(main.main(sys.argv[1:]))\n"
    )
    words = ["train", f"data.path={corpus}", *SMALL, "train.steps=40", "--output", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(Path(headway.__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code, *words], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 143 and "saved" in done.stderr, done.stderr
    assert newest_good(folder).manifest.step == 17
    said = command(*words, "--resume")
    assert said.code == 0 and "resumed at step 17" in said.err
    assert newest_good(folder).manifest.weights == newest_good(trained).manifest.weights


@pytest.mark.fault("R9")
def test_resume_with_a_changed_config(command, own_run):
    saved = (own_run / "config.yaml").read_text()
    said = command("train", "--resume", own_run, "train.steps=50", "train.seed=5")
    assert said.code == 2 and "train.seed: 0 -> 5" in said.error and "train.steps: 40 -> 50" in said.error
    assert (own_run / "config.yaml").read_text() == saved, "a refused change leaves the run as it was"
    said = command("train", "--resume", own_run, "train.steps=50")
    assert said.code == 2 and "--override" in said.error
    assert command("train", "--resume", own_run, "train.steps=42", "--override", "--json").json["step"] == 42
    assert "steps: 42" in (own_run / "config.yaml").read_text()


def test_the_command_that_began_a_run_resumes_it(command, corpus, tmp_path):
    words = ["train", f"data.path={corpus}", "model.depth=1", "data.context=32", "train.steps=2", "tokenizer.kind=byte"]
    words += ["--output", tmp_path / "run"]
    assert command(*words, "--resume", "auto", "--json").json["step"] == 2
    assert "resumed at step 2" in command(*words, "--resume=auto").err


@pytest.mark.fault("R10")
def test_resume_on_changed_data(command, corpus, own_run, tmp_path):
    changed = tmp_path / "changed.txt"
    changed.write_text(corpus.read_text() + "one more line\n")
    said = command("train", "--resume", own_run, f"data.path={changed}")
    assert said.code == 3 and said.error.startswith("error: data: hash ") and "that of the saved run" in said.error


@pytest.mark.fault("R12")
def test_nothing_to_resume(command, corpus, tmp_path, own_run):
    said = command("train", "--resume", tmp_path / "nothing", f"data.path={corpus}")
    assert said.code == 3 and "no checkpoint to resume from" in said.error and "auto" in said.error
    for _, path in list_checkpoints(own_run):
        (path / "model.safetensors").write_bytes(b"cut")
    said = command("train", "--resume", own_run)
    assert said.code == 3 and "3 bytes" in said.error and said.error.count("model.safetensors") == 2


# --- where values come from ----------------------------------------------------------------------------------------


@pytest.mark.fault("F10")
@pytest.mark.parametrize("layers", range(8))
def test_print_config_shows_the_winner_and_its_origin(command, monkeypatch, tmp_path, layers):
    """All eight combinations of file, environment and command line; later ones win, the rest is the default."""
    given, winner = [], (0, "default")
    if layers & 1:
        (tmp_path / "run.yaml").write_text("train:\n  seed: 1\n")
        given, winner = ["run.yaml"], (1, "run.yaml")
    if layers & 2:
        monkeypatch.setenv("HEADWAY__TRAIN__SEED", "2")
        winner = (2, "environment")
    if layers & 4:
        given, winner = [*given, "train.seed=3"], (3, "command line")
    shown = command("train", "--print-config", "--json", *given).json
    assert (shown["config"]["train"]["seed"], shown["origins"]["train.seed"]) == winner
    text = command("train", "--print-config", *given).out
    line = next(line for line in text.splitlines() if line.startswith("train.seed "))
    assert line.split()[1] == str(winner[0]) and line.endswith(f"# {winner[1]}")


def test_flags_are_keys(command):
    words = ("--context", 64, "--val-fraction", 0.2, "--encoding-errors", "skip", "--newline", "lf", "--skip-bad-rows")
    data = command("train", "--print-config", "--json", *words).json["config"]["data"]
    assert data["context"] == 64 and data["val_fraction"] == 0.2 and data["skip_bad_rows"] is True
    assert data["encoding_errors"] == "skip" and data["newline"] == "lf"


def test_tokenizer_smaller_than_wanted_is_said(command, corpus, tmp_path):
    words = [w for w in SMALL if not w.startswith("tokenizer")]
    said = command(
        "train",
        f"data.path={corpus}",
        *words,
        "train.steps=1",
        "tokenizer.vocab_size=50000",
        "--output",
        tmp_path / "r",
    )
    assert said.code == 0 and "50000 wanted" in said.err


@pytest.mark.parametrize(("size", "expected"), [(0, 512), (10**5, 512), (10**6, 1024), (10**7, 4096), (10**12, 32768)])
def test_default_vocab_size(size, expected):
    assert material.default_vocab_size(size) == expected
