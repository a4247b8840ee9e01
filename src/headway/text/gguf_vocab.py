"""The tokenizer inside a GGUF file's metadata, read and written.

Keys are those of the format (github.com/ggml-org/ggml, docs/gguf.md), what they mean is what llama.cpp does
(src/llama-vocab.cpp): `tokenizer.ggml.model` names the algorithm, and for byte-level BPE `tokenizer.ggml.pre` stands
for a split pattern that the file does not hold. A name that is not in the table here is an error, never a guess.
Left out: models rwkv, plamo2, gemma4 and whitespace; NFC before a byte-level BPE, which the format cannot say and
llama.cpp does not do; the attributes lstrip and rstrip.
"""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from headway.errors import InputError
from headway.strict import field, strict_json
from headway.text import formats
from headway.text.normalization import FLAGS, KEY, MARK
from headway.text.patterns import SPLIT_PATTERNS, leaves
from headway.text.sentencepiece import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Model,
    Piece,
    byte_piece,
    merges,
    model_tree,
)
from headway.text.spec import Role, added_entry
from headway.text.tokenizer import Tokenizer

# Steps of the pre-tokenizer, by their names in SPLIT_PATTERNS: the names that llama.cpp has for them, the one to write
# first. Behind "whole" a word that is a token is taken whole, and a text begins with BOS unless the file denies it.
_STEPS: dict[tuple[str, ...], str] = {
    (
        "gpt-2",
    ): "gpt-2 phi-2 mpt olmo jais trillion granite-docling jina-es jina-de jina-v2-es jina-v2-de gigachat a.x-4.0"
    " mellum modern-bert exaone4",
    ("digits", "gpt-2"): "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2",
    ("llama-3", "whole"): "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
    ("llama-3",): "dbrx smaug-bpe glm4 chatglm-bpe",
    ("qwen-2",): "qwen2 deepseek-r1-qwen kormo f2llmv2 stablelm2 hunyuan solar-open megrez grok-2",
    ("qwen-3.5",): "qwen35",
    ("o200k",): "gpt-4o llama4 kanana2 talkie minimax-m2",
    ("tekken", "whole"): "tekken",
    ("digits-3", "deepseek-3-cjk", "deepseek-3-words"): "deepseek-v3 hunyuan-dense joyai-llm hy_v4",
    ("newline", "deepseek-coder-words", "deepseek-coder-punctuation", "deepseek-coder-cjk", "digits"): "deepseek-coder",
    ("falcon-punctuation", "gpt-2", "falcon"): "falcon",
    ("default-punctuation", "gpt-2", "digits-run", "falcon"): "default",
    ("bloom",): "bloom gpt3-finnish",
}
_BY_NAME = {name: steps for steps, names in _STEPS.items() for name in names.split()}
_PREFIX = "tokenizer.ggml."
_ROLES: dict[str, Role] = {"bos": "bos", "cls": "bos", "eos": "eos", "seperator": "eos", "padding": "pad"}
_ROLES |= {"unknown": "unk", "mask": "mask"}  # the misspelling is the format's
# What llama.cpp takes where the file says nothing.
_IDS = {"llama": {"bos": 1, "eos": 2, "unknown": 0}, "bert": {"bos": 101, "unknown": 100, "seperator": 102}}
_IDS |= {"t5": {"eos": 1}}
_ADDED = {"llama": ("bos",), "bert": ("bos", "seperator"), "t5": ("eos",)}
TYPES = {f"{_PREFIX}merges": "string[]", f"{_PREFIX}precompiled_charsmap": "uint8[]", f"{_PREFIX}scores": "float32[]"}
"""Types of what `to_gguf` gives that its values alone do not tell: a list may be empty."""


