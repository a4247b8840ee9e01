"""Damaged and hostile tokenizer.json files: one InputError with file and key, and nothing of them runs."""

import json
import subprocess
import sys
import tracemalloc

import pytest
import tokenizers
from text_corpus import KINDS, llama_2_tree, tree

from headway.errors import InputError
from headway.text import Tokenizer
from headway.text.patterns import REPLACE_PATTERNS, SPLIT_PATTERNS
from headway.text.spec import byte_characters


def _load(tmp_path, text):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return Tokenizer.load(path)


@pytest.mark.fault("T4")
@pytest.mark.parametrize("kind", KINDS)
def test_cut_at_fifty_places(kind, tmp_path):
    whole = json.dumps(tree(kind))
    for place in range(50):
        with pytest.raises(InputError) as caught:
            _load(tmp_path, whole[: len(whole) * place // 50])
        assert str(caught.value).startswith(f"{tmp_path}/tokenizer.json: ")


def _set(path, value):
    def change(made):
        *parents, last = path
        for key in parents:
            made = made[key]
        if value is KeyError:
            del made[last]
        else:
            made[last] = value

    return change


VOCAB, ADDED = ("model", "vocab"), ("added_tokens", 0)
WRONG = [
    # kind, what is changed, key that the message names, what it says
    ("bpe", _set(["model"], KeyError), "'model' is missing", "an object"),
    ("bpe", _set(["model"], []), "'model' is an array", "an object"),
    ("bpe", _set(["model", "type"], "Magic"), "model.type", "one of BPE"),
    ("bpe", _set(["model", "type"], 3), "model: key 'type' is an integer", "a string"),
    ("bpe", _set(VOCAB, KeyError), "model: key 'vocab' is missing", "an object"),
    ("bpe", _set(VOCAB, [1]), "key 'vocab' is an array", "an object"),
    ("bpe", _set(VOCAB, {}), "model.vocab: empty", ""),
    ("bpe", _set([*VOCAB, "a"], "7"), "model.vocab: id '7' of 'a'", "below 2^31"),
    ("bpe", _set([*VOCAB, "a"], True), "model.vocab: id True of 'a'", ""),
    ("bpe", _set([*VOCAB, "a"], -1), "model.vocab: id -1 of 'a'", ""),
    ("bpe", _set([*VOCAB, "a"], 1.5), "model.vocab: id 1.5 of 'a'", ""),
    ("bpe", _set([*VOCAB, "a"], 2**40), "model.vocab: id 1099511627776 of 'a'", ""),
    ("bpe", _set([*VOCAB, "a"], 2_000_000_000), "highest id 2000000000 with 600 tokens", "consecutive"),
    ("bpe", _set([*VOCAB, "a"], 70), "id 70 belongs to", "one token"),
    ("bpe", _set([*VOCAB, "y" * 5000], 600), "model.vocab: a token of 5000 characters", "4096"),
    ("bpe", _set(["model", "merges"], KeyError), "key 'merges' is missing", "an array"),
    ("bpe", _set(["model", "merges", 3], ["a"]), "model.merges[3]", "two tokens"),
    ("bpe", _set(["model", "merges", 3], ["a", "nowhere"]), "model.merges[3]", "two tokens"),
    ("bpe", _set(["model", "merges", 3], 5), "model.merges[3]", "two tokens"),
    ("bpe", _set(["model", "continuing_subword_prefix"], "x"), "continuing_subword_prefix 'x'", "begins with"),
    ("bpe", _set(["model", "dropout"], 0.5), "model.dropout", "null"),
    ("bpe", _set(["model", "unk_token"], "?!"), "model.unk_token", "a token of it"),
    ("bpe", _set(["added_tokens"], {}), "'added_tokens' is an object", "an array"),
    ("bpe", _set(ADDED, "x"), "added_tokens[0]: is a string", "an object"),
    ("bpe", _set([*ADDED, "id"], "0"), "added_tokens[0]: key 'id' is a string", "an integer"),
    ("bpe", _set([*ADDED, "special"], 1), "added_tokens[0]: key 'special' is an integer", "a boolean"),
    ("bpe", _set([*ADDED, "content"], ""), "added_tokens[0]: content of 0 characters", ""),
    ("bpe", _set([*ADDED, "id"], 5), "has id 5 here and 0 in model.vocab", "one id"),
    ("bpe", _set([*ADDED, "roles"], ["king"]), "added_tokens.roles: 'king'", "one of bos"),
    ("bpe", _set(["added_tokens", 1, "content"], "<|endoftext|>"), "again", "each token once"),
    ("byte", _set([*ADDED, "id"], -4), "id -4", "below 2^31"),
    ("byte", _set([*ADDED, "id"], 900), "has a wrong id 900", "no gap"),
    ("byte", _set([*ADDED, "id"], 7), "id 7 belongs to", "one token"),
    ("wordpiece", _set(["model", "unk_token"], KeyError), "key 'unk_token' is missing", "a string"),
    ("wordpiece", _set(["model", "unk_token"], ""), "model.unk_token", "a token of it"),
    ("wordpiece", _set(["model", "max_input_chars_per_word"], 10**9), "max_input_chars_per_word", "1 to 1000"),
    ("unigram", _set([*VOCAB, 3], ["a"]), "model.vocab[3]", "[piece, log probability]"),
    ("unigram", _set([*VOCAB, 3], ["a", "b"]), "model.vocab[3]", "[piece, log probability]"),
    ("unigram", _set(["model", "unk_id"], 10**6), "model.unk_id", "0 to"),
    ("unigram", _set(["model", "unk_id"], True), "key 'unk_id' is a boolean", ""),
    ("bpe", _set(["pre_tokenizer"], "ByteLevel"), "pre_tokenizer: is a string", "an object"),
    ("bpe", _set(["pre_tokenizer", "type"], "Exec"), "pre_tokenizer: type 'Exec'", "one of"),
    ("bpe", _set(["pre_tokenizer", "pretokenizers"], [None]), "pre_tokenizer: a null", "a node"),
    ("bpe", _set(["decoder"], {"type": "Sequence"}), "decoder: key 'decoders' is missing", "an array"),
    ("bpe", _set(["normalizer"], {"type": "Precompiled", "precompiled_charsmap": "AAAA"}), "refuses it", ""),
    ("bpe", _set(["normalizer"], {"type": "Strip"}), "refuses it", ""),
]


@pytest.mark.fault("T4")
@pytest.mark.parametrize("case", WRONG, ids=lambda case: case[2][:40])
def test_wrong_types(case, tmp_path):
    kind, change, found, expected = case
    made = tree(kind)
    change(made)
    with pytest.raises(InputError) as caught:
        _load(tmp_path, json.dumps(made))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/tokenizer.json") and found in message and expected in message
    assert len(message) < 600


@pytest.mark.fault("T4")
@pytest.mark.parametrize("text", ["{}", "[]", "3", "null", '"x"', "", '{"model": {}}', '{"model": {"vocab": 3}}'])
def test_other_json(text, tmp_path):
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        _load(tmp_path, text)


def test_every_single_replacement_is_an_input_error_or_loads(tmp_path):
    """Each value outside the vocabulary replaced by each wrong type: never another exception.

    It found a continuing_subword_prefix that makes the library abort the process.
    """
    values = (None, True, -1, 10**30, 1.5, "", "x", [], {}, [[]], {"type": "Sequence"})

    def places(node, path):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield [*path, key]
            if isinstance(value, dict | list) and key not in ("vocab", "merges"):
                yield from places(value, [*path, key])

    tried = refused = 0
    for kind in ("bpe", "wordpiece", "unigram", "byte"):
        whole = json.dumps(tree(kind))
        for path in places(json.loads(whole), []):
            for value in values:
                made = json.loads(whole)
                _set(path, value)(made)
                tried += 1
                try:
                    Tokenizer(made, "f.json").encode("hello")
                except InputError:
                    refused += 1
    assert tried > 1500 and refused > tried // 2


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        Tokenizer.load(tmp_path)


HOSTILE = [r"(a+)+$", r"(a|a)*$", r"(a|aa)+$", r"^(\w+\s?)*$", r"\p{L}+", ""]


@pytest.mark.fault("T8")
@pytest.mark.parametrize("pattern", HOSTILE)
@pytest.mark.parametrize("part", ["pre_tokenizer", "normalizer", "decoder"])
def test_unknown_patterns_are_refused(pattern, part, tmp_path):
    node = {"type": "Split" if part == "pre_tokenizer" else "Replace", "pattern": {"Regex": pattern}}
    node |= {"behavior": "Isolated", "invert": False} if part == "pre_tokenizer" else {"content": ""}
    key = {"pre_tokenizer": "pretokenizers", "normalizer": "normalizers", "decoder": "decoders"}[part]
    nested = {"type": "Sequence", key: [{"type": "Sequence", key: [node]}]}
    for value in (node, nested):
        made = tree("bpe")
        made[part] = value
        with pytest.raises(InputError, match=f"{part}.*unknown regular expression") as caught:
            _load(tmp_path, json.dumps(made))
        assert repr(pattern)[1:-1] in str(caught.value)


@pytest.mark.fault("T8")
def test_negative_control_a_hostile_pattern_hangs(tmp_path):
    """The library itself runs the pattern: under a CPU limit of 1 s the child is killed."""
    made = tree("bpe")
    made["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": r"(a|a)*$"}, "behavior": "Isolated", "invert": False}
    path = tmp_path / "hostile.json"
    path.write_text(json.dumps(made))
    script = (
        "import resource, sys, tokenizers; made = tokenizers.Tokenizer.from_file(sys.argv[1]);"
        "resource.setrlimit(resource.RLIMIT_CPU, (1, 1)); made.encode('a' * 60 + '!'); print('finished')"
    )
    child = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True)
    assert child.returncode != 0 and "finished" not in child.stdout


