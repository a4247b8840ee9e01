"""SentencePiece models against the sentencepiece package: ids on hard strings, and files that are refused."""

from __future__ import annotations

import functools
import io
import itertools
import json
import math
import random
import tracemalloc

import pytest
import tokenizers
from hard_strings import hard_strings
from text_corpus import SENTENCES
from wire_format import ENDS, content, number, sentencepiece_file, varint

from headway.errors import InputError
from headway.text import Tokenizer, tokenizer
from headway.text.normalization import FLAGS, Normalization
from headway.text.sentencepiece import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, model_tree, read_model

sentencepiece = pytest.importorskip("sentencepiece")

OTHERS = [
    "日本語、テキスト。今日は良い天気です。",
    "naïve café Ångström",
    "Привет, мир!",
    "שלום עולם",
    "안녕하세요 세계",
    "😀 ok",
]
LINES = [line for text in SENTENCES for line in text.split("\n") if line.strip()][:1500] + OTHERS * 10
SYMBOLS = ["<sym>", "<sy", "foo", "▁▁▁", "日本"]
# What a model may do with white space; a third of the combinations below have each.
SPACES = [
    {},
    {"remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True},
    {"treat_whitespace_as_suffix": True},
]
KINDS = ("unigram", "bpe")
RULES = ("nmt_nfkc", "identity", "nfkc_cf")
CASES = list(itertools.product(KINDS, RULES, (False, True), (True, False)))


@functools.cache
def trained_model(kind: str, rule: str = "identity", symbols: bool = True, **options: object) -> bytes:
    made = io.BytesIO()
    named = {"user_defined_symbols": SYMBOLS, "control_symbols": ["<ctl>"]} if symbols else {}
    sizes = {"vocab_size": 800, "hard_vocab_limit": False, "num_threads": 1, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_writer=made,
        model_type=kind,
        normalization_rule_name=rule,
        **sizes,
        **named,
        **options,
    )
    return made.getvalue()


def built(data: bytes) -> Tokenizer:
    return Tokenizer(model_tree(read_model(data, "m.model"), "m.model"), "m.model")


def theirs(data: bytes) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=data)


def worth(data: bytes, ids: list[int]) -> tuple[float, float]:
    """The score of a Unigram segmentation, and how far sums of float32 of its length may be from it."""
    pieces = read_model(data, "m").pieces
    scores = [0.1 * (len(p.text.encode()) - 1) if p.type == USER_DEFINED else p.score for p in (pieces[i] for i in ids)]
    total = math.fsum(scores)
    return total, len(ids) * sum(map(abs, scores)) * 2.0**-24


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ids_are_sentencepieces(case):
    """24 kinds of model, each on an eighth of the hard strings and on texts with its own symbols in them.

    BPE ids are equal. A Unigram text may have several segmentations of one score; SentencePiece sums in float32 and
    the library in float64, and which of them is met first by rounding differs: those, and no others, may differ.
    """
    kind, rule, fallback, prefix = case
    place = CASES.index(case)
    data = trained_model(kind, rule, byte_fallback=fallback, add_dummy_prefix=prefix, **SPACES[place % 3])
    made, other = built(data), theirs(data)
    texts = hard_strings()[place % 8 :: 8]
    texts += [f"<sym>{text}foo{text}<ctl>日本<s> <0x41><unk>" for text in texts[::9]]
    texts += [" <sym>", "<sym> ", "foo  foo", "<sy<sym>m>", "ffoooo", "日日本本", "▁▁▁▁▁", "   foo   "]
    ours, expected = made.encode_batch(texts), other.encode(texts)
    different = [(a, b) for a, b in zip(ours, expected, strict=True) if a != b]
    assert len(texts) > 3000
    if kind == "bpe":
        assert not different
    assert len(different) < 0.04 * len(texts)
    for a, b in different:
        (left, slack), (right, more) = worth(data, a), worth(data, b)
        assert abs(left - right) <= slack + more


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spaces", SPACES, ids=str)
def test_white_space_with_every_normalization(kind, spaces):
    for rule, prefix in itertools.product(("nmt_nfkc", "nfkc"), (True, False)):
        data = trained_model(kind, rule, symbols=False, add_dummy_prefix=prefix, **spaces)
        made, other = built(data), theirs(data)
        for text in hard_strings()[:1500:3]:
            assert made._normalization(text) == other.normalize(text), (rule, prefix, text)


@pytest.mark.parametrize("rule", RULES)
def test_every_code_point_is_normalized_alike(rule):
    data = trained_model("bpe", rule, symbols=False)
    made, other = built(data)._normalization, theirs(data)
    points = [chr(point) for point in range(0x30000) if not 0xD800 <= point < 0xE000]
    for start in range(0, len(points), 64):
        text = "x".join(points[start : start + 64])
        assert made(text) == other.normalize(text)
    rng = random.Random(1)
    marks = [*"aeEoOkKかハ>", *map(chr, range(0x300, 0x340)), *map(chr, range(0x1100, 0x1200, 3)), "\u3099", "\u309a"]
    for _ in range(3000):
        text = "".join(rng.choices(marks, k=rng.randrange(1, 12)))
        assert made(text) == other.normalize(text)