def from_gguf(metadata: Mapping[str, object], where: str, rows: int | None = None) -> Tokenizer:
    """The tokenizer that a GGUF file describes, with its chat template.

    Args:
        metadata: the file's keys and values, arrays as lists.
        where: the file named in errors.
        rows: rows of the embedding, to be compared with the tokens; None where nobody knows.

    Raises:
        InputError: a tokenizer of an unknown kind, or whose parts disagree (Q7).
    """
    known = _Metadata(metadata, where)
    tokens = known.tokens(rows)
    read = {"gpt2": _byte_level, "llama": _sentencepiece, "t5": _sentencepiece, "bert": _word_pieces}
    if known.model not in read:
        raise InputError(f"{where} {_PREFIX}model", f"{known.model[:40]!r}", f"one of {', '.join(read)}")
    tree = read[known.model](known, tokens)
    entries = {cast("int", entry["id"]): entry for entry in cast("list[dict[str, object]]", tree["added_tokens"])}
    for name, number in known.ids.items():
        role = _ROLES.get(name)
        entry = entries.setdefault(number, added_entry(number, tokens[number].text))
        if role and all(role not in cast("list[str]", other.get("roles", [])) for other in entries.values()):
            entry["roles"] = [*cast("list[str]", entry.get("roles", [])), role]
    tree["added_tokens"] = [entries[number] for number in sorted(entries)]
    ends = [end for end in known.added if end in known.ids]
    if ends:
        names = {end: str(entries[known.ids[end]]["content"]) for end in ends}
        ids = {name: known.ids[end] for end, name in names.items()}
        before = [names[end] for end in ends if end == "bos"]
        tree["post_processor"] = formats.template(before, [names[end] for end in ends if end != "bos"], (), ids)
    return Tokenizer(tree, where, {"chat_template": metadata.get("tokenizer.chat_template")})


class _Metadata:
    """The keys of one tokenizer, their types checked when asked for."""

    def __init__(self, metadata: Mapping[str, object], where: str) -> None:
        self._all, self.where = metadata, where
        self.model = str(field(metadata, f"{_PREFIX}model", str, where))
        self.pre = str(self._all.get(f"{_PREFIX}pre") or "default")
        found = {
            key.removeprefix(_PREFIX).removesuffix("_token_id"): self.integer(key)
            for key in metadata
            if key.startswith(_PREFIX) and key.endswith("_token_id")
        }
        if self.model == "bert" and "cls" in found:
            found.setdefault("bos", found["cls"])
        self.ids = found
        steps = _BY_NAME.get(self.pre, ()) if self.model == "gpt2" else ()
        default = ("bos",) if "whole" in steps else _ADDED.get(self.model, ())
        flags = {"bos": "add_bos_token", "eos": "add_eos_token", "seperator": "add_sep_token"}
        self.added = [end for end, flag in flags.items() if self.flag(flag, end in default)]

    def integer(self, key: str) -> int:
        value = field(self._all, key, int, self.where)
        return cast("int", value)

    def flag(self, name: str, default: bool) -> bool:
        value = field(self._all, _PREFIX + name, (bool, type(None)), self.where)
        return default if value is None else bool(value)

    def array(self, name: str, kind: type | tuple[type, ...], length: int | None = None) -> list[Any]:
        """A list of values of one type; empty where the file has none."""
        values = cast("list[Any] | None", field(self._all, _PREFIX + name, (list, type(None)), self.where)) or []
        if not all(issubclass(found, kind) for found in set(map(type, values))):
            raise InputError(f"{self.where} {_PREFIX}{name}", "values of another type", f"{kind}")
        if values and length not in (None, len(values)):
            raise InputError(f"{self.where} {_PREFIX}{name}", f"{len(values)} values", f"{length}, one a token")
        return values

    def tokens(self, rows: int | None) -> list[Piece]:
        """The vocabulary; tokens, embedding rows and special ids agree."""
        texts = self.array("tokens", str)
        scores, kinds = (self.array(name, (int, float), len(texts)) for name in ("scores", "token_type"))
        highest = max(self.ids.values(), default=-1)
        if not texts or rows not in (None, len(texts)) or not -1 <= highest < len(texts):
            found = f"{len(texts)} tokens, {'?' if rows is None else rows} embedding rows, special ids up to {highest}"
            raise InputError(self.where, found, "as many rows as tokens, and every special id below")
        names = [text or f"[EMPTY_{number}]" for number, text in enumerate(texts)]
        if len(set(names)) < len(names):
            double = next(name for number, name in enumerate(names) if name in names[:number])
            raise InputError(f"{self.where} {_PREFIX}tokens", f"{double[:40]!r} twice", "each token once")
        filled = zip(names, scores or [0.0] * len(names), kinds or [NORMAL] * len(names), strict=True)
        pieces = [Piece(name, float(score), int(kind)) for name, score, kind in filled]
        for name, number in _IDS.get(self.model, {}).items():
            if number < len(pieces) and pieces[number].type in (UNKNOWN, CONTROL):
                self.ids.setdefault(name, number)
        return pieces


