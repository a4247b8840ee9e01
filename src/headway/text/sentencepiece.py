"""SentencePiece models (`.model`): a protobuf of pieces with scores, read into the tree of a tokenizer.json.

Messages and numbers are those of github.com/google/sentencepiece, src/sentencepiece_model.proto. BPE and Unigram
models are expressed so that ids equal SentencePiece's own; what the tree cannot say is refused. Left out: models of
whole words or characters, denormalization, and sampled segmentations.
"""

from __future__ import annotations

import math
import re
from base64 import b64encode
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from typing import Literal

from headway import protobuf
from headway.errors import InputError
from headway.text.normalization import FLAGS, KEY, MARK
from headway.text.spec import Role, added_entry, empty_tree

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of pieces, in .model and GGUF files alike."""
Kind = Literal["unigram", "bpe"]
MAX_MERGED = 512  # characters of a piece that merges build: each way to part it is looked up
_KINDS: dict[int, Kind] = {1: "unigram", 2: "bpe"}
_FIX = "write a tokenizer.json with transformers' AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
_ROLES: dict[int, tuple[Role, int]] = {41: ("bos", 1), 42: ("eos", 2), 43: ("pad", -1)}
"""Fields of trainer_spec: the role whose id they give, and the id where they are not written."""
_ONE_MARK = re.compile(f"{MARK}?[^{MARK}]*")


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; its place is its id."""

    text: str
    score: float
    type: int = NORMAL


@dataclass(frozen=True)
class Model:
    """The facts of a .model file, or of the same vocabulary in a GGUF file."""

    kind: Kind
    pieces: Sequence[Piece]
    flags: Mapping[str, bool]
    charsmap: bytes = b""
    byte_fallback: bool = False
    roles: Mapping[Role, int] = field(default_factory=dict)


def read_model(data: bytes, where: str) -> Model:
    """The content of a .model file.

    Raises:
        InputError: not a SentencePiece model, cut short, or of a kind that a tree cannot express.
    """
    pieces: list[Piece] = []
    trainer: dict[int, int] = {}
    normalizer: dict[int, int] = {}
    charsmap = b""
    for number, _, value in protobuf.fields(data, where):
        if isinstance(value, int):
            continue
        if number == 1:
            pieces.append(_piece(value, f"{where} piece {len(pieces)}"))
        elif number == 2:
            trainer |= _integers(value, f"{where} trainer_spec")
        elif number == 3:
            place = f"{where} normalizer_spec"
            normalizer |= _integers(value, place)
            maps = [inner for key, _, inner in protobuf.fields(value, place) if key == 2 and not isinstance(inner, int)]
            charsmap = bytes(maps[-1]) if maps else b""
    if not pieces:
        raise InputError(where, "no pieces", "a SentencePiece model")
    kind = trainer.get(3, 1)
    if kind not in _KINDS:
        found = f"a model of type {({3: 'WORD', 4: 'CHAR'}).get(kind, kind)}"
        raise InputError(f"{where} trainer_spec.model_type", found, "UNIGRAM or BPE")
    switches = (normalizer.get(3, 1), normalizer.get(4, 1), normalizer.get(5, 1), trainer.get(24, 0))
    flags = {name: bool(value) for name, value in zip(FLAGS, switches, strict=True)}
    ids = {role: protobuf.signed(trainer.get(key, default)) for key, (role, default) in _ROLES.items()}
    roles = {role: number for role, number in ids.items() if 0 <= number < len(pieces)}
    return Model(_KINDS[kind], pieces, flags, charsmap, bool(trainer.get(35)), roles)


def model_tree(model: Model, where: str) -> dict[str, object]:
    """The tree of a tokenizer.json that encodes as SentencePiece does.

    Raises:
        InputError: a vocabulary that SentencePiece refuses too, or whose merges a tokenizer.json cannot order.
    """
    _check(model, where)
    entries: list[dict[str, object]] = []
    for number, piece in enumerate(model.pieces):
        special = piece.type in (UNKNOWN, CONTROL, UNUSED)
        if special or (piece.type == USER_DEFINED and model.kind == "bpe"):
            roles = sorted(role for role, holder in model.roles.items() if special and holder == number)
            entry = {**added_entry(number, piece.text), "special": special}
            entries.append(entry | ({"roles": roles} if roles else {}))
    tree = empty_tree(_unigram(model) if model.kind == "unigram" else _bpe(model, where))
    tree |= {"added_tokens": entries, "normalizer": _normalizer(model)}
    return tree | {"pre_tokenizer": _pre_tokenizer(model), "decoder": _decoder(model)}


