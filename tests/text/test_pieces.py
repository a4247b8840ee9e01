"""Cuts are exact: a text cut at every safe place encodes to what the library gives for the whole."""

import itertools

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from text_corpus import SENTENCES, llama_2_tree, trained, tree

from headway.text import Tokenizer
from headway.text.patterns import SPLIT_PATTERNS
from headway.text.pieces import ANYWHERE, pieces, places

WORDS = [
    "a",
    "Don't",
    "I'LL",
    "é",
    "e\u0301",
    "日本",
    "，",
    "。",
    "(",
    ")",
    ".",
    "...",
    "/",
    "_",
    "-",
    "'",
    "1",
    "1234",
]
WORDS += [
    " ",
    "  ",
    "   ",
    "\n",
    "\n\n",
    " \n",
    "\r\n",
    "\t",
    "\u00a0",
    "\u2028",
    "\x85",
    "\x1f",
    "▁",
    "²",
    "ǅ",
    "\ufeff",
]
texts = st.lists(st.sampled_from(WORDS), max_size=25).map("".join)


def _variants() -> dict[str, Tokenizer]:
    made = {kind: trained(kind) for kind in ("bpe", "wordpiece", "unigram")}
    for name, pattern in SPLIT_PATTERNS.items():
        changed = tree("bpe")
        changed["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": pattern}
        made[name] = Tokenizer(changed)
    level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    for name, steps in {"roberta": [level], "smollm": [digits, {**level, "add_prefix_space": False}]}.items():
        changed = tree("bpe")
        changed["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
        made[name] = Tokenizer(changed)
    composed = tree("bpe")
    composed["normalizer"] = {"type": "NFC"}
    made["nfc"] = Tokenizer(composed)
    words = tree("unigram")
    words["pre_tokenizer"]["pretokenizers"][0] = {"type": "WhitespaceSplit"}
    words["pre_tokenizer"]["pretokenizers"][1]["prepend_scheme"] = "always"
    spaces = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
    words["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Nmt"}, {"type": "NFKC"}, spaces]}
    made["t5"] = Tokenizer(words)
    return made


VARIANTS = _variants()
CUTTABLE = {name for name, made in VARIANTS.items() if made._cuts}


def test_which_tokenizers_have_cuts():
    full = {name for name, pattern in SPLIT_PATTERNS.items() if r"\s+(?!\S)|\s" in pattern}
    assert full | {"bpe", "wordpiece", "unigram", "roberta", "smollm", "nfc", "t5"} == CUTTABLE
    assert "bloom" not in CUTTABLE and Tokenizer(llama_2_tree())._cuts is None


@pytest.mark.parametrize("name", sorted(CUTTABLE))
@settings(max_examples=150, deadline=None)
@given(text=texts)
def test_cutting_everywhere_changes_nothing(name, text):
    made = VARIANTS[name]
    bounds = [0, *places(text, made._cuts), len(text)]
    parts = [text[start:stop] for start, stop in itertools.pairwise(bounds)]
    library = tokenizers.Tokenizer.from_str(made.to_json())
    library.encode_special_tokens = True
    whole = library.encode(text, add_special_tokens=False).ids
    assert [number for part in parts for number in made.encode(part)] == whole


def test_negative_control_other_cuts_change_the_ids():
    """A cut inside a run of spaces, or after a newline before a space, is seen: the property has teeth."""
    made = trained("bpe")
    for left, right in [("the  ", "  b"), ("a\n", "\nb"), ("fun", "ction"), ("a.", "\nb")]:
        assert made.encode(left) + made.encode(right) != made.encode(left + right)


@given(text=texts, limit=st.integers(1, 12))
def test_pieces_join_to_the_text(text, limit):
    made = list(pieces(text, ANYWHERE, limit))
    assert "".join(made) == text
    assert all(0 < len(piece) <= limit for piece in made) or made == [""]


def test_pieces_take_the_last_cut_within_reach():
    assert list(pieces("aa bb cc dd", ANYWHERE, 7)) == ["aa bb", " cc dd"]
    assert list(pieces("aa " + "b" * 5000 + " c", ANYWHERE, 5010)) == ["aa " + "b" * 5000 + " c"]
    assert list(pieces("aa " + "b" * 5000, ANYWHERE, 5000)) == ["aa", " " + "b" * 4999, "b"]
    assert list(pieces("xxxxx", None, 2)) == ["xx", "xx", "x"]


def test_long_documents_equal_the_library():
    text = "\n\n".join(SENTENCES) * 2
    for kind in ("bpe", "wordpiece", "unigram"):
        made = trained(kind)
        library = tokenizers.Tokenizer.from_str(made.to_json())
        library.encode_special_tokens = True
        assert len(text) > 3 * 65536
        assert made.encode(text) == library.encode(text, add_special_tokens=False).ids


def test_added_tokens_that_reach_across_a_cut():
    changed = tree("bpe")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    number = max(changed["model"]["vocab"].values()) + 1
    for entry, cuttable in [
        ({"content": "   "}, True),
        ({"content": "<tool_call>"}, True),
        ({"content": "of the"}, False),
        ({"content": "\na"}, False),
        ({"content": "<x>", "rstrip": True}, False),
    ]:
        added = {"id": number, **flags, **entry}
        made = Tokenizer({**changed, "added_tokens": [*tree("bpe")["added_tokens"], added]})
        assert (made._cuts is not None) == cuttable, entry