def _added(tokens: Sequence[Piece], special: tuple[int, ...] = (UNKNOWN, CONTROL)) -> list[dict[str, object]]:
    chosen = [(number, piece) for number, piece in enumerate(tokens) if piece.type in (*special, USER_DEFINED)]
    return [{**added_entry(number, piece.text), "special": piece.type in special} for number, piece in chosen]


def _byte_level(known: _Metadata, tokens: Sequence[Piece]) -> dict[str, object]:
    if known.pre not in _BY_NAME:
        found = f"{known.pre[:40]!r}, a split pattern without a known meaning"
        raise InputError(f"{known.where} {_PREFIX}pre", found, f"one of {', '.join(_BY_NAME)}")
    names = _BY_NAME[known.pre]
    steps: list[object] = [formats.split(SPLIT_PATTERNS[name]) for name in names if name != "whole"]
    steps.append(formats.byte_level())
    vocab = {piece.text: number for number, piece in enumerate(tokens)}
    tree = formats.byte_level_tree(vocab, known.array("merges", str), steps, "whole" in names)
    return tree | {"added_tokens": _added(tokens)}


def _sentencepiece(known: _Metadata, tokens: Sequence[Piece]) -> dict[str, object]:
    """`llama`: BPE by scores, every stretch of text between tokens with a space before it; `t5`: Unigram."""
    unigram = known.model == "t5"
    switches = (known.flag("add_space_prefix", not unigram), known.flag("remove_extra_whitespaces", False) and unigram)
    flags = dict(zip(FLAGS, (*switches, True, False), strict=True))
    charsmap = bytes(number & 0xFF for number in known.array("precompiled_charsmap", int)) if unigram else b""
    fallback = any(piece.type == BYTE for piece in tokens)
    tree = model_tree(Model("unigram" if unigram else "bpe", tokens, flags, charsmap, fallback), known.where)
    if not unigram:
        del cast("dict[str, object]", tree["normalizer"])[KEY]
    return tree


def _word_pieces(known: _Metadata, tokens: Sequence[Piece]) -> dict[str, object]:
    """Here a word's first piece has a mark before it and the others nothing; in BERT's file the others have ##."""

    def spelled(piece: Piece) -> str:
        if piece.type in (CONTROL, UNKNOWN):
            return piece.text
        return piece.text.removeprefix(MARK) if piece.text.startswith(MARK) else f"##{piece.text}"

    vocab = {spelled(piece): number for number, piece in enumerate(tokens)}
    if len(vocab) < len(tokens) or "unknown" not in known.ids:
        found = f"{len(vocab)} different tokens of {len(tokens)}"
        raise InputError(f"{known.where} {_PREFIX}tokens", found, "each token once, and one in the role unknown")
    lower = known.flag("normalizer.lowercase", True)
    options = {"strip_accents": known.flag("normalizer.strip_accents", lower), "lowercase": lower}
    unknown = spelled(tokens[known.ids["unknown"]])
    tree = formats.word_piece_tree(vocab, unknown, {"handle_chinese_chars": True, **options})
    return tree | {"added_tokens": _added(tokens)}


