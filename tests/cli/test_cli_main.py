"""The command itself: help without torch, one line per error, exit codes, JSON alone on stdout."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import headway
from headway.cli import doctor
from headway.cli.main import VERBS, main
from headway.errors import BugError, DivergedError, InputError, Interrupted, MachineError, WorkerError

SRC = Path(headway.__file__).parent.parent
HEAVY = ("torch", "numpy", "pydantic", "rich", "tokenizers", "yaml")
HELP = f"""
import sys
from headway.cli.main import main
code = main(sys.argv[1:])
print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
sys.exit(code)
"""


def child(*words: str, **options: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(SRC)}
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=environment, timeout=120, check=False, **options
    )


@pytest.mark.parametrize("arguments", [[], ["--help"], ["--version"], *([verb, "--help"] for verb in VERBS)])
def test_help_imports_nothing_heavy(arguments):
    done = child("-c", HELP, *arguments)
    assert done.returncode == 0 and done.stderr == "[]\n" and done.stdout.strip()


def test_importing_headway_imports_nothing_heavy():
    code = f"import sys, headway; assert not [n for n in {HEAVY!r} if n in sys.modules]; headway.build"
    done = child("-c", code + "; assert 'torch' in sys.modules")
    assert done.returncode == 0, done.stderr


def test_help_lists_every_verb_and_nothing_else(command):
    said = command("--help")
    listed = [line.split()[0] for line in said.out.splitlines() if line.startswith("  ")]
    assert listed == list(VERBS)
    for verb in VERBS:
        assert "--json" in command(verb, "--help").out


def test_python_minus_m(tmp_path):
    done = child("-m", "headway", "doctro", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "" and "did you mean 'doctor'?" in done.stderr


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["trian"], ["unknown verb 'trian'", "did you mean 'train'"]),
        (["zzz"], ["unknown verb 'zzz'", "headway --help"]),
        (["doctor", "--prob"], ["no such option", "--probe"]),
        (["doctor", "prob=true"], ["unknown key 'prob'", "did you mean 'probe'"]),
        (["doctor", "probe=perhaps"], ["'perhaps'", "true or false"]),
        (["generate", "x", "--max-tokens", "ten"], ["--max-tokens", "integer"]),
        (["generate", "-p", "a"], ["PATH", "no path"]),
        (["generate", "a", "b", "-p", "x"], ["2 paths: a, b"]),
        (["inspect"], ["PATH"]),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(command, words, parts):
    said = command(*words)
    assert said.code == 2 and said.out == ""
    assert all(part in said.error for part in parts), said.error


ERRORS = [
    (InputError("f", "bad"), 3, "error: f: bad"),
    (MachineError("f", "full"), 4, "error: f: full"),
    (DivergedError("f", "nan"), 5, "error: f: nan"),
    (WorkerError("f", "dead"), 6, "error: f: dead"),
    (BugError("f", "odd"), 70, "error: f: odd"),
    (Interrupted(15, "SIGTERM", "saved"), 143, "error: SIGTERM: saved"),
    (KeyboardInterrupt(), 130, "error: interrupted"),
    (ZeroDivisionError("division by zero"), 70, "error: a bug in headway"),
    (MemoryError(), 4, "error: out of memory"),
    (
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        4,
        "error: out of memory",
    ),
]


@pytest.mark.parametrize(("error", "code", "text"), ERRORS, ids=lambda value: str(value)[:20])
def test_exit_codes(command, monkeypatch, error, code, text):
    def fail(options: object) -> None:
        raise error

    monkeypatch.setattr(doctor, "run", fail)
    said = command("doctor")
    assert said.code == code and said.error.startswith(text)
    debug = command("doctor", "--debug")
    assert debug.code == code and "Traceback (most recent call last)" in debug.err


def test_an_unknown_error_says_how_to_see_the_traceback(command, monkeypatch):
    monkeypatch.setattr(doctor, "facts", lambda: 1 // 0)
    assert "ZeroDivisionError" in command("doctor").error and "--debug" in command("doctor").error


@pytest.mark.fault("G20")
def test_a_file_name_cannot_drive_the_terminal(command):
    said = command("inspect", "\x1b]0;title\x07\x1b[2J.txt")
    assert said.code == 3 and "\x1b" not in said.err and "\x07" not in said.err


@pytest.mark.fault("R6")
def test_a_reader_that_goes_away_gets_no_traceback(tmp_path):
    """`headway --help | head -c 1`: the pipe is closed before anything is written."""
    for words in (["--help"], ["doctor"], ["inspect", "--schema"]):
        read, write = os.pipe()
        os.close(read)
        environment = {**os.environ, "PYTHONPATH": str(SRC)}
        command = [sys.executable, "-m", "headway", *words]
        done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, env=environment, timeout=120, check=False)
        os.close(write)
        assert done.returncode == 128 + signal.SIGPIPE and done.stderr == b"", (words, done)


def test_a_closed_stderr_does_not_hide_the_exit_code(monkeypatch):
    class Closed:
        def write(self, text: str) -> int:
            raise BrokenPipeError

        def flush(self) -> None:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Closed())
    assert main(["inspect", "absent"]) == 3


def test_overrides_set_options_by_name(command, monkeypatch):
    seen = SimpleNamespace()
    monkeypatch.setattr(doctor, "facts", lambda: seen.__dict__.setdefault("called", {}))
    monkeypatch.setattr(doctor, "_show_facts", lambda printer, known: None)
    assert command("doctor", "json=true").json == {}
    assert command("doctor", "json=false").out.startswith("\nheadway doctor --probe")
