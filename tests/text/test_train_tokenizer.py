"""Training: sizes, special tokens, reproducibility, memory; on Python's own documentation and source."""

from __future__ import annotations

import argparse
import functools
import inspect
import os
import pydoc_data.topics
import subprocess
import sys
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import ConfigError, InputError
from headway.text import Tokenizer, train, train_tokenizer
from headway.text.spec import ROLE_NAMES
from headway.text.train import MINIMUM, check_special_tokens

PROSE = list(pydoc_data.topics.topics.values())
SOURCE = [inspect.getsource(module) for module in (argparse, typing)]
KINDS = ("bpe", "wordpiece", "unigram", "byte", "char")
LEARNED = ("bpe", "wordpiece", "unigram")
# The kinds that cannot spell everything carry one special token more.
OWN_SPECIALS = {"bpe": 0, "byte": 0, "wordpiece": 1, "unigram": 1, "char": 1}
NAMES = ("<s>", "</s>", "<pad>", "<mask>", "<|user|>")


def corpus() -> list[str]:
    """A few hundred thousand characters of prose and code."""
    return [*PROSE[:30], *SOURCE]


@functools.cache
def trained(kind: str, vocab_size: int = 700) -> Tokenizer:
    return train_tokenizer(corpus(), kind, vocab_size)  # type: ignore[arg-type]


# --- T1, T2: sizes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LEARNED)
def test_the_size_asked_for_is_the_size_made(kind: str):
    """From the minimum on, with and without special tokens, and every id has a token."""
    texts = PROSE[:12]
    for specials in ((), ("<|endoftext|>",), NAMES):
        least = MINIMUM[kind] + len(specials) + OWN_SPECIALS[kind]  # type: ignore[index]
        for vocab_size in (least, least + 1, least + 150):
            made = train_tokenizer(texts, kind, vocab_size, special_tokens=specials)  # type: ignore[arg-type]
            assert (made.kind, made.vocab_size) == (kind, vocab_size), specials
            assert all(made.token(number) is not None for number in range(vocab_size))
            assert len(made.special_ids) == len(specials) + OWN_SPECIALS[kind]


@pytest.mark.fault("T1")
@pytest.mark.parametrize("kind", KINDS)
def test_too_small_or_no_size_at_all_gets_the_minimum(kind: str):
    def unread() -> Iterator[str]:
        pytest.fail("the text was read before the size was checked")
        yield ""

    for specials in ((), ("<|endoftext|>",), NAMES):
        least = MINIMUM[kind] + len(specials) + OWN_SPECIALS[kind]  # type: ignore[index]
        for wrong in (
            0,
            -1,
            1,
            least - 1,
            -(2**63),
            True,
            None,
            float(least),
            str(least),
            10**7,
            10**300,
            float("nan"),
        ):
            with pytest.raises(ConfigError) as caught:
                train_tokenizer(unread(), kind, wrong, special_tokens=specials)  # type: ignore[arg-type]
            error = caught.value
            assert error.where == "tokenizer.vocab_size" and error.found.startswith(repr(wrong)[:40])
            assert f"from {least} (the minimum)" in error.expected and f"kind {kind}" in error.found
            assert error.fix == f"tokenizer.vocab_size={least}"
        mended = train_tokenizer(PROSE[:3], kind, least, special_tokens=specials)  # type: ignore[arg-type]
        assert mended.vocab_size <= least