def to_gguf(tokenizer: Tokenizer) -> dict[str, object]:
    """The metadata that describes a tokenizer to llama.cpp, arrays as lists; TYPES says what their values do not.

    Raises:
        InputError: a tokenizer that the format has no words for, such as a split pattern without a name.
    """
    tree = cast("dict[str, Any]", strict_json(tokenizer.to_json(), "tokenizer"))
    write = {"bpe": _write_bpe, "byte": _write_bpe, "unigram": _write_unigram, "wordpiece": _write_word_pieces}
    if tokenizer.kind not in write:
        raise _unsayable(f"a tokenizer of kind {tokenizer.kind}", f"one of {', '.join(write)}")
    if any(not entry["special"] and (entry["lstrip"] or entry["rstrip"]) for entry in tree["added_tokens"]):
        raise _unsayable("a plain added token that takes the spaces beside it", "none")
    made = write[tokenizer.kind](tree, _pieces(tokenizer, tree))
    begin, end = ("cls", "seperator") if tokenizer.kind == "wordpiece" else ("bos", "eos")
    around = [(tokenizer.prefix_ids, tokenizer.bos_id), (tokenizer.suffix_ids, tokenizer.eos_id)]
    if any(ids not in ((), (number,)) for ids, number in around):
        raise _unsayable(f"the template {tokenizer.prefix_ids} text {tokenizer.suffix_ids}", "bos and eos")
    ids = {begin: tokenizer.bos_id, "bos": tokenizer.bos_id, end: tokenizer.eos_id, "unknown": tokenizer.unk_id}
    ids |= {"padding": tokenizer.pad_id, "mask": tokenizer.mask_id}
    made |= {f"{name}_token_id": number for name, number in ids.items() if number is not None}
    made |= {"add_bos_token": bool(tokenizer.prefix_ids), f"add_{end[:3]}_token": bool(tokenizer.suffix_ids)}
    metadata = {_PREFIX + name: value for name, value in made.items()}
    return metadata | ({"tokenizer.chat_template": tokenizer.chat_template} if tokenizer.chat_template else {})


def _unsayable(found: str, expected: str) -> InputError:
    return InputError("tokenizer", f"{found}, for which a GGUF file has no words", expected)


def _pieces(tokenizer: Tokenizer, tree: dict[str, Any]) -> list[Piece]:
    added = {entry["id"]: CONTROL if entry["special"] else USER_DEFINED for entry in tree["added_tokens"]}
    spelled = {byte_piece(byte) for byte in range(256)} if tree["model"].get("byte_fallback") else set()
    pieces = []
    for number in range(tokenizer.vocab_size):
        text = tokenizer.token(number)
        kind = UNUSED if text is None else BYTE if text in spelled else added.get(number, NORMAL)
        is_unknown = number == tokenizer.unk_id and (tree["model"].get("unk_token") or tokenizer.kind == "unigram")
        pieces.append(Piece(f"[PAD{number}]" if text is None else text, 0.0, UNKNOWN if is_unknown else kind))
    return pieces


def _listed(model: str, pieces: Sequence[Piece]) -> dict[str, object]:
    made = {"tokens": [piece.text for piece in pieces], "token_type": [piece.type for piece in pieces]}
    return {"model": model, **made}


def _write_bpe(tree: dict[str, Any], pieces: Sequence[Piece]) -> dict[str, object]:
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in tree["model"]["merges"]]
    if not any(node["type"] == "ByteLevel" for node in leaves(tree["decoder"], "decoder", "tokenizer")):
        return _write_sentencepiece(tree, pieces, pairs)
    if any(node["type"] != "NFC" for node in leaves(tree["normalizer"], "normalizer", "tokenizer")):
        raise _unsayable("a normalizer before a byte-level BPE", "none, or NFC, which llama.cpp leaves out")
    steps = tuple(_step_names(tree)) if pairs else ("gpt-2",)
    if steps not in _STEPS:
        raise _unsayable(f"a split pattern that llama.cpp has no name for ({', '.join(steps)})", "a known one")
    merges_ = [" ".join(pair) for pair in pairs]
    return {**_listed("gpt2", pieces), "pre": _STEPS[steps].split()[0], "merges": merges_}


def _step_names(tree: dict[str, Any]) -> Iterator[str]:
    names = {pattern: name for name, pattern in SPLIT_PATTERNS.items()}
    for node in leaves(tree["pre_tokenizer"], "pre_tokenizer", "tokenizer"):
        pattern = cast("dict[str, str]", node.get("pattern") or {}).get("Regex", "")
        if node["type"] == "ByteLevel" and not node.get("add_prefix_space"):
            if node.get("use_regex") is not False:
                yield "gpt-2"
        elif node["type"] == "Digits":
            yield "digits" if node.get("individual_digits") else "digits-run"
        elif node["type"] == "Split" and (node["behavior"], node["invert"]) in (("Isolated", False), ("Removed", True)):
            yield names[pattern].removesuffix("-short") if pattern else "a plain string"
        else:
            yield str(node["type"])
    if tree["model"].get("ignore_merges"):
        yield "whole"


