"""The content of a tokenizer.json, checked before the `tokenizers` library sees it.

The library's own messages name neither file nor key and some wrong files make it panic, so each fact that
Headway relies on is checked here first: model type, vocabulary, special tokens, node types and patterns.

A token's role (bos, eos, pad, unk, mask) is kept in the file as `"roles": [...]` on its entry in
`added_tokens`; the `tokenizers` library ignores that key. Files without it get roles from
`tokenizer_config.json` beside them, else from the names that published tokenizers use.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, cast

from headway.errors import InputError
from headway.strict import field
from headway.text.patterns import check_nodes, leaves

Kind = Literal["bpe", "wordpiece", "unigram", "byte", "char", "word"]
Role = Literal["bos", "eos", "pad", "unk", "mask"]

# By priority; BERT's [CLS] and [SEP] begin and end a text.
ROLE_NAMES: dict[Role, tuple[str, ...]] = {
    "bos": ("<s>", "<|begin_of_text|>", "<bos>", "[CLS]", "<|startoftext|>"),
    "eos": ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "[SEP]"),
    "pad": ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>"),
    "unk": ("<unk>", "[UNK]"),
    "mask": ("<mask>", "[MASK]", "<|mask|>"),
}
_CONFIG_KEYS: dict[Role, tuple[str, ...]] = {
    "bos": ("bos_token", "cls_token"),
    "eos": ("eos_token", "sep_token"),
    "pad": ("pad_token",),
    "unk": ("unk_token",),
    "mask": ("mask_token",),
}
MAX_PIECE = 4096  # characters of one vocabulary entry
MAX_WORD = 1000  # WordPiece tries every prefix of a word: quadratic in this


@dataclass(frozen=True)
class Added:
    """One entry of `added_tokens`."""

    id: int
    content: str
    special: bool
    spaced: bool
    """It swallows white space beside it (lstrip, rstrip)."""


@dataclass(frozen=True)
class Spec:
    """A checked tokenizer.json: its tree and the facts that the rest of `headway.text` asks for."""

    tree: dict[str, object]
    kind: Kind
    vocab: dict[str, int]
    added: tuple[Added, ...]
    roles: dict[Role, int]

    @property
    def vocab_size(self) -> int:
        """One more than the highest id: the number of embedding rows needed."""
        ids = [*self.vocab.values(), *(token.id for token in self.added)]
        return max(ids, default=-1) + 1

    @property
    def model(self) -> dict[str, object]:
        """The `model` object of the file."""
        return cast("dict[str, object]", self.tree["model"])

    def nodes(self, part: str) -> list[dict[str, object]]:
        """The flattened nodes of normalizer, pre_tokenizer or decoder."""
        return list(leaves(self.tree.get(part), part, "tokenizer"))


def byte_characters() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary, indexed by the byte.

    Printable Latin-1 stands for itself, the other 68 bytes for U+0100 onwards (GPT-2's encoder.py).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def read_spec(tree: object, where: str, config: object = None) -> Spec:
    """Check a parsed tokenizer.json.

    Args:
        tree: what strict_json returned.
        where: the file's name for errors.
        config: the parsed tokenizer_config.json beside it, if there is one.

    Raises:
        InputError: naming file and key.
    """
    model = field(tree, "model", dict, where)
    tree = dict(cast("dict[str, object]", tree))
    assert isinstance(model, dict)
    # A file made for one model's inputs may cut or pad every text; Headway does both itself.
    tree["truncation"] = tree["padding"] = None
    check_nodes(tree, where)
    name = _model_type(model, where)
    vocab = _unigram_vocab(model, where) if name == "Unigram" else _vocab(model, where)
    _check_model(name, model, vocab, where)
    entries = _added_entries(tree, vocab, where)
    roles = _written_roles(entries, where)
    if config and not roles:
        roles = _config_roles(config, entries, vocab, f"{where} (tokenizer_config.json)")
    roles = roles or _named_roles(entries)
    unknown = model.get("unk_token")  # null where the kind spells everything; the text may still hold a word "None"
    unk = model.get("unk_id", vocab.get(unknown) if isinstance(unknown, str) else None)
    if isinstance(unk, int):
        roles["unk"] = unk
    added = tuple(_added(entry, where) for entry in entries)
    _check_ids(vocab, added, where)
    _write_roles(entries, roles)
    tree["added_tokens"] = entries
    spec = Spec(tree, "bpe", vocab, added, roles)
    return Spec(tree, _kind(name, spec), vocab, added, roles)


def _model_type(model: dict[str, object], where: str) -> str:
    """The model's type; files of before 2021 leave it out, and there the keys tell."""
    known = ("BPE", "WordPiece", "Unigram", "WordLevel")
    if "type" in model:
        name = str(field(model, "type", str, f"{where} model"))
        if name not in known:
            raise InputError(f"{where} model.type", repr(name[:80]), f"one of {', '.join(known)}")
        return name
    field(model, "vocab", (dict, list), f"{where} model")
    if isinstance(model["vocab"], list):
        return "Unigram"
    return "BPE" if "merges" in model else "WordPiece" if "max_input_chars_per_word" in model else "WordLevel"