@pytest.mark.fault("T2")
@pytest.mark.parametrize(
    ("kind", "text", "size"),
    [
        # one word of 20 different letters: 19 merges join it
        ("bpe", "abcdefghijklmnopqrst", 256 + 19 + 1),
        ("bpe", "a", 256 + 1),
        # the first letter alone, 19 with ##, and 19 growing pieces
        ("wordpiece", "abcdefghijklmnopqrst", None),
        ("unigram", "abcdefghijklmnopqrst", None),
        ("byte", "abcdefghijklmnopqrst", 256 + 1),
        ("char", "abcdefghijklmnopqrst", 20 + 2),
        ("char", "aaaaaaaaaaaaaaaaaaaa", 1 + 2),
    ],
)
def test_a_small_corpus_gives_a_smaller_vocabulary_and_says_its_size(kind: str, text: str, size: int | None):
    said: list[tuple[str, int]] = []
    made = train_tokenizer([text], kind, 50_000, progress=lambda *call: said.append(call))  # type: ignore[arg-type]
    assert said[-1] == ("done", made.vocab_size)
    assert made.vocab_size == size or (size is None and 10 < made.vocab_size < 100)
    tokens = [made.token(number) for number in range(made.vocab_size)]
    assert None not in tokens and len(set(tokens)) == made.vocab_size, "the size counts tokens, not wishes"
    assert max(made.encode(text)) < made.vocab_size


def test_characters_beyond_the_size_are_the_rarest():
    made = train_tokenizer(["aaaa bbb cc d"], "char", 2 + 3)
    assert [made.token(number) for number in range(2, 5)] == [" ", "a", "b"]
    assert made.encode("dab") == [made.unk_id, 3, 4]
    assert train_tokenizer(["dcba"], "char", 2 + 3).token(4) == "c", "among equals the first in Unicode's order stay"


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram", "char"])
@pytest.mark.parametrize("texts", [[], [""], ["", ""]])
def test_no_text_at_all(kind: str, texts: list[str]):
    with pytest.raises(InputError, match="0 characters"):
        train_tokenizer(texts, kind, 300)  # type: ignore[arg-type]


def test_a_kind_that_does_not_exist():
    with pytest.raises(ConfigError, match=r"^tokenizer\.kind: 'bppe'; did you mean 'bpe'\?.*wordpiece, unigram"):
        train_tokenizer([], "bppe", 300)  # type: ignore[arg-type]


# --- T3: special tokens --------------------------------------------------------------------------------------------

CLASHES: list[tuple[object, list[str]]] = [
    (["<a>", "<a>"], ["entries 0 and 1", "'<a>'"]),
    (["<a>", "<b>", "<c>", "<b>"], ["entries 1 and 3", "'<b>'"]),
    (["<a>", ""], ["entry 1", "empty"]),
    ([" "], ["entry 0", "blank"]),
    (["<a>", "\t\r\n"], ["entry 1", "blank"]),
    (["\u00a0\u2028"], ["entry 0", "blank"]),
    (["x" * 10_240], ["entry 0", "10240 characters", "256"]),
    (["<a>", "x" * 257], ["entry 1", "257 characters"]),
    (["a"], ["entry 0, 'a'", "base token 'a'"]),
    (["<a>", "é"], ["entry 1, 'é'", "base token 'é'"]),
    (["Ġ"], ["entry 0, 'Ġ'", "base token 'Ġ'"]),  # a space in byte-level vocabularies
    (["▁"], ["entry 0, '▁'", "base token '▁'"]),  # a space in Unigram's
    (["##a"], ["entry 0, '##a'", "base token '##a'"]),  # an inner letter in WordPiece's
    (["<a>\ud800"], ["entry 0", "not valid Unicode"]),
    ([3], ["entry 0 is int"]),
    (["<a>", None], ["entry 1 is NoneType"]),
    ([b"<a>"], ["entry 0 is bytes"]),
]


@pytest.mark.fault("T3")
@pytest.mark.parametrize("case", range(len(CLASHES)))
def test_special_tokens_that_cannot_be_told_apart(case: int):
    entries, parts = CLASHES[case]
    for kind in KINDS:
        with pytest.raises(ConfigError) as caught:
            train_tokenizer(["some text"], kind, 400, special_tokens=entries)  # type: ignore[arg-type]
        message = str(caught.value)
        assert message.startswith("tokenizer.special_tokens: ") and all(part in message for part in parts), message
        assert len(message) < 400 and "\n" not in message