def _write_sentencepiece(tree: dict[str, Any], pieces: Sequence[Piece], pairs: list[list[str]]) -> dict[str, object]:
    """BPE by scores: as good as the merges where these are all the ways to build each piece, piece after piece."""
    prefix, tidy, charsmap = _sentencepiece_facts(tree)
    ranks: dict[str, int] = {}
    for left, right in pairs:
        ranks.setdefault(left + right, len(ranks))
    scored = [replace(piece, score=-float(ranks.get(piece.text, len(ranks)))) for piece in pieces]
    ways = merges(scored, "tokenizer")
    same = sorted(ways) == sorted(pairs) and ["".join(way) for way in ways] == ["".join(pair) for pair in pairs]
    if not same or tidy or charsmap or (KEY in tree["normalizer"] and prefix and _has(pieces, USER_DEFINED)):
        raise _unsayable("merges or a normalizer that scores and spaces do not express", "those of Llama 2")
    # llama.cpp looks for user-defined tokens in the text before its spaces become marks.
    spelled = [
        replace(piece, text=piece.text.replace(MARK, " ")) if piece.type == USER_DEFINED else piece for piece in pieces
    ]
    return {**_listed("llama", spelled), "scores": [piece.score for piece in scored], "add_space_prefix": prefix}


def _write_unigram(tree: dict[str, Any], pieces: Sequence[Piece]) -> dict[str, object]:
    prefix, tidy, charsmap = _sentencepiece_facts(tree)
    scores = [score for _, score in tree["model"]["vocab"]]
    scores += [0.0] * (len(pieces) - len(scores))
    made = {"scores": scores, "add_space_prefix": prefix, "remove_extra_whitespaces": tidy}
    return {**_listed("t5", pieces), **made} | ({"precompiled_charsmap": list(charsmap)} if charsmap else {})


def _sentencepiece_facts(tree: dict[str, Any]) -> tuple[bool, bool, bytes]:
    """A space before the text, single spaces only, and the table of replacements."""
    normalizer = tree["normalizer"] or {}
    nodes = list(leaves(tree["normalizer"], "normalizer", "tokenizer"))
    steps = list(leaves(tree["pre_tokenizer"], "pre_tokenizer", "tokenizer"))
    maps = [b64decode(str(node["precompiled_charsmap"])) for node in nodes if node["type"] == "Precompiled"]
    if KEY in normalizer:
        prefix, tidy, escape, at_end = (normalizer[KEY][name] for name in FLAGS)
        if escape and not at_end:
            return prefix, tidy, b"".join(maps)
    elif {node["type"] for node in nodes} <= {"Prepend", "Replace"} and {node["type"] for node in steps} <= {
        "Metaspace"
    }:
        first = [node["prepend_scheme"] != "never" for node in steps]
        return any(first) or any(node["type"] == "Prepend" for node in nodes), False, b""
    raise _unsayable("a normalizer or pre-tokenizer other than SentencePiece's", "a tokenizer made of a .model file")


def _has(pieces: Sequence[Piece], kind: int) -> bool:
    return any(piece.type == kind for piece in pieces)


def _write_word_pieces(tree: dict[str, Any], pieces: Sequence[Piece]) -> dict[str, object]:
    parts = [list(leaves(tree[part], part, "tokenizer")) for part in ("normalizer", "pre_tokenizer")]
    options = parts[0][0] if parts[0] else {}
    plain = options.get("clean_text") is True and options.get("handle_chinese_chars") is True
    kinds = [[node["type"] for node in part] for part in parts]
    if kinds != [["BertNormalizer"], ["BertPreTokenizer"]] or not plain:
        raise _unsayable("a normalizer or pre-tokenizer other than BERT's", "BertNormalizer and BertPreTokenizer")
    if tree["model"].get("continuing_subword_prefix") != "##":
        raise _unsayable("another prefix than ##", "##")

    def spelled(piece: Piece) -> str:
        if piece.type in (CONTROL, UNKNOWN):
            return piece.text
        return piece.text[2:] if piece.text.startswith("##") else MARK + piece.text

    lower, strip = bool(options.get("lowercase")), options.get("strip_accents")
    made = _listed("bert", [replace(piece, text=spelled(piece)) for piece in pieces])
    flags = {"normalizer.lowercase": lower, "normalizer.strip_accents": lower if strip is None else strip}
    return {**made, **flags}