def test_negative_control_the_librarys_own_normalizer_differs():
    """Why Headway normalizes itself: か + U+3099 stays two characters, a decomposed capital loses its accent."""
    data = trained_model("bpe", "nfkc_cf", symbols=False)
    tree = model_tree(read_model(data, "m"), "m")
    library = tokenizers.Tokenizer.from_str(json.dumps(tree))
    for text in ("か\u3099", "E\u0301"):
        assert built(data).encode(text) == theirs(data).encode(text)
        assert library.normalizer.normalize_str(text).replace(" ", "▁") != theirs(data).normalize(text)
    for text in SENTENCES[:5]:  # on ordinary text the nodes for other programs do the same
        assert library.encode(text.strip()).ids == theirs(data).encode(text.strip())


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_again(kind, tmp_path):
    data = trained_model(kind, "nmt_nfkc", byte_fallback=True)
    (tmp_path / "tokenizer.model").write_bytes(data)
    made = Tokenizer.load(tmp_path)
    again = Tokenizer.load(made.save(tmp_path / "again"))
    texts = hard_strings()[::200]
    assert again.hash == made.hash and again.encode_batch(texts) == made.encode_batch(texts)
    assert (made.unk_id, made.bos_id, made.eos_id) == (again.unk_id, again.bos_id, again.eos_id) == (0, 1, 2)
    assert made.prefix_ids == made.suffix_ids == ()
    for sentence in ("Hello, world", "naïve 日本", "  two  spaces"):
        assert again.decode(again.encode(sentence)) == theirs(data).decode(theirs(data).encode(sentence))


@pytest.mark.parametrize("kind", KINDS)
def test_control_tokens(kind):
    made = built(trained_model(kind, "nmt_nfkc", byte_fallback=True))
    names = ["<unk>", "<s>", "</s>", "<ctl>"]
    assert made.special_ids == set(range(4)) and [made.token(number) for number in range(4)] == names
    for name in names:
        assert not made.special_ids.intersection(made.encode(f"a{name}b {name}"))
        segments = [("Straße ", False), (name, True), ("x", False)]
        if name != "<unk>":
            assert made.encode_segments(segments) == [*made.encode("Straße "), made.special_id(name), *made.encode("x")]
            assert made.special_id(name) in made.encode(f"か\u3099{name}か\u3099", control=True)
    # In a control text the stretches between tokens are normalized each by itself.
    assert made.encode("か\u3099<s>か\u3099", control=True) == [*made.encode("が"), 1, *made.encode("が")]


@pytest.mark.parametrize("kind", KINDS)
def test_long_texts_are_cut_where_no_piece_reaches(kind, monkeypatch):
    for spaces in SPACES[:2]:
        data = trained_model(kind, "nmt_nfkc", symbols=False, **spaces)
        made = built(data)
        text = " ".join(SENTENCES[:6]) + "  two   spaces\n\n日本語 " * 20
        whole = made.encode(text)
        monkeypatch.setattr(tokenizer, "PIECE", 50)
        assert made.encode(text) == whole
        monkeypatch.undo()
        assert kind == "unigram" or whole == theirs(data).encode(text)


def _with(*pieces, kind=2, **trainer):
    return sentencepiece_file([*ENDS, *pieces], kind, **trainer)