def byte_piece(byte: int) -> str:
    """How a vocabulary spells one byte."""
    return f"<0x{byte:02X}>"


def _piece(data: memoryview, where: str) -> Piece:
    text, score, kind = "", 0.0, NORMAL
    for number, wire, value in protobuf.fields(data, where):
        if number == 1:
            text = protobuf.text(value, where)
        elif number == 2 and wire == protobuf.FIXED32 and isinstance(value, int):
            score = protobuf.as_float(value)
        elif number == 3 and isinstance(value, int):
            kind = value
    return Piece(text, score, kind)


def _integers(data: memoryview, where: str) -> dict[int, int]:
    return {number: value for number, _, value in protobuf.fields(data, where) if isinstance(value, int)}


def _check(model: Model, where: str) -> None:
    seen: dict[str, int] = {}
    for number, piece in enumerate(model.pieces):
        place = f"{where} piece {number}"
        if not piece.text or piece.type not in range(NORMAL, BYTE + 1) or not math.isfinite(piece.score):
            found = f"{piece.text[:40]!r} of type {piece.type} with score {piece.score}"
            raise InputError(place, found, "a text, a type from 1 to 6 and a finite score")
        if seen.setdefault(piece.text, number) != number:
            raise InputError(place, f"{piece.text[:40]!r} again, after id {seen[piece.text]}", "each piece once")
    unknown = sum(piece.type == UNKNOWN for piece in model.pieces)
    if unknown != 1:
        raise InputError(where, f"{unknown} unknown pieces", "one")
    names = {piece.text for piece in model.pieces if piece.type == BYTE}
    if names != ({byte_piece(byte) for byte in range(256)} if model.byte_fallback else set()):
        found = f"{len(names)} byte pieces with byte_fallback {str(model.byte_fallback).lower()}"
        raise InputError(where, found, "256 with it, none without")


def _matched(model: Model) -> Iterable[Piece]:
    return (piece for piece in model.pieces if piece.type in (NORMAL, USER_DEFINED))


def _normalizer(model: Model) -> dict[str, object]:
    """The nodes that come nearest for other programs, and for ours the exact facts (headway.text.normalization)."""
    prefix, tidy, escape, at_end = (model.flags[name] for name in FLAGS)
    nodes: list[dict[str, object]] = []

    def substitute(pattern: dict[str, str], content: str) -> None:
        nodes.append({"type": "Replace", "pattern": pattern, "content": content})

    if model.charsmap:
        nodes.append({"type": "Precompiled", "precompiled_charsmap": b64encode(model.charsmap).decode()})
    if tidy:
        substitute({"Regex": " {2,}"}, " ")
        substitute({"Regex": r"\A | \z"}, "")
    if prefix and at_end:
        substitute({"Regex": r"\z"}, " ")
    elif prefix:
        nodes.append({"type": "Prepend", "prepend": " "})
    if escape:
        substitute({"String": " "}, MARK)
    symbols = [piece.text for piece in model.pieces if piece.type == USER_DEFINED]
    return {"type": "Sequence", "normalizers": nodes, KEY: {**model.flags, "symbols": symbols}}


def _pre_tokenizer(model: Model) -> dict[str, object] | None:
    """Words apart where no piece reaches into the next word; else the text whole."""
    texts = {piece.text for piece in _matched(model)}
    if not model.flags["escape_whitespaces"] or MARK not in texts or not all(map(_ONE_MARK.fullmatch, texts)):
        return None
    return {"type": "Metaspace", "replacement": MARK, "prepend_scheme": "never", "split": True}


