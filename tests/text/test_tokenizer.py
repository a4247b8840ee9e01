"""Encoding and decoding against the tokenizers library and transformers, and the round trip as a property."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from text_corpus import KINDS, SENTENCES, llama_2_tree, trained, tree
from transformers import PreTrainedTokenizerFast

from headway import files
from headway.errors import InputError, MachineError
from headway.text import Tokenizer, tokenizer, train_tokenizer

MIXED = "Hello  world's\r\n\tnaïve e\u0301 <|endoftext|> 日本語、テキスト。\x00\x1f 12345 😀👩‍👩‍👧 [UNK] </s> end"
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
awkward = st.text(st.sampled_from(" \t\r\n\x0b\x85\u2028\u00a0'’sTl.,!é\u0301日😀1234\x00\ufeff\ufffd"), max_size=40)


@pytest.mark.parametrize("kind", ["bpe", "byte"])
@settings(max_examples=300, deadline=None)
@given(text=any_text | awkward)
def test_byte_level_round_trip(kind, text):
    made = trained(kind)
    ids = made.encode(text)
    assert made.decode(ids) == text
    assert made.decode_bytes(ids) == text.encode() == b"".join(map(made.token_bytes, ids))
    assert not made.special_ids.intersection(ids)


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.sampled_from("".join(sorted(set(SENTENCES[0])))), max_size=60))
def test_char_round_trip(text):
    made = trained("char")
    assert made.decode(made.encode(text)) == text and len(made.encode(text)) == len(text)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_library(kind):
    made = trained(kind)
    library = tokenizers.Tokenizer.from_str(made.to_json())
    library.encode_special_tokens = True
    for text in [*SENTENCES, MIXED.replace("<|endoftext|>", "")]:
        expected = library.encode(text, add_special_tokens=False).ids
        assert made.encode(text) == expected
        assert made.decode(expected) == library.decode(expected)
        assert made.decode_bytes(expected).decode() == library.decode(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_transformers(kind, tmp_path):
    path = trained(kind).save(tmp_path)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(path), clean_up_tokenization_spaces=False)
    text = SENTENCES[1]
    assert trained(kind).encode(text) == theirs.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("kind", KINDS)
def test_batch_equals_single_and_long(kind):
    made = trained(kind)
    texts = [*SENTENCES, "", MIXED, "x" * 100_000]
    single = [made.encode(text) for text in texts]
    assert made.encode_batch(texts) == single
    for text, ids in zip(texts, single, strict=True):
        assert np.concatenate([np.zeros(0, np.int32), *made.encode_long(text)]).tolist() == ids


def test_byte_ids_are_the_bytes():
    made = trained("byte")
    assert made.kind == "byte" and made.vocab_size == 258 and made.special_id("<|endoftext|>") == 256
    assert made.encode(MIXED) == list(MIXED.encode())
    assert made.decode_bytes(range(256)) == bytes(range(256))


def test_character_ids():
    made = train_tokenizer(["ACGT" * 10], "char", 100, special_tokens=())
    assert made.vocab_size == 5 and made.unk_id == 0
    assert made.encode("GATTACA") == [3, 1, 4, 4, 1, 2, 1]
    assert made.encode("AN😀") == [1, 0, 0]


@pytest.mark.fault("C12", "A3")
@pytest.mark.parametrize("kind", [*KINDS, "llama-2"])
def test_user_text_never_gives_a_control_id(kind):
    made = Tokenizer(llama_2_tree()) if kind == "llama-2" else trained(kind)
    for name, number in made._special.items():
        if number == made.unk_id:
            continue
        for text in (name, f"a{name}b", f"a {name} b", name * 3, f" {name}\n"):
            assert not (made.special_ids - {made.unk_id}).intersection(made.encode(text)), (kind, text)
            assert number in made.encode(text, control=True)
            assert number in made.encode_segments([("hello", False), (name, True)])
            assert number not in made.encode_segments([("hello", False), (name, False)])
    if made.kind == "unigram":
        # Negative control: with special tokens merely switched off, the library still finds the name as a piece.
        library = tokenizers.Tokenizer.from_str(made.to_json())
        library.encode_special_tokens = True
        library.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([])
        assert made.eos_id in library.encode("<|endoftext|>", add_special_tokens=False).ids


@pytest.mark.parametrize("control", ["x", "ab"])
def test_control_token_that_merges_could_spell(control):
    """A file whose special token is also what the merges build: user text takes other pieces."""
    made = tree("char")
    made["model"] |= {"vocab": {"<unk>": 0, "a": 1, "b": 2, "ab": 3, "x": 4}, "merges": [["a", "b"]]}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    number = made["model"]["vocab"][control]
    made["added_tokens"] = [{"id": number, "content": control, **flags}]
    built = Tokenizer(made)
    assert number not in built.encode("xabx")
    assert number in built.encode("xabx", control=True)


def test_segments_join_neighbours():
    made = trained("bpe")
    eos = made.eos_id
    parts = [("the qui", False), ("ck fox", False), ("<|endoftext|>", True), ("the", False)]
    assert made.encode_segments(parts) == [*made.encode("the quick fox"), eos, *made.encode("the")]
    assert made.encode_segments([]) == []


@pytest.mark.parametrize("kind", KINDS)
def test_decode_drops_specials_and_unknown_ids(kind):
    made = trained(kind)
    ids = made.encode("hello")
    assert made.decode([made.eos_id, *ids, made.eos_id]) == made.decode(ids)
    assert "<|endoftext|>" in made.decode([*ids, made.eos_id], skip_special=False)
    assert made.decode([*ids, made.vocab_size + 5]) == made.decode(ids)
    assert made.decode_bytes([*ids, made.vocab_size + 5]) == made.decode_bytes(ids)
    assert made.decode([]) == "" and made.decode_bytes([]) == b""
    for call in (made.decode, made.decode_bytes):
        with pytest.raises(InputError, match="token ids: -1"):
            call([*ids, -1])


def test_byte_fallback_gives_exact_bytes():
    made = Tokenizer(llama_2_tree())
    library = tokenizers.Tokenizer.from_str(json.dumps(llama_2_tree()))
    for text in ("hello world", "  hello", "hel😀lo", "日本"):
        ids = made.encode(text)
        assert ids == library.encode(text, add_special_tokens=False).ids
        assert made.decode(ids) == library.decode(ids) == text
        assert made.decode_bytes(ids) == text.encode()
        for cut in range(len(ids)):
            assert text.encode().startswith(made.decode_bytes(ids[:cut]))


@pytest.mark.fault("G12")
@pytest.mark.parametrize("kind", ["bpe", "byte"])
def test_bytes_of_a_prefix_are_a_prefix(kind):
    made = trained(kind)
    ids = made.encode(MIXED)
    for cut in range(len(ids) + 1):
        assert MIXED.encode().startswith(made.decode_bytes(ids[:cut]))


@pytest.mark.parametrize("kind", KINDS)
def test_save_load_hash(kind, tmp_path):
    made = trained(kind)
    path = made.save(tmp_path / "run")
    for again in (Tokenizer.load(path), Tokenizer.load(tmp_path / "run"), Tokenizer.from_json(path.read_bytes())):
        assert (again.hash, again.to_json(), again.kind) == (made.hash, made.to_json(), made.kind)
        assert (again.eos_id, again.unk_id, again.special_ids) == (made.eos_id, made.unk_id, made.special_ids)
    other = tmp_path / "other.json"
    assert Tokenizer.load(path).save(other) == other and other.read_bytes() == path.read_bytes()
    reordered = dict(reversed(json.loads(path.read_text()).items()))
    assert Tokenizer(reordered).hash == made.hash


@pytest.mark.fault("T7")
def test_hash_tells_two_swapped_ids():
    made = tree("bpe")
    first, second = list(made["model"]["vocab"])[300:302]
    vocab = made["model"]["vocab"]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    assert Tokenizer(made).hash != trained("bpe").hash


def test_roles_from_config_beside_the_file(tmp_path):
    made = tree("bpe")
    for entry in made["added_tokens"]:
        entry.pop("roles", None)
    (tmp_path / "tokenizer.json").write_text(json.dumps(made))
    assert Tokenizer.load(tmp_path).eos_id == 0
    config = {"eos_token": {"content": "<|user|>"}, "bos_token": "<|endoftext|>", "pad_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (0, 1, None)
    # Roles travel inside our own file, so that a copy without the config keeps them.
    assert Tokenizer.from_json(loaded.to_json()).eos_id == 1


@pytest.mark.fault("T10")
@pytest.mark.parametrize("kind", KINDS)
def test_lone_surrogate(kind):
    made = trained(kind)
    calls = [
        lambda: made.encode("ab\ud800"),
        lambda: made.encode("ab\ud800", control=True),
        lambda: made.encode_batch(["fine", "ab\ud800"]),
        lambda: list(made.encode_long("ab\ud800")),
        lambda: made.encode_segments([("ab\ud800", False)]),
    ]
    for call in calls:
        with pytest.raises(InputError, match=r"text: not valid Unicode: lone surrogate U\+D800 at character 2"):
            call()
    with pytest.raises(InputError, match="not valid Unicode"):
        train_tokenizer(["ab\ud800"], "bpe" if kind == "byte" else kind, 300)


def test_long_texts_are_bounded(monkeypatch):
    """No call into the library sees more than a piece, so memory does not follow the text's length."""
    monkeypatch.setattr(tokenizer, "PIECE", 1000)
    made = trained("bpe")
    seen = []
    real = made._encode
    monkeypatch.setattr(made, "_encode", lambda texts: seen.extend(map(len, texts)) or real(texts))
    made.encode("word " * 10_000 + "x" * 50_000)
    assert max(seen) <= 1000 and sum(seen) == 100_000


