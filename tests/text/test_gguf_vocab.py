"""Tokenizers in GGUF metadata: against llama.cpp itself, there and back, and metadata that is refused."""

from __future__ import annotations

import copy
import functools
import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hard_strings import hard_strings
from llama_cpp_oracle import LlamaCpp, tiny_model
from text_corpus import SENTENCES, trained, tree

from headway.checkpoints.gguf import read_gguf, write_gguf
from headway.errors import InputError
from headway.text import Tokenizer
from headway.text.gguf_vocab import _BY_NAME, _STEPS, TYPES, from_gguf, to_gguf

G = "tokenizer.ggml."
# The Unicode tables of the two sides are of different years.
KNOWN = [text for text in hard_strings() if text and all(unicodedata.category(letter) != "Cn" for letter in text)]


@functools.cache
def byte_level_metadata(pre: str) -> dict[str, Any]:
    """A vocabulary whose merges were learned across words, so that each boundary a pattern sets shows in the ids."""
    pieces = tokenizers.pre_tokenizers
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = pieces.Split(tokenizers.Regex(r"[\s\S]{1,12}"), "isolated")
    made.pre_tokenizer = pieces.Sequence([split, pieces.ByteLevel(add_prefix_space=False, use_regex=False)])
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=4000,
        initial_alphabet=pieces.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    made.train_from_iterator([*SENTENCES[:10], *hard_strings()[5000:9000]], trainer)
    model = json.loads(made.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    merges = [" ".join(merge) for merge in model["merges"]]
    types = [3] + [1] * (len(tokens) - 1)
    names = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": types, "merges": merges}
    return {G + name: value for name, value in names.items()} | {f"{G}bos_token_id": 0, f"{G}eos_token_id": 0}


def exact(pre: str, text: str) -> bool:
    """Where llama.cpp does what the published pattern says.

    It stands in for the letter classes of o200k and tekken with ASCII ranges, and takes white space beyond ASCII for
    another character in patterns that name no class.
    """
    if pre in ("gpt-4o", "tekken"):
        return text.isascii()
    return pre != "deepseek-coder" or not any(letter.isspace() and letter > "\x7f" for letter in text)


@pytest.mark.parametrize("steps", _STEPS, ids=lambda steps: "+".join(steps))
def test_split_patterns_are_llama_cpps(steps, tmp_path):
    pre = _STEPS[steps].split()[0]
    metadata = byte_level_metadata(pre)
    made = from_gguf(metadata, "f.gguf", rows=len(metadata[f"{G}tokens"]))
    other = LlamaCpp(tiny_model(tmp_path / "tiny.gguf", metadata))
    texts = [text for text in KNOWN[len(steps) :: 45] if exact(pre, text)]
    assert len(texts) > 40
    for text in texts:
        assert made.encode(text) == other(text), text
        assert made.decode(made.encode(text)) == text or pre == "bloom"
    assert made.prefix_ids == ((0,) if "whole" in steps else ())


def test_other_names_of_the_same_pattern():
    small = {key: value[:500] if isinstance(value, list) else value for key, value in byte_level_metadata("x").items()}
    small[f"{G}merges"] = small[f"{G}merges"][:200]
    for name, steps in _BY_NAME.items():
        first = from_gguf({**small, f"{G}pre": _STEPS[steps].split()[0]}, "f")
        assert from_gguf({**small, f"{G}pre": name}, "f").hash == first.hash
    del small[f"{G}pre"]
    assert from_gguf(small, "f").hash == from_gguf({**small, f"{G}pre": "default"}, "f").hash


def _sentencepiece(kind: str, **options: Any) -> Tokenizer:
    pytest.importorskip("sentencepiece")
    from test_sentencepiece import built, trained_model

    return built(trained_model(kind, **options))


LLAMA = {"byte_fallback": True, "remove_extra_whitespaces": False}
MADE = {
    "trained": lambda: trained("bpe"),
    "llama": lambda: _sentencepiece("bpe", symbols=False, **LLAMA),
    "gemma": lambda: _sentencepiece("bpe", add_dummy_prefix=False, **LLAMA),
    "t5": lambda: _sentencepiece("unigram", rule="nmt_nfkc", symbols=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1),
}


@pytest.mark.parametrize("name", MADE)
def test_what_is_written_is_what_llama_cpp_reads(name, tmp_path):
    made = MADE[name]()
    made.chat_template = "{{ messages }}"
    metadata = to_gguf(made)
    back = from_gguf(metadata, "f.gguf", rows=made.vocab_size)
    other = LlamaCpp(tiny_model(tmp_path / "tiny.gguf", metadata))
    # Marks typed into a text may be a user-defined piece for SentencePiece and are nothing special for llama.cpp.
    texts = [text for text in hard_strings()[::21] if text and not (name == "gemma" and "▁" in text)]
    for text, ids in zip(texts, made.encode_batch(texts), strict=True):
        assert back.encode(text) == ids == other(text), text
    for role in ("bos", "eos", "pad", "unk", "mask"):
        assert getattr(back, f"{role}_id") == getattr(made, f"{role}_id")
    assert back.special_ids == made.special_ids and back.chat_template == made.chat_template
    assert back.encode_input("the end") == other("the end", add_special=True) == made.encode_input("the end")


def test_bert_there_and_back(tmp_path):
    """llama.cpp takes control characters for spaces and knows no word too long; the rest is BERT's, in every string."""
    made = tree("wordpiece")
    size = len(made["model"]["vocab"])
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    for number, content, role in ((size, "[CLS]", "bos"), (size + 1, "[SEP]", "eos")):
        made["added_tokens"].append({"id": number, "content": content, **flags, "roles": [role]})
    for entry in made["added_tokens"][:-2]:
        entry["roles"] = [role for role in entry.get("roles", []) if role not in ("bos", "eos")]
    made["post_processor"] = {"type": "BertProcessing", "cls": ["[CLS]", size], "sep": ["[SEP]", size + 1]}
    for lowercase in (True, False):
        made["normalizer"] |= {"lowercase": lowercase, "strip_accents": None, "handle_chinese_chars": True}
        original = Tokenizer(made)
        metadata = to_gguf(original)
        back = from_gguf(metadata, "f.gguf", rows=original.vocab_size)
        texts = hard_strings()[::9]
        assert [back.encode_input(text) for text in texts] == [original.encode_input(text) for text in texts]
        assert (back.prefix_ids, back.suffix_ids, back.unk_id) == ((size,), (size + 1,), original.unk_id)
    other = LlamaCpp(tiny_model(tmp_path / "tiny.gguf", metadata))
    plain = [text for text in KNOWN[::11] if text.isprintable() and max(map(len, text.split()), default=0) < 100]
    for text in plain:
        assert back.encode_input(text) == other(text, add_special=True), text
    assert len(plain) > 300


def test_through_a_file_of_ours(tmp_path):
    for kind in ("bpe", "byte", "wordpiece"):
        made = trained(kind)
        path = tmp_path / f"{kind}.gguf"
        path.write_bytes(b"".join(write_gguf(to_gguf(made), {}, TYPES)))
        with read_gguf(path) as file:
            back = from_gguf(file.metadata, str(path))
        texts = hard_strings()[::50]
        assert back.encode_batch(texts) == made.encode_batch(texts) and back.eos_id == made.eos_id
        assert [back.decode(ids) for ids in back.encode_batch(texts)] == [
            made.decode(x) for x in made.encode_batch(texts)
        ]


@pytest.mark.fault("Q7")
def test_tokens_rows_and_special_ids_disagree():
    metadata = byte_level_metadata("gpt-2")
    size = len(metadata[f"{G}tokens"])
    for rows, special in [(size + 1, 0), (size - 1, 0), (size, size), (size, 2**31), (None, size), (0, 0)]:
        with pytest.raises(InputError) as caught:
            from_gguf({**metadata, f"{G}padding_token_id": special}, "m.gguf", rows)
        message = str(caught.value)
        three = f"{size} tokens, {'?' if rows is None else rows} embedding rows, special ids up to {special}"
        assert message.startswith("m.gguf: ") and three in message
    assert from_gguf({**metadata, f"{G}padding_token_id": 5}, "m.gguf", size).pad_id == 5


WRONG = [
    ({f"{G}model": KeyError}, "key 'tokenizer.ggml.model' is missing"),
    ({f"{G}model": "rwkv"}, "tokenizer.ggml.model: 'rwkv'; expected one of gpt2"),
    ({f"{G}model": 3}, "'tokenizer.ggml.model' is an integer"),
    ({f"{G}pre": "kimi-k2"}, "tokenizer.ggml.pre: 'kimi-k2', a split pattern without a known meaning"),
    ({f"{G}pre": "made-up"}, "'made-up'"),
    ({f"{G}tokens": KeyError, f"{G}token_type": KeyError}, "0 tokens"),
    ({f"{G}tokens": ["a", 3]}, "tokenizer.ggml.tokens: values of another type"),
    ({f"{G}tokens": "abc"}, "'tokenizer.ggml.tokens' is a string"),
    ({f"{G}token_type": [1, 2]}, "tokenizer.ggml.token_type: 2 values; expected 4000"),
    ({f"{G}scores": [1.0]}, "tokenizer.ggml.scores: 1 values"),
    ({f"{G}merges": ["a"]}, "model.merges[0]"),
    ({f"{G}merges": ["a nowhere"]}, "model.merges[0]"),
    ({f"{G}merges": [1]}, "tokenizer.ggml.merges: values of another type"),
    ({f"{G}add_bos_token": 1}, "'tokenizer.ggml.add_bos_token' is an integer"),
    ({f"{G}eos_token_id": -1}, None),
    ({f"{G}eos_token_id": "2"}, "'tokenizer.ggml.eos_token_id' is a string"),
    ({f"{G}eos_token_id": True}, "'tokenizer.ggml.eos_token_id' is a boolean"),
    ({"tokenizer.chat_template": 3}, "chat_template: a int"),
    ({f"{G}model": "llama"}, "0 unknown pieces"),
    ({f"{G}model": "bert"}, "role unknown"),
]


@pytest.mark.fault("Q7")
@pytest.mark.parametrize("case", WRONG, ids=lambda case: str(case[1])[:50])
def test_what_is_refused(case):
    changes, message = case
    metadata = byte_level_metadata("gpt-2") | {key: value for key, value in changes.items() if value is not KeyError}
    metadata = {key: value for key, value in metadata.items() if changes.get(key) is not KeyError}
    with pytest.raises(InputError) as caught:
        from_gguf(metadata, "m.gguf")
    assert str(caught.value).startswith("m.gguf") and (message or "") in str(caught.value)


def test_duplicate_tokens():
    metadata = copy.deepcopy(byte_level_metadata("gpt-2"))
    metadata[f"{G}tokens"][300] = metadata[f"{G}tokens"][299]
    with pytest.raises(InputError, match="twice; expected each token once"):
        from_gguf(metadata, "m.gguf")


def _changed(kind: str, part: str, node: Any) -> Tokenizer:
    made = tree(kind)
    made[part] = node
    return Tokenizer(made)


LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
UNSAYABLE = [
    (lambda: trained("char"), "kind char"),
    (lambda: trained("unigram"), "other than SentencePiece's"),
    (lambda: _changed("bpe", "pre_tokenizer", LEVEL), "no name for (ByteLevel)"),
    (lambda: _changed("bpe", "pre_tokenizer", {"type": "Whitespace"}), "no name for (Whitespace)"),
    (lambda: _changed("bpe", "pre_tokenizer", None), "no name for ()"),
    (lambda: _changed("bpe", "normalizer", {"type": "Lowercase"}), "a normalizer before a byte-level BPE"),
    (lambda: _changed("wordpiece", "pre_tokenizer", {"type": "Whitespace"}), "other than BERT's"),
    (
        lambda: _changed(
            "bpe", "post_processor", {"type": "BertProcessing", "cls": ["<|user|>", 1], "sep": ["<|endoftext|>", 0]}
        ),
        "the template (1,) text (0,)",
    ),
    (lambda: _sentencepiece("bpe", rule="nmt_nfkc", **LLAMA), "merges or a normalizer"),
    (lambda: _sentencepiece("bpe", treat_whitespace_as_suffix=True), "other than SentencePiece's"),
]


@pytest.mark.parametrize("case", UNSAYABLE, ids=lambda case: case[1])
def test_what_a_gguf_file_cannot_say(case):
    with pytest.raises(InputError) as caught:
        to_gguf(case[0]())
    assert case[1] in str(caught.value) and "for which a GGUF file has no words" in str(caught.value)


def test_older_and_odd_metadata(tmp_path: Path):
    """BERT files without cls or add flags, empty tokens, tokens without types."""
    vocab = ["[PAD]", "", "▁the", "s", "▁a"] + [f"▁x{n}" for n in range(95)] + ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    types = [1] * 100 + [3] * 4
    metadata = {f"{G}model": "bert", f"{G}tokens": vocab, f"{G}token_type": types}
    made = from_gguf(metadata, "f", 104)
    assert [made.token(number) for number in (1, 2, 3)] == ["##[EMPTY_1]", "the", "##s"]
    assert (made.prefix_ids, made.suffix_ids, made.unk_id) == ((101,), (102,), 100)
    assert made.encode("THE thes ü") == [2, 2, 3, 100]
    assert from_gguf({**metadata, f"{G}add_sep_token": False}, "f").suffix_ids == ()