@pytest.mark.fault("T3")
def test_negative_control_unchecked_special_tokens_take_a_letter_from_the_text(monkeypatch: pytest.MonkeyPatch):
    """Without the check `a` is a control token, and the text no longer holds one."""
    monkeypatch.setattr(train, "check_special_tokens", lambda entries: list(entries))
    made = train_tokenizer(["banana " * 50], "wordpiece", 100, special_tokens=["a"])
    assert made.decode(made.encode("a banana")) != "a banana"


def test_special_tokens_that_are_fine():
    for entries in (
        [],
        ["<a>"],
        ["x" * 256],
        ["ab", "the"],
        ["▁▁"],
        ["<a", "a>"],
        "<one>",
        ("é\u0301",),
        iter(["<a>"]),
    ):
        expected = ["<one>"] if entries == "<one>" else list(entries) if isinstance(entries, list | tuple) else ["<a>"]
        assert check_special_tokens(entries) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("names", "roles"),
    [
        (["<|endoftext|>"], {"eos": "<|endoftext|>"}),
        (["<s>", "</s>", "<pad>", "<mask>"], {"bos": "<s>", "eos": "</s>", "pad": "<pad>", "mask": "<mask>"}),
        (["[CLS]", "[SEP]", "[PAD]", "[MASK]"], {"bos": "[CLS]", "eos": "[SEP]", "pad": "[PAD]", "mask": "[MASK]"}),
        (["<|user|>", "<|assistant|>"], {"eos": "<|user|>"}),
        (["<pad>", "<|user|>"], {"pad": "<pad>", "eos": "<|user|>"}),
        (["<pad>"], {"pad": "<pad>"}),
        ([], {}),
    ],
)
def test_roles_follow_the_names(names: list[str], roles: dict[str, str]):
    for kind in KINDS:
        made = train_tokenizer(["some text"], kind, 400, special_tokens=names)  # type: ignore[arg-type]
        for role in ("bos", "eos", "pad", "mask"):
            name = roles.get(role)
            assert getattr(made, f"{role}_id") == (None if name is None else made.special_id(name)), (kind, role)
        assert made.special_ids == {made.special_id(name) for name in names} | (
            {made.unk_id} if OWN_SPECIALS[kind] else set()
        )


@pytest.mark.parametrize("name", ROLE_NAMES["unk"])
def test_an_unknown_token_of_a_usual_name_is_not_doubled(name: str):
    for kind in ("wordpiece", "unigram", "char"):
        made = train_tokenizer(PROSE[:2], kind, 300, special_tokens=[name])  # type: ignore[arg-type]
        assert len(made.special_ids) == 1 and made.unk_id == made.special_id(name) == 0
        assert made.encode("\U00010330") == [0] or (kind == "unigram" and 0 in made.encode("\U00010330"))


@pytest.mark.parametrize("kind", ["bpe", "byte"])
def test_kinds_that_spell_every_byte_have_no_unknown_token(kind: str):
    """Not even where the text teaches a token `None`, which is how Python spells a missing name."""
    made = train_tokenizer(["None\nNone " * 100], kind, 300)  # type: ignore[arg-type]
    assert "None" in [made.token(number) for number in range(made.vocab_size)] or kind == "byte"
    assert made.unk_id is None


# --- text in, text out ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_library_on_the_saved_file(kind: str, tmp_path: Path):
    """User text against the library with special tokens off, control text against the library as it comes."""
    made = trained(kind)
    path = made.save(tmp_path)
    assert path.read_text(encoding="utf-8") == made.to_json()
    control, plain = tokenizers.Tokenizer.from_file(str(path)), tokenizers.Tokenizer.from_file(str(path))
    plain.encode_special_tokens = True
    for text in [*PROSE[30:40], SOURCE[0][-20_000:], "naïve 日本語 😀 \x00\r\n\t '️'"]:
        expected = plain.encode(text, add_special_tokens=False).ids
        assert Tokenizer.load(path).encode(text) == made.encode(text) == expected
        marked = f"{text[:500]}<|endoftext|>{text[500:1000]}"
        assert made.encode(marked, control=True) == control.encode(marked, add_special_tokens=False).ids
        assert made.encode(marked, control=True).count(made.eos_id) == 1


