"""`headway chat`: at a terminal (a real one, through a pseudo-terminal), through a pipe, and what is refused."""

from __future__ import annotations

import builtins
import contextlib
import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from chat_toys import CHATML, chat_folder, chat_tokenizer, saying, table_model
from conftest import Said

import headway
from headway import api
from headway.cli import chat as verb
from headway.cli.main import main
from headway.config import ModelConfig
from headway.kernels.ggml import quantize
from headway.kernels.native import library
from headway.loading import Loaded
from headway.nn import Transformer
from headway.nn.packed import Packed, PackedEmbedding, PackedLinear, exact

SRC = Path(headway.__file__).parent.parent
ENDLESS = "abcdefghij "


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models that say one thing: two answers of the same weight, an endless one, one that writes to the title bar."""
    place = tmp_path_factory.mktemp("models")
    chat_folder(place / "okay", saying("Okay!", "Sure."))
    chat_folder(place / "endless", saying(ENDLESS, ends=False), max_len=16384)
    chat_folder(place / "escape", saying("\x1b]0;pwned\x07k"))
    chat_folder(place / "plain", saying("ok"), template=None)
    chat_folder(place / "hostile", saying("ok"), template="{{ ().__class__.__mro__[1].__subclasses__() }}")
    api.load(place / "plain")  # imports once what every forked process would
    return place


@pytest.fixture
def okay(folders):
    return folders / "okay"


@pytest.fixture
def piped(command, monkeypatch):
    """The command with some bytes on stdin."""

    def call(data: str | bytes, *words: object) -> Said:
        raw = data if isinstance(data, bytes) else data.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
        return command("chat", *words)

    return call


@pytest.fixture
def typed(command, monkeypatch):
    """The command with lines typed at a terminal, then Ctrl-D; an exception among them is raised at the prompt."""

    def call(lines, *words: object) -> Said:
        rest = iter([*lines, EOFError()])

        def read(prompt: str = "") -> str:
            line = next(rest)
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr(builtins, "input", read)
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
        return command("chat", *words)

    return call


# --- a real terminal ---------------------------------------------------------------------------------------------


class Terminal:
    """The command in a process whose terminal we hold. The process is forked off this one, which has torch already."""

    def __init__(self, *words: object) -> None:
        self.fd, theirs = pty.openpty()
        self.pid = os.fork()
        if self.pid == 0:
            code = 99
            try:
                os.close(self.fd)
                os.setsid()
                fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)
                for fd in range(3):
                    os.dup2(theirs, fd)
                os.environ["TERM"] = "dumb"
                sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
                code = main(["chat", *map(str, words)])
            finally:
                os._exit(code)
        os.close(theirs)
        self.held = ""

    def until(self, text: str, seconds: float = 30) -> str:
        """Everything up to `text` and with it."""
        limit = time.monotonic() + seconds
        while text not in self.held:
            ready, _, _ = select.select([self.fd], [], [], max(limit - time.monotonic(), 0))
            assert ready, f"no {text!r} in {self.held!r}"
            self.held += os.read(self.fd, 4096).decode().replace("\r\n", "\n")
        seen, _, self.held = self.held.partition(text)
        return seen + text

    def type(self, text: str, until: str = "\n> ") -> str:
        """Type, and return what comes up to the next prompt."""
        os.write(self.fd, text.encode())
        return self.until(until)

    def close(self) -> int:
        """What is left to read, and the exit code."""
        with contextlib.suppress(OSError):  # the other side is gone
            while select.select([self.fd], [], [], 30)[0]:
                self.held += os.read(self.fd, 4096).decode()
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.pid = 0
        return code


@pytest.fixture
def terminal():
    opened = []
    yield lambda *words: opened.append(Terminal(*words)) or opened[-1]
    for one in opened:
        if one.pid:
            os.kill(one.pid, signal.SIGKILL)
            os.waitpid(one.pid, 0)
        os.close(one.fd)


def test_a_session_at_a_terminal(terminal, okay):
    one = terminal(okay, "--temperature", 0, "--threads", 1)
    assert one.until("> ").endswith("/help lists the commands, Ctrl-D leaves\n> ")
    said = one.type("hello\r")
    assert re.fullmatch(r"hello\nOkay!\n\x1b\[2m\[6 tokens, \d+\.\d tokens/s, context 30 of 256\]\x1b\[0m\n> ", said), (
        repr(said)
    )
    assert "no system prompt\n" in one.type("/system\r")
    assert "started over" in one.type("/system Be \x1bbrief.\r")  # readline takes the escape as Meta
    one.type("one\\\r", until=". ")
    assert "\nOkay!\n" in one.type("two\r")
    assert "did you mean 'save'" in one.type("/sav\r")
    assert "\nOkay!\n" in one.type("//etc\r")
    assert "saved 5 messages in chat.json" in one.type("/save\r")
    messages = json.loads(Path("chat.json").read_text())["messages"]
    assert [m["content"] for m in messages[1:]] == ["one\ntwo", "Okay!", "/etc", "Okay!"]
    os.write(one.fd, b"\x04")
    assert one.close() == 0 and "rror" not in one.held


def test_ctrl_c_ends_an_answer_and_at_the_prompt_the_chat(terminal, folders):
    one = terminal(folders / "endless", "--max-tokens", 16000, "--save", "kept.json")
    one.until("> ")
    one.type("go\r", until=ENDLESS * 2)
    said = one.type("\x03")
    assert re.search(r"\[\d+ tokens, [\d.]+ tokens/s, context \d+ of 16384, interrupted\]", said), said
    question, answer = json.loads(Path("kept.json").read_text())["messages"]
    assert question["content"] == "go" and answer["cut"] is True
    assert answer["content"] == (ENDLESS * 2000)[: len(answer["content"])] and len(answer["content"]) >= 22
    # What was written is in the history, and the next answer goes on from it.
    one.type("more\r", until=ENDLESS)
    one.type("\x03")
    assert len(json.loads(Path("kept.json").read_text())["messages"]) == 4
    os.write(one.fd, b"/ex\x03")
    assert one.close() == 130
    assert one.held.endswith("error: interrupted\r\n") and "Traceback" not in one.held


@pytest.mark.fault("G20")
@pytest.mark.parametrize("raw", [False, True])
def test_escapes_reach_a_terminal_only_if_raw(terminal, folders, raw):
    one = terminal(folders / "escape", *(["--raw"] if raw else []))
    one.until("> ")
    said = one.type("hello\r", until="tokens")
    assert ("\x1b]0;pwned\x07k\n" in said) == raw and ("hello\nk\n" in said) != raw
    one.type("/exit\r", until="/exit")
    assert one.close() == 0


# --- typed lines, without the terminal's echo ----------------------------------------------------------------------


def test_every_command(typed, okay, tmp_path):
    lines = ["/help", "/tokens", "hi", "/tokens", "/retry", "/undo", "/undo", "/retry", "hi", "/save a.json", "/clear"]
    lines += ["/load a.json", "/save a.json", "/system", "/system Short.", "/system", "/exit", "never read"]
    said = typed(lines, okay, "--temperature", 0)
    assert said.code == 0 and said.out == "Okay!\n" * 3
    notes = said.err.splitlines()
    assert notes.pop(0) == "/help lists the commands, Ctrl-D leaves"
    assert [line.split()[0] for line in notes[: len(verb.COMMANDS)]] == [f"/{name}:" for name in verb.COMMANDS]
    assert all(hasattr(verb.Chat, f"do_{name}") for name in verb.COMMANDS)
    assert notes[len(verb.COMMANDS) + 2 :] == [
        "0 of 256 tokens",
        "28 of 256 tokens",
        "note: at temperature 0 the answer is the same each time",
        "forgotten; 0 messages are left",
        "error: undo: nothing was asked yet; expected a question",
        "error: retry: nothing was asked yet; expected a question",
        "saved 2 messages in a.json",
        "started over",
        "loaded 2 messages from a.json",
        "saved 2 messages in a.json",
        "no system prompt",
        "started over with the new system prompt",
        "Short.",
        "",
    ]


def test_set_validates_as_the_options_do(typed, okay):
    lines = [
        "/set",
        "/set temperature=0",
        "/set max-tokens = 3",
        "hi",
        "/set top_p=2",
        "/set temprature=1",
        "/set seed",
    ]
    lines += ["/set n=2", "/set stop=[k, y]", "/set stop=", "/set max_tokens=9", "/set temperature=-1", "hi"]
    said = typed(lines, okay, "--seed", 4, "--stop", "?")
    notes = said.err.splitlines()[1:-1]
    assert said.code == 0 and said.out == "Oka\nOkay!\n"
    assert "temperature=0.7" in notes[0] and "seed=4" in notes[0] and "stop=('?',)" in notes[0]
    assert notes[1:3] == ["temperature=0.0", "max_tokens=3"]
    assert notes[3].startswith("error: top_p:") and "did you mean 'temperature'" in notes[4]
    assert notes[5] == "seed=None", "no value: the default"
    assert "/set n: unknown name" in notes[6] and notes[7:10] == ["stop=('k', 'y')", "stop=()", "max_tokens=9"]
    assert notes[10].startswith("error: temperature:") and len(notes) == 11


def test_another_answer_is_another_seed(typed, okay):
    said = typed(["hi", *["/retry"] * 9], okay, "--seed", 1, "--json")
    replies = said.json["replies"]
    assert [reply["seed"] for reply in replies] == list(range(1, 11))
    assert {reply["text"] for reply in replies} == {"Okay!", "Sure."}
    assert len(said.json["messages"]) == 2 and all(reply["text"] in said.err for reply in replies)


def test_files_are_not_written_over(typed, okay, tmp_path):
    Path("other.txt").write_text("mine")
    said = typed(["hi", "/save other.txt", "/save", "/save chat.json", "/load other.txt", "/load nothing.json"], okay)
    notes = said.err.splitlines()[1:-1]
    assert notes[0].startswith("error: other.txt: exists already") and Path("other.txt").read_text() == "mine"
    assert notes[1] == notes[2] == "saved 2 messages in chat.json"
    assert notes[3].startswith("error: other.txt: not valid JSON") and "no such file" in notes[4]
    assert typed([], okay, "--save", "chat.json").code == 4
    said = typed(["hi", "/save no/such/folder.json"], okay, "--save", "new/folder/chat.json")
    assert Path("new/folder/chat.json").is_file() and "create the folder first" in said.err
    assert typed(["hi"], okay, "--save", "other.txt/chat.json").code == 4


def test_a_chat_goes_on_in_its_file(typed, okay):
    assert typed(["one"], okay, "--save", "c.json", "--system", "S").code == 0
    said = typed(["two", "/undo", "three"], okay, "--save", "c.json", "--load", "c.json")
    messages = json.loads(Path("c.json").read_text())["messages"]
    assert said.code == 0 and [m["content"] for m in messages if m["role"] != "assistant"] == ["S", "one", "three"]
    said = typed([], okay, "--load", "c.json", "--system", "T", "--json")
    assert said.json["messages"] == [{"role": "system", "content": "T"}, *messages[1:]]


def test_an_interrupt_between_answers_leaves(typed, okay):
    said = typed(["hi", KeyboardInterrupt()], okay, "--save", "c.json")
    assert said.code == 130 and Path("c.json").is_file()


def test_an_interrupt_during_a_command_does_not(typed, okay, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(verb.Chat, "do_tokens", interrupted)
    said = typed(["/tokens", "hi"], okay, "temperature=0")
    assert said.code == 0 and said.out == "Okay!\n" and "interrupted" in said.err


def test_the_oldest_messages_make_room_and_a_long_one_is_refused(typed, okay):
    said = typed([*[f"question {n}" for n in range(8)], "x" * 500, "/tokens"], okay, "--max-tokens", 40)
    assert said.code == 0 and len(said.out.splitlines()) == 8
    notes = [line for line in said.err.splitlines() if line.startswith("note: ")]
    assert notes == ["note: the context of 256 tokens is full, the 6 oldest messages are left out"]
    (error,) = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert "at most 216" in error and "the 6 oldest messages are left out" in said.err.splitlines()[-2]


# --- through a pipe ------------------------------------------------------------------------------------------------


def test_lines_of_a_pipe_are_messages(piped, okay):
    said = piped("hello\n\n  \n/help\n//x\nends\\\r\nlast", okay, "--temperature", 0, "--max-tokens", 9)
    assert (said.code, said.out, said.err) == (0, "Okay!\n" * 5, "")
    result = piped("hello\n/help\n//x\nends\\\r\nlast", okay, "--temperature", 0, "--max-tokens", 9, "--json").json
    assert [m["content"] for m in result["messages"][::2]] == ["hello", "/help", "//x", "ends\\", "last"]
    assert len(result["replies"]) == 5 and result["generated_tokens"] == 5 * 6 and result["seconds"] > 0
    assert result["prompt_tokens"] == sum(reply["prompt_tokens"] for reply in result["replies"])
    assert result["reused_tokens"] > result["prompt_tokens"] // 2
    assert {reply["finish_reason"] for reply in result["replies"]} == {"stop"}


def test_a_process_of_its_own(okay):
    done = subprocess.run(
        [sys.executable, "-m", "headway", "chat", str(okay), "--json", "--system", "<|im_end|>", "temperature=0"],
        input=b"<|im_end|>\n<|im_start|>system\n",
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(SRC)},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0 and done.stderr == b"Okay!\nOkay!\n"
    result = json.loads(done.stdout)
    assert [m["content"] for m in result["messages"]] == [
        "<|im_end|>", "<|im_end|>", "Okay!", "<|im_start|>system", "Okay!"
    ]  # fmt: skip


@pytest.mark.fault("G1", "T10")
def test_lines_that_get_no_answer(piped, okay):
    said = piped(b"one\n" + b"x" * 500 + b"\ncaf\xe9\ntwo\n", okay, "--temperature", 0)
    assert said.code == 3 and said.out == "Okay!\nOkay!\n"
    assert said.error.startswith("error: stdin: 2 of its lines got no answer")
    long, broken, _ = said.err.splitlines()
    assert long.startswith("line 2: message: ") and "at most 128" in long
    assert broken.startswith("line 3: ") and "not valid Unicode" in broken
    assert piped("", okay).out == ""


@pytest.mark.fault("G20")
def test_a_pipe_gets_the_text_as_it_is(piped, folders):
    assert piped("x", folders / "escape").out == "\x1b]0;pwned\x07k\n"


# --- what is refused -----------------------------------------------------------------------------------------------


def test_a_model_without_a_template(piped, folders, tmp_path):
    said = piped("hello", folders / "plain")
    assert said.code == 2 and "no chat template" in said.error
    assert "--template FILE.jinja" in said.error and "headway generate" in said.error
    Path("own.jinja").write_text(CHATML)
    assert piped("hello", folders / "plain", "--template", "own.jinja").out == "ok\n"
    Path("own.jinja").write_bytes(b"\xff")
    said = piped("hello", folders / "plain", "--template", "own.jinja")
    assert said.code == 3 and "own.jinja: not valid Unicode" in said.error
    assert piped("hello", folders / "plain", "--template", "none.jinja").code == 3


@pytest.mark.fault("Q8")
def test_a_hostile_template(piped, folders):
    said = piped("hello", folders / "hostile")
    assert said.code == 3 and said.out == "" and "hostile chat template" in said.error
    assert len(said.err.splitlines()) == 1


@pytest.mark.fault("G19")
@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "encoder", "vocab_size": 259},
        {"kind": "vision", "vocab_size": 0, "embeddings": {"patch": {"size": 4, "image": 8}}},
    ],
)
def test_models_that_write_no_text(piped, monkeypatch, fields):
    config = ModelConfig(**{"d_model": 16, "n_layers": 1, "n_heads": 2, "max_len": 5, **fields})
    monkeypatch.setattr(api, "load", lambda *_, **__: Loaded(Transformer(config), None, config, Path("m")))
    said = piped("hello", "m")
    assert said.code == 2 and f"{fields['kind']}: encoder-only, it writes no text" in said.error


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        (["--temperature", "nan"], 2, "temperature"),
        (["--max-tokens", "0"], 2, "max_tokens"),
        (["top_p=2"], 2, "top_p"),
        (["--dtype", "float8"], 2, "stored, float32, float16, bfloat16"),
        (["--save", "there.json"], 4, "--load there.json"),
        (["--thread", "0"], 2, "thread"),
        (["another"], 2, "2 paths"),
    ],
)
@pytest.mark.fault("G5", "G6", "G10", "S13")
def test_wrong_options_are_named_before_the_model_is_loaded(piped, monkeypatch, words, code, part):
    Path("there.json").write_text("{}")
    monkeypatch.setattr(api, "load", lambda *_, **__: pytest.fail("loaded"))
    said = piped("hello", "anything", *words)
    assert said.code == code and part in said.error


# --- weights -------------------------------------------------------------------------------------------------------


def packed_model() -> Loaded:
    plain = table_model(saying("ok"))
    weights = {
        name: Packed.of_blocks((("Q8_0", quantize("Q8_0", tensor, name)),)) if tensor.ndim == 2 else tensor
        for name, tensor in plain.state_dict().items()
        if tensor.ndim != 2 or tensor.shape[1] % 32 == 0
    } | {name: tensor for name, tensor in plain.state_dict().items() if tensor.ndim == 2 and tensor.shape[1] % 32}
    return Loaded(Transformer.of(plain.config, weights), chat_tokenizer(), plain.config, Path("m.gguf"), form="gguf")


def test_quantized_weights_run_as_they_are_where_a_kernel_can():
    loaded = packed_model()
    assert (verb._unpacked(loaded) is loaded.model) is (library() is not None)


def test_without_kernels_quantized_weights_become_float32_where_they_fit(piped, monkeypatch):
    loaded = packed_model()
    monkeypatch.setattr("headway.kernels.native.library", lambda: None)
    kinds = (PackedLinear, PackedEmbedding)
    assert sum(isinstance(module, kinds) for module in loaded.model.modules()) > 3
    model = verb._unpacked(loaded)
    assert not any(isinstance(module, kinds) for module in model.modules())
    ids = torch.arange(20)[None]
    with exact():
        assert torch.equal(model(ids).logits, loaded.model(ids).logits)
    Path("t.jinja").write_text(CHATML)
    monkeypatch.setattr(api, "load", lambda *_, **__: loaded)
    used = []
    monkeypatch.setattr(verb, "_unpacked", lambda loaded: used.append("unpacked") or loaded.model)
    for dtype in ([], ["--dtype", "stored"]):
        assert piped("hello", "m.gguf", "--template", "t.jinja", *dtype).out == "ok\n"
    assert used == ["unpacked"]


def test_quantized_weights_stay_so_where_memory_is_short(piped, monkeypatch):
    loaded = packed_model()
    monkeypatch.setattr(api, "load", lambda *_, **__: loaded)
    monkeypatch.setattr("headway.kernels.native.library", lambda: None)
    monkeypatch.setattr("headway.machine.memory", lambda: (1 << 30, 500_000))
    Path("t.jinja").write_text(CHATML)
    said = piped("hello", "m.gguf", "--template", "t.jinja")
    assert said.out == "ok\n" and said.err.startswith("note: the weights stay quantized, which is slow")
    assert verb._unpacked(loaded) is loaded.model


def test_weights_are_cast_on_request(piped, okay, monkeypatch):
    asked = []
    load = api.load
    monkeypatch.setattr(api, "load", lambda path, **how: asked.append(how["dtype"]) or load(path, **how))
    for words in ([], ["--dtype", "stored"], ["--dtype", "bfloat16"]):
        assert piped("hello", okay, "--temperature", 0, *words).out == "Okay!\n"
    assert asked == [None, "stored", "bfloat16"]