def _vocab(model: dict[str, object], where: str) -> dict[str, int]:
    vocab = field(model, "vocab", dict, f"{where} model")
    assert isinstance(vocab, dict)
    for piece, number in vocab.items():
        if type(number) is not int or not 0 <= number < 2**31:
            raise InputError(f"{where} model.vocab", f"id {number!r:.40} of {piece[:40]!r}", "an id below 2^31")
    return cast("dict[str, int]", vocab)


def _unigram_vocab(model: dict[str, object], where: str) -> dict[str, int]:
    entries = field(model, "vocab", list, f"{where} model")
    assert isinstance(entries, list)
    for number, entry in enumerate(entries):
        good = isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)
        if not good or type(entry[1]) not in (int, float):
            raise InputError(f"{where} model.vocab[{number}]", "wrong shape", "[piece, log probability]")
    return {cast("str", entry[0]): number for number, entry in enumerate(entries)}


def _check_model(name: str, model: dict[str, object], vocab: dict[str, int], where: str) -> None:
    place = f"{where} model"
    if not vocab:
        raise InputError(f"{place}.vocab", "empty", "at least one token")
    longest = max(vocab, key=len)
    if len(longest) > MAX_PIECE:
        raise InputError(f"{place}.vocab", f"a token of {len(longest)} characters", f"at most {MAX_PIECE}")
    if name == "Unigram":
        unk = field(model, "unk_id", (int, type(None)), place)
        if isinstance(unk, int) and not 0 <= unk < len(vocab):
            raise InputError(f"{place}.unk_id", str(unk), f"0 to {len(vocab) - 1}")
        return
    required = (str,) if name in ("WordPiece", "WordLevel") else (str, type(None))
    token = field(model, "unk_token", required, place)
    if token not in vocab and (token or name != "BPE"):
        raise InputError(f"{place}.unk_token", f"{str(token)[:80]!r} is not in the vocabulary", "a token of it")
    if name == "BPE":
        _check_merges(model, vocab, place)
    elif name == "WordPiece":
        limit = field(model, "max_input_chars_per_word", int, place)
        if not 0 < cast("int", limit) <= MAX_WORD:
            raise InputError(f"{place}.max_input_chars_per_word", str(limit)[:40], f"1 to {MAX_WORD}")