any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
awkward = st.text(
    st.sampled_from(" \t\r\n\x0b\x85\u2028\u00a0'’sTl.,!é\u0301日😀1234\x00\ufeff\ufffd▁Ġ#<>|"), max_size=40
)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(texts=st.lists(any_text | awkward, min_size=1, max_size=4), other=any_text | awkward)
def test_any_text_can_be_trained_on_and_comes_back(kind: str, texts: list[str], other: str):
    if kind != "byte" and not any(texts):
        return
    made = train_tokenizer(texts, kind, 330, special_tokens=("<|endoftext|>", "<|user|>"))  # type: ignore[arg-type]
    assert made.vocab_size <= 330 and Tokenizer.from_json(made.to_json()).hash == made.hash
    assert all(made.token(number) is not None for number in range(made.vocab_size))
    for text in (*texts, other):
        ids = made.encode(text)
        assert not (made.special_ids - {made.unk_id}).intersection(ids)
        if kind in ("bpe", "byte"):
            assert made.decode(ids) == text and made.decode_bytes(ids) == text.encode()
        if kind == "char" and text in texts:
            assert made.decode(ids) == text and len(ids) == len(text)


@pytest.mark.fault("C12")
@pytest.mark.parametrize("kind", KINDS)
def test_control_tokens_in_the_training_text_stay_text(kind: str):
    """The corpus says the names a thousand times, so every learned kind would like to have them as pieces."""
    names = ("<|endoftext|>", "<|user|>")
    text = "<|user|> hello <|endoftext|><|user|> yes<|endoftext|> " * 300
    made = train_tokenizer([text], kind, 420, special_tokens=names)  # type: ignore[arg-type]
    for sample in (text[:500], *names, " <|user|>", "l<|endoftext|>h"):
        ids = made.encode(sample)
        assert not (made.special_ids - {made.unk_id}).intersection(ids) and len(ids) > 1
        assert made.unk_id is None or made.unk_id not in ids
        if kind not in ("wordpiece", "unigram"):
            assert made.decode(ids) == sample
    assert made.encode(names[0], control=True) == [made.special_id(names[0])]


def test_dna():
    """One id per base, soft-masked bases and line ends included; what is no base is unknown."""
    sequence = "GATTACA" * 40 + "nnacgtnn\n" + "CCGG" * 20
    made = train_tokenizer([sequence, sequence[::-1]], "char", 4096)
    bases = sorted(set(sequence))
    assert made.vocab_size == 2 + len(bases)
    assert [made.token(number) for number in range(2, made.vocab_size)] == bases
    ids = made.encode(sequence)
    assert ids == [2 + bases.index(base) for base in sequence] and made.decode(ids) == sequence
    assert made.encode("GXG") == [ids[0], made.unk_id, ids[0]]


# --- the same again ------------------------------------------------------------------------------------------------

HASHES = """
import pydoc_data.topics, sys
from headway.text import train_tokenizer
texts = list(pydoc_data.topics.topics.values())[:12]
for kind in sys.argv[1:]:
    print(kind, train_tokenizer(texts, kind, 400, special_tokens=("<|endoftext|>", "<|user|>")).hash)
"""


def test_two_trainings_give_the_same_bytes(tmp_path: Path):
    """In this process and in others with other hash seeds: the library's own order would differ in each."""
    texts = PROSE[:12]
    here = {}
    for kind in KINDS:
        first, second = (
            train_tokenizer(iter(texts), kind, 400, special_tokens=("<|endoftext|>", "<|user|>"))  # type: ignore[arg-type]
            for _ in range(2)
        )
        assert first.save(tmp_path / "a").read_bytes() == second.save(tmp_path / "b").read_bytes()
        here[kind] = first.hash
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", HASHES, *KINDS]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
        assert dict(line.split() for line in done.stdout.splitlines()) == here


