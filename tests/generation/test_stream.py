"""Streams release whole characters only, never half a stop string, and no terminal escape."""

from __future__ import annotations

import random

import pytest
from generation_toys import byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.generation import EscapeFilter, TextStream, strip_escapes
from headway.text import Tokenizer, train_tokenizer

TEXTS = ["🙂", "👩‍👩‍👧‍👦 family", "日本語のテキスト", "naïve café", "한국어", "🇩🇪🏴󠁧󠁢󠁥󠁮󠁧󠁿", "a\u0301b", "𝒳≠∅ \U0010ffff"]


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_tokenizer(TEXTS * 20, "bpe", 320)


def stream_all(tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...] = (), cut: bool = True) -> list[str]:
    stream = TextStream(tokenizer, stop, at_start=True)
    parts = []
    for token in ids:
        parts.append(stream.feed(token))
        if stream.stopped:
            break
    parts.append(stream.finish(cut=cut))
    assert stream.text == "".join(parts)
    return parts


@pytest.mark.fault("G12")
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_every_split_and_every_cut(text: str, kind: str, bpe: Tokenizer) -> None:
    tokenizer = byte_tokenizer() if kind == "byte" else bpe
    ids = tokenizer.encode(text)
    assert "".join(stream_all(tokenizer, ids)) == text
    for n in range(1, len(ids) + 1):
        parts = stream_all(tokenizer, ids[:n])
        shown = "".join(parts)
        assert "\ufffd" not in shown
        assert text.startswith(shown)
        assert shown == tokenizer.decode_bytes(ids[:n]).decode(errors="ignore")


@pytest.mark.fault("G12")
def test_decoding_token_by_token_would_show_replacement_characters() -> None:
    """Negative control: without the held bytes every part of an emoji is U+FFFD."""
    tokenizer = byte_tokenizer()
    naive = "".join(tokenizer.decode([token]) for token in tokenizer.encode("🙂"))
    assert naive == "\ufffd" * 4


@pytest.mark.fault("G12")
@given(st.binary(max_size=24))
@settings(max_examples=300, deadline=None)
def test_truly_invalid_bytes_become_replacement_characters_once(data: bytes) -> None:
    """As Python decodes them in one go; an unfinished end is kept when the model ended there by itself."""
    parts = stream_all(byte_tokenizer(), list(data), cut=False)
    assert "".join(parts) == data.decode(errors="replace")


def first_stop(text: str, stops: tuple[str, ...]) -> str:
    """Oracle: read character by character, cut where the first complete stop string begins."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


@pytest.mark.fault("G12")
@given(st.text("ab🙂\n", max_size=20), st.lists(st.text("ab🙂\n", min_size=1, max_size=4), min_size=1, max_size=3))
@settings(max_examples=500, deadline=None)
def test_stop_strings_against_reading_by_character(text: str, stops: list[str]) -> None:
    tokenizer = byte_tokenizer()
    assert "".join(stream_all(tokenizer, tokenizer.encode(text), tuple(stops))) == first_stop(text, tuple(stops))


@given(st.lists(st.text("abc", min_size=1, max_size=5), max_size=8), st.lists(st.text("abc", min_size=1, max_size=4)))
@settings(max_examples=300, deadline=None)
def test_the_cut_does_not_depend_on_the_tokens(pieces: list[str], stops: list[str]) -> None:
    stream = TextStream(byte_tokenizer(), stops)
    shown = ""
    for piece in pieces:
        shown += stream._take(piece, search=True)
        if stream.stopped:
            break
    assert shown + stream.finish(cut=True) == first_stop("".join(pieces), tuple(stops))


@pytest.mark.fault("G12")
def test_half_a_stop_string_is_held_back() -> None:
    tokenizer = byte_tokenizer()
    stream = TextStream(tokenizer, ["END"])
    shown = [stream.feed(token) for token in tokenizer.encode("xENyEND")]
    assert shown == ["x", "", "", "ENy", "", "", ""]
    assert stream.stopped
    assert stream.finish(cut=True) == ""


def test_search_off_lets_a_stop_string_pass() -> None:
    tokenizer = byte_tokenizer()
    stream = TextStream(tokenizer, ["ab"])
    shown = "".join(stream.feed(token, search=place >= 2) for place, token in enumerate(tokenizer.encode("abab")))
    assert shown == "ab"
    assert stream.stopped


def test_special_tokens_have_no_text() -> None:
    stream = TextStream(byte_tokenizer())
    assert [stream.feed(token) for token in (104, 256, 105)] == ["h", "", "i"]


def test_words_keep_the_space_before_them_except_at_the_start() -> None:
    tokenizer = train_tokenizer(["the quick brown fox jumps over the lazy dog"] * 9, "unigram", 90)
    ids = tokenizer.encode("the fox")
    whole, after = TextStream(tokenizer, at_start=True), TextStream(tokenizer)
    for token in ids:
        whole.feed(token)
        after.feed(token)
    assert whole.text == tokenizer.decode(ids) == "the fox"
    assert after.text == " the fox"


ESCAPES = [
    ("\x1b]0;x\x07hello", "hello"),
    ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
    ("\x1b[31mred\x1b[0m", "red"),
    ("\x1b[2J\x1b[1;1Hhome", "home"),
    ("\x9b31mred", "red"),
    ("\x9d0;x\x9chi", "hi"),
    ("\x1bP1;2|payload\x1b\\ok", "ok"),
    ("\x1bcreset", "reset"),
    ("\x1b(B\x1b=text", "text"),
    ("tab\there\nline\r\n", "tab\there\nline\n"),
    ("bell\x07back\x08del\x7f", "bellbackdel"),
    ("lone \x1b", "lone "),
    ("naïve 🙂 日本", "naïve 🙂 日本"),
]


@pytest.mark.fault("G20")
@pytest.mark.parametrize(("text", "clean"), ESCAPES)
def test_escapes_are_stripped_whole_and_in_pieces(text: str, clean: str) -> None:
    assert strip_escapes(text) == clean
    for size in range(1, len(text) + 1):
        reader = EscapeFilter()
        parts = [reader.feed(text[i : i + size]) for i in range(0, len(text), size)]
        assert "".join(parts) + reader.finish() == clean


@pytest.mark.fault("G20")
def test_nothing_that_a_terminal_obeys_survives_in_any_split() -> None:
    draw = random.Random(0)
    alphabet = "\x1b\x07\x9b\x9d\x9c[]P\\;0mABc \n🙂"
    for _ in range(2000):
        text = "".join(draw.choice(alphabet) for _ in range(draw.randrange(30)))
        reader, out, place = EscapeFilter(), "", 0
        while place < len(text):
            step = draw.randrange(1, 6)
            out += reader.feed(text[place : place + step])
            place += step
        out += reader.finish()
        for shown in (out, strip_escapes(text)):
            assert not any((ord(c) < 32 and c not in "\t\n") or 127 <= ord(c) < 160 for c in shown)


@pytest.mark.fault("G20")
def test_an_endless_sequence_does_not_hide_the_rest() -> None:
    reader = EscapeFilter()
    out = reader.feed("\x1b]0;" + "x" * 5000)
    assert out.endswith("x" * 5000)