LETTERS = [("a", -9.0, 1), ("b", -9.0, 1), ("c", -9.0, 1)]
BYTES = [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
REFUSED = [
    (b"", "no pieces"),
    (_with(kind=3), "trainer_spec.model_type: a model of type WORD; expected UNIGRAM or BPE"),
    (_with(kind=4), "a model of type CHAR"),
    (sentencepiece_file(LETTERS), "0 unknown pieces; expected one"),
    (_with(("<unk2>", 0.0, UNKNOWN)), "2 unknown pieces"),
    (_with(*LETTERS, ("a", -1.0, 1)), "piece 6: 'a' again, after id 3"),
    (_with(("", 0.0, 1)), "piece 3: '' of type 1"),
    (_with(("x", 0.0, 7)), "piece 3: 'x' of type 7"),
    (_with(("x", float("nan"), 1)), "with score nan"),
    (_with(("x", float("inf"), 1), kind=1), "with score inf"),
    (_with(*BYTES), "256 byte pieces with byte_fallback false"),
    (_with(*BYTES[:255], f35=1), "255 byte pieces with byte_fallback true; expected 256 with it"),
    (_with(*LETTERS, ("ab", 0.0, 1), ("bc", 0.0, 1)), "'ab' and 'bc' have one score and share 'b'"),
    (_with(*LETTERS, ("ab", -1.0, UNUSED)), "piece 6: 'ab' is unused and yet can be built"),
    (_with(*LETTERS, ("ad", -1.0, NORMAL)), "piece 6: 'ad' has 'd', which is no piece"),
    (_with(*LETTERS, ("a" * 513, -1.0, NORMAL)), "piece 6: 513 characters; expected at most 512"),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case[1][:50])
def test_what_is_refused(case, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(case[0])
    with pytest.raises(InputError) as caught:
        Tokenizer.load(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}/tokenizer.model") and case[1] in str(caught.value)


def test_hand_made_models():
    """Scores that tie without competing, unused pieces that nothing builds, runs of one character."""
    runs = [("-" * size, -float(size), 1) for size in (2, 3, 4, 7, 8)]
    data = _with(*LETTERS, ("-", -9.0, 1), *runs, ("ab", -1.0, 1), ("ca", -1.0, CONTROL), ("cc", -1.0, 1))
    made, other = built(data), theirs(data)
    for text in [*("-" * size for size in range(200)), *map("".join, itertools.product("abc-", repeat=6))]:
        assert made.encode(text) == other.encode(text)
    unused = _with(*LETTERS, ("zz", -1.0, UNUSED), ("<x>", 0.0, UNUSED), kind=1)
    assert built(unused).encode("abzz<x>") == theirs(unused).encode("abzz<x>")


@pytest.mark.fault("T11")
def test_cuts_and_length_bombs(tmp_path):
    whole = trained_model("unigram", "nmt_nfkc", symbols=False)
    path = tmp_path / "spiece.model"
    bombs = [b"\n" + varint(2**63), content(1, b"\n" + varint(2**62)), content(3, b"\x12" + varint(2**40)), whole[:-1]]
    bombs += [content(2, number(3, 1) + b"\xf2\x01" + varint(2**31))]
    for data in [*bombs, *(whole[: len(whole) * part // 50] for part in range(50))]:
        path.write_bytes(data)
        tracemalloc.start()
        with pytest.raises(InputError) as caught:
            Tokenizer.load(path)
        assert tracemalloc.get_traced_memory()[1] < 4 * len(whole)
        tracemalloc.stop()
        assert str(caught.value).startswith(str(path))


@pytest.mark.fault("T11")
def test_mutations_are_errors_of_ours_or_load():
    rng = random.Random(3)
    data = trained_model("unigram", "nmt_nfkc", symbols=False)
    start = data.rindex(b"nmt_nfkc") + 16  # the table of replacements: a trie, then texts
    small = _with(*LETTERS, ("ab", -1.0, 1), *BYTES, f35=1)
    refused = 0
    for turn in range(200):
        source = data if turn % 4 == 0 else small
        mutant = bytearray(source)
        for _ in range(rng.randrange(1, 20)):
            begin = start if source is data and rng.random() < 0.8 else 0
            mutant[rng.randrange(begin, len(mutant))] = rng.randrange(256)
        try:
            built(bytes(mutant)).encode("か\u3099 abc ﷺ E\u0301\x00 zz")
        except InputError:
            refused += 1
    assert 50 < refused < 200


def test_a_charsmap_that_points_nowhere():
    flags = dict.fromkeys(FLAGS, False)
    trie = b"\x00\x02\x00\x00" + bytes(4 * 600)
    for charsmap in (
        b"abc",
        b"\xff\xff\xff\x7f" + bytes(64),
        b"\x05\x00\x00\x00" + bytes(64),
        b"\x08\x00\x00\x00" + bytes(8),
    ):
        with pytest.raises(InputError, match="m: a charsmap of"):
            Normalization(flags, [], charsmap, "m")
    assert Normalization(flags, [], trie, "m")("abc") == "abc"
    # A key "a" whose replacement lies outside the blob.
    units = [1 << 10, 0] + [0] * 510
    units[1 ^ ord("a")] = ord("a") | 1 << 8 | (200 ^ 1 ^ ord("a")) << 10
    units[200] = 1 << 31 | 5000
    blob = (4 * len(units)).to_bytes(4, "little") + b"".join(unit.to_bytes(4, "little") for unit in units) + b"x\0"
    with pytest.raises(InputError, match="a replacement that is no text"):
        Normalization(flags, [], blob, "m")("xa")


MARKS = [("symbols", 3), ("symbols", [""]), ("symbols", [1]), ("add_dummy_prefix", 1), ("escape_whitespaces", None)]


@pytest.mark.fault("T4")
@pytest.mark.parametrize("change", MARKS, ids=str)
def test_a_damaged_mark_in_a_saved_file(change):
    tree = model_tree(read_model(trained_model("bpe", symbols=False), "m"), "m")
    tree["normalizer"]["sentencepiece"][change[0]] = change[1]
    with pytest.raises(InputError, match=rf"f\.json normalizer\.sentencepiece.*{change[0]}"):
        Tokenizer(tree, "f.json")


def test_types_are_as_the_package_says():
    data = trained_model("unigram", "nmt_nfkc", byte_fallback=True)
    other, pieces = theirs(data), read_model(data, "m").pieces
    assert len(pieces) == other.get_piece_size()
    for number_, piece in enumerate(pieces):
        assert (piece.text, piece.score) == (other.id_to_piece(number_), other.get_score(number_))
        kinds = {CONTROL: other.is_control, UNKNOWN: other.is_unknown, BYTE: other.is_byte, UNUSED: other.is_unused}
        assert all(test(number_) == (piece.type == kind) for kind, test in kinds.items())