def test_other_texts_or_sizes_give_other_tokenizers():
    for kind in ("bpe", "wordpiece", "char"):
        made = {
            train_tokenizer(texts, kind, size).hash  # type: ignore[arg-type]
            for texts, size in ((["abc abd " * 9], 258 + 5), (["abc abe " * 9], 258 + 5), (["xyz"], 258 + 5))
        }
        assert len(made) == 3, kind


# --- streaming -----------------------------------------------------------------------------------------------------


class Once(Iterable[str]):
    """Texts that can be read only once, and that know how often they were asked for."""

    def __init__(self, texts: list[str]) -> None:
        self.texts, self.reads = texts, 0

    def __iter__(self) -> Iterator[str]:
        self.reads += 1
        assert self.reads == 1
        return iter(self.texts)


@pytest.mark.parametrize("kind", KINDS)
def test_progress_grows_and_the_texts_are_read_once(kind: str):
    texts, said = Once(PROSE[:12]), []
    made = train_tokenizer(texts, kind, 400, progress=lambda *call: said.append(call))  # type: ignore[arg-type]
    stages = [stage for stage, _ in said]
    read = [done for stage, done in said if stage == "read"]
    assert said[-1] == ("done", made.vocab_size)
    if kind == "byte":
        assert stages == ["done"] and texts.reads == 0, "bytes need no reading"
        return
    assert texts.reads == 1 and len(read) == 12 and read == sorted(set(read))
    assert read[-1] == sum(map(len, PROSE[:12]))
    assert stages == ["read"] * 12 + (["merge"] if kind in LEARNED else []) + ["done"]
    assert kind not in LEARNED or said[-2] == ("merge", 400)


def test_one_text_of_a_list_or_of_a_generator_is_the_same():
    assert train_tokenizer(iter(PROSE[:5]), "bpe", 300).hash == train_tokenizer(PROSE[:5], "bpe", 300).hash


PEAK = """
import os, sys
from headway.text import train, train_tokenizer
kind, budget, megabytes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
train._BUDGET = budget

def stream():
    for _ in range(4 * megabytes):
        letters = os.urandom(1 << 17).hex()
        yield " ".join(letters[i : i + 10] for i in range(0, len(letters), 11))

def peak():
    # ru_maxrss would begin with the parent's.
    rows = dict(line.split(":") for line in open("/proc/self/status"))
    return int(rows["VmHWM"].split()[0]) // 1024

train_tokenizer(["warm up"], kind, 300)
before = peak()
train_tokenizer(stream(), kind, 300)
print(peak() - before)
"""


def growth(kind: str, budget: int, megabytes: int) -> int:
    """Megabytes of memory that training on a stream of words never seen before takes, in a process of its own."""
    command = [sys.executable, "-c", PEAK, kind, str(budget), str(megabytes)]
    return int(subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout)


@pytest.mark.fault("C7")
def test_memory_does_not_follow_the_length_of_the_stream():
    """Each new word is a new count. With the budget off one megabyte takes more than eight with it."""
    for kind in KINDS:
        assert growth(kind, 1 << 15, 8) < 40, kind
    assert growth("wordpiece", 1 << 40, 1) > 60, "negative control"


@pytest.mark.fault("C7")
def test_a_word_without_end_is_bounded(monkeypatch: pytest.MonkeyPatch):
    """A megabyte without a space says after a few pieces all that it can say."""
    seen = []
    real = train._announced
    monkeypatch.setattr(
        train, "_announced", lambda texts, *rest: real((seen.append(len(text)) or text for text in texts), *rest)
    )
    for kind in LEARNED:
        seen.clear()
        made = train_tokenizer(["ab" * (1 << 20)], kind, 300)  # type: ignore[arg-type]
        assert max(seen) <= train._PIECE and sum(seen) <= (train._MAX_UNBROKEN + 1) * train._PIECE
        assert made.decode(made.encode("abab")) == "abab"