@pytest.mark.fault("T8")
@pytest.mark.parametrize("name", SPLIT_PATTERNS)
def test_known_patterns_run_in_linear_time(name):
    """Each known pattern on the inputs that break careless ones; the library does 60,000 characters in a moment."""
    made = tree("bpe")
    made["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": SPLIT_PATTERNS[name]}
    built = Tokenizer(made)
    for unit in ("a", "A", "'", "1", "!", "日", "aA"):
        text = unit * (60_000 // len(unit)) + "?"
        assert built.decode(built.encode(text)) == text or name.startswith("clip")


def test_known_replacements_load():
    for pattern in REPLACE_PATTERNS:
        made = tree("bpe")
        made["normalizer"] = {"type": "Replace", "pattern": {"Regex": pattern}, "content": " "}
        assert Tokenizer(made).encode("a b")


@pytest.mark.fault("T8")
def test_replacement_bombs(tmp_path):
    double = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    made = tree("bpe")
    made["normalizer"] = {"type": "Sequence", "normalizers": [double] * 40}
    with pytest.raises(InputError, match=r"normalizer: replacements that grow the text up to 1\.1e\+12 times"):
        _load(tmp_path, json.dumps(made))
    made["normalizer"] = {"type": "Prepend", "prepend": "x" * 10**6}
    with pytest.raises(InputError, match="a string of 1000000 characters"):
        _load(tmp_path, json.dumps(made))
    made["normalizer"] = {"type": "Sequence", "normalizers": [double] * 4}
    assert _load(tmp_path, json.dumps(made)).decode(_load(tmp_path, json.dumps(made)).encode("a")) == "a" * 16


def test_byte_characters_are_the_librarys_alphabet():
    assert sorted(byte_characters()) == sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    assert len(set(byte_characters())) == 256
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for text in ("a \n\x00", "é日😀"):
        spelled = level.pre_tokenize_str(text)[0][0]
        assert spelled == "".join(byte_characters()[byte] for byte in text.encode())


def test_padding_and_truncation_in_the_file_are_off():
    made = tree("bpe")
    made["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    made["padding"] = {"strategy": {"Fixed": 512}, "direction": "Right", "pad_to_multiple_of": None}
    made["padding"] |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"}
    assert Tokenizer(made).encode("one two three four") == Tokenizer(tree("bpe")).encode("one two three four")


def test_old_files_without_a_model_type():
    for kind in ("bpe", "wordpiece", "unigram", "byte", "char"):
        made = tree(kind)
        del made["model"]["type"]
        assert Tokenizer(made).kind == kind
    made = llama_2_tree()
    made["model"]["merges"] = [" ".join(pair) for pair in made["model"]["merges"]]
    assert Tokenizer(made).encode("hello") == Tokenizer(llama_2_tree()).encode("hello")


# A SentencePiece model is a protobuf: field 1 (pieces), length as a varint. Here 2^63 bytes, a cut one, and noise.
PROTOBUFS = [b"", b"\n\xff\xff\xff\xff\xff\xff\xff\xff\x7f", b"\n\x0e\n\x05<unk>\x15\x00", bytes(range(256)) * 64]


@pytest.mark.fault("T11")
@pytest.mark.parametrize("content", PROTOBUFS, ids=lambda content: f"{len(content)} bytes")
def test_a_damaged_sentencepiece_model_is_named(tmp_path, content):
    path = tmp_path / "spiece.model"
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(InputError, match=r"spiece\.model \(as a SentencePiece model\)"):
        Tokenizer.load(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    renamed = tmp_path / "tokenizer.json"
    renamed.write_bytes(content)
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        Tokenizer.load(renamed)
