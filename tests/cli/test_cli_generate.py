"""`headway generate`: text, streams, JSON, and what is refused."""

from __future__ import annotations

import io
import json
import shutil
import sys
from types import SimpleNamespace

import pytest

import headway
from headway.cli import generate as verb
from headway.errors import ConfigError


def test_text_and_json_agree(command, trained):
    words = ("generate", trained, "-p", "the cat", "--max-tokens", 6, "--temperature", 0)
    result = command(*words, "--json").json
    assert set(result) >= {"text", "token_ids", "prompt_tokens", "generated_tokens", "seconds", "choices"}
    assert result["generated_tokens"] == len(result["token_ids"]) == 6 and result["finish_reason"] == "length"
    assert command(*words).out == result["text"] + "\n"
    assert command(*words, "--stream").out == result["text"] + "\n"
    loaded = headway.load(trained)
    assert headway.generate(loaded, "the cat", max_tokens=6, temperature=0.0)[0].text == result["text"]


def test_under_json_people_read_stderr(command, trained):
    said = command("generate", trained, "-p", "the", "--max-tokens", 4, "--stream", "--json", "--seed", 3)
    assert said.json["text"] in said.err and said.json["seed"] == 3


def test_options_as_overrides(command, trained):
    words = ("generate", trained, "-p", "the")
    assert (
        command(*words, "max_tokens=3", "temperature=0").out
        == command(*words, "--max-tokens", 3, "--temperature", 0).out
    )
    said = command(*words, "max_token=3")
    assert said.code == 2 and "did you mean 'max_tokens'" in said.error


def test_several_prompts_and_samples(command, trained):
    said = command("generate", trained, "-p", "the", "-p", "a", "--n", 2, "--max-tokens", 2, "--json", "--seed", 1)
    assert said.json["choices"][0]["text"] == said.json["text"] and len(said.json["choices"]) == 4
    assert said.err.count("--- prompt") == 4


def test_a_draft_and_keys_in_codes(command, trained, tmp_path):
    """The model drafts for itself; what drafts with other tokens is refused with the first of them."""
    words = ("generate", trained, "-p", "the cat", "--max-tokens", 9, "--temperature", 0)
    known = command(*words, "--json").json
    assert command(*words, "--draft", trained, "--draft-tokens", 3, "--json").json["token_ids"] == known["token_ids"]
    assert command(*words, "--kv-dtype", "int8", "--json").json["generated_tokens"] == 9
    said = command(*words, "--kv-dtype", "int4")
    assert said.code == 2 and "kv_dtype" in said.error and "'int8'" in said.error
    other = tmp_path / "other"
    shutil.copytree(trained, other)
    tree = json.loads((other / "tokenizer.json").read_text())
    vocab = tree["model"]["vocab"]
    one, two = list(vocab)[5:7]
    vocab[one], vocab[two] = vocab[two], vocab[one]
    (other / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match=r"draft: its token 5 is"):
        headway.generate(
            headway.load(trained), "the", draft=headway.load(other, force_tokenizer=True), max_tokens=3, seed=0
        )


def test_a_model_and_a_tokenizer_are_enough(trained):
    loaded = headway.load(trained)
    given = SimpleNamespace(model=loaded.model, tokenizer=loaded.tokenizer)
    how = {"max_tokens": 4, "temperature": 0.0}
    assert headway.generate(given, "the", **how)[0].text == headway.generate(loaded, "the", **how)[0].text


def test_beams(command, trained):
    said = command("generate", trained, "-p", "the", "--beams", 3, "--n", 2, "--max-tokens", 3, "--json")
    scores = [choice["score"] for choice in said.json["choices"]]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.fault("G8")
def test_logprobs_are_strict_json(command, trained):
    result = command("generate", trained, "-p", "the", "--max-tokens", 2, "--logprobs", 2, "--json").json
    assert len(result["logprobs"]) == 2 and len(result["logprobs"][0]["top"]) == 2


def test_prompt_from_stdin(command, trained, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the cat\n")))
    result = command("generate", trained, "--max-tokens", 1, "--json", "--temperature", 0).json
    assert (
        result["token_ids"]
        == command("generate", trained, "-p", "the cat", "max_tokens=1", "temperature=0", "--json").json["token_ids"]
    )
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ok \xff")))
    said = command("generate", trained)
    assert said.code == 3 and "invalid UTF-8 at byte 3" in said.error


def test_no_prompt_at_a_terminal(command, trained, monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    said = command("generate", trained)
    assert said.code == 2 and "--prompt" in said.error


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--temperature", "nan"], ["temperature"]),
        (["--temperature", "-1"], ["temperature"]),
        (["--temperature", "1e400"], ["temperature"]),
        (["--top-p", "2"], ["top_p"]),
        (["--max-tokens", "0"], ["max_tokens"]),
        (["--n", "1000000000"], ["n"]),
        (["--logprobs", "21"], ["logprobs"]),
        (["--beams", "2", "--top-k", "3"], ["beams and sampling"]),
        (["--truncate", "right"], ["truncate"]),
    ],
)
@pytest.mark.fault("G5", "G6", "G7", "G10")
def test_wrong_values_are_named_before_the_model_is_loaded(command, monkeypatch, words, parts):
    from headway import api

    monkeypatch.setattr(api, "load", lambda *_, **__: pytest.fail("loaded"))
    said = command("generate", "anything", "-p", "x", *words)
    assert said.code == 2 and all(part in said.error for part in parts), said.error


@pytest.mark.fault("G1")
def test_a_prompt_longer_than_the_context(command, trained):
    long = "cat mat " * 200
    said = command("generate", trained, "-p", long)
    assert said.code == 2 and "in a context of 32" in said.error and "--truncate left" in said.error
    assert command("generate", trained, "-p", long, "--truncate", "left", "--json").json["truncated"] > 0


@pytest.mark.fault("T10")
def test_a_prompt_that_is_not_unicode(command, trained):
    said = command("generate", trained, "-p", "caf\udce9")
    assert said.code == 3 and "not valid Unicode" in said.error


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


ESCAPES = "\x1b]0;pwned\x07plain\x1b[2J\x1b[31m red\x9b5A"


@pytest.mark.fault("G20")
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("raw", [False, True])
def test_terminal_escapes_are_stripped_unless_raw(command, trained, monkeypatch, stream, raw):
    from headway import api

    def escape(loaded, prompts, on_text=None, **options):
        if on_text is not None:
            for letter in ESCAPES:
                on_text(0, letter)
        return [headway_result(ESCAPES)]

    monkeypatch.setattr(api, "generate", escape)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    words = ["generate", trained, "-p", "x", *(["--stream"] if stream else []), *(["--raw"] if raw else [])]
    assert command(*words).code == 0
    assert terminal.getvalue() == (f"{ESCAPES}\n" if raw else "plain red\n")


@pytest.mark.fault("G20")
def test_a_pipe_gets_the_text_as_it_is(command, trained, monkeypatch):
    from headway import api

    monkeypatch.setattr(api, "generate", lambda *_, **__: [headway_result(ESCAPES)])
    assert command("generate", trained, "-p", "x").out == ESCAPES + "\n"


def headway_result(text):
    from headway.generation import Generation

    return Generation(text, [1], 1, 1, "length", None, 0.0)


def test_choice_is_plain_json():
    assert json.loads(json.dumps(verb.choice(headway_result("x"))))["text"] == "x"