def _check_merges(model: dict[str, object], vocab: dict[str, int], place: str) -> None:
    if model.get("dropout"):
        raise InputError(f"{place}.dropout", f"{model['dropout']!r:.40}", "null: a text has one encoding")
    # The library cuts the prefix off each right part without looking: a part without it aborts the process.
    prefix = str(field(model, "continuing_subword_prefix", (str, type(None)), place) or "")
    merges = cast("list[object]", field(model, "merges", list, place))
    if not prefix and merge_parts(merges) <= vocab.keys():
        return
    for number, merge in enumerate(merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or str(pair[0]) not in vocab or str(pair[1]) not in vocab:
            found = f"{merge!r:.80}"
            raise InputError(f"{place}.merges[{number}]", found, "two tokens of the vocabulary")
        if not str(pair[1]).startswith(prefix):
            found = f"{merge!r:.80} with continuing_subword_prefix {prefix[:40]!r}"
            raise InputError(f"{place}.merges[{number}]", found, "a right part that begins with it")


def merge_parts(merges: list[object]) -> set[str | None]:
    """All parts of merges `left right`; None among them where one is of another form. There are tens of thousands."""
    if set(map(type, merges)) != {str}:
        return {None} if merges else set()
    texts = cast("list[str]", merges)
    parts: set[str | None] = set(" ".join(texts).split(" "))
    return parts if all(text.count(" ") == 1 for text in texts) else {None}


def _added_entries(tree: dict[str, object], vocab: dict[str, int], where: str) -> list[dict[str, object]]:
    entries = field(tree, "added_tokens", (list, type(None)), where) or []
    assert isinstance(entries, list)
    seen: dict[str, object] = {}
    for number, entry in enumerate(entries):
        place = f"{where} added_tokens[{number}]"
        content, token_id = str(field(entry, "content", str, place)), field(entry, "id", int, place)
        for flag in ("special", "lstrip", "rstrip", "single_word", "normalized"):
            field(entry, flag, bool, place)
        if not content or len(content) > MAX_PIECE:
            raise InputError(place, f"content of {len(content)} characters", f"1 to {MAX_PIECE}")
        if content in seen:
            raise InputError(place, f"{content[:80]!r} again, after id {seen[content]}", "each token once")
        seen[content] = token_id
        if vocab.get(content, token_id) != token_id:
            found = f"{content[:80]!r} has id {token_id} here and {vocab[content]} in model.vocab"
            raise InputError(place, found, "one id")
    return [dict(entry) for entry in entries]


def _added(entry: dict[str, object], where: str) -> Added:
    token_id = cast("int", entry["id"])
    if not 0 <= token_id < 2**31:
        raise InputError(f"{where} added_tokens", f"id {str(token_id)[:40]}", "an id below 2^31")
    spaced = entry["lstrip"] is True or entry["rstrip"] is True
    return Added(token_id, str(entry["content"]), entry["special"] is True, spaced)


def _check_ids(vocab: dict[str, int], added: Iterable[Added], where: str) -> None:
    """Ids are distinct, and so nearly dense that a model of this size is justified by the file."""
    owner = dict(zip(vocab.values(), vocab, strict=True))
    pairs = [(token.content, token.id) for token in added]
    if len(owner) < len(vocab):  # only then does it matter which two share an id
        owner, pairs = {}, [*vocab.items(), *pairs]
    for content, token_id in pairs:
        other = owner.setdefault(token_id, content)
        if other != content:
            raise InputError(where, f"id {token_id} belongs to {other[:40]!r} and {content[:40]!r}", "one token")
    highest = max(owner)
    if highest >= 2 * len(owner) + 1024:
        raise InputError(where, f"highest id {highest} with {len(owner)} tokens", "nearly consecutive ids")


def _config_roles(
    config: object, entries: list[dict[str, object]], vocab: dict[str, int], where: str
) -> dict[Role, int]:
    """Roles that a tokenizer_config.json gives; its token may be a string or an object with `content`."""
    if not isinstance(config, dict):
        raise InputError(where, "is not an object", "an object")
    ids = {str(entry["content"]): cast("int", entry["id"]) for entry in entries}
    roles: dict[Role, int] = {}
    for role, keys in _CONFIG_KEYS.items():
        for value in (config.get(key) for key in keys):
            content = value.get("content") if isinstance(value, dict) else value
            if not isinstance(content, str) or role in roles:
                continue
            if content not in ids and content in vocab:
                ids[content] = vocab[content]
                entries.append(added_entry(vocab[content], content))
            if content in ids:
                roles[role] = ids[content]
    return roles


def _written_roles(entries: list[dict[str, object]], where: str) -> dict[Role, int]:
    """The roles that the entries carry."""
    roles: dict[Role, int] = {}
    for entry in entries:
        names = field(entry, "roles", (list, type(None)), f"{where} added_tokens") or []
        for name in cast("list[object]", names):
            if not isinstance(name, str) or name not in ROLE_NAMES:
                found = f"{str(name)[:40]!r}"
                raise InputError(f"{where} added_tokens.roles", found, f"one of {', '.join(ROLE_NAMES)}")
            roles[name] = cast("int", entry["id"])
    return roles


def _named_roles(entries: list[dict[str, object]]) -> dict[Role, int]:
    """The roles that usual names tell."""
    ids = {str(entry["content"]): cast("int", entry["id"]) for entry in entries if entry["special"]}
    found = {role: [ids[name] for name in names if name in ids] for role, names in ROLE_NAMES.items()}
    return {role: numbers[0] for role, numbers in found.items() if numbers}


def _write_roles(entries: list[dict[str, object]], roles: dict[Role, int]) -> None:
    for entry in entries:
        mine = sorted(role for role, token_id in roles.items() if token_id == entry["id"])
        entry.pop("roles", None)
        if mine:
            entry["roles"] = mine


def added_entry(token_id: int, content: str) -> dict[str, object]:
    """A special token's entry for `added_tokens`."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": content, **flags, "special": True}


def empty_tree(model: dict[str, object]) -> dict[str, object]:
    """A tree with every key that the format has."""
    parts = ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    return {"version": "1.0", "added_tokens": [], **dict.fromkeys(parts), "model": model}


def _kind(name: str, spec: Spec) -> Kind:
    """Byte and character tokenizers are BPE without merges; the rest is named by the model."""
    if name != "BPE":
        return {"WordPiece": "wordpiece", "Unigram": "unigram", "WordLevel": "word"}[name]  # type: ignore[return-value]
    model, specials = spec.model, {token.content for token in spec.added}
    plain = all(not model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"))
    only_special = all(token.special for token in spec.added)
    if model["merges"] or model.get("fuse_unk") or not plain or not only_special or spec.nodes("normalizer"):
        return "bpe"
    base = {piece: number for piece, number in spec.vocab.items() if piece not in specials}
    steps, decoders = spec.nodes("pre_tokenizer"), [node["type"] for node in spec.nodes("decoder")]
    if base == {piece: byte for byte, piece in enumerate(byte_characters())} and decoders == ["ByteLevel"]:
        one = steps[0] if len(steps) == 1 else {}
        whole = one.get("type") == "ByteLevel" and not one.get("add_prefix_space") and one.get("use_regex") is False
        return "byte" if whole else "bpe"
    characters = not steps and decoders == ["Fuse"] and all(len(piece) == 1 for piece in base)
    return "char" if characters and model.get("unk_token") else "bpe"