def _decoder(model: Model) -> dict[str, object]:
    prefix, tidy, escape, at_end = (model.flags[name] for name in FLAGS)
    nodes: list[dict[str, object]] = []
    if escape:
        nodes.append({"type": "Replace", "pattern": {"String": MARK}, "content": " "})
    if model.byte_fallback:
        nodes.append({"type": "ByteFallback"})
    nodes.append({"type": "Fuse"})
    if prefix or tidy:
        nodes.append({"type": "Strip", "content": " ", "start": int(not at_end), "stop": int(at_end)})
    return {"type": "Sequence", "decoders": nodes}


def _unigram(model: Model) -> dict[str, object]:
    """Scores as SentencePiece's search uses them (src/unigram_model.cc; the bonus as sentencepiece 0.2.3 gives it).

    A user-defined piece is worth a tenth for each byte but the first. For an unknown character both take 10 less than
    the worst normal piece; others have score 0 in a file, and here never less than the worst.
    """
    least = min((piece.score for piece in model.pieces if piece.type == NORMAL), default=0.0)
    scores = [
        (len(piece.text.encode()) - 1) * 0.1 if piece.type == USER_DEFINED else max(piece.score, least)
        for piece in model.pieces
    ]
    unknown = next(number for number, piece in enumerate(model.pieces) if piece.type == UNKNOWN)
    vocab = [[piece.text, score] for piece, score in zip(model.pieces, scores, strict=True)]
    return {"type": "Unigram", "unk_id": unknown, "vocab": vocab, "byte_fallback": model.byte_fallback}


def _bpe(model: Model, where: str) -> dict[str, object]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": next(piece.text for piece in model.pieces if piece.type == UNKNOWN),
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": model.byte_fallback,
        "ignore_merges": False,
        "vocab": {piece.text: number for number, piece in enumerate(model.pieces)},
        "merges": merges(model.pieces, where),
    }


def merges(pieces: Sequence[Piece], where: str) -> list[list[str]]:
    """Every way to build a piece of two others, the best score first.

    SentencePiece merges the neighbours whose union has the best score, the leftmost of equals; a list of merges says
    the same while scores differ. Two pieces of one score that can compete for a middle part are refused.

    Raises:
        InputError: such pieces; a piece with a character that is none itself; a piece too long; an unused piece.
    """
    normal = {piece.text for piece in pieces if piece.type == NORMAL}
    missing = set("".join(normal)) - normal - {piece.text for piece in pieces if piece.type == USER_DEFINED}
    made: list[tuple[float, int, str, str]] = []
    for number, piece in enumerate(pieces):
        text = piece.text
        if piece.type not in (NORMAL, UNUSED):
            continue
        if len(text) > MAX_MERGED:
            raise InputError(f"{where} piece {number}", f"{len(text)} characters", f"at most {MAX_MERGED}")
        cuts = [cut for cut in range(1, len(text)) if text[:cut] in normal and text[cut:] in normal]
        if piece.type == UNUSED and (cuts or len(text) == 1):
            found = f"{text[:40]!r} is unused and yet can be built"
            raise InputError(f"{where} piece {number}", found, "pieces that are used", _FIX)
        if piece.type == NORMAL and missing and not missing.isdisjoint(text):
            found = f"{text[:40]!r} has {min(missing.intersection(text))!r}, which is no piece"
            raise InputError(f"{where} piece {number}", found, "every character as one", _FIX)
        made += [(-piece.score, number, text[:cut], text[cut:]) for cut in cuts]
    made.sort(key=itemgetter(0, 1))
    _check_ties(made, pieces, where)
    return [[left, right] for _, _, left, right in made]


def _check_ties(made: Iterable[tuple[float, int, str, str]], pieces: Sequence[Piece], where: str) -> None:
    for _, group in groupby(made, key=itemgetter(0)):
        ways = list(group)
        if ways[0][1] == ways[-1][1]:
            continue
        ends: defaultdict[str, set[int]] = defaultdict(set)
        for _, number, _, right in ways:
            ends[right].add(number)
        for _, number, left, _ in ways:
            others = ends.get(left, set()) - {number}
            if others:
                names = f"{pieces[min(others)].text[:40]!r} and {pieces[number].text[:40]!r}"
                expected = "different scores: of equals SentencePiece merges the leftmost, a list of merges its first"
                raise InputError(where, f"{names} have one score and share {left[:40]!r}", expected, _FIX)