@pytest.mark.fault("T12")
def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = trained("byte").save(tmp_path)
    old = path.read_bytes()
    for k in itertools.count():
        calls = itertools.count()

        def fail(name, where, k=k, calls=calls):
            if next(calls) == k:
                raise OSError(28, "No space left on device")

        monkeypatch.setattr(files, "hook", fail)
        try:
            trained("char").save(tmp_path)
        except MachineError as error:
            assert path.read_bytes() in (old, trained("char").to_json().encode())
            assert str(tmp_path) in str(error)
        else:
            break
        finally:
            monkeypatch.setattr(files, "hook", lambda name, where: None)
    assert k >= 3
    assert Tokenizer.load(path).hash == trained("char").hash


@pytest.mark.fault("T12")
def test_kill_while_training_and_saving(tmp_path):
    """SIGKILL at several moments of a train-and-save loop: the file is one of the two whole ones."""
    script = """
import sys
from headway.text import train_tokenizer
print("ready", flush=True)
while True:
    for text in ("abc " * 50, "xyz " * 50):
        train_tokenizer([text], "bpe", 300).save(sys.argv[1])
"""
    whole = {train_tokenizer([text * 50], "bpe", 300).to_json() for text in ("abc ", "xyz ")}
    for delay in (0.0, 0.01, 0.023, 0.05):
        child = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE)
        assert child.stdout.readline()
        time.sleep(delay)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()
        path = tmp_path / "tokenizer.json"
        assert not path.exists() or path.read_text() in whole


