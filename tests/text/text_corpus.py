"""Shared material of the text tests: small real texts, trained tokenizers, hand-made tokenizer files."""

import copy
import functools
import json
import pydoc_data.topics as topics

from headway.text import Tokenizer, train_tokenizer

SENTENCES = list(topics.topics.values())[:40]
KINDS = ("bpe", "wordpiece", "unigram", "byte", "char")


@functools.cache
def trained(kind: str, vocab_size: int = 600) -> Tokenizer:
    return train_tokenizer(
        [*SENTENCES, "naïve 日本語、テキスト。 😀 １２３"],
        kind,
        vocab_size,
        special_tokens=("<|endoftext|>", "<|user|>"),
    )


def tree(kind: str = "bpe") -> dict:
    """A fresh tokenizer.json tree to damage."""
    return copy.deepcopy(json.loads(trained(kind).to_json()))


def llama_2_tree() -> dict:
    """BPE with byte fallback and no pre-tokenizer: the shape of converted SentencePiece files (Llama 2)."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"helowrd",
        "▁h",
        "▁w",
        "el",
        "▁hel",
    ]
    made = tree("char")
    made["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    }
    made["decoder"] = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    }
    merges = [["▁", "h"], ["▁", "w"], ["e", "l"], ["▁h", "el"]]
    made["model"] |= {
        "vocab": {piece: number for number, piece in enumerate(pieces)},
        "merges": merges,
        "byte_fallback": True,
        "fuse_unk": True,
    }
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    made["added_tokens"] = [{"id": number, "content": pieces[number], **special} for number in range(3)]
    return made
