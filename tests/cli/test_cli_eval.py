"""`headway eval`: figures with intervals, strict JSON, mistakes named."""

from __future__ import annotations

import math

import pytest

import headway
from headway.evaluation import TextTokens, perplexity


def test_it_measures_what_the_library_measures(command, trained, corpus, tmp_path):
    text = corpus.read_text()[:3000]
    (tmp_path / "some.txt").write_text(text)
    said = command("eval", trained, "--task", "perplexity", "--data", "some.txt", "--json")
    loaded = headway.load(trained)
    ids = loaded.tokenizer.encode(text)
    expected = perplexity(loaded.model, [TextTokens.of(ids, loaded.tokenizer)])
    shown = said.json
    for name in ("perplexity", "bits_per_byte", "loss"):
        row = shown[name]
        assert row["value"] == pytest.approx(getattr(expected, name).value, rel=1e-5)
        assert row["low"] <= row["value"] <= row["high"] and row["n"] > 1
    assert shown["bytes"] == len(text.encode()) - len(loaded.tokenizer.token_bytes(ids[0]))
    assert shown["units"] == "windows" and shown["context"] == 32 and shown["stride"] == 16
    assert math.log(shown["perplexity"]["value"]) == pytest.approx(shown["loss"]["value"])


def test_a_model_that_has_learnt_knows_its_language_better_than_another(command, trained, corpus, tmp_path):
    (tmp_path / "other.txt").write_text("Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. " * 40)
    own = command("eval", trained, "--data", corpus, "--json").json
    other = command("eval", trained, "--data", "other.txt", "--json").json
    assert own["bits_per_byte"]["high"] < other["bits_per_byte"]["low"]


def test_words_for_people(command, trained, corpus):
    said = command("eval", trained, "--data", corpus, "--stride", 8)
    assert said.code == 0 and "bits_per_byte" in said.out and "stride 8" in said.out and "95 %" in said.out


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        (["--task", "perplexty"], 2, "did you mean 'perplexity'"),
        ([], 2, "--data FILE"),
        (["--data", "absent.txt"], 3, "absent.txt"),
        (["--data", "empty.txt"], 3, "0 documents"),
        (["--data", "{corpus}", "--context", "999"], 2, "max_len 32"),
        (["--data", "{corpus}", "--stride", "32"], 2, "stride"),
        (["--data", "{corpus}", "--encoding-errors", "perhaps"], 2, "data.encoding_errors"),
    ],
)
def test_mistakes_are_named(command, trained, corpus, tmp_path, words, code, part):
    (tmp_path / "empty.txt").write_text("  \n")
    said = command("eval", trained, *(word.format(corpus=corpus) for word in words))
    assert said.code == code and part in said.error