@pytest.mark.parametrize("shape", ["bert", "roberta", "none"])
def test_pairs_are_framed_as_the_library_does(shape):
    """pair_ids around the ids of two texts are what the file's own post-processor gives for a pair."""
    made = trained("bpe")
    end = made.eos_id
    parts = {
        "bert": {"type": "BertProcessing", "sep": ["<|endoftext|>", end], "cls": ["<|endoftext|>", end]},
        "roberta": {
            "type": "RobertaProcessing",
            "sep": ["<|endoftext|>", end],
            "cls": ["<|endoftext|>", end],
            "trim_offsets": True,
            "add_prefix_space": False,
        },
        "none": None,
    }
    content = {**json.loads(made.to_json()), "post_processor": parts[shape]}
    framed = Tokenizer(content)
    library = tokenizers.Tokenizer.from_str(json.dumps(content))
    before, between, after = framed.pair_ids
    a, b = made.encode("one text"), made.encode("and another")
    assert [*before, *a, *between, *b, *after] == library.encode("one text", "and another").ids
    assert len(between) == {"bert": 1, "roberta": 2, "none": 0}[shape]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(text=any_text.filter(lambda text: "\ufffd" not in text))
def test_spans_say_where_each_token_stands(kind, text):
    made = trained(kind)
    if kind in ("unigram", "wordpiece", "bpe") and made._normalization:
        with pytest.raises(InputError, match="SentencePiece"):
            made.encode_spans(text)
        return
    try:
        ids = made.encode(text)
    except InputError:
        return  # a character that the vocabulary cannot express
    spans = made.encode_spans(text)
    assert [number for number, _, _ in spans] == ids
    assert all(0 <= start <= stop <= len(text) for _, start, stop in spans)
    assert [start for _, start, _ in spans] == sorted(start for _, start, _ in spans)
    if kind in ("bpe", "byte", "char"):  # nothing is normalized away: every character belongs to a token
        assert {place for _, start, stop in spans for place in range(start, stop)} == set(range(len(text)))
